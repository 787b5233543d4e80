"""Where training batches come from, and in which order.

Letters: B images, H W pixels, N all training pictures, R >= N rows: the pictures as they are, and
then further views of them (flipped, turned) where they are augmented.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count as count_from
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from allgood.training.runtime import seed_from
from allgood.types import Failure, InputError, TrainingBatch

Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass(frozen=True)
class Views:
    """Which rows of a source show which picture."""

    num_pictures: int
    """N. The first N rows show each as it is."""
    shares: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """Of each augmented picture: row -> how often training sees that one; the sum is 1. The first
    is the picture as it is."""

    def rows(self, picture: int) -> Iterable[int]:
        """All that show this picture."""
        return self.shares.get(picture, (picture,))

    def unreadable(self, failures: Mapping[int, Failure]) -> dict[int, Failure]:
        """Picture -> why, of those that cannot be read in one of their views; `failures` by row."""
        return {
            picture: failures[row]
            for picture in range(self.num_pictures)
            for row in self.rows(picture)
            if row in failures
        }

    def draw(self, picture: int, *, seed: int, step: int) -> int:
        """The row that stands for the picture in a step; it follows from (seed, step, picture)."""
        if picture not in self.shares:
            return picture
        left = seed_from("view", seed, step, picture) / 2**63  # uniform in [0, 1]
        for row, share in self.shares[picture].items():
            left -= share
            if left < 0:
                return row
        return row  # the shares were rounded


class Source(Protocol):
    """All training pictures in all their views, as features."""

    category: Tensor
    """(R,) int64."""
    views: Views
    """Which rows are one picture."""
    failures: dict[int, Failure]
    """Row -> why, of those that could not be read so far."""

    def __len__(self) -> int:
        """R, the unreadable ones included."""
        ...

    def batches(self, order: Iterable[Sequence[int]]) -> Generator[TrainingBatch, None, None]:
        """One batch per list of rows, in order; closing the generator stops reading ahead.

        Pictures that cannot be read are left out of their batch. If that leaves nothing, the
        batch comes without rows and without features, so the caller stays in step.
        """
        ...


class OnlineFeatures:
    """A source that reads and encodes each picture whenever it is asked for."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], tuple[tuple[Tensor, ...], list[int], list[Failure]]],
        encode: Callable[..., tuple[Tensor, ...]],
        category: Tensor,
        device: torch.device,
        views: Views | None = None,
    ) -> None:
        """
        Args:
            read: rows -> what `encode` takes, (B, ...) each; the B rows that could be read;
                and why the others could not, in their order. It is called from another thread.
            encode: as `Learner.encode`, which takes the image alone; others may take more.
            category: (R,) int64 of all rows.
            device: of the encoder.
            views: which rows are one picture; None: each is one of its own.
        """
        self.category = category
        self.views = views or Views(len(category))
        self.failures: dict[int, Failure] = {}
        self.device = device
        self._read = read
        self._encode = encode

    def __len__(self) -> int:
        return len(self.category)

    def read(
        self, indices: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], list[int], dict[int, Failure]]:
        """What `encode` takes, of those rows that could be read; which these are; and row -> why,
        of the others."""
        inputs, readable, failures = self._read(indices)
        unreadable = [i for i in indices if i not in set(readable)]
        return inputs, readable, dict(zip(unreadable, failures, strict=True))

    def batches(self, order: Iterable[Sequence[int]]) -> Generator[TrainingBatch, None, None]:
        """See `Source`. The next batch is read while this one is used."""

        for inputs, readable, failures in read_ahead(self.read, order):
            self.failures.update(failures)
            index = torch.tensor(readable, dtype=torch.int64)
            features: tuple[Tensor, ...] = ()
            if readable:
                with torch.no_grad():
                    moved = [part.to(self.device, non_blocking=True) for part in inputs]
                    encoded = self._encode(*moved)
                    features = tuple(feature.float() for feature in encoded)
            yield TrainingBatch(features, self.category[index].to(self.device), index)


def filled(batch: TrainingBatch, size: int) -> TrainingBatch:
    """A batch of `size` rows: those that are there stand in for pictures that could not be read.

    So the shares of all processes have one shape, whatever each of them could read.
    """
    if len(batch.index) == size:
        return batch
    rows = torch.arange(size) % len(batch.index)
    features = tuple(feature[rows] for feature in batch.features)
    return TrainingBatch(features, batch.category[rows], batch.index[rows])


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item]) -> Generator[Read, None, None]:
    """`map(read, items)`, one item ahead in a thread that ends with the generator."""
    with ThreadPoolExecutor(1, thread_name_prefix="read_ahead") as thread:
        waiting: Future[Read] | None = None
        for item in items:
            coming = thread.submit(read, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def batch_order(
    count: int,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
) -> Iterator[list[int]]:
    """What one process reads, micro-batch after micro-batch, without end.

    An epoch is a permutation that follows from (seed, epoch); what is left of it after the last
    whole batch is dropped. Fewer pictures than a batch are permuted several times to fill it. The
    pictures of a step are the same however many processes and micro-batches share them.

    Args:
        count: number of pictures.
        batch_size: pictures per step, of all processes and micro-batches together.

    Raises:
        InputError: there are no pictures, or they cannot be shared equally.
    """
    if count < 1:
        raise InputError("no training picture could be read: training needs at least one")
    require_shareable(batch_size, world, accumulate)
    return _batch_order(count, batch_size, seed, start_step, rank, world, accumulate)


def require_shareable(batch_size: int, world: int, accumulate: int) -> None:
    """InputError where so many processes and micro-batches cannot share a batch equally."""
    if batch_size % (world * accumulate):
        raise InputError(
            f"batch_size {batch_size} cannot be shared by {world} processes with {accumulate} "
            f"micro-batches each: choose a multiple of {world * accumulate}"
        )


def _batch_order(
    count: int, batch_size: int, seed: int, start_step: int, rank: int, world: int, accumulate: int
) -> Iterator[list[int]]:
    rounds = -(-batch_size // count)  # 1, but for very few pictures
    steps_per_epoch = rounds * count // batch_size
    share = batch_size // (world * accumulate)
    first_epoch, skip = divmod(start_step, steps_per_epoch)
    for epoch in count_from(first_epoch):
        generator = torch.Generator().manual_seed(seed_from("epoch", seed, epoch))
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
        for step in range(skip, steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size].tolist()
            for micro in range(accumulate):
                begin = (micro * world + rank) * share
                yield batch[begin : begin + share]
        skip = 0
