"""Cosine distances between features and what a detector rebuilt of them.

Letters: B images, L levels, C channels, h w grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    """1 - cos(a, b) along `dim`, in float32; in [0, 2]."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=dim, eps=1e-8)


def reverse_distillation_loss(targets: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """Sum over levels of the distance of an image's whole level as one vector, mean over images.

    It weighs positions by the size of their features, unlike the mean of their distances. RD4AD's
    paper writes that mean; its authors' code, and all numbers with it, take the whole level, and
    so does Eq. 1 of MiniMaxAD.

    Args:
        targets, rebuilt: L x (B, C, h, w); the targets learn nothing.

    Returns:
        scalar in [0, 2 L].
    """
    distances = [
        cosine_distance(target.detach().flatten(1), level.flatten(1)).mean()
        for target, level in zip(targets, rebuilt, strict=True)
    ]
    return torch.stack(distances).sum()
