"""The report's sentences and numbers in words, for the page and the terminal alike."""

import math
from collections.abc import Iterable, Sequence

from allgood.evaluation.content import CategoryResult, ReportContent
from allgood.metrics import Metric

EXACT_WITHIN = 1e-9
"""Bounds below this are rounding errors of the last digits: the number is called exact."""


def counted(number: int, noun: str) -> str:
    """1 picture, 2 pictures, 1,204 pictures."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def percent(share: float) -> str:
    """97.3 %"""
    return f"{100 * share:.1f} %"


def promise(alpha: float) -> str:
    """5 %, or 0.1 %: as many digits as the promise has."""
    return f"{100 * alpha:.3g} %"


def rate(count: int, total: int) -> str:
    """Share in percent that says 0.0 or 100.0 only where it is none or all; a dash for no total."""
    if not total:
        return "–"
    share = 100 * count / total
    if 0 < share < 0.05:
        return "< 0.1 %"
    if 99.95 <= share < 100:
        return "> 99.9 %"
    return f"{share:.1f} %"


def bound(metric: Metric) -> str:
    """exact, or ±0.02: the guaranteed bound in percentage points, one digit, rounded up."""
    if metric.bound < EXACT_WITHIN:
        return "exact"
    points = 100 * metric.bound
    digits = max(0, -math.floor(math.log10(points)))
    up = math.ceil(points * 10**digits - 1e-6) / 10**digits
    return f"±{up:.{digits}f}"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 5 s, or 2 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


class Totals:
    """Sums over categories, each under its own threshold; only categories with one count."""

    def __init__(self, categories: Iterable[CategoryResult]) -> None:
        everything = list(categories)
        pairs = [(c, c.alarms) for c in everything if c.alarms is not None]
        self.good = sum(c.num_good for c in everything)
        self.defective = sum(c.num_defective for c in everything)
        self.unreadable = sum(c.num_unreadable for c in everything)
        self.has_alarms = bool(pairs)
        self.uncalibrated = [c.name for c in everything if c.alarms is None]
        self.judged_good = sum(c.num_good for c, _ in pairs)
        self.judged_defective = sum(c.num_defective for c, _ in pairs)
        self.found = sum(a.num_found for _, a in pairs)
        self.missed = self.judged_defective - self.found
        self.false_alarms = sum(a.num_false_alarms for _, a in pairs)
        alphas = sorted({a.alpha for _, a in pairs})
        self.promise = " to ".join(promise(a) for a in dict.fromkeys(alphas[:1] + alphas[-1:]))
        allowed = sum(a.alpha * c.num_good for c, a in pairs)
        self.allowed_rate = allowed / self.judged_good if self.judged_good else math.nan


def headline(content: ReportContent) -> str:
    """291 of 313 defective parts found, 9 false alarms among 302 good parts (3.0 %; promised
    ...)."""
    totals = Totals(content.categories)
    if not totals.has_alarms:
        return (
            f"{counted(totals.defective, 'defective part')} and "
            f"{counted(totals.good, 'good part')} scored; no alarm threshold was calibrated"
        )
    return f"{found_sentence(totals)}, {false_alarm_sentence(totals)}"


def found_sentence(totals: Totals) -> str:
    if not totals.judged_defective:
        return "No defective parts were tested"
    parts = counted(totals.judged_defective, "defective part")
    return f"{totals.found:,} of {parts} found"


def false_alarm_sentence(totals: Totals) -> str:
    if not totals.judged_good:
        return (
            f"false alarms not measured for want of good parts (promised at most {totals.promise})"
        )
    alarms = (
        counted(totals.false_alarms, "false alarm") if totals.false_alarms else "no false alarm"
    )
    return (
        f"{alarms} among {counted(totals.judged_good, 'good part')} "
        f"({rate(totals.false_alarms, totals.judged_good)}; promised at most {totals.promise})"
    )


def weakest_sentence(categories: Sequence[CategoryResult]) -> str:
    """Where most of the missed defects are; empty if none were missed."""
    missed = [
        (c.num_defective - c.alarms.num_found, c)
        for c in categories
        if c.alarms is not None and c.alarms.num_found < c.num_defective
    ]
    if not missed or len(categories) == 1:
        return ""
    worst = sorted(missed, key=lambda pair: -pair[0] / pair[1].num_defective)[:3]
    parts = [f"{c.name} ({count:,} of {c.num_defective:,})" for count, c in worst]
    return f"Most missed, as a share of their defective parts: {listed(parts)}."


def promise_sentences(categories: Sequence[CategoryResult]) -> list[str]:
    """Where the promised false-alarm rate was kept, and whether chance explains where it was
    not."""
    judged = [(c, c.alarms) for c in categories if c.alarms is not None and c.num_good]
    above = [c for c, a in judged if a.num_false_alarms > a.alpha * c.num_good]
    if not judged:
        return []
    if not above:
        everywhere = " in every category" if len(categories) > 1 else ""
        return [f"The promised false-alarm rate was kept{everywhere}."]
    above.sort(key=chance_of_as_many)
    explainable = all(len(c.calibration_scores) for c in above)
    named = [_false_alarms_of(c) for c in above[:4]]
    if len(above) > len(named):
        named.append(f"{len(above) - len(named)} more")
    if len(categories) == 1:
        first = "There were more false alarms than promised."
    else:
        first = f"More false alarms than promised in {len(above)} of {len(judged)} categories: "
        first += f"{listed(named)}."
    if not explainable:
        return [first]
    # Of many categories one is unlucky: the usual 1 in 20 is shared among them.
    unlikely = [c for c in above if chance_of_as_many(c) < 0.05 / len(judged)]
    if not unlikely:
        return [f"{first} With so few good parts, chance alone can explain that."]
    parts = [f"{c.name} (chance brings as many in {_share_of_tests(c)})" for c in unlikely[:4]]
    return [first, f"Chance does not explain {listed(parts)}: see what changed since calibration."]


def _false_alarms_of(category: CategoryResult) -> str:
    alarms = category.alarms.num_false_alarms if category.alarms is not None else 0
    return f"{category.name} ({alarms:,} of {category.num_good:,} good parts)"


def _share_of_tests(category: CategoryResult) -> str:
    chance = chance_of_as_many(category)
    share = "less than 0.1 %" if chance < 0.001 else percent(chance)
    return f"{share} of such tests"


def chance_of_as_many(category: CategoryResult) -> float:
    """P(at least this many false alarms) if good test and calibration pictures are alike.

    With n calibration pictures an alarm needs one of the k = floor(alpha (n + 1)) highest ranks
    among n + 1. Of m good test pictures, x then raise an alarm with the beta-binomial probability
    C(x + k - 1, x) C(m - x + n - k, m - x) / C(m + n, m).
    """
    if category.alarms is None:
        raise ValueError(f"{category.name} has no alarm threshold")
    n, m = len(category.calibration_scores), category.num_good
    k = math.floor(category.alarms.alpha * (n + 1) + 1e-9)
    seen = category.alarms.num_false_alarms
    if not 0 < k <= n:
        return float(seen == 0 or k > n)
    total = _log_choose(m + n, m)
    fewer = math.fsum(
        math.exp(_log_choose(x + k - 1, x) + _log_choose(m - x + n - k, m - x) - total)
        for x in range(seen)
    )
    return min(max(1 - fewer, 0.0), 1.0)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
