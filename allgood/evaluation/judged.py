"""Scores and maps of test pictures -> what they amount to, row by row of the table."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from allgood.metrics import Metric, PixelState
from allgood.metrics.ranking import Floats
from allgood.metrics.reference import aupro_200_per_image
from allgood.types import Batch, Failure, Prediction, Sample

EXACT_PIXELS = 1 << 26
"""Categories with at most so many test pixels are measured exactly (half a gigabyte)."""
BOTH, HOST, FILTER = range(3)
"""Maps of a run with a CostFilter, as `FilteredDetector.predict_parts` stacks them; others have
the first one only."""


def row_of(sample: Sample) -> str:
    """The row of the table where a picture counts: its category, or `category/domain` where its
    data set parts the test by domain, as AeBAD-S does."""
    domain = sample.meta.get("domain")
    return f"{sample.category}/{domain}" if domain else sample.category


class Judged:
    """Scores of all test pictures, and the pixel metrics of their rows, map by map.

    The pictures come row by row. So the pixels of only one row, and those pooled, are in memory.
    """

    def __init__(
        self, samples: Sequence[Sample], exact: bool, pixel_size: int, num_maps: int
    ) -> None:
        counts = Counter(row_of(sample) for sample in samples)
        self.category_of = {row_of(sample): sample.category for sample in samples}
        self.num_maps = num_maps
        self.exact = {
            name: exact or (pixel_size > 0 and count * pixel_size**2 * num_maps <= EXACT_PIXELS)
            for name, count in counts.items()
        }
        self.pooled = PixelState(exact=exact, with_dsc=False)  # UniAS defines it per category
        self.samples: list[Sample] = []
        self.map_scores: list[list[float]] = [[] for _ in range(num_maps)]
        self.judged_as: list[str] = []
        self.has_mask: list[bool] = []
        self.pixel_metrics: list[dict[str, dict[str, Metric]]] = [{} for _ in range(num_maps)]
        """Of each map, by row."""
        self.pixel_curves: dict[str, dict[str, Floats]] = {}
        """Of the first map, by row."""
        self.failures: list[Failure] = []
        self.unreadable: dict[str, int] = {}
        self._row = ""
        self._pixels: list[PixelState] = []
        """Of the row whose pictures are coming, map by map."""
        self._areas: list[float] = []
        """AUPRO of each of its defective pictures, where the row is a domain."""

    @property
    def scores(self) -> list[float]:
        return self.map_scores[BOTH]

    def names(self) -> list[str]:
        """Of the rows: categories, or their domains."""
        return sorted({row_of(sample) for sample in self.samples})

    def rows(self, name: str) -> list[int]:
        """The pictures of a row of the table."""
        return [i for i, sample in enumerate(self.samples) if row_of(sample) == name]

    def image_scores(
        self, pictures: Sequence[int], which: int = BOTH
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Scores of some pictures by one of the maps, and which of the pictures are defective."""
        scores = np.array([self.map_scores[which][i] for i in pictures])
        return scores, np.array([not self.samples[i].is_good for i in pictures])

    def add(self, batch: Batch, prediction: Prediction, categories: Sequence[str]) -> None:
        """Take in a batch whose maps lie beside its masks, pixel by pixel."""
        maps = prediction.anomaly_map  # (B, maps, H, W)
        scores = prediction.image_score.view(len(maps), self.num_maps)
        for i, sample in enumerate(batch.sample):
            name = row_of(sample)
            if name != self._row:
                self.finish_row()
                self._row = name
                self._pixels = [PixelState(exact=self.exact[name]) for _ in range(self.num_maps)]
            self.samples.append(sample)
            self.judged_as.append(categories[int(prediction.category[i])])
            self.has_mask.append(bool(batch.has_mask[i]) and not sample.is_good)
            for which in range(self.num_maps):
                self.map_scores[which].append(float(scores[i, which]))
            if not batch.has_mask[i] or batch.mask is None:
                continue
            mask = batch.mask[i].numpy()
            ids = [f"{sample.category}/{sample.id}"]
            if "domain" in sample.meta and mask.any():
                self._areas.append(aupro_200_per_image(_finite(maps[i, :1]).numpy(), mask))
            for which, pixels in enumerate(self._pixels):
                pixels.update(maps[i, which : which + 1].numpy(), mask, ids)
            self.pooled.update(maps[i, :1].numpy(), mask, ids)

    def finish_row(self) -> None:
        """Measure the row whose last picture has come, and let its pixels go."""
        if not self._pixels:
            return
        assert self._row not in self.pixel_curves, "pictures must come row by row"
        for metrics, pixels in zip(self.pixel_metrics, self._pixels, strict=True):
            metrics[self._row] = pixels.result()
        if self._areas:
            self.pixel_metrics[BOTH][self._row]["aupro_per_image"] = _mean_area(self._areas)
        self.pixel_curves[self._row] = self._pixels[BOTH].curves()
        self._pixels, self._areas = [], []


def _mean_area(areas: Sequence[float]) -> Metric:
    area = float(np.mean(areas))
    if np.isnan(area):
        return Metric.undefined("a map with no threshold below the limit")
    return Metric.exact(area)


def _finite(anomaly_map: Tensor) -> Tensor:
    """The map with its lowest finite score where nobody has looked (-inf): thresholds in equal
    steps need an end."""
    return anomaly_map.clamp(min=float(anomaly_map[anomaly_map.isfinite()].min()))
