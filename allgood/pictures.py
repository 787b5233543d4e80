"""The good pictures of a fit: which they are, how they become input, and that there are enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from allgood.data.augmentation import Augmentation, View
from allgood.data.transforms import Transform
from allgood.ignored import hide, to_inputs
from allgood.types import Batch, Failure, InputError, Sample


@dataclass(frozen=True)
class Pictures:
    """What is to be learned."""

    samples: Sequence[Sample]
    transform: Transform
    ignore_of: Mapping[str, np.ndarray]
    """Masks of ignored regions by category; what they cover is hidden."""
    augment: Mapping[str, Augmentation] = field(default_factory=dict)
    """By category, of those whose pictures are also learned in other views."""

    def views(self) -> list[tuple[int, View, float]]:
        """(index into `samples`, view, how often the picture is seen so): first every picture as it
        is, in order, then all further views of each, which so are read together."""
        first, further = [], []
        for i, sample in enumerate(self.samples):
            augmentation = self.augment.get(sample.category, Augmentation())
            plain, *others = [(i, view, share) for view, share in augmentation.shares().items()]
            first.append(plain)
            further += others
        return first + further

    def hidden(self, batch: Batch, transform: Transform) -> tuple[Tensor, Tensor | None]:
        """A batch's image with the ignored regions in grey, and these, (B, 1, H, W) bool or None.

        Args:
            transform: by which the batch was read.
        """
        if not self.ignore_of:
            return batch.image, None
        names = [sample.category for sample in batch.sample]
        ignore = to_inputs(self.ignore_of, names, batch.original_size, transform)
        return hide(batch.image, ignore), ignore

    def category(self, categories: Sequence[str]) -> Tensor:
        """(N,) int64, index into `categories` of each picture."""
        return torch.tensor([categories.index(sample.category) for sample in self.samples])


def require_readable(samples: Sequence[Sample], unreadable: Mapping[int, Failure]) -> None:
    """InputError where no picture of a category could be read.

    Args:
        unreadable: index into `samples` -> why.
    """
    for category in sorted({sample.category for sample in samples}):
        own = [i for i, sample in enumerate(samples) if sample.category == category]
        if unreadable.keys() >= set(own):
            raise InputError(
                f"none of the {len(own)} good pictures of category '{category}' could be read; "
                f"the first: {unreadable[own[0]].reason}"
            )
