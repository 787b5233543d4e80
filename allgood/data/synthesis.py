"""Made-up anomalies with their masks: what CostFilter learns from, and a test set for who has none.

Paper: the CostFilter-AD code, whose steps follow MemSeg and DRAEM. Ours: three sources that look
like real defects, the automatic foreground, a draw is repeated until one can see it, and grey
pictures stay grey. `reference_config` leaves all that out.

picture ──source──► mask and new pixels ──foreground, visible regions──► Synthetic

Letters: H W pixels, n pixels under a mask.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from allgood.data.anomalies import SOURCES, Scene
from allgood.data.files import pictures_below
from allgood.data.foreground import Foreground, foreground_mask
from allgood.data.images import read_image
from allgood.data.operators import LUMA, OPERATORS
from allgood.types import InputError
from allgood.wording import shown

MIN_SIDE = 16
"""Pixels; in smaller pictures lines and spots have no meaning."""

_ATTEMPTS = 8


@dataclass(frozen=True)
class SynthesisConfig:
    """What anomalies are made, and how often. The six sources are weights, relative to each other;
    0 switches one off."""

    clean_probability: float = 0.5
    """How often a draw is the picture as it is, with an empty mask."""
    self_augment: float = 1.0
    """Weight: the picture itself, changed by operators, under a Perlin mask."""
    tile_shuffle: float = 1.0
    """Weight: the same, cut into tiles that change places."""
    texture: float = 1.0
    """Weight: a foreign texture under a Perlin mask; procedural where no folder is given."""
    scratch: float = 1.0
    """Weight: dark or bright lines, from a straight scratch to a jagged crack."""
    spot: float = 1.0
    """Weight: small pits or grains, alone or in a cluster."""
    stain: float = 1.0
    """Weight: a patch of other brightness, colour or roughness with a soft edge."""
    operators: int = 3
    """Of the ten, drawn without replacement for each source picture under a Perlin mask."""
    tiles: int = 8
    """Tiles per side, of tile_shuffle."""
    noise_threshold: float = 0.3
    """A Perlin mask is where the noise lies above this."""
    few_regions: float = 0.5
    """How often only one to three regions of a Perlin mask stay; few parts fail all over."""
    max_blend: float = 0.8
    """Largest share of the good picture that still shows through under a Perlin mask, beta."""
    min_change: float = 12.0
    """Grey levels (of 255) by which a region must differ to be seen; a region that does not is put
    back to good. 0 switches the check off."""
    min_area: float = 2e-4
    """Smallest region, as a share of the picture; smaller ones are put back to good."""
    max_area: float = 0.5
    """Largest mask, as a share of the picture; a larger one is drawn anew."""
    keep_grey: bool = True
    """Anomalies of a picture without colour have none, so that colour alone tells nothing."""

    def __post_init__(self) -> None:
        for name in ("clean_probability", "few_regions", "max_blend", "min_area"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name} must lie between 0 and 1, got {value:g}")
        if not self.min_area < self.max_area <= 1:
            raise InputError(f"max_area must lie between min_area and 1, got {self.max_area:g}")
        for name in (*SOURCES, "min_change"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0, got {value:g}")
        if not any(getattr(self, name) for name in SOURCES):
            raise InputError(f"all sources have weight 0: raise one of {', '.join(SOURCES)}")
        if not -1 < self.noise_threshold < 1:
            raise InputError(
                f"noise_threshold must lie between -1 and 1, got {self.noise_threshold:g}"
            )
        if not 1 <= self.operators <= len(OPERATORS):
            raise InputError(f"operators must lie between 1 and 10, got {self.operators}")
        if not 2 <= self.tiles <= MIN_SIDE:
            raise InputError(f"tiles must lie between 2 and {MIN_SIDE}, got {self.tiles}")


def reference_config() -> SynthesisConfig:
    """What the published CostFilter-AD numbers were trained on: half self-augment, half shuffled
    tiles, no foreign texture, nothing checked or kept grey."""
    return SynthesisConfig(
        **dict.fromkeys(("texture", "scratch", "spot", "stain"), 0.0),  # type: ignore[arg-type]
        few_regions=0.0,
        min_change=0.0,
        min_area=0.0,
        max_area=1.0,
        keep_grey=False,
    )


class Synthetic(NamedTuple):
    """One draw."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB; the picture itself where the draw is clean."""
    mask: np.ndarray
    """(H, W) bool, True where the anomaly is. Every other pixel is the picture's own."""
    source: str
    """Name in SOURCES, `fallback`, or empty where the draw is clean."""


