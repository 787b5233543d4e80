"""Ranking metrics from groups of equal or nearly equal scores, each with guaranteed bounds.

Scores are higher where something is more anomalous. Going down the ranking, a *group* is either all
items of exactly one score (`tied`) or one histogram bin, whose inner order is unknown. Only groups
that hold positives matter, and for each of them four integers are enough:

    F' negatives ranked above the group      a negatives, p positives, w region weight in the group

T' = positives above, T = T' + p, F = F' + a; N and P are the totals. A tied group gives the exact
value. A bin gives the extremes over every order that its items may have: T lies between T' and T, F
between F' and F, and each metric is monotone in both, so no tighter bound follows from (a, p, w).

Letters: G groups, N negatives, P positives, L the limit of the false-positive rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """A number in [0, 1] with the interval that is guaranteed to hold the exact one.

    `value` is NaN when the metric is undefined; `reason` then says why in words.
    """

    value: float
    lower: float
    upper: float
    reason: str = ""

    @classmethod
    def exact(cls, value: float) -> "Metric":
        return cls(value, value, value)

    @classmethod
    def undefined(cls, reason: str) -> "Metric":
        return cls(math.nan, math.nan, math.nan, reason)

    @property
    def is_defined(self) -> bool:
        return not math.isnan(self.value)

    @property
    def bound(self) -> float:
        """The exact value is at most this far from `value`; NaN when undefined."""
        return max(self.value - self.lower, self.upper - self.value)

    def to_json(self) -> dict[str, float | str | None]:
        """{"value", "bound"} as floats, or both None beside the "reason"."""
        if self.is_defined:
            return {"value": self.value, "bound": self.bound}
        return {"value": None, "bound": None, "reason": self.reason}


@dataclass(frozen=True)
class Groups:
    """The ranking of N negatives and P positives, as the G groups that hold a positive.

    Groups stand in descending order of score; all arrays are (G,).
    """

    unit: str
    """What is ranked, "pixels" or "images"; used in reasons."""
    num_negatives: int
    num_positives: int
    num_regions: int
    threshold: Floats
    """Lowest score that a member may have: predicting `score >= threshold` includes the group."""
    above: Integers
    """F', negatives in all groups above."""
    negatives: Integers
    """a"""
    positives: Integers
    """p >= 1"""
    weight: Integers
    """w, sum of 1/|region| over the positives in fixed point; zeros when there are no regions."""
    tied: NDArray[np.bool_]
    """Whether all members have exactly the same score."""

    @property
    def true_positives(self) -> Integers:
        """T, positives down to and including each group."""
        return np.cumsum(self.positives)

    @property
    def false_positives(self) -> Integers:
        """F, negatives down to and including each group."""
        return self.above + self.negatives

    @property
    def fewest_false_positives(self) -> Integers:
        """Fewest negatives that a threshold inside the group can admit with all its positives."""
        return np.where(self.tied, self.false_positives, self.above)

    def why_undefined(self) -> str:
        """Empty when both kinds occur, else the reason in words."""
        if not self.num_positives:
            return f"no defective {self.unit}" if self.num_negatives else f"no {self.unit}"
        return "" if self.num_negatives else f"no normal {self.unit}"


