"""Door: a run and pictures it has never seen -> metrics.json, report.html and a table."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allgood.types import InputError, Sample

if TYPE_CHECKING:
    from allgood.evaluation.content import (
        Alarms,
        CategoryResult,
        GalleryItem,
        Parts,
        ReportContent,
    )
    from allgood.evaluation.judged import Judged
    from allgood.inference import Inspector
    from allgood.metrics import Metric

GALLERY_PER_KIND = 3
"""At most so many pictures are shown per category and kind: found, missed, false alarm."""
GALLERY_SIZE = 60
"""And so many in all: beyond them the page would grow, and its pictures be too small to tell."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and where it stands."""

    metrics: Mapping[str, Any]
    """The content of metrics.json."""
    content: ReportContent
    metrics_path: Path
    report_path: Path

    def __str__(self) -> str:
        from allgood.evaluation.table import table

        return f"{table(self.content)}\n\nmetrics  {self.metrics_path}\nreport   {self.report_path}"


def evaluate(
    run: Path,
    data: list[Path],
    *,
    out: Path | None = None,
    layout: str | None = None,
    pixel_size: int = 256,
    infer_category: bool = False,
    exact: bool = False,
    batch_size: int = 8,
    device: str = "auto",
) -> Evaluation:
    """Judge the test pictures of data sets and measure how well.

    Pictures that the run was fitted or calibrated on are left out, however they are named. Where
    disk does not say which pictures are for testing, the run's own seeded split says it.

    Args:
        run: folder of a fitted run.
        data: folders or manifests, as for fitting.
        out: folder for metrics.json and report.html; default: the run's.
        layout: how the data lie on disk, where it is not recognised.
        pixel_size: side at which maps and masks are compared; 0: each picture's own size.
        infer_category: judge each picture as the category it looks like, not as the one it is.
        exact: sort all pixels, however many: no bounds, but 8 bytes of memory per pixel. Without
            it, so are categories of up to 64 million pixels; larger ones and the pooled row are
            streamed, with bounds.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.

    Returns:
        the numbers; `print` shows them as a table.

    Raises:
        InputError: no test pictures, a category never learned, `out` cannot be written.
    """
    started = time.monotonic()
    arguments = dict(locals())
    from allgood.evaluation.protocol import protocol
    from allgood.evaluation.report import render_report
    from allgood.inference import Inspector, require_at_least
    from allgood.progress import say
    from allgood.runs import (
        METRICS,
        REPORT,
        command_line,
        require_writable,
        write_bytes,
        write_json,
    )

    require_at_least(1, batch_size=batch_size)
    require_at_least(0, pixel_size=pixel_size)
    out = Path(out) if out is not None else Path(run)
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: name a folder with --out")
    inspector = Inspector(run, device=device)
    samples, num_seen = _test_samples(inspector, data, layout)
    require_writable(out, [METRICS, REPORT])
    judged = _judge(
        inspector,
        samples,
        pixel_size=pixel_size,
        infer_category=infer_category,
        exact=exact,
        batch_size=batch_size,
    )
    content = _content(
        inspector,
        judged,
        protocol=protocol(
            inspector.config,
            judged,
            num_calibration=_num_calibration(inspector),
            pixel_size=pixel_size,
            infer_category=infer_category,
            num_seen=num_seen,
        ),
        command=command_line(evaluate, arguments),
        samples=samples,
    )
    numbers = _numbers(content, pixel_size)
    write_json(out / METRICS, numbers)
    gallery = _gallery(inspector, judged, infer_category)
    content = replace(content, gallery=gallery, wall_seconds=time.monotonic() - started)
    # A file name that is no valid unicode holds lone surrogates, which UTF-8 cannot encode.
    write_bytes(out / REPORT, render_report(content).encode("utf-8", errors="replace"))
    for failure in judged.failures:
        say(f"left out: {failure.reason}")
    return Evaluation(numbers, content, out / METRICS, out / REPORT)


