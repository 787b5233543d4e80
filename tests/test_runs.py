"""A run's folder: atomic files, refused folders, moving a finished run into place."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Command, content

import allgood as library
from allgood.calibrating.calibrate import calibrate
from allgood.fitting.fit import fit
from allgood.runs import (
    CALIBRATION,
    CONFIG,
    IGNORE,
    WEIGHTS,
    command_line,
    finish,
    ignore_file,
    is_finished,
    publish,
    read_config,
    read_json,
    read_weights,
    require_writable,
    write_bytes,
    write_json,
    write_weights,
)
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]

# -- folders -------------------------------------------------------------------------------------


def test_folder_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    require_writable(tmp_path, ["a", "b"])
    require_writable(tmp_path / "new" / "folder", ["a"])
    assert content(tmp_path) == {"a": b"mine"}
    with pytest.raises(
        InputError, match=r"cannot be written \(Not a directory\): make it writable"
    ):
        require_writable(tmp_path / "a" / "below", [])


# -- files ---------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a", b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space") as caught:
            write_bytes(tmp_path / "a", b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert content(tmp_path) == {"a": b"old"}


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert content(tmp_path) == {}
    write_json(tmp_path / "a.json", {"name": "größe", "x": 0.1})
    assert read_json(tmp_path / "a.json") == {"name": "größe", "x": 0.1}


def test_weights_come_back(tmp_path: Path) -> None:
    state = {"bank": torch.rand(3, 4).T, "category": torch.tensor([1, 2])}
    write_weights(tmp_path / "w", state)
    again = read_weights(tmp_path / "w")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a\\b", "c:d", "größe", "100 %"])
def test_masks_of_any_category_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    path = ignore_file(tmp_path, name)
    assert path.resolve().parent == tmp_path / IGNORE
    assert not path.name.startswith(".")


def test_masks_of_two_categories_are_two_files(tmp_path: Path) -> None:
    names = ["a/b", "a%2Fb", "a b", "a:b", ".a", "%2Ea"]
    assert len({ignore_file(tmp_path, name) for name in names}) == len(names)


# -- folders that are no run ---------------------------------------------------------------------


def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def refusal(run: Path) -> str:
    """Why a run is refused, in one sentence."""
    with pytest.raises(InputError) as caught:
        library.Inspector(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_run(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == (
        f"run '{tmp_path / 'gone'}' does not exist: "
        f"`allgood fit DATA --out {tmp_path / 'gone'}` makes it"
    )
    assert refusal(tmp_path) == f"'{tmp_path}' is not a run: it has no config.json"


def test_run_of_another_version(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    config = json.loads((mine / CONFIG).read_text())
    write_json(mine / CONFIG, config | {"format": 99})
    assert refusal(mine).startswith(
        f"run '{mine}' has format 99, but allgood {library.__version__} reads 1: fit it again"
    )
    write_json(mine / CONFIG, [1, 2])
    assert "has format None" in refusal(mine)


NAN = float("nan")
CALIBRATE_AGAIN = "remove it and run `allgood calibrate`"


def scores(image_scores: Any, map_maxima: Any) -> bytes:
    """A calibration.json with these entries of one category."""
    entry = {"image_scores": image_scores, "map_maxima": map_maxima, "pictures": []}
    return json.dumps({"max_false_alarm": 0.5, "categories": {"wood": entry}}).encode()


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        (CONFIG, b'{"format": 1, "categ', "config.json cannot be read (JSONDecodeError): fit"),
        (CONFIG, b'{"format": 1}', "config.json is damaged (KeyError: 'categories'): fit the run"),
        (WEIGHTS, b"", "weights.safetensors is missing or damaged: fit the run again"),
        (WEIGHTS, None, "weights.safetensors is missing or damaged: fit the run again"),
        (CALIBRATION, b"[1]", f"calibration.json is damaged: {CALIBRATE_AGAIN}"),
        (
            CALIBRATION,
            b"{",
            f"calibration.json cannot be read (JSONDecodeError): {CALIBRATE_AGAIN}",
        ),
        (CALIBRATION, scores([1, "2"], [1, 2]), f"calibration.json is damaged: {CALIBRATE_AGAIN}"),
        (CALIBRATION, scores("12", [1, 2]), f"calibration.json is damaged: {CALIBRATE_AGAIN}"),
        (CALIBRATION, scores([1, 2], [1]), f"calibration.json is damaged: {CALIBRATE_AGAIN}"),
        (CALIBRATION, scores([1, 2], [1, NAN]), f"calibration.json is damaged: {CALIBRATE_AGAIN}"),
        (CALIBRATION, scores([], []), f"calibration.json is damaged: {CALIBRATE_AGAIN}"),
    ],
)
def test_damaged_run(run: Path, tmp_path: Path, file: str, data: bytes | None, said: str) -> None:
    mine = copied(run, tmp_path)
    (mine / file).unlink()
    if data is not None:
        (mine / file).write_bytes(data)
    assert said in refusal(mine)


def test_torn_weights(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    whole = (mine / WEIGHTS).read_bytes()
    (mine / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "weights.safetensors is missing or damaged" in refusal(mine)


def test_weights_of_another_detector(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    write_weights(mine / WEIGHTS, {"decoder.weight": torch.rand(2)})
    assert "holds the weights of another detector" in refusal(mine)


def test_setting_that_this_version_does_not_know(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    config = json.loads((mine / CONFIG).read_text())
    config["detector"]["settings"]["depth"] = 3
    write_json(mine / CONFIG, config)
    assert "config.json is damaged (TypeError: " in refusal(mine)


def test_other_encoder_weights(run: Path, tmp_path: Path) -> None:
    mine = copied(run, tmp_path)
    config = json.loads((mine / CONFIG).read_text())
    config["encoder"]["digest"] = "0" * 16
    write_json(mine / CONFIG, config)
    assert "was fitted with other weights of 'efficientnet_lite0'" in refusal(mine)


def test_unknown_device(allgood: Command, run: Path, tree: Path) -> None:
    for device in ("toaster", "meta", "cuda:77"):
        said = allgood.refused("inspect", run, tree, "--device", device)
        assert said == f"device '{device}' is not available here: use auto or cpu"


# -- into place ----------------------------------------------------------------------------------


def built(folder: Path, word: str, *parts: str) -> Path:
    """A folder with these files of a run, each holding `word`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        (folder / part).parent.mkdir(exist_ok=True)
        (folder / part).write_text(word)
    return folder


