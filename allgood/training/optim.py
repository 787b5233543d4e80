"""Optimizers, and the learning rate at each step.

StableAdamW is AdamW with AMSGrad (Reddi et al., 2018) whose update is bounded per tensor as in
AdaFactor (Wortsman et al., 2023, "Stable and low-precision training"), the form that Dinomaly uses.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from allgood.training.config import TrainConfig


class StableAdamW(Optimizer):
    """For the n-th step, per tensor p with gradient g, learning rate η, weight decay λ:

        p <- p (1 - η λ)
        m <- β1 m + (1 - β1) g,   v <- β2 v + (1 - β2) g²,   u <- max(u, v)
        D = √u / √(1 - β2ⁿ) + ε
        s = max(1, rms(g / D))
        p <- p - η / (1 - β1ⁿ) / s · m / D

    u is not bias-corrected before its maximum is taken. m, v, u are kept as `exp_avg`,
    `exp_avg_sq`, `max_exp_avg_sq`. No number is read by the host: s stays on the device.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-10,
        weight_decay: float = 1e-4,
    ) -> None:
        settings = {"betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
        super().__init__(parameters, {"lr": learning_rate, "steps": 0, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean, square, largest = (
            [self._moment(p, name) for p in parameters]
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        )
        beta1, beta2 = group["betas"]
        learning_rate, n = group["lr"], group["steps"]

        torch._foreach_mul_(parameters, 1 - learning_rate * group["weight_decay"])
        torch._foreach_lerp_(mean, gradients, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
        torch._foreach_maximum_(largest, square)

        denominator = list(torch._foreach_sqrt(largest))
        torch._foreach_div_(denominator, math.sqrt(1 - beta2**n))
        torch._foreach_add_(denominator, group["epsilon"])
        rms = torch._foreach_norm(torch._foreach_div(gradients, denominator))
        rms = torch._foreach_div(rms, [math.sqrt(p.numel()) for p in parameters])
        torch._foreach_clamp_min_(rms, 1.0)
        torch._foreach_mul_(denominator, rms)
        torch._foreach_addcdiv_(parameters, mean, denominator, -learning_rate / (1 - beta1**n))

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer that the settings name, for parameters that are on their device."""
    parameters, betas = list(parameters), (config.beta1, config.beta2)
    if config.optimizer == "stable_adamw":
        return StableAdamW(
            parameters,
            learning_rate=config.learning_rate,
            betas=betas,
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
        )
    # Fused is one pass over memory, which a CPU waits for. On a GPU it would stand in the way of
    # clipping what a loss scaler has scaled.
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return {"adamw": AdamW, "adam": Adam}[config.optimizer](
        parameters,
        lr=config.learning_rate,
        betas=betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=on_cpu,
        foreach=not on_cpu,
    )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Of a step counted from 0: a line from 0 to the peak, then as `config.schedule` says.

    With a warm-up the first step has learning rate 0 (it only fills the moments), and step
    `warmup_steps` - 1 the peak.
    """
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    if config.schedule == "drops":
        return peak * 0.1 ** sum(step >= share * config.steps for share in config.drops)
    if step >= config.steps:
        return final
    done = (step - warmup) / (config.steps - warmup)
    if config.schedule == "exponential":
        return peak * (final / peak) ** done
    return final + (peak - final) / 2 * (1 + math.cos(math.pi * done))
