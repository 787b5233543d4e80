"""The report of a test as one self-contained HTML page.

`render_report` fills `report.html` beside this file. The page asks for nothing from elsewhere:
pictures are embedded as JPEG, charts as SVG, and everything but the gallery's filter works without
JavaScript. Every text is escaped, so names may hold anything.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from allgood.evaluation import charts, words
from allgood.evaluation.content import CategoryResult, GalleryItem, Picture, ReportContent
from allgood.evaluation.metric_rows import PART_NAMES, metric_table, parts_table
from allgood.evaluation.overlay import shrink
from allgood.evaluation.table import table

__all__ = ["render_report", "table"]

CurveRows = list[tuple[CategoryResult, list[Markup]]]

_JPEG_STEPS = ((320, 85), (320, 70), (320, 50), (240, 50), (160, 50))
"""Longest side and quality, tried in turn until a picture is small enough."""
_PICTURES_BYTES = 2_100_000
"""All pictures of the page together, so that it stays near 3 MB."""
_GALLERY_HEADINGS = {
    "missed": "Missed: defective parts without an alarm",
    "false alarm": "False alarms: good parts with an alarm",
    "found": "Found: defective parts with an alarm",
}


def render_report(content: ReportContent) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("allgood", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "promise": words.promise,
        "counted": words.counted,
        "duration": words.duration,
        "score": _score,
        "embedded": partial(embedded_picture, most_bytes=_bytes_per_picture(content)),
        "breakable": _breakable,
    }
    categories = content.categories
    ranges, shared_axis = charts.score_ranges(categories)
    pooled = [content.pooled_row] if content.pooled_row is not None else []
    curve_names, curves = _curve_rows([*pooled, *categories])
    return environment.get_template("report.html").render(
        content=content,
        pooled=pooled,
        totals=words.Totals(categories),
        headline=words.headline(content),
        weakest=words.weakest_sentence(categories),
        promises=words.promise_sentences(categories),
        rate=words.rate,
        metrics=metric_table(content),
        histograms=[
            (c, charts.histogram(c, axis)) for c, axis in zip(categories, ranges, strict=True)
        ],
        shared_axis=shared_axis,
        parts=parts_table(content),
        part_names=PART_NAMES,
        before_and_after=_before_and_after(content),
        curve_names=curve_names,
        curves=curves,
        gallery=_gallery(content),
    )


def embedded_picture(picture: Picture, most_bytes: int) -> str:
    """A data URI with the picture as JPEG, compressed until it fits or nothing more would be seen.

    Args:
        picture: (H, W, 3) uint8 RGB of any size.
        most_bytes: aimed at; base64 then adds a third.
    """
    small = shrink(picture)
    for side, quality in _JPEG_STEPS:
        buffer = io.BytesIO()
        image = Image.fromarray(shrink(small, side))
        # No chroma subsampling: it would blur coloured outlines. No `optimize`: libjpeg then needs
        # the whole file in one buffer, which Pillow guesses too small for noise.
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= most_bytes:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _bytes_per_picture(content: ReportContent) -> int:
    count = sum(2 + (item.outline is not None) for item in content.gallery)
    return _PICTURES_BYTES // max(count, 100)


def _score(value: float | None) -> str:
    """Four digits; a dash for a score that is not there."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _breakable(path: str) -> Markup:
    """The escaped path with places where a narrow screen may break the line."""
    return Markup(re.sub(r"([/\\_.-])", r"\1<wbr>", str(escape(path))))


def _curve_rows(results: Sequence[CategoryResult]) -> tuple[list[str], CurveRows]:
    """Names of the curves that at least one result defines, and the charts of each result."""
    rows = [(c, {"ROC": c.curves.roc, "PR": c.curves.pr, "PRO": c.curves.pro}) for c in results]
    names = [n for n in ("ROC", "PR", "PRO") if any(curves[n] is not None for _, curves in rows)]
    if not names:
        return [], []
    return names, [
        (c, [charts.curve_chart(n, curves[n], diagonal=n == "ROC") for n in names])
        for c, curves in rows
    ]


def _before_and_after(content: ReportContent) -> list[tuple[CategoryResult, Markup, Markup]]:
    """Each category, its scores by the detector alone, and with the filter; each on an own axis."""
    if content.parts is None:
        return []
    rows = []
    for category, host in zip(content.categories, content.parts.host, strict=True):
        # Calibration scores are of the fused map only, so neither chart outlines them.
        both = replace(category, calibration_scores=host.calibration_scores)
        before, after = (charts.histogram(c, charts.score_ranges([c])[0][0]) for c in (host, both))
        rows.append((category, before, after))
    return rows


def _gallery(content: ReportContent) -> list[tuple[str, str, list[GalleryItem]]]:
    """Kind, heading and items, mistakes first; kinds without items are left out."""
    groups = []
    for kind, heading in _GALLERY_HEADINGS.items():
        items = [item for item in content.gallery if item.kind == kind]
        if items:
            groups.append((kind, heading, items))
    return groups