def _test_samples(
    inspector: Inspector, data: Sequence[str | Path] | str | Path, layout: str | None
) -> tuple[list[Sample], int]:
    """The test pictures that the run has not seen, and the number of those that it has.

    An anomaly that `allgood synthesize` drew into a picture is seen if the picture is.
    """
    from allgood.data.fingerprint import digests, source_digests
    from allgood.data.readers import read_data
    from allgood.runs import PROVENANCE, read_json

    roots = [data] if isinstance(data, str | Path) else list(data)
    dataset = read_data(
        roots,
        layout=layout,
        train_share=inspector.config["data"]["train_share"],
        seed=inspector.config["seed"],
    )
    for category in dataset.categories:
        inspector.index_of(category)
    known = set(read_json(inspector.run / PROVENANCE)["fitted_on"])
    if inspector.calibration is not None:
        known.update(*inspector.calibration.pictures.values())
    digest, source = digests(dataset.test), source_digests(roots)
    samples = [
        sample
        for sample in dataset.test
        if known.isdisjoint((digest.get(sample.path), source.get(os.path.abspath(sample.path))))
    ]
    num_seen = len(dataset.test) - len(samples)
    if not samples:
        seen = f"; all {num_seen} were seen in fitting or calibration" if num_seen else ""
        if num_seen and source:
            seen += ", or drawn into pictures that were: synthesize first, then fit on its output"
        raise InputError(f"{', '.join(map(str, roots))}: no test pictures{seen}")
    return samples, num_seen


def _content(
    inspector: Inspector,
    judged: Judged,
    *,
    protocol: list[str],
    command: str,
    samples: Sequence[Sample],
) -> ReportContent:
    """Everything that the report shows, but for the gallery."""
    from allgood.data.fingerprint import fingerprint
    from allgood.evaluation.content import ReportContent, UnreadablePicture
    from allgood.runs import PROVENANCE, read_json

    config = inspector.config
    provenance = read_json(inspector.run / PROVENANCE)
    results = [_category_result(judged, name, inspector) for name in judged.names()]
    detector = config["detector"]["name"] + (" with a CostFilter" if "filter" in config else "")
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


def _numbers(content: ReportContent, pixel_size: int) -> dict[str, Any]:
    """What metrics.json holds."""
    assert content.pooled is not None
    return {
        "protocol": content.protocol,
        "pixel_size": pixel_size or "own",
        "categories": {result.name: _json(result.metrics) for result in content.categories},
        "mean": _json(content.mean),
        "pooled": _json(content.pooled.metrics),
        **_parts_json(content.parts),
        "alarms": {
            **{result.name: _alarms_json(result) for result in content.categories},
            "pooled": _alarms_json(content.pooled),
        },
        "unreadable": [[picture.path, picture.reason] for picture in content.unreadable],
        "test_data_fingerprint": content.facts["test data fingerprint"],
    }


def _judge(
    inspector: Inspector,
    samples: Sequence[Sample],
    *,
    pixel_size: int,
    infer_category: bool,
    exact: bool,
    batch_size: int,
) -> Judged:
    from allgood.evaluation.judged import Judged, row_of
    from allgood.progress import bar

    samples = sorted(samples, key=row_of)
    parts = "filter" in inspector.config
    judged = Judged(samples, exact, pixel_size, num_maps=3 if parts else 1)
    with bar("judging pictures never seen", len(samples)) as progress:
        for batch, prediction in inspector.predict(
            samples,
            failures=judged.failures,
            batch_size=batch_size if pixel_size else 1,
            mask_size=(pixel_size, pixel_size) if pixel_size else "own",
            known_category=not infer_category,
            parts=parts,
        ):
            judged.add(batch, prediction, inspector.categories)
            progress.at(len(judged.samples) + len(judged.failures))
    judged.finish_row()
    if not judged.samples:
        raise InputError(
            f"none of the {len(samples)} test pictures could be read; {judged.failures[0].reason}"
        )
    name_of = {str(sample.path): row_of(sample) for sample in samples}
    for failure in judged.failures:
        name = name_of[str(failure.path)]
        judged.unreadable[name] = judged.unreadable.get(name, 0) + 1
    return judged


