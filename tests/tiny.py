"""Tiny pictures made by numpy, and detectors fitted on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allgood.detectors import detector_classes
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.layers.patch_store import PatchStore
from allgood.types import Batch, Sample, TrainingBatch

CATEGORIES = ("cloth", "wood")


def random_encoder(name: str, levels: tuple[int, ...] | None = None, **settings: Any) -> Any:
    return FrozenEncoder(EncoderConfig(name, levels, weights="random", **settings))


def picture(category: str, seed: int, size: tuple[int, int] = (96, 96)) -> Tensor:
    """(3, H, W) in [0, 1]: blue weave for `cloth`, brown stripes for anything else."""
    generator = np.random.default_rng([seed, len(category)])
    rows, columns = np.mgrid[: size[0], : size[1]] + generator.uniform(0, 6)
    if category == "cloth":
        pattern, colour = np.sin(rows) * np.sin(columns), np.array([0.2, 0.3, 0.7])
    else:
        pattern, colour = np.sin(rows / 4 + np.sin(columns / 9)), np.array([0.6, 0.4, 0.2])
    noise = generator.normal(0, 0.02, (3, *size))
    image = colour[:, None, None] + 0.15 * pattern + noise
    return torch.from_numpy(image.clip(0, 1)).float()


def with_defect(image: Tensor, top: int, left: int, side: int = 24) -> Tensor:
    """A black square with a white cross in it."""
    image = image.clone()
    square = image[..., top : top + side, left : left + side]
    square[:] = 0
    square[..., side // 2 - 2 : side // 2 + 2, :] = 1
    square[..., :, side // 2 - 2 : side // 2 + 2] = 1
    return image


def batch_of(
    images: Sequence[Tensor],
    categories: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    ignore: Tensor | None = None,
) -> Batch:
    count = len(images)
    ids = ids or [f"{name}/{i}" for i, name in enumerate(categories)]
    return Batch(
        image=torch.stack(list(images)),
        mask=None,
        has_mask=torch.zeros(count, dtype=torch.bool),
        label=torch.zeros(count, dtype=torch.bool),
        sample=[
            Sample(Path(id), category, "train", "good", id)
            for id, category in zip(ids, categories, strict=True)
        ],
        original_size=[(images[0].shape[-2], images[0].shape[-1])] * count,
        ignore=ignore,
    )


def good_batches(
    categories: Sequence[str] = CATEGORIES, count: int = 4, size: tuple[int, int] = (96, 96)
) -> list[Batch]:
    """One batch of `count` good pictures per category."""
    return [
        batch_of([picture(name, seed, size) for seed in range(count)], [name] * count)
        for name in categories
    ]


def fitted(
    detector: str,
    encoder: Any,
    folder: Path,
    *,
    batches: Sequence[Batch] | None = None,
    categories: tuple[str, ...] = CATEGORIES,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """A detector that has seen the good batches."""
    config_class, detector_class = detector_classes(detector)
    model = detector_class(config_class(**settings), encoder, categories, seed=seed).eval()
    batches = good_batches(categories) if batches is None else batches
    samples = [sample for batch in batches for sample in batch.sample]
    only = {(categories.index(s.category), s.id) for s in model.remembered(samples)}
    with torch.inference_mode():
        model.fit(batches, PatchStore(folder, num_images=8, only=only))
    return model


def training_batches(learner: Any, batches: Sequence[Batch]) -> list[TrainingBatch]:
    """What a learner is taught with, as no cache would round it."""
    taught = []
    for batch in batches:
        names = [sample.category for sample in batch.sample]
        category = torch.tensor([learner.categories.index(name) for name in names])
        taught.append(
            TrainingBatch(learner.encode(batch.image), category, torch.arange(len(names)))
        )
    return taught


def trained(
    detector: str,
    encoder: Any,
    *,
    steps: int = 150,
    learning_rate: float = 2e-3,
    categories: tuple[str, ...] = CATEGORIES,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """A learner that has been taught the good pictures, all in one batch, by plain AdamW."""
    config_class, detector_class = detector_classes(detector)
    model = detector_class(config_class(**settings), encoder, categories, seed=seed).train()
    # Mixed, as in training: batch norm would learn each category's statistics by itself.
    pictures = [(picture(name, number), name) for name in categories for number in range(8)]
    taught = training_batches(model, [batch_of(*zip(*pictures, strict=True))])
    model.prepare(taught)
    parameters = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            optimizer.zero_grad()
            model.training_loss(taught[0], step).backward()
            optimizer.step()
    return model.eval()
