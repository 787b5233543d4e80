"""The checkpoints of Dinomaly's authors."""

from __future__ import annotations

import re
from typing import Any

from allgood.detectors.dinomaly import DinomalyConfig
from allgood.encoders.frozen import EncoderConfig
from allgood.official.checkpoint import Official, require_tensors, shape_of
from allgood.types import InputError

_WIDTHS = {384: "small", 768: "base", 1024: "large"}
_DEPTHS = {384: 12, 768: 12, 1024: 24}


def from_official(content: Any) -> Official:
    """The authors' `ViTill.state_dict()`, taken apart.

    Raises:
        InputError: a name that is not of this model, or one that is missing.
    """
    state = require_tensors(content)
    encoder = {
        name.removeprefix("encoder."): tensor
        for name, tensor in state.items()
        if name.startswith("encoder.")
    }
    detector = {
        re.sub(r"^bottleneck\.0\.", "bottleneck.", name): tensor
        for name, tensor in state.items()
        if re.match(r"bottleneck\.0\.|decoder\.\d+\.", name)
    }
    strange = [
        name for name in state if not re.match(r"encoder\.|bottleneck\.0\.|decoder\.\d+\.", name)
    ]
    if strange:
        raise InputError(f"'{strange[0]}' is no part of an official Dinomaly checkpoint")
    kind = "Dinomaly checkpoint"
    width, _, *patch_size = shape_of(state, "encoder.patch_embed.proj.weight", 4, kind=kind)
    if not detector:
        raise InputError(f"no official {kind}: it lacks bottleneck and decoder")
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    registers = 0
    if "register_tokens" in encoder:
        _, registers, _ = shape_of(state, "encoder.register_tokens", 3, kind=kind)
    if _DEPTHS.get(width) != depth or patch_size != [14, 14] or registers not in (0, 4):
        raise InputError(
            f"an encoder of width {width}, {depth} blocks and patches of {patch_size} is none of "
            "the DINOv2 ViT-S/B/L 14 that this reads: fit it again with --detector dinomaly"
        )
    register_name = "reg4_" if registers else ""
    return Official(
        DinomalyConfig(),
        detector,
        EncoderConfig(f"vit_{_WIDTHS[width]}_patch14_{register_name}dinov2", "middle"),
        encoder,
        image_size=448,
        crop=392,
    )
