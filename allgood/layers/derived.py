"""What follows from a module's weights alone, such as a batch norm folded into its convolution."""

from collections.abc import Callable
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import nn

Made = TypeVar("Made")


class Derived(Generic[Made]):
    """Made once and kept until the weights change; no part of any state.

    Where gradients are asked for it is made anew each time, so that they reach the weights. What is
    kept is made in the weights' own precision, whatever the caller's. A graph that is traced holds
    what was made for the picture before.
    """

    def __init__(self) -> None:
        self._state: list[tuple[int, int | None]] | None = None
        self._made: Made

    def __call__(self, module: nn.Module, make: Callable[[], Made]) -> Made:
        """What `make` gives for the parameters and buffers of `module` as they are now."""
        if torch.is_grad_enabled():
            return make()
        if torch.compiler.is_compiling() and self._state is not None:
            return self._made
        # A step or a loaded state raises the version, another device means other memory.
        tensors = list(chain(module.parameters(), module.buffers()))
        state = [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]
        if self._state != state:
            with torch.autocast(tensors[0].device.type, enabled=False):
                self._made = make()
            self._state = state
        return self._made
