"""The checkpoints of RD4AD's authors, and those of ADer, whose multi-class numbers others cite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from allgood.detectors.rd4ad import RD4ADConfig
from allgood.encoders.frozen import EncoderConfig
from allgood.official.checkpoint import Official, require_tensors, shape_of
from allgood.types import InputError

_ENCODER = "wide_resnet50_2"
_LEVELS = (1, 2, 3)
_HALVING = {"1": "shallow.0", "2": "shallow.1", "3": "middle"}
_UNUSED = re.compile(r"(conv4|bn4)\.")
"""Of the embedding in the authors' file: no forward pass reads it."""


def from_official(content: Any) -> Official:
    """The authors' {"bn": embedding, "decoder": decoder}, or ADer's network, taken apart.

    The authors' file has no encoder: theirs is torchvision's first ImageNet weights. ADer's has
    its teacher; without it, it is timm's default.

    Raises:
        InputError: a name that is not of this model, or one that is missing.
    """
    if isinstance(content, Mapping) and {"bn", "decoder"} <= content.keys():
        strange = sorted(map(str, content.keys() - {"bn", "decoder"}))
        if strange:
            raise InputError(f"'{strange[0]}' is no part of an official RD4AD checkpoint")
        embedding = {
            name: tensor
            for name, tensor in require_tensors(content["bn"]).items()
            if not _UNUSED.match(name)
        }
        return _official(embedding, require_tensors(content["decoder"]), "tv_in1k", None)
    if isinstance(content, Mapping) and isinstance(content.get("net"), Mapping):
        content = content["net"]  # beside the state of ADer's optimiser
    parts: dict[str, dict[str, Tensor]] = {"mff_oce": {}, "net_s": {}, "net_t": {}}
    for name, tensor in require_tensors(content).items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise InputError(f"'{name}' is no part of an official RD4AD checkpoint")
        parts[part][rest] = tensor
    teacher = _whole_encoder(parts["net_t"])
    return _official(parts["mff_oce"], parts["net_s"], "racm_in1k", teacher)


def _official(
    embedding: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    tag: str,
    encoder_weights: dict[str, Tensor] | None,
) -> Official:
    weights = _weights(embedding, decoder)
    inner, *_ = shape_of(embedding, "bn_layer.0.conv1.weight", 4, kind="RD4AD checkpoint")
    out, *_ = shape_of(embedding, "bn_layer.0.conv3.weight", 4, kind="RD4AD checkpoint")
    return Official(
        RD4ADConfig(bottleneck_width=inner / out),
        weights,
        EncoderConfig(f"{_ENCODER}.{tag}", _LEVELS),
        encoder_weights,
        image_size=256,
    )


def _weights(embedding: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both under our names."""
    weights = {}
    for name, tensor in embedding.items():
        if found := re.match(r"(conv|bn)([123])\.(.+)", name):
            part = f"{_HALVING[found[2]]}.{_kind(found[1])}.{found[3]}"
        elif found := re.match(r"bn_layer\.(\d+)\.(.+)", name):
            part = f"blocks.{found[1]}.{_in_block(found[2], 'downsample')}"
        else:
            raise InputError(f"'{name}' is no part of RD4AD's one-class embedding")
        weights[f"bottleneck.{part}"] = tensor
    for name, tensor in decoder.items():
        found = re.match(r"layer([123])\.(\d+)\.(.+)", name)
        if not found:
            raise InputError(f"'{name}' is no part of RD4AD's decoder")
        part = _in_block(found[3], "upsample")
        weights[f"decoder.stages.{int(found[1]) - 1}.{found[2]}.{part}"] = tensor
    return weights


def _in_block(name: str, shortcut: str) -> str:
    """Of a ResNet's bottleneck block."""
    if found := re.match(r"(conv|bn)([123])\.(.+)", name):
        return f"conv{found[2]}.{_kind(found[1])}.{found[3]}"
    if found := re.match(rf"{shortcut}\.([01])\.(.+)", name):
        return f"shortcut.{_kind(('conv', 'bn')[int(found[1])])}.{found[2]}"
    raise InputError(f"'{name}' is no part of a block of an official RD4AD checkpoint")


def _kind(name: str) -> str:
    return "norm" if name == "bn" else "conv"


def _whole_encoder(teacher: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """ADer's teacher as weights of the whole network, of which it has left out the last stage.

    Zeros stand there: behind the last level read, they never run.
    """
    import timm
    import torch

    if not teacher:
        return None
    with torch.device("meta"):
        whole = timm.create_model(_ENCODER, num_classes=0).state_dict()
    last_stage = {name: shape for name, shape in whole.items() if name.startswith("layer4.")}
    missing = sorted(whole.keys() - last_stage.keys() - teacher.keys())
    strange = sorted(teacher.keys() - whole.keys())
    if missing or strange:
        name = f"lacks '{missing[0]}'" if missing else f"has '{strange[0]}'"
        raise InputError(f"the checkpoint's teacher is no {_ENCODER} of timm: it {name}")
    zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in last_stage.items()}
    return {**zeros, **teacher}
