"""Attention between tokens: linear, softmax, and either of them blind to a query's neighbours.

Letters: B images, H heads, N tokens, D channels per head, h w patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.types import InputError


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, epsilon: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Softmax-free attention (Katharopoulos et al., 2020), finite for any finite input.

    out_i = phi(q_i) (sum_n phi(k_n) v_n) / (phi(q_i) . sum_n phi(k_n) + epsilon),
    phi(t) = elu(t) + 1. There is no 1/sqrt(D). The arithmetic of phi and of the sums is float32,
    whatever the tensors' precision.

    Args:
        query, key, value: (B, H, N, D).
        epsilon: keeps the denominator from 0; it is about 1e5 for keys of unit variance.
        mask: (N, N) bool, True where query i may see key n; needs the quadratic form.

    Returns:
        (B, H, N, D) float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _positive(query.float()), _positive(key.float()), value.float()
        if mask is not None:
            weight = (q @ k.transpose(-2, -1)) * mask
            return (weight @ v) / (weight.sum(dim=-1, keepdim=True) + epsilon)
        context = k.transpose(-2, -1) @ v  # (B, H, D, D)
        total = k.sum(dim=-2).unsqueeze(-1)  # (B, H, D, 1)
        return (q @ context) / (q @ total + epsilon)


def _positive(t: Tensor) -> Tensor:
    """elu(t) + 1, but never rounded to 0: exp(t) itself where t is negative."""
    return t.clamp(min=0) + t.clamp(max=0).exp()


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, of (B, H, N, D); `mask` as in `linear_attention`."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def neighbour_mask(height: int, width: int, size: int, *, num_prefix: int = 0) -> Tensor:
    """Which keys a query may see: all but the size x size patches centred at its own (UniAD).

    Args:
        height, width: of the grid of patches.
        size: odd side of the square; 1 hides a patch from itself only.
        num_prefix: tokens before the patches; they see and are seen by all.

    Returns:
        (N, N) bool, N = num_prefix + height * width.

    Raises:
        InputError: the square would hide every patch from a query.
    """
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    near = ((row[:, None] - row[None]).abs() <= size // 2) & (
        (column[:, None] - column[None]).abs() <= size // 2
    )
    if near.all(dim=1).any():
        raise InputError(
            f"a neighbour mask of {size} x {size} hides the whole grid of {height} x {width} "
            "patches: take a smaller mask or a larger image"
        )
    return F.pad(~near, (num_prefix, 0, num_prefix, 0), value=True)
