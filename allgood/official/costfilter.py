"""The filter checkpoints of CostFilter-AD's authors: which host each is for, and our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from allgood.official.checkpoint import require_tensors
from allgood.types import InputError

_WRAPPER = ("model_state_dict", "epoch", "optimizer_state_dict", "lr")
_STEM = "encoder_segment.down_channel1.conv.weight"
_GUIDED = (1, 3, 4, 6)
"""The authors' numbers of the encoder blocks that are guided."""


@dataclass(frozen=True)
class Variant:
    """What the shapes of one of the authors' filters are made for."""

    host: str
    """Name among our detectors."""
    presets: tuple[str, ...]
    """Names of its settings, in recipes/costfilter.py; of several the shapes do not tell which."""
    title: str
    image_size: int
    """Side of the network's input."""
    grid: int
    """Side of the features that are compared."""
    match: tuple[int, ...]
    """Channels of each level of the host's matches."""
    channels: int
    """Of the cost volume."""
    levels: int
    """Of the volume."""
    guidance: tuple[int, ...]
    """Channels of the spatial guidance of the four stages."""
    stem: int


_HVQ = (24, 32, 56, 160)
VARIANTS = (
    Variant(
        host="dinomaly",
        presets=("reference-dinomaly",),
        title="Dinomaly",
        image_size=392,
        grid=28,
        match=(768, 768),
        channels=768,
        levels=2,
        guidance=(768,) * 4,
        stem=192,
    ),
    Variant(
        host="hvqtrans",
        presets=("reference-hvq",),
        title="HVQ-Trans",
        image_size=224,
        grid=14,
        match=(sum(_HVQ),),
        channels=196,
        levels=4,
        guidance=_HVQ,
        stem=192,
    ),
    Variant(
        host="anomalydino",  # GLAD is not here, but its filters fit the same matches
        presets=("reference-anomaldf", "reference-glad"),
        title="GLAD or AnomalDF",
        image_size=256,
        grid=32,
        match=(4 * 768,),
        channels=1024,
        levels=4,
        guidance=(768,) * 4,
        stem=384,
    ),
)


@dataclass(frozen=True)
class OfficialFilter:
    """A trained filter of the authors."""

    variant: Variant
    classes: int
    """Outputs of its class head, which only its loss needs."""
    state: dict[str, Tensor]
    """Under the authors' names."""


def read_filter(content: Any) -> OfficialFilter:
    """The content of an official filter checkpoint: its state dict, alone or as
    `model_state_dict` beside what its training left.

    Raises:
        InputError: shapes that are none of the published filters'.
    """
    if isinstance(content, Mapping) and "model_state_dict" in content:
        for name in content:
            if name not in _WRAPPER:
                raise InputError(
                    f"'{name}' is not what the authors write beside the model_state_dict"
                )
        content = content["model_state_dict"]
    state = require_tensors(content)
    shapes = {
        "channels": _size(state, _STEM, 1),
        "stem": _size(state, _STEM, 0),
        "levels": _size(state, "decoder_segment.conv1.weight", 2),
        "guidance": tuple(
            _size(state, f"encoder_segment.dino_proc{i}.conv3d.weight", 1) for i in _GUIDED
        ),
    }
    classes = _size(state, "decoder_segment.classifier.4.weight", 0)
    for variant in VARIANTS:
        if all(getattr(variant, name) == value for name, value in shapes.items()):
            return OfficialFilter(variant, classes, state)
    found = ", ".join(f"{name} {value}" for name, value in shapes.items())
    raise InputError(
        f"a CostFilter with {found} is none of the published ones, which are for "
        f"{', '.join(variant.title for variant in VARIANTS)}: train one with `allgood filter`"
    )


def _size(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    if name not in state or state[name].ndim <= axis:
        raise InputError(f"no official CostFilter checkpoint: it lacks '{name}'")
    return state[name].shape[axis]


_OFFICIAL = (
    (r"^stem(\d)", r"encoder_segment.down_channel\1"),
    (r"^encoder\.(\d)", lambda m: f"encoder_segment.block{int(m[1]) + 1}"),
    (r"^spatial\.(\d)", lambda m: f"encoder_segment.dino_proc{_GUIDED[int(m[1])]}"),
    (r"^matching\.(\d)", lambda m: f"encoder_segment.min_sim_proc{_GUIDED[int(m[1])]}"),
    (r"^fuse\.(\d)\.attention", lambda m: f"encoder_segment.cbam_fusion{_GUIDED[int(m[1])]}"),
    (r"^fuse\.(\d)", lambda m: f"encoder_segment.cbam_fusion{_GUIDED[int(m[1])]}"),
    (r"^bridge", "decoder_segment.db_b"),
    (r"^decoder\.(\d)\.up", lambda m: f"decoder_segment.up{int(m[1]) + 1}"),
    (r"^decoder\.(\d)\.block", lambda m: f"decoder_segment.db{int(m[1]) + 1}"),
    (r"^decoder\.(\d)\.attention", lambda m: f"decoder_segment.db{int(m[1]) + 1}.cbam"),
    (r"^collapse\.", "decoder_segment.conv1."),
    (r"^collapse_attention", "decoder_segment.channel_attention_seg"),
    (r"^head", "decoder_segment.conv2d_1to2"),
    (r"^class_head\.attention", "decoder_segment.channel_attention_cls"),
    (r"^class_head\.conv", "decoder_segment.classifier.0"),
    (r"^class_head\.linear", "decoder_segment.classifier.4"),
    (r"(block\d|db\d|db_b)\.([01])\.conv", lambda m: f"{m[1]}.conv{int(m[2]) + 1}"),
    (r"(block\d|db\d|db_b)\.([01])\.norm", lambda m: f"{m[1]}.bn{int(m[2]) + 1}"),
    (r"reduce\.conv", "conv3d"),
    (r"smooth\.conv", "depth_conv"),
    (r"smooth\.norm", "bn2"),
    (r"merge\.conv", "conv1x1"),
    (r"merge\.norm", "bn1"),
    (r"(reduce\.)?norm", "bn"),
    (r"(fusion\d|cbam)\.channel", r"\1.channel_attention"),
    (r"(fusion\d|cbam)\.spatial", r"\1.spatial_attention.conv"),
    (r"squeeze", "fc1"),
    (r"expand", "fc2"),
)
"""Our name -> the authors', one replacement after the other."""

UNUSED = re.compile(r"^decoder_segment\.conv2\.")
"""A layer of 866 parameters that the authors declare, save and never run."""


def official_name(name: str) -> str:
    """What the authors call this entry of our state dict."""
    for pattern, official in _OFFICIAL:
        name = re.sub(pattern, official, name)
    return name


def renamed(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' `model_state_dict` under our names, for `network.load_state_dict`.

    Raises:
        InputError: it is not, to the last name and shape, a filter of this configuration.
    """
    wanted = {
        official_name(name): (name, value.shape) for name, value in network.state_dict().items()
    }
    given = {name: value for name, value in state.items() if not UNUSED.match(name)}
    if wanted.keys() != given.keys():
        odd = sorted(wanted.keys() ^ given.keys())
        raise InputError(f"not a CostFilter network of this configuration: {odd[0]} of {len(odd)}")
    for official, (_, shape) in wanted.items():
        if given[official].shape != shape:
            raise InputError(
                f"{official} is {tuple(given[official].shape)} where this configuration has "
                f"{tuple(shape)}: the positions, levels, guidance or classes differ"
            )
    return {name: given[official] for official, (name, _) in wanted.items()}
