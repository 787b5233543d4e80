"""Dropout drawn from 16-bit integers on a CPU."""

import math

import pytest
import torch
from torch import nn

from allgood.layers.dropout import Dropout, dropout


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_elements_are_dropped_as_often_as_asked_and_the_others_scaled(
    probability: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.ones(333, 1001, dtype=dtype)
    out = dropout(x, probability, training=True)
    assert out.dtype == dtype and out.shape == x.shape
    kept = out != 0
    deviation = math.sqrt(probability * (1 - probability) / x.numel())
    assert abs(kept.double().mean() - (1 - probability)) < 4 * deviation + 1 / 65536
    scale = torch.tensor(1 / (1 - probability), dtype=torch.float64)
    error = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert (out[kept].double() / scale - 1).abs().max() < error


def test_rows_and_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(400, 1000), 0.3, training=True) == 0).double() - 0.3
    for shift in (1, 2, 3, 4, 5):
        for dim in (0, 1):
            both = (dropped * dropped.roll(shift, dim)).mean() / (0.3 * 0.7)
            assert abs(both) < 4 / math.sqrt(dropped.numel())


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (0, 4)])
def test_any_number_of_elements(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), 0.5, training=True).shape == shape


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(50, 60, requires_grad=True)
    out = dropout(x, 0.4, training=True)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_the_seed_decides_and_evaluation_drops_nothing() -> None:
    layer, x = Dropout(0.5), torch.randn(100)
    assert isinstance(layer, nn.Dropout)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x
