"""EfficientNet-B4 of the original PyTorch port: names, and the padding of UniAD's authors."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from b4 import b4_shapes
from fill import fill_state, uniform
from safetensors.torch import save_file
from torch import Tensor

from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.official.checkpoint import read, unwrap
from allgood.official.efficientnet import ENCODER, from_lukemelas
from allgood.types import InputError

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
BLOCKS = {"block0": (0, 0), "block6": (2, 0), "block7": (2, 1)}
"""Flat number in the port -> stage and index."""

# fmt: off
# Of the official network: name -> every n-th of the stored numbers, the first six.
NUMBERS = {
    "block0": (101 * 496, (-0.1053794, -0.07624206, 0.04681859, 0.113776, 0.1601162, 0.04700766)),
    "block6": (
        17 * 430, (0.04378392, -0.01089713, -0.07383081, 0.1753561, -0.001214116, -0.008609827),
    ),
    "block7": (17 * 430, (-0.02873129, 0.02385185, -0.03866471, 0.2391805, 0.01309219, 0.1213706)),
    "level1": (101 * 496, (-0.1332242, -0.1278807, 0.1873269, 0.1393661, 0.1764052, -0.03111279)),
    "level2": (37 * 452, (-0.2448097, 0.2168535, 0.1550199, 0.1667623, -0.3034371, -0.08395287)),
    "level3": (17 * 430, (0.02364776, 0.02132844, -0.003700223, 0.05945434, 0.1457972, 0.1310197)),
    "level4": (11 * 475, (0.3921357, -0.1234987, 0.04505607, -0.09269279, 0.1364298, 0.2625241)),
}
# fmt: on


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return fill_state(b4_shapes())


def encoder_of(state: dict[str, Tensor], folder: Path, **changes: Any) -> FrozenEncoder:
    path = folder / "b4.safetensors"
    save_file(state, path)
    try:
        return FrozenEncoder(replace(ENCODER, weights=str(path), **changes))
    finally:
        path.unlink()


@torch.no_grad()
def answers(encoder: FrozenEncoder, image: Tensor) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: out.update({name: output})

    hooks = [
        encoder.backbone.blocks[stage][index].register_forward_hook(keep(name))
        for name, (stage, index) in BLOCKS.items()
    ]
    levels = encoder(image * encoder.std + encoder.mean)
    for hook in hooks:
        hook.remove()
    return out | {f"level{i}": level for i, level in enumerate(levels, start=1)}


@pytest.fixture(scope="module")
def official(
    state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    encoder = encoder_of(from_lukemelas(state), tmp_path_factory.mktemp("b4"))
    return answers(encoder, uniform("input:efficientnet_b4", (1, 3, 224, 224)) * 2)


@pytest.mark.parametrize("name", NUMBERS)
def test_golden_numbers(name: str, official: dict[str, Tensor]) -> None:
    stride, expected = NUMBERS[name]
    found = official[name].flatten()
    allowed = 1e-5 * found.abs().max().item()
    assert found[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


@pytest.mark.shared
@shared
def test_golden_file(official: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "efficientnet_b4.json").read_text())
    stored = np.load(GOLDEN / "efficientnet_b4.npz")
    shapes = facts["weights"]["model"]["shapes"]
    assert {name: list(shape) for name, shape in b4_shapes().items()} == shapes
    assert set(facts["outputs"]) == set(official)
    for name, entry in facts["outputs"].items():
        full = official[name].contiguous().numpy()
        assert list(full.shape) == entry["shape"]
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]]
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=entry["tol"]), name


def test_the_padding_moves_what_lies_behind_stage_one(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    renamed = from_lukemelas(state)
    ours = encoder_of(renamed, tmp_path, reference_padding=False)
    theirs = encoder_of(renamed, tmp_path)
    assert ours.digest == theirs.digest  # of the weights; the padding stands in the settings
    generator = torch.Generator().manual_seed(0)
    for size, same in (((224, 224), False), ((96, 160), False), ((380, 380), True)):
        image = torch.rand(1, 3, *size, generator=generator)
        differences = [
            float((a - b).norm() / b.norm())
            for a, b in zip(ours(image), theirs(image), strict=True)
        ]
        assert differences[:2] == [0, 0]
        assert all((difference < 1e-5) == same for difference in differences[2:])


def test_the_padding_by_hand(state: dict[str, Tensor], tmp_path: Path) -> None:
    block = encoder_of(from_lukemelas(state), tmp_path).backbone.blocks[2][0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 192, 8, 10, generator=generator, dtype=torch.float64)
    kernel = state["_blocks.6._depthwise_conv.weight"].double()
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    windows = padded.unfold(2, 5, 2).unfold(3, 5, 2)  # (B, C, h, w, 5, 5)
    expected = (windows * kernel[:, 0, None, None]).sum((-2, -1))
    norm = {  # which the encoder has in its weights
        part: state[f"_blocks.6._bn1.{part}"].double().view(-1, 1, 1)
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    expected = (expected - norm["running_mean"]) / (norm["running_var"] + 1e-3).sqrt()
    expected = norm["weight"] * expected + norm["bias"]
    found = block.conv_dw(x.float())
    assert found.shape == (1, 192, 4, 5)
    assert (found - expected).abs().max() < 1e-5


def test_the_padding_is_that_of_b4_only() -> None:
    with pytest.raises(InputError, match=r"reference_padding is that of tf_efficientnet_b4, and"):
        FrozenEncoder(EncoderConfig("test_efficientnet", weights="random", reference_padding=True))
    assert "reference_padding" in ENCODER.to_json()
    old = ENCODER.to_json() | {"levels": [0, 1, 2, 3]}
    assert EncoderConfig.from_json(old) == ENCODER
    del old["reference_padding"]  # of a run that is older than the setting
    assert EncoderConfig.from_json(old) == replace(ENCODER, reference_padding=False)


def test_a_file_of_the_port_itself(state: dict[str, Tensor], tmp_path: Path) -> None:
    """As its authors publish it, and wherever it ends behind the last level read."""
    path = tmp_path / "efficientnet-b4-6ed6700e.pth"
    torch.save(state, path)
    whole = FrozenEncoder(EncoderConfig("tf_efficientnet_b4", (0, 1, 2, 3), str(path)))
    assert whole.digest == encoder_of(from_lukemelas(state), tmp_path).digest
    behind = ("_fc", "_bn1", "_conv_head", *(f"_blocks.{i}." for i in range(22, 32)))
    for without in (behind, behind[5:]):
        torch.save({k: v for k, v in state.items() if not k.startswith(without)}, path)
        again = FrozenEncoder(EncoderConfig("tf_efficientnet_b4", (0, 1, 2, 3), str(path)))
        assert again.digest == whole.digest
    torch.save({k: v for k, v in state.items() if not k.startswith("_blocks.21.")}, path)
    with pytest.raises(InputError, match="does not hold the weights of encoder 'tf_efficientnet"):
        FrozenEncoder(EncoderConfig("tf_efficientnet_b4", (0, 1, 2, 3), str(path)))
    path.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "_blocks.32._bn1.weight",
        "_blocks.-1._bn1.weight",
        "_blocks.x._bn1.weight",
        "_blocks.1._bn0.weight",  # nothing to expand there
        "_blocks.3._swish.weight",
        "_blocks.3.weight",
        "_bn2.weight",
        "blocks.0.0.bn1.weight",
    ],
)
def test_other_names_are_refused(state: dict[str, Tensor], name: str, tmp_path: Path) -> None:
    more = state | {name: torch.ones(1)}
    with pytest.raises(InputError, match=f"'{name}' is no part of such an EfficientNet"):
        from_lukemelas(more)
    torch.save(more, tmp_path / "b4.pth")
    with pytest.raises(InputError, match=f"does not hold .*'{name}' is no part of"):
        FrozenEncoder(replace(ENCODER, weights=str(tmp_path / "b4.pth")))
    (tmp_path / "b4.pth").unlink()


# The wrapper of the trained checkpoints


@pytest.mark.parametrize("best", [0.97, np.float64(0.97), np.float32(0.5), np.int64(3), None])
@pytest.mark.parametrize("module", ["module.", ""])
def test_wrapped_checkpoints(best: Any, module: str, tmp_path: Path) -> None:
    names = ("backbone._bn0.weight", "reconstruction.a", "reconstruction.backbone.b")
    state = {module + name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(1), "step": 3}}, "param_groups": [{"lr": 0.1}]}
    wrapped = {"epoch": 1000, "arch": "B4", "best_metric": best, "optimizer": optimizer}
    torch.save({"state_dict": state} | wrapped, tmp_path / "ckpt.pth.tar")
    content = read(tmp_path / "ckpt.pth.tar")
    assert content["best_metric"] == best
    for form in (content, {"state_dict": state}, state):
        encoder, rest = unwrap(form, "backbone.")
        assert {name: tensor.tolist() for name, tensor in encoder.items()} == {
            "_bn0.weight": [0, 0]
        }
        assert set(rest) == set(names[1:])
    with pytest.raises(InputError, match="'teacher' is not what the authors write beside"):
        unwrap(content | {"teacher": {}}, "backbone.")
    with pytest.raises(InputError, match="more than named tensors"):
        unwrap({"state_dict": {"a": 3}}, "backbone.")


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pickle_was_run"),))


def test_a_number_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"best_metric": _Runs()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "pickle_was_run").exists()
