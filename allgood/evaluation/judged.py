"""Scores and maps of test pictures -> what they amount to, row by row of the table."""

from collections import Counter
from collections.abc import Sequence

from allgood.metrics import PixelState
from allgood.metrics.reference import aupro_200_per_image
from allgood.scoring import resize_map
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
    """Scores of all test pictures, and the pixel states of their rows, map by map."""

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
        self.map_pixels: list[dict[str, PixelState]] = [{} for _ in range(num_maps)]
        self.aupro_per_image: dict[str, list[float]] = {}
        self.failures: list[Failure] = []
        self.unreadable: dict[str, int] = {}

    @property
    def scores(self) -> list[float]:
        return self.map_scores[BOTH]

    def names(self) -> list[str]:
        """Of the rows: categories, or their domains."""
        return sorted({row_of(sample) for sample in self.samples})

    def rows(self, name: str | None) -> list[int]:
        """The pictures of a row; of all rows where none is named."""
        return [
            i for i, sample in enumerate(self.samples) if name is None or row_of(sample) == name
        ]

    def pixels(self, name: str | None, which: int = BOTH) -> PixelState:
        """The pixels of a row; of all rows where none is named, of the first map only."""
        return self.pooled if name is None else self.map_pixels[which].get(name, PixelState())

    def add(
        self,
        batch: Batch,
        prediction: Prediction,
        pixel_size: int,
        categories: Sequence[str],
    ) -> None:
        maps = prediction.anomaly_map  # (B, maps, H, W)
        scores = prediction.image_score.view(len(maps), self.num_maps)
        if pixel_size:
            maps = resize_map(maps, (pixel_size, pixel_size))
        for i, sample in enumerate(batch.sample):
            self.samples.append(sample)
            self.judged_as.append(categories[int(prediction.category[i])])
            self.has_mask.append(bool(batch.has_mask[i]) and not sample.is_good)
            for which in range(self.num_maps):
                self.map_scores[which].append(float(scores[i, which]))
            if not batch.has_mask[i] or batch.mask is None:
                continue
            name, mask = row_of(sample), batch.mask[i].numpy()
            ids = [f"{sample.category}/{sample.id}"]
            if "domain" in sample.meta and mask.any():
                area = aupro_200_per_image(maps[i, :1].numpy(), mask)
                self.aupro_per_image.setdefault(name, []).append(area)
            for which, pixels in enumerate(self.map_pixels):
                if name not in pixels:
                    pixels[name] = PixelState(exact=self.exact[name])
                pixels[name].update(maps[i, which : which + 1].numpy(), mask, ids)
            self.pooled.update(maps[i, :1].numpy(), mask, ids)
