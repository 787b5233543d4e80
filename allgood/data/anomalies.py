"""The sources of made-up anomalies: where each lies, and the new pixels there.

Perlin masks follow Zavrtanik et al., "DRAEM", 2021; augmented and shuffled source pictures Yang et
al., "MemSeg", 2023. Ours: scratch, spot, stain, and textures where no folder of them is given.

Letters: H W pixels, S = max(H, W), r lattice cells, n pixels under a mask. Lengths are written for
pictures whose shorter side is 256 pixels, and scale with it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from allgood.data.operators import augment


class Scene(NamedTuple):
    """What a source works on; the settings are those of SynthesisConfig."""

    image: np.ndarray
    allowed: np.ndarray | None
    """(H, W) bool: where anomalies may lie; None: anywhere."""
    generator: Generator
    operators: int
    tiles: int
    noise_threshold: float
    few_regions: float
    max_blend: float
    read_texture: Callable[[tuple[int, int], Generator], np.ndarray] | None
    """(H, W) -> a texture of the user's folder; None: textures are procedural."""

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    @property
    def scale(self) -> float:
        return min(self.size) / 256

    def place(self) -> np.ndarray:
        """(row, column) of a pixel where an anomaly may lie."""
        height, width = self.size
        if self.allowed is None:
            return self.generator.integers((height, width))
        inside = np.flatnonzero(self.allowed)
        return np.array(divmod(inside[self.generator.integers(len(inside))], width))


Patch = tuple[np.ndarray, np.ndarray]
"""mask (H, W) bool and the new pixels under it, (n, 3) float32, row by row."""


def perlin_noise(size: int, cells: tuple[int, int], generator: Generator) -> np.ndarray:
    """One octave of gradient noise over a square, about -1 to 1: (S, S) float32.

    At a point with the offset (y, x) inside its cell, f(t) = 6t^5 - 15t^4 + 10t^3:
    sqrt(2) * sum over the cell's corners of  f-weight_y * f-weight_x * (g_y d_y + g_x d_x),
    which is two products of small matrices, as each factor depends on the row or the column alone.

    Args:
        size: S, any number of pixels.
        cells: lattice cells down and across.
    """
    angle = generator.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    weight_y, offset_y = _corners(size, cells[0])  # (S, r + 1)
    weight_x, offset_x = _corners(size, cells[1])
    noise = offset_y @ np.sin(angle) @ weight_x.T + weight_y @ np.cos(angle) @ offset_x.T
    return noise * np.float32(math.sqrt(2))


def _corners(size: int, cells: int) -> Patch:
    """Per pixel and lattice line: the fade weight, and weight * distance; zero but for two lines.

    Returns:
        (S, r + 1) float32 each.
    """
    t, cell = np.modf(np.arange(size) * (cells / size))
    row, line = np.arange(size), cell.astype(np.int64)
    fade = t**3 * (t * (6 * t - 15) + 10)
    weight, offset = np.zeros((2, size, cells + 1), np.float32)
    weight[row, line], weight[row, line + 1] = 1 - fade, fade
    offset[row, line], offset[row, line + 1] = (1 - fade) * t, fade * (t - 1)
    return weight, offset


def perlin_mask(size: tuple[int, int], threshold: float, generator: Generator) -> np.ndarray:
    """(H, W) bool: where noise of 1 to 32 cells a side, turned by any angle, exceeds a threshold.

    The noise covers the square of the longer side, so that blobs are not stretched in a long
    picture; corners that the turned square does not cover stay empty.
    """
    height, width = size
    side = max(size)
    cells = 2 ** generator.integers(0, 6, 2)
    noise = Image.fromarray(perlin_noise(side, (int(cells[0]), int(cells[1])), generator))
    turned = np.asarray(noise.rotate(generator.uniform(-90, 90), Image.Resampling.BILINEAR))
    top, left = (side - height) // 2, (side - width) // 2
    return turned[top : top + height, left : left + width] > threshold


# -- sources -----------------------------------------------------------------------------------


def _self_augment(scene: Scene) -> Patch:
    return _under_perlin(scene, augment(scene.image, scene.operators, scene.generator))


def _tile_shuffle(scene: Scene) -> Patch:
    changed = augment(scene.image, scene.operators, scene.generator)
    return _under_perlin(scene, shuffle_tiles(changed, scene.tiles, scene.generator))


def _texture(scene: Scene) -> Patch:
    make = scene.read_texture or procedural_texture
    changed = make(scene.size, scene.generator)
    return _under_perlin(scene, augment(changed, scene.operators, scene.generator))


