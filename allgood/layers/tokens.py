"""Feature maps as tokens of one grid, and the post-norm transformer parts that read them.

What UniAD, HVQ-Trans and UniAS share. Letters: B images, C channels, h w grid, N = h w tokens in
row-major order, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.layers.attention import softmax_attention
from allgood.layers.dropout import Dropout


def align_levels(levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """All levels on one grid, side by side: L x (B, C_l, h_l, w_l) -> (B, sum of C_l, h, w).

    Bilinear with corners aligned and without antialias: on the way down points are sampled, not
    averaged.
    """
    return torch.cat(
        [F.interpolate(level, grid, mode="bilinear", align_corners=True) for level in levels], dim=1
    )


def to_tokens(level: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C)."""
    return level.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def feature_jitter(features: Tensor, scale: float, *, dim: int = -1) -> Tensor:
    """UniAD's noise: normal, in proportion to each position's norm over its number of channels.

    Args:
        scale: 20 in the paper: a deviation of 20 / sqrt(C) times the position's root mean square.
        dim: of the channels.
    """
    size = scale * features.norm(dim=dim, keepdim=True) / features.shape[dim]
    return features + size * torch.randn_like(features)


class GridPosition(nn.Module):
    """A learned vector per position: its column's in the first half, its row's in the second."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.rand(grid[0], width // 2))
        self.column = nn.Parameter(torch.rand(grid[1], width // 2))

    def forward(self) -> Tensor:
        """(N, D)."""
        height, width = len(self.row), len(self.column)
        return torch.cat(
            [self.column.repeat(height, 1), self.row.repeat_interleave(width, dim=0)], dim=1
        )


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of (B, N, D), with the weights of `attention`.

    Args:
        mask: (N, N) bool, True where query i may see key n, as `neighbour_mask` gives it.
    """
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    probability = attention.dropout if attention.training else 0.0
    attended = softmax_attention(q, k, v, mask=mask, probability=probability)
    out: Tensor = attention.out_proj(attended.transpose(1, 2).flatten(2))
    return out


class FeedForward(nn.Module):
    """LN(x + drop(W2 drop(relu(W1 x))))."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm(x + self.dropout(inner))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, both post-norm; the position is on queries and keys only."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (B, N, D).
            position: (N, D).
            mask: as in `attend`.
        """
        where = x + position
        attended = attend(self.attention, where, where, x, mask)
        return self.feed_forward(self.norm(x + self.dropout(attended)))
