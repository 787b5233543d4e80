"""A learner small enough to train in a blink, and a source of its pictures."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from allgood.training.sources import OnlineFeatures, Views
from allgood.types import Failure, Match, Prediction, TrainingBatch

COUNT = 21


class Toy(nn.Module):
    """Rebuilds a 3 x 4 x 4 feature with a convolution, and tells 3 categories apart.

    It has whatever a learner may have: a frozen encoder, dropout, running statistics, a buffer
    filled by `prepare`, a second feature, and a loss that knows its step.
    """

    reference: Tensor

    def __init__(self, *, dropout: float = 0.2, nan_at: int | None = None) -> None:
        super().__init__()
        self.categories = ("a", "b", "c")
        self.encoding = "toy"
        generator = torch.Generator().manual_seed(7)
        self.encoder = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.mix = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3) if dropout else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3, 3)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        self.register_buffer("reference", torch.zeros(3))
        self.nan_at = nan_at
        self.prepared = 0

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        feature = self.encoder(image)
        return feature, feature.mean(dim=(2, 3))

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        pooled = torch.cat([batch.features[1] for batch in batches])
        self.reference.copy_(pooled.mean(dim=0) + 0.01 * torch.rand(3))
        self.prepared += 1

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        feature, pooled = batch.features
        rebuilt = self.norm(self.mix(self.dropout(feature)))
        distance = (rebuilt - feature).square().mean()
        label = nn.functional.cross_entropy(self.head(pooled - self.reference), batch.category)
        loss = distance + label / (1 + step)
        return loss * float("nan") if step == self.nan_at else loss

    def match(self, image: Tensor, category: Tensor | None = None) -> Match:
        raise AssertionError("training never asks")

    def anomaly_map(self, host_map: Tensor, image_size: tuple[int, int]) -> Tensor:
        raise AssertionError("training never asks")

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        raise AssertionError("training never asks")


def pictures(count: int = COUNT) -> Tensor:
    return torch.rand((count, 3, 4, 4), generator=torch.Generator().manual_seed(3))


def source(
    encode: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    *,
    count: int = COUNT,
    unreadable: Sequence[int] = (),
    reads: list[list[int]] | None = None,
    augmented: bool = False,
    root: Path = Path(),
) -> OnlineFeatures:
    """Pictures in memory, as if from `root`; `reads` collects what was asked for. Augmented, those
    of category 0 may be mirrored, which the rows from `count` on show."""
    images, shown = pictures(count), list(range(count))
    shares: dict[int, dict[int, float]] = {}
    if augmented:
        for i in range(0, count, 3):
            shares[i] = {i: 0.7, len(shown): 0.3}
            shown.append(i)
        images = torch.cat([images, images[::3].flip(-1)])

    def read(indices: Sequence[int]) -> tuple[tuple[Tensor, ...], list[int], list[Failure]]:
        if reads is not None:
            reads.append(list(indices))
        readable = [i for i in indices if shown[i] not in unreadable]
        failures = [
            Failure(root / f"{shown[i]}.png", "torn") for i in indices if shown[i] in unreadable
        ]
        return (images[readable],), readable, failures

    return OnlineFeatures(
        read,
        encode or Toy().encode,
        torch.tensor(shown) % 3,
        torch.device("cpu"),
        Views(count, shares),
    )
