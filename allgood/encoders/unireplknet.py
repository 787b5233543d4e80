"""UniRepLKNet-N: a convolutional network with 13 x 13 kernels, up to its stage of stride 16.

Paper: Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", CVPR 2024. Top-1 on
ImageNet-1K: 81.64. timm does not have it. Its last stage is left out: MiniMaxAD, whose encoder this
is, does not read it; MiniMaxAD's decoder is made of the same blocks.

Every block has two forms that compute the same. What is trained has batch norms and, in place of a
13 x 13 kernel, six kernels side by side; `merge` makes one kernel with a bias of them.

Letters: B images, C channels, H W grid, N = H W positions, K = 4 C hidden channels, k kernel size.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from allgood.encoders.folding import folded_weights
from allgood.types import InputError

NAME = "unireplknet_n"
HUB = ("DingXiaoH/UniRepLKNet", "unireplknet_n_in1k_224_acc81.64.pth")
"""Repository and file of the authors' weights, trained on ImageNet-1K."""

WIDTHS, DEPTHS, KERNEL_SIZES = (80, 160, 320), (2, 2, 8), (3, 13, 13)
"""Of the stages."""
BRANCHES = ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
"""Kernel size and dilation of the convolutions that are one of 13 x 13 after merging."""


class UniRepLKNet(nn.Module):
    """The backbone, offering what `FrozenEncoder` reads of timm's."""

    feature_info: Sequence[Mapping[str, int]] = tuple(
        {"num_chs": width, "reduction": 4 * 2**i} for i, width in enumerate(WIDTHS)
    )
    pretrained_cfg: Mapping[str, Any] = {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "input_size": (3, 224, 224),
    }

    def __init__(self) -> None:
        super().__init__()
        first = WIDTHS[0] // 2
        stem = (_halve(3, first), ChannelNorm(first), nn.GELU(), _halve(first, WIDTHS[0]))
        self.downsample = nn.ModuleList([nn.Sequential(*stem, ChannelNorm(WIDTHS[0]))])
        for before, width in pairwise(WIDTHS):
            self.downsample.append(nn.Sequential(_halve(before, width), ChannelNorm(width)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, kernel_size) for _ in range(depth)))
            for width, depth, kernel_size in zip(WIDTHS, DEPTHS, KERNEL_SIZES, strict=True)
        )

    def prune_intermediate_layers(
        self, indices: Sequence[int], *, prune_norm: bool, prune_head: bool
    ) -> None:
        """Drop the stages behind the last one read; there is neither a norm nor a head to drop.

        Raises:
            InputError: the norm is wanted.
        """
        if not prune_norm:
            raise InputError(f"encoder '{NAME}' has no final norm: leave out norm")
        self.downsample = self.downsample[: indices[-1] + 1]
        self.stages = self.stages[: indices[-1] + 1]

    def forward_intermediates(
        self,
        x: Tensor,
        *,
        indices: Sequence[int],
        norm: bool,
        stop_early: bool,
        intermediates_only: bool,
    ) -> list[Tensor]:
        """Normalised images (B, 3, H, W) -> the stages' outputs, as the next stage reads them.

        The arguments are timm's; it always stops after the last stage that is left.
        """
        levels = []
        for downsample, stage in zip(self.downsample, self.stages, strict=True):
            x = stage(downsample(x))
            levels.append(x)
        return [levels[i] for i in indices]


