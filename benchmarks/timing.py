"""What the benchmarks share: sides that take turns, ratios, and training batches from a cache.

Letters: B images, N all pictures.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from allgood.types import TrainingBatch


def autocast(
    device: torch.device, enabled: bool, dtype: torch.dtype = torch.bfloat16
) -> AbstractContextManager[object]:
    """`dtype` where `enabled`, and float32 where not."""
    return torch.autocast(device.type, dtype) if enabled else nullcontext()


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that a busy machine slows all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, work in sides.items():
            elapsed = seconds(work, device)
            if round_:  # the first one warms up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def print_ratios(name: str, of: Mapping[str, float], against: tuple[str, ...], per: float) -> None:
    """One line: seconds, how many a second, and how many times as long each other side takes.

    Args:
        of: median seconds of each side.
        per: images or steps that make one measurement.
    """
    ratios = "".join(f"{of[other] / of[name]:>12.2f}" for other in against)
    print(f"{name:<18}{of[name] / per:>12.3f}{per / of[name]:>12.2f}{ratios}", flush=True)


class CachedBatches:
    """Features kept as float16, and read back as the training does: by index, as float32."""

    def __init__(self, features: tuple[Tensor, ...], device: torch.device) -> None:
        """`features`: what `Learner.encode` gave of all pictures, (N, ...) each."""
        self.features = tuple(feature.half().cpu() for feature in features)
        self.device = device

    def batches(self, batch_size: int) -> Iterator[TrainingBatch]:
        """Epoch after epoch, without end."""
        while True:
            for index in torch.randperm(len(self.features[0])).split(batch_size):
                if len(index) == batch_size:
                    yield self.batch(index)

    def batch(self, index: Tensor) -> TrainingBatch:
        features = tuple(feature[index].to(self.device).float() for feature in self.features)
        category = torch.zeros(len(index), dtype=torch.int64, device=self.device)
        return TrainingBatch(features, category, index)
