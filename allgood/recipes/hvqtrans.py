"""HVQ-Trans's experiments (Lu et al., NeurIPS 2023)."""

from __future__ import annotations

from dataclasses import replace

from allgood.recipes.recipe import Recipe
from allgood.recipes.uniad import TRAIN

_HVQTRANS = Recipe("hvqtrans", levels=(0, 1, 2, 3), image_size=224, train=TRAIN)
_PAPER = replace(
    _HVQTRANS,
    encoder="tf_efficientnet_b4.aa_in1k",
    settings={"optimal_transport": True},
)

RECIPES: dict[str, Recipe] = {
    "hvqtrans": _HVQTRANS,
    # One model for all categories, 1000 epochs of the 3,629 and 8,659 training pictures.
    "hvqtrans_mvtec_ad": replace(
        _PAPER,
        train={**TRAIN, "steps": 227_000},
        data="MVTec AD",
        source="the paper",
        reported={"image_auroc": 98.0, "pixel_auroc": 97.3},
    ),
    "hvqtrans_visa": replace(
        _PAPER,
        train={**TRAIN, "steps": 542_000},
        data="VisA",
        source="UniAS's paper, which quotes it",
        reported={"pixel_auroc": 98.7},
    ),
}
