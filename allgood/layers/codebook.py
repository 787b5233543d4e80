"""Vector quantisation with codebooks per category that follow the data by moving averages.

Letters: B images, S codebooks of one level, N tokens, K codes, D channels.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.types import InputError

DECAY = 0.99
SMOOTHING = 1e-5
"""Added to each code's count (Laplace), so that none is divided by 0."""

Update = Literal["batch", "image"]


class Codebooks(nn.Module):
    """S codebooks, of which each image uses one; buffers, which no gradient reaches.

    Attributes:
        codes: (S, K, D).
        sums: (S, K, D) moving average of the sum of a code's tokens.
        counts: (S, K) moving average of their number; 0 before the first update.
    """

    def __init__(self, count: int, width: int, size: int, update: Update = "batch") -> None:
        super().__init__()
        self.update = update
        self.codes: Tensor
        self.sums: Tensor
        self.counts: Tensor
        self.register_buffer("codes", torch.randn(count, size, width))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("counts", torch.zeros(count, size))

    def forward(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's nearest code, and what it costs to be away from it.

        In training mode the codes then follow the tokens: `batch` moves each codebook once, by
        all tokens of all processes; `image` goes through the images one after another, each of
        which sees the codes that the one before it left.

        Args:
            x: (B, N, D).
            which: (B,) int64 in [0, S).

        Returns:
            (B, N, D) float32 with the gradient of `x` (straight-through); and the commitment
            mean |sg(code) - x|^2, a scalar whose gradient reaches `x` alone.

        Raises:
            InputError: `image` in several processes, which have no common order.
        """
        with torch.autocast(x.device.type, enabled=False):  # half precision picks other codes
            x = x.float()
            if self.training and self.update == "image":
                nearest = self._one_by_one(x.detach(), which)
            else:
                nearest = self._lookup(x.detach(), which, self.training)
            return x + (nearest - x).detach(), F.mse_loss(x, nearest)

    @torch.no_grad()
    def start(self, which: int, tokens: Tensor) -> None:
        """Let a codebook begin with tokens (T, D) of its own category, each counted once.

        K of them are taken at equal distances; fewer than K are taken several times.
        """
        size = self.codes.shape[1]
        rows = torch.arange(size, device=tokens.device) * len(tokens) // size
        self.codes[which] = self.sums[which] = tokens[rows]
        self.counts[which] = 1

    @torch.no_grad()
    def _lookup(self, x: Tensor, which: Tensor, follow: bool) -> Tensor:
        """(B, N, D): the nearest codes as they were before the update."""
        index = nearest_code(x, self.codes[which])
        row = (index + which[:, None] * self.codes.shape[1]).flatten()  # of all sets' codes
        nearest = self.codes.flatten(0, 1)[row].view_as(x)
        if follow:
            count, total = assigned(x.flatten(0, 1), row, self.counts.numel())
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(count)
                dist.all_reduce(total)
            count, total = count.view_as(self.counts), total.view_as(self.sums)
            follow_tokens(self.codes, self.sums, self.counts, count, total)
        return nearest

    @torch.no_grad()
    def _one_by_one(self, x: Tensor, which: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError(
                "update 'image' goes through the pictures in one order: train with one process, "
                "or leave --settings update at batch"
            )
        nearest = []
        for tokens, i in zip(x, which.tolist(), strict=True):
            (index,) = nearest_code(tokens[None], self.codes[i, None])
            nearest.append(self.codes[i, index])
            count, total = assigned(tokens, index, self.codes.shape[1])
            follow_tokens(self.codes[i], self.sums[i], self.counts[i], count, total)
        return torch.stack(nearest)


def nearest_code(x: Tensor, codes: Tensor) -> Tensor:
    """argmin_k |x - e_k|^2 of tokens (B, N, D) among codes (B, K, D); (B, N) int64."""
    length = torch.linalg.vector_norm(codes, dim=2).square().unsqueeze(1)  # (B, 1, K)
    return torch.baddbmm(length, x, codes.transpose(1, 2), alpha=-2).argmin(dim=2)


def assigned(x: Tensor, code: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How many of the tokens (T, D) chose each of `count` codes, and the sum of those tokens.

    Args:
        code: (T,) int64.

    Returns:
        (count,) and (count, D) float32; the sums' order is not the same on every run on a GPU.
    """
    number = x.new_zeros(count).index_add_(0, code, x.new_ones(len(code)))
    return number, x.new_zeros(count, x.shape[1]).index_add_(0, code, x)


def follow_tokens(
    codes: Tensor, sums: Tensor, counts: Tensor, count: Tensor, total: Tensor
) -> None:
    """Move codebooks (..., K, D) in place; one that no token used stays as it is.

    n <- 0.99 n + 0.01 count,  s <- 0.99 s + 0.01 total,
    e <- s / n~,  n~ = (n + 1e-5) / (sum n + K 1e-5) sum n
    """
    used = count.sum(dim=-1, keepdim=True) > 0  # (..., 1)
    keep = torch.where(used, DECAY, 1.0)
    counts.mul_(keep).add_(count, alpha=1 - DECAY)
    sums.mul_(keep.unsqueeze(-1)).add_(total, alpha=1 - DECAY)
    whole = counts.sum(dim=-1, keepdim=True)
    smooth = (counts + SMOOTHING) / (whole + counts.shape[-1] * SMOOTHING) * whole
    codes.copy_(torch.where(used.unsqueeze(-1), sums / smooth.unsqueeze(-1), codes))


def transport_cost(x: Tensor, codes: Tensor) -> Tensor:
    """Conditional transport from each token to the codes: sum_k p_k (1 - cos(x, e_k)).

    p = softmax_k(x . e_k / K). The softmax subtracts its maximum, so codes however far away, as
    the unused ones are early in training, never make it NaN.

    Args:
        x: (B, N, D).
        codes: (B, K, D).

    Returns:
        (B, N) float32, in [0, 2].
    """
    with torch.autocast(x.device.type, enabled=False):
        product = x.float() @ codes.transpose(1, 2)  # (B, N, K)
        length = x.float().norm(dim=2, keepdim=True) * codes.norm(dim=2).unsqueeze(1)
        cost = 1 - product / length.clamp(min=torch.finfo(torch.float32).tiny)
        return ((product / codes.shape[1]).softmax(dim=2) * cost).sum(dim=2)
