"""`allgood convert --weights`: checkpoints without their encoder, whatever the method."""

from pathlib import Path
from typing import Any

import pytest
import test_hvqtrans_golden as hvqtrans
import test_minimaxad_golden as minimaxad
import test_uniad_golden as uniad
import test_unias_golden as unias
import torch
from b4 import b4_shapes
from doors import Command, draw_tree
from fill import fill_state
from safetensors.torch import save_file

from allgood import Inspector, convert

pytest_plugins = ["doors_fixtures"]
WOOD: Any = {"categories": ("wood",)}


def without_encoder(method: str) -> dict[str, Any]:
    """A small official file; of RD4AD and MiniMaxAD what is looked at before the encoder."""
    if method == "uniad":
        return {"state_dict": fill_state(uniad.official_shapes())}
    if method == "hvqtrans":
        return fill_state(hvqtrans.official_shapes(width=16, size=12, categories=1))
    if method == "unias":
        return fill_state(unias.official_shapes(width=32, grid=8, ffn=8))
    if method == "rd4ad":
        widths = {"conv1": 1, "conv3": 2}
        block = {f"bn_layer.0.{name}.weight": torch.ones(n, 1, 1, 1) for name, n in widths.items()}
        return {"bn": block, "decoder": {}}
    return {"bn": {"conv1.weight": torch.ones(1)}, "decoder": {}}


@pytest.mark.parametrize(
    ("method", "encoder"),
    [
        ("uniad", "tf_efficientnet_b4.aa_in1k"),
        ("hvqtrans", "tf_efficientnet_b4.aa_in1k"),
        ("unias", "tf_efficientnet_b4.aa_in1k"),
        ("rd4ad", "wide_resnet50_2.tv_in1k"),
        ("minimaxad", "unireplknet_n"),
    ],
)
def test_without_encoder_hub_or_file_every_method_says_the_same(
    allgood: Command, tmp_path: Path, method: str, encoder: str
) -> None:
    path, out = tmp_path / "official.pth", tmp_path / "run"
    torch.save(without_encoder(method), path)
    words = ["convert", method, path, "--categories", "wood", "--out", out]
    said = allgood.refused(*words)  # the tests have no hub
    assert said.startswith(f"the weights of encoder '{encoder}' could not be fetched")
    assert "give a local file with --weights FILE" in said
    assert allgood.refused(*words, "--weights", "no.pth") == (
        f"no.pth: no such file; name one with the weights of '{encoder}', or leave out --weights "
        "to take them from the hub"
    )
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, other)
    said = allgood.refused(*words, "--weights", other)
    assert f"does not hold the weights of encoder '{encoder}'" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("method", "prefix"), [("uniad", "backbone."), ("hvqtrans", "enc."), ("unias", "backbone.")]
)
def test_an_encoder_in_the_file_needs_no_other(
    allgood: Command, tmp_path: Path, method: str, prefix: str
) -> None:
    state = without_encoder(method)
    state = {**state.get("state_dict", state), **fill_state(b4_shapes(prefix))}
    path, out = tmp_path / "official.pth", tmp_path / "run"
    torch.save(state, path)
    words = ["convert", method, path, "--categories", "wood", "--out", out, "--weights", path]
    said = allgood.refused(*words)
    assert said == f"{path} holds the weights of its encoder: leave out --weights"
    assert not out.exists()


def test_a_converted_minimaxad_reads_its_encoder_from_the_file(
    allgood: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = fill_state(minimaxad.official_shapes(), seed=3)
    parts = {part: minimaxad.part_of(state, part) for part in ("encoder", "bn", "decoder")}
    monkeypatch.chdir(tmp_path)
    save_file(parts.pop("encoder"), "encoder.safetensors")
    torch.save(parts, "minimaxad.pth")
    data = draw_tree(tmp_path / "data", train=2, good=1, bad=1)
    words = ["convert", "minimaxad", "minimaxad.pth", "--good", data, "--image-size", "64"]
    answer = allgood(*words, "--weights", "encoder.safetensors", "--out", "run")
    assert answer.code == 0, answer.err

    monkeypatch.chdir("/")  # the run says where the weights are, whoever asks
    run = tmp_path / "run"
    (record,) = allgood("inspect", run, data / "wood" / "test" / "hole" / "000.png").records
    assert record["category"] == "wood" and record["category_inferred"]
    (tmp_path / "again").mkdir()
    by_parts = minimaxad.rebuilt(state, tmp_path / "again")
    detector = Inspector(run).detector
    assert detector.encoder.digest == by_parts.encoder.digest
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = detector.predict(image, torch.tensor([0, 1]))
        expected = by_parts.predict(image, torch.tensor([0, 0]))
    assert torch.equal(ours.anomaly_map, expected.anomaly_map)
    assert torch.equal(ours.image_score, expected.image_score)
    (tmp_path / "encoder.safetensors").unlink()
    assert "nor a file that exists" in allgood.refused("inspect", run, data)


def test_an_encoder_beside_the_file_is_as_good_as_one_in_it(tmp_path: Path) -> None:
    state, encoder = without_encoder("unias"), fill_state(b4_shapes(), seed=5)
    torch.save(state | {f"backbone.{k}": v for k, v in encoder.items()}, tmp_path / "whole.pth")
    torch.save(state, tmp_path / "without.pth")
    torch.save(encoder, tmp_path / "encoder.pth")
    runs = [
        convert("unias", tmp_path / f"{name}.pth", weights=weights, out=tmp_path / name, **WOOD)
        for name, weights in (("whole", None), ("without", tmp_path / "encoder.pth"))
    ]
    assert (runs[0] / "encoder.safetensors").is_file()
    assert not (runs[1] / "encoder.safetensors").exists()
    first, second = (Inspector(run).detector for run in runs)
    assert first.encoder.digest == second.encoder.digest
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = [detector.match(image).host_map for detector in (first, second)]
    assert torch.equal(*maps)


def test_a_filter_has_its_hosts_encoder(allgood: Command, tmp_path: Path) -> None:
    words = ["convert", "costfilter", "x.pth", "--host", "run", "--out", tmp_path / "out"]
    said = allgood.refused(*words, "--weights", "encoder.pth")
    assert said.startswith("a costfilter takes its categories and encoder from its host")
    assert "--weights" in said
