"""Behind `evaluate`: judged pictures -> what the report shows and metrics.json holds."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from allgood.calibration import threshold
from allgood.data.fingerprint import fingerprint
from allgood.data.images import read_mask, read_oriented_image
from allgood.evaluation.content import (
    Alarms,
    CategoryResult,
    Curves,
    GalleryItem,
    Parts,
    ReportContent,
    UnreadablePicture,
)
from allgood.evaluation.judged import BOTH, FILTER, HOST, Judged, row_of
from allgood.evaluation.overlay import mask_outline, shrink, shrink_mask
from allgood.inference import Inspector
from allgood.metrics import Metric, image_curves, image_metrics, mad, mean_over_categories
from allgood.runs import PROVENANCE, read_json
from allgood.types import Sample

GALLERY_PER_KIND = 3
"""At most so many pictures are shown per category and kind: found, missed, false alarm."""
GALLERY_SIZE = 60
"""And so many in all: beyond them the page would grow, and its pictures be too small to tell."""


def report_content(
    inspector: Inspector,
    judged: Judged,
    *,
    protocol: list[str],
    command: str,
    samples: Sequence[Sample],
) -> ReportContent:
    """Everything that the report shows, but for the gallery."""
    config = inspector.config
    provenance = read_json(inspector.run / PROVENANCE)
    results = [_category_result(judged, name, inspector) for name in judged.names()]
    detector = config["detector"]["name"] + (" with a CostFilter" if "filter" in config else "")
    detector = f"exported {detector}" if inspector.is_exported else detector
    return ReportContent(
        title=f"{detector} on {', '.join(inspector.categories)}",
        detector=detector,
        encoder=config["encoder"]["settings"]["name"],
        created_at=datetime.now(UTC),
        num_training=config["data"]["fitted_pictures"],
        categories=results,
        mean=_mean(judged, results),
        pooled=_pooled_result(judged, inspector),
        parts=_parts(inspector, judged),
        protocol=protocol,
        unreadable=[UnreadablePicture(str(f.path), f.reason) for f in judged.failures],
        commands=[provenance["command"], command],
        versions={"allgood": provenance["allgood"], **provenance["packages"]},
        facts={
            "test data fingerprint": fingerprint(samples),
            "fitted data fingerprint": provenance["data_fingerprint"],
            "seed": str(config["seed"]),
            "device": str(inspector.device),
        },
    )


def _mean(judged: Judged, results: Sequence[CategoryResult]) -> dict[str, Metric]:
    """Over the categories; one with domains counts as the mean of its domains."""
    domains: dict[str, dict[str, Mapping[str, Metric]]] = {}
    for result in results:
        domains.setdefault(judged.category_of[result.name], {})[result.name] = result.metrics
    if len(domains) == 1:
        return mean_over_categories(*domains.values())
    return mean_over_categories(
        {
            category: mean_over_categories(rows) if len(rows) > 1 else next(iter(rows.values()))
            for category, rows in domains.items()
        }
    )


def _category_result(judged: Judged, name: str, inspector: Inspector) -> CategoryResult:
    """Of one row of the table: a category, or a domain of it."""
    rows = judged.rows(name)
    scores, bad = judged.image_scores(rows)
    metrics = image_metrics(scores, bad) | judged.pixel_metrics[BOTH][name]
    metrics["mad"] = mad(metrics)
    calibration = _calibration_scores(inspector, [judged.category_of[name]])
    raised = [i for i in rows if _is_alarm(inspector, judged, i)]
    return CategoryResult(
        name=name,
        good_scores=scores[~bad],
        defective_scores=scores[bad],
        metrics=metrics,
        calibration_scores=np.array(calibration),
        alarms=_alarms(inspector, judged, calibration, raised),
        curves=Curves.of(image_curves(scores, bad), judged.pixel_curves[name]),
        num_with_masks=sum(judged.has_mask[i] for i in rows),
        num_unreadable=judged.unreadable.get(name, 0),
    )


def _pooled_result(judged: Judged, inspector: Inspector) -> CategoryResult:
    """Of all pictures as if they were of one category: under one threshold."""
    rows = range(len(judged.samples))
    scores, bad = judged.image_scores(rows)
    metrics: dict[str, Metric] = image_metrics(scores, bad) | judged.pooled.result()
    metrics["mad"] = mad(metrics)
    categories = sorted({sample.category for sample in judged.samples})
    calibration = _calibration_scores(inspector, categories)
    raised: list[int] = []
    if inspector.calibration is not None and calibration:
        limit = threshold(calibration, inspector.calibration.max_false_alarm)
        raised = [i for i in rows if judged.scores[i] > limit]
    return CategoryResult(
        name="all categories",
        good_scores=scores[~bad],
        defective_scores=scores[bad],
        metrics=metrics,
        calibration_scores=np.array(calibration),
        alarms=_alarms(inspector, judged, calibration, raised),
        curves=Curves.of(image_curves(scores, bad), judged.pooled.curves()),
        num_with_masks=sum(judged.has_mask),
        num_unreadable=len(judged.failures),
    )


def _parts(inspector: Inspector, judged: Judged) -> Parts | None:
    """The detector and the filter, each alone, where the run has a CostFilter."""
    if judged.num_maps == 1:
        return None
    host, behind = (
        [_part_result(judged, name, which) for name in judged.names()] for which in (HOST, FILTER)
    )
    return Parts(host, behind, inspector.config["filter"]["settings"]["fusion"])


def _part_result(judged: Judged, category: str, which: int) -> CategoryResult:
    scores, bad = judged.image_scores(judged.rows(category), which)
    return CategoryResult(
        name=category,
        good_scores=scores[~bad],
        defective_scores=scores[bad],
        metrics=image_metrics(scores, bad) | judged.pixel_metrics[which][category],
    )


def num_calibration(inspector: Inspector) -> int | None:
    """How many good pictures are behind the thresholds; None without any."""
    calibration = inspector.calibration
    if calibration is None:
        return None
    return sum(len(own.image) for own in calibration.categories.values())


def _calibration_scores(inspector: Inspector, categories: Sequence[str]) -> list[float]:
    """Scores of the calibration pictures, or none unless every category has some."""
    calibration = inspector.calibration
    if calibration is None or not all(calibration.knows(name) for name in categories):
        return []
    return [score for name in categories for score in calibration.categories[name].image]


def _alarms(
    inspector: Inspector, judged: Judged, calibration: list[float], raised: Sequence[int]
) -> Alarms | None:
    """What the pictures that raised an alarm amount to; None without calibration scores."""
    if inspector.calibration is None or not calibration:
        return None
    alpha = inspector.calibration.max_false_alarm
    num_false = sum(judged.samples[i].is_good for i in raised)
    return Alarms(
        threshold(calibration, alpha),
        alpha,
        num_found=len(raised) - num_false,
        num_false_alarms=num_false,
    )


def _is_alarm(inspector: Inspector, judged: Judged, i: int) -> bool:
    """What `inspect` says of the picture: judged as what it looks like, if that was asked for."""
    calibration, name = inspector.calibration, judged.judged_as[i]
    return (
        calibration is not None
        and calibration.knows(name)
        and calibration.is_anomalous(name, judged.scores[i])
    )


def gallery(inspector: Inspector, judged: Judged, infer_category: bool) -> list[GalleryItem]:
    """The clearest finds, the worst misses and the worst false alarms of each category.

    Where there are too many, each category in turn gives one, its worst mistakes first.
    """
    if inspector.calibration is None:
        return []
    candidates = []  # (turn, picture, kind), by category
    for name in judged.names():
        if not inspector.calibration.knows(judged.category_of[name]):
            continue
        rows = sorted(judged.rows(name), key=lambda i: judged.scores[i])
        bad = [i for i in rows if not judged.samples[i].is_good]
        good = [i for i in rows if judged.samples[i].is_good]
        raised = {i for i in rows if _is_alarm(inspector, judged, i)}
        found = [i for i in bad if i in raised][::-1]
        missed = [i for i in bad if i not in raised]
        alarms = [i for i in good if i in raised][::-1]
        kinds = (("missed", missed), ("false alarm", alarms), ("found", found))
        own = [
            (chosen[place], kind)
            for place in range(GALLERY_PER_KIND)
            for kind, chosen in kinds
            if place < len(chosen)
        ]
        candidates += [(turn, i, kind) for turn, (i, kind) in enumerate(own)]
    chosen = sorted(candidates, key=lambda candidate: candidate[0])[:GALLERY_SIZE]
    return [
        _gallery_item(inspector, judged.samples[i], kind, infer_category)
        for turn, i, kind in candidates
        if (turn, i, kind) in chosen
    ]


def _gallery_item(
    inspector: Inspector, sample: Sample, kind: Any, infer_category: bool
) -> GalleryItem:
    category = None if infer_category else sample.category
    inspection = next(iter(inspector.inspect([sample.path], category=category)))
    picture, orientation = read_oriented_image(sample.path)
    small = shrink(picture)  # first of all: painting takes its time by the pixel
    outline = None
    if sample.mask_paths and not sample.is_good:
        mask = read_mask(
            sample.mask_paths,
            size=(picture.shape[0], picture.shape[1]),
            threshold=sample.mask_threshold,
            orientation=orientation,
        )
        outline = mask_outline(small, shrink_mask(mask, (small.shape[0], small.shape[1])))
    assert inspection.image_score is not None
    return GalleryItem(
        kind=kind,
        category=row_of(sample),
        name=sample.id,
        defect=sample.defect,
        image_score=inspection.image_score,
        picture=small,
        overlay=inspection.overlay(small),
        outline=outline,
        p_value=inspection.p_value,
    )
