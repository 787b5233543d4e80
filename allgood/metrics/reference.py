"""Metrics as published evaluation codes compute them, each under a name of its own.

They differ from ours by up to several points on the same maps, so a paper's table can only be
compared with the paper's variant. Most of them change under a monotone map of the scores. All work
from sorted negatives and positives by binary search: no map is scanned once per threshold.

Undefined values are NaN. Maps are (B, H, W) float, masks (B, H, W) nonzero where defective.
Letters: B images, N negative pixels, P positive pixels, R regions.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from allgood.metrics.pixels import region_labels
from allgood.metrics.ranking import Floats, Groups, groups_of_scores

Scores = NDArray[np.floating]


@dataclass(frozen=True)
class SortedPixels:
    """All pixels of some images, sorted: what every variant starts from."""

    negatives: Scores
    """(N,) ascending."""
    positives: Scores
    """(P,) ascending."""
    overlap: Floats
    """(P + 1,): mean over regions of the share that lies at or after each place in `positives`."""

    @classmethod
    def of(cls, maps: ArrayLike, masks: ArrayLike) -> "SortedPixels":
        scores, mask = np.asarray(maps), np.asarray(masks) != 0
        weights, regions = [np.zeros(0)], 0
        for one in mask:
            _, region = region_labels(one)
            sizes = np.bincount(region)[1:] if len(region) else np.zeros(0, np.int64)
            weights.append(1 / sizes[region - 1])
            regions += len(sizes)
        order = np.argsort(scores[mask], kind="stable")
        share = np.concatenate(weights)[order] / max(regions, 1)
        overlap = np.append(np.cumsum(share[::-1])[::-1], 0.0)
        return cls(np.sort(scores[~mask]), scores[mask][order], overlap)

    @property
    def is_ranking(self) -> bool:
        """Whether there are pixels of both kinds."""
        return bool(len(self.negatives) and len(self.positives))

    @property
    def minimum(self) -> np.floating:
        return min(self.negatives[0], self.positives[0])

    @property
    def maximum(self) -> np.floating:
        return max(self.negatives[-1], self.positives[-1])

    @cached_property
    def groups(self) -> Groups:
        """The exact ranking, without regions: for AUROC, AP and F1max as in `ranking`."""
        value, first = np.unique(self.positives, return_index=True)
        count = np.diff(first, append=len(self.positives))
        end = np.searchsorted(self.negatives, value, side="right")
        ties = end - np.searchsorted(self.negatives, value)
        return Groups(
            unit="pixels",
            num_negatives=len(self.negatives),
            num_positives=len(self.positives),
            num_regions=0,
            threshold=value[::-1].astype(np.float64),
            above=(len(self.negatives) - end)[::-1],
            negatives=ties[::-1],
            positives=count[::-1],
            weight=np.zeros(len(value), np.int64),
            tied=np.ones(len(value), np.bool_),
        )

    def above(self, thresholds: Scores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """T and F of the rule score > threshold."""
        t = len(self.positives) - np.searchsorted(self.positives, thresholds, side="right")
        return t, len(self.negatives) - np.searchsorted(self.negatives, thresholds, side="right")

    def overlap_above(self, thresholds: Scores) -> Floats:
        """Mean covered share of the regions, rule score > threshold."""
        return self.overlap[np.searchsorted(self.positives, thresholds, side="right")]


def aupro_steps(
    pixels: SortedPixels,
    steps: int = 200,
    normalise: Literal["max", "minmax"] = "max",
    limit: float = 0.3,
) -> float:
    """AUPRO on equally spaced thresholds between the smallest and the largest score.

    Thresholds from the minimum on, the maximum excluded; rule score > threshold; points with
    FPR < limit are kept, and the FPR axis is stretched to end at 1 by the *kept* points:
    FPR / max ("max": Dinomaly, MiniMaxAD, CCAD, DDAD, CostFilter, with 200 steps) or
    (FPR - min) / (max - min) ("minmax": ADer, with 100 steps), not interpolated at the limit.
    """
    if not pixels.is_ranking or pixels.minimum == pixels.maximum:
        return math.nan
    low, high = pixels.minimum, pixels.maximum
    # In the maps' own precision, as the codes do: rounding decides pixels that lie on a threshold.
    thresholds = np.arange(low, high, (high - low) / steps, dtype=pixels.negatives.dtype)
    _, f = pixels.above(thresholds)
    fpr = f / len(pixels.negatives)
    kept = fpr < limit
    fpr, pro = fpr[kept], pixels.overlap_above(thresholds)[kept]
    start = fpr.min(initial=np.inf) if normalise == "minmax" else 0.0
    width = fpr.max(initial=-np.inf) - start
    return _area((fpr - start) / width, pro) if width > 0 else math.nan


def aupro_200_maxnorm(maps: ArrayLike, masks: ArrayLike) -> float:
    """The AUPRO of Dinomaly, MiniMaxAD, CCAD, DDAD and CostFilter; see `aupro_steps`."""
    return aupro_steps(SortedPixels.of(maps, masks), 200, "max")


def aupro_100_minmax(maps: ArrayLike, masks: ArrayLike) -> float:
    """The AUPRO of ADer without its accumulator; see `aupro_steps`."""
    return aupro_steps(SortedPixels.of(maps, masks), 100, "minmax")


def aupro_200_per_image(maps: ArrayLike, masks: ArrayLike) -> float:
    """The 200-step AUPRO of each anomalous image alone, averaged (MiniMaxAD on AeBAD-S, RD4AD)."""
    scores, mask = np.asarray(maps), np.asarray(masks) != 0
    areas = [
        aupro_200_maxnorm(scores[i : i + 1], mask[i : i + 1])
        for i in np.flatnonzero(label_from_mask(mask))
    ]
    return float(np.mean(areas)) if areas else math.nan


@dataclass(frozen=True)
class ThresholdMetrics:
    """ADer's pixel metrics on fixed thresholds of scores min-max normalised over the class."""

    pixel_f1_21: float
    """Largest F1 = 2 PR / (P + R) over the thresholds 0, 0.05, ..., 1, each ratio with eps 1e-8."""
    pixel_dice_21: float
    """Largest 2T / (2T + F + missed): F1 but for where eps stands."""
    pixel_iou_21: float
    """Largest T / (T + F + missed)."""
    f1_mean: float
    """Mean F1 over the thresholds 0.2, 0.3, ..., 0.8 (mF1_px_0.2_0.8_0.1)."""
    accuracy_mean: float
    """Mean recall over the same: ADer's "mAcc" is the accuracy on defective pixels."""
    iou_mean: float


