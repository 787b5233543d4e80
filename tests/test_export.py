"""The door `export`: a run as one graph that answers like the run."""

import copy
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from doors import IMAGE_SIZE, TINY, Command, content
from PIL import Image
from test_contract import LEARNERS
from test_filter import behind, made
from tiny import CATEGORIES, picture, with_defect
from torch import Tensor

import allgood as library
from allgood import exported, exporting
from allgood.costfilter.filtered import FilteredDetector
from allgood.data.images import read_image
from allgood.exported import ENGINES, INFER, Engine, ExportedDetector
from allgood.graph import Graph, write_onnx
from allgood.types import InputError, Prediction

pytest_plugins = ["doors_fixtures"]

CASES = [("patchcore", {}), ("patchcore", {"bank": "per_category", "num_neighbors": 3})]
CASES += [(name, {}) for name in ("anomalydino", *LEARNERS)]


def images() -> Tensor:
    """A good picture of each category, and a defective one."""
    good = [picture(name, 99) for name in CATEGORIES]
    return torch.stack([*good, with_defect(good[0], 40, 56)])


def write(detector: Any, path: Path, *, ignore: bool = False) -> None:
    inputs = {"image": images()[:1], "category": torch.tensor([INFER])}
    if ignore:
        inputs["ignore"] = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    write_onnx(Graph(copy.deepcopy(detector)), inputs, path)


def assert_alike(answer: Prediction, expected: Prediction) -> None:
    assert torch.equal(answer.category, expected.category)
    for name in ("anomaly_map", "image_score"):
        wanted, got = getattr(expected, name), getattr(answer, name)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name, settings", CASES, ids=str)
