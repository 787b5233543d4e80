"""Behind `fit`: good pictures and a detector with a memory bank -> its bank.

pictures -> patches on disk, so that a killed fit goes on -> the rows of the bank
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from allgood.data.batches import load_batches
from allgood.layers.patch_store import PatchStore
from allgood.pictures import Pictures, require_readable
from allgood.progress import bar, late_bar, say
from allgood.types import Batch, Failure


def fill_bank(
    model: Any,
    pictures: Pictures,
    *,
    angles: Sequence[float],
    folder: Path,
    budget_bytes: int,
    batch_size: int,
    seed: int,
) -> list[Failure]:
    """Fit a `BankDetector`, going on with what a killed fit left in `folder`.

    Args:
        angles: every picture is learned once per angle.
        budget_bytes: what the patches may take in memory.

    Returns:
        the pictures that could not be read.

    Raises:
        InputError: no good picture of a category could be read.
    """
    total = len(pictures.samples) * len(angles)
    remembered = model.remembered(pictures.samples)
    store = PatchStore(
        folder,
        num_images=len(remembered) * len(angles),
        only={(model.categories.index(sample.category), sample.id) for sample in remembered},
        budget_bytes=budget_bytes,
        seed=seed,
    )
    if store.position:
        say(f"going on after {store.position} of {total} pictures")
    failures = list(store.failures)
    device = next(iter(model.buffers())).device
    with (
        torch.inference_mode(),
        closing(_batches(pictures, angles, store, failures, batch_size, device)) as batches,
        late_bar("choosing the memory bank") as choosing,
    ):
        model.fit(batches, store, progress=choosing)
    # Rotated copies fail once per angle, and one read ahead of a kill fails again.
    return list({failure.path: failure for failure in failures}.values())


def _batches(
    pictures: Pictures,
    angles: Sequence[float],
    store: PatchStore,
    failures: list[Failure],
    batch_size: int,
    device: torch.device,
) -> Generator[Batch]:
    """Batches that the store has not seen yet; each counts as seen when the next is asked for."""
    samples = pictures.samples
    place = {(sample.category, sample.id): i for i, sample in enumerate(samples)}
    total = len(samples) * len(angles)
    position = store.position

    def seen(now: int) -> None:
        nonlocal position
        position = now
        store.commit(position, failures)
        reading.at(position)

    with bar("reading good pictures", total) as reading:
        reading.at(position)
        while position < total:
            turn, first = divmod(position, len(samples))
            turned = replace(pictures.transform, angle=float(angles[turn]))
            for batch in load_batches(
                samples[first:], turned, failures=failures, batch_size=batch_size
            ):
                image, ignore = pictures.hidden(batch, turned)
                if ignore is not None:
                    ignore = ignore.to(device)
                yield replace(batch, image=image.to(device), ignore=ignore)
                last = batch.sample[-1]
                seen(turn * len(samples) + place[last.category, last.id] + 1)
            seen((turn + 1) * len(samples))  # past the unreadable ones at the end
    failed = {failure.path: failure for failure in failures}
    require_readable(
        samples, {i: failed[s.path] for i, s in enumerate(samples) if s.path in failed}
    )
