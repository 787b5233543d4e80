"""What the processes of one training must agree on."""

import torch
import torch.distributed as dist
from torch import Tensor


def of_all_processes(values: Tensor) -> Tensor:
    """(N, ...) -> those of every process one after the other, without their gradients."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
