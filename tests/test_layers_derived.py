"""What is made of a module's weights is made again whenever these change, and only then."""

import pytest
import torch
from torch import Tensor, nn

from allgood.layers.derived import Derived


class Doubled(nn.Module):
    """Multiplies by twice its weight, and counts how often it had to double it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(2))
        self.count = 0
        self._double: Derived[Tensor] = Derived()

    def forward(self, x: Tensor) -> Tensor:
        return x * self._double(self, self._make)

    def _make(self) -> Tensor:
        self.count += 1
        return 2 * self.weight + self.offset


@pytest.fixture
def module() -> Doubled:
    return Doubled().eval()


def test_it_is_made_once(module: Doubled) -> None:
    with torch.no_grad():
        for _ in range(3):
            assert module(torch.ones(2)).tolist() == [2, 2]
    with torch.inference_mode():
        module(torch.ones(2))
    assert module.count == 1
    assert set(module.state_dict()) == {"weight", "offset"}


def test_it_follows_weights_and_buffers(module: Doubled) -> None:
    x = torch.ones(2)
    with torch.no_grad():
        module(x)
        module.weight += 1
        assert module(x).tolist() == [4, 4]
        module.offset.add_(1)
        assert module(x).tolist() == [5, 5]
        module.load_state_dict({"weight": torch.zeros(2), "offset": torch.zeros(2)})
        assert module(x).tolist() == [0, 0]
        module.double()
        assert module(x).dtype == torch.float64
    optimizer = torch.optim.SGD([module.weight], lr=1.0)
    module(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert module(x).tolist() == [-4, -4]


def test_gradients_reach_the_weights(module: Doubled) -> None:
    with torch.no_grad():
        module(torch.ones(2))
    module(torch.ones(2)).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.tolist() == [2, 2]


def test_what_is_kept_has_the_precision_of_the_weights(module: Doubled) -> None:
    seen = []

    def make() -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return module.weight

    kept: Derived[Tensor] = Derived()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        kept(module, make)
    assert seen == [False]
