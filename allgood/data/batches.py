"""Samples -> Batches: threads read, decode and resize ahead while the network works.

Letters: B pictures, H W the pictures as on disk, h w the network's input.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from allgood.data.images import read_mask, read_oriented_image
from allgood.data.transforms import Transform, unit_range
from allgood.types import Batch, Failure, InputError, Sample

MaskSize = tuple[int, int] | Literal["input", "own"]


@dataclass(frozen=True)
class _Loaded:
    sample: Sample
    image: Tensor  # (3, h, w) uint8: a quarter of the memory of floats while it waits
    mask: Tensor | None  # (h, w) bool; None: unknown or not asked for
    original_size: tuple[int, int]


def load_batches(
    samples: Sequence[Sample],
    transform: Transform,
    *,
    failures: list[Failure],
    batch_size: int = 8,
    mask_size: MaskSize | None = None,
    workers: int = 2,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Batches in the order of `samples`, read ahead by threads.

    A batch ends when it is full or the input size changes, so how pictures fall into batches
    depends on the list alone. A good picture has an all-False mask; a defective one without mask
    files, or whose mask is empty, has `has_mask` False and an all-False mask. Without `mask_size`,
    mask is None and `has_mask` all False. Leaving the loop early stops the threads.

    Args:
        mask_size: None: read no masks; `input`: at the input's size and through its geometry;
            (height, width): the whole mask at that size; `own`: at the picture's own size, which
            needs batch_size 1 where pictures differ in size.
        failures: one entry is appended per picture that could not be read, in order.
        workers: reading threads, at least 1.
        prefetch: batches read ahead of the one handed out, at least 1; bounds memory.
    """
    if min(batch_size, workers, prefetch) < 1:
        raise InputError(
            "batch_size, workers and prefetch must be at least 1, "
            f"got {batch_size}, {workers}, {prefetch}"
        )
    return _batches(samples, transform, failures, batch_size, mask_size, workers, prefetch)


def _batches(
    samples: Sequence[Sample],
    transform: Transform,
    failures: list[Failure],
    batch_size: int,
    mask_size: MaskSize | None,
    workers: int,
    prefetch: int,
) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="allgood-read")
    try:
        waiting: list[_Loaded] = []
        for item in _in_order(pool, samples, transform, mask_size, batch_size * prefetch):
            if isinstance(item, Failure):
                failures.append(item)
                continue
            if waiting and waiting[0].image.shape != item.image.shape:
                yield _collate(waiting, mask_size)
                waiting = []
            waiting.append(item)
            if len(waiting) == batch_size:
                yield _collate(waiting, mask_size)
                waiting = []
        if waiting:
            yield _collate(waiting, mask_size)
    finally:  # also when the consumer closes the generator
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor,
    samples: Iterable[Sample],
    transform: Transform,
    mask_size: MaskSize | None,
    ahead: int,
) -> Iterator[_Loaded | Failure]:
    """Results in the order of the samples, with at most `ahead` of them under way or waiting."""
    source = iter(samples)
    pending: deque[Future[_Loaded | Failure]] = deque(
        pool.submit(_load, sample, transform, mask_size) for sample in islice(source, ahead)
    )
    while pending:
        item = pending.popleft().result()
        pending.extend(pool.submit(_load, s, transform, mask_size) for s in islice(source, 1))
        yield item


def _load(sample: Sample, transform: Transform, mask_size: MaskSize | None) -> _Loaded | Failure:
    try:
        image, orientation = read_oriented_image(sample.path)
        size = (image.shape[0], image.shape[1])
        mask = None
        if mask_size is not None:
            mask = _mask(sample, transform, mask_size, size, orientation)
        return _Loaded(sample, transform.resize(image), mask, size)
    except InputError as error:
        return Failure(sample.path, str(error))


def _mask(
    sample: Sample,
    transform: Transform,
    mask_size: MaskSize,
    size: tuple[int, int],
    orientation: int,
) -> Tensor | None:
    """(h', w') bool of the size asked for, or None if unknown."""
    if not sample.is_good and not sample.mask_paths:
        return None
    mask = (
        np.zeros(size, dtype=bool)
        if sample.is_good
        else read_mask(
            sample.mask_paths, size=size, threshold=sample.mask_threshold, orientation=orientation
        )
    )
    # Empty at its own size: a mask that was never drawn (MTD has four), not a good part.
    if not sample.is_good and not mask.any():
        return None
    if mask_size == "input":
        return transform.mask_to_input(mask)
    return Transform(size if mask_size == "own" else mask_size).mask_to_input(mask)


def _collate(items: list[_Loaded], mask_size: MaskSize | None) -> Batch:
    known = [item.mask.shape for item in items if item.mask is not None]
    unknown = torch.zeros(known[0] if known else items[0].image.shape[-2:], dtype=torch.bool)
    masks = [unknown if item.mask is None else item.mask for item in items]
    return Batch(
        image=unit_range(torch.stack([item.image for item in items]).numpy()),
        mask=None if mask_size is None else torch.stack(masks).unsqueeze(1),
        has_mask=torch.tensor([item.mask is not None for item in items]),
        label=torch.tensor([not item.sample.is_good for item in items]),
        sample=[item.sample for item in items],
        original_size=[item.original_size for item in items],
    )
