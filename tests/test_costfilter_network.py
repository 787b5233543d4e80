"""The filter's network against one written out from the paper, in float64, operation by operation;
each exact rewrite against its plain form; shapes, settings, and that the small one learns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.costfilter.losses import filter_loss
from allgood.costfilter.network import (
    RCSA,
    ClassHead,
    CostFilterNetwork,
    NetworkConfig,
    anomaly_probability,
    convolve,
    depth_constant_conv,
    fold,
    small,
)
from allgood.costfilter.volume import (
    VolumeConfig,
    compare,
    cost_volume,
    initial_map,
    spread_over_stages,
)
from allgood.types import InputError

TINY = NetworkConfig(36, 2, (5, 5, 7, 7), 2, classes=3, width=8, side=16, stem=12)
GRID = (3, 4)


def network(config: NetworkConfig, seed: int = 0) -> CostFilterNetwork:
    """Weights that keep signals of a sane size, batch norms as after some training."""
    filled = CostFilterNetwork(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in filled.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                bound = (3 / module.weight[0].numel()) ** 0.5
                module.weight.uniform_(-bound, bound, generator=generator)
            if isinstance(module, nn.BatchNorm3d):
                for tensor, low, high in (
                    (module.running_mean, -0.2, 0.2),
                    (module.running_var, 0.5, 2),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.2, 0.2),
                ):
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)
    return filled.eval()


def features(seed: int, images: int = 2, templates: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    query = [torch.randn(images, c, *GRID, generator=generator) for c in (5, 7)]
    template = [torch.randn(images, templates, c, *GRID, generator=generator) for c in (5, 7)]
    return query, template


class Plain:
    """The paper's network in float64 over our weights; `training` takes the batch's statistics."""

    def __init__(self, ours: CostFilterNetwork, *, training: bool) -> None:
        self.w = {
            name: value.detach().double().requires_grad_(value.dtype == torch.float32)
            for name, value in ours.state_dict().items()
        }
        self.config, self.training = ours.config, training

    def conv(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv3d(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), padding=padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean = self.w[f"{name}.running_mean"][:, None, None, None]
        variance = self.w[f"{name}.running_var"][:, None, None, None]
        if self.training:
            mean = x.mean(dim=(0, 2, 3, 4))[:, None, None, None]
            variance = ((x - mean) ** 2).mean(dim=(0, 2, 3, 4))[:, None, None, None]
        x = (x - mean) / (variance + 1e-5).sqrt()
        return (
            x * self.w[f"{name}.weight"][:, None, None, None]
            + (self.w[f"{name}.bias"][:, None, None, None])
        )

    def cbr(self, name: str, x: Tensor, padding: int = 0) -> Tensor:
        return self.norm(f"{name}.norm", self.conv(f"{name}.conv", x, padding)).relu()

    def block(self, name: str, x: Tensor) -> Tensor:
        return self.cbr(f"{name}.1", self.cbr(f"{name}.0", x, 1), 1)

    def channel(self, name: str, x: Tensor) -> Tensor:
        average, most = (
            self.conv(f"{name}.expand", self.conv(f"{name}.squeeze", pooled).relu())
            for pooled in (x.mean((2, 3, 4), keepdim=True), x.amax((2, 3, 4), keepdim=True))
        )
        return torch.sigmoid(average + most) * x + x

    def rcsa(self, name: str, x: Tensor, padding: int) -> Tensor:
        x = self.channel(f"{name}.channel", x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return torch.sigmoid(self.conv(f"{name}.spatial", pooled, padding)) * x + x

    def guide(self, name: str, x: Tensor, size: torch.Size) -> Tensor:
        x = self.cbr(f"{name}.reduce", x.unsqueeze(2))
        x = F.interpolate(x, size, mode="trilinear", align_corners=False)
        return self.cbr(f"{name}.smooth", x, 1)

    def __call__(
        self, volume: Tensor, sg: list[Tensor], mg: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        side = (self.config.side,) * 2
        volume, mg = volume.double(), mg.double()
        x = F.interpolate(volume, (volume.shape[2], *side), mode="trilinear", align_corners=True)
        mg = F.interpolate(mg, side, mode="bilinear", align_corners=True)
        x = self.cbr("stem2", self.cbr("stem1", x))
        stages = []
        for number in range(1, 7):
            x = self.block(f"encoder.{number - 1}", x)
            if number in (1, 3, 4, 6):
                s = (1, 3, 4, 6).index(number)
                spatial = self.guide(f"spatial.{s}", sg[s].double(), x.shape[2:])
                matching = self.guide(f"matching.{s}", mg, x.shape[2:])
                x = self.rcsa(f"fuse.{s}.attention", torch.cat([x, spatial, matching], dim=1), 3)
                x = self.cbr(f"fuse.{s}.merge", x)
            stages.append(x)
            if number <= 4:
                x = F.max_pool3d(x, (1, 2, 2))
        e1, e2, e3, e4, e5, e6 = stages
        x = self.block("bridge", torch.cat([e6, e5], dim=1))
        for i, skip in enumerate((e4, e3, e2, e1)):
            up = F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear", align_corners=True)
            q = torch.cat([self.cbr(f"decoder.{i}.up", up, 1), skip], dim=1)
            x = self.block(f"decoder.{i}.block", q)
            if i != 1:
                x = self.rcsa(f"decoder.{i}.attention", x, 1)
        flat = self.channel("collapse_attention", self.conv("collapse", x))
        logits = F.conv2d(flat.amin(dim=1), self.w["head.weight"], self.w["head.bias"])
        if self.config.classes == 1:
            return logits, None
        c = self.channel("class_head.attention", torch.cat([q, x], dim=1))
        c = self.conv("class_head.conv", c, 1).relu().mean(dim=(2, 3, 4))
        return logits, c @ self.w["class_head.linear.weight"].T + self.w["class_head.linear.bias"]


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("training", [False, True])
def test_the_network_of_the_paper(seed: int, training: bool) -> None:
    """From features, so through the fused first layer; gradients in float64, from the volume."""
    ours = network(TINY, seed).train(training)
    query, template = features(seed)
    comparison = compare(query, template, VolumeConfig(GRID, 3))
    sg, mg, volume = spread_over_stages(query), initial_map(comparison), cost_volume(comparison)
    plain = Plain(ours, training=training)
    expected, expected_classes = plain(volume, sg, mg)
    logits, classes = ours(comparison, sg, mg, with_classes=True)
    assert classes is not None and expected_classes is not None
    assert near(logits, expected) and near(classes, expected_classes)

    ours = network(TINY, seed).train(training).double()
    double = (volume.double(), [level.double() for level in sg], mg.double())
    logits, classes = ours(*double, with_classes=True)
    assert classes is not None and near(logits, expected, 1e-10)
    generator = torch.Generator().manual_seed(seed)
    push = [torch.randn(t.shape, generator=generator).double() for t in (logits, classes)]
    ((logits * push[0]).sum() + (classes * push[1]).sum()).backward()
    ((expected * push[0]).sum() + (expected_classes * push[1]).sum()).backward()
    for name, parameter in ours.named_parameters():
        other = plain.w[name].grad
        assert parameter.grad is not None and other is not None, name
        # In training a bias before a batch norm has no gradient but rounding.
        assert (parameter.grad - other).abs().max() <= 1e-8 * (1 + other.abs().max()), name


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("classes", [1, 15])
def test_shapes(levels: int, images: int, classes: int) -> None:
    config = NetworkConfig(6, levels, (3, 4, 5, 6), levels, classes, width=8, side=32, stem=8)
    ours = CostFilterNetwork(config).eval()
    sg = [torch.randn(images, c, 5, 6) for c in config.guidance]
    volume, mg = torch.rand(images, 6, levels, 5, 6), torch.rand(images, levels, 5, 6)
    logits, class_logits = ours(volume, sg, mg, with_classes=True)
    assert logits.shape == (images, 2, 32, 32)
    if classes == 1:
        assert class_logits is None and not any("class" in n for n, _ in ours.named_parameters())
    else:
        assert class_logits is not None and class_logits.shape == (images, 15)
    again, none = ours(volume, sg, mg)
    assert none is None and torch.equal(again, logits)  # the class head does not touch the map


@pytest.mark.parametrize("levels", range(1, 7))
def test_depth_constant_convolution(levels: int) -> None:
    conv = nn.Conv3d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 6)
    found = depth_constant_conv(x, conv.weight, conv.bias, levels)
    expected = conv(x.unsqueeze(2).expand(-1, -1, levels, -1, -1))
    assert near(found, expected)
    push, parameters = torch.randn_like(expected), list(conv.parameters())
    ours = torch.autograd.grad((found * push).sum(), parameters)
    plain = torch.autograd.grad((expected * push).sum(), parameters)
    assert all(near(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("images", [1, 2])
def test_folded_and_fused_forms_agree(images: int) -> None:
    ours = network(TINY, 4)
    query, template = features(4, images)
    comparison = compare(query, template, VolumeConfig(GRID, 3))
    sg, mg = spread_over_stages(query), initial_map(comparison)
    folded = fold(ours)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in folded.modules())
    before, volume = ours.state_dict(), cost_volume(comparison)
    resized = F.interpolate(volume, (2, 16, 16), mode="trilinear", align_corners=True)
    expected, _ = ours(resized, sg, mg)
    with torch.inference_mode():  # also takes the direct convolutions for a single image
        for form in (comparison, volume, resized):
            assert near(ours(form, sg, mg)[0], expected)
            assert near(folded(form, sg, mg)[0], expected)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


def test_direct_convolution_of_one_image() -> None:
    conv = nn.Conv3d(4, 5, 3, padding=1)
    x = torch.randn(1, 4, 2, 6, 7)
    with torch.no_grad():
        assert near(convolve(conv, x), conv(x))
    assert convolve(conv, x).requires_grad


def test_rows_of_templates_share_their_image() -> None:
    """loop_mean: one batch of all templates is each template alone."""
    ours = network(replace(TINY, channels=12), 5)
    query, template = features(5)
    sg = spread_over_stages(query)
    looped = compare(query, template, VolumeConfig(GRID, 3, merge="loop_mean"))
    logits, classes = ours(looped, sg, initial_map(looped), with_classes=True)
    assert logits.shape == (6, 2, 16, 16) and classes is not None and classes.shape == (6, 3)
    maps = []
    for n in range(3):
        single = compare(query, [t[:, n : n + 1] for t in template], VolumeConfig(GRID))
        one, _ = ours(single, sg, initial_map(single))
        assert near(logits.unflatten(0, (2, 3))[:, n], one)
        maps.append(one.softmax(dim=1)[:, 1:])
    mean = torch.stack(maps).mean(dim=0)
    assert torch.allclose(anomaly_probability(logits, templates=3), mean, atol=1e-6)


def test_attention_of_zero_weights_is_two_gates_of_one_half() -> None:
    attention = RCSA(8, 4, 3)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 8, 2, 4, 4)
    assert torch.allclose(attention(x), 2.25 * x)


def test_initialisation() -> None:
    ours = CostFilterNetwork(replace(TINY, width=16, stem=96), seed=3)
    for name, module in ours.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            if module.weight.numel() > 1000:
                expected = (2 / fan_out) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
            assert module.bias is None or not module.bias.any()
    assert isinstance(ours.class_head, ClassHead) and ours.class_head.linear.bias.any()
    opposite = CostFilterNetwork(replace(TINY, head="opposite"))
    assert opposite.head.weight.flatten().tolist() == [-1, 1]


def test_a_seed_gives_one_network_and_leaves_the_world_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = (CostFilterNetwork(TINY, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["bridge.0.conv.weight"], other["bridge.0.conv.weight"])


def test_the_small_network_learns() -> None:
    """To find what no template holds, in thirty steps."""
    config = small(NetworkConfig(16, 2, (6, 6, 6, 6), 2, head="opposite"))
    assert (config.width, config.side, config.stem) == (16, 32, 64)
    ours = CostFilterNetwork(config)
    assert sum(p.numel() for p in ours.parameters()) < 5_000_000
    generator = torch.Generator().manual_seed(0)
    volume = VolumeConfig((4, 4))

    def batch() -> tuple[Any, list[Tensor], Tensor]:
        template = [torch.randn(8, 1, 6, 4, 4, generator=generator) for _ in range(2)]
        mask = (torch.rand(8, 1, 4, 4, generator=generator) > 0.7).float()
        noise = [torch.randn(8, 6, 4, 4, generator=generator) for _ in range(2)]
        query = [t[:, 0] * (1 - mask) + n * mask for t, n in zip(template, noise, strict=True)]
        return compare(query, template, volume), query, F.interpolate(mask, 32)

    optimizer = torch.optim.Adam(ours.parameters(), 1e-3, betas=(0.9, 0.98))
    losses = []
    for _ in range(30):
        comparison, query, mask = batch()
        logits, classes = ours(comparison, spread_over_stages(query), initial_map(comparison))
        category = torch.zeros(8, dtype=torch.int64)
        loss = filter_loss(logits, classes, mask, category, gamma="slides", ssim=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 24}, "multiple of 16, got 24"),
        ({"side": 0}, "multiple of 16, got 0"),
        ({"width": 4}, "width must be at least 8"),
        ({"guidance": (1, 2, 3)}, "four guidance widths"),
        ({"levels": 0}, "at least 1"),
        ({"matching": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)
