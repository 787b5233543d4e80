"""Cost volumes against loops over positions; the forms that never build them against the volume."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.costfilter.volume import (
    VolumeConfig,
    compare,
    cost_volume,
    initial_map,
    project,
    resize_aligned,
    spread_over_stages,
)
from allgood.types import InputError

GRID = (3, 4)
Orientation = Literal["input", "reference"]


def levels(seed: int, templates: int = 3, images: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    query = [torch.randn(images, c, *GRID, generator=generator) for c in (5, 7)]
    template = [torch.randn(images, templates, c, *GRID, generator=generator) for c in (5, 7)]
    return query, template


def plain_volume(query: list[Tensor], template: list[Tensor], orientation: Orientation) -> Tensor:
    """(B, N D, L, h, w) float64, one cosine after the other."""
    images, templates = template[0].shape[:2]
    height, width = GRID
    d = height * width
    volume = torch.zeros(images, templates * d, len(query), height, width, dtype=torch.float64)
    for level, (q, t) in enumerate(zip(query, template, strict=True)):
        for b in range(images):
            for n in range(templates):
                for i in range(d):
                    for j in range(d):
                        image, other = (i, j) if orientation == "input" else (j, i)
                        u = q[b, :, image // width, image % width].double()
                        v = t[b, n, :, other // width, other % width].double()
                        cost = 1 - u @ v / (u.norm() * v.norm())
                        volume[b, n * d + j, level, i // width, i % width] = cost
    return volume


@pytest.mark.parametrize("orientation", ["input", "reference"])
@pytest.mark.parametrize("seed", range(3))
def test_volume_and_its_minimum(seed: int, orientation: Orientation) -> None:
    query, template = levels(seed)
    expected = plain_volume(query, template, orientation)
    comparison = compare(query, template, VolumeConfig(GRID, 3, orientation=orientation))
    assert torch.allclose(cost_volume(comparison).double(), expected, atol=1e-6)
    for block in (1, 5, 1024):
        least = initial_map(comparison, block=block)
        assert torch.allclose(least.double(), expected.amin(dim=1), atol=1e-6)


@pytest.mark.parametrize("orientation", ["input", "reference"])
def test_top_k_keeps_the_order(orientation: Orientation) -> None:
    query, template = levels(3)
    whole = plain_volume(query, template, orientation)
    config = VolumeConfig(GRID, 3, top_k=5, orientation=orientation)
    found = cost_volume(compare(query, template, config))
    assert found.shape == (2, config.channels, 2, *GRID)
    for b in range(2):
        for i in range(12):
            costs = whole[b, :, 0].flatten(1)[:, i]
            kept = costs[costs <= costs.sort().values[4]]
            assert torch.allclose(found[b, :, 0].flatten(1)[:, i].double(), kept, atol=1e-6)


def test_top_k_of_all_is_the_volume() -> None:
    query, template = levels(4)
    everything = compare(query, template, VolumeConfig(GRID, 3, top_k=36))
    assert not everything.selects
    whole = compare(query, template, VolumeConfig(GRID, 3))
    assert torch.equal(cost_volume(everything), cost_volume(whole))


def test_loop_mean_is_one_volume_per_template() -> None:
    query, template = levels(5)
    config = VolumeConfig(GRID, 3, merge="loop_mean")
    assert config.channels == 12
    looped = compare(query, template, config)
    rows = cost_volume(looped).unflatten(0, (2, 3))
    for n in range(3):
        single = compare(query, [t[:, n : n + 1] for t in template], VolumeConfig(GRID))
        assert torch.allclose(rows[:, n], cost_volume(single), atol=1e-6)
        assert torch.allclose(
            initial_map(looped).unflatten(0, (2, 3))[:, n], initial_map(single), atol=1e-6
        )


CONFIGS = [
    VolumeConfig(GRID, 3),
    VolumeConfig(GRID, 3, orientation="reference"),
    VolumeConfig(GRID, 3, merge="loop_mean"),
    VolumeConfig(GRID, 3, merge="loop_mean", orientation="reference"),
    VolumeConfig(GRID, 3, top_k=7),
    VolumeConfig(GRID, 3, top_k=36),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_projection_is_the_convolution_of_the_volume(config: VolumeConfig) -> None:
    query, template = levels(6)
    comparison = compare(query, template, config)
    conv = torch.nn.Conv3d(config.channels, 8, 1)
    push = torch.randn(len(cost_volume(comparison)), 8, 2, *GRID)
    found = project(comparison, conv.weight, conv.bias)
    (found * push).sum().backward()
    ours = [p.grad.clone() for p in conv.parameters() if p.grad is not None]
    conv.zero_grad()
    expected = conv(cost_volume(comparison))
    (expected * push).sum().backward()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, parameter in zip(ours, conv.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-5, atol=1e-5)


@contextmanager
def largest_saved() -> Iterator[list[int]]:
    """What autograd keeps for the backward pass, by its number of values."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_projection_keeps_no_volume_for_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    query = [torch.randn(1, 8, 16, 16, generator=generator)]
    template = [torch.randn(1, 2, 8, 16, 16, generator=generator)]
    comparison = compare(query, template, VolumeConfig((16, 16), 2))
    weight = torch.randn(4, 512, 1, 1, 1, requires_grad=True)
    with largest_saved() as kept:
        project(comparison, weight, torch.zeros(4))
    assert max(kept) <= 8 * 256 < 256 * 512


