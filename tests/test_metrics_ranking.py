"""Metrics against scikit-learn and against slow plain definitions."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from allgood.metrics import (
    MAD_METRICS,
    Metric,
    PixelState,
    image_curves,
    image_f1max_threshold,
    image_metrics,
    mad,
    mean_over_categories,
)
from allgood.metrics import reference as ref
from allgood.types import InputError

KINDS = ("fine", "ties", "signed", "constant", "infinite", "one positive", "one negative")


def some_maps(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps and masks (6, 12, 10); two images are good."""
    random = np.random.default_rng(seed)
    masks = ndimage.uniform_filter(random.random((6, 12, 10)), (0, 3, 3)) > 0.58
    masks[:2] = False
    maps = random.gamma(2.0, size=masks.shape) + masks * random.random()
    if kind == "ties":
        maps = np.round(maps)
    elif kind == "signed":
        maps = np.round(maps * 3 - 5) / 3  # holds -0.0 and 0.0
        maps[0, 0] = -0.0
    elif kind == "constant":
        maps[:] = 0.7
    elif kind == "infinite":
        maps[maps > 4] = np.inf
        maps[maps < 0.5] = -np.inf
    elif kind == "one positive":
        masks[:] = False
        masks[3, 4, 5] = True
    elif kind == "one negative":
        masks[:] = True
        masks[3, 4, 5] = False
    return maps.astype(np.float32), masks


