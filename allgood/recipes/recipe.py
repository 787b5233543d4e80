"""What a recipe is, and how a paper's numbers are written down.

Nothing heavy is imported here: listing recipes is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from allgood.data.augmentation import Augmentation

EMBEDDED = "efficientnet_lite0"
NUMBERS = (
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "aupro",
)
"""The seven numbers of the multi-class literature, in its order."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, but for the data and the seed."""

    detector: str
    encoder: str = EMBEDDED
    levels: tuple[int, ...] | Literal["middle"] | None = None
    """As in `EncoderConfig`."""
    norm: bool = False
    """Whether a ViT's final LayerNorm is applied to the levels."""
    image_size: int = 256
    """Side of the network's input, or the shorter side with `keep_aspect`."""
    crop: int | None = None
    """Side of the square that is then cut from the middle."""
    patch: int | None = None
    """Patch size for which `image_size` and `crop` are meant; other ViTs get as many patches."""
    keep_aspect: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the detector, where they are not its defaults."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Of the training (`TrainConfig`), where they are not its defaults."""
    augment: Mapping[str, Augmentation] = field(default_factory=dict)
    """By category; those that the data do not have do not matter."""
    per_category: bool = False
    """One model per category instead of one for all."""
    note: str = ""
    """What else one should know before choosing it."""
    data: str = ""
    """What the paper's numbers were measured on."""
    source: str = ""
    """Where the paper reports them."""
    reported: Mapping[str, float] = field(default_factory=dict)
    """In per cent, mean over categories; by the paper's own protocol."""

    def describe(self) -> str:
        """One line: detector and encoder, and what the paper reports."""
        line = f"{self.detector} on {self.encoder}" + (f"; {self.note}" if self.note else "")
        if not self.reported:
            return line
        numbers = ", ".join(f"{name} {value:g}" for name, value in self.reported.items())
        each = ", one model per category" if self.per_category else ""
        return f"{line}{each}; {self.data}, {self.source}: {numbers}"


def seven(*numbers: float) -> dict[str, float]:
    """In the order of `NUMBERS`."""
    return dict(zip(NUMBERS, numbers, strict=True))
