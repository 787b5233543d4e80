"""The door `convert`: an official checkpoint becomes a run that every other command takes."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_hvqtrans_golden as hvqtrans
import test_unias_golden as unias
import torch
from b4 import b4_shapes
from doors import Command, content, draw_tree
from fill import fill_state
from torch import Tensor

import allgood as library
from allgood.data.fingerprint import content_digest
from allgood.detectors.dinomaly import Dinomaly, DinomalyConfig
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.official.dinomaly import from_official
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]

SIZE = ["--image-size", "56", "--crop", "42"]


def official_shapes(width: int = 384, depth: int = 12) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' file."""
    linear = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    scales = {"ls1.gamma": (width,), "ls2.gamma": (width,)}
    encoder = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1370, width),
        "register_tokens": (1, 4, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    blocks = {f"blocks.{i}.{k}": v for i in range(depth) for k, v in (linear | scales).items()}
    return {
        **{f"encoder.{name}": shape for name, shape in (encoder | blocks).items()},
        **{f"bottleneck.0.{k[4:]}": v for k, v in linear.items() if k.startswith("mlp.")},
        **{f"decoder.{i}.{name}": shape for i in range(8) for name, shape in linear.items()},
    }


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.03)
        + float(name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")))
        for name, shape in official_shapes().items()
    }


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("official") / "model.pth"
    torch.save(state, path)
    yield path
    path.unlink()  # 150 MB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tree(tmp_path_factory.mktemp("data"), train=3, good=4, bad=2)


