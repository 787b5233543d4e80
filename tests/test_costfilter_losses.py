"""Every term of CostFilter's loss against sums over pixels, its gradients, and its cases."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.costfilter.losses import (
    filter_loss,
    focal_gamma,
    focal_loss,
    soft_iou_loss,
    ssim_loss,
)

RULES = ("slides", "reference", "constant")


def problem(seed: int, images: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, class logits, mask, category."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, 2, 8, 8, generator=generator)
    classes = 2 * torch.randn(images, 4, generator=generator)
    mask = torch.rand(images, 1, 12, 14, generator=generator) > 0.7
    return logits, classes, mask, torch.randint(4, (images,), generator=generator)


def at_mask(logits: Tensor, mask: Tensor) -> Tensor:
    size = (mask.shape[-2], mask.shape[-1])
    return F.interpolate(logits.softmax(dim=1), size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("seed", range(3))
def test_focal_pixel_by_pixel(seed: int) -> None:
    logits, _, mask, _ = problem(seed)
    p, gamma = at_mask(logits, mask), torch.tensor([0.0, 1.5, 3.2])
    found = focal_loss(p, mask.float(), gamma)
    for b in range(3):
        total = 0.0
        for y in range(12):
            for x in range(14):
                shares = (1e-5, 1 - 1e-5) if mask[b, 0, y, x] else (1 - 1e-5, 1e-5)
                p_t = sum(s * float(p[b, c, y, x]) for c, s in enumerate(shares)) + 1e-5
                total -= max(0.0, 1 - p_t) ** float(gamma[b]) * math.log(p_t)
        assert float(found[b]) == pytest.approx(total / (12 * 14), rel=1e-4)


def test_focal_without_gamma_is_cross_entropy() -> None:
    logits, _, mask, _ = problem(1)
    p = at_mask(logits, mask)
    expected = F.nll_loss(p.log(), mask[:, 0].long(), reduction="none").mean(dim=(1, 2))
    assert torch.allclose(focal_loss(p, mask.float(), torch.zeros(3)), expected, atol=1e-3)


def test_focal_of_a_certain_map_is_finite() -> None:
    """p_t rounds to above 1 there, and its power would be NaN."""
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).repeat(1, 1, 8, 8).requires_grad_()
    classes = torch.zeros(1, 3, requires_grad=True)
    for mask in (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)):
        loss = filter_loss(logits, classes, mask, torch.tensor([0]), gamma="reference", ssim=0.1)
        gradients = torch.autograd.grad(loss, (logits, classes))
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("seed", range(3))
def test_soft_iou(seed: int) -> None:
    logits, _, mask, _ = problem(seed)
    p, y = at_mask(logits, mask)[:, 1:], mask.float()
    both = sum(float(a) * float(b) for a, b in zip(p.flatten(), y.flatten(), strict=True))
    expected = 1 - (both + 1) / (float(p.sum()) + float(y.sum()) - both + 1)
    assert soft_iou_loss(p, y).item() == pytest.approx(expected, rel=1e-5)
    assert soft_iou_loss(y, y).item() == pytest.approx(0, abs=1e-6)


def test_ssim_window_by_window() -> None:
    generator = torch.Generator().manual_seed(4)
    p, y = torch.rand(2, 1, 9, 7, generator=generator), torch.rand(2, 1, 9, 7, generator=generator)
    weight = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = [w / sum(weight) for w in weight]
    values = []
    for b in range(2):
        for row in range(9):
            for column in range(7):
                sums = [0.0] * 5
                for i in range(11):
                    for j in range(11):
                        v, u = row + i - 5, column + j - 5
                        if 0 <= v < 9 and 0 <= u < 7:
                            a, t = float(p[b, 0, v, u]), float(y[b, 0, v, u])
                            for k, value in enumerate((a, t, a * a, t * t, a * t)):
                                sums[k] += weight[i] * weight[j] * value
                mx, my, xx, yy, xy = sums
                top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
                bottom = (mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4)
                values.append(top / bottom)
    assert ssim_loss(p, y).item() == pytest.approx(1 - sum(values) / len(values), abs=1e-5)
    assert ssim_loss(p, p).item() == pytest.approx(0, abs=1e-5)


def test_gamma_rules() -> None:
    classes = torch.tensor([[4.0, 0, 0], [0.5, 0.2, 0], [0, 1.0, 0], [0, 0, 2.0]])
    category = torch.tensor([0, 0, 0, 2])  # right, right, wrong, right
    sigmoid = [1 / (1 + math.exp(-x)) for x in (4.0, 0.5, 2.0)]
    slides = focal_gamma(classes, category, "slides")
    assert slides.tolist() == pytest.approx([3 - sigmoid[0], 3 - sigmoid[1], 3, 3 - sigmoid[2]])
    reference = focal_gamma(classes, category, "reference")
    assert reference.tolist() == pytest.approx([1.5, 2.5, 3.5, 1.5])
    hard = focal_gamma(classes, category, "reference", hard_classes=(0,))
    assert hard.tolist() == pytest.approx([3.5, 3.5, 3.5, 1.5])
    constant = focal_gamma(classes, category, "constant")
    assert constant.tolist() == [2, 2, 2, 2]


def test_only_the_reference_trains_the_class_head_through_gamma() -> None:
    _, classes, _, _ = problem(2)
    category = classes.argmax(dim=1)
    classes = (0.1 * classes).requires_grad_()
    assert not focal_gamma(classes, category, "slides").requires_grad
    focal_gamma(classes, category, "reference").sum().backward()
    assert classes.grad is not None and classes.grad.abs().sum() > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ssim", [0.0, 0.2])
def test_the_loss_is_the_weighted_sum(rule: Any, ssim: float) -> None:
    logits, classes, mask, category = problem(5)
    p, y = at_mask(logits, mask), mask.float()
    of_pixels = (
        ssim * ssim_loss(p[:, 1:], y)
        + 0.1 * soft_iou_loss(p[:, 1:], y)
        + (p[:, 1:] - y).square().mean()
    )
    gamma = focal_gamma(classes, category, rule)
    of_classes = 0.5 * F.cross_entropy(classes, category)
    expected = focal_loss(p, y, gamma).mean() + of_pixels + of_classes
    found = filter_loss(logits, classes, mask, category, gamma=rule, ssim=ssim)
    assert torch.allclose(found, expected)
    # One category has no class terms.
    expected = focal_loss(p, y, torch.full((3,), 2.0)).mean() + of_pixels
    found = filter_loss(logits, None, mask, category, gamma=rule, ssim=ssim)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("rule", RULES)
def test_ignored_pixels_teach_nothing(rule: Any) -> None:
    logits, classes, _, category = problem(9)
    settings = {"gamma": rule, "ssim": 0.1}
    ignore = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    ignore[..., :3, :] = True
    mask = (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(9)) > 0.7) & ~ignore
    logits.requires_grad_()
    loss = filter_loss(logits, classes, mask, category, **settings, ignore=ignore)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[..., :3, :] == 0).all() and gradient[..., 3:, :].abs().min() > 0
    with torch.no_grad():
        moved = logits + 5 * ignore
        assert filter_loss(moved, classes, mask, category, **settings, ignore=ignore) == loss


def test_gradient_by_differences() -> None:
    logits, classes, mask, _ = problem(7, images=2)
    category = classes.argmax(dim=1)  # a kink of max() is not near
    logits, classes = logits.double().requires_grad_(), (0.2 * classes).requires_grad_()
    settings = {"gamma": "reference", "ssim": 0.1}
    loss = filter_loss(logits, classes, mask, category, **settings)
    by_logits, by_classes = torch.autograd.grad(loss, (logits, classes))
    for tensor, gradient in ((logits, by_logits), (classes, by_classes)):
        push = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
        push = push / push.norm()
        ends = []
        for step in (1e-2, -1e-2):
            moved = [t + step * push if t is tensor else t for t in (logits, classes)]
            ends.append(filter_loss(*moved, mask, category, **settings).item())
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(
            (gradient * push).sum().item(), rel=0.02, abs=1e-4
        )


def test_the_loss_is_float32_under_autocast() -> None:
    logits, classes, mask, category = problem(8)
    logits, classes = logits.bfloat16(), classes.bfloat16()
    settings = {"gamma": "slides", "ssim": 0.1}
    expected = filter_loss(logits.float(), classes.float(), mask, category, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = filter_loss(logits, classes, mask, category, **settings)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6)
