"""UniAD's experiments (You et al., NeurIPS 2022), one model for all categories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from allgood.recipes.recipe import Recipe

TRAIN = {
    "steps": 5_000,
    "batch_size": 16,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "schedule": "drops",
    "drops": (0.8,),
    "warmup_steps": 0,
    "epsilon": 1e-8,
    "weight_decay": 1e-4,
    "gradient_clip": 0.1,
}
"""Also of HVQ-Trans, and of UniAS but for its drops."""
_UNIAD = Recipe("uniad", levels=(0, 1, 2, 3), image_size=224, train=TRAIN)


def _published(data: str, source: str, reported: Mapping[str, float], steps: int) -> Recipe:
    """1,000 epochs on eight GPUs with batches of 8 each, so 64 together."""
    return replace(
        _UNIAD,
        encoder="tf_efficientnet_b4.aa_in1k",
        train={**TRAIN, "steps": steps, "batch_size": 64},
        data=data,
        source=source,
        reported=reported,
    )


RECIPES: dict[str, Recipe] = {
    "uniad": _UNIAD,
    # 3,629 pictures are 454 on each GPU, and so 57 steps an epoch.
    "uniad_mvtec_ad": _published(
        "MVTec AD", "abstract", {"image_auroc": 96.5, "pixel_auroc": 96.8}, 57_000
    ),
    # 8,659 pictures: 136 steps. The authors of UniAS ran it and give pixel metrics only.
    "uniad_visa": _published(
        "VisA",
        "UniAS's Tables 1 to 3",
        {"pixel_auroc": 98.36, "pixel_ap": 34.32, "dsc": 18.93},
        136_000,
    ),
}
