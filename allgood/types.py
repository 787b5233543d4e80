"""The records that flow between the rooms, and the contract that every detector keeps.

Letters: B images, L levels, C channels, H W pixels, h w patches, T templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:  # the command line prints its help from here without loading torch
    from torch import Tensor

    from allgood.layers.patch_store import PatchStore

GOOD = "good"
"""The value of `Sample.defect` that means: this picture shows a good part."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one sentence naming it and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One picture on disk, as a dataset reader found it."""

    path: Path
    category: str
    split: Literal["train", "test"]
    defect: str
    """`"good"`, or the defect's name."""
    id: str
    """Path below the data's root with forward slashes; order and seeded choices rest on it."""
    mask_paths: tuple[Path, ...] = ()
    """Mask files whose union marks the defect; empty when the picture has none."""
    mask_threshold: int = 1
    """Mask pixels of at least this 8-bit value are anomalous, decided at the mask's own size."""
    group: str = ""
    """Pictures that belong together, as those of one physical part. The good ones never stand on
    two sides of a split; in a manifest the defective ones stand with them."""
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return self.defect == GOOD


@dataclass(frozen=True)
class Failure:
    """A picture that could not be read. The run goes on without it."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Batch:
    """Pictures of one input size."""

    image: Tensor
    """(B, 3, H, W) float32 RGB in [0, 1]."""
    mask: Tensor | None
    """(B, 1, H, W) bool, False where the part is good; None if masks were not asked for."""
    has_mask: Tensor
    """(B,) bool: whether `mask` is known. Only those pictures belong into pixel metrics."""
    label: Tensor
    """(B,) bool, True for defective; from the folder or manifest, never from the mask."""
    sample: list[Sample]
    original_size: list[tuple[int, int]]
    """(height, width) of each picture as displayed."""
    ignore: Tensor | None = None
    """(B, 1, H, W) bool: pixels that nobody should look at, or None."""


@dataclass(frozen=True)
class Match:
    """What a detector compared with what."""

    query: list[Tensor]
    """L levels (B, C, h, w): features of the image."""
    template: list[Tensor]
    """L levels (B, T, C, h, w): the normal features they were compared with, position by
    position."""
    host_map: Tensor
    """(B, 1, h, w): the detector's own distance before resizing and smoothing."""
    category: Tensor
    """(B,) int64: the category each image was matched as, given or inferred."""


@dataclass(frozen=True)
class Prediction:
    """Higher is more anomalous; nothing is clipped or rescaled."""

    anomaly_map: Tensor
    """(B, 1, H, W) float32."""
    image_score: Tensor
    """(B,) float32."""
    category: Tensor
    """(B,) int64: the category each image was judged as, given or inferred."""


@dataclass(frozen=True)
class TrainingBatch:
    """What one step of training sees, on the device of the model."""

    features: tuple[Tensor, ...]
    """What `Learner.encode` gave, fresh or from a cache: (B, ...) each, float32."""
    category: Tensor
    """(B,) int64, index into the learner's categories."""
    index: Tensor
    """(B,) int64 on the CPU: which of the training pictures these are."""


class Detector(Protocol):
    """What every detector offers; beside it each is a `BankDetector` or a `Learner`."""

    categories: tuple[str, ...]

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        """What the detector compares with what.

        Args:
            image: (B, 3, H, W) in [0, 1].
            category: (B,) int64, or None: inferred.
            image_number: (B,) int64, `image_number` of the good pictures that these are: a memory
                bank then compares none with its own patches. Other detectors have no use for it.
        """
        ...

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        """Judge a batch.

        Args:
            image: (B, 3, H, W) in [0, 1].
            category: (B,) int64, or None: inferred, the nearest category by global feature.
            ignore: (B, 1, H, W) bool; ignored pixels get 0 and do not count in the score.
            map_size: (height, width) of the map; None: the image's.
        """
        ...

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """The map of `predict` from the distance of `match`: resized and smoothed.

        Args:
            host_map: (B, 1, h, w).
            image_size: (H, W) of the images.
            ignore, map_size: as in `predict`.
        """
        ...


class BankDetector(Detector, Protocol):
    """Reads the good images once and keeps a memory bank."""

    def remembered(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Those of the good images whose patches the bank may hold. The others only show what
        their category looks like."""
        ...

    def fit(
        self,
        batches: Iterable[Batch],
        store: PatchStore,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the good images once; `store` holds what must outlive a killed run."""
        ...


@runtime_checkable
class Learner(Detector, Protocol):
    """Learns by gradient, from what a frozen encoder says of the good images.

    A step is `training_loss(encode(image), step)`. `encode` is a pure function of one image, so
    its answers may come from a cache, and training then never runs the encoder.
    """

    encoding: str
    """What `encode` gives of the encoder's levels; two learners that agree in it, and in the
    encoder, may share a cache."""

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) in [0, 1] -> all that training needs of it, (B, ...) each, no gradient."""
        ...

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        """One look at all training pictures, in order, before the first step: references of the
        categories, and whatever else starts from data."""
        ...

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        """Scalar loss, the mean over the batch; `step` counts from 0, for schedules."""
        ...
