"""What a detector itself has learned: all its parameters and buffers but the frozen encoder's."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor, as `state_dict` has them; a part of the encoder that is trained counts.

    The host of a filter is a detector too, and its encoder as frozen.
    """
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not name.removeprefix("host.").startswith("encoder.")
    }


def load_own_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `own_state` gave; on failure nothing is changed.

    A buffer takes whatever size it had (a memory bank is as large as it was chosen); a parameter
    has its size from the start.

    Raises:
        ValueError: the state is of another module.
    """
    own = own_state(module)
    if own.keys() != state.keys():
        strange = sorted(own.keys() ^ state.keys())[0]
        raise ValueError(f"'{strange}' is not in both")
    for name, tensor in own.items():
        if isinstance(tensor, nn.Parameter) and tensor.shape != state[name].shape:
            raise ValueError(f"'{name}' has another shape")
    with torch.no_grad():
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter):
                tensor.copy_(state[name])
            else:
                owner, _, last = name.rpartition(".")
                setattr(module.get_submodule(owner), last, state[name].to(tensor.device))
