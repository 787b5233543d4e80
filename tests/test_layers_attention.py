"""Attention: linear and softmax against their N x N forms, and which keys a query may see."""

import math

import pytest
import torch
from torch import Tensor

from allgood.layers.attention import linear_attention, neighbour_mask, softmax_attention
from allgood.types import InputError


def tensors(*shape: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(3, *shape, generator=generator) * scale).unbind()
    return query, key, value / scale


def phi(t: float) -> float:
    """elu(t) + 1."""
    return t + 1 if t > 0 else math.exp(t)


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, softmax: bool = False
) -> Tensor:
    """out_i = sum_n w_in v_n / sum_n w_in, one query after the other, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    if not softmax:
        query, key = query.clone().apply_(phi), key.clone().apply_(phi)
    out = torch.zeros_like(value)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                product = key[b, h] @ query[b, h, i]
                weight = (product / math.sqrt(query.shape[3])).exp() if softmax else product
                if mask is not None:
                    weight = weight * mask[i]
                out[b, h, i] = (weight / weight.sum()) @ value[b, h]
    return out


def random_mask(count: int) -> Tensor:
    mask = torch.rand(count, count, generator=torch.Generator().manual_seed(1)) > 0.4
    return mask | torch.eye(count, dtype=torch.bool)  # no query without any key


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_attention_is_the_normalised_quadratic_form(scale: float, masked: bool) -> None:
    query, key, value = tensors(2, 3, 21, 8, scale=scale)
    mask = random_mask(21) if masked else None
    found = linear_attention(torch.stack([query, key, value]), epsilon=0.0, mask=mask)
    assert found.dtype == torch.float32
    expected = by_definition(query, key, value, mask)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_mask_that_hides_nothing_changes_nothing() -> None:
    qkv = torch.stack(tensors(1, 2, 30, 16))
    everything = torch.ones(30, 30, dtype=torch.bool)
    torch.testing.assert_close(linear_attention(qkv), linear_attention(qkv, mask=everything))


def test_the_gradient_is_that_of_the_quadratic_form() -> None:
    packed = torch.stack(tensors(3, 2, 30, 8))
    weight = torch.randn(3, 2, 30, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for mask in (None, torch.ones(30, 30, dtype=torch.bool)):
        leaf = packed.permute(1, 3, 0, 2, 4).contiguous().requires_grad_()  # as a projection's
        out = linear_attention(leaf.permute(2, 0, 3, 1, 4), mask=mask)
        (out * weight).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_epsilon_stands_in_the_denominator() -> None:
    one = torch.ones(1, 1, 1, 1)  # phi = 2, so 4 v / (4 + epsilon)
    for mask in (None, torch.ones(1, 1, dtype=torch.bool)):
        found = linear_attention(torch.stack([one, one, 3 * one]), epsilon=1.0, mask=mask)
        assert found.item() == pytest.approx(12 / 5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "q, k", [(50, 50), (-50, -50), (50, -50), (100, 100), (-100, 100), (-100, -100), (-1000, -1000)]
)
def test_finite_at_extremes(q: float, k: float, dtype: torch.dtype, autocast: bool) -> None:
    noise = tensors(1, 2, 40, 8)
    qkv = torch.stack([noise[0] + q, noise[1] + k, noise[2]]).to(dtype)
    for mask in (None, random_mask(40)):
        leaf = qkv.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = linear_attention(leaf, mask=mask)
        assert out.dtype == torch.float32 and torch.isfinite(out).all()
        out.square().sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("t", [-6.0, -20.0, -50.0])
def test_small_keys_still_count(t: float) -> None:
    """elu(t) + 1 is rounded to 0 here, below -6 in bfloat16, below -17 in float32."""
    _, _, value = tensors(1, 1, 12, 4)
    query, key = torch.zeros(1, 1, 12, 4), torch.full((1, 1, 12, 4), t)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_attention(torch.stack([query, key, value]).bfloat16(), epsilon=0.0)
    value = value.bfloat16().float()
    expected = value.mean(dim=2, keepdim=True).expand_as(value)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_autocast_changes_no_number() -> None:
    qkv = torch.stack(tensors(2, 2, 33, 16))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_attention(qkv)
    assert torch.equal(found, linear_attention(qkv))


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_is_the_plain_formula(masked: bool) -> None:
    query, key, value = tensors(2, 3, 21, 8)
    mask = random_mask(21) if masked else None
    expected = by_definition(query, key, value, mask, softmax=True)
    found = softmax_attention(query, key, value, mask=mask)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_below_float32_is_the_plain_formula(masked: bool) -> None:
    """Where gradients are asked for, it is computed step by step."""
    inputs = [t.bfloat16() for t in tensors(2, 3, 21, 8)]
    mask = random_mask(21) if masked else None
    exact = [t.double().requires_grad_() for t in inputs]
    rounded = [t.requires_grad_() for t in inputs]
    expected = by_definition(*exact, mask, softmax=True)
    found = softmax_attention(*rounded, mask=mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.03)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        apart = (ours.grad.double() - theirs.grad).norm()
        assert apart < 0.02 * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_falls_on_the_softmax(dtype: torch.dtype) -> None:
    query, key, _ = tensors(2, 3, 40, 8)
    query, key = query.to(dtype).requires_grad_(), key.to(dtype)
    reading = torch.eye(40, dtype=dtype).expand(2, 3, 40, 40)  # the values' sum is the weights
    whole = softmax_attention(query, key, reading).float()
    torch.manual_seed(0)
    weight = softmax_attention(query, key, reading, probability=0.25).float()
    kept = weight != 0
    assert abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(
        weight[kept], whole[kept] / 0.75, rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("grid", [(6, 6), (3, 7), (9, 4)])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_neighbour_mask(grid: tuple[int, int], size: int, num_prefix: int) -> None:
    height, width = grid
    mask = neighbour_mask(height, width, size, num_prefix=num_prefix)
    count = num_prefix + height * width
    assert mask.shape == (count, count) and mask.dtype == torch.bool
    for i in range(count):
        for n in range(count):
            if min(i, n) < num_prefix:
                assert mask[i, n]
                continue
            row, column = divmod(i - num_prefix, width)
            other_row, other_column = divmod(n - num_prefix, width)
            hidden = max(abs(row - other_row), abs(column - other_column)) <= (size - 1) / 2
            assert mask[i, n] == (not hidden), (i, n)


@pytest.mark.parametrize("height, width, size", [(1, 1, 1), (3, 3, 3), (2, 3, 5), (5, 5, 9)])
@pytest.mark.parametrize("num_prefix", [0, 5])
def test_a_mask_that_hides_every_patch_is_refused(
    height: int, width: int, size: int, num_prefix: int
) -> None:
    with pytest.raises(InputError, match=f"of {size} x {size} hides .* {height} x {width} patches"):
        neighbour_mask(height, width, size, num_prefix=num_prefix)
