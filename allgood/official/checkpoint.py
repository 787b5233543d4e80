"""An official checkpoint: read safely, and what remains of it in our words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from allgood.encoders.frozen import EncoderConfig
from allgood.types import InputError

_WRAPPER = ("state_dict", "epoch", "arch", "best_metric", "optimizer")
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
    # What makes a number of a dtype and bytes, under its name since numpy 2 and before.
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
]
"""A best metric is often one of them."""


@dataclass(frozen=True)
class Official:
    """A trained detector of somebody else's."""

    config: Any
    """Of our detector, as the file's shapes and names say."""
    weights: dict[str, Tensor]
    """Under our names: parameters and buffers, without the encoder and without what comes from
    pictures."""
    encoder: EncoderConfig
    """As `config` wants it; where the file has the encoder's weights, they take the place of its
    own."""
    encoder_weights: dict[str, Tensor] | None
    """Under names that `EncoderConfig.weights` reads; None: the file has none."""
    image_size: int
    """Side to which the authors bring pictures."""
    crop: int | None = None
    """Side of the square that they then cut from the middle."""
    num_categories: int | None = None
    """How many categories its shapes are made for; None: any number."""


def read(path: Path) -> Any:
    """What a file holds. A pickle is read for tensors and plain values, numpy's numbers among them:
    it runs no code.

    Raises:
        InputError: no such file, one that holds objects, or numbers that are not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the authors' checkpoint")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_NUMPY_NUMBERS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors each have a zoo of their own
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors ({type(error).__name__}); "
            "download it again, or save its state_dict alone"
        ) from error
    for name, tensor in _tensors(content):
        if not tensor.isfinite().all():
            raise InputError(f"{path} is damaged: '{name}' holds numbers that are not finite")
    return content


def unwrap(content: Any, encoder_prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two halves of a checkpoint as a training on several GPUs writes it.

    Args:
        content: a state dict, alone or under 'state_dict' beside the facts of the training; its
            names may all begin with 'module.'.
        encoder_prefix: what the names of the frozen encoder begin with, as 'backbone.'.

    Returns:
        (the encoder's tensors without the prefix, all others), neither with 'module.'.

    Raises:
        InputError: it holds more than that.
    """
    if isinstance(content, Mapping) and "state_dict" in content:
        for name in content:
            if name not in _WRAPPER:
                raise InputError(f"'{name}' is not what the authors write beside the state_dict")
        content = content["state_dict"]
    state = require_tensors(content)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    encoder, rest = {}, {}
    for name, tensor in state.items():
        if name.startswith(encoder_prefix):
            encoder[name.removeprefix(encoder_prefix)] = tensor
        else:
            rest[name] = tensor
    return encoder, rest


def require_tensors(content: Any) -> dict[str, Tensor]:
    """A state dict, and nothing else.

    Raises:
        InputError: it holds more than named tensors.
    """
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise InputError("the checkpoint holds more than named tensors: save its state_dict alone")
    return {name: tensor.contiguous() for name, tensor in content.items()}


def shape_of(state: Mapping[str, Tensor], name: str, num_axes: int, *, kind: str) -> torch.Size:
    """Shape of a tensor that says how the network is built, before anybody counts on it.

    Args:
        num_axes: how many the tensor has in every such checkpoint.
        kind: what the checkpoint should be, as 'UniAS checkpoint'.

    Raises:
        InputError: it is missing, empty, or has another number of axes.
    """
    if name not in state:
        raise InputError(f"no official {kind}: it lacks '{name}'")
    shape = state[name].shape
    if len(shape) != num_axes or 0 in shape:
        raise InputError(
            f"no official {kind}: its '{name}' is {tuple(shape)} and should have {num_axes} axes, "
            "none of them empty"
        )
    return shape


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested mappings and sequences, and where they are."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _tensors(value, f"{name}.{i}")
