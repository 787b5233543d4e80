"""What users ask for, checked before any work is done."""

import torch

from allgood.types import InputError


def choose_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).cpu()  # a device without memory cannot give it back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{device}' is not available here: use auto or cpu") from error
    return chosen


def require_at_least(least: float, **numbers: float | None) -> None:
    """InputError naming the first of the numbers below `least`; None is not asked for."""
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise InputError(f"{name} must be at least {least:g}, got {number:g}")
