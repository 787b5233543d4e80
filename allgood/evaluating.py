"""Door: a run and pictures it has never seen -> metrics.json, report.html and a table."""

from __future__ import annotations

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
"""Pictures shown per category and kind: found, missed, false alarm."""


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
        InputError: no test pictures, a category never learned.
    """
    started = time.monotonic()
    arguments = dict(locals())
    from allgood.evaluation.protocol import protocol
    from allgood.evaluation.report import write_report
    from allgood.inference import Inspector, require_at_least
    from allgood.progress import say
    from allgood.runs import METRICS, REPORT, command_line, write_json

    require_at_least(1, batch_size=batch_size)
    require_at_least(0, pixel_size=pixel_size)
    out = Path(out) if out is not None else Path(run)
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: name a folder with --out")
    inspector = Inspector(run, device=device)
    samples, num_seen = _test_samples(inspector, data, layout)
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
        gallery=_gallery(inspector, judged, infer_category),
        command=command_line(evaluate, arguments),
        samples=samples,
    )
    content = replace(content, wall_seconds=time.monotonic() - started)
    numbers = _numbers(content, pixel_size)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / METRICS, numbers)
    write_report(out / REPORT, content)
    for failure in judged.failures:
        say(f"left out: {failure.reason}")
    return Evaluation(numbers, content, out / METRICS, out / REPORT)


def _test_samples(
    inspector: Inspector, data: Sequence[str | Path] | str | Path, layout: str | None
) -> tuple[list[Sample], int]:
    """The test pictures that the run has not seen, and the number of those that it has."""
    from allgood.data.fingerprint import digests
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
    digest = digests(dataset.test)
    samples = [sample for sample in dataset.test if digest.get(sample.path) not in known]
    num_seen = len(dataset.test) - len(samples)
    if not samples:
        raise InputError(
            f"{', '.join(map(str, roots))}: no test pictures"
            + (f"; all {num_seen} were seen in fitting or calibration" if num_seen else "")
        )
    return samples, num_seen


def _content(
    inspector: Inspector,
    judged: Judged,
    *,
    protocol: list[str],
    gallery: list[GalleryItem],
    command: str,
    samples: Sequence[Sample],
) -> ReportContent:
    """Everything that the report shows."""
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
        pooled=_category_result(judged, None, inspector),
        parts=_parts(inspector, judged),
        protocol=protocol,
        gallery=gallery,
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
            judged.add(batch, prediction, pixel_size, inspector.categories)
            progress.at(len(judged.samples) + len(judged.failures))
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


def _category_result(judged: Judged, category: str | None, inspector: Inspector) -> CategoryResult:
    """Of one category or domain, or of all pooled under one threshold (category None)."""
    import numpy as np

    from allgood.evaluation.content import CategoryResult, Curves
    from allgood.metrics import Metric, image_curves, image_metrics, mad

    rows = judged.rows(category)
    scores = np.array([judged.scores[i] for i in rows])
    bad = np.array([not judged.samples[i].is_good for i in rows])
    metrics: dict[str, Metric] = dict(image_metrics(scores, bad))
    pixels = judged.pixels(category)
    metrics |= pixels.result()
    if category is None:
        # UniAS defines DSC per class; over a mixture its threshold means nothing.
        metrics = {name: one for name, one in metrics.items() if not name.startswith("dsc")}
    metrics["mad"] = mad(metrics)
    if category in judged.aupro_per_image:
        area = float(np.mean(judged.aupro_per_image[category]))
        metrics["aupro_per_image"] = (
            Metric.undefined("a map with no threshold below the limit")
            if np.isnan(area)
            else Metric.exact(area)
        )
    calibration = _calibration_scores(inspector, judged, category)
    return CategoryResult(
        name=category or "all categories",
        good_scores=scores[~bad],
        defective_scores=scores[bad],
        metrics=metrics,
        calibration_scores=np.array(calibration),
        alarms=_alarms(inspector, judged, rows, category, calibration),
        curves=Curves.of(image_curves(scores, bad), pixels.curves()),
        num_with_masks=sum(judged.has_mask[i] for i in rows),
        num_unreadable=(
            len(judged.failures) if category is None else judged.unreadable.get(category, 0)
        ),
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
    import numpy as np

    from allgood.evaluation.content import CategoryResult
    from allgood.metrics import image_metrics

    rows = judged.rows(category)
    scores = np.array([judged.map_scores[which][i] for i in rows])
    bad = np.array([not judged.samples[i].is_good for i in rows])
    pixels = judged.pixels(category, which)
    return CategoryResult(
        name=category,
        good_scores=scores[~bad],
        defective_scores=scores[bad],
        metrics=image_metrics(scores, bad) | pixels.result(),
    )


def _num_calibration(inspector: Inspector) -> int | None:
    """How many good pictures are behind the thresholds; None without any."""
    calibration = inspector.calibration
    return None if calibration is None else sum(map(len, calibration.image_scores.values()))


def _calibration_scores(inspector: Inspector, judged: Judged, row: str | None) -> list[float]:
    """Scores of the calibration pictures; pooled, only if every category has some."""
    calibration = inspector.calibration
    names = judged.names() if row is None else [row]
    wanted = sorted({judged.category_of[name] for name in names})
    if calibration is None or not all(calibration.knows(name) for name in wanted):
        return []
    return [score for name in wanted for score in calibration.image_scores[name]]


def _alarms(
    inspector: Inspector,
    judged: Judged,
    rows: Sequence[int],
    category: str | None,
    calibration: list[float],
) -> Alarms | None:
    """Of one category, or of all pooled under one threshold (category None)."""
    from allgood.calibration import threshold
    from allgood.evaluation.content import Alarms

    if inspector.calibration is None or not calibration:
        return None
    alpha = inspector.calibration.max_false_alarm
    limit = threshold(calibration, alpha)
    if category is None:
        raised = [i for i in rows if judged.scores[i] > limit]
    else:
        raised = [i for i in rows if _is_alarm(inspector, judged, i)]
    num_false = sum(judged.samples[i].is_good for i in raised)
    return Alarms(limit, alpha, num_found=len(raised) - num_false, num_false_alarms=num_false)


def _is_alarm(inspector: Inspector, judged: Judged, i: int) -> bool:
    """What `inspect` says of the picture: judged as what it looks like, if that was asked for."""
    calibration, name = inspector.calibration, judged.judged_as[i]
    return (
        calibration is not None
        and calibration.knows(name)
        and calibration.is_anomalous(name, judged.scores[i])
    )


def _gallery(inspector: Inspector, judged: Judged, infer_category: bool) -> list[GalleryItem]:
    """The clearest finds, the worst misses and the worst false alarms of each category."""
    if inspector.calibration is None:
        return []
    items = []
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
        for kind, chosen in (("found", found), ("missed", missed), ("false alarm", alarms)):
            for i in chosen[:GALLERY_PER_KIND]:
                items.append(_gallery_item(inspector, judged.samples[i], kind, infer_category))
    return items


def _gallery_item(
    inspector: Inspector, sample: Sample, kind: Any, infer_category: bool
) -> GalleryItem:
    from allgood.data.images import read_mask, read_oriented_image
    from allgood.evaluation.content import GalleryItem
    from allgood.evaluation.judged import row_of
    from allgood.evaluation.overlay import mask_outline

    category = None if infer_category else sample.category
    inspection = next(iter(inspector.inspect([sample.path], category=category)))
    picture, orientation = read_oriented_image(sample.path)
    outline = None
    if sample.mask_paths and not sample.is_good:
        mask = read_mask(
            sample.mask_paths,
            size=(picture.shape[0], picture.shape[1]),
            threshold=sample.mask_threshold,
            orientation=orientation,
        )
        outline = mask_outline(picture, mask)
    assert inspection.image_score is not None
    return GalleryItem(
        kind=kind,
        category=row_of(sample),
        name=sample.id,
        defect=sample.defect,
        image_score=inspection.image_score,
        picture=picture,
        overlay=inspector.overlay(inspection, picture),
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
