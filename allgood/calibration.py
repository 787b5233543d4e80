"""Good pictures -> decisions with a promised false-alarm rate: split-conformal p-values.

The calibration pictures are good and were kept from fitting. For a new picture with score s of a
category with n of them, p = (1 + #{calibration scores >= s}) / (n + 1): if the picture is good and
comes
from the same line, p <= alpha happens with probability at most alpha, whatever the detector and the
distribution.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from allgood.types import InputError


def pictures_needed(max_false_alarm: float) -> int:
    """Good calibration pictures per category without which no p-value can be as small as asked."""
    return math.ceil(1 / max_false_alarm - 1 - 1e-9)


def threshold(scores: Sequence[float], max_false_alarm: float) -> float:
    """The largest score that is not yet an alarm: alarms are scores > threshold.

    With m = floor(alpha (n + 1)) - 1 calibration scores allowed at or above an alarm's score, it is
    the (m + 1)-th largest of them.

    Raises:
        InputError: too few scores for the rate asked.
    """
    allowed = math.floor(max_false_alarm * (len(scores) + 1) + 1e-9) - 1
    if allowed < 0:
        raise InputError(
            f"a false-alarm rate of {max_false_alarm:g} needs {pictures_needed(max_false_alarm)} "
            f"good pictures per category, got {len(scores)}"
        )
    return float(np.sort(np.asarray(scores))[-1 - allowed])


def p_value(score: float, scores: Sequence[float]) -> float:
    """Share of good pictures, this one included, that look at least as anomalous; in (0, 1]."""
    return (1 + int(np.count_nonzero(np.asarray(scores) >= score))) / (len(scores) + 1)


@dataclass(frozen=True)
class Calibration:
    """What the good calibration pictures scored."""

    max_false_alarm: float
    """The promise: at most this share of good pictures raises an alarm."""
    image_scores: Mapping[str, Sequence[float]]
    """Per category."""
    map_maxima: Mapping[str, Sequence[float]]
    """Per category, the highest value of each picture's map: a region drawn above the threshold of
    these shows on at most the same share of good pictures."""

    def __post_init__(self) -> None:
        if not 0 < self.max_false_alarm < 1:
            raise InputError(
                f"max_false_alarm must lie between 0 and 1, got {self.max_false_alarm:g}"
            )
        needed = pictures_needed(self.max_false_alarm)
        for category, scores in self.image_scores.items():
            if len(scores) < needed:
                raise InputError(
                    f"category '{category}' has {len(scores)} good calibration pictures, but a "
                    f"false-alarm rate of {self.max_false_alarm:g} needs {needed}: give more, or "
                    f"promise no less than {1 / (len(scores) + 1):.2g}"
                )

    def knows(self, category: str) -> bool:
        return category in self.image_scores

    def image_threshold(self, category: str) -> float:
        """Image scores above it are alarms."""
        return threshold(self.image_scores[category], self.max_false_alarm)

    def map_threshold(self, category: str) -> float:
        """Pixels above it belong to an anomalous region."""
        return threshold(self.map_maxima[category], self.max_false_alarm)

    def p_value(self, category: str, score: float) -> float:
        return p_value(score, self.image_scores[category])

    def to_json(self) -> dict[str, Any]:
        return {
            "max_false_alarm": self.max_false_alarm,
            "promise": (
                f"of good pictures like the calibration pictures, at most "
                f"{100 * self.max_false_alarm:g} % raise an alarm"
            ),
            "categories": {
                name: {
                    "pictures": len(scores),
                    "image_threshold": self.image_threshold(name),
                    "map_threshold": self.map_threshold(name),
                    "image_scores": sorted(scores),
                    "map_maxima": sorted(self.map_maxima[name]),
                }
                for name, scores in self.image_scores.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Calibration":
        categories = data["categories"]
        return cls(
            data["max_false_alarm"],
            {name: entry["image_scores"] for name, entry in categories.items()},
            {name: entry["map_maxima"] for name, entry in categories.items()},
        )
