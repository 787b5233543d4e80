"""DSC as UniAS defines it: mean Dice per image where precision + recall is largest."""

import math

import numpy as np
from numpy.typing import NDArray

from allgood.metrics.histogram import Integers, Keys, key_scores, score_keys
from allgood.metrics.map_store import MapStore, Scores
from allgood.metrics.ranking import Groups, Metric

_FEW = 4096
"""Keys of an image that are kept as they are; more may be many of the same."""


def dsc(groups: Groups, lowest: Keys, shift: int, maps: MapStore) -> dict[str, Metric]:
    """Dice, 2T / (T + F + P), at t*, the lowest score with the largest P + R, in three means.

    `dsc` is the mean over images, as UniAS reports it: an image with an empty mask counts 1 if
    nothing in it is predicted, else 0. `dsc_defective` is the mean over images with a mask that is
    not empty, `dsc_pooled` that of all pixels as if they were one image. All are exact: the maps
    are looked at again where the ranking is too coarse to tell t*, and for each image's counts.

    Args:
        groups: the ranking of all pixels.
        lowest: (G,) lowest key of each group; a group that is not tied holds the 2^shift from it.
        maps: of all images.
    """
    means = {"dsc": _mean_dice, "dsc_defective": _mean_defective, "dsc_pooled": _pooled_dice}
    if reason := groups.why_undefined() or maps.lost:
        return dict.fromkeys(means, Metric.undefined(reason))
    threshold = _best_threshold(groups, lowest, shift, maps)
    counts = np.array(
        [
            (np.count_nonzero(every >= threshold), np.count_nonzero(of >= threshold), len(of))
            for every, of in maps.images()
        ]
    )
    predicted, t, positives = counts.T
    return {name: Metric.exact(mean(t, predicted - t, positives)) for name, mean in means.items()}


def _best_threshold(groups: Groups, lowest: Keys, shift: int, maps: MapStore) -> np.float32:
    """t*: from the ranking where that is exact, else by what its bins hold."""
    t = groups.true_positives
    recall = t / groups.num_positives
    reached = t / (t + groups.false_positives) + recall
    reachable = t / (t + groups.fewest_false_positives) + recall
    sums, keys = [reached[groups.tied]], [lowest[groups.tied]]
    open_ = np.flatnonzero(~groups.tied & (reachable >= reached.max()))
    for i, (key, pixels, positives) in zip(open_, _inside(lowest[open_], shift, maps), strict=True):
        t_there = t[i] - groups.positives[i] + positives
        f_there = groups.above[i] + pixels - positives
        sums.append(t_there / (t_there + f_there) + t_there / groups.num_positives)
        keys.append(key)
    sum_, key = np.concatenate(sums), np.concatenate(keys)
    lowest_of_equals = key[sum_ == sum_.max()].min()
    return np.float32(key_scores(np.array([lowest_of_equals]))[0])


def _inside(lowest: Keys, shift: int, maps: MapStore) -> list[tuple[Keys, Integers, Integers]]:
    """What each bin holds: its distinct keys, descending, with the pixels and the positives of the
    bin that lie at or above each."""
    if not len(lowest):
        return []
    bits = np.uint32(shift)
    wanted = np.sort(lowest >> bits)
    has_gaps = int(wanted[-1]) - int(wanted[0]) >= len(wanted)
    ends = np.array([int(wanted[0]) << shift, (int(wanted[-1]) + 1 << shift) - 1], np.uint32)
    least, most = key_scores(ends).astype(np.float32)

    def members(scores: Scores) -> tuple[Keys, Integers]:
        keys = score_keys(scores[(scores >= least) & (scores <= most)])
        if has_gaps:
            keys = keys[np.isin(keys >> bits, wanted)]
        if len(keys) > _FEW:
            return np.unique(keys, return_counts=True)
        return keys, np.ones(len(keys), np.int64)

    found = [(members(scores), members(positives)) for scores, positives in maps.images()]
    key, pixels = _summed([of_all for of_all, _ in found])
    positive_key, counts = _summed([of_positives for _, of_positives in found])
    positives = np.zeros(len(key), np.int64)
    positives[np.searchsorted(key, positive_key)] = counts
    parts = []
    bin_of_key, bins = key >> bits, lowest >> bits
    starts, stops = np.searchsorted(bin_of_key, bins), np.searchsorted(bin_of_key, bins, "right")
    for start, stop in zip(starts, stops, strict=True):
        down = np.arange(start, stop)[::-1]
        parts.append((key[down], np.cumsum(pixels[down]), np.cumsum(positives[down])))
    return parts


def _summed(counted: list[tuple[Keys, Integers]]) -> tuple[Keys, Integers]:
    """Distinct keys, ascending, and how often they occur in all parts."""
    every = np.concatenate([keys for keys, _ in counted])
    keys, place = np.unique(every, return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, place, np.concatenate([count for _, count in counted]))
    return keys, counts


def _mean_dice(t: Integers, f: Integers, positives: Integers) -> float:
    """Mean over images, where an empty prediction of an empty mask is 1."""
    total = t + f + positives
    dice: NDArray[np.float64] = np.where(total > 0, 2 * t / np.maximum(total, 1), 1.0)
    return math.fsum(dice) / len(dice)  # exact sum: no trace of the images' order


def _mean_defective(t: Integers, f: Integers, positives: Integers) -> float:
    has_mask = positives > 0
    return _mean_dice(t[has_mask], f[has_mask], positives[has_mask])


def _pooled_dice(t: Integers, f: Integers, positives: Integers) -> float:
    return _mean_dice(t.sum(keepdims=True), f.sum(keepdims=True), positives.sum(keepdims=True))
