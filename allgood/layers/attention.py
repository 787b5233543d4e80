"""Attention between tokens: linear, softmax, and either of them blind to a query's neighbours.

Letters: B images, H heads, N tokens, D channels per head, h w patches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from allgood.layers.dropout import dropout
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
        query, key, value = query.float(), key.float(), value.float()
        if mask is not None:
            weight = (_Positive.apply(query) @ _Positive.apply(key).transpose(-2, -1)) * mask
            return (weight @ value) / (weight.sum(dim=-1, keepdim=True) + epsilon)
        return _LinearAttention.apply(query, key, value, epsilon)


def _positive(t: Tensor) -> Tensor:
    """elu(t) + 1, but never rounded to 0: exp(t) itself where t is negative."""
    return t.clamp(max=0).exp_().add_(t.clamp(min=0))


class _Positive(torch.autograd.Function):
    """`_positive`, whose derivative is min(phi, 1): only phi is kept for it."""

    @staticmethod
    def forward(context: Any, t: Tensor) -> Tensor:
        phi = _positive(t)
        context.save_for_backward(phi)
        return phi

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (phi,) = context.saved_tensors
        return gradient * phi.clamp(max=1)


class _LinearAttention(torch.autograd.Function):
    """Attention and its gradient by hand: nothing is kept but the inputs, of N x D each.

    Left to autograd, the same keeps three times as much and takes half as long again.
    """

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, epsilon: float) -> Tensor:
        context.save_for_backward(query, key, value)
        context.epsilon = epsilon
        q, k = _positive(query), _positive(key)
        numerator = q @ (k.transpose(-2, -1) @ value)  # (B, H, N, D)
        denominator = q @ k.sum(dim=-2).unsqueeze(-1) + epsilon  # (B, H, N, 1)
        return numerator.div_(denominator)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = context.saved_tensors
        q, k = _positive(query), _positive(key)
        kv = k.transpose(-2, -1) @ value  # (B, H, D, D)
        total = k.sum(dim=-2, keepdim=True)  # (B, H, 1, D)
        inverse = (q @ total.transpose(-2, -1) + context.epsilon).reciprocal_()
        gradient = gradient * inverse  # of the numerator
        # Of the denominator: -(gradient . out), and out = q kv / denominator.
        of_q = gradient @ kv.transpose(-2, -1)
        of_denominator = (of_q * q).sum(dim=-1, keepdim=True).mul_(inverse).neg_()
        of_q.addcmul_(of_denominator, total).mul_(q.clamp(max=1))
        of_kv = q.transpose(-2, -1) @ gradient
        of_total = q.transpose(-2, -1) @ of_denominator  # (B, H, D, 1)
        of_k = (value @ of_kv.transpose(-2, -1)).add_(of_total.transpose(-2, -1))
        return of_q, of_k.mul_(k.clamp(max=1)), k @ of_kv, None


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    probability: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    Args:
        query, key, value: (B, H, N, D).
        mask: as in `linear_attention`.
        probability: of dropout on the softmax.

    Returns:
        (B, H, N, D). Where torch's own kernel is slow, which is in training on a CPU with dropout
        or below float32, the same is computed step by step: 1.4 to 2.3 times as fast
        (`benchmarks/bench_attention.py`); below float32 the scores too are rounded then.
    """
    slow = probability > 0 or query.dtype != torch.float32
    if not (slow and query.device.type == "cpu" and query.requires_grad):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=probability
        )
    score = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        score = score + score.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return dropout(score.softmax(dim=-1), probability, training=True) @ value


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