class Block(nn.Module):
    """Depthwise convolution, squeeze-and-excitation, feed-forward with GRN, layer scale.

    Called SmaK with a kernel of 3 and LarK with 13. In training form; see `MergedBlock`.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = (
            DilatedBranches(width) if kernel_size == 13 else Depthwise(width, kernel_size)
        )
        self.norm = nn.BatchNorm2d(width)
        self.se = SqueezeExcitation(width)
        self.expand = nn.Linear(width, 4 * width)
        self.grn_scale = nn.Parameter(torch.zeros(4 * width))
        self.grn_shift = nn.Parameter(torch.zeros(4 * width))
        self.reduce = nn.Linear(4 * width, width, bias=False)
        self.out_norm = nn.BatchNorm2d(width)
        self.layer_scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = _laid_out(x)
        u = self.norm(self.depthwise(x))
        y = feed_forward(
            u,
            self.se(u),
            self.expand,
            self.grn_scale,
            self.reduce.weight,
            # GRN's shift is a constant, and stays one behind the product.
            self.reduce.weight @ self.grn_shift,
        )
        return x + self.layer_scale.view(-1, 1, 1) * self.out_norm(y)

    def merged(self) -> "MergedBlock":
        """The same function of running statistics, in fewer steps."""
        return MergedBlock(self)


class MergedBlock(nn.Module):
    """A block for inference: one depthwise kernel, and no norm but GRN's scale."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        kernel, bias = folded_weights(*block.depthwise.folded(), block.norm)
        self.depthwise = Depthwise(len(kernel), kernel.shape[-1], bias=True)
        _fill(self.depthwise, kernel, bias)
        self.se, self.expand, self.grn_scale = block.se, block.expand, block.grn_scale
        weight = block.reduce.weight.double()
        weight, bias = folded_weights(weight, weight @ block.grn_shift.double(), block.out_norm)
        scale = block.layer_scale.double()
        self.reduce = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        _fill(self.reduce, scale[:, None] * weight, scale * bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = _laid_out(x)
        u = self.depthwise(x)
        reduce = self.reduce
        return x + feed_forward(
            u, self.se(u), self.expand, self.grn_scale, reduce.weight, reduce.bias
        )


class SqueezeExcitation(nn.Module):
    """One factor in (0, 1) per image and channel, from the means over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width // 4, 1)
        self.up = nn.Conv2d(width // 4, width, 1)

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        mean = u.mean(dim=(2, 3), keepdim=True)
        return self.up(F.relu(self.down(mean))).sigmoid().flatten(1)


def feed_forward(
    u: Tensor,
    gate: Tensor,
    expand: nn.Linear,
    grn_scale: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
) -> Tensor:
    """W2 GRN(gelu(W1 (gate u) + b1)) + b2 at every position.

    GRN multiplies each channel of an image by 1 + a g / mean(g), g its norm over all positions
    (MiniMaxAD, Eqs. 4 and 5). Like the gate it is one factor per channel.

    Args:
        u: (B, C, H, W), best contiguous.
        gate: (B, C).
        grn_scale: a, (K,).
        reduce_weight, reduce_bias: W2 (C, K) and b2 (C,).
    """
    x = u.flatten(2)  # (B, C, N): products on this side need no other layout
    hidden = F.gelu(_scaled_product(expand.weight, gate, x, expand.bias))  # (B, K, N)
    precision = torch.promote_types(hidden.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden, dim=2, dtype=precision)  # (B, K)
    response = 1 + grn_scale * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6))
    y = _scaled_product(reduce_weight, response, hidden, reduce_bias)
    return y.unflatten(2, u.shape[2:])


def _scaled_product(weight: Tensor, factor: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """weight @ (factor x) + bias, the factors multiplied into whichever side is smaller.

    Args:
        weight: (O, I).
        factor: (B, I).
        x: (B, I, N).
        bias: (O,).

    Returns:
        (B, O, N).
    """
    if len(weight) <= x.shape[2]:
        return torch.baddbmm(bias.unsqueeze(1), weight * factor.unsqueeze(1), x)
    scaled = x * factor.unsqueeze(2)
    return torch.baddbmm(bias.unsqueeze(1), weight.expand(len(x), -1, -1), scaled)


class Depthwise(nn.Conv2d):
    """A depthwise convolution that keeps the size."""

    def __init__(
        self, width: int, kernel_size: int, *, dilation: int = 1, bias: bool = False
    ) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(
            *(width, width, kernel_size),
            padding=padding,
            dilation=dilation,
            groups=width,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        # A weight of one input channel is contiguous whatever its strides say. They are made anew:
        # channels-last ones would have every convolution answer in that layout.
        weight = self.weight.squeeze(1).unsqueeze(1)
        return F.conv2d(
            _laid_out(x), weight, self.bias, 1, self.padding, self.dilation, self.groups
        )

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, k, k) and bias (C,), float64."""
        return self.weight.double(), self.weight.new_zeros(len(self.weight)).double()


def _laid_out(x: Tensor) -> Tensor:
    """In the layout in which large depthwise kernels are fastest.

    On a CPU a forward pass takes half as long on contiguous tensors, and a backward pass, which
    takes ten times as long as that, half to a third as long on channels-last ones.
    """
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


class DilatedBranches(nn.Module):
    """The sum of six depthwise convolutions, each with a norm of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches: Any = nn.ModuleList(
            ConvNorm(Depthwise(width, size, dilation=dilation)) for size, dilation in BRANCHES
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out

    def folded(self) -> tuple[Tensor, Tensor]:
        """One kernel (C, 1, 13, 13) and bias (C,) that do the same, float64."""
        kernel, bias = self.branches[0].folded()
        for branch, (size, dilation) in zip(self.branches[1:], BRANCHES[1:], strict=True):
            small, shift = branch.folded()
            first = 6 - dilation * (size // 2)  # so that both have one centre
            taps = slice(first, 13 - first, dilation)
            kernel[..., taps, taps] += small
            bias += shift
        return kernel, bias


class ConvNorm(nn.Module):
    """A convolution without bias and the batch norm behind it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that does the same, float64."""
        return folded_weights(self.conv.weight, None, self.norm)

    def merged(self) -> nn.Conv2d:
        """The same function of running statistics, for dense convolutions."""
        merged: nn.Conv2d = _fill(copy.deepcopy(self.conv), *self.folded())
        return merged


class ChannelNorm(nn.Module):
    """LayerNorm over the channels at every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight, self.bias)


