"""StableAdamW and the learning rate: against the written rule, and against Dinomaly's own code."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fill import uniform
from torch import Tensor, nn

from allgood.training.config import TrainConfig
from allgood.training.optim import StableAdamW, learning_rate_at, make_optimizer
from allgood.types import InputError

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
SHAPES = {"weight": (5, 7), "bias": (7,)}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SCHEDULE = TrainConfig(steps=20, warmup_steps=5)

# fmt: off
# The first numbers of `weight`, then of `bias`.
AFTER_20 = {
    "constant": [
        0.08955169, 0.2160436, 0.01923711, 0.2148853, -0.1510277,
        0.06304784, 0.07813476, 0.01238224,
    ],
    "scheduled": [
        0.08925232, 0.2085386, 0.02124441, 0.2132881, -0.1529291,
        0.06896476, 0.07204789, 0.0167339,
    ],
    "epsilon8": [
        0.08955163, 0.2160434, 0.0192371, 0.2148853, -0.1510277,
        0.06304789, 0.07813473, 0.01238228,
    ],
}
# fmt: on
RATES = {
    **{0: 0.0, 1: 2.0202020202020203e-05, 50: 0.00101010101010101, 98: 0.00197979797979798},
    **{99: 0.002, 100: 0.002, 101: 0.001999999954685012, 5000: 0.001114279367451327},
    **{9999: 0.00020000004531498767, 10000: 0.0002, 10002: 0.0002},
}


def golden_gradient(name: str, step: int) -> Tensor:
    scale = 1e-3 * (1 + 7 * step % 5) ** 2 * (10 if step == 12 else 1)
    return uniform(f"grad:dinomaly:{name}:{step}", SHAPES[name]) * torch.tensor(scale)


def golden_run(variant: str) -> dict[str, Tensor]:
    """All that the golden file holds of one variant: 20 steps with given gradients."""
    parameters = {
        name: nn.Parameter(uniform(f"param:dinomaly:{name}", SHAPES[name]) * torch.tensor(scale))
        for name, scale in (("weight", 0.5), ("bias", 0.1))
    }
    optimizer = StableAdamW(parameters.values(), epsilon=1e-8 if variant == "epsilon8" else 1e-10)
    answers = {}
    for step in range(20):
        if variant == "scheduled":
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, SCHEDULE)
        for name, parameter in parameters.items():
            parameter.grad = golden_gradient(name, step)
        optimizer.step()
        for name, parameter in parameters.items():
            answers[f"{variant}:{name}_after{step + 1}"] = parameter.detach().clone()
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            answers[f"{variant}:{name}_{moment}"] = optimizer.state[parameter][moment]
    return answers


@pytest.mark.parametrize("variant", AFTER_20)
def test_dinomaly_golden_optimizer(variant: str) -> None:
    answers = golden_run(variant)
    weight, bias = answers[f"{variant}:weight_after20"], answers[f"{variant}:bias_after20"]
    found = [*weight.flatten()[:5].tolist(), *bias[:3].tolist()]
    np.testing.assert_allclose(found, AFTER_20[variant], atol=1e-6)


def test_dinomaly_golden_schedule() -> None:
    for step, rate in RATES.items():
        assert learning_rate_at(step, TrainConfig()) == pytest.approx(rate, rel=1e-9, abs=1e-15)


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")
def test_dinomaly_golden_files() -> None:
    facts = json.loads((GOLDEN / "dinomaly_optimizer.json").read_text())
    stored = np.load(GOLDEN / "dinomaly_optimizer.npz")
    ours = golden_run("constant") | golden_run("scheduled") | golden_run("epsilon8")
    rates = torch.tensor([learning_rate_at(t, TrainConfig()) for t in range(10_000)])
    ours["schedule_10000_all"] = rates
    ours["scheduled:lr"] = torch.tensor([learning_rate_at(t, SCHEDULE) for t in range(20)])
    for name, entry in facts["outputs"].items():
        if "values" in entry:
            found = {t: learning_rate_at(int(t), TrainConfig()) for t in entry["values"]}
            assert found == pytest.approx(entry["values"], rel=entry["tol"], abs=1e-15)
            continue
        full = ours[name].numpy()
        assert list(full.shape) == entry["shape"], name
        difference = np.abs(full.reshape(-1)[:: entry["stride"]] - stored[name].reshape(-1)).max()
        assert difference <= entry["tol"] * max(abs(entry["min"]), abs(entry["max"])), name


def by_the_rule(p: Tensor, gradients: list[Tensor], rates: list[float], decay: float) -> Tensor:
    """The update rule number by number, in float64."""
    values, epsilon = p.double().flatten().tolist(), 1e-10
    m, v, u = ([0.0] * len(values) for _ in range(3))
    for n, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = gradient.double().flatten().tolist()
        d = []
        for i in range(len(values)):
            values[i] *= 1 - rate * decay
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            u[i] = max(u[i], v[i])
            d.append(u[i] ** 0.5 / (1 - 0.999**n) ** 0.5 + epsilon)
        rms = (sum((g[i] / d[i]) ** 2 for i in range(len(g))) / len(g)) ** 0.5
        for i in range(len(values)):
            values[i] -= rate / (1 - 0.9**n) / max(1.0, rms) * m[i] / d[i]
    return torch.tensor(values, dtype=torch.float64).view(p.shape)


def test_update_follows_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (6,), (), (2, 3, 3, 3)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    parameters[3].data = parameters[3].data.to(memory_format=torch.channels_last)
    start = [p.detach().clone() for p in parameters]
    # Growing and shrinking gradients, so that both u > v and s > 1 occur.
    gradients = [
        [torch.randn(shape, generator=generator) * 10.0 ** (-n % 4) for n in range(25)]
        for shape in shapes
    ]
    rates = [0.001 * n for n in range(25)]
    optimizer = StableAdamW(parameters, weight_decay=0.1)
    for n, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g[n].clone()
        optimizer.step()
    for p, begin, g in zip(parameters, start, gradients, strict=True):
        expected = by_the_rule(begin, g, rates, decay=0.1)
        torch.testing.assert_close(p.detach().double(), expected, rtol=2e-5, atol=2e-6)


def test_first_step_moves_no_weight_but_fills_the_moments() -> None:
    parameter = nn.Parameter(torch.ones(3))
    unused = nn.Parameter(torch.ones(2))
    optimizer = StableAdamW([parameter, unused], learning_rate=learning_rate_at(0, TrainConfig()))
    parameter.grad = torch.full((3,), 0.5)
    optimizer.step()
    assert parameter.tolist() == [1, 1, 1]
    state = optimizer.state[parameter]
    assert state["exp_avg"].tolist() == pytest.approx([0.05] * 3)
    assert state["max_exp_avg_sq"].tolist() == pytest.approx([0.00025] * 3)
    assert unused not in optimizer.state


def test_short_schedules() -> None:
    assert learning_rate_at(0, TrainConfig(steps=10, warmup_steps=0)) == 2e-3
    assert learning_rate_at(0, TrainConfig(steps=10, warmup_steps=1)) == 0
    assert learning_rate_at(1, TrainConfig(steps=10, warmup_steps=1)) == 2e-3
    assert learning_rate_at(9, TrainConfig(steps=10, warmup_steps=100)) == 2e-3 * 9 / 99


@pytest.mark.parametrize("name", ["stable_adamw", "adamw", "adam"])
def test_every_optimizer_descends(name: str) -> None:
    parameter = nn.Parameter(torch.ones(4))
    config = TrainConfig(optimizer=name, learning_rate=0.1, beta2=0.99)  # type: ignore[arg-type]
    optimizer = make_optimizer([parameter], config)
    for _ in range(50):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        optimizer.step()
    assert parameter.abs().max() < 0.2
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("name", ["stable_adamw", "adamw", "adam"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_are_clipped_beside_a_loss_scaler_but_on_a_cpu(name: str, device: str) -> None:
    """Fabric refuses to clip for optimizers that unscale by themselves, as fused ones do."""
    config = TrainConfig(optimizer=name)  # type: ignore[arg-type]
    optimizer = make_optimizer([nn.Parameter(torch.ones(4, device=device))], config)
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert unscales == (device == "cpu" and name != "stable_adamw")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"gradient_clip": -0.1}, "gradient_clip must be at least 0, got -0.1"),
        ({"optimizer": "sgd"}, "optimizer must be one of stable_adamw, adamw, adam, got sgd"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got fp8"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must be above 0, got 0.0"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be at least 1, got 0"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 cannot be divided"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig(**settings)


def test_a_constant_factor_per_step_or_tenths_after_shares_of_the_steps() -> None:
    falling = TrainConfig(
        steps=160, warmup_steps=0, schedule="exponential", final_learning_rate=2e-4
    )
    rates = [learning_rate_at(step, falling) for step in range(161)]
    ratios = [after / before for before, after in pairwise(rates)]
    assert rates[0] == 2e-3 and rates[-1] == pytest.approx(2e-4)
    assert ratios == pytest.approx([0.1 ** (1 / 160)] * 160)

    dropped = TrainConfig(steps=10, warmup_steps=0, schedule="drops", drops=(0.4, 0.8))
    rates = [learning_rate_at(step, dropped) for step in range(10)]
    assert rates == pytest.approx([2e-3] * 4 + [2e-4] * 4 + [2e-5] * 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "drops", "drops": (0.8, 0.4)}, "drops must be shares"),
        ({"schedule": "drops", "drops": (1.5,)}, "drops must be shares"),
        ({"drops": (0.5,)}, "add --train schedule=drops"),
        ({"schedule": "exponential", "final_learning_rate": 0.0}, "final_learning_rate"),
        ({"schedule": "linear"}, "schedule must be one of cosine, exponential, drops"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainConfig(**settings)