def _under_perlin(scene: Scene, changed: np.ndarray) -> Patch:
    """beta I + (1 - beta) A under a Perlin mask, beta in U(0, max_blend)."""
    mask = perlin_mask(scene.size, scene.noise_threshold, scene.generator)
    if scene.allowed is not None:
        mask = mask & scene.allowed
    if scene.generator.random() < scene.few_regions:
        mask = _few_regions(mask, scene.generator)
    beta = np.float32(scene.generator.uniform(0, scene.max_blend))
    inside = np.flatnonzero(mask)
    good, other = (each.reshape(-1, 3)[inside] for each in (scene.image, changed))
    return mask, beta * good + (1 - beta) * other


def _few_regions(mask: np.ndarray, generator: Generator) -> np.ndarray:
    """One to three regions of a mask, large ones more likely."""
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return mask
    inside = labels[mask]
    keep = np.zeros(count + 1, bool)
    keep[inside[generator.integers(len(inside), size=generator.integers(1, 4))]] = True
    return keep[labels]


def _scratch(scene: Scene) -> Patch:
    """One to four lines side by side; each wanders, the more the more it looks like a crack."""
    generator, scale = scene.generator, scene.scale
    bend = 10 ** generator.uniform(-2.2, -0.25)  # radians per step
    steps = 28
    length = scale * _log_uniform(18, 200, generator)
    width = scale * _log_uniform(0.8, 4.5, generator)
    centre, heading = scene.place(), generator.uniform(0, 2 * np.pi)
    canvas = _Canvas(scene.size)
    for _ in range(generator.choice([1, 1, 1, 2, 3, 4])):
        angle = heading + generator.normal(0, bend, steps).cumsum()
        path = np.stack([np.sin(angle), np.cos(angle)], axis=1).cumsum(axis=0) * (length / steps)
        path += centre - path.mean(axis=0)
        taper = np.sin(np.linspace(0.25, np.pi - 0.25, steps)) * generator.uniform(0.7, 1.2, steps)
        canvas.line(path, width * taper)
        # the next one lies beside it, a few widths off
        across = np.array([np.cos(heading), -np.sin(heading)])
        centre = centre + across * generator.normal(0, 4 * width + 3 * scale)
    return _tinted(scene, canvas.coverage())


def _spot(scene: Scene) -> Patch:
    """One to eight small outlines around one place: pores, pitting, grains of dirt."""
    generator, scale = scene.generator, scene.scale
    count = generator.choice([1, 1, 1, 2, 3, 5, 8])
    radius = scale * _log_uniform(2.2, 14 / count**0.3, generator)
    centre = scene.place()
    canvas = _Canvas(scene.size)
    for _ in range(count):
        canvas.fill(_outline(centre, radius * generator.uniform(0.6, 1.3), 3.0, generator))
        step = generator.normal(0, 2.5 * radius, 2)
        centre = (centre + step).clip(0, np.array(scene.size) - 1)
    return _tinted(scene, canvas.coverage())


def _tinted(scene: Scene, coverage: np.ndarray) -> Patch:
    """Darker (2 in 3) or brighter where `coverage` (H, W) in [0, 1] says, uneven inside."""
    mask = coverage > 0.2
    before = scene.image[mask].astype(np.float32)
    share = scene.generator.uniform(0.45, 0.95) * coverage[mask][:, None]
    share = share * scene.generator.uniform(0.75, 1.0, (len(before), 1)).astype(np.float32)
    target = 0.0 if scene.generator.random() < 2 / 3 else 255.0
    return mask, before + share * (target - before)


def _stain(scene: Scene) -> Patch:
    """One larger outline, 12 to 60 pixels in radius: its pixels lose texture, brightness changes,
    and in pictures with colour the colour does."""
    generator, scale = scene.generator, scene.scale
    canvas = _Canvas(scene.size)
    radius = scale * _log_uniform(12, 60, generator)
    canvas.fill(_outline(scene.place(), radius, 4.0, generator))
    coverage = canvas.coverage(blur=scale * _log_uniform(0.3, 6, generator))
    mask = coverage > 0.1
    blurred = Image.fromarray(scene.image).filter(ImageFilter.BoxBlur(max(1.0, 3 * scale)))
    flat = generator.uniform(0, 1)
    before = scene.image[mask].astype(np.float32)
    after = flat * np.asarray(blurred)[mask] + (1 - flat) * before
    gain = generator.uniform(0.3, 0.8) if generator.random() < 0.6 else generator.uniform(1.25, 1.6)
    after = after * (gain * generator.normal(1, 0.1, 3)).astype(np.float32)
    return mask, before + coverage[mask][:, None] * (after - before)


