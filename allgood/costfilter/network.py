"""The filter of CostFilter-AD: a 3-D U-Net that denoises a matching cost volume.

Two streams guide it: the features of the image (spatial guidance, SG) and the volume's minimum
(matching guidance, MG), fused with the volume in four stages through residual attention over
channels and space (RCSA). A class head serves the loss only. Depth, the levels, is never pooled.

What is computed is the authors' network; how, is not. Exact, so equal up to rounding:
- the first convolution is 1 x 1 x 1: it runs on the volume's own grid, or on the features
  (`volume.project`), and its few outputs are resized instead of the volume;
- guidance is the same in all slices of depth, so its 3 x 3 x 3 convolution is three 2-D ones;
- the class head runs when asked; `fold` merges batch norms into convolutions for inference.

Letters: B images, R rows (B, or B N with loop_mean), L levels, K categories, S working grid,
b width, C channels, h w grid of features.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from allgood.costfilter.volume import Comparison, project, resize_aligned
from allgood.types import InputError

STAGES = (0, 2, 3, 5)
"""Encoder blocks that are guided: E1, E3, E4 and E6."""


@dataclass(frozen=True)
class NetworkConfig:
    channels: int
    """Of the volume, `VolumeConfig.channels`: the first layer's weights belong to its positions."""
    levels: int
    guidance: tuple[int, ...]
    """Channels of the spatial guidance of each of the four guided stages."""
    matching: int
    """Channels of the matching guidance."""
    classes: int = 1
    """K; a single category gets no class head."""
    width: int = 48
    """b."""
    side: int = 64
    """S, a multiple of 16."""
    stem: int = 192
    """Outputs of the first layer; 384 in the authors' GLAD and AnomalDF filters."""
    align_corners: bool = True
    """Of the resize to the working grid; False in the authors' AnomalDF filter."""
    head: Literal["kaiming", "opposite"] = "kaiming"
    """Start of the two last weights: drawn, as the paper's; or -1 and +1, never near equal."""

    def __post_init__(self) -> None:
        counts = (self.channels, self.levels, self.matching, self.classes, self.stem)
        if len(self.guidance) != 4 or min(*self.guidance, *counts) < 1:
            raise InputError("four guidance widths, and all counts at least 1, are needed")
        if self.side < 16 or self.side % 16:
            raise InputError(f"side must be a multiple of 16, got {self.side}")
        if self.width < 8:
            raise InputError(f"width must be at least 8, got {self.width}")


def small(config: NetworkConfig) -> NetworkConfig:
    """The same network for a CPU: b = 16, S = 32, a first layer of 64. Not the paper's."""
    return replace(config, width=16, side=32, stem=64)


