"""How well a filter does on synthetic anomalies that it has not learned, and the best lambda there.

No picture with a real defect is needed, so lambda is never chosen on a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from allgood.costfilter.filtered import FilteredDetector
from allgood.costfilter.volume import resize_aligned
from allgood.metrics.ranking import average_precision, groups_of_scores
from allgood.types import TrainingBatch

FUSIONS = (0.0, 0.02, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98, 1.0)
"""The lambdas that are tried: finer at the ends, where published ones lie."""
PARTS = ("initial_map", "host", "filter")
"""The volume's minimum, from which the filter starts; the host's map; the filter's."""


@torch.inference_mode()
def validate(
    model: FilteredDetector, batches: Iterable[TrainingBatch], image_size: tuple[int, int]
) -> dict[str, Any] | None:
    """Pixel AP of each of PARTS, and as `fusion` of the fused map for every lambda. Ignored pixels
    do not count.

    Args:
        model: in evaluation mode.
        batches: drawings of one category, as the filter is taught with, but the host's maps
            `whole` (see `FilteredDetector.encode`).
        image_size: (H, W) of the images.

    Returns:
        None where nothing was painted, or everything.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in (*PARTS, "mask", "visible")}
    for batch in batches:
        if not len(batch.index):
            continue
        drawn = model.drawn(batch)
        size = (drawn.mask.shape[-2], drawn.mask.shape[-1])
        probability = model.probability(drawn.match, image_size)
        maps = model.maps(drawn.match, probability, image_size, ignore=drawn.ignore, map_size=size)
        initial = resize_aligned(model.least_cost(drawn.match), size)
        found = (initial, maps.host, maps.filter, drawn.mask, ~drawn.ignore)
        for name, values in zip(parts, found, strict=True):
            parts[name].append(values.cpu())
    if not parts["mask"]:
        return None
    initial, host, filtered, mask, visible = (torch.cat(values) for values in parts.values())
    mask = mask[visible]
    if mask.all() or not mask.any():
        return None
    lambdas = sorted({*FUSIONS, model.config.fusion})
    return {
        "initial_map": pixel_ap(initial[visible], mask),
        "host": pixel_ap(host[visible], mask),
        "filter": pixel_ap(filtered[visible], mask),
        "fusion": {
            f"{x:g}": pixel_ap(model.fuse(host, filtered, x)[visible], mask) for x in lambdas
        },
    }


def pixel_ap(anomaly_map: Tensor, mask: Tensor) -> float:
    """Average precision of all pixels together; both of one shape, the mask bool."""
    scores = anomaly_map.flatten().double().numpy()
    return average_precision(groups_of_scores(scores, mask.flatten().numpy())).value


def mean_over(categories: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of what `validate` gave for each category; at least one."""
    tables = list(categories.values())
    mean: dict[str, Any] = {
        name: sum(table[name] for table in tables) / len(tables) for name in PARTS
    }
    mean["fusion"] = {
        x: sum(table["fusion"][x] for table in tables) / len(tables) for x in tables[0]["fusion"]
    }
    return mean


def best_fusion(mean: Mapping[str, Any]) -> float:
    """The lambda of the highest pixel AP; of equal ones the smallest."""
    return float(max(mean["fusion"], key=lambda x: (mean["fusion"][x], -float(x))))
