"""All metrics of a report as one table of words, from which page and terminal make theirs."""

from collections.abc import Mapping
from dataclasses import dataclass

from allgood.evaluation import words
from allgood.evaluation.content import ReportContent
from allgood.metrics import Metric, mean_over_categories


@dataclass(frozen=True)
class MetricName:
    group: str
    """Heading over several columns; empty for none."""
    label: str
    meaning: str
    """One sentence for readers who do not know it."""

    @property
    def full(self) -> str:
        return f"{self.group} {self.label}".strip()


METRICS = {
    "image_auroc": MetricName(
        "Image", "AUROC", "How often a defective part scores higher than a good one."
    ),
    "image_ap": MetricName(
        "Image",
        "AP",
        "Share of defective parts among the highest scores, averaged down to each defective part.",
    ),
    "image_f1max": MetricName(
        "Image",
        "F1max",
        "Best balance of found parts and false alarms that any threshold would give. That "
        "threshold is chosen on the test's own answers, so this is no operating point.",
    ),
    "pixel_auroc": MetricName(
        "Pixel",
        "AUROC",
        "How often a defective pixel scores higher than a normal one. Normal pixels are so many "
        "that a false spot hardly lowers it: read pixel AP for how clean the maps are.",
    ),
    "pixel_ap": MetricName("Pixel", "AP", "Like image AP, for pixels; strict about false spots."),
    "pixel_f1max": MetricName("Pixel", "F1max", "Like image F1max, for pixels."),
    "pixel_ioumax": MetricName(
        "Pixel", "IoUmax", "Largest share of overlap between marked and defective pixels."
    ),
    "aupro": MetricName(
        "Pixel",
        "AUPRO",
        "How much of each defect is marked, small defects counting like large ones, averaged over "
        "pixel false-alarm rates up to the protocol's limit.",
    ),
    "aupro_per_image": MetricName(
        "Pixel",
        "AUPRO per image",
        "The same of each defective picture alone, averaged; another and usually lower number.",
    ),
    "dsc": MetricName(
        "Pixel",
        "DSC",
        "Mean overlap (Dice) per picture at the threshold with the largest precision plus recall, "
        "as UniAS reports it: a good picture counts 1 if nothing in it is marked, else 0.",
    ),
    "dsc_defective": MetricName("Pixel", "DSC def.", "DSC of the defective pictures alone."),
    "dsc_pooled": MetricName(
        "Pixel", "DSC pooled", "DSC of all pixels as if they were one picture."
    ),
    "mad": MetricName(
        "", "mAD", "Mean of the seven metrics that multi-class papers report together."
    ),
}


@dataclass(frozen=True)
class MetricCell:
    """One number; undefined or not measured when `bound` is empty, and `hint` then says why."""

    text: str
    bound: str
    hint: str
    """All digits, or the reason."""
    note: int = 0
    """Number of the note below the table; 0 for none."""
    bound_points: float = 0.0
    """The bound in percentage points."""


@dataclass(frozen=True)
class MetricRow:
    name: str
    kind: str
    """"category", "mean" or "pooled"."""
    cells: list[MetricCell]


@dataclass(frozen=True)
class MetricTable:
    columns: list[MetricName]
    rows: list[MetricRow]
    notes: list[str]
    """Note 1 is the first."""
    left_out: list[str]
    """Sentences on metrics that no row defines, and which have no column."""


def metric_table(content: ReportContent) -> MetricTable:
    """One row per category, then the mean, then everything pooled; undefined columns collapsed."""
    sources = [(c.name, "category", c.metrics) for c in content.categories]
    if len(content.categories) > 1:
        sources.append(("Mean of categories", "mean", content.mean))
    if content.pooled_row is not None:
        sources.append((content.pooled_row.name, "pooled", content.pooled_row.metrics))
    every = [metrics for _, _, metrics in sources]
    seen = {name for metrics in every for name in metrics}
    measured = [name for name in METRICS if name in seen]
    measured += sorted(seen - set(measured))
    shown = [n for n in measured if any(n in m and m[n].is_defined for m in every)]
    notes: list[str] = []
    rows = [
        MetricRow(name, kind, [_cell(metrics.get(column), notes) for column in shown])
        for name, kind, metrics in sources
    ]
    hidden = {n: _reasons(n, every) for n in measured if n not in shown}
    return MetricTable([_named(n) for n in shown], rows, notes, _left_out(hidden, measured))


