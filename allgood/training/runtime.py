"""Devices, processes, precision and seeds: the one place that knows how Lightning Fabric starts."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from allgood.training.config import Precision
from allgood.types import InputError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_FABRIC_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def open_fabric(
    *,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    precision: Precision = "fp32",
    tensorboard: Path | None = None,
) -> Fabric:
    """Start the processes of a training; each goes on from here with its own rank.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, or one GPU as `cuda:1`.
        devices: processes per node, each with a device of its own.
        nodes: machines; all must see the folders of the run and of the cache.
        tensorboard: folder for TensorBoard's event files; None: none are written.

    Raises:
        InputError: an optional package is missing, or the machine has no such device.
    """
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.loggers import Logger, TensorBoardLogger
    except ModuleNotFoundError as error:
        raise InputError(
            f"training needs the package {error.name}: pip install 'allgood[train]'"
        ) from error
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

    kind, _, number = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    _refuse_device(device, kind, number, devices, precision)
    loggers: list[Logger] = []
    if tensorboard is not None:
        try:
            loggers.append(TensorBoardLogger(tensorboard, name="", version=""))
        except ModuleNotFoundError as error:
            raise InputError(
                "TensorBoard's files need the package tensorboard or tensorboardX: "
                "pip install 'allgood[train]'"
            ) from error
    fabric = Fabric(
        accelerator=kind,
        strategy="ddp" if devices * nodes > 1 else "auto",
        devices=[int(number)] if number else devices,
        num_nodes=nodes,
        precision=_FABRIC_PRECISION[precision],  # type: ignore[arg-type]
        loggers=loggers,
    )
    fabric.launch()
    return fabric


def _refuse_device(device: str, kind: str, number: str, devices: int, precision: str) -> None:
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise InputError(f"device '{device}' is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")
    if number and devices > 1:
        raise InputError(f"device '{device}' is one GPU, but {devices} devices are asked for")
    if kind == "cuda":
        wanted, found = int(number or 0) + devices, torch.cuda.device_count()
        if wanted > found:
            raise InputError(
                f"device '{device}' x {devices} was asked for, but this machine has {found} GPUs "
                "that PyTorch can use"
            )
    elif precision == "fp16":
        raise InputError("precision fp16 needs a GPU: choose bf16 or fp32")


def require_joint_norms(model: Any, device: torch.device) -> None:
    """InputError where several processes on such devices would each normalise by its own share."""
    if device.type == "cpu" and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        for part in _trained_parts(model).values()
        for module in part.modules()
    ):
        raise InputError(
            "a network with batch norm cannot be trained by several processes on CPUs, which have "
            "no common mean and variance there: leave out --devices and --nodes, or take GPUs"
        )


def join_norms(model: nn.Module) -> None:
    """Let batch norms take mean and variance of all processes' images; names and weights stay."""
    for name, part in _trained_parts(model).items():
        setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(part))


def _trained_parts(model: nn.Module) -> dict[str, nn.Module]:
    """All but the encoder: its batch norms are frozen, and timm's are more than that."""
    return {name: part for name, part in model.named_children() if name != "encoder"}


def seed_from(*parts: int | str) -> int:
    """63 bits that follow from the parts, the same in every process."""
    name = ":".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def seed_step(
    seed: int, step: int, *, rank: int = 0, micro: int = 0, device: torch.device | None = None
) -> None:
    """Set torch's generators, of the CPU and of `device`, for one micro-batch. So a resumed
    training needs no state of theirs."""
    number = seed_from(seed, step, rank, micro)
    torch.default_generator.manual_seed(number)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
