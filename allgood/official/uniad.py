"""The checkpoints of UniAD's authors, with EfficientNet-B4."""

from __future__ import annotations

import re
from typing import Any

from allgood.detectors.uniad import UniADConfig
from allgood.official.checkpoint import Official, shape_of, unwrap
from allgood.official.efficientnet import ENCODER, from_lukemelas
from allgood.types import InputError

_CHANNELS = 272
"""Of B4's four levels; the authors' CIFAR-10 checkpoints have five and 720."""

_ENCODER_LAYER = {
    "self_attn": "attention",
    "norm1": "norm",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
    "norm2": "feed_forward.norm",
}
_DECODER_LAYER = {
    "self_attn": "memory_attention",  # so it is called there, though its keys are the encoder's
    "norm1": "memory_norm",
    "multihead_attn": "output_attention",
    "norm2": "output_norm",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
    "norm3": "feed_forward.norm",
}
_OTHERS = {
    "pos_embed.row_embed.weight": "position.row",
    "pos_embed.col_embed.weight": "position.column",
    "transformer.decoder.norm.weight": "norm.weight",
    "transformer.decoder.norm.bias": "norm.bias",
    "input_proj.weight": "input_projection.weight",
    "input_proj.bias": "input_projection.bias",
    "output_proj.weight": "output_projection.weight",
    "output_proj.bias": "output_projection.bias",
}


def from_official(content: Any) -> Official:
    """The authors' `ckpt.pth.tar`, taken apart.

    Raises:
        InputError: a name that is not of this model, one that is missing, or another encoder.
    """
    encoder, rest = unwrap(content, "backbone.")
    weights = {_our_name(name): tensor for name, tensor in rest.items()}
    kind = "UniAD checkpoint with learned positions"
    grid, _ = shape_of(rest, "reconstruction.pos_embed.row_embed.weight", 2, kind=kind)
    _, channels = shape_of(rest, "reconstruction.input_proj.weight", 2, kind=kind)
    if channels != _CHANNELS:
        raise InputError(
            f"this reads UniAD's checkpoints with four levels of EfficientNet-B4 ({_CHANNELS} "
            f"channels); the file has {channels} channels: fit it again with --detector uniad"
        )
    layers = len({name.split(".")[1] for name in weights if name.startswith("encoder_layers.")})
    return Official(
        UniADConfig(grid=grid, layers=layers),
        weights,
        ENCODER,
        from_lukemelas(encoder) if encoder else None,
        image_size=16 * grid,
    )


def _our_name(name: str) -> str:
    """Of one tensor outside the encoder."""
    inner = name.removeprefix("reconstruction.")
    if inner != name and inner in _OTHERS:
        return _OTHERS[inner]
    layer = re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.?(.*)", inner)
    if inner != name and layer:
        half, number, module, rest = layer.groups()
        if half == "decoder" and module == "learned_embed" and rest == "weight":
            return f"decoder_layers.{number}.query"
        modules = _ENCODER_LAYER if half == "encoder" else _DECODER_LAYER
        if module in modules and rest:
            return f"{half}_layers.{number}.{modules[module]}.{rest}"
    raise InputError(f"'{name}' is no part of an official UniAD checkpoint")
