"""Scores and maps against SciPy and against the words of the papers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from allgood.scoring import (
    gaussian_blur,
    gaussian_smooth,
    ignored_patches,
    resize_map,
    top_fraction_mean,
    visible_deviation,
    visible_rows,
)


def maps(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.4, 1.0, 4.0, 6.5])
@pytest.mark.parametrize("size", [(64, 48), (5, 40), (7, 7), (2, 3), (1, 1), (1, 30)])
def test_gaussian_is_scipys(size: tuple[int, int], sigma: float) -> None:
    """Sigma 4 has a radius of 16: most of these maps are smaller, and are mirrored many times."""
    raw = maps(2, 1, *size)
    smooth = gaussian_smooth(raw, sigma)
    for one, expected in zip(smooth[:, 0].numpy(), raw[:, 0].double().numpy(), strict=True):
        expected = ndimage.gaussian_filter(expected, sigma, mode="reflect", truncate=4.0)
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


def test_gaussian_blur_mirrors_without_the_edge() -> None:
    x = maps(2, 3, 6, 7)
    w = math.exp(-0.5)
    kernel = torch.outer(torch.tensor([w, 1, w]), torch.tensor([w, 1, w]))
    kernel = (kernel / kernel.sum()).expand(3, 1, 3, 3)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(gaussian_blur(x, 3, 1.0), F.conv2d(padded, kernel, groups=3))


def test_sigma_zero_changes_nothing() -> None:
    raw = maps(1, 1, 4, 4)
    assert torch.equal(gaussian_smooth(raw, 0), raw)


@pytest.mark.parametrize(
    "count, taken", [(1024, 10), (2304, 23), (1120, 11), (1099, 10), (100, 1), (99, 1)]
)
def test_top_fraction_counts_downwards_and_at_least_one(count: int, taken: int) -> None:
    values = torch.randperm(count, generator=torch.Generator().manual_seed(1)).float()
    expected = float(values.sort(descending=True).values[:taken].mean())
    found = top_fraction_mean(torch.stack([values, values / 2]).view(2, 1, 1, count), 0.01)
    assert found.tolist() == pytest.approx([expected, expected / 2])


def test_masked_zeros_count_in_the_share() -> None:
    distance = torch.zeros(1, 1, 20, 20)  # four values are taken, three are not zero
    distance[0, 0, 3, :3] = torch.tensor([4.0, 5.0, 6.0])
    assert float(top_fraction_mean(distance, 0.01)) == pytest.approx(15 / 4)


def test_resize_map_keeps_constants_and_its_centres_or_corners() -> None:
    constant = torch.full((1, 1, 3, 5), 2.5)
    torch.testing.assert_close(resize_map(constant, (17, 9)), torch.full((1, 1, 17, 9), 2.5))
    raw = maps(1, 1, 4, 6)
    assert resize_map(raw, (4, 6)) is raw
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    expected = np.interp((np.arange(8) + 0.5) / 2 - 0.5, np.arange(4), np.arange(4))
    np.testing.assert_allclose(resize_map(ramp, (1, 8))[0, 0, 0], expected, atol=1e-6)
    aligned = resize_map(ramp, (1, 7), align_corners=True)
    np.testing.assert_allclose(aligned[0, 0, 0], np.linspace(0, 3, 7), atol=1e-6)


def test_a_patch_is_ignored_where_more_than_half_of_it_is() -> None:
    ignore = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    ignore[..., 0:4, 0:4] = True  # all of the first patch
    ignore[..., 0:4, 4:6] = True  # half of the second
    ignore[..., 4:8, 8:11] = True  # three quarters of the last
    expected = [[True, False, False], [False, False, True]]
    assert ignored_patches(ignore, (2, 3))[0, 0].tolist() == expected
    assert ignored_patches(None, (2, 3)) is None


def test_visible_rows() -> None:
    rows = torch.arange(12.0).view(2, 3, 2)
    ignored = torch.tensor([[[[True, False, False]]], [[[True, True, True]]]])
    first, second = visible_rows(rows, ignored)
    assert first.tolist() == [[2, 3], [4, 5]] and second.shape == (0, 2)
    assert [r.tolist() for r in visible_rows(rows, None)] == rows.tolist()


def test_standard_deviation_of_what_is_visible() -> None:
    anomaly_map = torch.tensor([[1.0, 3.0, 0.0, 0.0]]).view(1, 1, 2, 2)
    ignore = torch.tensor([[False, False, True, True]]).view(1, 1, 2, 2)
    assert visible_deviation(anomaly_map, None).item() == pytest.approx(math.sqrt(1.5))
    assert visible_deviation(anomaly_map, ignore).item() == pytest.approx(1.0)
    assert visible_deviation(anomaly_map, torch.ones_like(ignore)).item() == 0