SOURCES: dict[str, Callable[[Scene], Patch]] = {
    "self_augment": _self_augment,
    "tile_shuffle": _tile_shuffle,
    "texture": _texture,
    "scratch": _scratch,
    "spot": _spot,
    "stain": _stain,
}
"""Name, also of its weight in SynthesisConfig -> mask and the new pixels under it."""


def shuffle_tiles(image: np.ndarray, tiles: int, generator: Generator) -> np.ndarray:
    """A grid of tiles x tiles equal tiles in random order: (H, W, 3) uint8.

    Where a side is no multiple of `tiles`, the rows or columns that are left over stay in place.
    """
    height, width = image.shape[0] // tiles, image.shape[1] // tiles
    whole = image[: height * tiles, : width * tiles]
    grid = (
        whole.reshape(tiles, height, tiles, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    )
    grid = grid[generator.permutation(len(grid))].reshape(tiles, tiles, height, width, 3)
    shuffled = image.copy()
    shuffled[: height * tiles, : width * tiles] = grid.swapaxes(1, 2).reshape(whole.shape)
    return shuffled


def procedural_texture(size: tuple[int, int], generator: Generator) -> np.ndarray:
    """Clouds of four octaves, or a warped grating, between two random colours: (H, W, 3) uint8."""
    height, width = size
    side = max(size)
    cells = 2 ** int(generator.integers(1, 4))
    noise = perlin_noise(side, (cells, cells), generator)
    if generator.random() < 0.5:
        for octave in (1, 2, 3):
            finer = cells << octave
            noise = noise + perlin_noise(side, (finer, finer), generator) * 0.6**octave
        ramp = noise * 0.5 + 0.5
    else:
        angle, waves = generator.uniform(0, np.pi), _log_uniform(4, 40, generator)
        across = np.linspace(0, 1, side, dtype=np.float32)
        phase = across[:, None] * math.sin(angle) + across[None, :] * math.cos(angle)
        ramp = 0.5 + 0.5 * np.sin(2 * np.pi * waves * phase + generator.uniform(0, 3) * noise)
    ramp = ramp[:height, :width, None].clip(0, 1).astype(np.float32)
    colours = generator.uniform(0, 255, (2, 3)).astype(np.float32)
    return (colours[0] + ramp * (colours[1] - colours[0])).astype(np.uint8)


class _Canvas:
    """Shapes drawn at twice the size, for smooth edges. Points are (row, column)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._image = Image.new("L", (2 * size[1], 2 * size[0]))
        self._draw = ImageDraw.Draw(self._image)

    def line(self, path: np.ndarray, width: np.ndarray) -> None:
        points = [(2 * column + 1, 2 * row + 1) for row, column in path.tolist()]
        for start, end, thick in zip(points, points[1:], width.tolist(), strict=False):
            self._draw.line([start, end], fill=255, width=max(1, round(2 * thick)))

    def fill(self, outline: np.ndarray) -> None:
        self._draw.polygon([(2 * x + 1, 2 * y + 1) for y, x in outline.tolist()], fill=255)

    def coverage(self, *, blur: float = 0.0) -> np.ndarray:
        """(H, W) float32 in [0, 1]."""
        small = self._image.reduce(2)
        if blur:
            small = small.filter(ImageFilter.BoxBlur(blur))
        return np.asarray(small, np.float32) / 255


def _outline(
    centre: np.ndarray, radius: float, max_stretch: float, generator: Generator
) -> np.ndarray:
    """(48, 2) points around a centre: a circle with waves in its radius, stretched and turned."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    wave = np.arange(2, 9)
    height = generator.normal(0, 0.35, 7) / wave
    ripple = np.cos(angle[:, None] * wave + generator.uniform(0, 2 * np.pi, 7)) @ height
    around = radius * np.maximum(1 + ripple, 0.3)
    stretch, turn = math.sqrt(_log_uniform(1, max_stretch, generator)), generator.uniform(0, np.pi)
    along, across = around * np.cos(angle) * stretch, around * np.sin(angle) / stretch
    cos, sin = math.cos(turn), math.sin(turn)
    return centre + np.stack([along * sin + across * cos, along * cos - across * sin], axis=1)


def _log_uniform(low: float, high: float, generator: Generator) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))