@pytest.mark.parametrize("orientation", ["input", "reference"])
def test_equal_features_cost_nothing(orientation: Orientation) -> None:
    query, _ = levels(7)
    config = VolumeConfig(GRID, orientation=orientation)
    least = initial_map(compare(query, [3 * q.unsqueeze(1) for q in query], config))
    assert least.abs().max() < 1e-6


def test_orientation_says_whose_positions_are_judged() -> None:
    query, template = levels(8, templates=1)
    changed = [q.clone() for q in query]
    changed[0][:, :, 1, 2] += 5
    for orientation, cells in (("input", 1), ("reference", 12)):
        config = VolumeConfig(GRID, orientation=orientation)  # type: ignore[arg-type]
        before, after = (cost_volume(compare(q, template, config)) for q in (query, changed))
        moved = (before != after).any(dim=1)[0, 0]  # (h, w)
        assert moved.sum() == cells
        assert moved[1, 2]


def test_a_zero_feature_costs_one_to_everything() -> None:
    query, template = levels(9)
    query[0][:, :, 0, 0] = 0
    template[1][:, 0, :, 0, 1] = 0
    comparison = compare(query, template, VolumeConfig(GRID, 3))
    volume = cost_volume(comparison)
    assert (volume[:, :, 0, 0, 0] == 1).all() and (volume[:, 1, 1] == 1).all()
    assert torch.isfinite(initial_map(comparison)).all()


def test_levels_meet_on_one_grid() -> None:
    """Bilinear with aligned corners, and before the norms."""
    generator = torch.Generator().manual_seed(10)
    query = [torch.randn(1, 4, 6, 8, generator=generator), torch.randn(1, 9, 3, 4)]
    template = [torch.randn(1, 2, 4, 6, 8, generator=generator), torch.randn(1, 2, 9, 3, 4)]

    def small(x: Tensor) -> Tensor:
        return F.interpolate(x, GRID, mode="bilinear", align_corners=True)

    at_grid = [small(query[0]), query[1]]
    others = [torch.stack([small(template[0][:, n]) for n in range(2)], dim=1), template[1]]
    config = VolumeConfig(GRID, 2)
    found = cost_volume(compare(query, template, config))
    assert torch.allclose(found, cost_volume(compare(at_grid, others, config)), atol=1e-6)


def test_half_precision_features_and_autocast_cost_in_float32() -> None:
    query, template = levels(11)
    query = [q.bfloat16() for q in query]
    template = [t.bfloat16() for t in template]
    conv = torch.nn.Conv3d(36, 4, 1)
    as_float = compare([q.float() for q in query], [t.float() for t in template], CONFIGS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        comparison = compare(query, template, CONFIGS[0])
        volume, least = cost_volume(comparison), initial_map(comparison)
        out = project(comparison, conv.weight, conv.bias)
    assert volume.dtype == least.dtype == out.dtype == torch.float32
    assert torch.equal(volume, cost_volume(as_float))
    assert torch.allclose(out, conv(volume), atol=1e-5)


def test_stages_share_the_levels() -> None:
    for count, expected in (
        (1, [0, 0, 0, 0]),
        (2, [0, 0, 1, 1]),
        (3, [0, 0, 1, 2]),
        (4, [0, 1, 2, 3]),
        (8, [0, 2, 4, 6]),
    ):
        found = spread_over_stages([torch.tensor(i) for i in range(count)])
        assert [int(level) for level in found] == expected


@pytest.mark.parametrize("align_corners", [True, False])
def test_resize(align_corners: bool) -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    found = resize_aligned(x, (7, 9), align_corners=align_corners)
    expected = F.interpolate(
        x.flatten(1, 2), (7, 9), mode="bilinear", align_corners=align_corners
    ).unflatten(1, (3, 4))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": (0, 3)}, "at least 1"),
        ({"grid": GRID, "templates": 0}, "at least 1"),
        ({"grid": GRID, "top_k": 0}, r"\[1, 12\], got 0"),
        ({"grid": GRID, "top_k": 13}, r"\[1, 12\], got 13"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VolumeConfig(**settings)


def test_features_that_do_not_fit() -> None:
    query, template = levels(12)
    with pytest.raises(InputError, match="2 query levels but 1 template"):
        compare(query, template[:1], CONFIGS[0])
    with pytest.raises(InputError, match="compares with 2 templates, this detector gave 3"):
        compare(query, template, VolumeConfig(GRID, 2))
    with pytest.raises(InputError, match="must agree in B and C"):
        compare(query[::-1], template, CONFIGS[0])
