"""Pixel metrics on one core: allgood beside scikit-learn and adeval, in one process.

    python benchmarks/bench_metrics.py [--skip-peers] [--skip-large]

Maps of 256 x 256: smooth noise, fine noise, and bumps where the masks have one to three disks; two
thirds of the images are defective. Times are CPU seconds of the single thread, so that a busy
machine disturbs them less, and of the best of three runs (of one for the large set and peers).
Memory is what is allocated beyond the maps at its peak, from tracemalloc, which NumPy reports to.
"""

import argparse
import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

# One thread for everything below, also for libraries that read these only when imported.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
from scipy import ndimage  # noqa: E402

from allgood.metrics import Metric, PixelState  # noqa: E402

SIZE = 256
BOUND = 1e-4
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda s: s,
    "25 to 57": lambda s: 25 + 16 * s,
    "s^8": lambda s: s**8,
    "exp(8 s)": lambda s: np.exp(8 * s),
    "1e-12 s": lambda s: 1e-12 * s,
    "s + 1000": lambda s: s + 1000,
    "-1 / s": lambda s: -1 / s,
}


def make_maps(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps (count, 256, 256) float32 in about [0.1, 1.5] and bool masks."""
    random = np.random.default_rng(seed)
    maps = np.empty((count, SIZE, SIZE), np.float32)
    masks = np.zeros((count, SIZE, SIZE), bool)
    row, column = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    for i in range(count):
        coarse = ndimage.zoom(random.random((9, 9), dtype=np.float32), SIZE / 9, order=1)
        maps[i] = 0.1 + 0.3 * coarse + 0.1 * random.random((SIZE, SIZE), dtype=np.float32)
        for _ in range(random.integers(1, 4) if i % 3 else 0):
            radius = random.uniform(8, 24)
            y, x = random.uniform(20, SIZE - 20, 2)
            squared = (row - y) ** 2 + (column - x) ** 2
            masks[i] |= squared <= radius**2
            maps[i] += random.uniform(0.1, 0.7) * np.exp(-squared / (2 * radius**2))
    return maps, masks


def timed(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    best, value = float("inf"), None
    for _ in range(repeats):
        start = time.process_time()
        value = function()
        best = min(best, time.process_time() - start)
    return best, value


def peak_mib(function: Callable[[], object]) -> float:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def ours(maps: np.ndarray, masks: np.ndarray, **settings: bool) -> dict[str, Metric]:
    state = PixelState(**settings)
    state.update(maps, masks)
    return state.result()


def scikit_learn(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    score, label = maps.ravel(), masks.ravel()
    precision, recall, _ = precision_recall_curve(label, score)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "pixel_auroc": float(roc_auc_score(label, score)),
        "pixel_ap": float(average_precision_score(label, score)),
        "pixel_f1max": float(f1.max()),
    }


def adeval_strips(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    import cv2

    cv2.setNumThreads(1)
    if not hasattr(np, "trapz"):  # adeval uses the name that NumPy 2.4 dropped
        np.trapz = np.trapezoid
    from adeval.mem_effic import auroc_aupr_aupro

    auroc, aupr, aupro = auroc_aupr_aupro(maps, masks.astype(np.uint8))
    return {"pixel_auroc": auroc, "pixel_ap": aupr, "aupro": aupro}


def row(name: str, seconds: float, base: float, mib: float, numbers: str) -> None:
    print(f"  {name:<22}{seconds:9.3f} s {seconds / base:8.1f} x {mib:9.1f} MiB   {numbers}")


def compare(maps: np.ndarray, masks: np.ndarray, peers: bool) -> None:
    print(f"\n{len(maps)} maps, {100 * masks.mean():.2f} % defective pixels")
    print(f"  {'':<22}{'time':>11} {'ratio':>10} {'beyond maps':>13}   numbers")
    base, result = timed(lambda: ours(maps, masks))
    row("allgood", base, base, peak_mib(lambda: ours(maps, masks)), ", ".join(result))
    worst = max(m.bound for m in result.values())
    print(
        f"  largest guaranteed bound {worst:.1e} ({'at most' if worst <= BOUND else 'ABOVE'} 1e-4)"
    )
    if not peers:
        return
    seconds, exact = timed(lambda: ours(maps, masks, exact=True), 1)
    mib = peak_mib(lambda: ours(maps, masks, exact=True))
    row("allgood, exact=True", seconds, base, mib, "the same, bounds 0")
    for name, peer, numbers in (
        ("scikit-learn", scikit_learn, "AUROC, AP, F1max"),
        ("adeval, 1000 strips", adeval_strips, "AUROC, trapezoid PR area, AUPRO; no bounds"),
    ):
        seconds, values = timed(lambda peer=peer: peer(maps, masks), 1)
        row(name, seconds, base, peak_mib(lambda peer=peer: peer(maps, masks)), numbers)
        off = {key: abs(value - exact[key].value) for key, value in values.items()}
        print("    off exact by", ", ".join(f"{key} {value:.1e}" for key, value in off.items()))
    off = {key: abs(metric.value - exact[key].value) for key, metric in result.items()}
    print("  allgood off exact by", ", ".join(f"{key} {value:.1e}" for key, value in off.items()))


def monotone(maps: np.ndarray, masks: np.ndarray) -> None:
    print(f"\nincreasing maps of the scores, {len(maps)} maps: bound, distance to exact (largest)")
    for name, transform in TRANSFORMS.items():
        changed = transform(maps.astype(np.float64)).astype(np.float32)
        seconds, result = timed(lambda c=changed: ours(c, masks), 1)
        exact = ours(changed, masks, exact=True)
        bound = max(m.bound for m in result.values())
        off = max(abs(m.value - exact[key].value) for key, m in result.items())
        print(f"  {name:<14} bound {bound:.1e}   off {off:.1e}   {seconds:.3f} s")


def large(categories: int = 15, each: int = 115) -> None:
    """A whole test set: one state per category, all merged into a pooled one (without DSC, which is
    per category)."""
    total = 0.0
    worst: dict[str, float] = {}
    pooled = PixelState(with_dsc=False)
    for category in range(categories):
        maps, masks = make_maps(each, 1000 + category)
        names = [f"{category}/{i}" for i in range(each)]
        start = time.process_time()
        state = PixelState()
        state.update(maps, masks, names)
        result = state.result()
        pooled.merge(state)
        total += time.process_time() - start
        for name, metric in result.items():
            worst[name] = max(worst.get(name, 0.0), metric.bound)
    start = time.process_time()
    result = pooled.result()
    total += time.process_time() - start
    print(f"\n{categories * each} maps in {categories} categories, each and pooled: {total:.2f} s")
    print("  bounds, worst category:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    print("  bounds, pooled:", ", ".join(f"{k} {m.bound:.1e}" for k, m in result.items()))
    print("  values, pooled:", ", ".join(f"{k} {m.value:.5f}" for k, m in result.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--skip-large", action="store_true")
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    maps, masks = make_maps(400, 0)
    compare(maps[:100], masks[:100], not arguments.skip_peers)
    compare(maps, masks, False)
    monotone(maps[:100], masks[:100])
    if not arguments.skip_large:
        del maps, masks
        large()


if __name__ == "__main__":
    main()
