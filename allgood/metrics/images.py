"""Image metrics: exact AUROC, AP and F1max of one score per image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from allgood.metrics.ranking import (
    Floats,
    Groups,
    Metric,
    auroc,
    average_precision,
    best_f1,
    curves_of,
    groups_of_scores,
)
from allgood.types import InputError


def image_metrics(
    scores: ArrayLike, labels: ArrayLike, image_ids: Sequence[str] | None = None
) -> dict[str, Metric]:
    """image_auroc, image_ap and image_f1max, exact.

    Args:
        scores: (B,) image scores, higher is more anomalous; infinities allowed.
        labels: (B,) nonzero for defective images.
        image_ids: B names, only for the message when a score is NaN.

    Raises:
        InputError: lengths differ, or a score is NaN.
    """
    groups = _groups(scores, labels, image_ids)
    return {
        "image_auroc": auroc(groups),
        "image_ap": average_precision(groups),
        "image_f1max": best_f1(groups).f1max,
    }


def image_f1max_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """Highest score t for which `score >= t` reaches image_f1max; NaN when undefined."""
    return best_f1(_groups(scores, labels)).threshold


def image_curves(scores: ArrayLike, labels: ArrayLike, points: int = 200) -> dict[str, Floats]:
    """ROC and precision-recall curves of image scores for plotting; see `curves_of`."""
    return curves_of(_groups(scores, labels), points)


def _groups(scores: ArrayLike, labels: ArrayLike, image_ids: Sequence[str] | None = None) -> Groups:
    score = np.asarray(scores, np.float64)
    label = np.asarray(labels) != 0
    if score.ndim != 1 or score.shape != label.shape:
        raise InputError(
            f"scores have shape {score.shape} but labels {label.shape}: give one of each per image"
        )
    wrong = np.flatnonzero(np.isnan(score))
    if len(wrong):
        name = image_ids[wrong[0]] if image_ids is not None else f"number {wrong[0]}"
        raise InputError(f"the score of image {name!r} is NaN: check its detector")
    return groups_of_scores(score, label)
