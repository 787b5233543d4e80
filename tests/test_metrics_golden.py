"""Golden parity of the metrics room: what six published evaluation codes answer for 30 maps.

The maps follow from a written rule; the numbers stand in this file, so the test runs anywhere. The
second test uses the maps, per-image arrays and numbers of the golden files where they are present.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from allgood.metrics import PixelState, image_metrics
from allgood.metrics import reference as ref

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

DINOMALY_PIXEL = {"p_auroc": 0.891558487187007, "p_ap": 0.5310761154047675}
DINOMALY_PIXEL |= {"p_f1max": 0.5461893266575092, "aupro": 0.777640420164518}
ADER_PIXEL = {
    "mAUROC_px": 0.891558487187007,
    "mAP_px": 0.5310761154047675,
    "mF1_max_px": 0.5436013540114356,
    "mF1_px_0.2_0.8_0.1": 0.26617105971983634,
    "mAcc_px_0.2_0.8_0.1": 0.5070189925662939,
    "mIoU_px_0.2_0.8_0.1": 0.16506032643614305,
    "mIoU_max_px": 0.3732503888015209,
    "mDice_max_px": 0.5436013590023715,
}
ADER_IMAGE = {
    "mAUROC_sp_max": 0.8049999999999999,
    "mAUROC_sp_mean": 0.7649999999999999,
    "mAP_sp_max": 0.9213605672653871,
    "mF1_max_sp_max": 0.8421052631578948,
}
NUMBERS = {
    "dinomaly, image score mean of the 40 largest": {
        "i_auroc": 0.8049999999999999,
        "i_ap": 0.9085577259010766,
        "i_f1max": 0.8372092525689592,
        **DINOMALY_PIXEL,
    },
    "dinomaly, image score maximum": {
        "i_auroc": 0.8049999999999999,
        "i_ap": 0.9213605672653871,
        "i_f1max": 0.8421052132964019,
        **DINOMALY_PIXEL,
    },
    "dinomaly": {
        "aupro (200 thresholds)": 0.777640420164518,
        "pixel threshold of best F1 (return_best_thr)": 0.7099609375,
    },
    "minimaxad": {
        "aupro, data set": 0.777640420164518,
        "aupro, mean over anomalous images": 0.8027640395021207,
    },
    "ader, 100 AUPRO steps, pooling None": {
        **ADER_IMAGE,
        "mAUPRO_px": 0.7724708148279632,
        **ADER_PIXEL,
    },
    "ader, 200 AUPRO steps, pooling None": {
        **ADER_IMAGE,
        "mAUPRO_px": 0.777640420164518,
        **ADER_PIXEL,
    },
    "ader, 100 AUPRO steps, pooling 16": {
        "mAUROC_sp_max": 0.745,
        "mAUROC_sp_mean": 0.7,
        "mAP_sp_max": 0.8764688724170993,
        "mF1_max_sp_max": 0.8372093023255814,
        "mAUPRO_px": 0.7724708148279632,
        **ADER_PIXEL,
    },
    "unias, one class": {
        "mean_ap_auc": 0.5310761154047675,
        "mean_dice_auc": 0.477049729330406,
        "mean_iou_auc": 0.41598767850931256,
        "mean_max_auc": 0.8049999999999999,
        "mean_pixel_auc": 0.891558487187007,
        "mean_std_auc": 0.755,
        "one_ap_auc": 0.5310761154047675,
        "one_dice_auc": 0.477049729330406,
        "one_iou_auc": 0.41598767850931256,
        "one_max_auc": 0.8049999999999999,
        "one_pixel_auc": 0.891558487187007,
        "one_std_auc": 0.755,
    },
    "unias, two classes by parity of i": {
        "even_ap_auc": 0.5157254279642935,
        "even_dice_auc": 0.3762787412739197,
        "even_iou_auc": 0.29250255740829145,
        "even_max_auc": 0.72,
        "even_pixel_auc": 0.8608483214990152,
        "even_std_auc": 0.84,
        "mean_ap_auc": 0.5388855278788054,
        "mean_dice_auc": 0.38040944491351425,
        "mean_iou_auc": 0.29915287731160034,
        "mean_max_auc": 0.8,
        "mean_pixel_auc": 0.9035284673005631,
        "mean_std_auc": 0.74,
        "odd_ap_auc": 0.5620456277933173,
        "odd_dice_auc": 0.38454014855310875,
        "odd_iou_auc": 0.30580319721490923,
        "odd_max_auc": 0.8800000000000001,
        "odd_pixel_auc": 0.946208613102111,
        "odd_std_auc": 0.64,
    },
    "unias, threshold where precision + recall is largest": {
        "one": {
            "threshold": 0.91748046875,
            "precision": 0.9033816425120773,
            "recall": 0.20267341040462428,
        },
        "even": {
            "threshold": 0.731201171875,
            "precision": 0.6275243081525804,
            "recall": 0.4655937846836848,
        },
        "odd": {
            "threshold": 0.866455078125,
            "precision": 0.8524096385542169,
            "recall": 0.29296066252587993,
        },
    },
    "patchcore": {
        "i_auroc": 0.8049999999999999,
        "auroc": 0.891558487187007,
        "optimal_threshold": 0.7099609375,
        "optimal_fpr": 0.008211263020833333,
        "optimal_fnr": 0.010978190104166667,
    },
    "ddad": {
        "i_auroc": 0.8049999999999999,
        "p_auroc": 0.8915584087371826,
        "pro": 0.777640420164518,
        "image threshold (largest tpr - fpr)": 1.02197265625,
    },
    "spiked": {
        "dinomaly aupro": 0.7736373338970002,
        "minimaxad aupro": 0.7736373338970002,
        "ader mAUROC_sp_max": 0.7150000000000001,
        "ader mAUROC_sp_mean": 0.7050000000000001,
        "ader mAP_sp_max": 0.7984942893897201,
        "ader mF1_max_sp_max": 0.8205128205128205,
        "ader mAUPRO_px": 0.7768611959204167,
        "ader mAUROC_px": 0.8904730990839187,
        "ader mAP_px": 0.4236513293221766,
        "ader mF1_max_px": 0.5304801244713095,
        "ader mF1_px_0.2_0.8_0.1": 0.2427835374168181,
        "ader mAcc_px_0.2_0.8_0.1": 0.4467382328637866,
        "ader mIoU_px_0.2_0.8_0.1": 0.15009966216733892,
        "ader mIoU_max_px": 0.3609887420451273,
        "ader mDice_max_px": 0.5304801294721624,
    },
}


def uniform(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 values in [-1, 1), a pure function of (name, seed): splitmix64 of the index."""
    x = np.arange(np.prod(shape), dtype=np.uint64)
    x += np.uint64(zlib.crc32(f"{seed}:{name}".encode())) << np.uint64(32)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    unit = (x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return unit.reshape(shape)


def golden_maps(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps and masks (30, 64, 64): blobs on coarse and fine noise, in steps of 1/4096."""

    def draw(name: str, *shape: int) -> np.ndarray:
        return uniform(f"metrics:{name}", shape, seed).astype(np.float64)

    there, height = draw("there", 30, 3) >= 0, draw("height", 30, 3)
    there[:, 0] = True
    height[:10], height[10:] = 0.25 + 0.25 * height[:10], 0.45 + 0.4 * height[10:]
    centre, radius = 32 + 26 * draw("centre", 30, 3, 2), 4 + 3 * draw("radius", 30, 3)
    coarse = draw("coarse", 30, 8, 8).repeat(8, axis=1).repeat(8, axis=2)
    maps = 0.35 + 0.15 * draw("fine", 30, 64, 64) + 0.15 * coarse
    masks = np.zeros((30, 64, 64), bool)
    row, column = np.mgrid[:64, :64]
    for i, k in np.argwhere(there):
        squared = (column - centre[i, k, 0]) ** 2 + (row - centre[i, k, 1]) ** 2
        maps[i] += height[i, k] * np.exp(-squared / (2 * radius[i, k] ** 2))
        if i >= 10:
            masks[i] |= squared <= radius[i, k] ** 2
    return (np.round(maps * 4096) / 4096).astype(np.float32), masks


def ours(maps: np.ndarray, masks: np.ndarray) -> dict:
    """Every number of the table."""
    label = ref.label_from_mask(masks)
    spiked = maps.copy()
    spiked[0, :12, :12] = maps.max() + 0.125
    classes = {"one": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
    unias = {name: unias_class(maps[part], masks[part]) for name, part in classes.items()}
    one = {f"{name}_{k}": v for name in ("mean", "one") for k, v in unias["one"][0].items()}
    two = {f"{name}_{k}": v for name in ("even", "odd") for k, v in unias[name][0].items()}
    two |= {f"mean_{k}": (two[f"even_{k}"] + two[f"odd_{k}"]) / 2 for k in unias["one"][0]}
    pixels = ref.SortedPixels.of(maps, masks)
    rates = ref.patchcore_optimal(pixels)
    image_auroc = image_metrics(ref.image_score_max(maps), label)["image_auroc"].value
    aupro_200 = ref.aupro_200_maxnorm(maps, masks)
    pixel_auroc = exact_pixel(maps, masks)["pixel_auroc"].value
    spiked_ader = {f"ader {k}": v for k, v in ader(spiked, masks, 200, None).items()}
    spiked_aupro = ref.aupro_200_maxnorm(spiked, masks)
    return {
        "dinomaly, image score mean of the 40 largest": dinomaly(
            maps, masks, ref.image_score_mean_of_largest(maps, 40)
        ),
        "dinomaly, image score maximum": dinomaly(maps, masks, ref.image_score_max(maps)),
        "dinomaly": {
            "aupro (200 thresholds)": aupro_200,
            "pixel threshold of best F1 (return_best_thr)": ref.f1max_eps(pixels.groups)[1],
        },
        "minimaxad": {
            "aupro, data set": aupro_200,
            "aupro, mean over anomalous images": ref.aupro_200_per_image(maps, masks),
        },
        "ader, 100 AUPRO steps, pooling None": ader(maps, masks, 100, None),
        "ader, 200 AUPRO steps, pooling None": ader(maps, masks, 200, None),
        "ader, 100 AUPRO steps, pooling 16": ader(maps, masks, 100, 16),
        "unias, one class": one,
        "unias, two classes by parity of i": two,
        "unias, threshold where precision + recall is largest": {
            name: values[1] for name, values in unias.items()
        },
        "patchcore": {
            "i_auroc": image_auroc,
            "auroc": pixel_auroc,
            "optimal_threshold": rates.threshold,
            "optimal_fpr": rates.false_positives,
            "optimal_fnr": rates.false_negatives,
        },
        "ddad": {
            "i_auroc": image_auroc,
            "p_auroc": pixel_auroc,
            "pro": aupro_200,
            "image threshold (largest tpr - fpr)": ref.ddad_image_threshold(
                ref.image_score_max(maps), label
            ),
        },
        "spiked": {
            "dinomaly aupro": spiked_aupro,
            "minimaxad aupro": spiked_aupro,
            **spiked_ader,
        },
    }


def exact_pixel(maps: np.ndarray, masks: np.ndarray) -> dict:
    state = PixelState(exact=True)
    state.update(maps, masks)
    return state.result()


def dinomaly(maps: np.ndarray, masks: np.ndarray, image_score: np.ndarray) -> dict[str, float]:
    label = ref.label_from_mask(masks)
    image, pixel = image_metrics(image_score, label), exact_pixel(maps, masks)
    image_groups = ref.groups_of_scores(image_score.astype(np.float64), label)
    return {
        "i_auroc": image["image_auroc"].value,
        "i_ap": image["image_ap"].value,
        "i_f1max": ref.f1max_eps(image_groups)[0],
        "p_auroc": pixel["pixel_auroc"].value,
        "p_ap": pixel["pixel_ap"].value,
        "p_f1max": ref.f1max_eps(ref.SortedPixels.of(maps, masks).groups)[0],
        "aupro": ref.aupro_200_maxnorm(maps, masks),
    }


def ader(maps: np.ndarray, masks: np.ndarray, steps: int, pooling: int | None) -> dict[str, float]:
    label, pixels = ref.label_from_mask(masks), ref.SortedPixels.of(maps, masks)
    pooled = pool(maps, pooling) if pooling else maps
    highest = image_metrics(ref.image_score_max(pooled), label)
    mean = image_metrics(ref.image_score_mean(pooled), label)
    pixel, fixed = exact_pixel(maps, masks), ref.threshold_metrics(pixels)
    return {
        "mAUROC_sp_max": highest["image_auroc"].value,
        "mAUROC_sp_mean": mean["image_auroc"].value,
        "mAP_sp_max": highest["image_ap"].value,
        "mF1_max_sp_max": highest["image_f1max"].value,
        "mAUPRO_px": ref.aupro_steps(pixels, steps, "minmax"),
        "mAUROC_px": pixel["pixel_auroc"].value,
        "mAP_px": pixel["pixel_ap"].value,
        "mF1_max_px": fixed.pixel_f1_21,
        "mF1_px_0.2_0.8_0.1": fixed.f1_mean,
        "mAcc_px_0.2_0.8_0.1": fixed.accuracy_mean,
        "mIoU_px_0.2_0.8_0.1": fixed.iou_mean,
        "mIoU_max_px": fixed.pixel_iou_21,
        "mDice_max_px": fixed.pixel_dice_21,
    }


def pool(maps: np.ndarray, size: int) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(maps, (size, size), axis=(1, 2))
    return windows.mean(axis=(-2, -1), dtype=np.float64)


def unias_class(maps: np.ndarray, masks: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    label, pixel = ref.label_from_mask(masks), exact_pixel(maps, masks)
    at = ref.dsc_unias(maps, masks)
    assert pixel["dsc"].value == pytest.approx(at.dice.mean(), abs=1e-12)

    def flipped(scores: np.ndarray) -> float:
        return ref.auroc_flipped(image_metrics(scores, label)["image_auroc"].value)

    numbers = {
        "ap_auc": pixel["pixel_ap"].value,
        "dice_auc": float(at.dice.mean()),
        "iou_auc": float(at.iou.mean()),
        "max_auc": flipped(ref.image_score_max(maps)),
        "pixel_auc": ref.auroc_flipped(pixel["pixel_auroc"].value),
        "std_auc": flipped(ref.image_score_std(maps)),
    }
    chosen = {"threshold": at.threshold, "precision": at.precision, "recall": at.recall}
    return numbers, chosen


def assert_same(numbers: dict, golden: dict, tolerance: float, path: str = "") -> None:
    assert numbers.keys() == golden.keys(), path
    for name, value in golden.items():
        if isinstance(value, dict):
            assert_same(numbers[name], value, tolerance, f"{path}/{name}")
        else:
            assert numbers[name] == pytest.approx(value, abs=tolerance), f"{path}/{name}"


def test_metrics_match_golden_numbers() -> None:
    assert_same(ours(*golden_maps()), NUMBERS, 1e-6)


@pytest.mark.shared
@pytest.mark.skipif(not (GOLDEN / "metrics.json").exists(), reason="no golden files here")
def test_metrics_match_golden_files() -> None:
    facts = json.loads((GOLDEN / "metrics.json").read_text())
    with np.load(GOLDEN / "metrics.npz") as file:
        stored = dict(file)
    maps, masks = stored["maps"], stored["masks"] != 0
    numbers = facts["outputs"]["numbers"]
    assert_same(ours(maps, masks), numbers["values"], numbers["tol"])
    at = ref.dsc_unias(maps, masks)
    arrays = {
        "unias_dice_per_image": at.dice,
        "unias_iou_per_image": at.iou,
        "unias_image_std": ref.image_score_std(maps),
        "uniad_image_max_pool16": ref.image_score_max_pooled(maps, 16),
    }
    for name, values in arrays.items():
        tolerance = facts["outputs"][name]["tol"] * np.abs(stored[name]).max()
        np.testing.assert_allclose(values, stored[name], rtol=0, atol=tolerance, err_msg=name)
    rebuilt = golden_maps(facts["seed"])
    np.testing.assert_array_equal(rebuilt[0], maps)
    np.testing.assert_array_equal(rebuilt[1], masks)