OLD = (CONFIG, WEIGHTS, CALIBRATION, "ignore/a.png", "ignore/b.png", "report.html")
NEW = (CONFIG, WEIGHTS, "ignore/a.png", "provenance.json")


@pytest.mark.parametrize("moment", range(12))
def test_publish_after_a_stop_at_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Stopped anywhere and called again: all of the new run, nothing of the old one; in between
    there is no config unless everything fits to it."""
    run = built(tmp_path / "run", "old", *OLD, "mine.txt")
    new = built(tmp_path / "run" / "state" / "run", "new", *NEW)
    finish(new)
    assert is_finished(new)

    class Stop(Exception):
        pass

    count = 0

    def stopping(act: Any) -> Any:
        def stops(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment + 1:
                raise Stop
            return act(*arguments, **options)

        return stops

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        try:
            publish(new, run)
        except Stop:
            if (run / CONFIG).exists():
                assert {(run / part).read_text() for part in OLD} == {"old"}
            publish(new, run)
    shutil.rmtree(run / "state")
    assert content(run) == {**dict.fromkeys(NEW, b"new"), "mine.txt": b"old"}


def test_read_config_of_a_complete_run(run: Path) -> None:
    assert read_config(run)["categories"] == ["cloth", "wood"]


# -- the command that made it --------------------------------------------------------------------


def test_command_line_leaves_defaults_out() -> None:
    arguments = {
        "run": Path("my run"),
        "good": [Path("a"), Path("b")],
        "max_false_alarm": 0.02,
        "category": None,
        "layout": None,
        "batch_size": 8,
        "device": "auto",
    }
    assert command_line(calibrate, arguments) == (
        "allgood calibrate 'my run' a b --max-false-alarm 0.02"
    )


def test_command_line_is_understood(allgood: Command, tmp_path: Path) -> None:
    """What is written is what the parser takes, switches and lists included."""
    from inspect import signature
    from shlex import split

    defaults = {name: p.default for name, p in signature(fit).parameters.items()}
    arguments = defaults | {
        "data": [tmp_path / "no such data"],
        "levels": (1, 2),
        "keep_aspect": True,
        "settings": ("bank=shared", "sigma=2"),
        "out": tmp_path / "x",
        "overwrite": True,
    }
    line = command_line(fit, arguments)
    assert "--levels 1 2" in line
    assert line.endswith("--overwrite")
    assert "no such file or folder" in allgood.refused(*split(line)[1:])