def threshold_metrics(pixels: SortedPixels) -> ThresholdMetrics:
    """ADer's F1, Dice, IoU and accuracy; all NaN for a constant map or a single kind of pixel."""
    if not pixels.is_ranking or pixels.minimum == pixels.maximum:
        return ThresholdMetrics(*[math.nan] * 6)
    low, width = pixels.minimum, pixels.maximum - pixels.minimum
    scaled = SortedPixels(
        ((pixels.negatives - low) / width).astype(np.float64),
        ((pixels.positives - low) / width).astype(np.float64),
        pixels.overlap,
    )
    f1, dice, iou, _ = _ratios(scaled, np.linspace(0, 1, 21))
    f1_wide, _, iou_wide, recall = _ratios(scaled, np.linspace(0.2, 0.8, 7))
    best = (float(values.max()) for values in (f1, dice, iou))
    mean = (float(values.mean()) for values in (f1_wide, recall, iou_wide))
    return ThresholdMetrics(*best, *mean)


def _ratios(pixels: SortedPixels, thresholds: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """F1, Dice, IoU and recall at each threshold."""
    eps = 1e-8
    t, f = pixels.above(thresholds)
    positives = len(pixels.positives)
    precision, recall = t / (t + f + eps), t / (positives + eps)
    f1 = 2 * precision * recall / (precision + recall + eps)
    return f1, 2 * t / (t + f + positives + eps), t / (f + positives + eps), recall


@dataclass(frozen=True)
class StripMetrics:
    """Areas under curves of n + 1 equally spaced thresholds."""

    auroc: float
    aupr: float
    """Trapezoid under precision over recall; ADer reports it as AP."""
    aupro: float


def strips_n(pixels: SortedPixels, n: int = 1000, limit: float = 0.3) -> StripMetrics:
    """adeval's accumulator (n = 1000) and ADer's use of it (n = 50).

    Thresholds from the minimum to the maximum, both included, rule score >= threshold; no point
    (0, 0) is added. Past the last point below the limit, AUPRO follows the straight line.
    """
    if not pixels.is_ranking or pixels.minimum == pixels.maximum:
        return StripMetrics(*[math.nan] * 3)
    low, high = np.float32(pixels.minimum), np.float32(pixels.maximum)
    edges = (np.linspace(0, 1, n + 1, dtype=np.float32) * (high - low) + low)[::-1]
    place = np.searchsorted(pixels.positives, edges)
    t = len(pixels.positives) - place
    f = len(pixels.negatives) - np.searchsorted(pixels.negatives, edges)
    pro = pixels.overlap[place] / pixels.overlap[0]
    fpr, recall = f / len(pixels.negatives), t / len(pixels.positives)
    precision = np.where(t + f > 0, t / np.maximum(t + f, 1), 1.0)
    kept = fpr <= limit
    area = _area(np.append(fpr[kept], limit), np.append(pro[kept], np.interp(limit, fpr, pro)))
    return StripMetrics(_area(fpr, recall), _area(recall, precision), area / limit)


@dataclass(frozen=True)
class DiceAtThreshold:
    """UniAS's Dice and IoU of each image at the threshold with the largest precision + recall."""

    threshold: float
    precision: float
    recall: float
    dice: Floats
    """(B,); 1 for an empty mask without predictions. Its mean is the DSC."""
    iou: Floats
    """(B,)"""


def dsc_unias(maps: ArrayLike, masks: ArrayLike) -> DiceAtThreshold:
    """UniAS's segmentation scores: the lowest of equally good thresholds, rule score >= t."""
    scores, mask = np.asarray(maps), np.asarray(masks) != 0
    groups = SortedPixels.of(scores, mask).groups
    if groups.why_undefined():
        missing = np.full(len(scores), math.nan)
        return DiceAtThreshold(math.nan, math.nan, math.nan, missing, missing)
    t, f = groups.true_positives, groups.false_positives
    precision, recall = t / (t + f), t / groups.num_positives
    best = len(t) - 1 - int(np.argmax((precision + recall)[::-1]))
    predicted = scores >= groups.threshold[best]
    both = (predicted & mask).sum((1, 2))
    either = (predicted | mask).sum((1, 2))
    iou = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    dice = np.where(either > 0, 2 * both / np.maximum(either + both, 1), 1.0)
    return DiceAtThreshold(
        float(groups.threshold[best]), float(precision[best]), float(recall[best]), dice, iou
    )


def f1max_eps(groups: Groups, eps: float = 1e-7) -> tuple[float, float]:
    """Dinomaly's and MiniMaxAD's largest 2 PR / (P + R + eps), and the threshold reaching it."""
    if groups.why_undefined():
        return math.nan, math.nan
    t = groups.true_positives
    precision, recall = t / (t + groups.false_positives), t / groups.num_positives
    f1 = 2 * precision * recall / (precision + recall + eps)
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))  # the codes go up the scores
    return float(f1[best]), float(groups.threshold[best])


