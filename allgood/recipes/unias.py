"""UniAS's experiments (Ma et al., WACV 2025), one model for all categories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from allgood.data.augmentation import Augmentation, augmentation
from allgood.recipes.recipe import Recipe
from allgood.recipes.uniad import TRAIN

_TRAIN = {**TRAIN, "drops": (0.4, 0.8)}
# As the code has them, but for metal_nut, which it flips: there a mirrored part is one of MVTec's
# defects ("flip"), and training would call it good. hazelnut stays as it is, as in the code, whose
# lists misspell it.
_MVTEC_AD = {
    **dict.fromkeys(("grid", "pill", "zipper"), augmentation("flip")),
    **dict.fromkeys(("bottle", "carpet", "screw", "tile", "wood"), augmentation("flip,rotate")),
}
_VISA = {
    **dict.fromkeys(("candle", "macaroni1"), augmentation("flip_horizontal")),
    **dict.fromkeys(("chewinggum", "pipe_fryum"), augmentation("flip")),
    **dict.fromkeys(("macaroni2", "capsules", "fryum"), augmentation("flip,rotate")),
}
_UNIAS = Recipe("unias", levels=(0, 1, 2, 3), image_size=224, train=_TRAIN)


def _published(
    data: str,
    settings: Mapping[str, Any],
    reported: Mapping[str, float],
    steps: int,
    augment: Mapping[str, Augmentation],
) -> Recipe:
    """1,000 epochs with batches of 64."""
    return replace(
        _UNIAS,
        encoder="tf_efficientnet_b4.aa_in1k",
        settings=settings,
        train={**_TRAIN, "steps": steps, "batch_size": 64},
        augment=augment,
        data=data,
        source="Tables 1 to 3; image AUROC from the authors' readme",
        reported=reported,
    )


RECIPES: dict[str, Recipe] = {
    "unias": _UNIAS,
    "unias_light": replace(
        _UNIAS,
        levels=(1, 2, 3),
        settings={"width": 128, "ffn": 512},
        note="for a CPU, not the paper's model: half the width, no level of stride 2",
    ),
    # The readme of the code says pixel AUROC 98.29, pixel AP 63.53 and DSC 58.83.
    "unias_mvtec_ad": _published(
        "MVTec AD",
        {"loss_weight": 10.0},
        {"image_auroc": 98.63, "pixel_auroc": 98.22, "pixel_ap": 65.12, "dsc": 59.33},
        57_000,
        _MVTEC_AD,
    ),
    # The readme of the code says pixel AUROC 98.61, pixel AP 40.05 and DSC 36.67.
    "unias_visa": _published(
        "VisA",
        {"channel_attention": False},
        {"image_auroc": 91.39, "pixel_auroc": 97.80, "pixel_ap": 40.06, "dsc": 32.50},
        136_000,
        _VISA,
    ),
}