def _mean(judged: Judged, results: Sequence[CategoryResult]) -> dict[str, Metric]:
    """Over the categories; one with domains counts as the mean of its domains."""
    from allgood.metrics import mean_over_categories

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
    import numpy as np

    from allgood.evaluation.content import CategoryResult, Curves
    from allgood.evaluation.judged import BOTH
    from allgood.metrics import Metric, image_curves, image_metrics, mad

    rows = judged.rows(name)
    scores, bad = judged.image_scores(rows)
    metrics: dict[str, Metric] = image_metrics(scores, bad) | judged.pixel_metrics[BOTH][name]
    metrics["mad"] = mad(metrics)
    if name in judged.aupro_per_image:
        area = float(np.mean(judged.aupro_per_image[name]))
        metrics["aupro_per_image"] = (
            Metric.undefined("a map with no threshold below the limit")
            if np.isnan(area)
            else Metric.exact(area)
        )
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
    import numpy as np

    from allgood.calibration import threshold
    from allgood.evaluation.content import CategoryResult, Curves
    from allgood.metrics import image_curves, image_metrics, mad

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
    from allgood.evaluation.content import Parts
    from allgood.evaluation.judged import FILTER, HOST

    if judged.num_maps == 1:
        return None
    host, behind = (
        [_part_result(judged, name, which) for name in judged.names()] for which in (HOST, FILTER)
    )
    return Parts(host, behind, inspector.config["filter"]["settings"]["fusion"])


def _part_result(judged: Judged, category: str, which: int) -> CategoryResult:
    from allgood.evaluation.content import CategoryResult
    from allgood.metrics import image_metrics

    scores, bad = judged.image_scores(judged.rows(category), which)
    return CategoryResult(
        name=category,
        good_scores=scores[~bad],
        defective_scores=scores[bad],
        metrics=image_metrics(scores, bad) | judged.pixel_metrics[which][category],
    )


def _num_calibration(inspector: Inspector) -> int | None:
    """How many good pictures are behind the thresholds; None without any."""
    calibration = inspector.calibration
    return None if calibration is None else sum(map(len, calibration.image_scores.values()))


def _calibration_scores(inspector: Inspector, categories: Sequence[str]) -> list[float]:
    """Scores of the calibration pictures, or none unless every category has some."""
    calibration = inspector.calibration
    if calibration is None or not all(calibration.knows(name) for name in categories):
        return []
    return [score for name in categories for score in calibration.image_scores[name]]


def _alarms(
    inspector: Inspector, judged: Judged, calibration: list[float], raised: Sequence[int]
) -> Alarms | None:
    """What the pictures that raised an alarm amount to; None without calibration scores."""
    from allgood.calibration import threshold
    from allgood.evaluation.content import Alarms

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


def _gallery(inspector: Inspector, judged: Judged, infer_category: bool) -> list[GalleryItem]:
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
    from allgood.data.images import read_mask, read_oriented_image
    from allgood.evaluation.content import GalleryItem
    from allgood.evaluation.judged import row_of
    from allgood.evaluation.overlay import mask_outline, shrink, shrink_mask

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
        overlay=inspector.overlay(inspection, small),
        outline=outline,
        p_value=inspection.p_value,
    )


def _json(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.to_json() for name, metric in metrics.items()}


def _parts_json(parts: Parts | None) -> dict[str, Any]:
    """Under `parts`: the filter's share, and the metrics of detector and filter alone."""
    if parts is None:
        return {}
    from allgood.metrics import mean_over_categories

    of: dict[str, Any] = {"fusion": parts.fusion}
    for name, results in (("host", parts.host), ("filter", parts.filter)):
        of[name] = {
            "categories": {result.name: _json(result.metrics) for result in results},
            "mean": _json(mean_over_categories({r.name: dict(r.metrics) for r in results})),
        }
    return {"parts": of}


def _alarms_json(result: CategoryResult) -> dict[str, Any] | None:
    if result.alarms is None:
        return None
    return {
        "threshold": result.alarms.threshold,
        "promised_false_alarm_rate": result.alarms.alpha,
        "found": result.alarms.num_found,
        "defective": result.num_defective,
        "false_alarms": result.alarms.num_false_alarms,
        "good": result.num_good,
    }