class Synthesizer:
    """Draws anomalies into good pictures; see the module docstring. Threads may share one."""

    def __init__(
        self,
        config: SynthesisConfig,
        *,
        seed: int = 0,
        textures: Path | None = None,
        foreground: Mapping[str, Foreground] | None = None,
    ) -> None:
        """
        Args:
            textures: a folder of pictures to take textures from; None: they are procedural.
            foreground: per category, as `choose_foreground` or a person chose it; `off` for
                the others.

        Raises:
            InputError: the folder is missing or holds no picture.
        """
        self.config = config
        self.seed = seed
        self.foreground = dict(foreground or {})
        self.textures: tuple[Path, ...] = ()
        if textures is not None:
            if not Path(textures).is_dir():
                raise InputError(f"{shown(textures)}: no such folder of textures; check the path")
            self.textures = tuple(pictures_below(Path(textures)))
            if not self.textures:
                raise InputError(
                    f"{shown(textures)}: holds no picture; name another folder of textures, or "
                    "none for procedural ones"
                )
        self.unreadable: dict[Path, str] = {}
        """Textures that could not be read so far, and why; others were taken instead."""
        self._names = list(SOURCES)
        weights = np.array([getattr(config, name) for name in self._names], np.float64)
        self._shares = weights / weights.sum()

    def draw(self, image: np.ndarray, *, category: str, picture: str, index: int) -> Synthetic:
        """One draw: a pure function of config, seed, textures, foreground and the arguments.

        A region of the mask stays if it is large enough and visible: its mean colour moves by
        min_change, or its pixels change by that much more than good neighbours differ. If none
        stays, or too much, the draw is repeated; after eight times a spot with the highest bit of
        its pixels flipped, visible on everything, ends it. So the mask of a draw that is not clean
        is never empty.

        Args:
            image: (H, W, 3) uint8 RGB, left as it is.
            category: says which foreground applies.
            picture: names the picture, as `Sample.id` does.
            index: of the draw; each gives another anomaly.

        Raises:
            InputError: the picture is smaller than 16 pixels, or no texture can be read.
        """
        if min(image.shape[:2]) < MIN_SIDE:
            raise InputError(
                f"a picture of {image.shape[1]}x{image.shape[0]} pixels is too small for an "
                f"anomaly: {MIN_SIDE} a side is the least"
            )
        generator = seeded(self.seed, category, picture, int(index))
        if generator.random() < self.config.clean_probability:
            return Synthetic(image, np.zeros(image.shape[:2], bool), "")
        scene = Scene(
            image=image,
            allowed=self._allowed(image, category),
            generator=generator,
            operators=self.config.operators,
            tiles=self.config.tiles,
            noise_threshold=self.config.noise_threshold,
            few_regions=self.config.few_regions,
            max_blend=self.config.max_blend,
            read_texture=self._read_texture if self.textures else None,
        )
        grey = self.config.keep_grey and _is_grey(image)
        for _ in range(_ATTEMPTS):
            source = self._names[generator.choice(len(self._names), p=self._shares)]
            mask, pixels = SOURCES[source](scene)
            if grey:
                pixels = np.repeat((pixels @ LUMA)[:, None], 3, axis=1)
            drawn = _seen(scene, mask, pixels.round().clip(0, 255).astype(np.uint8), self.config)
            if drawn is not None:
                return Synthetic(*drawn, source)
        return Synthetic(*_fallback(scene), "fallback")

    def _allowed(self, image: np.ndarray, category: str) -> np.ndarray | None:
        """(H, W) bool, or None for all. A foreground of nearly nothing is no foreground."""
        mode = self.foreground.get(category, "off")
        if mode == "off":
            return None
        mask = foreground_mask(image, mode)
        return mask if mask.mean() > 0.01 else None

    def _read_texture(self, size: tuple[int, int], generator: Generator) -> np.ndarray:
        """(H, W, 3) uint8: a texture of the folder; of a broken one, the next that is whole."""
        first = int(generator.integers(len(self.textures)))
        for path in (*self.textures[first:], *self.textures[:first]):
            try:
                return _resized_texture(path, size)
            except InputError as error:
                self.unreadable[path] = str(error)
        raise InputError(
            f"none of the {len(self.textures)} textures could be read; the first: "
            f"{self.unreadable[self.textures[0]]}"
        )


