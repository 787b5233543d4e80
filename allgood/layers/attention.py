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


def linear_attention(qkv: Tensor, *, epsilon: float = 1e-6, mask: Tensor | None = None) -> Tensor:
    """Softmax-free attention (Katharopoulos et al., 2020), finite for any finite input.

    out_i = phi(q_i) (sum_n phi(k_n) v_n) / (phi(q_i) . sum_n phi(k_n) + epsilon),
    phi(t) = elu(t) + 1. There is no 1/sqrt(D). The arithmetic is float32, whatever the tensor's
    precision.

    Args:
        qkv: (3, B, H, N, D) queries, keys and values; strides as a projection leaves them cost
            nothing.
        epsilon: keeps the denominator from 0; it is about 1e5 for keys of unit variance.
        mask: (N, N) bool, True where query i may see key n; needs the quadratic form.

    Returns:
        (B, H, N, D) float32; without mask the heads lie side by side in memory.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        if mask is None:
            return _LinearAttention.apply(qkv, epsilon)
        query, key, value = qkv.float().unbind()
        weight = (_Positive.apply(query) @ _Positive.apply(key).transpose(-2, -1)) * mask
        return (weight @ value) / (weight.sum(dim=-1, keepdim=True) + epsilon)


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
    """Attention and its gradient by hand: nothing is kept but the input, (3, B, H, N, D).

    A CPU takes one image after another, whose steps stay in its cache.
    """

    @staticmethod
    def forward(context: Any, qkv: Tensor, epsilon: float) -> Tensor:
        context.save_for_backward(qkv)
        context.epsilon = epsilon
        _, images, heads, tokens, channels = qkv.shape
        out = qkv.new_empty(images, tokens, heads, channels, dtype=torch.float32).transpose(1, 2)
        for packed, result in zip(_parts(qkv, dim=1), _parts(out, dim=0), strict=True):
            query, key, value = packed.float()
            q, k = _positive(query), _positive(key)
            numerator = q @ (k.transpose(-2, -1) @ value)  # (B, H, N, D)
            denominator = q @ k.sum(dim=-2).unsqueeze(-1) + epsilon  # (B, H, N, 1)
            torch.div(numerator, denominator, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (qkv,) = context.saved_tensors
        of_qkv = torch.empty_like(qkv)
        for packed, of_out, result in zip(
            _parts(qkv, dim=1), _parts(gradient, dim=0), _parts(of_qkv, dim=1), strict=True
        ):
            query, key, value = packed.float()
            q, k = _positive(query), _positive(key)
            kv = k.transpose(-2, -1) @ value  # (B, H, D, D)
            total = k.sum(dim=-2, keepdim=True)  # (B, H, 1, D)
            inverse = (q @ total.transpose(-2, -1) + context.epsilon).reciprocal_()
            of_numerator = of_out * inverse
            # Of the denominator: -(gradient . out), and out = q kv / denominator.
            of_q = of_numerator @ kv.transpose(-2, -1)
            of_denominator = (of_q * q).sum(dim=-1, keepdim=True).mul_(inverse).neg_()
            of_q.addcmul_(of_denominator, total)
            of_kv = q.transpose(-2, -1) @ of_numerator
            of_total = q.transpose(-2, -1) @ of_denominator  # (B, H, D, 1)
            of_k = (value @ of_kv.transpose(-2, -1)).add_(of_total.transpose(-2, -1))
            torch.mul(of_q, q.clamp_(max=1), out=result[0])
            result[2] = k @ of_kv
            torch.mul(of_k, k.clamp_(max=1), out=result[1])
        return of_qkv, None


def _parts(t: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Views along the dimension of the images: of each on a CPU, of all elsewhere."""
    return t.split(1 if t.device.type == "cpu" else t.shape[dim], dim)


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
        or below float32, the same is computed step by step: 1.4 to 2.5 times as fast
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
