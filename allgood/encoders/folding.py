"""What a frozen backbone computes, in fewer passes: norms and scales multiplied into weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import Conv2dSame, LayerScale
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (nn.Conv2d, Conv2dSame)
"""Convolutions that use their weights as they are; others may standardise them first."""


@torch.no_grad()
def fold_batch_norms(backbone: Any, levels: Sequence[int]) -> None:
    """Multiply, in place, each batch norm into the convolution before it; its activation stays.

    Which convolution that is shows in a run up to the last of `levels`, over one image of the
    backbone's own size: the norm is given the very tensor that the convolution answered, and
    nothing else reads that. Other norms stay as they are. Equal up to rounding, as the statistics
    are fixed.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return
    answered: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # holds the tensors, so that ids stay unique
    norm_of: dict[int, nn.BatchNorm2d] = {}
    readers = _Readers(answered)

    def after_convolution(conv: Any, _: Any, out: Tensor) -> None:
        answered[id(out)] = (conv, out)

    def before_norm(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in answered:
            norm_of[id(inputs[0])] = norm

    hooks = []
    for module in backbone.modules():
        if type(module) in _PLAIN:
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with readers:
        answer = backbone.eval().forward_intermediates(
            torch.zeros(1, *backbone.pretrained_cfg["input_size"]),
            indices=list(levels),
            stop_early=True,
            intermediates_only=True,
        )
    readers.add(answer)  # a level is read by whoever asked for it
    for hook in hooks:
        hook.remove()
    name_of = {module: name for name, module in backbone.named_modules()}
    for key, (conv, _) in answered.items():
        norm = norm_of.get(key)
        if norm is None or readers.count[key] > 1:
            continue
        weight, bias = folded_weights(conv.weight, conv.bias, norm)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        owner, _, last = name_of[norm].rpartition(".")
        setattr(backbone.get_submodule(owner), last, getattr(norm, "act", nn.Identity()))


class _Readers(TorchDispatchMode):
    """Counts the operations that read each tensor of `answered`, by its id."""

    def __init__(self, answered: Mapping[int, Any]) -> None:
        super().__init__()
        self.answered = answered
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.add((args, kwargs))
        return func(*args, **(kwargs or {}))

    def add(self, read: Any) -> None:
        self.count.update(id(leaf) for leaf in tree_leaves(read) if id(leaf) in self.answered)


def folded_weights(
    weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer after which `norm` has nothing left to do, without gradients.

    Args:
        weight: (O, ...), or (I, O, ...) of a `transposed` convolution.
        bias: (O,), or None.

    Returns:
        float64, of the same shapes.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    fused = fuse_conv_bn_weights(
        weight.double(),
        None if bias is None else bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        norm.weight.double(),
        norm.bias.double(),
        transposed,
    )
    return fused[0].detach(), fused[1].detach()


@torch.no_grad()
def fold_layer_scales(backbone: Any) -> None:
    """Multiply, in place, a ViT's layer scales into the matrices before them."""
    for block in getattr(backbone, "blocks", ()):
        for scale, before in (("ls1", ("attn", "proj")), ("ls2", ("mlp", "fc2"))):
            layer_scale = getattr(block, scale, None)
            if not isinstance(layer_scale, LayerScale):
                continue
            linear = getattr(getattr(block, before[0]), before[1])
            linear.weight.mul_(layer_scale.gamma[:, None])
            if linear.bias is not None:
                linear.bias.mul_(layer_scale.gamma)
            setattr(block, scale, nn.Identity())
