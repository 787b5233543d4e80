"""What a report holds: plain records, filled by whoever ran the test, read by report and table.

Scores are higher where something is more anomalous. "Good" and "defective" pictures are those of
the test; calibration pictures are good ones kept from training to set the alarm threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from allgood.metrics import Metric

Floats = NDArray[np.floating]
Picture = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of one curve, x ascending; both arrays are (K,) in [0, 1]."""

    x: Floats
    y: Floats


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of one category; None where undefined."""

    roc: Curve | None = None
    """Image scores: true-positive rate over false-positive rate."""
    pr: Curve | None = None
    """Image scores: precision over recall."""
    pro: Curve | None = None
    """Pixels: mean overlap with the defective regions over the false-positive rate."""

    @classmethod
    def of(cls, image: Mapping[str, Floats], pixel: Mapping[str, Floats] | None = None) -> "Curves":
        """From `metrics.image_curves` and, if there are masks, `PixelState.curves`."""
        return cls(
            roc=_curve(image, "roc_fpr", "roc_tpr"),
            pr=_curve(image, "pr_recall", "pr_precision"),
            pro=_curve(pixel or {}, "pro_fpr", "pro"),
        )


def _curve(arrays: Mapping[str, Floats], x: str, y: str) -> Curve | None:
    if x not in arrays or not len(arrays[x]):
        return None
    return Curve(arrays[x], arrays[y])


@dataclass(frozen=True)
class Alarms:
    """What the alarm threshold, set on calibration pictures only, did on the test pictures.

    An alarm is a score above the threshold.
    """

    threshold: float
    """In units of image_score."""
    alpha: float
    """Promised: at most this share of good parts raises an alarm."""
    num_found: int
    """Defective test pictures with an alarm."""
    num_false_alarms: int
    """Good test pictures with an alarm."""


@dataclass(frozen=True, eq=False)
class CategoryResult:
    """One category, or all categories pooled as if they were one."""

    name: str
    good_scores: Floats
    """Image scores of the good test pictures that could be read; its length is their count."""
    defective_scores: Floats
    """The same of the defective test pictures."""
    metrics: Mapping[str, Metric]
    """By name: image_auroc, image_ap, image_f1max, pixel_auroc, ..., aupro, dsc, mad."""
    calibration_scores: Floats = field(default_factory=lambda: np.zeros(0))
    alarms: Alarms | None = None
    """None if no threshold was calibrated."""
    curves: Curves = field(default_factory=Curves)
    num_with_masks: int = 0
    """Defective test pictures that came with a mask."""
    num_unreadable: int = 0

    def __post_init__(self) -> None:
        if self.alarms is None:
            return
        if not 0 <= self.alarms.num_found <= self.num_defective:
            raise ValueError(
                f"{self.name}: {self.alarms.num_found} found of {self.num_defective} defective"
            )
        if not 0 <= self.alarms.num_false_alarms <= self.num_good:
            raise ValueError(
                f"{self.name}: {self.alarms.num_false_alarms} false alarms of {self.num_good} good"
            )

    @property
    def num_good(self) -> int:
        return len(self.good_scores)

    @property
    def num_defective(self) -> int:
        return len(self.defective_scores)


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run with a CostFilter is made of, measured on the same pictures as its results."""

    host: Sequence[CategoryResult]
    """The detector alone: its map as it enters the fusion, scored as the fused one; in the order
    of the report's categories."""
    filter: Sequence[CategoryResult]
    fusion: float
    """lambda: the filter's share of the fused map."""


@dataclass(frozen=True, eq=False)
class GalleryItem:
    """One test picture worth a look.

    The report shrinks larger pictures to 320 pixels; `overlay.shrink` does so early, before many of
    them fill the memory.
    """

    kind: Literal["found", "missed", "false alarm"]
    category: str
    name: str
    """The picture's path or id."""
    defect: str
    """`"good"`, or the defect's name."""
    image_score: float
    picture: Picture
    """(H, W, 3) uint8 RGB."""
    overlay: Picture
    """(H, W, 3) uint8 RGB, from `overlay.heat_overlay`."""
    outline: Picture | None = None
    """(H, W, 3) uint8 RGB with the true defect outlined, from `overlay.mask_outline`."""
    p_value: float | None = None


@dataclass(frozen=True)
class UnreadablePicture:
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class ReportContent:
    """Everything on the page, in its order."""

    title: str
    detector: str
    encoder: str
    created_at: datetime
    num_training: int
    """Good pictures the detector learned from."""
    categories: Sequence[CategoryResult]
    """At least one."""
    mean: Mapping[str, Metric]
    """From `metrics.mean_over_categories`."""
    pooled: CategoryResult | None = None
    """All pictures under one threshold; left out of the page when there is one category."""
    parts: Parts | None = None
    """Of a run with a CostFilter."""
    protocol: Sequence[str] = ()
    """How it was measured, in whole sentences."""
    gallery: Sequence[GalleryItem] = ()
    unreadable: Sequence[UnreadablePicture] = ()
    commands: Sequence[str] = ()
    """Shell commands that reproduce the report."""
    wall_seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package name to version."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """More facts of the run, label to text: device, seed, data fingerprint."""

    def __post_init__(self) -> None:
        if not self.categories:
            raise ValueError("a report needs at least one category")

    @property
    def pooled_row(self) -> CategoryResult | None:
        """What the page and the table show of it: nothing when there is one category."""
        return self.pooled if len(self.categories) > 1 else None