def test_every_command_takes_a_converted_run(
    allgood: Command, file: Path, data: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "there"
    answer = allgood("convert", "dinomaly", file, "--out", out, "--good", data, *SIZE)
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(out)
    assert set(content(out)) == {
        *("config.json", "weights.safetensors", "encoder.safetensors", "provenance.json")
    }
    run = tmp_path / "moved"
    shutil.move(out, run)

    assert allgood("calibrate", run, data, "--max-false-alarm", "0.2").code == 0
    assert allgood("evaluate", run, data).code == 0
    picture = data / "wood" / "test" / "hole" / "000.png"
    (record,) = allgood("inspect", run, picture).records
    assert record["category"] == "wood" and record["category_inferred"]
    assert record["is_anomalous"] is not None

    # The same numbers from the authors' weights, put together by hand.
    inspector = library.Inspector(run)
    config = EncoderConfig("vit_small_patch14_reg4_dinov2", "middle", "random")
    encoder = FrozenEncoder(config)
    plain = {k[8:]: v for k, v in state.items() if k.startswith("encoder.")}
    for i in range(10):  # our encoder has the layer scales in its matrices already
        for scale, before in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = plain.pop(f"blocks.{i}.{scale}")
            plain[f"blocks.{i}.{before}.weight"] = (
                gamma[:, None] * plain[f"blocks.{i}.{before}.weight"]
            )
            plain[f"blocks.{i}.{before}.bias"] = gamma * plain[f"blocks.{i}.{before}.bias"]
    own = encoder.backbone.state_dict()
    assert torch.equal(inspector.detector.encoder._native_position, plain["pos_embed"][:, 1:])
    for name in own.keys() & plain.keys() - {"pos_embed", "cls_token"}:
        theirs = inspector.detector.encoder.backbone.state_dict()[name]
        torch.testing.assert_close(theirs, plain[name].view_as(theirs), msg=name)
    detector = Dinomaly(DinomalyConfig(), inspector.detector.encoder, ("cloth", "wood")).eval()
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            official = name.replace("bottleneck.", "bottleneck.0.")
            parameter.data.copy_(state[official])
    image = torch.rand(2, 3, 42, 42)
    with torch.inference_mode():
        ours = inspector.detector.match(image).host_map
        category = torch.tensor([0, 1])
        assert torch.equal(detector.match(image, category).host_map, ours)


def test_a_filter_behind_a_converted_run_has_thresholds(
    allgood: Command, file: Path, data: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "filtered"
    assert allgood("convert", "dinomaly", file, "--out", run, "--good", data, *SIZE).code == 0
    more = draw_tree(tmp_path / "more", train=22, good=1, bad=1)  # three that it knows, 19 for 5 %
    words = ["--train", "steps=1", "batch_size=2", "--draws", "1", "--settings", "mask_side=28"]
    answer = allgood("filter", run, more, "--out", out, *words, "--cache", tmp_path / "cache")
    assert answer.code == 0, answer.err
    calibration = library.Inspector(out).calibration
    assert calibration is not None
    assert {name: len(own.image) for name, own in calibration.categories.items()} == {
        "cloth": 19,
        "wood": 19,
    }


def test_without_pictures_the_category_must_be_said(
    allgood: Command, file: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["convert", "dinomaly", file, "--out", run, *SIZE]
    assert allgood.refused(*words).startswith("name what the checkpoint was trained on")
    assert allgood(*words, "--categories", "cloth", "wood").code == 0
    picture = data / "wood" / "test" / "hole" / "000.png"
    assert "cannot be told apart" in allgood.refused("inspect", run, picture)
    (record,) = allgood("inspect", run, picture, "--category", "wood").records
    assert record["category"] == "wood"
    said = allgood.refused(*words, "--categories", "wood")
    assert said == f"run '{run}' exists: name another folder with --out, or give --overwrite"


def test_pictures_that_cannot_be_read_count_for_nothing(
    allgood: Command, file: Path, tmp_path: Path
) -> None:
    data = draw_tree(tmp_path / "data", train=3, good=0, bad=0)
    run = tmp_path / "run"
    (data / "wood" / "train" / "good" / "001.png").write_bytes(b"torn")
    words = ["convert", "dinomaly", file, "--out", run, "--good", data, *SIZE]
    answer = allgood(*words, "--batch-size", "2")
    assert answer.code == 0 and "left out: " in answer.err
    assert json.loads((run / "config.json").read_text())["data"]["fitted_pictures"] == 5
    facts = json.loads((run / "provenance.json").read_text())
    assert len(facts["fitted_on"]) == 5
    assert content_digest(data / "wood" / "train" / "good" / "001.png") not in facts["fitted_on"]

    shutil.rmtree(run)
    for category in ("wood", "cloth"):  # one category first, then every picture
        for path in (data / category / "train" / "good").iterdir():
            path.write_bytes(b"torn")
        said = allgood.refused(*words)
        assert said.startswith(f"none of the 3 good pictures of category '{category}'")
        assert not run.exists()


def test_categories_are_numbered_alphabetically_and_named_once(
    allgood: Command, tmp_path: Path
) -> None:
    path, run = tmp_path / "hvq.pth", tmp_path / "run"
    shapes = hvqtrans.official_shapes(width=16, size=12, categories=2)
    torch.save(fill_state(shapes) | fill_state(b4_shapes("enc.")), path)
    words = ["convert", "hvqtrans", path, "--out", run, "--categories"]
    said = allgood.refused(*words, "wood", "cloth", "wood")
    assert said == "category 'wood' is named 2 times: name it once"
    assert allgood(*words, "wood", "cloth").code == 0
    assert library.Inspector(run).categories == ("cloth", "wood")


def test_a_size_that_the_detector_does_not_take_makes_no_run(
    allgood: Command, tmp_path: Path
) -> None:
    path, run = tmp_path / "unias.pth", tmp_path / "run"
    shapes = unias.official_shapes(width=32, grid=8, ffn=8)
    torch.save(fill_state(shapes) | fill_state(b4_shapes("backbone.")), path)
    words = ["convert", "unias", path, "--out", run, "--categories", "wood"]
    said = allgood.refused(*words, "--image-size", "256")
    assert said.startswith("unias with grid 8 takes pictures of 128 x 128, got 256 x 256")
    assert not run.exists()


def _renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"teacher.weight": torch.ones(1)}, "'teacher.weight' is no part of"),
        (lambda s: _renamed(s, "encoder.", "backbone."), "'backbone.cls_token' is no part of"),
        (lambda s: _renamed(s, "decoder.7.", "decoder.8."), "decoder.7.attn.proj.bias' is missing"),
        (
            lambda s: s | {"decoder.0.norm1.bias": torch.zeros(5)},
            "'decoder.0.norm1.bias' is (5,) there, and (384,) in Dinomaly",
        ),
        (
            lambda s: s | {"decoder.0.norm1.bias": torch.full((384,), torch.nan)},
            "'decoder.0.norm1.bias' holds numbers that are not finite",
        ),
        (
            lambda s: {k: v for k, v in s.items() if ".blocks.11." not in k},
            "an encoder of width 384, 11 blocks",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "encoder.blocks.3.ls1.gamma"},
            "does not hold the weights of encoder 'vit_small_patch14_reg4_dinov2'",
        ),
        (
            lambda s: s | {"encoder.patch_embed.proj.weight": torch.zeros(384)},
            "'encoder.patch_embed.proj.weight' is (384,) and should have 4 axes",
        ),
        (
            lambda s: s | {"encoder.register_tokens": torch.zeros(4)},
            "'encoder.register_tokens' is (4,) and should have 3 axes",
        ),
        (lambda s: {"state_dict": s}, "holds more than named tensors"),
        (lambda s: {"a": torch.ones(1)}, "'a' is no part of"),
        (lambda s: {}, "it lacks 'encoder.patch_embed.proj.weight'"),
    ],
)
def test_what_is_not_understood_is_refused(
    allgood: Command, state: dict[str, Tensor], tmp_path: Path, change: Any, said: str
) -> None:
    path, out = tmp_path / "model.pth", tmp_path / "run"
    torch.save(change(state), path)
    answer = allgood.refused(
        "convert", "dinomaly", path, "--out", out, "--categories", "wood", *SIZE
    )
    assert said in answer
    assert not out.exists()
    path.unlink()


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/allgood-was-here"),))


def test_a_pickle_that_runs_code_is_refused(allgood: Command, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"a": _Runs()}))
    words = ["convert", "dinomaly", path, "--out", tmp_path / "run", "--categories", "wood"]
    assert "cannot be read as a checkpoint of tensors" in allgood.refused(*words)
    assert not Path("/tmp/allgood-was-here").exists()
    path.unlink()
    assert allgood.refused(*words) == f"{path}: no such file; name the authors' checkpoint"


def test_sizes_that_the_authors_have_are_known_by_their_shapes() -> None:
    for width, depth, size in ((384, 12, "small"), (768, 12, "base"), (1024, 24, "large")):
        shapes = official_shapes(width, depth)
        with torch.device("meta"):
            state = {name: torch.empty(shape) for name, shape in shapes.items()}
        assert from_official(state).encoder.name == f"vit_{size}_patch14_reg4_dinov2"
        del state["encoder.register_tokens"]
        assert from_official(state).encoder.name == f"vit_{size}_patch14_dinov2"
    with pytest.raises(InputError, match="width 512"):
        with torch.device("meta"):
            state = {name: torch.empty(shape) for name, shape in official_shapes(512).items()}
        from_official(state)
