"""The golden files' rule for inputs: values that any machine rebuilds from a name and a seed."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def uniform(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """float32 in [-1, 1), a hash of (position, name, seed) and so no random generator's."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64)
    x += np.uint64(zlib.crc32(f"{seed}:{name}".encode())) << np.uint64(32)
    # splitmix64's finalizer, modulo 2**64
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    numbers = (x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return torch.from_numpy(numbers.reshape(shape))


def fill_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A parameter of two or more dimensions: uniform with variance 1 / fan-in."""
    fan_in = int(np.prod(shape[1:]))
    return uniform(name, shape, seed) * torch.tensor(np.sqrt(3 / fan_in), dtype=torch.float32)


def fill(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """One entry of a state dict, scaled so that signals keep a sane size through deep networks."""
    last = name.rsplit(".", 1)[-1]
    u = uniform(name, shape, seed)
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_var":
        return 1 + 0.3 * u.abs()
    if last == "running_mean":
        return 0.1 * u
    if len(shape) >= 2:
        return u * float(np.float32(np.sqrt(3.0 / int(np.prod(shape[1:])))))
    return 1 + 0.2 * u if last in ("weight", "gamma") else 0.1 * u


def fill_state(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """A whole state dict."""
    return {name: fill(name, tuple(shape), seed) for name, shape in shapes.items()}
