"""Anomaly maps painted over pictures: heat where the map is high, the plain picture elsewhere.

Colours and opacity come from one table of 256 steps, so a picture of 12 megapixels takes well under
a second, and pixels without heat are the picture's own to the last bit.

Letters: H W pixels.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are just outside the box."""

# Upper part of matplotlib's "inferno": lightness rises evenly, readable for the colour-blind.
_HEAT = np.array(
    [
        (0x42, 0x0A, 0x68),
        (0x6A, 0x17, 0x6E),
        (0x93, 0x26, 0x67),
        (0xBC, 0x37, 0x54),
        (0xDD, 0x51, 0x3A),
        (0xF3, 0x78, 0x19),
        (0xFC, 0xA5, 0x0A),
        (0xF6, 0xD7, 0x46),
    ],
    np.float64,
)
_LARGEST_OPACITY = 0.62
_FULL_AT = 0.6  # share of the way from low to high at which the heat is at its most opaque
_LINE_COLOUR = np.array((0x00, 0xE5, 0xFF), np.uint8)  # cyan: not on the heat scale
_BLOCK_PIXELS = 1 << 18  # blended at a time, so that intermediates stay in a core's cache


def heat_overlay(
    image: Picture,
    anomaly_map: NDArray[np.float32],
    *,
    low: float,
    high: float,
    boxes: Iterable[Box] = (),
) -> Picture:
    """Blend a heat map over a picture and outline boxes.

    Args:
        image: (H, W, 3) uint8 RGB; left as it is.
        anomaly_map: (H, W), higher is more anomalous; infinities allowed.
        low: score up to which the picture shows unchanged.
        high: score from which the heat is strongest; about the alarm threshold or above.
        boxes: outlined in cyan, the line scaled with the picture.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        ValueError: shapes differ, low >= high, or the map holds NaN.
    """
    _check_picture(image)
    if anomaly_map.shape != image.shape[:2]:
        raise ValueError(
            f"anomaly_map has shape {anomaly_map.shape} but the image {image.shape}: "
            "resize the map to the image's height and width"
        )
    if not low < high:
        raise ValueError(f"low must be below high, got low={low} and high={high}")
    painted = image.copy()
    opacity, colour = _heat_table()
    rows = max(1, _BLOCK_PIXELS // max(1, image.shape[1]))
    for top in range(0, len(image), rows):
        step = _heat_steps(anomaly_map[top : top + rows], low, high)  # (h, W) in 0..255
        hot = step > 0
        if not hot.any():
            continue
        step, block = step[hot], painted[top : top + rows]
        block[hot] = (block[hot] * (255 - opacity[step])[:, None] + colour[step] + 127) // 255
    for box in boxes:
        _outline_box(painted, box)
    return painted


def mask_outline(image: Picture, mask: NDArray[np.bool_]) -> Picture:
    """A copy of the picture with the mask's contour in cyan, drawn just outside the mask.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W), nonzero where defective.
    """
    _check_picture(image)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape} but the image {image.shape}")
    painted = image.copy()
    inside = mask != 0
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not len(rows):
        return painted
    line = line_width(image)
    near = (  # where the contour can be
        slice(max(0, rows[0] - line), rows[-1] + line + 1),
        slice(max(0, columns[0] - line), columns[-1] + line + 1),
    )
    grown = inside[near].copy()
    for _ in range(line):
        grown[1:] |= grown[:-1]
        grown[:-1] |= grown[1:]
        grown[:, 1:] |= grown[:, :-1]
        grown[:, :-1] |= grown[:, 1:]
    painted[near][grown & ~inside[near]] = _LINE_COLOUR
    return painted


def shrink(picture: Picture, longest: int = 320) -> Picture:
    """The picture with its longer side at most `longest` pixels, averaged; as it is if smaller."""
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest))
    return np.asarray(image)


def shrink_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask (H, W) at a smaller (height, width): what is defective in part is defective."""
    share = Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)
    return np.asarray(share) > 0


def line_width(image: Picture) -> int:
    """Pixels of a line that looks equally thick on every picture: 1/200 of the longer side."""
    return max(1, round(max(image.shape[:2]) / 200))


def _check_picture(image: Picture) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")


def _heat_steps(scores: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """0 up to `low`, 255 from `high`; any score above `low` gets at least 1."""
    heat = np.asarray(scores, np.float32)
    if np.isnan(heat).any():
        raise ValueError("anomaly_map holds NaN: check its detector")
    scale = np.float32(254.0 / (high - low))
    step = np.clip((np.clip(heat, low, high) - np.float32(low)) * scale + 1, 1, 255)
    return np.where(heat > low, step, 0).astype(np.uint8)


def _heat_table() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Opacity (256,) in 0..255 and colour (256, 3) multiplied by it, per step of heat."""
    heat = np.linspace(0, 1, 256)
    opacity = np.round(255 * _LARGEST_OPACITY * np.minimum(heat / _FULL_AT, 1))
    places = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(heat, places, channel) for channel in _HEAT.T], axis=1)
    return opacity.astype(np.uint16), np.round(colour * opacity[:, None]).astype(np.uint16)


def _outline_box(picture: Picture, box: Box) -> None:
    """Draw around a box, or along the picture's edge where the box touches it; in place."""
    height, width = picture.shape[:2]
    line = line_width(picture)
    left, top = (max(0, edge - line) for edge in box[:2])
    right, bottom = min(width, box[2] + line), min(height, box[3] + line)
    if left >= right or top >= bottom:
        return  # outside the picture
    inside = picture[top + line : bottom - line, left + line : right - line].copy()
    picture[top:bottom, left:right] = _LINE_COLOUR
    if inside.size:
        picture[top + line : bottom - line, left + line : right - line] = inside