class CostFilterNetwork(nn.Module):
    """The 3-D U-Net; see the module docstring."""

    def __init__(self, config: NetworkConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        b = config.width
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.stem1 = ConvNormReLU(config.channels, config.stem, 1)
            self.stem2 = ConvNormReLU(config.stem, 2 * b, 1)
            widths = ((2, 1, 1), (1, 2, 2), (2, 2, 2), (2, 4, 4), (4, 6, 6), (6, 8, 8))
            self.encoder = nn.ModuleList(block(i * b, m * b, o * b) for i, m, o in widths)
            guided = [widths[stage][2] * b for stage in STAGES]
            self.spatial = nn.ModuleList(
                Projector(c, o) for c, o in zip(config.guidance, guided, strict=True)
            )
            self.matching = nn.ModuleList(Projector(config.matching, o) for o in guided)
            self.fuse = nn.ModuleList(Fuse(o) for o in guided)
            self.bridge = block(14 * b, 8 * b, 8 * b)
            self.decoder = nn.ModuleList(
                (
                    DecoderBlock(8 * b, 4 * b, 4 * b, 4 * b, 4 * b),
                    DecoderBlock(4 * b, 2 * b, 2 * b, 2 * b, 2 * b, attention=False),
                    DecoderBlock(2 * b, b, 2 * b, b, b),
                    DecoderBlock(b, b, b, 2 * b, b),
                )
            )
            self.collapse = nn.Conv3d(b, b, (config.levels, 1, 1))
            self.collapse_attention = ChannelAttention(b, 4)
            self.head = nn.Conv2d(1, 2, 1)
            self.class_head = ClassHead(3 * b, b, config.classes) if config.classes > 1 else None
            self.apply(_initialise)
            if config.head == "opposite":
                with torch.no_grad():
                    self.head.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))

    def forward(
        self,
        volume: Tensor | Comparison,
        sg: Sequence[Tensor],
        mg: Tensor,
        *,
        with_classes: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Filter a volume.

        Args:
            volume: a `Comparison` (see `volume.compare`), whose volume is then never built where
                that is exact; or the volume itself, (R, channels, L, h, w) of any grid.
            sg: four stages of (B, C_s, h, w), see `volume.spread_over_stages`. R may be a multiple
                of B: R / B rows in a row then belong to one image, which is projected once.
            mg: (R, matching, h, w) of any grid: `volume.initial_map`, and what is put beside it.
            with_classes: run the class head, which the loss needs.

        Returns:
            logits (R, 2, S, S), normal and anomalous; class logits (R, K), or None where they were
            not asked for or there is one category only.
        """
        config = self.config
        x = self._first_layers(volume)  # (R, 2b, L, S, S)
        mg = resize_aligned(mg, (config.side, config.side), align_corners=config.align_corners)
        skips = []
        for i, encode in enumerate(self.encoder):
            if 0 < i < 5:
                x = F.max_pool3d(x, (1, 2, 2))
            x = encode(x)
            if i in STAGES:
                s = STAGES.index(i)
                size = (x.shape[-2], x.shape[-1])
                spatial = self.spatial[s](sg[s], config.levels, size)
                if len(spatial) != len(x):
                    spatial = spatial.repeat_interleave(len(x) // len(spatial), dim=0)
                matching = self.matching[s](mg, config.levels, size)
                x = self.fuse[s](torch.cat([x, spatial, matching], dim=1))
            skips.append(x)
        e1, e2, e3, e4, e5, e6 = skips
        x = self.bridge(torch.cat([e6, e5], dim=1))
        joined = x
        for decode, skip in zip(self.decoder, (e4, e3, e2, e1), strict=True):
            x, joined = decode(x, skip)
        flat = self.collapse_attention(self.collapse(x))  # (R, b, 1, S, S)
        logits = self.head(flat.amin(dim=1))
        if not with_classes or self.class_head is None:
            return logits, None
        return logits, self.class_head(torch.cat([joined, x], dim=1))

    def _first_layers(self, volume: Tensor | Comparison) -> Tensor:
        """Resized between the first convolution and its norm, whose statistics in training are
        those of the resized tensor."""
        stem1, side = self.stem1, self.config.side
        if isinstance(volume, Comparison):
            x = project(volume, stem1.conv.weight, stem1.conv.bias)
        else:
            x = stem1.conv(volume)  # (R, stem, L, h, w)
        x = resize_aligned(x, (side, side), align_corners=self.config.align_corners)
        return self.stem2(F.relu(stem1.norm(x), inplace=True))


def anomaly_probability(logits: Tensor, *, templates: int = 1) -> Tensor:
    """(B templates, 2, S, S) -> (B, 1, S, S) in [0, 1]: softmax, averaged over the templates."""
    probability = logits.float().softmax(dim=1)[:, 1:]
    return probability.unflatten(0, (-1, templates)).mean(dim=1)


class ConvNormReLU(nn.Module):
    """Convolution -> BatchNorm3d -> ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2)
        self.norm: nn.Module = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(convolve(self.conv, x)), inplace=True)


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(x)`; for one image on a CPU, without PyTorch's detour.

    PyTorch hands most 3-D convolutions to oneDNN, but not those of a batch of one that are as
    narrow as these: its own loops then take up to five times as long.
    """
    direct = (
        len(x) == 1
        and conv.kernel_size == (3, 3, 3)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    )
    if not direct:
        return conv(x)
    one = [1, 1, 1]  # padding, stride, dilation
    return torch.ops.aten.mkldnn_convolution(x, conv.weight, conv.bias, one, one, one, 1)


def block(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvNormReLU(inputs, middle, 3), ConvNormReLU(middle, outputs, 3))


class Projector(nn.Module):
    """Guidance without depth -> a stage's size and depth: 1 x 1 x 1, resize, 3 x 3 x 3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduce = ConvNormReLU(inputs, outputs, 1)
        self.smooth = ConvNormReLU(outputs, outputs, 3)

    def forward(self, x: Tensor, levels: int, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, outputs, L, *size)."""
        x = self.reduce(x.unsqueeze(2)).squeeze(2)
        x = resize_aligned(x, size, align_corners=False)
        x = depth_constant_conv(x, self.smooth.conv.weight, self.smooth.conv.bias, levels)
        return F.relu(self.smooth.norm(x), inplace=True)


def depth_constant_conv(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int) -> Tensor:
    """A 3 x 3 x 3 convolution, zero-padded, of a tensor that is the same in all L slices.

    A slice in the middle sees the sum of the kernel's three slices k0, k1, k2; the first one has
    zeros before it and sees k1 + k2, the last one k0 + k1. So three 2-D convolutions say it all.

    Args:
        x: (B, C, H, W), one slice.
        weight: (O, C, 3, 3, 3).

    Returns:
        (B, O, L, H, W).
    """
    k0, k1, k2 = weight.unbind(dim=2)
    kernels = [k1] if levels == 1 else [k1 + k2, k0 + k1]
    if levels > 2:
        kernels.insert(1, k0 + k1 + k2)
    repeated = bias.repeat(len(kernels)) if bias is not None else None
    slices = F.conv2d(x, torch.cat(kernels), repeated, padding=1)
    slices = slices.unflatten(1, (len(kernels), -1)).transpose(1, 2)  # (B, O, 1..3, H, W)
    if levels <= 3:
        return slices
    middle = slices[:, :, 1:2].expand(-1, -1, levels - 2, -1, -1)
    return torch.cat([slices[:, :, :1], middle, slices[:, :, 2:]], dim=2)


class ChannelAttention(nn.Module):
    """One MLP on the mean and the maximum of each channel; residual."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv3d(channels, channels // reduction, 1, bias=False)
        self.expand = nn.Conv3d(channels // reduction, channels, 1, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """(B, C, L, H, W) -> (B, C, 1, 1, 1): what each channel is multiplied by, in (1, 2)."""
        pooled = torch.stack([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))])  # (2, B, C)
        hidden = F.relu(F.linear(pooled, self.squeeze.weight.flatten(1)))
        z = F.linear(hidden, self.expand.weight.flatten(1)).sum(dim=0)
        return 1 + z.sigmoid()[:, :, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class RCSA(nn.Module):
    """Residual channel-spatial attention."""

    def __init__(self, channels: int, reduction: int, kernel: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = nn.Conv3d(2, 1, kernel, padding=kernel // 2, bias=False)

    def spatial_gate(self, x: Tensor) -> Tensor:
        """(B, C, L, H, W) -> (B, 1, L, H, W), in (1, 2)."""
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return 1 + self.spatial(pooled).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel(x)
        return x * self.spatial_gate(x)


class Fuse(nn.Module):
    """The volume's features and both guidances, (B, 3c, L, H, W) -> (B, c, L, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = RCSA(3 * channels, 16, 7)
        self.merge = ConvNormReLU(3 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.merge(x)


class DecoderBlock(nn.Module):
    """Twice the height and width, the skip beside it, two convolutions, RCSA."""

    def __init__(
        self,
        inputs: int,
        up: int,
        skip: int,
        middle: int,
        outputs: int,
        *,
        attention: bool = True,
    ) -> None:
        super().__init__()
        self.up = ConvNormReLU(inputs, up, 3)
        self.block = block(up + skip, middle, outputs)
        self.attention = RCSA(outputs, 8, 3) if attention else None

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """(B, inputs, L, H / 2, W / 2) and (B, skip, L, H, W) -> (B, outputs, L, H, W), and what
        the two convolutions saw: (B, up + skip, L, H, W)."""
        size = (skip.shape[-2], skip.shape[-1])
        # Depth keeps its size, so the trilinear resize is bilinear in each slice.
        joined = torch.cat([self.up(resize_aligned(x, size)), skip], dim=1)
        x = self.block(joined)
        return (x if self.attention is None else self.attention(x)), joined


class ClassHead(nn.Module):
    """Which category the image shows, from the last decoder stage's input and output."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.attention = ChannelAttention(inputs, 16)
        self.conv = nn.Conv3d(inputs, hidden, 3, padding=1)
        self.linear = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, L, H, W) -> (B, K)."""
        x = F.relu(self.conv(self.attention(x)), inplace=True)
        return self.linear(x.mean(dim=(2, 3, 4)))


@torch.no_grad()
def fold(network: CostFilterNetwork) -> CostFilterNetwork:
    """A copy for inference, whose batch norms are part of the convolutions before them.

    The first layer's norm follows a resize, which commutes with it: its weights sum to 1.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, ConvNormReLU) and isinstance(module.norm, nn.BatchNorm3d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return folded


def _initialise(module: nn.Module) -> None:
    """As the authors: Kaiming-normal by fan-out; biases 0; linear and norm layers PyTorch's own."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