@torch.inference_mode()
def test_every_detector_answers_alike(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with torch.inference_mode(False):
        detector = made(name, tmp_path, **settings)
    write(detector, tmp_path / "model.onnx")
    given = torch.tensor([1, 0, 1])  # on purpose not what they show
    expected = [detector.predict(images()), detector.predict(images(), given)]
    assert expected[0].category.tolist() != given.tolist()
    for engine in ENGINES.values():
        graph = ExportedDetector(tmp_path / "model.onnx", engine)
        assert_alike(graph.predict(images()), expected[0])
        assert_alike(graph.predict(images(), given), expected[1])
        one = graph.predict(images()[2:])
        torch.testing.assert_close(one.image_score, expected[0].image_score[2:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@torch.inference_mode()
def test_ignored_regions_and_the_map_size(engine: type[Engine], tmp_path: Path) -> None:
    with torch.inference_mode(False):
        detector = made("patchcore", tmp_path)
    write(detector, tmp_path / "model.onnx", ignore=True)
    ignore = torch.zeros(3, 1, 96, 96, dtype=torch.bool)
    ignore[2, :, 32:, 48:] = True
    graph = ExportedDetector(tmp_path / "model.onnx", engine)
    expected = detector.predict(images(), ignore=ignore)
    assert_alike(graph.predict(images(), ignore=ignore), expected)
    assert expected.image_score[2] < 0.5 * detector.predict(images()).image_score[2]
    wide = graph.predict(images(), ignore=ignore, map_size=(40, 50))
    assert_alike(wide, detector.predict(images(), ignore=ignore, map_size=(40, 50)))


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@torch.inference_mode()
def test_several_threads_may_ask(engine: type[Engine], tmp_path: Path) -> None:
    with torch.inference_mode(False):
        write(made("patchcore", tmp_path), tmp_path / "model.onnx")
    graph = ExportedDetector(tmp_path / "model.onnx", engine)
    batches = [
        torch.stack([picture("wood", 10 * i + j) for j in range(1 + i % 3)]) for i in range(24)
    ]
    expected = [graph.predict(batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for answer, wanted in zip(pool.map(graph.predict, batches), expected, strict=True):
            torch.testing.assert_close(answer.image_score, wanted.image_score)
            torch.testing.assert_close(answer.anomaly_map, wanted.anomaly_map)


@pytest.mark.parametrize("settings", [{}, {"templates": "good", "num_templates": 2}], ids=str)
@torch.inference_mode()
def test_the_parts_of_a_filter(settings: dict[str, Any], tmp_path: Path) -> None:
    with torch.inference_mode(False):
        model = behind(made("patchcore", tmp_path), mask_side=32, **settings)
        if settings:
            model.keep_templates([model.host.match(images()[[0, 0, 1, 1]]).query])
        model.good_range.copy_(torch.tensor([[0.1, 0.5], [0.2, 0.7]]))
    model.eval()
    assert isinstance(model, FilteredDetector)
    write(model, tmp_path / "model.onnx")
    for engine in ENGINES.values():
        graph = ExportedDetector(tmp_path / "model.onnx", engine)
        assert_alike(graph.predict_parts(images()), model.predict_parts(images()))
        assert_alike(graph.predict(images()), model.predict(images()))


# -- the door --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, exported; nobody may write here."""
    return library.export(run, out=tmp_path_factory.mktemp("exported") / "run")


def test_the_run_and_its_graph_say_the_same(
    graph: Path, run: Path, tree: Path, allgood: Command, tmp_path: Path
) -> None:
    assert set(content(graph)) == {
        "config.json", "model.onnx", "calibration.json", "provenance.json"
    }  # fmt: skip
    pictures = [tree / "wood" / "test", tree / "cloth" / "test" / "hole"]
    old = allgood("inspect", run, *pictures, "--overlays", tmp_path / "old").records
    new = allgood("inspect", graph, *pictures, "--overlays", tmp_path / "new").records
    assert len(old) == len(new) == 16
    for expected, record in zip(old, new, strict=True):
        assert record["image_score"] == pytest.approx(expected["image_score"], rel=1e-5)
        for name in ("path", "category", "category_inferred", "p_value", "is_anomalous"):
            assert record[name] == expected[name]
        assert [r["box"] for r in record["regions"]] == [r["box"] for r in expected["regions"]]
    heat = [read_image(path) for path in sorted((tmp_path / "new").rglob("*.png"))]
    expected_heat = [read_image(path) for path in sorted((tmp_path / "old").rglob("*.png"))]
    assert len(heat) == 16
    difference = np.stack(heat).astype(int) - np.stack(expected_heat)
    assert np.abs(difference).max() <= 2
    known, said = (json.loads((folder / "provenance.json").read_text()) for folder in (run, graph))
    assert said["command"] == f"{known['command']} && allgood export {run} --out {graph}"
    assert said["fitted_on"] == known["fitted_on"]
    assert said["exported"]["largest_difference"] < 1e-5


def test_it_is_evaluated_and_calibrated(
    graph: Path, run: Path, tree: Path, allgood: Command, tmp_path: Path
) -> None:
    tables = []
    for folder in (run, graph):
        out = tmp_path / folder.parent.name
        assert allgood("evaluate", folder, tree, "--out", out).code == 0
        tables.append(json.loads((out / "metrics.json").read_text())["mean"])
    for name, metric in tables[0].items():
        for key in metric:
            assert tables[1][name][key] == pytest.approx(metric[key], abs=1e-3), name
    assert "exported patchcore on" in (out / "report.html").read_text()
    own = tmp_path / "own"
    library.export(run, out=own)
    assert allgood("calibrate", own, tree, "--max-false-alarm", "0.2").code == 0
    assert library.Inspector(own).calibration.max_false_alarm == 0.2


def test_what_other_programs_read(graph: Path) -> None:
    """The names and shapes that docs/export.md promises."""
    model = onnx.load(graph / "model.onnx").graph

    def shapes(values: Any) -> dict[str, list[int]]:
        return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    side = int(IMAGE_SIZE)
    assert shapes(model.input) == {"image": [1, 3, side, side], "category": [1]}
    assert shapes(model.output) == {
        "anomaly_map": [1, 1, side, side], "image_score": [1], "judged_as": [1]
    }  # fmt: skip


def test_a_graph_starts_without_what_only_learning_needs(graph: Path, tree: Path) -> None:
    code = (
        "import sys; from allgood.cli import main\n"
        f"main(['inspect', {str(graph)!r}, {str(tree / 'wood' / 'test' / 'good' / '000.png')!r}])\n"
        "print([m for m in ('timm', 'torchvision', 'onnxscript', 'lightning') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_an_ignored_run(
    engine: str, allgood: Command, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of one category only: the graph is asked twice where it must infer which it is."""
    monkeypatch.setattr(exported, "ENGINES", {engine: ENGINES[engine]})
    corner = np.zeros((72, 64), np.uint8)
    corner[30:, :] = 255
    (tmp_path / "masks").mkdir()
    Image.fromarray(corner).save(tmp_path / "masks" / "wood.png")
    words = [*TINY, "--ignore", tmp_path / "masks", "--out", tmp_path / "run"]
    assert allgood("fit", tree, *words).code == 0
    assert allgood("export", tmp_path / "run", "--out", tmp_path / "graph").code == 0
    bad = [tree / name / "test" / "hole" for name in CATEGORIES]
    old, new = (allgood("inspect", tmp_path / name, *bad).records for name in ("run", "graph"))
    assert [record["is_anomalous"] for record in new] == [r["is_anomalous"] for r in old]
    assert [r["image_score"] for r in new] == pytest.approx([r["image_score"] for r in old])


# -- what is refused -------------------------------------------------------------------------------


def test_runs_that_no_graph_can_hold(allgood: Command, tree: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--keep-aspect"], "many sizes, and a graph has one: fit it with --keep-aspect False"),
        (
            ["--detector", "anomalydino", "--keep-aspect", "False", "--settings",
             "mask_background=all"],
            "fit with --settings mask_background=off",
        ),
        (
            ["--settings", "reweight=3", "image_score=patch_max"],
            "fit with --settings reweight=0",
        ),
    ):  # fmt: skip
        run, out = tmp_path / "run", tmp_path / "graph"
        flag = ["--keep-aspect", "True", *words[1:]] if words == ["--keep-aspect"] else words
        fit = allgood("fit", tree, *TINY, *flag, "--out", run, "--overwrite")
        assert fit.code == 0, fit.err
        assert said in allgood.refused("export", run, "--out", out)
        assert not out.exists()


def test_what_cannot_be_done_with_a_graph(
    graph: Path, tree: Path, allgood: Command, tmp_path: Path
) -> None:
    good = tree / "wood" / "test" / "good" / "000.png"
    out = tmp_path / "out"
    for words, said in (
        (["export", graph, "--out", graph, "--overwrite"], "is the run itself, and stays"),
        (["export", graph, "--out", out], "give `export` the run that it was made of"),
        (["filter", graph, tree, "--out", out], "give `filter` the run that it was made of"),
        (["inspect", graph, good, "--precision", "bf16"], "leave out --device and --precision"),
        (["inspect", graph, good, "--device", "cuda"], "leave out --device and --precision"),
        (["export", graph.parent, "--out", out], "is not a run"),
    ):
        assert said in allgood.refused(*words)
        assert not out.exists()


def test_a_damaged_graph(graph: Path, tree: Path, allgood: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, data in content(graph).items():
        (folder / name).write_bytes(data)
    good = tree / "wood" / "test" / "good" / "000.png"
    (folder / "model.onnx").write_bytes(content(graph)["model.onnx"][:5000])
    said = allgood.refused("inspect", folder, good)
    assert "model.onnx cannot be used by OpenVino (" in said and "export the run again" in said
    (folder / "model.onnx").unlink()
    said = allgood.refused("inspect", folder, good)
    assert "model.onnx is missing: export the run again" in said


def test_missing_packages(
    run: Path, allgood: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        assert "pip install 'allgood[export]'" in allgood.refused("export", run, "--out", out)
    monkeypatch.setattr(exported, "ENGINES", {"no_such_engine": Engine})
    assert "pip install openvino" in allgood.refused("export", run, "--out", out)
    assert not out.exists()


def test_a_broken_engine_is_left_out(
    graph: Path, tree: Path, allgood: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise OSError('no libopenvino.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    answer = allgood("inspect", graph, tree / "wood" / "test" / "good")
    assert answer.code == 0 and len(answer.records) == 6
    assert "openvino is installed, but broken (no libopenvino.so): it is left out" in answer.err


def test_the_call_after_an_interrupted_one(tmp_path: Path) -> None:
    write(made("patchcore", tmp_path), tmp_path / "model.onnx")
    graph = ExportedDetector(tmp_path / "model.onnx", ENGINES["openvino"])
    expected = graph.predict(images())
    with pytest.raises((RuntimeError, ValueError)):
        graph._engine([*feeds(images()), {"image": np.zeros((1, 3, 5, 5), np.float32)}])
    assert_alike(graph.predict(images()), expected)


def feeds(batch: Tensor) -> list[dict[str, np.ndarray]]:
    category = np.array([INFER])
    return [{"image": image[None].numpy(), "category": category} for image in batch]


def test_a_run_that_cannot_tell_the_categories_apart(tmp_path: Path) -> None:
    """As a converted one for which no good pictures were given."""
    detector = made("dinomaly", tmp_path)
    detector.references.features = detector.references.features[:0]
    graph = Graph(copy.deepcopy(detector))
    assert not graph.infers_category
    write_onnx(graph, {"image": images()[:1], "category": torch.tensor([0])}, tmp_path / "m.onnx")
    for engine in ENGINES.values():
        model = ExportedDetector(tmp_path / "m.onnx", engine, infers_category=False)
        with pytest.raises(InputError, match="say which one the pictures show with --category"):
            model.predict(images())
        category = torch.tensor([1, 0, 1])
        with torch.inference_mode():
            assert_alike(model.predict(images(), category), detector.predict(images(), category))


def test_maps_of_the_pictures_own_size(allgood: Command, tree: Path, tmp_path: Path) -> None:
    """AnomalyDINO smooths them in that size, which its graph cannot."""
    for detector in ("anomalydino", "patchcore"):
        run, out = tmp_path / detector, tmp_path / f"{detector}_graph"
        words = ["--detector", detector, "--keep-aspect", "False", *TINY]
        assert allgood("fit", tree, *words, "--out", run).code == 0
        assert allgood("export", run, "--out", out).code == 0
    said = allgood.refused("evaluate", tmp_path / "anomalydino_graph", tree, "--pixel-size", "0")
    assert "leave out --pixel-size 0" in said
    for name in ("patchcore", "patchcore_graph"):
        assert allgood("evaluate", tmp_path / name, tree, "--pixel-size", "0").code == 0
    old, new = (
        json.loads((tmp_path / name / "metrics.json").read_text())["mean"]["pixel_ap"]["value"]
        for name in ("patchcore", "patchcore_graph")
    )
    assert new == pytest.approx(old, rel=1e-3)


def test_what_is_no_number_differs() -> None:
    one = torch.ones(3)
    assert exporting._share(one, one * 1.5) == 0.5
    assert exporting._share(one, one * torch.nan) == float("inf")


def test_a_graph_that_answers_otherwise_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", 1e-12)
    with pytest.raises(InputError, match="answers otherwise than the run"):
        library.export(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_program_of_the_docs(graph: Path, run: Path, tree: Path, tmp_path: Path) -> None:
    """It runs without PyTorch and says what `inspect` says."""
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "judge.py").write_text(
        f"import sys\nsys.modules['torch'] = sys.modules['allgood'] = None\n{program}",
        encoding="utf-8",
    )
    inspector = library.Inspector(run)
    bad = tree / "wood" / "test" / "hole" / "000.png"
    with Image.open(bad) as picture:
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / "hole_16_bit.png")
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        picture.rotate(180).save(tmp_path / "hole_turned.png", exif=exif)
    turned, deep = tmp_path / "hole_turned.png", tmp_path / "hole_16_bit.png"
    for path in (tree / "wood" / "test" / "good" / "000.png", bad, turned, deep):
        command = [sys.executable, tmp_path / "judge.py", graph, path]
        answer = subprocess.run(command, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        (inspection,) = inspector.inspect([path])
        first, second = (line.split() for line in answer.stdout.splitlines())
        assert first[0] == inspection.category
        assert float(first[2]) == pytest.approx(inspection.image_score, rel=0.02)
        assert (first[3] == "alarm") == inspection.is_anomalous == ("hole" in str(path))
        assert (int(second[0]) > 0) == ("hole" in str(path))
