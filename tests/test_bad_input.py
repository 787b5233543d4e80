"""Whatever a user gets wrong: one sentence that names it and the remedy, exit code 2, nothing
written."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_trees import save
from doors import TINY, Command, content, draw_tree, part
from PIL import Image

import allgood as library
from allgood.inference import Inspector
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tree(tmp_path_factory.mktemp("data"), ("wood",), train=4, good=1, bad=1)


# -- fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--detector", "patchcor"],
            "unknown detector 'patchcor'; did you mean 'patchcore'? known: anomalydino, ",
        ),
        (["--encoder", "efficientnet_lite"], "unknown encoder 'efficientnet_lite'; did you mean"),
        (["--layout", "mvtek"], "unknown layout 'mvtek'; did you mean 'mvtec'? known: mvtec, "),
        (["--settings", "sigmaa=1"], "unknown setting 'sigmaa'; did you mean 'sigma'? known: "),
        (["--settings", "bank=all"], "setting bank must be one of shared, per_category, got 'all'"),
        (["--weights", "w.pth"], "weights '"),
        (["--levels", 99], "encoder 'test_efficientnet' has levels 0 to 4, but level 99 was asked"),
        (["--levels", 2, 1], "levels must ascend without repeats, got [2, 1]"),
        (["--device", "toaster"], "device 'toaster' is not available here: use auto or cpu"),
        (["--shots", -1], "shots must be at least 1, got -1"),
        (["--shots", 5], "category 'wood' has 4 good pictures, too few for 5 shots with seed 0"),
        (["--memory-gb", -1], "memory_gb must be at least 0.5, got -1"),
        (["--memory-gb", "nan"], "memory_gb must be at least 0.5, got nan"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["--tile", -64], "tile must be at least 1, got -64"),
        (["--tile", 40], "tile must be a multiple of 32"),
        (["--image-size", -32], "image_size must be at least 1, got -32"),
        (["--image-size", 100], "image_size must be a multiple of 32 for encoder 'test_efficient"),
        (["--image-size", 7, "--keep-aspect", "True"], "image_size must be a multiple of 32 for"),
        (["--seed", -1], "seed must be at least 0, got -1"),
        (["--max-false-alarm", 0], "max_false_alarm must lie between 0 and 1, got 0"),
        (["--max-false-alarm", 1.5], "max_false_alarm must lie between 0 and 1, got 1.5"),
        (["--calibration-share", 1], "calibration_share must be at least 0 and below 1, got 1"),
        (["--calibration-share", -0.1], "calibration_share must be at least 0 and below 1, got"),
        (["--ignore", "gone.png"], "gone.png: no such file; check the path"),
    ],
)
def test_fit(allgood: Command, data: Path, tmp_path: Path, options: list[Any], said: str) -> None:
    out = tmp_path / "run"
    answer = allgood.refused("fit", data, "--out", out, *TINY, *options)
    assert answer.startswith(said)
    assert not out.exists()


def test_image_size_says_what_would_do(allgood: Command, data: Path, tmp_path: Path) -> None:
    words = ["fit", data, "--out", tmp_path / "run", *TINY, "--image-size"]
    assert allgood.refused(*words, 100).endswith("got 100: take 96 or 128")
    assert allgood.refused(*words, 20).endswith("got 20: take 32")
    vit = ["fit", data, "--out", tmp_path / "run", "--encoder", "test_vit", "--weights", "random"]
    assert allgood.refused(*vit, "--image-size", 100).endswith("got 100: take 96 or 112")


def test_train_share(allgood: Command, tmp_path: Path) -> None:
    for i in range(4):
        save(part("wood", i), tmp_path / "wood" / "good" / f"{i}.png")
        save(part("wood", i), tmp_path / "wood" / "hole" / f"{i}.png")
    out = tmp_path / "run"
    said = allgood.refused("fit", tmp_path / "wood", "--out", out, *TINY, "--train-share", 0)
    assert said == "train_share must be above 0 and at most 1, got 0.0"
    assert not out.exists()


def test_no_data(allgood: Command, tmp_path: Path) -> None:
    assert allgood.refused("fit", "--out", tmp_path / "run") == (
        "no data given; name a folder of pictures"
    )
    gone = tmp_path / "gone"
    assert allgood.refused("fit", gone).startswith(f"{gone}: no such file or folder")
    gone.mkdir()
    assert "holds no picture" in allgood.refused("fit", gone, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_good_pictures(allgood: Command, tmp_path: Path) -> None:
    table = tmp_path / "all.csv"
    save(part("wood", 0, defective=True), tmp_path / "a.png")
    table.write_text("image,label\na.png,defective\n")
    said = allgood.refused("fit", table, "--out", tmp_path / "run", *TINY)
    assert said == (
        f"{table}: no good pictures to fit on; "
        "the layouts that are understood: allgood list datasets"
    )
    assert not (tmp_path / "run").exists()


def test_nothing_readable(allgood: Command, tmp_path: Path) -> None:
    data = draw_tree(tmp_path / "data", train=5, good=1, bad=1)
    for path in (data / "wood" / "train" / "good").iterdir():
        path.write_bytes(b"torn")
    out = tmp_path / "run"
    said = allgood.refused("fit", data, "--out", out, *TINY, "--batch-size", 2)
    first = data / "wood" / "train" / "good" / "000.png"
    assert said.startswith(
        f"none of the 5 good pictures of category 'wood' could be read; the first: {first}: "
    )
    assert not out.exists()
    for i in range(5):  # mended, the same command does it
        save(part("wood", i), data / "wood" / "train" / "good" / f"{i:03}.png")
    assert allgood("fit", data, "--out", out, *TINY, "--batch-size", 2).code == 0


def test_one_bad_picture_among_twenty(allgood: Command, tmp_path: Path) -> None:
    data = draw_tree(tmp_path / "data", ("wood",), train=20, good=1, bad=1)
    torn = data / "wood" / "train" / "good" / "019.png"  # the last one, behind every batch
    torn.write_bytes(b"torn")
    answer = allgood("fit", data, "--out", tmp_path / "run", *TINY)
    assert answer.code == 0
    assert "left out, as they could not be read: 1 pictures" in answer.err
    assert "learned 1 categories from 19 good pictures" in answer.err


@pytest.mark.parametrize("inside", [False, True])
def test_out_is_a_file(allgood: Command, data: Path, tmp_path: Path, inside: bool) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    out = file / "run" if inside else file
    said = allgood.refused("fit", data, "--out", out, *TINY)
    assert "is a file" in said
    assert str(out) in said
    assert "--out" in said
    assert file.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["thesis.txt", "state/thesis.txt"])
def test_out_is_somebody_elses(
    allgood: Command, data: Path, tmp_path: Path, overwrite: list[str], name: str
) -> None:
    """A folder that is no run is left alone, whatever is asked for."""
    file = tmp_path / "home" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    out = tmp_path / "home"
    said = allgood.refused("fit", data, "--out", out, *TINY, *overwrite)
    assert said == f"folder '{out}' is not empty and no run: name another one with --out"
    assert content(out) == {name: b"mine"}


def test_out_may_be_an_empty_folder(allgood: Command, data: Path, tmp_path: Path) -> None:
    assert allgood("fit", data, "--out", tmp_path, *TINY).code == 0


def test_ignore_folder_of_other_names(allgood: Command, data: Path, tmp_path: Path) -> None:
    masks = save(Image.fromarray(np.zeros((9, 9), np.uint8)), tmp_path / "m" / "woood.png").parent
    (masks / "notes.txt").write_text("not a mask")
    words = ["fit", data, "--out", tmp_path / "run", *TINY, "--ignore", masks]
    assert allgood.refused(*words) == (
        f"{masks}: expected masks named after categories (wood), found woood"
    )
    (masks / "woood.png").unlink()
    assert allgood.refused(*words).endswith("found none")
    white = save(Image.fromarray(np.full((9, 9), 255, np.uint8)), masks / "wood.png")
    assert allgood.refused(*words).startswith(f"{white}: is white all over")
    assert not (tmp_path / "run").exists()


def test_python_users_get_the_same_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown detector 'xyz'; known: anomalydino, "):
        library.fit(data, detector="xyz", out=tmp_path / "run")


# -- a run that is there -------------------------------------------------------------------------


def test_inspect(allgood: Command, run: Path, tree: Path, tmp_path: Path) -> None:
    picture = tree / "wood" / "test" / "good" / "000.png"
    for words, said in [
        (["gone", picture], "run 'gone' does not exist: `allgood fit DATA --out gone` makes it"),
        ([tree, picture], f"'{tree}' is not a run: it has no config.json"),
        ([run], "no pictures given: name files or folders after the run"),
        ([run, tmp_path], f"{tmp_path}: holds no picture; name another folder"),
        ([run, picture, "--batch-size", 0], "batch_size must be at least 1, got 0"),
        (
            [run, picture, "--category", "wod"],
            f"category 'wod' was never learned by run '{run}'; did you mean 'wood'? "
            "it knows: cloth, wood",
        ),
        (
            [run, picture, "--category", "zzz"],
            f"category 'zzz' was never learned by run '{run}'; it knows: cloth, wood",
        ),
    ]:
        assert allgood.refused("inspect", *words) == said


def test_evaluate(allgood: Command, run: Path, tree: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tree / "wood", tmp_path / "data" / "steel")
    (tmp_path / "file").write_text("")
    before = content(run)
    for words, said in [
        ([other], f"category 'steel' was never learned by run '{run}'; it knows: cloth, wood"),
        ([tree, "--pixel-size", -1], "pixel_size must be at least 0, got -1"),
        ([tree, "--batch-size", 0], "batch_size must be at least 1, got 0"),
        ([tree, "--out", tmp_path / "file"], f"'{tmp_path / 'file'}' is a file: name a folder"),
        ([tree / "wood" / "train", "--layout", "good_folder"], "category 'train' was never"),
    ]:
        assert allgood.refused("evaluate", run, *words).startswith(said)
    assert content(run) == before


@pytest.mark.parametrize("what", ["below a file", "report.html is a folder"])
def test_evaluate_knows_at_once_that_it_cannot_write(
    allgood: Command,
    run: Path,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    if what == "below a file":
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
        expected = (
            f"folder '{out}' cannot be written (Not a directory): make it writable, or name "
            "another one"
        )
    else:
        out = tmp_path / "out"
        (out / "report.html").mkdir(parents=True)
        expected = f"'{out / 'report.html'}' is a folder: remove it, or name another one"
    monkeypatch.delattr(Inspector, "predict")  # nothing is judged for nothing
    before = content(tmp_path)
    assert allgood.refused("evaluate", run, tree, "--out", out) == expected
    assert content(tmp_path) == before


def test_calibrate(allgood: Command, run: Path, tree: Path) -> None:
    before = content(run)
    good = tree / "wood" / "test" / "good"
    words = ["calibrate", run, good, "--category", "wood"]
    for options, said in [
        (["--max-false-alarm", 0], "max_false_alarm must lie between 0 and 1, got 0"),
        (["--batch-size", -3], "batch_size must be at least 1, got -3"),
        (
            [],
            "category 'wood' has 6 good calibration pictures, but a false-alarm rate of 0.05 "
            "needs 19: give more, or promise no less than 0.15",
        ),
    ]:
        assert allgood.refused(*words, *options) == said
    assert content(run) == before
