"""Door: good pictures and a detector that learns by gradient -> its weights.

pictures in their views -> encode, each once where the cache has room -> the one training loop
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from allgood.data.augmentation import View
from allgood.data.batches import load_batches
from allgood.pictures import Pictures, require_readable
from allgood.progress import say
from allgood.training.config import TrainConfig
from allgood.training.feature_cache import CachedFeatures, cache_bytes, room_for
from allgood.training.loop import train
from allgood.training.runtime import open_fabric
from allgood.training.sources import OnlineFeatures, Source, Views, require_shareable
from allgood.types import Failure

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Read = Callable[[Sequence[int]], tuple[tuple[Tensor, ...], list[int], list[Failure]]]


@dataclass(frozen=True)
class Training:
    """How to learn, with the processes that do it already there."""

    config: TrainConfig
    fabric: Fabric
    cache_root: Path | None
    """Folder of all feature caches; None: the encoder runs in every step."""


def open_training(
    config: TrainConfig,
    *,
    cache_root: Path | None,
    device: str,
    devices: int,
    nodes: int,
    tensorboard: Path | None,
) -> Training:
    """Start the processes; each goes on from here.

    Raises:
        InputError: the processes cannot share a batch equally, or as `open_fabric`.
    """
    require_shareable(config.batch_size, devices * nodes, config.accumulate)
    fabric = open_fabric(
        device=device,
        devices=devices,
        nodes=nodes,
        precision=config.precision,
        tensorboard=tensorboard,
    )
    return Training(config, fabric, cache_root)


def learn(
    model: Any,
    pictures: Pictures,
    training: Training,
    *,
    folder: Path,
    cache_key: Mapping[str, Any],
    batch_size: int,
    seed: int,
) -> list[Failure]:
    """Train a `Learner`, going on with what a killed training left in `folder`.

    Args:
        cache_key: everything that decides what `model.encode` gives, the pictures and their views
            included.
        batch_size: pictures encoded together when the cache is built.

    Returns:
        the pictures that could not be read, and so were never learned.

    Raises:
        InputError: no good picture of a category can be read, or as `train`.
    """
    fabric = training.fabric
    online = online_features(model, pictures, fabric.device)
    source = cached(online, training, cache_key, batch_size) or online
    unreadable = train(
        model,
        source,
        training.config,
        fabric=fabric,
        folder=folder,
        seed=seed,
        check=partial(require_readable, pictures.samples),
    )
    return list(unreadable.values())


def online_features(model: Any, pictures: Pictures, device: torch.device) -> OnlineFeatures:
    """The pictures in all their views, as what a `Learner` on this device says of them."""
    shown = pictures.views()
    category = pictures.category(model.categories)[[picture for picture, _, _ in shown]]
    shares: dict[int, dict[int, float]] = defaultdict(dict)
    for row, (picture, _, share) in enumerate(shown):
        shares[picture][row] = share
    several = {picture: rows for picture, rows in shares.items() if len(rows) > 1}
    return OnlineFeatures(
        _reader(pictures, [(picture, view) for picture, view, _ in shown]),
        model.encode,
        category,
        device,
        Views(len(pictures.samples), several),
    )


def cached(
    online: OnlineFeatures, training: Training, key: Mapping[str, Any], batch_size: int
) -> Source | None:
    """The features on disk, built first if need be; None without a cache, which is said."""
    root = training.cache_root
    if root is None:
        say("no feature cache: the encoder runs in every step")
        return None
    num_bytes = cache_bytes(online)
    if not room_for(root, key, num_bytes):
        say(
            f"no feature cache: {num_bytes / 1e9:.1f} GB do not fit into {root}, so the encoder "
            "runs in every step (--cache names another disk)"
        )
        return None
    quiet = not training.fabric.is_global_zero
    return CachedFeatures(root, key, online, batch_size=batch_size, quiet=quiet)


def default_cache_root() -> Path:
    """`allgood/features` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "allgood" / "features"


def _reader(pictures: Pictures, rows: Sequence[tuple[int, View]]) -> Read:
    """Rows, each a picture and its view -> images as `OnlineFeatures` wants them."""
    samples = pictures.samples
    place = {(sample.category, sample.id): i for i, sample in enumerate(samples)}

    def read(indices: Sequence[int]) -> tuple[tuple[Tensor, ...], list[int], list[Failure]]:
        wanted = list(dict.fromkeys(rows[i][0] for i in indices))  # each file is read once
        failures: list[Failure] = []
        batches = load_batches(
            [samples[picture] for picture in wanted],
            pictures.transform,
            failures=failures,
            batch_size=len(wanted),
            prefetch=1,
        )
        image_of: dict[int, Tensor] = {}
        for batch in batches:
            images = pictures.hidden(batch, pictures.transform)[0]
            for sample, image in zip(batch.sample, images, strict=True):
                image_of[place[sample.category, sample.id]] = image
        unread = [picture for picture in wanted if picture not in image_of]
        why = dict(zip(unread, failures, strict=True))
        readable = [i for i in indices if rows[i][0] in image_of]
        seen = [rows[i][1].of(image_of[rows[i][0]]) for i in readable]
        return (
            (torch.stack(seen) if seen else torch.empty(0),),
            readable,
            [why[rows[i][0]] for i in indices if rows[i][0] in why],
        )

    return read
