"""Feature maps as tokens of one grid, and post-norm transformer parts, against plain formulas."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from allgood.layers.attention import neighbour_mask
from allgood.layers.tokens import (
    EncoderLayer,
    FeedForward,
    GridPosition,
    align_levels,
    attend,
    feature_jitter,
    to_map,
    to_tokens,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(level: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(H, W) -> grid, one point after the other: corners upon corners, bilinear between pixels."""
    out = np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = i * (level.shape[0] - 1) / max(grid[0] - 1, 1)
            x = j * (level.shape[1] - 1) / max(grid[1] - 1, 1)
            for row in range(level.shape[0]):
                for column in range(level.shape[1]):
                    weight = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
                    out[i, j] += weight * level[row, column]
    return out


@pytest.mark.parametrize("grid", [(3, 3), (5, 4), (8, 2)])
def test_levels_are_sampled_at_points_and_stand_side_by_side(grid: tuple[int, int]) -> None:
    levels = [noise(2, 3, 9, 7), noise(2, 2, 5, 4, seed=1), noise(2, 1, 2, 2, seed=2)]
    aligned = align_levels(levels, grid)
    assert aligned.shape == (2, 6, *grid)
    channel = 0
    for level in levels:
        for c in range(level.shape[1]):
            expected = sampled(level[1, c].numpy(), grid)
            np.testing.assert_allclose(aligned[1, channel].numpy(), expected, atol=1e-5)
            channel += 1


def test_tokens_are_row_major_and_come_back() -> None:
    level = noise(2, 3, 4, 5)
    tokens = to_tokens(level)
    assert tokens.shape == (2, 20, 3)
    assert torch.equal(tokens[1, 2 * 5 + 4], level[1, :, 2, 4])
    assert torch.equal(to_map(tokens, (4, 5)), level)


@pytest.mark.parametrize("channels", [16, 272])
def test_jitter_follows_each_positions_norm(channels: int) -> None:
    tokens = noise(1, 4, channels) * torch.tensor([0.1, 1.0, 10.0, 0.0])[:, None]
    many = tokens.expand(3000, -1, -1)
    torch.manual_seed(0)
    added = feature_jitter(many, 20.0) - many
    expected = 20 * tokens[0].norm(dim=1) / channels
    torch.testing.assert_close(added.std(dim=(0, 2)), expected, rtol=0.02, atol=0)
    # In units of the root mean square of a position: 20 / sqrt(C).
    rms = tokens[0].square().mean(dim=1).sqrt()
    torch.testing.assert_close(expected, rms * 20 / math.sqrt(channels))
    assert (added.mean(dim=(0, 2)).abs() <= 0.02 * expected).all()
    assert not torch.equal(added[0], added[1]) and not torch.equal(added[0, 0], added[0, 1])
    # On maps, with the channels elsewhere, the same.
    torch.manual_seed(0)
    features = to_map(tokens, (2, 2)).expand(3000, -1, -1, -1)
    of_map = feature_jitter(features, 20.0, dim=1) - features
    torch.testing.assert_close(of_map.std(dim=(0, 1)).flatten(), expected, rtol=0.02, atol=0)


def test_position_is_the_column_then_the_row() -> None:
    torch.manual_seed(0)
    position = GridPosition((3, 5), 8)
    table = position()
    assert table.shape == (15, 8)
    for y in range(3):
        for x in range(5):
            assert torch.equal(table[5 * y + x], torch.cat([position.column[x], position.row[y]]))
    many = GridPosition((300, 300), 64)
    for parameter in (many.row, many.column):
        assert parameter.min() >= 0 and parameter.max() < 1
        assert parameter.mean().item() == pytest.approx(0.5, abs=0.01)
        assert parameter.var().item() == pytest.approx(1 / 12, abs=0.002)


