"""The report's numbers as plain text for a terminal, a pipe or a log."""

import math
import unicodedata

from allgood.evaluation import words
from allgood.evaluation.content import CategoryResult, ReportContent
from allgood.evaluation.metric_rows import PART_NAMES, MetricCell, metric_table, parts_table

_LEAST_BOUND_POINTS = 0.05 - 1e-9  # smaller bounds vanish in the rounding to one decimal
_LONGEST_NAME = 40
_GAP = "  "


def table(content: ReportContent) -> str:
    """Per category, mean and pooled: counts, alarms and metrics in percent, right below each other.

    Bounds show where they reach 0.05 percentage points. An undefined number is "-", and a line
    below says why.
    """
    metrics = metric_table(content)
    counts = [_counts(c) for c in content.categories]
    if len(content.categories) > 1:
        counts.append([""] * 4)  # of the mean
    if content.pooled_row is not None:
        counts.append(_counts(content.pooled_row))
    groups = ["", "", "", "", "false"]
    labels = ["category", "good", "defective", "found", "alarms"]
    for column in metrics.columns:
        groups.append(column.group.lower())
        labels.append(column.label)
    rows = [
        [_short(printable(row.name)), *count, *(_number(cell) for cell in row.cells)]
        for row, count in zip(metrics.rows, counts, strict=True)
    ]
    first_summary = len(content.categories) + 2
    lines = _aligned([groups, labels, *rows])
    rule = "-" * max(_width(line) for line in lines)
    if len(lines) > first_summary:
        lines.insert(first_summary, rule)
    lines.insert(2, rule)
    lines += [f"  {mark}) {note}" for mark, note in enumerate(metrics.notes, start=1)]
    return "\n".join([*lines, *metrics.left_out, *_parts(content)])


def _parts(content: ReportContent) -> list[str]:
    """The detector alone, the filter alone and both, for a run with a CostFilter."""
    parts = parts_table(content)
    if parts is None:
        return []
    groups, labels = [""], ["with and without the filter"]
    for column in parts.columns:
        groups += ["", f"{column.group.lower()} {column.label}", ""]
        labels += PART_NAMES
    rows = [[_short(printable(row.name)), *map(_number, row.cells)] for row in parts.rows]
    lines = _aligned([groups, labels, *rows])
    lines.insert(2, "-" * max(_width(line) for line in lines))
    return ["", *lines]


def printable(text: str) -> str:
    """Names with control characters shown as ?, so that none can drive the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _counts(category: CategoryResult) -> list[str]:
    alarms = category.alarms
    found = false_alarms = "-"
    if alarms is not None and category.num_defective:
        found = words.rate(alarms.num_found, category.num_defective)
    if alarms is not None and category.num_good:
        false_alarms = words.rate(alarms.num_false_alarms, category.num_good)
    return [f"{category.num_good:,}", f"{category.num_defective:,}", found, false_alarms]


def _number(cell: MetricCell) -> str:
    mark = f" {cell.note})" if cell.note else ""
    if not cell.bound:
        return f"-{mark}"
    if cell.bound_points < _LEAST_BOUND_POINTS:
        return f"{cell.text}{mark}"
    return f"{cell.text}±{math.ceil(10 * cell.bound_points - 1e-6) / 10:.1f}{mark}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - _width(first))]
        cells += [
            " " * (width - _width(cell)) + cell
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append(_GAP.join(cells).rstrip())
    return lines


def _width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)
