"""RD4AD's experiments (Deng and Li, CVPR 2022), with the numbers of those who repeated them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from allgood.recipes.recipe import Recipe, seven

_TRAIN = {
    "steps": 3_000,
    "optimizer": "adam",
    "learning_rate": 5e-3,
    "final_learning_rate": 5e-3,
    "warmup_steps": 0,
    "beta1": 0.5,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
}
_RD4AD = Recipe("rd4ad", levels=(1, 2, 3), image_size=256, train=_TRAIN)
_NARROW = {"bottleneck_width": 0.25}
"""The ports that the numbers come from have the embedding at half the authors' width."""
_QUOTED = "MambaAD's paper, in MiniMaxAD's Table 3"


def _wide_resnet(
    data: str,
    source: str,
    reported: Mapping[str, float],
    steps: int,
    *,
    per_category: bool = False,
) -> Recipe:
    return replace(
        _RD4AD,
        encoder="wide_resnet50_2.tv_in1k",
        settings=_NARROW,
        train={**_TRAIN, "steps": steps},
        data=data,
        source=source,
        reported=reported,
        per_category=per_category,
    )


RECIPES: dict[str, Recipe] = {
    "rd4ad": _RD4AD,
    # One model for all categories: 100 epochs in batches of 16.
    "rd4ad_mvtec_ad": _wide_resnet(
        "MVTec AD", _QUOTED, seven(94.6, 96.5, 95.2, 96.1, 48.6, 53.8, 91.1), 22_700
    ),
    "rd4ad_visa": _wide_resnet(
        "VisA", _QUOTED, seven(92.4, 92.4, 89.6, 98.1, 38.0, 42.6, 91.8), 54_200
    ),
    "rd4ad_real_iad": _wide_resnet(
        "Real-IAD", _QUOTED, seven(82.4, 79.0, 73.9, 97.3, 25.0, 32.7, 89.6), 228_000
    ),
    # One model per category: 200 epochs of 242 pictures on average.
    "rd4ad_mvtec_ad_separate": _wide_resnet(
        "MVTec AD",
        "anomalib",
        {"image_auroc": 98.5, "image_f1max": 97.6, "pixel_auroc": 96.9},
        3_200,
        per_category=True,
    ),
}
