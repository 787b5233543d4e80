"""The checkpoints of UniAS's authors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from allgood.detectors.unias import UniASConfig
from allgood.official.checkpoint import Official, shape_of, unwrap
from allgood.official.efficientnet import ENCODER, from_lukemelas
from allgood.types import InputError

_LEVELS = 4
_BANK = "sem_seg_head.predictor.spatial_query_feat.weight"
_HIDDEN = "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.linear1.bias"


def from_official(content: Any) -> Official:
    """The authors' {"state_dict": …}, or the state dict alone, taken apart.

    The model for MVTec AD has the channel branch, that for VisA has not.

    Raises:
        InputError: a name that is not of this model, or a part that is missing.
    """
    encoder, state = unwrap(content, "backbone.")
    names = _names()
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = name.removeprefix("sem_seg_head.")
        start = next((start for start in names if inner.startswith(start)), None)
        if start is None or inner == name:
            raise InputError(f"'{name}' is no part of an official UniAS checkpoint")
        weights[names[start] + inner.removeprefix(start)] = tensor
    queries, width = shape_of(state, _BANK, 2, kind="UniAS checkpoint")
    (ffn,) = shape_of(state, _HIDDEN, 1, kind="UniAS checkpoint")
    grid = round((queries / 2) ** 0.5)
    if queries != 2 * grid**2:
        raise InputError(f"a bank of {queries} queries is not two of a square grid")
    weights["decoder.query.bank"] = state[_BANK].view(2, grid**2, width)
    channel_attention = any(".channel." in name for name in weights if ".stages." in name)
    return Official(
        UniASConfig(grid, width, ffn, channel_attention=channel_attention),
        weights,
        ENCODER,
        from_lukemelas(encoder) if encoder else None,
        image_size=16 * grid,
    )


def _names() -> dict[str, str]:
    """How official names begin, behind `sem_seg_head.` -> how ours do.

    The authors count the neck's levels from 1, the finest, and the stages of the rest from 0, the
    coarsest level.
    """
    names = {
        "pixel_decoder.input_proj.": "neck.project.",
        f"pixel_decoder.layer_{_LEVELS}.": "neck.top.",
        "predictor.spatial_query_feat.weight": "decoder.query.bank",
        "predictor.spatial_query_embed.weight": "decoder.query_position",
        "predictor.level_embed_src.weight": "decoder.level",
        "predictor.decoder_norm.": "decoder.norm.",
        "predictor.feature_projector.": "decoder.query.project.",
        "predictor.query_processor.spatial_weight.conv.": "decoder.query.spatial.",
        **_local("predictor.query_processor.adaptor", "decoder.query.mix"),
    }
    for i in range(3):
        theirs = f"predictor.query_processor.channel_weight.agg.layers.{i}."
        names[theirs] = f"decoder.query.channel.{2 * i}."
        names |= _encoder_layer(
            f"pixel_decoder.transformer.encoder.layers.{i}.", f"neck.encoder.{i}."
        )
    for level in range(_LEVELS - 1):
        for theirs, ours in (("adapter", "lateral"), ("layer", "output")):
            names[f"pixel_decoder.{theirs}_{level + 1}.norm."] = f"neck.{ours}.{level}.1."
            names[f"pixel_decoder.{theirs}_{level + 1}."] = f"neck.{ours}.{level}.0."
    for k in range(_LEVELS):
        level = _LEVELS - 1 - k
        names[f"predictor.patch_embed.{k}.proj."] = f"decoder.patches.{level}.embed."
        names[f"predictor.input_proj.{k}."] = f"decoder.patches.{level}.project."
        for i in range(1, 4):
            names[f"predictor.out_agg.{k}.{i}."] = f"decoder.heads.{level}.conv{i}."
        names |= _local(f"predictor.layer_adaptors.{k}", f"decoder.stages.{k}.local")
        for kind in ("Spatial", "Channel"):
            theirs = f"predictor.transformer_block.{k}.{kind}"
            names |= _attention(theirs, f"decoder.stages.{k}.{kind.lower()}.")
    return names


def _encoder_layer(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}self_attn.": f"{ours}attention.",
        f"{theirs}norm1.": f"{ours}norm.",
        f"{theirs}linear1.": f"{ours}feed_forward.linear1.",
        f"{theirs}linear2.": f"{ours}feed_forward.linear2.",
        f"{theirs}norm2.": f"{ours}feed_forward.norm.",
    }


def _attention(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}CrossAttnLayer.multihead_attn.": f"{ours}cross.",
        f"{theirs}CrossAttnLayer.norm.": f"{ours}norm.",
        f"{theirs}SelfAttnLayer.self_attn.": f"{ours}layer.attention.",
        f"{theirs}SelfAttnLayer.norm.": f"{ours}layer.norm.",
        f"{theirs}FFNLayer.": f"{ours}layer.feed_forward.",
    }


def _local(theirs: str, ours: str) -> dict[str, str]:
    """MGG-CNN; a branch of one convolution is that convolution there."""
    names = {f"{theirs}.conv{i}.": f"{ours}.branches.{i}.0." for i in (0, 1)}
    return names | {f"{theirs}.conv{i}.": f"{ours}.branches.{i}." for i in (2, 3)}
