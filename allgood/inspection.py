"""What is said of one picture: its score, the verdict, where it looks anomalous, and how that is
shown."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from allgood.data.transforms import Box, Transform
from allgood.evaluation.overlay import heat_overlay

_PEAK_SHARE = 0.8
"""An alarm whose map stays below the map threshold still shows where it is highest: from this
share of its maximum on."""


@dataclass(frozen=True)
class Region:
    """A connected part of the picture that looks anomalous."""

    box: Box
    """left, top, right, bottom in the picture's own pixels; right and bottom are the first ones
    outside."""
    score: float
    """Highest value of the anomaly map inside."""


@dataclass(frozen=True)
class Inspection:
    """What is said of one picture."""

    path: Path
    category: str | None = None
    category_inferred: bool = False
    image_score: float | None = None
    p_value: float | None = None
    """Share of good pictures that look at least as anomalous; None before calibration, as are the
    verdict and the regions."""
    is_anomalous: bool | None = None
    regions: tuple[Region, ...] = ()
    error: str | None = None
    """Why the picture could not be judged; everything above but `path` is then empty."""
    input_map: Tensor | None = field(default=None, repr=False, compare=False)
    """(h, w) anomaly map at the network's input size."""
    map_threshold: float | None = field(default=None, repr=False)
    """What the map of a good picture hardly exceeds; None before calibration."""
    original_size: tuple[int, int] = (0, 0)
    transform: Transform | None = field(default=None, repr=False)

    def anomaly_map(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W) float32 in the picture's own size, or in another one; higher is more anomalous.

        Raises:
            ValueError: the picture could not be read.
        """
        if self.input_map is None or self.transform is None:
            raise ValueError(f"{self.path} has no anomaly map: {self.error}")
        return self.transform.map_to_original(self.input_map, size or self.original_size).numpy()

    def overlay(self, picture: np.ndarray) -> np.ndarray:
        """Heat map and boxes over the picture, in its own size.

        Colour begins at half the category's map threshold and is full at one and a half times it;
        before calibration, at the map's median and its maximum.

        Args:
            picture: (H, W, 3) uint8, what `read_image` gave for `path`, or a smaller copy of it.

        Raises:
            ValueError: the picture could not be read.
        """
        size = (picture.shape[0], picture.shape[1])
        values = self.anomaly_map(size)
        if self.map_threshold is not None:
            low, high = 0.5 * self.map_threshold, 1.5 * self.map_threshold
        else:
            low, high = float(np.median(values)), float(values.max())
        if not low < high:  # a flat map
            high = low + 1
        boxes = [_scaled(region.box, self.original_size, size) for region in self.regions]
        return heat_overlay(picture, values, low=low, high=high, boxes=boxes)

    def to_json(self) -> dict[str, Any]:
        """What `allgood inspect` prints."""
        if self.error is not None:
            return {"path": str(self.path), "error": self.error}
        return {
            "path": str(self.path),
            "category": self.category,
            "category_inferred": self.category_inferred,
            "image_score": self.image_score,
            "p_value": self.p_value,
            "is_anomalous": self.is_anomalous,
            "regions": [
                {"box": list(region.box), "score": region.score} for region in self.regions
            ],
        }


def find_regions(
    input_map: Tensor, map_threshold: float, transform: Transform, original_size: tuple[int, int]
) -> tuple[Region, ...]:
    """Connected parts of the map above the threshold, the highest first; at least the peak.

    Args:
        input_map: (h, w) at the network's input size.
        transform: that made the network's input of the picture.
        original_size: (H, W) of the picture, in whose pixels the boxes are.
    """
    values = input_map.numpy()
    peak = float(values.max())
    if peak > map_threshold:
        inside = values > map_threshold
    else:
        inside = values >= min(_PEAK_SHARE * peak, peak)
    labels, _ = ndimage.label(inside, structure=np.ones((3, 3)))
    found = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        box = (columns.start, rows.start, columns.stop, rows.stop)
        highest = float(values[rows, columns][labels[rows, columns] == label].max())
        found.append(Region(transform.box_to_original(box, original_size), highest))
    return tuple(sorted(found, key=lambda region: -region.score))


def _scaled(box: Box, size: tuple[int, int], new_size: tuple[int, int]) -> Box:
    """A box in a picture of (H, W) pixels -> the smallest that covers it in a resized copy."""
    (height, width), (new_height, new_width) = size, new_size
    left, top, right, bottom = box
    return (
        left * new_width // width,
        top * new_height // height,
        -(-right * new_width // width),
        -(-bottom * new_height // height),
    )
