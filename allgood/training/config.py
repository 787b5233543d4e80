"""The settings of a training. Read by light commands too, so no torch here."""

from dataclasses import dataclass
from typing import Literal, get_args

from allgood.types import InputError

OptimizerName = Literal["stable_adamw", "adamw", "adam"]
Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["cosine", "exponential", "drops"]


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how exactly to train."""

    steps: int = 10_000
    """Updates of the weights."""
    batch_size: int = 16
    """Pictures per step, over all processes and micro-batches together."""
    accumulate: int = 1
    """Micro-batches per step; more of them take less memory and give the same result where the
    loss is a mean and there is no batch norm, which takes its statistics of each by itself."""
    optimizer: OptimizerName = "stable_adamw"
    """`stable_adamw` is AdamW with AMSGrad and a bounded update."""
    learning_rate: float = 2e-3
    """At its peak, after the warm-up."""
    schedule: Schedule = "cosine"
    """From the peak to `final_learning_rate` by half a cosine or by a constant factor per step, or
    a tenth after each of `drops`."""
    final_learning_rate: float = 2e-4
    """Where cosine and exponential end; the peak itself: a constant rate."""
    drops: tuple[float, ...] = ()
    """Shares of the steps, as 0.4,0.8."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0 to its peak."""
    beta1: float = 0.9
    """Decay of the mean gradient."""
    beta2: float = 0.999
    """Decay of the mean squared gradient."""
    epsilon: float = 1e-10
    """Added to the denominator of the update."""
    weight_decay: float = 1e-4
    """Share of a weight, times the learning rate, that goes at each step; `adam` adds it to the
    gradient instead."""
    gradient_clip: float = 0.1
    """Largest norm of all gradients together; 0: no limit."""
    precision: Precision = "fp32"
    """Of matrix products; weights, moments and the loss are fp32 always."""
    compile: bool = False
    """Compile the loss with torch.compile: slow to start, then faster."""
    checkpoint_minutes: float = 5.0
    """At most about so much work is lost by a kill."""
    checkpoint_steps: int | None = None
    """A checkpoint after every so many steps as well; None: only by the clock."""
    log_steps: int = 50
    """The loss is read and logged every so many steps."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_steps"):
            _require(name, self, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "epsilon"):
            _require(name, self, getattr(self, name) > 0, "above 0")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay", "gradient_clip"):
            _require(name, self, getattr(self, name) >= 0, "at least 0")
        for name in ("beta1", "beta2"):
            _require(name, self, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require("checkpoint_minutes", self, self.checkpoint_minutes > 0, "above 0")
        if self.checkpoint_steps is not None:
            _require("checkpoint_steps", self, self.checkpoint_steps >= 1, "at least 1")
        _require(
            "drops",
            self,
            all(0 < share < 1 for share in self.drops) and list(self.drops) == sorted(self.drops),
            "shares between 0 and 1 that ascend",
        )
        if self.drops and self.schedule != "drops":
            raise InputError("drops are for schedule drops: add --train schedule=drops")
        if self.schedule == "exponential":
            _require("final_learning_rate", self, self.final_learning_rate > 0, "above 0")
        for name, choices in (
            ("optimizer", OptimizerName),
            ("precision", Precision),
            ("schedule", Schedule),
        ):
            known = get_args(choices)
            _require(name, self, getattr(self, name) in known, f"one of {', '.join(known)}")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} cannot be divided into accumulate = "
                f"{self.accumulate} micro-batches: choose a multiple of it"
            )


def _require(name: str, config: TrainConfig, holds: bool, wanted: str) -> None:
    """A comparison with NaN is False, so NaN is refused everywhere."""
    if not holds:
        raise InputError(f"{name} must be {wanted}, got {getattr(config, name)}")
