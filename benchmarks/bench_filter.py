"""Accuracy on real pictures: a detector alone, its CostFilter alone, and both together.

    python benchmarks/bench_filter.py DATA [DATA ...] [--host patchcore] [--train-share 0.7]
        [--seeds 0 1 2]

One model over all categories, embedded encoder, 256 x 256, thresholds' share of 15 % kept from
fitting. The host `anomalydino` is the paper's AnomalDF: three good pictures per category. The
filter learns synthetic anomalies only; lambda is 0.5, or with `--fusion auto` the best on synthetic
pictures kept from training. All are measured on the same test pictures: `alone` is the run without
a filter, `host`, `filter` and `both` the parts of the run with one, whose maps are all scored by
the mean of their highest 0.38 %. `synthetic` is the pixel AP on the synthetic pictures.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allgood import evaluate, filter, fit
from allgood.runs import PROVENANCE, read_json

NAMES = ("image_auroc", "pixel_ap", "pixel_auroc", "aupro")
HOSTS: dict[str, dict[str, Any]] = {
    "patchcore": {},
    "anomalydino": {"settings": ("templates=3",), "image_size": 256, "keep_aspect": False},
}


def show(part: str, seed: int, numbers: Mapping[str, Any]) -> None:
    """One line per category, and the mean."""
    for category, metrics in (*numbers["categories"].items(), ("mean", numbers["mean"])):
        columns = " ".join(f"{metrics[name]['value']:>12.3f}" for name in NAMES)
        print(f"{part:<10} {seed:>4} {category:<16} {columns}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--host", choices=HOSTS, default="patchcore")
    parser.add_argument("--train-share", type=float, default=0.7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", nargs="*", default=[], help="as of `allgood filter`")
    parser.add_argument("--settings", nargs="*", default=[], help="as of `allgood filter`")
    parser.add_argument("--fusion", choices=["fixed", "auto"], default="fixed")
    parser.add_argument("--draws", type=int, help="as of `allgood filter`")
    arguments = parser.parse_args()
    print(f"{'part':<10} {'seed':>4} {'category':<16} " + " ".join(f"{n:>12}" for n in NAMES))
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            host = fit(
                arguments.data,
                detector=arguments.host,
                out=Path(folder) / "host",
                train_share=arguments.train_share,
                seed=seed,
                **HOSTS[arguments.host],
            )
            run = filter(
                host,
                arguments.data,
                out=Path(folder) / "filtered",
                cache=Path(folder) / "cache",
                train=tuple(arguments.train),
                settings=tuple(arguments.settings),
                fusion=arguments.fusion,
                draws=arguments.draws,
                seed=seed,
            )
            numbers = evaluate(run, arguments.data).metrics
            show("alone", seed, evaluate(host, arguments.data).metrics)
            show("host", seed, numbers["parts"]["host"])
            show("filter", seed, numbers["parts"]["filter"])
            show("both", seed, numbers)
            found = read_json(run / PROVENANCE)["synthetic_validation"]["mean"]
            share = f"{numbers['parts']['fusion']:g}"
            print(
                f"{'synthetic':<10} {seed:>4} initial map {found['initial_map']:.3f}, host "
                f"{found['host']:.3f}, filter {found['filter']:.3f}, both "
                f"{found['fusion'][share]:.3f} (fusion {share})",
                flush=True,
            )


if __name__ == "__main__":
    main()
