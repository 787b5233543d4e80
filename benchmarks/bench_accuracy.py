"""Accuracy on real pictures: PatchCore as `allgood fit` runs it, beside a plain nearest neighbour.

    python benchmarks/bench_accuracy.py DATA [DATA ...] [--train-share 0.7] [--seeds 0 1 2]

One model over all categories, embedded encoder, 256 x 256. All good training pictures are fitted on
(no calibration share), the test pictures are judged with their category known. The plain sides
search 20,000 random patches, both levels concatenated as they come, or each averaged over 3 x 3
positions first, as PatchCore does. A seed draws the good tiles and the random patches. Every number
is measured in this process. What the settings owe to these pictures is said in docs/methods.md.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allgood import evaluate, fit
from allgood.data.batches import load_batches
from allgood.data.readers import Dataset, read_data
from allgood.data.transforms import Transform
from allgood.encoders.frozen import FrozenEncoder
from allgood.layers.nearest import nearest_distance
from allgood.metrics import PixelState, image_metrics
from allgood.scoring import gaussian_smooth, resize_map
from allgood.types import Failure

NAMES = ("image_auroc", "pixel_ap", "pixel_auroc", "aupro")
PLAIN_PATCHES = 20_000


def ours(roots: Sequence[Path], train_share: float, seed: int) -> dict[str, dict[str, float]]:
    """Category -> metric -> value, by the public functions."""
    with tempfile.TemporaryDirectory() as folder:
        run = fit(
            list(roots),
            out=Path(folder) / "run",
            train_share=train_share,
            calibration_share=0,
            seed=seed,
        )
        categories = evaluate(run, list(roots)).metrics["categories"]
    return {
        category: {name: numbers[name]["value"] for name in NAMES}
        for category, numbers in categories.items()
    }


@torch.inference_mode()
def plain(dataset: Dataset, seed: int, *, averaged: bool) -> dict[str, dict[str, float]]:
    """The same split and pictures through a plain nearest-neighbour search."""
    encoder = FrozenEncoder()
    failures: list[Failure] = []

    def patches(image: Tensor) -> Tensor:
        fine, coarse = encoder(image)
        if averaged:
            fine, coarse = (F.avg_pool2d(level, 3, stride=1, padding=1) for level in (fine, coarse))
        grid = (fine.shape[-2], fine.shape[-1])
        return torch.cat([fine, resize_map(coarse, grid)], dim=1)  # (B, C, h, w)

    transform = Transform(256)
    rows = torch.cat(
        [
            patches(batch.image).flatten(2).transpose(1, 2).flatten(0, 1)
            for batch in load_batches(dataset.train, transform, failures=failures)
        ]
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    bank = F.normalize(rows[order[:PLAIN_PATCHES]], dim=1)
    scores: dict[str, list[float]] = {}
    labels: dict[str, list[bool]] = {}
    pixels: dict[str, PixelState] = {}
    for batch in load_batches(dataset.test, transform, failures=failures, mask_size="input"):
        query = F.normalize(patches(batch.image), dim=1)
        height, width = query.shape[-2:]
        flat = query.flatten(2).transpose(1, 2).flatten(0, 1)
        distance = nearest_distance(flat, bank)[0].view(len(batch.image), 1, height, width)
        maps = gaussian_smooth(resize_map(distance, (256, 256)), 4.0)
        for i, sample in enumerate(batch.sample):
            scores.setdefault(sample.category, []).append(float(distance[i].max()))
            labels.setdefault(sample.category, []).append(not sample.is_good)
            if batch.has_mask[i] and batch.mask is not None:
                state = pixels.setdefault(sample.category, PixelState())
                state.update(maps[i].numpy(), batch.mask[i].numpy(), [sample.id])
    values = {}
    for category in scores:
        numbers = dict(image_metrics(np.array(scores[category]), np.array(labels[category])))
        numbers |= pixels[category].result() if category in pixels else {}
        values[category] = {name: numbers[name].value for name in NAMES if name in numbers}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--train-share", type=float, default=0.7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--skip-plain", action="store_true")
    arguments = parser.parse_args()
    print(f"{'method':<22} {'seed':>4} {'category':<16} " + " ".join(f"{n:>12}" for n in NAMES))
    for seed in arguments.seeds:
        dataset = read_data(arguments.data, train_share=arguments.train_share, seed=seed)
        sides = {"PatchCore (allgood)": ours(arguments.data, arguments.train_share, seed)}
        if not arguments.skip_plain:
            sides["plain, 20,000 patches"] = plain(dataset, seed, averaged=False)
            sides["plain, 3 x 3 averages"] = plain(dataset, seed, averaged=True)
        for method, categories in sides.items():
            for category, numbers in categories.items():
                columns = " ".join(f"{numbers.get(name, float('nan')):>12.3f}" for name in NAMES)
                print(f"{method:<22} {seed:>4} {category:<16} {columns}", flush=True)


if __name__ == "__main__":
    main()