def seeded(seed: int, *parts: str | int) -> Generator:
    """A generator that depends on the parts alone: not on threads, processes or order."""
    text = repr((seed, *parts)).encode("utf-8", "surrogateescape")
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest()))


# -- whether one sees it -------------------------------------------------------------------------


def _seen(
    scene: Scene, mask: np.ndarray, pixels: np.ndarray, config: SynthesisConfig
) -> tuple[np.ndarray, np.ndarray] | None:
    """The picture and the mask, of the regions that count (see `draw`); None for a draw in vain."""
    if scene.allowed is not None:
        pixels = pixels[scene.allowed[mask]]
        mask = mask & scene.allowed
    if not len(pixels):
        return None
    before = scene.image[mask].astype(np.float32)  # (n, 3)
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    region = labels[mask] - 1  # (n,)
    area = np.bincount(region)
    keep = area >= config.min_area * mask.size
    if config.min_change:
        change = pixels - before
        moved = np.max([abs(np.bincount(region, change[:, c])) for c in range(3)], axis=0)
        rough = np.abs(before - _neighbours(scene.image, mask)).mean(axis=1)
        beyond = np.bincount(region, np.abs(change).mean(axis=1) - rough)
        keep &= np.maximum(moved, beyond) >= config.min_change * area
    kept = keep[region]
    if not kept.any() or kept.sum() > config.max_area * mask.size:
        return None
    mask = mask.copy()
    mask[mask] = kept
    image = scene.image.copy()
    image[mask] = pixels[kept]
    return image, mask


def _neighbours(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(n, 3): the pixels four down and four to the right (at 256), mirrored at the edges."""
    height, width = mask.shape
    step = max(2, min(mask.shape) // 64)
    row, column = np.nonzero(mask)
    row = np.where(row + step < height, row + step, row - step)
    column = np.where(column + step < width, column + step, column - step)
    return image[row, column]


def _fallback(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """A disc whose pixels have their highest bit flipped, a change of 128 on every picture."""
    centre, radius = scene.place(), min(scene.size) / 16
    row, column = np.ogrid[: scene.size[0], : scene.size[1]]
    mask = (row - centre[0]) ** 2 + (column - centre[1]) ** 2 <= radius**2
    if scene.allowed is not None:
        mask &= scene.allowed
    image = scene.image.copy()
    image[mask] ^= 128
    return image, mask


def _is_grey(image: np.ndarray) -> bool:
    red = image[..., 0]
    return np.array_equal(red, image[..., 1]) and np.array_equal(red, image[..., 2])


@lru_cache(maxsize=64)  # a small folder of large pictures is then read once
def _resized_texture(path: Path, size: tuple[int, int]) -> np.ndarray:
    texture = Image.fromarray(read_image(path))
    return np.asarray(texture.resize(size[::-1], Image.Resampling.BILINEAR, reducing_gap=2))
