"""DSC as UniAS defines it: mean Dice per image where precision + recall is largest."""

import math
from collections.abc import Callable

import numpy as np

from allgood.metrics.ranking import Groups, Integers, Metric


def dsc(
    groups: Groups,
    num_exact: int,
    counts: Callable[[int | None], tuple[Integers, Integers]],
    positives: Integers,
    negatives: Integers,
) -> Metric:
    """Mean over images of 2T / (T + F + P) at t*, the lowest score with the largest P + R.

    An image with an empty mask counts 1 if nothing in it is predicted, else 0. In the exact groups
    t* and the counts are exact. If t* may lie in a later group, an image's T there lies between its
    T among all exactly kept pixels and all its positives, and likewise F.

    Args:
        groups: the ranking of all pixels.
        num_exact: how many leading groups come from the exact store.
        counts: T and F (images,) when predicting down to exact group i, or, for None, all exactly
            kept pixels.
        positives, negatives: pixels of each image (images,).
    """
    if reason := groups.why_undefined():
        return Metric.undefined(reason)
    t, f = groups.true_positives, groups.false_positives
    recall = t / groups.num_positives
    reached = t / (t + f) + recall
    reachable = t / (t + groups.fewest_false_positives) + recall
    exact, later = reached[:num_exact], reached[num_exact:]
    candidates: list[Metric] = []
    if num_exact and exact.max() >= later.max(initial=0):
        best = num_exact - 1 - int(np.argmax(exact[::-1]))  # the lowest of equals
        candidates.append(Metric.exact(_mean_dice(*counts(best), positives)))
    if (reachable[num_exact:] >= reached.max()).any():
        t, f = counts(None)
        candidates.append(
            Metric(
                _mean_dice(t, f, positives),
                _mean_dice(t, negatives, positives),
                _mean_dice(positives, f, positives),
            )
        )
    return Metric(
        candidates[0].value,
        min(metric.lower for metric in candidates),
        max(metric.upper for metric in candidates),
    )


def _mean_dice(t: Integers, f: Integers, positives: Integers) -> float:
    """Mean over images of 2T / (T + F + P), where an empty prediction of an empty mask is 1."""
    total = t + f + positives
    dice = np.where(total > 0, 2 * t / np.maximum(total, 1), 1.0)
    return math.fsum(dice) / len(dice)  # exact sum: no trace of the images' order
