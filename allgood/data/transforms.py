"""Geometry between a picture's own pixels and the network's: the way in and the way back.

Letters: H W the picture, h w the network's input.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.types import InputError

MAX_ASPECT = 4
"""With keep_aspect the longer side is at most this many times the shorter, squashed beyond it."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom; right and bottom are the first pixels outside."""


class _Geometry(NamedTuple):
    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Transform:
    """Resize, then crop; the same for every picture, and it knows the way back.

    Without `keep_aspect` the picture is squashed to `size`. With it the shorter side becomes `size`
    and the longer follows (rounded down, as torchvision does; at most MAX_ASPECT times `size`).
    Then `center_crop`, or with keep_aspect a bottom and right crop to a multiple of `multiple`.
    """

    size: int | tuple[int, int] = 256
    """One side of a square, or (height, width); with keep_aspect the shorter side."""
    keep_aspect: bool = False
    multiple: int = 1
    """Both input sides are multiples of this: the encoder's patch size or stride."""
    center_crop: int | None = None
    """Side of the square cut from the middle: 224 of 256 (PatchCore), 392 of 448 (Dinomaly)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    angle: float = 0.0
    """Degrees counter-clockwise by which the picture is turned before all else, in its own frame.
    For the rotated copies of few-shot references only: the way back does not know it."""

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise InputError(
                f"interpolation must be bilinear or bicubic, got '{self.interpolation}'"
            )
        if self.keep_aspect and not isinstance(self.size, int):
            raise InputError(f"with keep_aspect, size is the shorter side, got {self.size}")
        if min(*self._sides, self.multiple) < 1:
            raise InputError(f"size and multiple must be positive: {self.size}, {self.multiple}")
        if self.center_crop is not None:
            if not 1 <= self.center_crop <= min(self._sides):
                raise InputError(
                    f"center_crop must be between 1 and size {self.size}, got {self.center_crop}"
                )
            self._require_multiple("center_crop", self.center_crop)
        elif self.keep_aspect:
            if self._sides[0] < self.multiple:
                raise InputError(f"size {self.size} is below multiple {self.multiple}; raise it")
        else:
            for side in self._sides:
                self._require_multiple("size", side)

    def __call__(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, h, w) float32 in [0, 1]."""
        return unit_range(self.resize(image).numpy())

    def resize(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, h, w) uint8, with antialias; one level from Pillow at most.

        torch resizes channels-last bytes about three times as fast as Pillow, in one thread.
        """
        to = self._geometry(*image.shape[:2])
        x = torch.from_numpy(_writable(image)).permute(2, 0, 1).unsqueeze(0)
        if self.angle:
            x = _rotate(x, self.angle)
        if x.shape[-2:] != to.resized:
            x = F.interpolate(x, to.resized, mode=self.interpolation, antialias=True)
        return _crop(x[0], to).contiguous()

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the network's input for a picture of this size."""
        to = self._geometry(height, width)
        return to.height, to.width

    def mask_to_input(self, mask: np.ndarray) -> Tensor:
        """(H, W) bool -> (h, w) bool, nearest, through the same geometry as the picture.

        A region smaller than a pixel of the input can vanish; the label does not rest on it. With
        an `angle`, pixels that a region covers in part are True, too.
        """
        if self.angle:
            return self.resize(255 * mask[..., None].astype(np.uint8))[0] > 0
        to = self._geometry(*mask.shape)
        x = torch.from_numpy(np.ascontiguousarray(mask)).to(torch.uint8)[None, None]
        if x.shape[-2:] != to.resized:
            x = F.interpolate(x, to.resized, mode="nearest-exact")
        return _crop(x[0, 0], to).bool().contiguous()

    def map_to_original(self, map: Tensor, size: tuple[int, int]) -> Tensor:
        """(..., h', w') map over the input -> (..., H, W) float over the whole picture, bilinear.

        What `center_crop` cut off gets the value of the nearest pixel inside. What the crop to a
        multiple cut off is not added: the map is stretched over the picture (AnomalyDINO's rule;
        a shift of less than `multiple` input pixels). The map may be coarser than the input.
        """
        to = self._geometry(*size)
        x = map.reshape(-1, 1, *map.shape[-2:]).float()
        if self.center_crop is not None:
            x = _resize_map(x, (to.height, to.width))
            bottom = to.resized[0] - to.top - to.height
            right = to.resized[1] - to.left - to.width
            x = F.pad(x, (to.left, right, to.top, bottom), mode="replicate")
        return _resize_map(x, size).reshape(*map.shape[:-2], *size)

    def map_beside_mask(
        self, map: Tensor, size: tuple[int, int], mask_size: tuple[int, int]
    ) -> Tensor:
        """(..., h', w') map over the input -> (..., *mask_size) over the whole picture, bilinear.

        For a comparison with the picture's mask, pixel by pixel. What `center_crop` cut off is
        -inf: nobody has looked there, so nothing there is found, nor raises an alarm.

        Args:
            size: (H, W) of the picture.
            mask_size: of its mask, which shows the whole picture.
        """
        x = map.reshape(-1, 1, *map.shape[-2:]).float()
        if self.center_crop is None:
            return _resize_map(x, mask_size).reshape(*map.shape[:-2], *mask_size)
        to = self._geometry(*size)
        top, bottom = _stretch(to.top, to.top + to.height, to.resized[0], mask_size[0])
        left, right = _stretch(to.left, to.left + to.width, to.resized[1], mask_size[1])
        whole = x.new_full((len(x), 1, *mask_size), -math.inf)
        whole[..., top:bottom, left:right] = _resize_map(x, (bottom - top, right - left))
        return whole.reshape(*map.shape[:-2], *mask_size)

    def box_to_original(self, box: Box, size: tuple[int, int]) -> Box:
        """A box in input pixels -> the smallest box in (H, W) pixels that covers it.

        Follows `map_to_original`; clipped to the picture, never empty.
        """
        to = self._geometry(*size)
        left, top, right, bottom = box
        # The area that map_to_original stretches over the picture, and where the input lies in it.
        whole_h, whole_w = to.resized if self.center_crop is not None else (to.height, to.width)
        new_left, new_right = _stretch(left + to.left, right + to.left, whole_w, size[1])
        new_top, new_bottom = _stretch(top + to.top, bottom + to.top, whole_h, size[0])
        return new_left, new_top, new_right, new_bottom

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON knows them; `from_json` gives an equal Transform."""
        settings = asdict(self)
        return settings | {"size": self.size if isinstance(self.size, int) else list(self.size)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Transform":
        """What `to_json` gave. InputError for a name that is no setting."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise InputError(f"unknown transform setting '{unknown[0]}'; known: {', '.join(known)}")
        size = settings.get("size", cls.size)
        size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
        return cls(**{**settings, "size": size})

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _require_multiple(self, name: str, side: int) -> None:
        if side % self.multiple:
            below = side // self.multiple * self.multiple
            near = [str(n) for n in (below, below + self.multiple) if n]
            raise InputError(
                f"{name} must be a multiple of {self.multiple}, got {side}; use {' or '.join(near)}"
            )

    def _geometry(self, height: int, width: int) -> _Geometry:
        h, w = self._sides
        if self.keep_aspect:
            short, cap = h, MAX_ASPECT * h
            h = short if height <= width else min(short * height // width, cap)
            w = short if width <= height else min(short * width // height, cap)
        if self.center_crop is not None:
            side = self.center_crop
            # torchvision's rounding of half a pixel
            return _Geometry((h, w), round((h - side) / 2), round((w - side) / 2), side, side)
        return _Geometry((h, w), 0, 0, h - h % self.multiple, w - w % self.multiple)


def unit_range(image: np.ndarray) -> Tensor:
    """uint8 of any shape -> float32 in [0, 1], a new tensor.

    By numpy, in one thread: torch would wake its team of threads for this little work, and on a
    busy machine their barrier waits behind the threads that read (three to twenty times as long).
    """
    return torch.from_numpy(np.divide(image, np.float32(255), dtype=np.float32))


def _rotate(x: Tensor, angle: float) -> Tensor:
    """(1, C, H, W) uint8 turned about (W/2, H/2), bilinear, mirrored at the borders
    (reflect-101)."""
    height, width = x.shape[-2:]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    row = torch.arange(height, dtype=torch.float32)[:, None] - height / 2
    column = torch.arange(width, dtype=torch.float32)[None, :] - width / 2
    source_column = cos * column - sin * row + width / 2
    source_row = sin * column + cos * row + height / 2
    grid = torch.stack(
        [2 * source_column / max(width - 1, 1) - 1, 2 * source_row / max(height - 1, 1) - 1], dim=-1
    )
    turned = F.grid_sample(x.float(), grid[None], padding_mode="reflection", align_corners=True)
    return (
        turned.round_().clamp_(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    )


def _crop(x: Tensor, to: _Geometry) -> Tensor:
    return x[..., to.top : to.top + to.height, to.left : to.left + to.width]


def _writable(image: np.ndarray) -> np.ndarray:
    """torch takes no negative strides, and warns of arrays that it could not write to."""
    image = np.ascontiguousarray(image)
    return image if image.flags.writeable else image.copy()


def _resize_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _stretch(start: int, stop: int, length: int, new_length: int) -> tuple[int, int]:
    """Whole pixels that cover [start, stop) after scaling by new_length / length; at least one."""
    new_start = min(max(start * new_length // length, 0), new_length - 1)
    new_stop = min(-(-stop * new_length // length), new_length)
    return new_start, max(new_stop, new_start + 1)
