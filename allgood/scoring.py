"""Anomaly maps and image scores: match -> prediction; map -> smoothed map, image score.

Letters: B images, H W pixels, h w patches.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.types import Detector, Prediction


def predict_from_map(
    detector: Detector,
    image: Tensor,
    category: Tensor | None,
    image_score: Callable[[Tensor], Tensor],
    *,
    ignore: Tensor | None,
    map_size: tuple[int, int] | None,
    score_size: tuple[int, int] | None = None,
) -> Prediction:
    """`Detector.predict` of those that score their own map, (B, 1, *score_size) -> (B,); a
    `score_size` of None is the image's."""
    size = (image.shape[-2], image.shape[-1])
    map_size, score_size = map_size or size, score_size or size
    match = detector.match(image, category)
    scored = shown = detector.anomaly_map(match.host_map, size, ignore=ignore, map_size=score_size)
    if map_size != score_size:
        shown = detector.anomaly_map(match.host_map, size, ignore=ignore, map_size=map_size)
    return Prediction(shown, image_score(scored), match.category)


def gaussian_smooth(anomaly_map: Tensor, sigma: float) -> Tensor:
    """Gaussian blur as SciPy's `gaussian_filter` computes it, cut off at 4 sigma.

    At the border the map is mirrored, its edge repeated: c b a | a b c.

    Args:
        anomaly_map: (B, 1, H, W).
        sigma: standard deviation in pixels; 0 returns the map unchanged.

    Returns:
        (B, 1, H, W).
    """
    if sigma <= 0:
        return anomaly_map
    radius = int(4 * sigma + 0.5)
    kernel = gaussian_kernel(sigma, radius).to(anomaly_map)
    with torch.autocast(anomaly_map.device.type, enabled=False):  # half precision would make ties
        for axis in (-2, -1):
            size = anomaly_map.shape[axis]
            index = _reflected(torch.arange(-radius, size + radius), size).to(anomaly_map.device)
            padded = anomaly_map.index_select(axis, index)
            shape = (1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)
            anomaly_map = F.conv2d(padded, kernel.view(shape))
    return anomaly_map


def gaussian_kernel(sigma: float, radius: int) -> Tensor:
    """(2 * radius + 1,) float64 samples of a Gaussian, of sum 1."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return kernel / kernel.sum()


def gaussian_blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Gaussian blur of each channel of (B, C, H, W), as torchvision and kornia compute it.

    At the border the map is mirrored, its edge not repeated: c b | a b c.
    """
    rows = _blur_matrix(x.shape[-2], kernel_size, sigma).to(x)
    columns = _blur_matrix(x.shape[-1], kernel_size, sigma).to(x)
    with torch.autocast(x.device.type, enabled=False):  # products of distances stay float32
        return rows @ x @ columns.T


@lru_cache(maxsize=32)
def _blur_matrix(side: int, kernel_size: int, sigma: float) -> Tensor:
    """(side, side) float32: each row blurs one position. On a CPU two products of matrices beat two
    convolutions."""
    radius = kernel_size // 2
    kernel = gaussian_kernel(sigma, radius)[None, None]
    return axis_matrix(side, lambda x: F.conv1d(F.pad(x, (radius,) * 2, mode="reflect"), kernel))


def axis_matrix(size: int, step: Callable[[Tensor], Tensor]) -> Tensor:
    """What a linear step does along one axis, as a matrix.

    Args:
        step: (size, 1, size) float64, one unit vector per row, -> (size, 1, out).

    Returns:
        (out, size) float32.
    """
    with torch.inference_mode(False):  # may be kept between calls, so of use to any mode
        return step(torch.eye(size, dtype=torch.float64)[:, None])[:, 0].T.float().contiguous()


def _reflected(index: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) mirrored back, the edge repeated: c b a | a b c | c b a."""
    index = index.remainder(2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


def top_fraction_mean(anomaly_map: Tensor, fraction: float) -> Tensor:
    """Mean of the highest int(fraction * pixels) values, or the maximum where that count is 0.

    Args:
        anomaly_map: (B, ...).
        fraction: share of the values, in (0, 1].

    Returns:
        (B,).
    """
    flat = anomaly_map.flatten(1)
    count = max(1, math.floor(fraction * flat.shape[1]))
    return flat.topk(count, dim=1).values.mean(dim=1)


def highest_window_mean(anomaly_map: Tensor) -> Tensor:
    """The highest mean over a square of 16 x 16 pixels (UniAD): (B, 1, H, W) -> (B,).

    A side of the map that is shorter than the square is averaged as a whole.
    """
    height, width = (min(16, side) for side in anomaly_map.shape[-2:])
    rows = F.avg_pool2d(anomaly_map, (height, 1), stride=1)  # one axis after the other
    return F.avg_pool2d(rows, (1, width), stride=1).amax(dim=(1, 2, 3))


def resize_map(
    anomaly_map: Tensor, size: tuple[int, int], *, align_corners: bool = False
) -> Tensor:
    """(B, 1, h, w) -> (B, 1, *size), bilinear without antialias; half-pixel centres, or corner
    pixels on corner pixels."""
    if anomaly_map.shape[-2:] == size:
        return anomaly_map
    return F.interpolate(anomaly_map, size, mode="bilinear", align_corners=align_corners)


def ignored_patches(ignore: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """(B, 1, H, W) bool -> (B, 1, h, w) bool: patches of which more than half is ignored."""
    if ignore is None:
        return None
    return F.interpolate(ignore.float(), grid, mode="area") > 0.5


def hidden_patches(distance: Tensor, ignore: Tensor | None) -> Tensor:
    """The patches' distances (B, 1, h, w), 0 where they are ignored."""
    ignored = ignored_patches(ignore, (distance.shape[-2], distance.shape[-1]))
    return distance if ignored is None else distance.masked_fill(ignored, 0)


def hidden_pixels(anomaly_map: Tensor, ignore: Tensor | None) -> Tensor:
    """The map (B, 1, H', W'), 0 where the image's pixels (B, 1, H, W) are ignored."""
    if ignore is None:
        return anomaly_map
    size = (anomaly_map.shape[-2], anomaly_map.shape[-1])
    return anomaly_map.masked_fill(F.interpolate(ignore.float(), size) > 0.5, 0)


def visible_deviation(anomaly_map: Tensor, ignore: Tensor | None) -> Tensor:
    """(B,): standard deviation of each map (B, 1, H, W) over what is not ignored; 0 without any."""
    if ignore is None:
        return anomaly_map.flatten(1).std(dim=1, correction=0)
    weight = (~ignore).flatten(1).float()
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    values = anomaly_map.flatten(1)
    mean = (weight * values).sum(dim=1, keepdim=True)
    return (weight * (values - mean).square()).sum(dim=1).sqrt()


def visible_rows(rows: Tensor, ignored: Tensor | None) -> list[Tensor]:
    """Patches (B, N, C) of each image without the ignored ones (B, 1, h, w)."""
    if ignored is None:
        return list(rows)
    return [row[~skip] for row, skip in zip(rows, ignored.flatten(1), strict=True)]
