"""Accuracy on real pictures of the detectors that learn by gradient, as `allgood fit` trains them.

    python benchmarks/bench_learners.py DATA [DATA ...] --recipes uniad hvqtrans unias_light
        [--seeds 0 1 2] [--train steps=2000] [--out DIR]

One model over all categories, embedded encoder, the recipe's image size; thresholds' share of the
good pictures 0, the last step's weights, no number of the test set used for any choice. Pixel
metrics at the input's size, the categories known; `inferred` is the share of test pictures whose
category the run tells by itself. Runs in DIR that are finished are evaluated and not repeated.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allgood import Inspector, evaluate, fit
from allgood.data.batches import load_batches
from allgood.data.readers import read_data
from allgood.runs import CONFIG, PROVENANCE, read_json

NAMES = ("image_auroc", "pixel_ap", "pixel_auroc", "aupro", "dsc", "dsc_defective", "dsc_pooled")


def measured(recipe: str, seed: int, roots: Sequence[Path], folder: Path, arguments: Any) -> dict:
    """Category -> metric -> value, after a training or of the run that is there."""
    run = folder / f"{recipe}-{seed}"
    if not (run / CONFIG).is_file():
        fit(
            list(roots),
            recipe=recipe,
            out=run,
            train=tuple(arguments.train),
            settings=tuple(arguments.settings),
            train_share=arguments.train_share,
            calibration_share=0,
            seed=seed,
            cache=arguments.cache,
        )
    size = read_json(run / CONFIG)["transform"]["size"]
    categories = evaluate(run, list(roots), pixel_size=size).metrics["categories"]
    return {
        category: {name: numbers[name]["value"] for name in NAMES}
        for category, numbers in categories.items()
    }


@torch.inference_mode()
def inferred(run: Path, roots: Sequence[Path], train_share: float, seed: int) -> float:
    """Share of the test pictures whose category the run tells rightly."""
    inspector = Inspector(run)
    samples = read_data(list(roots), train_share=train_share, seed=seed).test
    right = 0
    for batch in load_batches(samples, inspector.transform, failures=[], batch_size=32):
        category = inspector.detector.match(batch.image.to(inspector.device)).category
        right += sum(
            inspector.categories[index] == sample.category
            for index, sample in zip(category.tolist(), batch.sample, strict=True)
        )
    return right / len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train", nargs="*", default=[], help="name=value, as `fit --train`")
    parser.add_argument("--settings", nargs="*", default=[], help="name=value, of the detector")
    parser.add_argument("--train-share", type=float, default=0.7)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        columns = " ".join(f"{name:>13}" for name in NAMES)
        head = f"{'recipe':<14} {'seed':>4} {'category':<14} {columns}"
        lines, means = [f"{head} {'minutes':>8} {'inferred':>8}"], {}
        for seed in arguments.seeds:
            for recipe in arguments.recipes:
                found = measured(recipe, seed, arguments.data, folder, arguments)
                run = folder / f"{recipe}-{seed}"
                minutes = read_json(run / PROVENANCE)["seconds"] / 60
                share = inferred(run, arguments.data, arguments.train_share, seed)
                for category, numbers in found.items():
                    values = " ".join(f"{numbers[name]:>13.3f}" for name in NAMES)
                    line = f"{recipe:<14} {seed:>4} {category:<14} {values}"
                    lines.append(f"{line} {minutes:>8.1f} {share:>8.3f}")
                    print(lines[-1], flush=True)
                for name in NAMES:
                    mean = statistics.mean(numbers[name] for numbers in found.values())
                    means.setdefault(recipe, {}).setdefault(name, []).append(mean)
        print("\n" + "\n".join(lines))
        print("\nmean of the categories, over the seeds")
        for recipe, numbers in means.items():
            values = " ".join(f"{statistics.mean(numbers[name]):>13.3f}" for name in NAMES)
            print(f"{recipe:<14} {len(arguments.seeds):>4} {'mean':<14} {values}")
        print(json.dumps(means))


if __name__ == "__main__":
    main()