def channel_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W), mean 0 and variance 1 over the channels, then scale, shift."""
    normed = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, 1e-6)
    return normed.permute(0, 3, 1, 2)


@torch.no_grad()
def merge(module: nn.Module) -> nn.Module:
    """Merge, in place, every block and every convolution with its norm below a module.

    Exact to rounding: each branch is linear, padded with zeros on the same grid and centred on the
    same pixel, and each norm is an affine map of what its convolution gives.
    """
    for name, child in module.named_children():
        if isinstance(child, Block | ConvNorm):
            setattr(module, name, child.merged())
        else:
            merge(child)
    return module.requires_grad_(False)


def _fill(module: Any, weight: Tensor, bias: Tensor) -> Any:
    """Give a layer these numbers, in float32."""
    module.weight = nn.Parameter(weight.float(), requires_grad=False)
    module.bias = nn.Parameter(bias.float(), requires_grad=False)
    return module


def _halve(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)


# Weights ------------------------------------------------------------------------------------------

_OURS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^downsample_layers\.", "downsample."),
    (r"\.act\.1\.gamma$", ".grn_scale"),
    (r"\.act\.1\.beta$", ".grn_shift"),
    (r"\.gamma$", ".layer_scale"),
    (r"\.dwconv\.weight$", ".depthwise.weight"),
    (r"\.dwconv\.lk_origin\.", ".depthwise.branches.0.conv."),
    (r"\.dwconv\.origin_bn\.", ".depthwise.branches.0.norm."),
    (r"\.dwconv\.dil_conv_k(\d)_(\d)\.", lambda m: f".depthwise.branches.{_branch(m)}.conv."),
    (r"\.dwconv\.dil_bn_k(\d)_(\d)\.", lambda m: f".depthwise.branches.{_branch(m)}.norm."),
    (r"\.pwconv1\.1\.", ".expand."),
    (r"\.pwconv2\.0\.", ".reduce."),
    (r"\.pwconv2\.2\.", ".out_norm."),
)


def _branch(kernel: re.Match[str]) -> int:
    size, dilation = int(kernel[1]), int(kernel[2])
    return BRANCHES.index((size, dilation)) if (size, dilation) in BRANCHES else len(BRANCHES)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of a network of such blocks -> ours; unknown ones stay as they are."""
    ours = {}
    for name, tensor in state.items():
        for pattern, replacement in _OURS:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor.flatten() if name.endswith(("grn_scale", "grn_shift")) else tensor
    return ours


def with_weights_of(path: Path) -> UniRepLKNet:
    """The backbone with a file's weights, in the authors' names; every one of them or none.

    Raises:
        ValueError: a weight is missing or has another shape, or no training ever touched it.
    """
    content = (
        load_file(path)
        if path.suffix == ".safetensors"
        else torch.load(path, map_location="cpu", weights_only=True)
    )
    for wrapper in ("model", "models", "state_dict", "model_ema"):
        content = content.get(wrapper, content)
    found = renamed(content)
    backbone = UniRepLKNet()
    state = {}
    for name, own in backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = own
        elif name not in found:
            raise ValueError(f"'{name}' is missing")
        elif found[name].shape != own.shape:
            raise ValueError(
                f"'{name}' has the shape {tuple(found[name].shape)}, not {tuple(own.shape)}"
            )
        else:
            state[name] = found[name]
    if all((state[name] == 1).all() for name in state if name.endswith("running_var")):
        raise ValueError("its batch norms have never seen a picture")
    backbone.load_state_dict(state)
    return backbone


def from_hub() -> UniRepLKNet:
    """With the authors' ImageNet weights; raises whatever the hub's client raises."""
    from huggingface_hub import hf_hub_download

    return with_weights_of(Path(hf_hub_download(*HUB)))
