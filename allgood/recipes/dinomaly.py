"""Dinomaly's experiments (Guo et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from allgood.recipes.recipe import Recipe, seven


def _three(image_auroc: float, pixel_auroc: float | None, aupro: float) -> dict[str, float]:
    pixel = {} if pixel_auroc is None else {"pixel_auroc": pixel_auroc}
    return {"image_auroc": image_auroc, **pixel, "aupro": aupro}


_DINOMALY = Recipe(
    "dinomaly",
    encoder="vit_base_patch14_reg4_dinov2.lvd142m",
    levels="middle",
    image_size=448,
    crop=392,
    patch=14,
)
_SMALL = replace(_DINOMALY, encoder="vit_small_patch14_reg4_dinov2.lvd142m")
_LARGE = replace(_DINOMALY, encoder="vit_large_patch14_reg4_dinov2.lvd142m")
_REAL_IAD = {"steps": 50_000}
_DROPOUT = {"dropout": 0.4}


def _dinomaly(
    data: str, source: str, reported: Mapping[str, float], base: Recipe = _DINOMALY, **changes: Any
) -> Recipe:
    return replace(base, data=data, source=source, reported=reported, **changes)


def _dinomaly_separate(data: str, reported: Mapping[str, float]) -> Recipe:
    return _dinomaly(data, "Table 2", reported, train={"steps": 5_000}, per_category=True)


RECIPES: dict[str, Recipe] = {
    "dinomaly": _DINOMALY,
    # Dinomaly (CVPR 2025), one model for all categories, ViT-B, 448 -> 392.
    "dinomaly_mvtec_ad": _dinomaly(
        "MVTec AD", "Table 1", seven(99.60, 99.78, 99.04, 98.35, 69.29, 69.17, 94.79)
    ),
    "dinomaly_visa": _dinomaly(
        "VisA", "Table 1", seven(98.73, 98.87, 96.18, 98.74, 53.23, 55.69, 94.50)
    ),
    "dinomaly_real_iad": _dinomaly(
        "Real-IAD",
        "Table 1",
        seven(89.33, 86.77, 80.17, 98.84, 42.79, 47.10, 93.86),
        settings=_DROPOUT,
        train=_REAL_IAD,
    ),
    "dinomaly_mpdd": _dinomaly(
        "MPDD", "Table A13", seven(97.2, 98.4, 96.0, 99.1, 59.5, 59.4, 96.6)
    ),
    "dinomaly_btad": _dinomaly(
        "BTAD", "Table A13", seven(95.4, 98.4, 95.6, 97.8, 70.1, 68.0, 76.5)
    ),
    "dinomaly_uni_medical": _dinomaly(
        "Uni-Medical",
        "Table A13",
        seven(84.9, 84.1, 81.0, 96.8, 51.7, 52.1, 85.5),
        settings=_DROPOUT,
    ),
    # One model per category. The pixel AUROC of 99.9 printed for MVTec AD is taken for a misprint.
    "dinomaly_mvtec_ad_separate": _dinomaly_separate("MVTec AD", _three(99.7, None, 95.0)),
    "dinomaly_visa_separate": _dinomaly_separate("VisA", _three(98.9, 98.9, 95.1)),
    "dinomaly_real_iad_separate": _dinomaly_separate("Real-IAD", _three(92.0, 99.1, 95.1)),
    # Twice the steps ("Dinomaly" with an arrow up); the authors' released weights are these.
    "dinomaly_mvtec_ad_2x": _dinomaly(
        "MVTec AD",
        "2 x schedule",
        seven(99.7, 99.8, 99.2, 98.4, 69.3, 69.2, 94.7),
        train={"steps": 20_000},
    ),
    "dinomaly_visa_2x": _dinomaly(
        "VisA",
        "2 x schedule",
        seven(98.9, 99.0, 96.4, 98.8, 53.8, 55.8, 94.5),
        train={"steps": 20_000},
    ),
    "dinomaly_real_iad_2x": _dinomaly(
        "Real-IAD",
        "2 x schedule",
        seven(89.5, 86.9, 80.4, 98.9, 43.3, 47.4, 94.2),
        settings=_DROPOUT,
        train={"steps": 100_000},
    ),
    # Other sizes of the encoder.
    "dinomaly_small_mvtec_ad": _dinomaly(
        "MVTec AD", "Table 4", seven(99.26, 99.67, 98.72, 98.07, 68.29, 67.78, 94.36), _SMALL
    ),
    "dinomaly_small_visa": _dinomaly(
        "VisA", "Table A3", seven(97.94, 98.09, 95.33, 98.57, 51.19, 55.10, 93.71), _SMALL
    ),
    "dinomaly_small_real_iad": _dinomaly(
        "Real-IAD",
        "Table A3",
        seven(89.10, 86.91, 79.87, 98.69, 41.88, 46.74, 94.08),
        _SMALL,
        settings=_DROPOUT,
        train=_REAL_IAD,
    ),
    "dinomaly_small_280_mvtec_ad": _dinomaly(
        "MVTec AD", "Table A11", _three(99.3, 98.0, 93.4), _SMALL, image_size=280, crop=None
    ),
    "dinomaly_small_280_visa": _dinomaly(
        "VisA", "Table A11", _three(96.5, 98.5, 90.9), _SMALL, image_size=280, crop=None
    ),
    "dinomaly_large_mvtec_ad": _dinomaly(
        "MVTec AD", "Table 4", seven(99.77, 99.92, 99.45, 98.54, 70.53, 70.04, 95.09), _LARGE
    ),
    "dinomaly_large_visa": _dinomaly(
        "VisA", "Table A3", seven(98.85, 99.09, 96.12, 99.10, 55.68, 57.33, 94.76), _LARGE
    ),
    "dinomaly_large_real_iad": _dinomaly(
        "Real-IAD",
        "Table A3",
        seven(90.07, 87.57, 80.90, 99.02, 44.29, 48.36, 94.37),
        _LARGE,
        settings=_DROPOUT,
        train=_REAL_IAD,
    ),
}
