"""Good pictures -> decisions with a promised false-alarm rate: split-conformal p-values.

The calibration pictures are good and were kept from fitting. For a new picture with score s of a
category with n of them, p = (1 + #{calibration scores >= s}) / (n + 1). If that picture is good and
comes from the same line, p <= alpha happens with probability at most alpha, whatever the detector
and the distribution of its scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from allgood.types import InputError


def require_rate(max_false_alarm: float) -> None:
    """InputError where this is no share of pictures."""
    if not 0 < max_false_alarm < 1:
        raise InputError(f"max_false_alarm must lie between 0 and 1, got {max_false_alarm:g}")


def pictures_needed(max_false_alarm: float) -> int:
    """Good calibration pictures per category without which no p-value can be as small as asked.

    The smallest n with 1 / (n + 1) <= alpha.
    """
    needed = math.ceil(1 / Fraction(max_false_alarm)) - 1
    # Decided as p-values are, in floats: 1 / 3 is small enough for the float nearest to 1 / 3.
    return needed - 1 if needed and 1 / needed <= max_false_alarm else needed


def threshold(scores: Sequence[float], max_false_alarm: float) -> float:
    """The largest score that is not yet an alarm: p_value <= alpha exactly where score > threshold.

    An alarm's score has at most m calibration scores at or above it, (m + 1) / (n + 1) <= alpha;
    the threshold is the (m + 1)-th largest of them.

    Raises:
        InputError: too few scores for the rate asked.
    """
    places = len(scores) + 1
    rank = min(round(max_false_alarm * places), len(scores))
    if rank / places > max_false_alarm:
        rank -= 1
    if rank < 1:
        raise InputError(
            f"a false-alarm rate of {max_false_alarm:g} needs {pictures_needed(max_false_alarm)} "
            f"good pictures per category, got {len(scores)}"
        )
    return float(np.sort(np.asarray(scores, dtype=np.float64))[-rank])


def p_value(score: float, scores: Sequence[float]) -> float:
    """Share of good pictures, this one included, that look at least as anomalous; in (0, 1]."""
    return (1 + int(np.count_nonzero(np.asarray(scores) >= score))) / (len(scores) + 1)


@dataclass(frozen=True)
class GoodScores:
    """What the good calibration pictures of one category scored."""

    image: Sequence[float]
    """Image score of each picture."""
    map_maximum: Sequence[float]
    """Highest value of each picture's map: a region drawn above the threshold of these shows on at
    most the promised share of good pictures."""
    pictures: Sequence[str] = ()
    """Digests of the pictures, by which a test recognises them."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds, from what good pictures scored."""

    max_false_alarm: float
    """The promise: at most this share of good pictures raises an alarm."""
    categories: Mapping[str, GoodScores]

    def __post_init__(self) -> None:
        require_rate(self.max_false_alarm)
        needed = pictures_needed(self.max_false_alarm)
        for category, scores in self.categories.items():
            count = len(scores.image)
            if count < needed:
                raise InputError(
                    f"category '{category}' has {count} good calibration pictures, but a "
                    f"false-alarm rate of {self.max_false_alarm:g} needs {needed}: give more, or "
                    f"promise no less than {least_rate(count):g}"
                )

    def __str__(self) -> str:
        lines = [f"at most {100 * self.max_false_alarm:g} % of good pictures raise an alarm"]
        width = max(map(len, self.categories), default=0)
        lines += [
            f"  {name:<{width}}  alarm above {self.image_threshold(name):.4g}, "
            f"from {len(scores.image)} good pictures"
            for name, scores in self.categories.items()
        ]
        return "\n".join(lines)

    def knows(self, category: str) -> bool:
        return category in self.categories

    def image_threshold(self, category: str) -> float:
        """Image scores above it are alarms."""
        return threshold(self.categories[category].image, self.max_false_alarm)

    def map_threshold(self, category: str) -> float:
        """Pixels above it belong to an anomalous region."""
        return threshold(self.categories[category].map_maximum, self.max_false_alarm)

    def p_value(self, category: str, score: float) -> float:
        return p_value(score, self.categories[category].image)

    def is_anomalous(self, category: str, score: float) -> bool:
        """Whether the score is an alarm: its p-value is at most the promised rate."""
        return self.p_value(category, score) <= self.max_false_alarm

    def to_json(self) -> dict[str, Any]:
        return {
            "max_false_alarm": self.max_false_alarm,
            "promise": (
                f"of good pictures like the calibration pictures, at most "
                f"{100 * self.max_false_alarm:g} % raise an alarm"
            ),
            "categories": {
                name: {
                    "num_pictures": len(scores.image),
                    "image_threshold": self.image_threshold(name),
                    "map_threshold": self.map_threshold(name),
                    "image_scores": sorted(scores.image),
                    "map_maxima": sorted(scores.map_maximum),
                    "pictures": sorted(scores.pictures),
                }
                for name, scores in sorted(self.categories.items())
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Calibration":
        """What `to_json` gave.

        Raises:
            KeyError, TypeError, AttributeError, ValueError: anything else.
        """
        categories = data["categories"]
        for name, entry in categories.items():
            scores, maxima = entry["image_scores"], entry["map_maxima"]
            if len(scores) != len(maxima):
                raise ValueError(f"'{name}' has {len(scores)} scores but {len(maxima)} maxima")
            if not all(math.isfinite(number) for number in (*scores, *maxima)):
                raise ValueError(f"'{name}' has a score that is not finite")
            if not all(isinstance(digest, str) for digest in entry["pictures"]):
                raise TypeError(f"'{name}' has a picture whose digest is no text")
        return cls(
            data["max_false_alarm"],
            {
                name: GoodScores(entry["image_scores"], entry["map_maxima"], entry["pictures"])
                for name, entry in categories.items()
            },
        )


def least_rate(num_pictures: int) -> float:
    """The smallest rate that so many pictures can promise, rounded up to be shown and typed."""
    exact = 1 / (num_pictures + 1)
    digits = 1 - math.floor(math.log10(exact))
    return min(math.ceil(exact * 10**digits - 1e-9) / 10**digits, 0.99)
