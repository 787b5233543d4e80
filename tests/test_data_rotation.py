"""Rotated copies of few-shot references, against exact turns and a slow bilinear loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from allgood.data.transforms import Transform, _rotate


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def turned(image: np.ndarray, angle: float) -> np.ndarray:
    return (
        _rotate(torch.from_numpy(image).permute(2, 0, 1)[None], angle)[0].permute(1, 2, 0).numpy()
    )


def test_no_angle_is_the_identity() -> None:
    image = photo(20, 31)
    assert np.array_equal(turned(image, 0), image)
    assert torch.equal(
        Transform((20, 31), angle=0.0)(image), torch.from_numpy(image).permute(2, 0, 1) / 255
    )


@pytest.mark.parametrize("side", [12, 13])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_exact_and_counter_clockwise(side: int, quarters: int) -> None:
    """About (W/2, H/2), and so by one pixel off np.rot90, which turns about (W-1)/2."""
    image = photo(side, side)
    got = turned(image, 90 * quarters)
    expected = np.rot90(image, quarters)
    rows, columns = {1: (1, 0), 2: (1, 1), 3: (0, 1)}[quarters]
    inside = expected[: side - rows, : side - columns]
    assert np.array_equal(got[rows:, columns:], inside)


def reflect101(index: int, size: int) -> int:
    """d c b | a b c d | c b a"""
    period = 2 * (size - 1)
    index %= period
    return index if index < size else period - index


@pytest.mark.parametrize("size, angle", [((17, 23), 45), ((24, 16), 135), ((15, 15), 30)])
def test_corners_are_mirrored_without_repeating_the_edge(size: tuple[int, int], angle: int) -> None:
    """OpenCV's warpAffine as a loop: rotation about (W/2, H/2), bilinear, BORDER_REFLECT_101."""
    height, width = size
    image = photo(height, width)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    expected = np.zeros(image.shape)
    for row in range(height):
        for column in range(width):
            dx, dy = column - width / 2, row - height / 2
            x, y = cos * dx - sin * dy + width / 2, sin * dx + cos * dy + height / 2
            left, top = math.floor(x), math.floor(y)
            for i, wy in ((top, top + 1 - y), (top + 1, y - top)):
                for j, wx in ((left, left + 1 - x), (left + 1, x - left)):
                    value = image[reflect101(i, height), reflect101(j, width)]
                    expected[row, column] += wy * wx * value
    difference = np.abs(turned(image, angle).astype(float) - expected)
    assert difference.max() <= 0.51  # rounding to whole numbers


def test_the_frame_stays_and_the_picture_is_turned_before_resizing() -> None:
    image = photo(40, 60)
    transform = Transform(32, keep_aspect=True, multiple=8)
    copy = replace(transform, angle=45.0)
    assert copy(image).shape == transform(image).shape == (3, 32, 48)
    torch.testing.assert_close(copy(image), transform(turned(image, 45)))


@pytest.mark.parametrize("angle", range(45, 360, 45))
@pytest.mark.parametrize("transform", [Transform(64), Transform(32), Transform(64, center_crop=48)])
def test_an_ignored_region_turns_with_its_picture(transform: Transform, angle: int) -> None:
    """A white region on black: where any of it is seen, nobody looks."""
    region = np.zeros((64, 64), bool)
    region[4:24, 8:40] = True
    copy = replace(transform, angle=float(angle))
    seen = copy(np.repeat(255 * region[..., None].astype(np.uint8), 3, axis=2))[0]
    assert torch.equal(copy.mask_to_input(region), seen > 0)
