"""What a killed training needs to go on: two files, the second written when the first is whole.

weights-<step>.safetensors  what training changes of the model, and the optimizer's moments
checkpoint.json             the name of that file, and how far the training had come
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from allgood.own_state import load_own_state, own_state
from allgood.progress import say
from allgood.runs import read_json, read_weights, write_json, write_weights
from allgood.types import Failure, InputError

_POINTER = "checkpoint.json"
_MOMENTS = "optimizer/"
"""Before the name of a moment: optimizer/<name>/<parameter>."""


@dataclass(frozen=True)
class Position:
    """How far a training has come."""

    step: int = 0
    """Steps that are done."""
    log_bytes: int = 0
    """Length of the log at that step."""
    unreadable: Mapping[int, Failure] = field(default_factory=dict)
    """Pictures that were left out from the start."""


def require_finite(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Refuse a state that no training can go on from.

    Raises:
        InputError: a weight or a moment is NaN or infinite, or a buffer NaN (-inf may be a mask).
    """
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    moments = _moments(model, optimizer)
    bad = [name for name, tensor in (parameters | moments).items() if not tensor.isfinite().all()]
    bad += [name for name, tensor in own_state(model).items() if tensor.isnan().any()]
    if bad:
        raise InputError(
            f"'{bad[0]}' became NaN or infinite before step {step}: lower the learning rate with "
            "--train learning_rate=..."
        )


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    position: Position,
    *,
    scaler: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, after `require_finite`, and remove the one before.

    Args:
        scaler: state of the gradient scaler, JSON-able.
    """
    file = f"weights-{position.step}.safetensors"
    write_weights(folder / file, own_state(model) | _moments(model, optimizer))
    failures = {i: [str(why.path), why.reason] for i, why in position.unreadable.items()}
    facts = {
        "weights": file,
        **asdict(position),
        "unreadable": failures,
        "optimizer_steps": [group.get("steps") for group in optimizer.param_groups],
        "scaler": dict(scaler or {}),
    }
    write_json(folder / _POINTER, facts)
    for path in (*folder.glob("weights-*"), *folder.glob(".*.tmp")):  # of a killed write
        if path.name != file:
            path.unlink()


def load(
    folder: Path, model: nn.Module, optimizer: Optimizer
) -> tuple[Position, dict[str, Any]] | None:
    """Put model and optimizer where the last checkpoint left them.

    Returns:
        The position and the state of the gradient scaler; None if there is no checkpoint, or one
        whose files are damaged.

    Raises:
        InputError: the checkpoint is of another model.
    """
    if not (folder / _POINTER).exists():
        return None
    try:
        facts = read_json(folder / _POINTER)
        stored = read_weights(folder / facts["weights"])
    except (InputError, KeyError, TypeError):
        say(f"the checkpoint in {folder} is damaged: training starts again")
        return None
    moments = {name: stored.pop(name) for name in list(stored) if name.startswith(_MOMENTS)}
    try:
        load_own_state(model, stored)
    except ValueError as error:
        raise InputError(
            f"the checkpoint in {folder} is of another model ({error}): delete that folder"
        ) from error
    _load_moments(model, optimizer, moments)
    for group, steps in zip(optimizer.param_groups, facts["optimizer_steps"], strict=True):
        if steps is not None:
            group["steps"] = steps
    failures = facts["unreadable"].items()
    unreadable = {int(i): Failure(Path(path), reason) for i, (path, reason) in failures}
    return Position(facts["step"], facts["log_bytes"], unreadable), facts["scaler"]


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{_MOMENTS}{moment}/{name}": tensor
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }


def _load_moments(model: nn.Module, optimizer: Optimizer, moments: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for key, tensor in moments.items():
        _, moment, name = key.split("/", 2)
        parameter = parameters[name]
        if moment != "step":  # torch counts on the CPU
            # In the parameter's memory layout: sums in another order would round otherwise.
            tensor = torch.empty_like(parameter).copy_(tensor)
        optimizer.state[parameter][moment] = tensor