PART_METRICS = ("image_auroc", "pixel_ap", "aupro")
PART_NAMES = ("detector", "filter", "both")


@dataclass(frozen=True)
class PartsTable:
    """The detector, its filter and both beside each other."""

    columns: list[MetricName]
    """Each stands over one cell for every one of PART_NAMES."""
    rows: list[MetricRow]


def parts_table(content: ReportContent) -> PartsTable | None:
    """One row per category, then the mean; None for a run without a filter."""
    if content.parts is None:
        return None
    every = [content.parts.host, content.parts.filter, content.categories]
    shown = [n for n in PART_METRICS if any(c.metrics[n].is_defined for c in content.categories)]
    sources = [
        (three[0].name, "category", [c.metrics for c in three])
        for three in zip(*every, strict=True)
    ]
    if len(content.categories) > 1:
        means = [mean_over_categories({c.name: c.metrics for c in part}) for part in every]
        sources.append(("Mean of categories", "mean", means))
    rows = [
        MetricRow(name, kind, [_cell(metrics[n], []) for n in shown for metrics in three])
        for name, kind, three in sources
    ]
    return PartsTable([_named(n) for n in shown], rows)


def _named(name: str) -> MetricName:
    return METRICS.get(name) or MetricName("", name, name)


def _cell(metric: Metric | None, notes: list[str]) -> MetricCell:
    if metric is None:
        return MetricCell("–", "", "not measured")
    note = 0
    if metric.reason:
        reason = _in_words(metric.reason)
        if reason not in notes:
            notes.append(reason)
        note = notes.index(reason) + 1
    if not metric.is_defined:
        return MetricCell("not defined", "", _in_words(metric.reason), note)
    low, value, high = (f"{100 * v:.4f}" for v in (metric.lower, metric.value, metric.upper))
    bound = words.bound(metric)
    hint = f"{value} %, exact" if bound == "exact" else f"{value} %, surely in {low} to {high} %"
    return MetricCell(f"{100 * metric.value:.1f}", bound, hint, note, 100 * metric.bound)


def _in_words(reason: str) -> str:
    """A reason with metrics called as in the table: "Pixel AUROC: no defective pixels"."""
    for name, metric in METRICS.items():
        reason = reason.replace(f"{name}:", f"{metric.full}:")
    return reason


def _reasons(name: str, every: list[Mapping[str, Metric]]) -> list[str]:
    # The first rows are the categories: their reasons are plain, those of the mean derive from
    # them.
    return list(dict.fromkeys(m[name].reason for m in every if name in m))


def _left_out(hidden: dict[str, list[str]], measured: list[str]) -> list[str]:
    """One sentence if all pixel metrics are undefined, and one per other reason."""
    pixels = [n for n in measured if _named(n).group == "Pixel"]
    sentences = []
    if not pixels:
        sentences.append("Pixel metrics were not measured.")
    elif all(n in hidden for n in pixels):
        also = ", and mAD with them," if "mad" in hidden else ""
        reason = hidden[pixels[0]][0]
        sentences.append(f"Pixel metrics{also} are not defined in any category: {reason}.")
        hidden = {n: r for n, r in hidden.items() if n not in pixels and n != "mad"}
    by_reason: dict[str, list[str]] = {}
    for name, reasons in hidden.items():
        by_reason.setdefault(reasons[0], []).append(_named(name).full)
    for reason, names in by_reason.items():
        are = "is" if len(names) == 1 else "are"
        sentences.append(f"{words.listed(names)} {are} not defined in any category: {reason}.")
    return sentences