def plain_attention(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, seen: Tensor
) -> Tensor:
    """Head by head."""
    width, heads = attention.embed_dim, attention.num_heads
    weights, biases = attention.in_proj_weight.split(width), attention.in_proj_bias.split(width)
    query, key, value = (
        x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    parts = []
    for q, k, v in zip(*(t.chunk(heads, dim=-1) for t in (query, key, value)), strict=True):
        weight = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).exp() * seen
        parts.append(weight / weight.sum(dim=-1, keepdim=True) @ v)
    out = attention.out_proj
    return torch.cat(parts, dim=-1) @ out.weight.T + out.bias


def shaken(module: nn.Module) -> nn.Module:
    """In float64, with biases and scales that are not 0 and 1."""
    module = module.double().eval()
    for i, parameter in enumerate(module.parameters()):
        parameter.data += 0.3 * noise(*parameter.shape, seed=i)
    return module


@pytest.mark.parametrize("size", [0, 1, 3])
def test_attention_sees_what_the_mask_leaves(size: int) -> None:
    torch.manual_seed(0)
    attention = shaken(nn.MultiheadAttention(8, 2, batch_first=True))
    assert isinstance(attention, nn.MultiheadAttention)
    query, key, value = (noise(2, 20, 8, seed=i).double() for i in range(3))
    mask = neighbour_mask(4, 5, size) if size else None
    seen = torch.ones(20, 20) if mask is None else mask.double()
    found = attend(attention, query, key, value, mask)
    torch.testing.assert_close(found, plain_attention(attention, query, key, value, seen))
    if size:  # what is hidden may say anything
        other = value.clone()
        other[:, 7] += 100
        changed = (attend(attention, query, key, other, mask) - found).abs().amax(dim=2) > 1e-6
        row, column = torch.arange(20) // 5, torch.arange(20) % 5
        hidden = ((row - 1).abs() <= size // 2) & ((column - 2).abs() <= size // 2)
        assert torch.equal(changed, (~hidden).expand(2, -1))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return unit * norm.weight + norm.bias


def plain_feed_forward(x: Tensor, layer: FeedForward) -> Tensor:
    hidden = (x @ layer.linear1.weight.T + layer.linear1.bias).clamp(min=0)
    return layer_norm(x + hidden @ layer.linear2.weight.T + layer.linear2.bias, layer.norm)


def test_feed_forward() -> None:
    layer = shaken(FeedForward(8, 24, 0.5))
    assert isinstance(layer, FeedForward)
    x = noise(2, 5, 8).double()
    torch.testing.assert_close(layer(x), plain_feed_forward(x, layer))


def test_an_encoder_layer_is_post_norm_with_the_position_outside_the_values() -> None:
    torch.manual_seed(0)
    layer = shaken(EncoderLayer(8, 2, 24, 0.5))
    assert isinstance(layer, EncoderLayer)
    x, position = noise(2, 12, 8).double(), noise(12, 8, seed=1).double()
    for mask in (None, neighbour_mask(3, 4, 1)):
        seen = torch.ones(12, 12) if mask is None else mask.double()
        mixed = plain_attention(layer.attention, x + position, x + position, x, seen)
        expected = plain_feed_forward(layer_norm(x + mixed, layer.norm), layer.feed_forward)
        torch.testing.assert_close(layer(x, position, mask), expected)


def test_dropout_is_where_the_reference_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the attention weights, on both residuals and inside the feed-forward; in training only."""
    layer = EncoderLayer(8, 2, 24, 0.3)
    seen: list[tuple[int, ...]] = []

    def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
        if training:
            assert probability == 0.3
            seen.append(tuple(x.shape))
        return x

    for module in ("dropout", "attention"):
        monkeypatch.setattr(f"allgood.layers.{module}.dropout", dropout)
    x, position = noise(2, 12, 8), noise(12, 8)
    layer(x, position)
    assert seen == [(2, 2, 12, 12), (2, 12, 8), (2, 12, 24), (2, 12, 8)]
    seen.clear()
    layer.eval()(x, position)
    assert not seen
