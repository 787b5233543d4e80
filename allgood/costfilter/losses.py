"""The loss of CostFilter-AD: one function per term, and their weighted sum.

P is the filter's map brought to the mask's size, y the mask of a synthetic anomaly. The slides give
focal + CE + alpha (soft-IoU + SSIM) without alpha; the authors' code, which we follow, gives the
weights and adds a mean squared error. Arithmetic is float32 whatever the network's precision.

Letters: B images, S side of the filter's map, E E' sides of the mask, K categories.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.costfilter.volume import resize_aligned
from allgood.scoring import axis_matrix, gaussian_kernel

Gamma = Literal["slides", "reference", "constant"]
GAMMA = 3.0
"""gamma_0: the slides leave it open, the code starts from it."""
IOU_WEIGHT = 0.1
CLASS_WEIGHT = 0.5
"""Of the cross-entropy; 1 on the slides."""


def filter_loss(
    logits: Tensor,
    class_logits: Tensor | None,
    mask: Tensor,
    category: Tensor,
    *,
    gamma: Gamma,
    ssim: float,
    hard_classes: Sequence[int] = (),
    ignore: Tensor | None = None,
) -> Tensor:
    """The weighted sum of all terms; without class logits, no cross-entropy and a focal exponent
    of 2.

    Args:
        logits: (B, 2, S, S) of the filter: normal, anomalous.
        class_logits: (B, K), or None where there is one category only.
        mask: (B, 1, E, E') bool or {0, 1}.
        category: (B,) int64 in [0, K).
        gamma, hard_classes: see `focal_gamma`.
        ssim: weight of the SSIM term: 0.1, or 0.2 in the code of GLAD and AnomalDF.
        ignore: (B, 1, E, E') bool: pixels that teach nothing; the mask is False there.

    Returns:
        scalar.
    """
    target = mask.float()
    with torch.autocast(logits.device.type, enabled=False):
        size = (mask.shape[-2], mask.shape[-1])
        probability = resize_aligned(logits.float().softmax(dim=1), size)
        if ignore is not None:  # as if they were judged right, for certain
            good = probability.new_tensor([1.0, 0.0]).view(1, 2, 1, 1)
            probability = torch.where(ignore, good, probability)
        anomalous = probability[:, 1:]
        exponent = logits.new_full((len(logits),), 2.0, dtype=torch.float32)
        of_classes = torch.zeros((), device=logits.device)
        if class_logits is not None:
            class_logits = class_logits.float()
            exponent = focal_gamma(class_logits, category, gamma, hard_classes)
            of_classes = F.cross_entropy(class_logits, category)
        return (
            CLASS_WEIGHT * of_classes
            + focal_loss(probability, target, exponent).mean()
            + ssim * ssim_loss(anomalous, target)
            + IOU_WEIGHT * soft_iou_loss(anomalous, target)
            + F.mse_loss(anomalous, target)
        )


def focal_gamma(
    class_logits: Tensor, category: Tensor, gamma: Gamma, hard_classes: Sequence[int] = ()
) -> Tensor:
    """The focal exponent of each image, smaller where its category is recognised: (B,).

    `slides`: gamma_0 - sigmoid(logit) where the predicted category is right, else gamma_0; not
    part of the gradient. `reference`: max(1.5, 3 - logit) or 3.5, and part of it, so the focal
    term trains the class head too. `constant`: 2.

    Args:
        class_logits: (B, K).
        category: (B,) int64.
        hard_classes: with `reference`, images predicted as one of these get 3.5 (GLAD, AnomalDF).
    """
    logit, predicted = class_logits.max(dim=1)
    right = predicted == category
    if gamma == "constant":
        return torch.full_like(logit, 2.0).detach()
    if gamma == "slides":
        return torch.where(right, GAMMA - logit.detach().sigmoid(), GAMMA)
    hard = torch.isin(predicted, predicted.new_tensor(hard_classes))
    return torch.where(right & ~hard, (GAMMA - logit).clamp(min=1.5), 3.5)


def focal_loss(probability: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
    """Mean over pixels of -(1 - p_t)^gamma log p_t, without alpha balancing.

    p_t = sum_c o_c p_c + 1e-5, o the one-hot mask clamped to [1e-5, 1 - 1e-5].

    Args:
        probability: (B, 2, E, E').
        target: (B, 1, E, E') in {0, 1}.
        gamma: (B,).

    Returns:
        (B,).
    """
    epsilon = 1e-5
    one_hot = torch.cat([1 - target, target], dim=1).clamp(epsilon, 1 - epsilon)
    p_t = (one_hot * probability).sum(dim=1) + epsilon  # (B, E, E')
    # p_t of a certain pixel may round to just above 1, whose power would be NaN.
    miss = (1 - p_t).clamp(min=0)
    return (-(miss ** gamma[:, None, None]) * p_t.log()).mean(dim=(1, 2))


def soft_iou_loss(anomalous: Tensor, target: Tensor) -> Tensor:
    """1 - (sum P y + 1) / (sum P + sum y - sum P y + 1), sums over the whole batch."""
    shared = (anomalous * target).sum()
    return 1 - (shared + 1) / (anomalous.sum() + target.sum() - shared + 1)


def ssim_loss(anomalous: Tensor, target: Tensor) -> Tensor:
    """1 - mean SSIM of two (B, 1, E, E') maps of range 1.

    Gaussian window of 11 pixels and sigma 1.5, zeros outside, c1 = 0.01^2, c2 = 0.03^2.
    """
    moments = torch.stack(
        [anomalous, target, anomalous.square(), target.square(), anomalous * target]
    )  # (5, B, 1, E, E')
    # As two matrix products: backward through one-channel convolutions is slow on a CPU.
    rows, columns = (_window_matrix(size).to(anomalous) for size in anomalous.shape[-2:])
    moments = rows @ moments @ columns.T
    x, y, xx, yy, xy = moments.unbind()
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * x * y + c1) * (2 * (xy - x * y) + c2)) / (
        (x * x + y * y + c1) * (xx - x * x + yy - y * y + c2)
    )
    return 1 - similarity.mean()


@lru_cache(maxsize=32)
def _window_matrix(size: int) -> Tensor:
    """(size, size): the Gaussian window around each place of one axis, cut off at its ends."""
    kernel = gaussian_kernel(1.5, radius=5)[None, None]
    return axis_matrix(size, lambda x: F.conv1d(x, kernel, padding=5))
