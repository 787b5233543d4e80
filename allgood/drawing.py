"""Good pictures, each in so many drawings: some as they are, some with painted anomalies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.data.images import read_image
from allgood.data.synthesis import Synthesizer
from allgood.ignored import hide, to_inputs
from allgood.layers.patch_store import image_number
from allgood.pictures import Pictures
from allgood.types import Failure, InputError, Sample


@dataclass(frozen=True)
class Drawings:
    """What a filter is taught with: drawing by drawing, all pictures of one after each other."""

    pictures: Pictures
    categories: Sequence[str]
    """Of the detector."""
    draws: int
    """Of each picture."""
    synthesizer: Synthesizer
    mask_side: int

    def category(self) -> Tensor:
        """(draws * pictures,) int64, index into `categories`."""
        return self.pictures.category(self.categories).repeat(self.draws)

    def read(self, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], list[int], list[Failure]]:
        """Drawings -> what `FilteredDetector.encode` takes; see `OnlineFeatures`."""
        images, masks, samples, sizes, readable = [], [], [], [], []
        failures: list[Failure] = []
        for index in indices:
            draw, place = divmod(index, len(self.pictures.samples))
            sample = self.pictures.samples[place]
            try:
                picture, size = self._read_resized(sample)
            except InputError as error:
                failures.append(Failure(sample.path, str(error)))
                continue
            drawn = self.synthesizer.draw(
                picture, category=sample.category, picture=sample.id, index=draw
            )
            images.append(torch.from_numpy(drawn.image).permute(2, 0, 1))
            masks.append(torch.from_numpy(drawn.mask))
            samples.append(sample)
            sizes.append(size)
            readable.append(index)
        if not readable:
            return (), [], failures
        image = torch.stack(images).float() / 255
        mask = torch.stack(masks)[:, None]
        if self.pictures.ignore_of:
            names = [sample.category for sample in samples]
            ignore = to_inputs(self.pictures.ignore_of, names, sizes, self.pictures.transform)
            image, mask = hide(image, ignore), mask & ~ignore
        category = torch.tensor([self.categories.index(sample.category) for sample in samples])
        number = torch.tensor([image_number(sample.id) for sample in samples])
        return (image, _shrunk(mask, self.mask_side), category, number), readable, failures

    def _read_resized(self, sample: Sample) -> tuple[np.ndarray, tuple[int, int]]:
        picture = read_image(sample.path)
        resized = self.pictures.transform.resize(picture).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(resized), (picture.shape[0], picture.shape[1])


def _shrunk(mask: Tensor, side: int) -> Tensor:
    """(B, 1, H, W) bool -> (B, 1, side, side): pixels of which a third is painted, so that thin
    lines stay."""
    return F.interpolate(mask.float(), (side, side), mode="area") > 0.3
