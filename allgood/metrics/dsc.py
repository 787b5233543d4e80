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
) -> dict[str, Metric]:
    """Dice, 2T / (T + F + P), at t*, the lowest score with the largest P + R, in three means.

    `dsc` is the mean over images, as UniAS reports it: an image with an empty mask counts 1 if
    nothing in it is predicted, else 0. `dsc_defective` is the mean over images with a mask that is
    not empty, `dsc_pooled` that of all pixels as if they were one image.

    In the exact groups t* and the counts are exact. If t* may lie in a later group, an image's T
    there lies between its T among all exactly kept pixels and all its positives, and likewise F.

    Args:
        groups: the ranking of all pixels.
        num_exact: how many leading groups come from the exact store.
        counts: T and F (images,) when predicting down to exact group i, or, for None, all exactly
            kept pixels.
        positives, negatives: pixels of each image (images,).
    """
    means = {"dsc": _mean_dice, "dsc_defective": _mean_defective, "dsc_pooled": _pooled_dice}
    if reason := groups.why_undefined():
        return dict.fromkeys(means, Metric.undefined(reason))
    t, f = groups.true_positives, groups.false_positives
    recall = t / groups.num_positives
    reached = t / (t + f) + recall
    reachable = t / (t + groups.fewest_false_positives) + recall
    exact, later = reached[:num_exact], reached[num_exact:]
    best = None
    if num_exact and exact.max() >= later.max(initial=0):
        best = counts(num_exact - 1 - int(np.argmax(exact[::-1])))  # the lowest of equals
    elsewhere = counts(None) if (reachable[num_exact:] >= reached.max()).any() else None
    result = {}
    for name, mean in means.items():
        candidates: list[Metric] = []
        if best is not None:
            candidates.append(Metric.exact(mean(*best, positives)))
        if elsewhere is not None:
            t, f = elsewhere
            candidates.append(
                Metric(
                    mean(t, f, positives),
                    mean(t, negatives, positives),
                    mean(positives, f, positives),
                )
            )
        result[name] = Metric(
            candidates[0].value,
            min(metric.lower for metric in candidates),
            max(metric.upper for metric in candidates),
        )
    return result


def _mean_dice(t: Integers, f: Integers, positives: Integers) -> float:
    """Mean over images, where an empty prediction of an empty mask is 1."""
    total = t + f + positives
    dice = np.where(total > 0, 2 * t / np.maximum(total, 1), 1.0)
    return math.fsum(dice) / len(dice)  # exact sum: no trace of the images' order


def _mean_defective(t: Integers, f: Integers, positives: Integers) -> float:
    has_mask = positives > 0
    return _mean_dice(t[has_mask], f[has_mask], positives[has_mask])


def _pooled_dice(t: Integers, f: Integers, positives: Integers) -> float:
    return _mean_dice(t.sum(keepdims=True), f.sum(keepdims=True), positives.sum(keepdims=True))
