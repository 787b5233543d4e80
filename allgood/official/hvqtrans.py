"""The checkpoints of HVQ-Trans's authors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from allgood.detectors.hvqtrans import HVQTransConfig
from allgood.official.checkpoint import Official, shape_of, unwrap
from allgood.official.efficientnet import ENCODER, from_lukemelas
from allgood.types import InputError

_NAMES = {
    r"quantize_conv_t\.(weight|bias)": r"input_projection.\1",
    r"pos_embed\.row_embed\.weight": "position.row",
    r"pos_embed\.col_embed\.weight": "position.column",
    r"encoder\.layers\.(\d+)\.self_attn\.(.+)": r"encoder_layers.\1.attention.\2",
    r"encoder\.layers\.(\d+)\.(linear[12]\..+)": r"encoder_layers.\1.feed_forward.\2",
    r"encoder\.layers\.(\d+)\.norm1\.(.+)": r"encoder_layers.\1.norm.\2",
    r"encoder\.layers\.(\d+)\.norm2\.(.+)": r"encoder_layers.\1.feed_forward.norm.\2",
    r"decoder\.layers\.(\d+)\.self_attn\.(.+)": r"decoder_layers.\1.self_attention.\2",
    r"decoder\.layers\.(\d+)\.multihead_attn\.(.+)": r"decoder_layers.\1.cross_attention.\2",
    r"decoder\.layers\.(\d+)\.(linear[12]\..+)": r"decoder_layers.\1.feed_forward.\2",
    r"decoder\.layers\.(\d+)\.norm1\.(.+)": r"decoder_layers.\1.self_norm.\2",
    r"decoder\.layers\.(\d+)\.norm2\.(.+)": r"decoder_layers.\1.cross_norm.\2",
    r"decoder\.layers\.(\d+)\.norm3\.(.+)": r"decoder_layers.\1.feed_forward.norm.\2",
    r"decoder\.norm\.(.+)": r"decoder_norm.\1",
}
_BUFFERS = {"embed": "codes", "embed_avg": "sums", "cluster_size": "counts"}
_PER_CATEGORY = re.compile(
    r"quantize_list_([1-5])\.(\d+)\.(embed|embed_avg|cluster_size)"
    r"|output_proj_list\.(\d+)\.(weight|bias)"
)
_UNUSED = {"input_proj.weight", "input_proj.bias"}
"""A layer that the authors' network makes and never asks."""


def from_official(content: Any) -> Official:
    """The authors' checkpoint, or its state dict, taken apart.

    Raises:
        InputError: a name that is not of this model, or one that is missing.
    """
    encoder, state = unwrap(content, "enc.")
    kind = "HVQ-Trans checkpoint"
    width, *_ = shape_of(state, "quantize_conv_t.weight", 4, kind=kind)
    grid, _ = shape_of(state, "pos_embed.row_embed.weight", 2, kind=kind)
    (codebook_size,) = shape_of(state, "quantize_list_5.0.cluster_size", 1, kind=kind)
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}  # ours -> category -> the part of it
    for name, tensor in state.items():
        if found := _PER_CATEGORY.fullmatch(name):
            level, category, buffer, output, kind = found.groups()
            books = "root" if level == "5" else f"codebooks.{int(level or 0) - 1}"
            ours = f"output.{kind}" if output else f"{books}.{_BUFFERS[buffer]}"
            is_codes = buffer in ("embed", "embed_avg") and tensor.ndim == 2
            rows = tensor.T if is_codes else tensor  # codes stand in columns there
            parts.setdefault(ours, {})[int(output or category)] = rows
        elif name not in _UNUSED:
            weights[_our_name(name)] = tensor
    categories = max((max(part) for part in parts.values()), default=-1) + 1
    for ours, part in parts.items():
        weights[ours] = _stacked(ours, part, categories)
    # A 1 x 1 convolution there.
    weights["input_projection.weight"] = weights["input_projection.weight"].flatten(1)
    config = HVQTransConfig(
        grid=grid,
        width=width,
        layers=len({name.split(".")[1] for name in weights if name.startswith("encoder_layers.")}),
        codebook_size=codebook_size,
        codebook_start="reference",  # the codes are there: pictures must not replace them
        optimal_transport=True,
    )
    return Official(
        config,
        weights,
        ENCODER,
        from_lukemelas(encoder) if encoder else None,
        image_size=224,
        num_categories=categories,
    )


def _our_name(name: str) -> str:
    for official, ours in _NAMES.items():
        if found := re.fullmatch(official, name):
            return found.expand(ours)
    raise InputError(f"'{name}' is no part of an official HVQ-Trans checkpoint")


def _stacked(ours: str, part: Mapping[int, Tensor], categories: int) -> Tensor:
    shapes = {tensor.shape for tensor in part.values()}
    if len(part) != categories or len(shapes) > 1:
        raise InputError(
            f"no official HVQ-Trans checkpoint: '{ours}' is not there once for each of "
            f"{categories} categories"
        )
    return torch.stack([part[i] for i in range(categories)])
