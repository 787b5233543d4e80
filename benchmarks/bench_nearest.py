"""Nearest-neighbour search: the blocked product, FAISS and torch.cdist, in one process.

    python benchmarks/bench_nearest.py

Best of five, milliseconds. The line between the engines, `_FAISS_BELOW`, comes from here.
"""

import time
from collections.abc import Callable

import torch

from allgood.layers.nearest import nearest_distance

SHAPES = ((784, 1_000, 256), (784, 10_000, 256), (1_024, 12_000, 152), (8_192, 12_000, 152))
"""Query rows, bank rows, channels: one or eight images against banks of usual sizes."""


def milliseconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * min(times)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    print(f"{'query x bank x channels':<26} {'cdist':>8} {'torch':>8} {'faiss':>8} {'auto':>8}")
    for rows, bank_rows, channels in SHAPES:
        query = torch.randn(rows, channels, generator=generator)
        bank = torch.randn(bank_rows, channels, generator=generator)
        times = [milliseconds(lambda q=query, b=bank: torch.cdist(q, b).min(dim=1))]
        for engine in ("torch", "faiss", "auto"):
            try:
                times.append(
                    milliseconds(lambda q=query, b=bank, e=engine: nearest_distance(q, b, engine=e))
                )
            except ImportError:
                times.append(float("nan"))
        columns = " ".join(f"{value:>8.1f}" for value in times)
        print(f"{f'{rows} x {bank_rows} x {channels}':<26} {columns}", flush=True)


if __name__ == "__main__":
    main()