def brute_aupro(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """Trapezoid over all distinct scores, interpolated at the limit, divided by it."""
    regions = []
    for one_map, one_mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(one_mask, np.ones((3, 3)))
        regions += [one_map[labels == r] for r in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for t in np.unique(maps)[::-1]:
        pro = np.mean([(region >= t).mean() for region in regions])
        points.append(((maps[~masks] >= t).mean(), pro))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def brute_dsc(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    best, chosen = -1.0, math.nan
    for t in np.unique(maps)[::-1]:
        predicted = maps >= t
        hits = (predicted & masks).sum()
        objective = hits / predicted.sum() + hits / masks.sum()
        if objective >= best:
            best, chosen = objective, t
    dice = []
    for one_map, mask in zip(maps, masks, strict=True):
        predicted = one_map >= chosen
        total = predicted.sum() + mask.sum()
        dice.append(2 * (predicted & mask).sum() / total if total else 1.0)
    defective = [d for d, mask in zip(dice, masks, strict=True) if mask.any()]
    predicted = maps >= chosen
    return {
        "dsc": float(np.mean(dice)),
        "dsc_defective": float(np.mean(defective)),
        "dsc_pooled": 2 * (predicted & masks).sum() / (predicted.sum() + masks.sum()),
    }


def state_of(maps: np.ndarray, masks: np.ndarray, **settings: object) -> PixelState:
    state = PixelState(**settings)
    state.update(maps, masks)
    return state


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_pixel_metrics_match_plain_definitions(kind: str, seed: int, exact: bool) -> None:
    maps, masks = some_maps(kind, seed)
    result = state_of(maps, masks, exact=exact).result()
    # scikit-learn refuses infinities: their ranks stand for them.
    score, label = np.unique(maps, return_inverse=True)[1].ravel(), masks.ravel()
    precision, recall, _ = precision_recall_curve(label, score)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
    expected = {
        "pixel_auroc": roc_auc_score(label, score),
        "pixel_ap": average_precision_score(label, score),
        "pixel_f1max": f1,
        "pixel_ioumax": f1 / (2 - f1),
        "aupro": brute_aupro(maps, masks, 0.3),
        **brute_dsc(maps, masks),
    }
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].value == pytest.approx(value, abs=1e-8), name
        assert result[name].bound == 0, name


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_aupro_limits(kind: str, limit: float) -> None:
    maps, masks = some_maps(kind, 7)
    value = state_of(maps, masks).result(limit)["aupro"].value
    assert value == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-8)


def test_aupro_with_the_limit_inside_a_tie() -> None:
    maps = np.array([[[4, 3, 2, 2, 2, 1, 1, 1, 1, 1]]], np.float32)
    masks = np.array([[[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]]])
    # FPR reaches 1/8 at 3, then 3/8 at 2 while overlap goes from 1/2 to 1.
    expected = (0.3 * 0.5 + 0.175 * (0.175 / 0.25) * 0.5 / 2) / 0.3
    assert state_of(maps, masks).result()["aupro"].value == pytest.approx(expected, abs=1e-12)


def test_aupro_counts_diagonal_neighbours_as_one_region_and_single_pixels_as_one() -> None:
    masks = np.zeros((1, 6, 6), bool)
    masks[0, [0, 1, 2], [0, 1, 2]] = True
    masks[0, 5, 5] = True
    state = state_of(np.zeros((1, 6, 6)), masks)
    assert (state.num_regions, state.defective_pixels, state.normal_pixels) == (2, 4, 32)


@pytest.mark.parametrize("kind", ["ties", "signed", "infinite"])
@pytest.mark.parametrize("seed", range(5))
def test_image_metrics_match_scikit_learn(kind: str, seed: int) -> None:
    maps, masks = some_maps(kind, seed)
    score, label = maps[:, :6].reshape(-1).astype(float), masks[:, :6].reshape(-1)
    rank = np.unique(score, return_inverse=True)[1]
    result = image_metrics(score, label)
    precision, recall, _ = precision_recall_curve(label, rank)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
    assert result["image_auroc"].value == pytest.approx(roc_auc_score(label, rank), abs=1e-12)
    assert result["image_ap"].value == pytest.approx(
        average_precision_score(label, rank), abs=1e-12
    )
    assert result["image_f1max"].value == pytest.approx(f1, abs=1e-12)
    predicted = score >= image_f1max_threshold(score, label)
    hits = (predicted & label).sum()
    assert 2 * hits / (predicted.sum() + label.sum()) == pytest.approx(f1, abs=1e-12)


def test_perfect_and_inverted_ranking() -> None:
    masks = np.zeros((3, 8, 8), bool)
    masks[1, 2:5, 2:5] = masks[2, 6, 6] = True
    random = np.random.default_rng(0)
    noise = random.random(masks.shape) / 2
    perfect = state_of(masks + noise, masks).result()
    assert {name: m.value for name, m in perfect.items()} == dict.fromkeys(perfect, 1.0)
    inverted = state_of(-1.0 * masks - noise, masks).result()
    assert inverted["pixel_auroc"].value == 0
    assert inverted["aupro"].value == 0
    # Two good and two defective images, ranked perfectly, are not 0.875.
    assert image_metrics([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])["image_ap"].value == 1


def test_random_maps_have_aupro_of_half_the_limit() -> None:
    random = np.random.default_rng(1)
    masks = np.zeros((20, 64, 64), bool)
    masks[:, 20:40, 20:40] = True
    result = state_of(random.random(masks.shape), masks).result()
    assert result["aupro"].value == pytest.approx(0.15, abs=0.01)
    assert result["pixel_auroc"].value == pytest.approx(0.5, abs=0.01)


def test_undefined_has_a_reason_and_is_never_zero() -> None:
    maps = np.random.default_rng(2).random((2, 4, 4))
    reasons = {
        "no defective pixels": state_of(maps, np.zeros_like(maps)),
        "no normal pixels": state_of(maps, np.ones_like(maps)),
        "no pixels": PixelState(),
    }
    for reason, state in reasons.items():
        for metric in state.result().values():
            assert math.isnan(metric.value)
            assert math.isnan(metric.bound)
            assert metric.reason == reason
            assert metric.to_json() == {"value": None, "bound": None, "reason": reason}
        assert math.isnan(state.f1max_threshold())
        assert all(len(curve) == 0 for curve in state.curves().values())
    assert image_metrics([1.0, 2.0], [0, 0])["image_ap"].reason == "no defective images"
    assert image_metrics([1.0, 2.0], [1, 1])["image_auroc"].reason == "no normal images"
    assert image_metrics([], [])["image_auroc"].reason == "no images"


def test_nan_is_an_error_that_names_the_image() -> None:
    maps = np.zeros((2, 4, 4))
    maps[1, 2, 3] = np.nan
    state = PixelState()
    with pytest.raises(InputError, match=r"image 'bottle/b\.png' holds NaN"):
        state.update(maps, np.zeros((2, 4, 4)), ["bottle/a.png", "bottle/b.png"])
    assert state.num_images == 0
    with pytest.raises(InputError, match="'x' is NaN"):
        image_metrics([np.nan, 1.0], [0, 1], ["x", "y"])


def test_dsc_takes_the_lowest_of_equal_thresholds() -> None:
    # precision + recall: 1 + 1/4 at 5, 2/5 + 2/4 at 4, 3/6 + 3/4 = 1.25 at 3, less below.
    maps = np.array([[[5, 4, 4, 4, 4, 3, *[2] * 14]]], np.float32)
    masks = np.array([[[1, 1, 0, 0, 0, 1, 1, *[0] * 13]]], bool)
    result = state_of(maps, masks).result()
    assert result["dsc"].value == pytest.approx(2 * 3 / (6 + 4))
    assert ref.dsc_unias(maps, masks).threshold == 3


def test_curves_pass_through_the_metric() -> None:
    maps, masks = some_maps("fine", 3)
    state = state_of(maps, masks)
    curves, result = state.curves(points=2000), state.result()
    assert np.trapezoid(curves["roc_tpr"], curves["roc_fpr"]) == pytest.approx(
        result["pixel_auroc"].value, abs=3e-3
    )
    assert np.trapezoid(curves["pro"], curves["pro_fpr"]) / 0.3 == pytest.approx(
        result["aupro"].value, abs=3e-3
    )
    assert curves["pr_precision"].mean() == pytest.approx(result["pixel_ap"].value, abs=3e-3)
    assert {len(curve) for curve in curves.values()} == {2000}
    assert image_curves([0.1, 0.9], [0, 1])["roc_tpr"].min() == 1


def test_means_say_who_counted() -> None:
    half, gone = Metric(0.5, 0.4, 0.6), Metric.undefined("no defective pixels")
    mean = mean_over_categories({"a": {"aupro": half}, "b": {"aupro": Metric.exact(1.0)}})["aupro"]
    assert (mean.value, mean.lower, mean.upper, mean.reason) == (0.75, 0.7, 0.8, "")
    mean = mean_over_categories({"a": {"aupro": half}, "b": {"aupro": gone}})["aupro"]
    assert (mean.value, mean.reason) == (0.5, "1 of 2 categories: no defective pixels")
    mean = mean_over_categories({"a": {"aupro": gone}, "b": {}})["aupro"]
    assert math.isnan(mean.value)
    assert mean.reason == "0 of 2 categories: no defective pixels; not measured"


def test_mad_is_the_mean_of_seven() -> None:
    # ADer's published row for one method on MVTec AD; IoU is not part of it.
    metrics = {name: Metric.exact(i / 10) for i, name in enumerate(MAD_METRICS)}
    metrics["pixel_ioumax"] = Metric.exact(0.0)
    assert mad(metrics).value == pytest.approx(0.3)
    metrics["aupro"] = Metric.undefined("no defective regions")
    assert mad(metrics).reason == "aupro: no defective regions"


@pytest.mark.parametrize("kind", ["fine", "ties", "signed"])
def test_reference_variants_match_direct_loops(kind: str) -> None:
    maps, masks = some_maps(kind, 5)
    pixels = ref.SortedPixels.of(maps, masks)
    low, high = maps.min(), maps.max()
    for steps, normalise in ((200, "max"), (100, "minmax")):
        fpr, pro = [], []
        for t in np.arange(low, high, (high - low) / steps):
            cover = []
            for one_map, one_mask in zip(maps, masks, strict=True):
                labels, count = ndimage.label(one_mask, np.ones((3, 3)))
                cover += [(one_map[labels == r] > t).mean() for r in range(1, count + 1)]
            if (maps[~masks] > t).mean() < 0.3:
                fpr.append((maps[~masks] > t).mean())
                pro.append(np.mean(cover))
        start = min(fpr) if normalise == "minmax" else 0.0
        x = (np.array(fpr) - start) / (max(fpr) - start)
        expected = -np.trapezoid(pro, x)
        assert ref.aupro_steps(pixels, steps, normalise) == pytest.approx(expected, abs=1e-12)
    scaled = (maps - low) / (high - low)
    f1 = []
    for t in np.linspace(0, 1, 21):
        hits = ((scaled > t) & masks).sum()
        f1.append(2 * hits / max((scaled > t).sum() + masks.sum(), 1))
    assert ref.threshold_metrics(pixels).pixel_f1_21 == pytest.approx(max(f1), abs=1e-7)


@pytest.mark.parametrize("n", [50, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_strips_match_plain_loop(n: int, seed: int) -> None:
    maps, masks = some_maps("fine", seed)
    edges = np.linspace(0, 1, n + 1, dtype=np.float32) * (maps.max() - maps.min()) + maps.min()
    fpr = np.array([(maps[~masks] >= t).mean() for t in edges[::-1]])
    recall = np.array([(maps[masks] >= t).mean() for t in edges[::-1]])
    ratio = [masks[maps >= t].mean() if (maps >= t).any() else 1.0 for t in edges[::-1]]
    strips = ref.strips_n(ref.SortedPixels.of(maps, masks), n)
    assert strips.auroc == pytest.approx(np.trapezoid(recall, fpr), abs=1e-12)
    assert strips.aupr == pytest.approx(np.trapezoid(ratio, recall), abs=1e-12)
    exact = state_of(maps, masks).result()
    if n == 1000:
        assert strips.aupro == pytest.approx(exact["aupro"].value, abs=0.01)


def test_reference_variants_are_nan_when_undefined() -> None:
    constant, masks = np.ones((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    masks[0, 1, 1] = True
    for maps, mask in ((constant, masks), (np.arange(32.0).reshape(2, 4, 4), masks & False)):
        pixels = ref.SortedPixels.of(maps, mask)
        assert math.isnan(ref.aupro_steps(pixels))
        assert math.isnan(ref.threshold_metrics(pixels).pixel_f1_21)
        assert math.isnan(ref.strips_n(pixels).auroc)
    assert math.isnan(ref.dsc_unias(constant, masks & False).threshold)
    assert math.isnan(ref.aupro_200_per_image(constant, masks & False))
    assert math.isnan(ref.patchcore_optimal(ref.SortedPixels.of(constant, masks & False)).threshold)