def groups_of_scores(
    scores: Floats, positive: NDArray[np.bool_], *, unit: str = "images"
) -> Groups:
    """Exact groups of a few scores, without regions.

    Args:
        scores: (K,) without NaN; infinities are ordered like any number.
        positive: (K,) whether each item is defective.
    """
    order = np.argsort(-scores, kind="stable")  # -0.0 equals 0.0 in every comparison below
    ranked, label = scores[order], positive[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else order
    true_positives = np.cumsum(label)[last]
    false_positives = last + 1 - true_positives
    p = np.diff(true_positives, prepend=0)
    a = np.diff(false_positives, prepend=0)
    kept = p > 0
    return Groups(
        unit=unit,
        num_negatives=int((~positive).sum()),
        num_positives=int(positive.sum()),
        num_regions=0,
        threshold=ranked[last][kept] + 0.0,
        above=(false_positives - a)[kept],
        negatives=a[kept],
        positives=p[kept],
        weight=np.zeros(int(kept.sum()), np.int64),
        tied=np.ones(int(kept.sum()), np.bool_),
    )


def _metric(value: float, lower: float, upper: float) -> Metric:
    """Clip rounding errors of the last digit: bounds within [0, 1], value within its bounds."""
    lower, upper = max(lower, 0.0), min(upper, 1.0)
    return Metric(float(min(max(value, lower), upper)), float(lower), float(upper))


def auroc(groups: Groups) -> Metric:
    """Area under the ROC curve: P(positive scores higher) + P(equal) / 2.

    N * P * AUROC = sum p (N - F' - a/2); in a bin from sum p (N - F) to sum p (N - F').
    """
    if reason := groups.why_undefined():
        return Metric.undefined(reason)
    p, a = groups.positives.astype(np.float64), groups.negatives.astype(np.float64)
    below = groups.num_negatives - groups.above - a / 2
    pairs = float(groups.num_negatives) * float(groups.num_positives)
    value = float((p * below).sum())
    slack = float((p * np.where(groups.tied, 0.0, a / 2)).sum())
    return _metric(value / pairs, (value - slack) / pairs, (value + slack) / pairs)


def average_precision(groups: Groups) -> Metric:
    """Step-wise average precision: the mean over positives of T / (T + F), ties counted at once.

    P * AP = sum p T / (T + F) for tied groups. In a bin the most is p T / (T + F'), positives tied
    on top; the least is sum_{i=1..p} (T' + i) / (T' + i + F), positives distinct at the bottom. The
    value takes both kinds as evenly interleaved (an integral along the bin).
    """
    if reason := groups.why_undefined():
        return Metric.undefined(reason)
    tied = groups.tied
    p = groups.positives.astype(np.float64)
    t, f = groups.true_positives.astype(np.float64), groups.false_positives.astype(np.float64)
    exact = float((p[tied] * t[tied] / (t[tied] + f[tied])).sum())
    if tied.all():
        return _metric(*[exact / groups.num_positives] * 3)

    p, t, f, above = p[~tied], t[~tied], f[~tied], groups.above[~tied].astype(np.float64)
    lower = _precision_sum_of_distinct(t - p, p, f)
    upper = p * t / (t + above)
    n, s = p + (f - above), t - p + above
    # s = 0: nothing lies above, precision is p / n all along.
    log_ratio = np.log1p(n / np.maximum(s, 1)) / n
    middle = p * np.where(s > 0, p / n + (t - p - p * s / n) * log_ratio, p / n)
    middle = np.clip(middle, lower, upper)
    sums = (exact + float(part.sum()) for part in (middle, lower, upper))
    return _metric(*(total / groups.num_positives for total in sums))


def _precision_sum_of_distinct(start: Floats, p: Floats, f: Floats) -> Floats:
    """sum_{i=1..p} (start + i) / (start + i + f) for each bin.

    In closed form p - f (digamma(start + f + p + 1) - digamma(start + f + 1)). The difference loses
    digits when p is small beside f, so short sums are added term by term.
    """
    total = np.zeros_like(p)
    for i in range(1, min(32, int(p.max(initial=0))) + 1):
        term = (start + i) / (start + i + f)
        total += np.where((p <= 32) & (i <= p), term, 0.0)
    long = p > 32
    x, steps = start[long] + f[long] + 1, p[long]
    total[long] = steps - f[long] * (digamma(x + steps) - digamma(x))
    return total


@dataclass(frozen=True)
class BestF1:
    """F1max, IoUmax = F1max / (2 - F1max), and the highest threshold that reaches them.

    The threshold is chosen on test labels: it describes the ranking and is no operating point.
    """

    f1max: Metric
    ioumax: Metric
    threshold: float


def best_f1(groups: Groups) -> BestF1:
    """max over thresholds of 2T / (T + F + P), and of T / (F + P).

    The value is that of a threshold at a group's lower edge, so it is reached; a threshold inside
    a bin can reach at most 2T / (T + F' + P). Only groups with positives can hold the maximum.
    """
    if reason := groups.why_undefined():
        undefined = Metric.undefined(reason)
        return BestF1(undefined, undefined, math.nan)
    t, f, total = groups.true_positives, groups.false_positives, groups.num_positives
    fewest = groups.fewest_false_positives
    f1 = 2 * t / (t + f + total)
    iou = t / (f + total)
    best = int(np.argmax(f1))  # the first of equals: the highest threshold
    return BestF1(
        _metric(f1[best], f1[best], (2 * t / (t + fewest + total)).max()),
        _metric(iou[best], iou[best], (t / (fewest + total)).max()),
        float(groups.threshold[best]),
    )


def aupro(groups: Groups, fpr_limit: float = 0.3) -> Metric:
    """Area under the per-region overlap curve up to FPR L, divided by L.

    Each positive pixel carries 1 / |region|. With X = L N, a weight w in a group adds w h, where h
    is the stretch of the FPR axis (in pixels, up to X) over which the group is already counted:

        h = 0 if X <= F';  (X - F')^2 / 2a if F' < X < F' + a;  X - F' - a/2 otherwise

    which equals the trapezoid over all distinct scores with interpolation at L. In a bin h lies
    between max(X - F, 0) and max(X - F', 0).
    """
    check_fpr_limit(fpr_limit)
    if reason := groups.why_undefined():
        return Metric.undefined(reason)
    if not groups.num_regions:
        return Metric.undefined("no defective regions")
    limit = fpr_limit * groups.num_negatives
    a, w = groups.negatives.astype(np.float64), groups.weight.astype(np.float64)
    room = np.maximum(limit - groups.above, 0.0)
    height = room - a / 2
    cut = room < a
    height[cut] = room[cut] ** 2 / (2 * a[cut])
    least = np.where(groups.tied, height, np.maximum(room - a, 0.0))
    most = np.where(groups.tied, height, room)
    # Dividing by the weights' own total cancels their rounding: a perfect ranking gives 1.
    scale = limit * w.sum()
    value, lower, upper = (float((w * h).sum()) / scale for h in (height, least, most))
    return _metric(value, lower, upper)


def check_fpr_limit(fpr_limit: float) -> None:
    """Raise ValueError unless 0 < fpr_limit <= 1."""
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must be in (0, 1], got {fpr_limit}")


def curves_of(groups: Groups, points: int = 200, fpr_limit: float = 0.3) -> dict[str, Floats]:
    """Curves for plotting, each array (points,); empty when the curve is undefined.

    Returns:
        "roc_fpr", "roc_tpr": FPR from 0 to 1, denser near 0.
        "pr_recall", "pr_precision": recall from 1/points to 1, precision at the highest threshold
            that reaches it.
        "pro_fpr", "pro": FPR from 0 to fpr_limit; only if there are regions.
    """
    check_fpr_limit(fpr_limit)
    if groups.why_undefined():
        empty = np.zeros(0)
        names = ["roc_fpr", "roc_tpr", "pr_recall", "pr_precision"]
        return {name: empty for name in [*names, "pro_fpr", "pro"]}
    t, f = groups.true_positives, groups.false_positives
    fpr = np.linspace(0, 1, points) ** 2
    recall = np.linspace(1 / points, 1, points)
    at = np.searchsorted(t, np.ceil(recall * groups.num_positives - 1e-6))
    curves = {
        "roc_fpr": fpr,
        "roc_tpr": _along(groups, groups.positives, fpr),
        "pr_recall": recall,
        "pr_precision": t[at] / (t[at] + f[at]),
    }
    if groups.num_regions:
        fpr = np.linspace(0, fpr_limit, points)
        curves |= {"pro_fpr": fpr, "pro": _along(groups, groups.weight, fpr)}
    return curves


def _along(groups: Groups, gain: Integers, fpr: Floats) -> Floats:
    """Share of `gain` collected at each FPR: straight lines from (F', before) to (F, after)."""
    after = np.cumsum(gain)
    x = np.stack([groups.above, groups.false_positives], 1).ravel() / groups.num_negatives
    y = np.stack([after - gain, after], 1).ravel() / after[-1]
    at = np.searchsorted(x, fpr, side="right")  # of several points at one FPR, the last
    left, right = np.maximum(at - 1, 0), np.minimum(at, len(x) - 1)
    width = np.where(x[right] > x[left], x[right] - x[left], 1.0)
    share = np.clip((fpr - x[left]) / width, 0.0, 1.0)
    return np.where(at > 0, y[left] + share * (y[right] - y[left]), 0.0)


def mean_over_categories(
    categories: Mapping[str, Mapping[str, Metric]],
) -> dict[str, Metric]:
    """Unweighted mean of each metric over the categories that define it.

    Bounds average too. `reason` of a mean says how many categories counted when some did not, and
    why the others did not.
    """
    names = dict.fromkeys(name for metrics in categories.values() for name in metrics)
    return {
        name: _mean({c: m[name] for c, m in categories.items() if name in m}, len(categories))
        for name in names
    }


def _mean(metrics: dict[str, Metric], total: int) -> Metric:
    defined = [m for m in metrics.values() if m.is_defined]
    reasons = sorted({m.reason for m in metrics.values() if not m.is_defined})
    if len(metrics) < total:
        reasons.append("not measured")
    because = "; ".join(reasons)
    if not defined:
        return Metric.undefined(f"0 of {total} categories: {because}")
    note = f"{len(defined)} of {total} categories: {because}" if because else ""
    value, lower, upper = (
        math.fsum(getattr(m, part) for m in defined) / len(defined)
        for part in ("value", "lower", "upper")
    )
    return Metric(value, lower, upper, note)


MAD_METRICS = (
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "aupro",
)
"""The seven metrics whose plain mean is mAD."""


def mad(metrics: Mapping[str, Metric]) -> Metric:
    """mAD: the mean of the seven metrics of `MAD_METRICS`; undefined if one of them is."""
    for name in MAD_METRICS:
        if name not in metrics:
            return Metric.undefined(f"{name} was not measured")
        if not metrics[name].is_defined:
            return Metric.undefined(f"{name}: {metrics[name].reason}")
    value, lower, upper = (
        math.fsum(getattr(metrics[name], part) for name in MAD_METRICS) / len(MAD_METRICS)
        for part in ("value", "lower", "upper")
    )
    return Metric(value, lower, upper)
