"""Charts as inline SVG: a mirrored histogram of scores, and small curves.

Colours come from the page's classes, so that they follow its light or dark scheme. Sizes are in the
units of the view box, about one CSS pixel.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from allgood.evaluation.content import CategoryResult, Curve

Floats = NDArray[np.floating]
Range = tuple[float, float]

_WIDTH, _HALF = 340.0, 44.0  # of the histogram: width, and height of each of its two sides
_MARGIN, _TOP, _BOTTOM = 6.0, 16.0, 17.0
_NUM_BINS = 44
_OWN_AXIS_BELOW = 1 / 8  # share of a common axis below which a category could not be read
_SIDE = 100.0  # of a curve


def score_ranges(categories: Sequence[CategoryResult]) -> tuple[list[Range], bool]:
    """The x axis of each category's histogram, and whether they share one.

    Shared, unless some category would fill less than an eighth of it.
    """
    own = [_range_of([c]) for c in categories]
    low, high = _range_of(categories)
    if all(b - a >= _OWN_AXIS_BELOW * (high - low) for a, b in own):
        return [(low, high)] * len(own), True
    return own, False


def _range_of(categories: Iterable[CategoryResult]) -> Range:
    """Covers the scores without the longest tails, and every threshold, with room."""
    scores: list[Floats] = [np.zeros(0)]
    thresholds: list[float] = []
    for c in categories:
        scores += [c.good_scores, c.defective_scores]
        thresholds += [c.alarms.threshold] if c.alarms is not None else []
    finite = np.concatenate(scores).astype(np.float64)
    finite = finite[np.isfinite(finite)]
    ends = np.append(
        np.quantile(finite, [0.005, 0.985]) if len(finite) else [],
        [t for t in thresholds if math.isfinite(t)],
    )
    low, high = (float(ends.min()), float(ends.max())) if len(ends) else (0.0, 1.0)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def histogram(category: CategoryResult, axis: Range) -> Markup:
    """Good parts above the line, defective ones below; mistakes in full colour.

    Bars grow with the logarithm of the count, so that a single part stays visible. The outermost
    bars also hold what lies beyond the axis. The threshold lies on an edge between bars.
    """
    alarms = category.alarms
    threshold = alarms.threshold if alarms is not None else math.nan
    edges = _bin_edges(axis, threshold)
    sides = {
        "good": _counts(category.good_scores, edges),
        "bad": _counts(category.defective_scores, edges),
    }
    calibration = _counts(category.calibration_scores, edges)
    most = max(1, calibration.max(), *(counts.max() for counts in sides.values()))
    scale = _HALF / math.log1p(most)
    base = _TOP + _HALF
    parts = []
    for kind, counts in sides.items():
        up = kind == "good"
        for i in np.flatnonzero(counts):
            height = scale * math.log1p(counts[i])
            left, right = _across(edges[i], axis), _across(edges[i + 1], axis)
            wrong = (edges[i] >= threshold) if up else (edges[i] < threshold)
            noun = "good" if up else "defective"
            parts.append(
                Markup(
                    '<rect class="{}{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{} {}, {} to {}</title></rect>"
                ).format(
                    kind,
                    " wrong" if wrong else "",
                    left + 0.4,
                    base - height if up else base,
                    max(right - left - 0.8, 1.0),
                    height,
                    counts[i],
                    noun,
                    f"{edges[i]:.3g}",
                    f"{edges[i + 1]:.3g}",
                )
            )
    outline = _outline(calibration, edges, axis, base, scale)
    frame = _histogram_frame(axis, threshold, base)
    label = f"Scores of {category.num_good} good and {category.num_defective} defective parts"
    return Markup(
        '<svg class="histogram" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}{}{}</svg>'
    ).format(_WIDTH, base + _HALF + _BOTTOM, label, Markup("").join(parts), outline, frame)


def _across(score: float, axis: Range) -> float:
    share = (score - axis[0]) / (axis[1] - axis[0])
    return _MARGIN + min(max(share, 0.0), 1.0) * (_WIDTH - 2 * _MARGIN)


def _bin_edges(axis: Range, threshold: float) -> Floats:
    """Equally wide bins, one edge at the threshold if it is on the axis; the outermost fill up."""
    low, high = axis
    width = (high - low) / _NUM_BINS
    anchor = threshold if low <= threshold <= high else low
    steps = np.arange(-_NUM_BINS, _NUM_BINS + 1)
    edges = anchor + width * steps
    inner = edges[(edges > low + width / 2) & (edges < high - width / 2)]
    return np.concatenate([[low], inner, [high]])


def _counts(scores: Floats, edges: Floats) -> NDArray[np.int64]:
    """Scores per bin, upper edges included; the outermost bins also take what lies beyond."""
    inner = np.searchsorted(edges[1:-1], np.asarray(scores, np.float64), side="left")
    return np.bincount(inner, minlength=len(edges) - 1).astype(np.int64)


def _outline(
    counts: NDArray[np.int64], edges: Floats, axis: Range, base: float, scale: float
) -> Markup:
    """The calibration pictures as a line around their bars."""
    if not counts.any():
        return Markup("")
    steps = []
    for i, count in enumerate(counts):
        y = base - scale * math.log1p(count)
        steps += [(_across(edges[i], axis), y), (_across(edges[i + 1], axis), y)]
    return Markup('<polyline class="calibration" points="{}"/>').format(_points(steps))


def _histogram_frame(axis: Range, threshold: float, base: float) -> Markup:
    """Base line, threshold, and the scores at both ends."""
    bottom = base + _HALF
    text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>')
    line = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    parts = [
        line.format("axis", _MARGIN, _WIDTH - _MARGIN, base, base),
        text.format(_MARGIN, bottom + 13, "start", "", f"{axis[0]:.3g}"),
        text.format(_WIDTH - _MARGIN, bottom + 13, "end", "", f"{axis[1]:.3g}"),
    ]
    if math.isfinite(threshold):
        x = _across(threshold, axis)
        anchor = "start" if x < 0.25 * _WIDTH else "end" if x > 0.75 * _WIDTH else "middle"
        bold = Markup(' class="strong"')
        parts += [
            line.format("threshold", x, x, _TOP - 3, bottom),
            text.format(x, _TOP - 6, anchor, bold, f"alarm threshold {threshold:.4g}"),
        ]
    return Markup("").join(parts)


def curve_chart(name: str, curve: Curve | None, *, diagonal: bool = False) -> Markup:
    """A small square chart of a curve; a word in its place where it is undefined.

    Args:
        name: drawn above.
        curve: x from 0 to its largest value, y from 0 to 1.
        diagonal: also draw the line of a detector that guesses.
    """
    right = float(curve.x[-1]) if curve is not None and len(curve.x) else 1.0
    right = right if right > 0 else 1.0
    if curve is None or not len(curve.x):
        middle = Markup('<text x="{0:.0f}" y="{0:.0f}" text-anchor="middle">not defined</text>')
        inside = middle.format(_SIDE / 2)
    else:
        steps = [
            (_SIDE * x / right, _SIDE * (1 - y)) for x, y in zip(curve.x, curve.y, strict=True)
        ]
        guess = Markup('<line class="guess" x1="0" y1="{0:.0f}" x2="{0:.0f}" y2="0"/>')
        inside = guess.format(_SIDE) if diagonal else Markup("")
        inside += Markup('<polyline class="curve" points="{}"/>').format(_points(steps))
    return Markup(
        '<svg class="curve-chart" viewBox="-3 -15 106 130" role="img" aria-label="{0} curve">'
        '<text class="strong" x="0" y="-5">{0}</text>'
        '<rect class="frame" width="{1:.0f}" height="{1:.0f}"/>'
        '<path class="grid" d="M0 50H100M50 0V100"/>{2}'
        '<text x="0" y="112">0</text><text x="100" y="112" text-anchor="end">{3}</text></svg>'
    ).format(name, _SIDE, inside, f"{right:.2g}")


def _points(steps: list[tuple[float, float]]) -> str:
    """x,y x,y ...; points on a straight line with their neighbours are left out."""
    kept = [
        point
        for i, point in enumerate(steps)
        if i in (0, len(steps) - 1) or not _straight(steps[i - 1], point, steps[i + 1])
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)


def _straight(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    turn = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    return abs(turn) < 1e-9
