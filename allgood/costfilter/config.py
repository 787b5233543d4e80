"""The settings of a filter."""

from dataclasses import dataclass
from typing import Literal

from allgood.types import InputError


@dataclass(frozen=True)
class FilterConfig:
    """What a filter is; the settings below `gamma` serve what was published: docs/costfilter.md."""

    size: Literal["small", "full"] = "small"
    """`full` is the paper's network, for GPUs; `small` trains on a CPU in minutes, and is not."""
    templates: Literal["match", "good"] = "match"
    """What an image is compared with: what its host matched it with, or good pictures of its
    category that are kept for it and never trained on."""
    num_templates: int = 3
    """N, with `templates=good`."""
    fusion: float = 0.5
    """lambda: the filter's share of the map; 0 is the host alone, 1 the filter alone."""
    top_fraction: float = 0.0038
    """Share of the map's highest pixels averaged into image_score: about 250 of 256 x 256."""
    gamma: Literal["slides", "reference", "constant"] = "slides"
    """Rule of the focal loss's exponent."""
    hard_categories: tuple[str, ...] = ()
    """With gamma `reference`: pictures predicted as one of these always get 3.5."""
    ssim: float = 0.1
    """Weight of the SSIM term."""
    mask_side: int = 128
    """Side of the masks, and of the maps, in the loss."""
    classes: int | None = None
    """Outputs of the class head, at least one per category; None: as many."""
    stem: int | None = None
    """Outputs of the first layer; None: 64 of a `small` network, 192 of a `full` one."""
    head: Literal["opposite", "kaiming"] = "opposite"
    """Start of the two last weights, see `NetworkConfig.head`."""
    split: tuple[int, ...] = ()
    """Channels of the parts into which a host's only level is cut; they then are the levels."""
    merge: Literal["concat", "loop_mean"] = "concat"
    """How N templates meet: side by side in one volume, or in a pass each, whose maps are averaged,
    as published for GLAD (which took a step of training for each, too)."""
    top_k: int | None = None
    """Only so many least costs of each position stay in the volume; None: all."""
    orientation: Literal["input", "reference"] = "input"
    """Whose positions lie on the map's height and width, see `VolumeConfig.orientation`."""
    align_corners: bool = True
    """Of the resize to the filter's grid."""
    spatial: Literal["query", "template"] = "query"
    """Which features guide: those of the image, or those that the host rebuilt of it."""
    matching: Literal["levels_and_host", "levels", "host", "hvq", "hvq_ot"] = "levels_and_host"
    """What else guides: each level's least cost and the host's map; the least costs alone; the
    host's map in the place of every level; or the first level's least cost mixed with it, as the
    authors do for HVQ-Trans without and with its transport score."""
    host: Literal["scaled", "raw", "least_cost"] = "scaled"
    """H of the fusion: on the scale of good pictures; as it is; or the mean of the least costs."""
    host_sigma: float = 0.0
    """Of a Gaussian on H, in pixels of the input; where H is `scaled`, the host's own is used."""
    map_sigma: float = 0.0
    """Of a Gaussian on the fused map, in its pixels."""

    def __post_init__(self) -> None:
        if not 0 <= self.fusion <= 1:
            raise InputError(f"fusion must be in [0, 1], got {self.fusion}")
        if not 0 < self.top_fraction <= 1:
            raise InputError(f"top_fraction must be in (0, 1], got {self.top_fraction}")
        for name in ("num_templates", "mask_side", "stem", "classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("ssim", "host_sigma", "map_sigma"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.merge == "loop_mean" and self.top_k is not None:
            raise InputError(
                "top_k chooses among the costs of all templates: leave out merge=loop_mean"
            )
        if self.spatial == "template" and self.templates == "good":
            raise InputError(
                "spatial=template needs one rebuilt template: leave out templates=good"
            )