@dataclass(frozen=True)
class ErrorRates:
    threshold: float
    false_positives: float
    """Share of *all* pixels that are normal and predicted; the code calls it FPR."""
    false_negatives: float
    """Share of *all* pixels that are defective and not predicted; the code calls it FNR."""


def patchcore_optimal(pixels: SortedPixels) -> ErrorRates:
    """PatchCore's optimal pixel threshold, that of the largest F1, and the error shares there."""
    threshold = f1max_eps(pixels.groups, eps=0.0)[1]
    if math.isnan(threshold):
        return ErrorRates(math.nan, math.nan, math.nan)
    false_positives = len(pixels.negatives) - np.searchsorted(pixels.negatives, threshold)
    false_negatives = np.searchsorted(pixels.positives, threshold)
    total = len(pixels.negatives) + len(pixels.positives)
    return ErrorRates(threshold, float(false_positives / total), float(false_negatives / total))


def ddad_image_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """DDAD's image threshold: the highest that maximises TPR - FPR (Youden); (B,) each."""
    groups = groups_of_scores(np.asarray(scores, np.float64), np.asarray(labels) != 0)
    if groups.why_undefined():
        return math.nan
    gain = groups.true_positives / groups.num_positives
    gain -= groups.false_positives / groups.num_negatives
    best = int(np.argmax(gain))
    return float(groups.threshold[best]) if gain[best] > 0 else math.inf


def auroc_flipped(auroc: float) -> float:
    """max(a, 1 - a), as UniAD, UniAS, HVQ-Trans, DiAD and CCAD report it: hides inverted scores."""
    return max(auroc, 1 - auroc)


def label_from_mask(masks: ArrayLike) -> NDArray[np.bool_]:
    """(B,) whether any mask pixel is left after resizing: turns tiny defects into good images."""
    mask = np.asarray(masks)
    return (mask != 0).reshape(len(mask), -1).any(axis=1)


def image_score_max(maps: ArrayLike) -> Scores:
    """(B,) maximum of each map."""
    return np.asarray(maps).max(axis=(1, 2))


def image_score_mean(maps: ArrayLike) -> Floats:
    """(B,) mean of each map."""
    return np.asarray(maps, np.float64).mean(axis=(1, 2))


def image_score_std(maps: ArrayLike) -> Floats:
    """(B,) standard deviation of each map, divisor H * W (UniAS)."""
    return np.asarray(maps, np.float64).std(axis=(1, 2))


def image_score_mean_of_largest(maps: ArrayLike, count: int) -> Floats:
    """(B,) mean of the `count` largest pixels of each map (Dinomaly, CostFilter, MiniMaxAD)."""
    flat = np.asarray(maps, np.float64).reshape(len(np.asarray(maps)), -1)
    if not 1 <= count <= flat.shape[1]:
        raise ValueError(f"count must be in [1, {flat.shape[1]}], the map's pixels; got {count}")
    return np.partition(flat, -count, axis=1)[:, -count:].mean(axis=1)


def image_score_max_pooled(maps: ArrayLike, size: int = 16) -> Floats:
    """(B,) maximum after size x size average pooling, stride 1, no padding (UniAD, ADer)."""
    scores = np.asarray(maps, np.float64)
    if not 1 <= size <= min(scores.shape[1:]):
        raise ValueError(f"size must be in [1, {min(scores.shape[1:])}], the map's; got {size}")
    windows = np.lib.stride_tricks.sliding_window_view(scores, size, axis=1).mean(axis=-1)
    windows = np.lib.stride_tricks.sliding_window_view(windows, size, axis=2).mean(axis=-1)
    return windows.max(axis=(1, 2))


def _area(x: Floats, y: Floats) -> float:
    """Trapezoid area under y over x, whichever way x runs."""
    return abs(float(np.trapezoid(y, x)))
