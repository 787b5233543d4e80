"""MiniMaxAD's experiments (Wang et al., 2024).

The paper counts epochs, here they are steps of 16 pictures: without the incomplete last batch where
one model learns all categories, with it where each has its own. There the categories differ in size
and `steps` is their mean: 240 epochs of GoodsAD are 2,880 steps of cigarette boxes and 15,360 of
food bottles. The rate falls by 0.5 % per epoch, and so by a constant factor per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from allgood.recipes.recipe import Recipe, seven

_PEAK = 5e-3
_TRAIN = {
    "steps": 3_000,
    "optimizer": "adamw",
    "learning_rate": _PEAK,
    "schedule": "exponential",
    "final_learning_rate": 2.24e-3,
    "warmup_steps": 0,
    "epsilon": 1e-8,
    "weight_decay": 1e-5,
    "gradient_clip": 0.0,
}
_FP = {"loss": "global", "top_fraction": 0.0}
_MINIMAXAD = Recipe("minimaxad", levels=(1, 2, 3), image_size=256, train=_TRAIN)
_PAPER = replace(_MINIMAXAD, encoder="unireplknet_n", levels=(0, 1, 2))


def _epochs(count: int, steps_per_epoch: float) -> dict[str, Any]:
    """Training settings for so many epochs."""
    rate = _PEAK * 0.995**count
    return {**_TRAIN, "steps": round(count * steps_per_epoch), "final_learning_rate": rate}


def _minimaxad(
    data: str, source: str, train: Mapping[str, Any], reported: Mapping[str, float], **changes: Any
) -> Recipe:
    return replace(_PAPER, data=data, source=source, train=train, reported=reported, **changes)


def _two(image_auroc: float, aupro: float) -> dict[str, float]:
    return {"image_auroc": image_auroc, "aupro": aupro}


RECIPES: dict[str, Recipe] = {
    "minimaxad": replace(_MINIMAXAD, note="fr: many categories or much variation"),
    "minimaxad_fp": replace(_MINIMAXAD, settings=_FP, note="little variation: the global loss"),
    # One model for all categories.
    "minimaxad_mvtec_ad": _minimaxad(
        "MVTec AD",
        "Table 3",
        _epochs(160, 3_629 // 16),
        seven(98.8, 99.6, 97.7, 96.1, 58.5, 59.5, 92.2),
    ),
    "minimaxad_visa": _minimaxad(
        "VisA",
        "Table 3",
        _epochs(160, 8_659 // 16),
        seven(96.9, 97.2, 94.1, 97.4, 48.6, 51.5, 90.1),
    ),
    "minimaxad_real_iad": _minimaxad(
        "Real-IAD",
        "Table 3",
        _epochs(1, 36_465 // 16),
        seven(85.1, 84.1, 75.8, 96.9, 36.0, 42.1, 88.8),
    ),
    # AeBAD-S learned together with MVTec AD's fifteen categories.
    "minimaxad_aebad_s_mvtec": _minimaxad(
        "AeBAD-S of both",
        "Table 1, fr*",
        _epochs(20, (521 + 3_629) // 16),
        _two(87.2, 87.4),
        image_size=224,
    ),
    # One model per category.
    "minimaxad_real_iad_separate": _minimaxad(
        "Real-IAD",
        "Table 3",
        _epochs(50, 76),  # of 36,465 / 30 pictures
        seven(91.2, 89.7, 82.4, 98.3, 44.2, 47.6, 92.3),
        per_category=True,
    ),
    "minimaxad_goodsad_separate": _minimaxad(
        "GoodsAD",
        "Table 3",
        _epochs(240, (46 + 15 + 64 + 27 + 34 + 12) / 6),
        _two(86.1, 87.5),
        image_size=224,
        per_category=True,
    ),
    "minimaxad_visa_separate": _minimaxad(
        "VisA",
        "Table 2",
        _epochs(150, 46),  # of 8,659 / 12 pictures
        _two(96.1, 90.4),
        settings=_FP,
        per_category=True,
    ),
    # The paper's AUPRO of 79.9 is the mean over single pictures, and no other number's equal.
    "minimaxad_aebad_s_separate": _minimaxad(
        "AeBAD-S",
        "Table 1",
        _epochs(130, 33),
        {"image_auroc": 87.4},
        image_size=256,
        crop=224,
        settings={**_FP, "smoothing": "wide"},
        per_category=True,
    ),
}
