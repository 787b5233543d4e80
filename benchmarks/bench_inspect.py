"""Throughput of inspection on a folder of 500 pictures, and the share of time outside the network.

    python benchmarks/bench_inspect.py RUN PICTURES [--count 500] [--batch-size 8]

In one process: first the network and the search alone on batches that are already in memory, then
the whole way from files to judgements. What the whole way takes longer is time outside the network.
"""

import argparse
import time
from itertools import cycle, islice
from pathlib import Path

from allgood import Inspector
from allgood.data.batches import load_batches
from allgood.data.files import pictures_below
from allgood.types import Failure, Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    inspector = Inspector(arguments.run)
    found = pictures_below(arguments.pictures)
    paths = list(islice(cycle(found), arguments.count))
    samples = [
        Sample(path, inspector.categories[0], "test", "good", id=str(i))
        for i, path in enumerate(paths)
    ]
    failures: list[Failure] = []
    batches = list(
        load_batches(
            samples, inspector.transform, failures=failures, batch_size=arguments.batch_size
        )
    )
    for batch in batches[:3]:
        inspector.predict_batch(batch, None)  # warm up

    started = time.perf_counter()
    for batch in batches:
        inspector.predict_batch(batch, None)
    network = time.perf_counter() - started

    started = time.perf_counter()
    judged = sum(1 for _ in inspector.inspect(paths, batch_size=arguments.batch_size))
    whole = time.perf_counter() - started

    print(f"{len(paths)} pictures, {len(failures)} unreadable")
    print(f"network and search alone   {len(paths) / network:7.1f} pictures/s")
    print(f"files to judgements        {judged / whole:7.1f} pictures/s")
    print(f"time outside the network   {max(0.0, 1 - network / whole):7.1%}")


if __name__ == "__main__":
    main()
