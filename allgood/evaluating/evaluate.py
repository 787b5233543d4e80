"""Door: a run and pictures it has never seen -> metrics.json, report.html and a table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allgood.types import InputError

if TYPE_CHECKING:
    from allgood.evaluation.content import ReportContent


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
    disk does not say which pictures are for testing, the run's own seeded split says it. Categories
    that the run has not learned are not judged, and named.

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
        InputError: no test pictures, no category that was learned, `out` cannot be written.
    """
    started = time.monotonic()
    arguments = dict(locals())
    from allgood.evaluating.judging import judge, learned_data, test_samples
    from allgood.evaluating.results import gallery, num_calibration, report_content
    from allgood.evaluation.numbers import numbers
    from allgood.evaluation.protocol import protocol
    from allgood.inference import Inspector
    from allgood.options import require_at_least
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
    if (
        not pixel_size
        and inspector.is_exported
        and not inspector.config["exported"]["any_map_size"]
    ):
        raise InputError(
            f"run '{run}' is exported and knows maps of one size: leave out --pixel-size 0, or "
            "evaluate the run that it was made of"
        )
    roots = [data] if isinstance(data, str | Path) else list(data)
    dataset, unlearned = learned_data(inspector, roots, layout)
    samples, num_seen = test_samples(inspector, dataset, roots)
    require_writable(out, [METRICS, REPORT])
    judged = judge(
        inspector,
        samples,
        pixel_size=pixel_size,
        infer_category=infer_category,
        exact=exact,
        batch_size=batch_size,
    )
    content = report_content(
        inspector,
        judged,
        protocol=protocol(
            inspector.config,
            judged,
            num_calibration=num_calibration(inspector),
            pixel_size=pixel_size,
            infer_category=infer_category,
            num_seen=num_seen,
            unlearned=unlearned,
        ),
        command=command_line(evaluate, arguments),
        samples=samples,
    )
    metrics, page = numbers(content, pixel_size), _page(content)
    write_json(out / METRICS, metrics)
    # Still without the gallery, which reads pictures anew: if that fails, the two files agree.
    write_bytes(out / REPORT, page)
    content = replace(
        content,
        gallery=gallery(inspector, judged, infer_category),
        wall_seconds=time.monotonic() - started,
    )
    write_bytes(out / REPORT, _page(content))
    for failure in judged.failures:
        say(f"left out: {failure.reason}")
    return Evaluation(metrics, content, out / METRICS, out / REPORT)


def _page(content: ReportContent) -> bytes:
    from allgood.evaluation.report import render_report

    # A file name that is no valid unicode holds lone surrogates, which UTF-8 cannot encode.
    return render_report(content).encode("utf-8", errors="replace")
