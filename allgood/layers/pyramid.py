"""What reverse distillation asks of an encoder's pyramid and of the pictures."""

from typing import Any

from torch import Tensor

from allgood.types import InputError


def require_halving(method: str, encoder: Any) -> None:
    """InputError unless an encoder gives three levels, each of twice the stride of the one
    before."""
    strides = encoder.strides
    if len(strides) != 3 or strides[1] != 2 * strides[0] or strides[2] != 2 * strides[1]:
        raise InputError(
            f"{method} reads three levels, each of twice the stride of the one before, but "
            f"'{encoder.config.name}' gives strides {', '.join(map(str, strides))}: choose a "
            "convolutional --encoder with --levels 1,2,3, or unireplknet_n with --levels 0,1,2"
        )


def require_multiple(method: str, image: Tensor, multiple: int) -> None:
    """InputError unless both sides of (B, 3, H, W) are multiples.

    The bottleneck halves the deepest grid once more, and the decoder must meet it again.
    """
    height, width = image.shape[-2:]
    if height % multiple or width % multiple:
        raise InputError(
            f"{method} needs images whose sides are multiples of {multiple}, "
            f"got {height} x {width}: choose another --image-size"
        )
