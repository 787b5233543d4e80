"""Good pictures, each in so many drawings: some as they are, some with painted anomalies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.data.images import read_image
from allgood.data.synthesis import Synthesizer
from allgood.ignored import hide, to_inputs
from allgood.layers.memory_bank import MemoryBank
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
        ignore = torch.zeros_like(mask)
        if self.pictures.ignore_of:
            names = [sample.category for sample in samples]
            ignore = to_inputs(self.pictures.ignore_of, names, sizes, self.pictures.transform)
            image, mask = hide(image, ignore), mask & ~ignore
        ignore = _shrunk(ignore, self.mask_side, share=0.5)
        # A third of the pixels is enough, so that thin lines stay.
        mask = _shrunk(mask, self.mask_side, share=0.3) & ~ignore
        category = torch.tensor([self.categories.index(sample.category) for sample in samples])
        number = torch.tensor([image_number(sample.id) for sample in samples])
        return (image, mask, ignore, category, number), readable, failures

    def _read_resized(self, sample: Sample) -> tuple[np.ndarray, tuple[int, int]]:
        picture = read_image(sample.path)
        resized = self.pictures.transform.resize(picture).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(resized), (picture.shape[0], picture.shape[1])


def require_others(
    detector: nn.Module, run: Path, samples: Sequence[Sample], num_absent: int
) -> None:
    """`MemoryBank.require_others`, where the detector keeps a memory bank."""
    for part in detector.modules():
        if isinstance(part, MemoryBank):
            part.require_others(run, samples, num_absent)


def _shrunk(mask: Tensor, side: int, *, share: float) -> Tensor:
    """(B, 1, H, W) bool -> (B, 1, side, side): where it covers more than a share of the pixels."""
    return F.interpolate(mask.float(), (side, side), mode="area") > share
