"""EfficientNets of the original PyTorch port (`_conv_stem`, `_blocks.7._bn1`) in timm's terms.

Lite0, the embedded default, has its names; so has the B4 on which UniAD, UniAS and HVQ-Trans were
built, and that one pads differently, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from allgood.types import InputError

B4 = "tf_efficientnet_b4"
B4_REPEATS = (2, 4, 4, 6, 6, 8, 2)
"""Blocks per stage."""

_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    **_SQUEEZE,
}
_PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
    **_SQUEEZE,
}


def is_original(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the port's names."""
    return "_conv_stem.weight" in state


def timm_state(state: Mapping[str, Tensor], repeats: Sequence[int]) -> dict[str, Tensor]:
    """The port's state dict under timm's names; no tensor is changed.

    Args:
        repeats: blocks per stage; the port numbers its blocks across stages.

    Raises:
        InputError: a name that is not the port's.
    """
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(repeats) for i in range(count)]
    place_of = {str(number): place for number, place in enumerate(places)}
    renamed = {}
    for name, tensor in state.items():
        try:
            match name.split("."):
                case ["_blocks", number, module, suffix]:
                    # A block that does not expand lacks the first of three convolutions.
                    expands = f"_blocks.{number}._expand_conv.weight" in state
                    names = _EXPANDED if expands else _PLAIN
                    renamed[f"{place_of[number]}.{names[module]}.{suffix}"] = tensor
                case [module, suffix]:
                    renamed[f"{_TOP[module]}.{suffix}"] = tensor
                case _:
                    raise KeyError(name)
        except KeyError:
            raise InputError(f"'{name}' is no part of such an EfficientNet") from None
    return renamed


def pad_as_the_reference(backbone: Any, name: str) -> None:
    """Give B4 the padding of UniAD's, UniAS's and HVQ-Trans's authors.

    Their port fixes its padding for 380 x 380 pixels. At 224 that differs from TensorFlow's in one
    place, the strided 5 x 5 convolution that opens stage 2: two on each side instead of (1, 2).

    Raises:
        InputError: another architecture.
    """
    if name.partition(".")[0] != B4:
        raise InputError(
            f"reference_padding is that of {B4}, and encoder '{name}' is another: leave it out"
        )
    block = backbone.blocks[2][0]
    same = block.conv_dw
    block.conv_dw = nn.Conv2d(
        same.in_channels,
        same.out_channels,
        same.kernel_size,
        same.stride,
        padding=2,
        groups=same.groups,
        bias=False,
    )
    block.conv_dw.weight = same.weight
