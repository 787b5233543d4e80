"""`allgood convert uniad`: the authors' checkpoint, wrapper and all, becomes a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from b4 import b4_shapes
from doors import Command, content, draw_tree
from fill import fill_state
from safetensors.torch import load_file
from test_uniad_golden import official_shapes
from torch import Tensor

import allgood as library
from allgood.detectors.uniad import UniAD, UniADConfig
from allgood.official.uniad import from_official
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """As in the file: the encoder's entries under their prefix, 'module.' before all."""
    tensors = fill_state(official_shapes(), seed=4)
    tensors |= {f"backbone.{k}": v for k, v in fill_state(b4_shapes(), seed=4).items()}
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{}]}
    best = np.float64(0.9681)
    return {
        **{"epoch": 1000, "arch": "efficientnet_b4", "state_dict": state},
        **{"best_metric": best, "optimizer": optimizer},
    }


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("official") / "ckpt_best.pth.tar"
    torch.save(wrapped(state), path)
    yield path
    path.unlink()  # 100 MB


def test_a_converted_run_answers_as_its_parts(
    allgood: Command, file: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    data = draw_tree(tmp_path / "data", train=2, good=1, bad=1)
    run = tmp_path / "run"
    answer = allgood("convert", "uniad", file, "--out", run, "--good", data)
    assert answer.code == 0, answer.err
    assert set(content(run)) == {
        *("config.json", "weights.safetensors", "encoder.safetensors", "provenance.json")
    }
    encoder = load_file(run / "encoder.safetensors")  # what is read, and no more
    assert {name.split(".")[0] for name in encoder} == {"conv_stem", "bn1", "blocks"}
    assert max(name for name in encoder if name.startswith("blocks.")).startswith("blocks.4.")
    (record,) = allgood("inspect", run, data / "wood" / "test" / "hole" / "000.png").records
    assert record["category"] == "wood" and record["category_inferred"]

    inspector = library.Inspector(run)
    assert inspector.detector.config == UniADConfig()
    assert inspector.detector.encoder.config.reference_padding
    assert inspector.transform.input_size(300, 300) == (224, 224)
    # The same from the authors' names, put in by hand.
    model: Any = UniAD(UniADConfig(), inspector.detector.encoder, ("cloth", "wood"), seed=1).eval()
    theirs = {k.removeprefix("module.reconstruction."): v for k, v in state.items()}
    model.position.row.data = theirs["pos_embed.row_embed.weight"]
    model.position.column.data = theirs["pos_embed.col_embed.weight"]
    for i in range(4):
        layer, name = model.encoder_layers[i], f"transformer.encoder.layers.{i}"
        load(layer.attention, theirs, f"{name}.self_attn")
        load(layer.norm, theirs, f"{name}.norm1")
        load(layer.feed_forward.norm, theirs, f"{name}.norm2")
        load(layer.feed_forward.linear1, theirs, f"{name}.linear1")
        load(layer.feed_forward.linear2, theirs, f"{name}.linear2")
        layer, name = model.decoder_layers[i], f"transformer.decoder.layers.{i}"
        layer.query.data = theirs[f"{name}.learned_embed.weight"]
        load(layer.memory_attention, theirs, f"{name}.self_attn")
        load(layer.memory_norm, theirs, f"{name}.norm1")
        load(layer.output_attention, theirs, f"{name}.multihead_attn")
        load(layer.output_norm, theirs, f"{name}.norm2")
        load(layer.feed_forward.norm, theirs, f"{name}.norm3")
        load(layer.feed_forward.linear1, theirs, f"{name}.linear1")
        load(layer.feed_forward.linear2, theirs, f"{name}.linear2")
    load(model.norm, theirs, "transformer.decoder.norm")
    load(model.input_projection, theirs, "input_proj")
    load(model.output_projection, theirs, "output_proj")
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    category = torch.tensor([1])
    with torch.inference_mode():
        ours = inspector.detector.predict(image, category)
        expected = model.predict(image, category)
    assert torch.equal(ours.anomaly_map, expected.anomaly_map)
    assert torch.equal(ours.image_score, expected.image_score)


def load(module: torch.nn.Module, state: dict[str, Tensor], name: str) -> None:
    module.load_state_dict(
        {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
    )


def _without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, s: c | {"teacher": {}}, "'teacher' is not what the authors write beside"),
        (
            lambda c, s: s | {"module.reconstruction.extra.weight": torch.ones(1)},
            "'reconstruction.extra.weight' is no part of an official UniAD checkpoint",
        ),
        (
            lambda c, s: s | {"module.transformer.decoder.norm.weight": torch.ones(1)},
            "'transformer.decoder.norm.weight' is no part of",
        ),
        (
            lambda c, s: (
                s | {"module.reconstruction.transformer.encoder.layers.0.norm3.bias": torch.ones(1)}
            ),
            "encoder.layers.0.norm3.bias' is no part of",
        ),
        (
            lambda c, s: s | {"module.backbone._blocks.40._bn1.bias": torch.ones(1)},
            "'_blocks.40._bn1.bias' is no part of such an EfficientNet",
        ),
        (
            lambda c, s: s | {"module.reconstruction.input_proj.weight": torch.ones(256, 720)},
            "the file has 720 channels",
        ),
        (lambda c, s: _without(s, "row_embed"), "it lacks 'reconstruction.pos_embed.row_embed"),
        (lambda c, s: _without(s, "input_proj"), "it lacks 'reconstruction.input_proj.weight'"),
        (lambda c, s: {}, "it lacks 'reconstruction.pos_embed.row_embed.weight'"),
        (
            lambda c, s: (
                s | {"module.reconstruction.pos_embed.row_embed.weight": torch.tensor(1.0)}
            ),
            "'reconstruction.pos_embed.row_embed.weight' is () and should have 2 axes",
        ),
        (
            lambda c, s: s | {"module.reconstruction.input_proj.weight": torch.ones(5)},
            "'reconstruction.input_proj.weight' is (5,) and should have 2 axes",
        ),
        (lambda c, s: {"state_dict": 3}, "holds more than named tensors"),
    ],
)
def test_what_is_not_understood_is_refused(
    state: dict[str, Tensor], change: Any, said: str
) -> None:
    with pytest.raises(InputError) as error:
        from_official(change(wrapped(state), state))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: _without(s, "decoder.layers.3.norm2.bias"),
            "'decoder_layers.3.output_norm.bias' is missing there",
        ),
        (
            lambda s: (
                s
                | {
                    "module.reconstruction.transformer.encoder.layers.1.linear1.bias": torch.ones(
                        512
                    )
                }
            ),
            "'encoder_layers.1.feed_forward.linear1.bias' is (512,) there, and (1024,) in UniAD",
        ),
        (
            lambda s: _without(s, "backbone._blocks.21._bn2.bias"),
            "does not hold the weights of encoder 'tf_efficientnet_b4.aa_in1k'",
        ),
    ],
)
def test_what_is_missing_or_of_another_shape_is_refused(
    allgood: Command, state: dict[str, Tensor], tmp_path: Path, change: Any, said: str
) -> None:
    path, out = tmp_path / "ckpt.pth.tar", tmp_path / "run"
    torch.save(wrapped(change(state)), path)
    assert said in allgood.refused("convert", "uniad", path, "--out", out, "--categories", "wood")
    assert not out.exists()
    path.unlink()
