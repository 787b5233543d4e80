"""The checkpoints of MiniMaxAD's authors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from allgood.detectors.minimaxad import MiniMaxADConfig
from allgood.encoders.frozen import EncoderConfig
from allgood.encoders.unireplknet import NAME, renamed
from allgood.official.checkpoint import Official, require_tensors
from allgood.types import InputError

_BOTTLENECK = {
    "conv1": "shallow.0.conv",
    "bn1": "shallow.0.norm",
    "conv2": "shallow.2.conv",
    "bn2": "shallow.2.norm",
    "conv3": "middle.0.conv",
    "bn3": "middle.0.norm",
    "conv4": "fuse",
    "stages.0": "blocks",
}
_DECODER = {"upsample_layers": "upsample", "stages": "stages"}


def from_official(content: Any) -> Official:
    """The authors' {"bn": bottleneck, "decoder": decoder}, taken apart.

    It has no encoder: theirs is the ImageNet weights of UniRepLKNet-N.

    Raises:
        InputError: a name that is not of this model, one that is missing, or merged weights.
    """
    if not isinstance(content, Mapping) or not {"bn", "decoder"} <= content.keys():
        raise InputError("no official MiniMaxAD checkpoint: it lacks 'bn' and 'decoder'")
    strange = sorted(map(str, content.keys() - {"bn", "decoder"}))
    if strange:
        raise InputError(f"'{strange[0]}' is no part of an official MiniMaxAD checkpoint")
    weights = {
        **_part("bottleneck", require_tensors(content["bn"]), _BOTTLENECK),
        **_part("decoder", require_tensors(content["decoder"]), _DECODER),
    }
    return Official(
        MiniMaxADConfig(), weights, EncoderConfig(NAME, (0, 1, 2)), None, image_size=256
    )


def _part(part: str, state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Under our names."""
    weights = {}
    if any(re.search(r"\.dwconv\.(lk_origin\.)?bias$", name) for name in state):
        raise InputError(
            "the checkpoint is merged for inference, which cannot be undone: take the one that the "
            "training wrote"
        )
    for name, tensor in renamed(state).items():
        official = next((known for known in names if name.startswith(f"{known}.")), None)
        if official is None:
            raise InputError(f"'{name}' is no part of MiniMaxAD's {part}")
        weights[f"{part}.{names[official]}{name.removeprefix(official)}"] = tensor
    return weights
