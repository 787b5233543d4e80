"""`allgood fit`: what it leaves behind, kill and resume, replacing a run, a full disk."""

import errno
import json
import os
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_trees import save
from doors import TINY, Command, content, draw_tree, mask, part
from killing import Killer

import allgood as library
from allgood.detectors.patchcore import PatchCoreConfig
from allgood.fitting.held_out import split_for_calibration
from allgood.recipes import configured
from allgood.types import GOOD, InputError, Sample
from allgood.unfinished import making

pytest_plugins = ["doors_fixtures"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree for the fits that are made many times; its pictures differ in size."""
    root = draw_tree(tmp_path_factory.mktemp("few"), train=20, good=1, bad=1)
    for i in range(3):
        save(part("wood", i).resize((90, 60)), root / "wood" / "train" / "good" / f"{i:03}.png")
    (root / "cloth" / "train" / "good" / "007.png").write_bytes(b"torn")
    return root


FEW = ["--max-false-alarm", "0.15", "--batch-size", "3", "--settings", "coreset_ratio=0.2"]


def of_run(folder: Path) -> dict[str, bytes]:
    """What must not depend on how often the fit was killed."""
    files = content(folder)
    facts = json.loads(files.pop("provenance.json"))
    for name in ("seconds", "command"):
        del facts[name]
    return files | {"provenance.json": json.dumps(facts).encode()}


# -- what a fit leaves ---------------------------------------------------------------------------


def test_run_folder(run: Path, tree: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        "calibration.json",
        "config.json",
        "provenance.json",
        "weights.safetensors",
    ]
    config = json.loads((run / "config.json").read_text())
    assert config["categories"] == ["cloth", "wood"]
    assert config["data"]["fitted_pictures"] == 2 * (48 - 19)  # 1 / 0.05 - 1 are held out
    assert config["data"]["held_out_pictures"] == 2 * 19
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["command"].startswith(f"allgood fit {tree} --out {run} --image-size 64")
    assert facts["unreadable"] == []


def test_python_and_command_leave_the_same(allgood: Command, few: Path, tmp_path: Path) -> None:
    answer = allgood("fit", few, "--out", tmp_path / "a", *TINY, *FEW, "--levels", 1, 2)
    assert answer.code == 0
    assert answer.out == f"{tmp_path / 'a'}\n"
    given = library.fit(
        few,
        out=tmp_path / "b",
        encoder="test_efficientnet",
        weights="random",
        image_size=32,
        levels=(1, 2),
        max_false_alarm=0.15,
        batch_size=3,
        settings=("coreset_ratio=0.2",),
    )
    assert given == tmp_path / "b"
    assert of_run(tmp_path / "a") == of_run(tmp_path / "b")
    facts = [json.loads((tmp_path / x / "provenance.json").read_text()) for x in "ab"]
    assert facts[0]["command"].replace("/a ", "/b ") == facts[1]["command"]


def test_unreadable_pictures_are_named_at_the_end(
    allgood: Command, few: Path, tmp_path: Path
) -> None:
    answer = allgood("fit", few, "--out", tmp_path / "run", *TINY, *FEW)
    assert answer.code == 0
    torn = few / "cloth" / "train" / "good" / "007.png"
    *_, count, name, learned = answer.err.splitlines()
    assert count == "left out, as they could not be read: 1 pictures"
    assert name.strip().startswith(f"{torn}: ")
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [path for path, _ in facts["unreadable"]] == [str(torn)]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    lost = config["data"]["fitted_pictures"] + config["data"]["held_out_pictures"]
    assert lost in (39, 40)  # 40 if the torn one was held out
    assert learned.startswith("learned 2 categories from ")


def test_rotated_copies_of_few_shots(allgood: Command, tree: Path, tmp_path: Path) -> None:
    """AnomalyDINO with shots learns 8 turns of each picture; the seed picks the pictures."""
    words = ["fit", tree, "--detector", "anomalydino", "--encoder", "test_vit"]
    words += ["--weights", "random", "--image-size", 32, "--shots", 2]
    sizes = []
    for name, extra in (("a", []), ("b", ["--rotate", "False"]), ("c", ["--seed", 1])):
        answer = allgood(*words, "--out", tmp_path / name, *extra)
        assert answer.code == 0
        assert "without alarm thresholds" in answer.err
        inspector = library.Inspector(tmp_path / name)
        sizes.append(len(inspector.detector.bank.patches))
    assert sizes[0] == 8 * sizes[1] == sizes[2]
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() != (
        tmp_path / "c" / "weights.safetensors"
    ).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["data"]["angles"] == [0, 45, 90, 135, 180, 225, 270, 315]


def test_weights_file_is_found_from_everywhere(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    run = library.fit(
        tree, out=Path("run"), encoder="test_efficientnet", weights="w.safetensors", image_size=32
    )
    run = run.absolute()
    monkeypatch.chdir("/")
    assert library.Inspector(run).categories == ("cloth", "wood")


# -- settings and the split ----------------------------------------------------------------------


def test_settings_are_read_as_their_types() -> None:
    config = configured(PatchCoreConfig, {}, ["coreset_ratio=0.5", "bank=shared", "sigma=2"])
    assert (config.coreset_ratio, config.bank, config.sigma) == (0.5, "shared", 2.0)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "coreset_rato=0.5",
            "unknown setting 'coreset_rato'; did you mean 'coreset_ratio'? known: ",
        ),
        ("zzz=1", "unknown setting 'zzz'; known: "),
        ("sigma", "setting 'sigma' has no value: write sigma=VALUE"),
        ("bank=both", "setting bank must be one of shared, per_category, got 'both'"),
        ("num_neighbors=1.5", "setting num_neighbors must be a whole number, got '1.5'"),
        ("coreset_ratio=2", "coreset_ratio must be in (0, 1], got 2.0"),
    ],
)
def test_settings_that_are_none(word: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        configured(PatchCoreConfig, {}, [word])
    assert str(caught.value).startswith(said)


def good_samples(count: int, *, group_of: int = 1) -> list[Sample]:
    return [
        Sample(Path(f"{i}.png"), "a", "train", GOOD, f"{i}.png", group=f"g{i // group_of}")
        for i in range(count)
    ]


def test_split_keeps_enough_and_parts_no_group() -> None:
    samples = good_samples(100, group_of=5)
    fitting, held_out = split_for_calibration(samples, 0.15, 0.05, seed=0, strict=False)
    assert len(held_out) == 20  # 19 are needed, and groups of 5 stay together
    assert not {s.group for s in fitting} & {s.group for s in held_out}
    assert sorted(s.id for s in [*fitting, *held_out]) == sorted(s.id for s in samples)
    again = split_for_calibration(samples[::-1], 0.15, 0.05, seed=0, strict=False)[1]
    assert {s.id for s in again} == {s.id for s in held_out}
    other = split_for_calibration(samples, 0.15, 0.05, seed=1, strict=False)[1]
    assert {s.id for s in other} != {s.id for s in held_out}


def test_split_takes_the_share_where_it_is_more() -> None:
    assert (
        len(split_for_calibration(good_samples(1000), 0.15, 0.05, seed=0, strict=False)[1]) == 150
    )
    assert split_for_calibration(good_samples(100), 0.0, 0.05, seed=0, strict=False)[1] == []


def test_split_leaves_a_small_category_uncalibrated(capsys: pytest.CaptureFixture[str]) -> None:
    fitting, held_out = split_for_calibration(good_samples(37), 0.15, 0.05, seed=0, strict=False)
    assert (len(fitting), len(held_out)) == (37, 0)
    said = capsys.readouterr().err
    assert "'a' stays uncalibrated: a false-alarm rate of 0.05 keeps 19 good pictures" in said
    with pytest.raises(InputError, match=r"a false-alarm rate of 0.05 keeps 19 good pictures"):
        split_for_calibration(good_samples(37), 0.15, 0.05, seed=0, strict=True)
    assert len(split_for_calibration(good_samples(38), 0.15, 0.05, seed=0, strict=False)[1]) == 19


# -- kill and resume -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(killer: Killer, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed fit leaves; `renamings` reads its log beside it."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = killer("fit", few, "--out", out, *TINY, *FEW)
    assert code == 0, text
    out.with_name("log").write_text(text)
    return out


@pytest.fixture(scope="module")
def renamings(undisturbed: Path) -> int:
    """How many files an undisturbed fit renames: each is a moment before and one after."""
    found = re.search(r"renamed (\d+) files", undisturbed.with_name("log").read_text())
    assert found
    return int(found[1])


def assert_whole_files(folder: Path) -> None:
    """Every file under its own name is a whole one."""
    from safetensors.numpy import load

    for name, data in content(folder).items():
        if name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".safetensors"):
            load(data)


def test_killed_at_every_moment(
    killer: Killer, undisturbed: Path, few: Path, tmp_path: Path
) -> None:
    """Again and again killed while writing, further on each time: the same run in the end."""
    out = tmp_path / "run"
    moments = random.Random(5)
    kills = 0
    while True:
        moment = moments.randrange(3, 16)
        code, text = killer("fit", few, "--out", out, *TINY, *FEW, moment=moment)
        if code == 0:
            break
        assert code == -9, text
        kills += 1
        assert_whole_files(out)
        if not (out / "config.json").exists():
            code, text = killer("inspect", out, few)
            assert (code, "is unfinished" in text) == (2, True)
        else:  # killed after the last renaming
            break
    assert kills >= 4
    assert {k: v for k, v in of_run(out).items() if not k.startswith("state/")} == of_run(
        undisturbed
    )


@pytest.mark.parametrize("back", range(1, 14))
def test_killed_near_the_end(
    killer: Killer, undisturbed: Path, renamings: int, few: Path, tmp_path: Path, back: int
) -> None:
    """At each of the last moments: weights, settings, thresholds, the move into place."""
    out = tmp_path / "run"
    code, _ = killer("fit", few, "--out", out, *TINY, *FEW, moment=2 * renamings - back)
    assert code == -9
    if back == 1:  # after the very last renaming the run is complete, with a rest of its making
        assert (out / "config.json").exists()
        assert killer("inspect", out, few / "wood" / "test")[0] == 0
        return
    assert not (out / "config.json").exists()
    code, text = killer("fit", few, "--out", out, *TINY, *FEW)
    assert code == 0, text
    assert of_run(out) == of_run(undisturbed)


@pytest.mark.parametrize("share", [0.15, 0.4, 0.6, 0.8])
def test_killed_by_the_clock(
    killer: Killer, undisturbed: Path, few: Path, tmp_path: Path, share: float
) -> None:
    """Also between two files: while the network runs or the bank is being chosen."""
    seconds = json.loads((undisturbed / "provenance.json").read_text())["seconds"]
    out = tmp_path / "run"
    killer("fit", few, "--out", out, *TINY, *FEW, seconds=share * seconds)
    if not (out / "config.json").exists():
        code, text = killer("fit", few, "--out", out, *TINY, *FEW)
        assert code == 0, text
    assert of_run(out) == of_run(undisturbed)


# -- another command in the same folder ----------------------------------------------------------


@pytest.fixture
def unfinished(killer: Killer, few: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    assert killer("fit", few, "--out", out, *TINY, *FEW, moment=10)[0] == -9
    return out


def test_unfinished_run_is_no_run(allgood: Command, unfinished: Path, few: Path) -> None:
    for words in (["inspect", unfinished, few], ["evaluate", unfinished, few]):
        assert allgood.refused(*words) == (
            f"run '{unfinished}' is unfinished: the same `allgood` command as before completes it"
        )
    assert "is unfinished" in allgood.refused("calibrate", unfinished, few)


@pytest.mark.parametrize(
    "other",
    [
        ["--seed", 1],
        ["--batch-size", 4],
        ["--max-false-alarm", 0.2],
        ["--settings", "coreset_ratio=0.3"],
        ["--ignore", "IGNORE"],
    ],
)
def test_another_fit_in_an_unfinished_folder(
    allgood: Command, unfinished: Path, few: Path, tmp_path: Path, other: list[Any]
) -> None:
    ignore = save(mask(), tmp_path / "ignore.png")
    other = [ignore if word == "IGNORE" else word for word in other]
    before = content(unfinished)
    said = allgood.refused("fit", few, "--out", unfinished, *TINY, *FEW, *other)
    assert said.startswith(f"run '{unfinished}' holds an unfinished fit of other data or settings:")
    assert content(unfinished) == before
    answer = allgood("fit", few, "--out", unfinished, *TINY, *FEW, *other, "--overwrite")
    assert answer.code == 0
    assert (unfinished / "config.json").exists()
    assert not (unfinished / "state").exists()


def test_changed_data_in_an_unfinished_folder(
    allgood: Command, killer: Killer, tmp_path: Path
) -> None:
    data, out = draw_tree(tmp_path / "data", ("wood",), train=8), tmp_path / "run"
    assert killer("fit", data, "--out", out, *TINY, moment=4)[0] == -9
    save(part("wood", 99), data / "wood" / "train" / "good" / "003.png")
    assert "unfinished fit of other data" in allgood.refused("fit", data, "--out", out, *TINY)


def test_levels_given_do_not_stop_a_resume(killer: Killer, few: Path, tmp_path: Path) -> None:
    """Tuples come back from JSON as lists; that once made the same command another one."""
    words = ["fit", few, "--out", tmp_path / "run", *TINY, *FEW, "--levels", 1, 2]
    assert killer(*words, moment=10)[0] == -9
    code, text = killer(*words)
    assert code == 0, text
    assert "going on after" in text


def test_one_fit_at_a_time(allgood: Command, few: Path, tmp_path: Path) -> None:
    """The state of a fit is its own, whatever another one is asked for in the meantime."""
    out = tmp_path / "run"
    words = ["fit", few, "--out", out, *TINY, *FEW]
    with pytest.raises(KeyboardInterrupt), making(out, {"of": "the first"}, overwrite=False):
        before = content(out)
        for more in ([], ["--overwrite"], ["--seed", 1]):
            assert allgood.refused(*words, *more) == (
                f"another fit is writing '{out}': wait until it is finished, or name another "
                "folder with --out"
            )
        assert content(out) == before
        raise KeyboardInterrupt
    assert allgood(*words, "--overwrite").code == 0
    assert not (out / "state").exists()


def test_a_run_that_another_fit_has_just_finished(tmp_path: Path) -> None:
    """It was not there when the second one was asked for and still prepared."""
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(InputError, match=r"exists: name another folder"),
        making(tmp_path, {}, overwrite=False),
    ):
        raise AssertionError("nothing may be made")
    assert content(tmp_path) == {"config.json": b"{}"}


def test_a_mistake_costs_nothing_that_was_learned(
    allgood: Command, undisturbed: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    words = ["fit", few, "--out", out, *TINY, *FEW]

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("the encoder's weights are gone")

    with monkeypatch.context() as patch:
        patch.setattr("allgood.fitting.job.calibrate_on", refuse)
        assert allgood.refused(*words) == "the encoder's weights are gone"
    answer = allgood(*words, "--resume")
    assert answer.code == 0, answer.err
    assert "going on after 28 of 28 pictures" in answer.err
    assert of_run(out) == of_run(undisturbed)


# -- replacing a run -----------------------------------------------------------------------------


def test_run_is_not_replaced_unasked(allgood: Command, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert allgood("fit", few, "--out", out, *TINY, *FEW).code == 0
    before = content(out)
    assert allgood.refused("fit", few, "--out", out, *TINY, *FEW) == (
        f"run '{out}' exists: name another folder with --out, or give --overwrite"
    )
    assert content(out) == before


def test_replaced_run_leaves_nothing_behind(allgood: Command, few: Path, tmp_path: Path) -> None:
    """Thresholds, masks and reports of the old run say nothing of the new one."""
    out = tmp_path / "run"
    ignore = save(mask(), tmp_path / "ignore.png")
    assert allgood("fit", few, "--out", out, *TINY, *FEW, "--ignore", ignore).code == 0
    assert allgood("evaluate", out, few).code == 0
    (out / "mine.txt").write_text("a user's own file stays")
    new = ["--calibration-share", 0, "--overwrite"]
    assert allgood("fit", few / "wood", "--out", out, *TINY, *new).code == 0
    assert sorted(content(out)) == [
        "config.json",
        "mine.txt",
        "provenance.json",
        "weights.safetensors",
    ]


def test_old_run_serves_until_the_new_one_is_finished(
    killer: Killer, undisturbed: Path, few: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert killer("fit", few / "wood", "--out", out, *TINY, "--calibration-share", 0)[0] == 0
    old = content(out)
    words = ["fit", few, "--out", out, *TINY, *FEW, "--overwrite"]
    for moment in (2, 12, 10, 3):
        assert killer(*words, moment=moment)[0] == -9
        now = content(out)
        assert {name: now[name] for name in old} == old
    assert killer("inspect", out, few / "wood" / "test")[0] == 0
    code, text = killer(*words)
    assert code == 0, text
    assert of_run(out) == of_run(undisturbed)


def test_failing_replacement_leaves_the_old_run(
    allgood: Command, few: Path, tmp_path: Path
) -> None:
    out, bad = tmp_path / "run", tmp_path / "bad"
    assert allgood("fit", few / "wood", "--out", out, *TINY, "--calibration-share", 0).code == 0
    old = content(out)
    for i in range(3):
        bad.mkdir(exist_ok=True)
        (bad / f"{i}.png").write_bytes(b"torn")
    assert "could be read" in allgood.refused("fit", bad, "--out", out, *TINY, "--overwrite")
    assert content(out) == old


# -- full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [0, 4, 9, -6, -5, -4, -3, -2])
def test_full_disk(
    allgood: Command,
    renamings: int,
    undisturbed: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: int,
) -> None:
    """No room for the n-th file: one sentence, nothing half-written, and then it goes on."""
    out = tmp_path / "run"
    rename, count = os.replace, 0

    def no_room(source: Any, target: Any) -> None:
        nonlocal count
        if count == file % renamings:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)
        count += 1

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_room)
        answer = allgood("fit", few, "--out", out, *TINY, *FEW)
    assert answer.code == 1
    said = answer.err.splitlines()[-1]
    assert said.startswith(f"allgood: {out}")
    assert said.endswith(
        ": No space left on device; make room or choose another folder, "
        "and give the same command again"
    )
    assert not (out / "config.json").exists()
    assert not [path for path in out.rglob(".*.tmp")]
    assert_whole_files(out)
    assert allgood("fit", few, "--out", out, *TINY, *FEW).code == 0
    assert sorted(of_run(out)) == sorted(of_run(undisturbed))
    assert (out / "calibration.json").read_bytes() == (
        undisturbed / "calibration.json"
    ).read_bytes()


@pytest.mark.parametrize("kilobytes", [4, 60, 150])
def test_full_disk_in_earnest(allgood: Command, few: Path, tmp_path: Path, kilobytes: int) -> None:
    """A file system that is really full, where one may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        answer = allgood("fit", few, "--out", disk / "run", *TINY, *FEW)
        assert answer.code == 1
        assert answer.err.count("No space left on device") == 1
        assert not (disk / "run" / "config.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert allgood("fit", few, "--out", disk / "run", *TINY, *FEW).code == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_memory_budget_bounds_what_is_kept(few: Path, tmp_path: Path) -> None:
    """The store halves the budget among the pictures; a fit within it still finds its bank."""
    run = library.fit(
        few / "wood",
        out=tmp_path / "run",
        encoder="test_efficientnet",
        weights="random",
        image_size=32,
        memory_gb=0.5,
        calibration_share=0,
    )
    bank = library.Inspector(run).detector.bank
    assert np.isfinite(bank.patches.numpy()).all()


# -- some categories, few shots ------------------------------------------------------------------


def test_masks_of_categories_that_are_not_learned(
    allgood: Command, few: Path, tmp_path: Path
) -> None:
    """The folder of masks is for the data, whatever part of them a fit learns."""
    ignore = tmp_path / "ignore"
    for name in ("wood", "cloth"):
        save(mask(), ignore / f"{name}.png")
    words = ["fit", few, "--out", tmp_path / "run", *TINY, "--categories", "wood"]
    assert allgood(*words, "--ignore", ignore).code == 0
    assert [path.stem for path in (tmp_path / "run" / "ignore").iterdir()] == ["wood"]


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """Three categories, and of `felt` only defects."""
    data = draw_tree(tmp_path / "data", train=4, good=1, bad=1)
    (data / "felt" / "train" / "good").mkdir(parents=True)
    save(part("felt", 0, defective=True), data / "felt" / "test" / "hole" / "0.png")
    return data


@pytest.mark.parametrize("shots", [[], ["--shots", 3]], ids=["all", "shots"])
def test_category_without_good_pictures_is_left_out(
    allgood: Command, untrained: Path, tmp_path: Path, shots: list[Any]
) -> None:
    out = tmp_path / "run"
    answer = allgood("fit", untrained, "--out", out, *TINY, *shots)
    assert answer.code == 0, answer.err
    assert "without good pictures, and so not learned: felt" in answer.err
    assert json.loads((out / "config.json").read_text())["categories"] == ["cloth", "wood"]


@pytest.mark.parametrize("shots", [[], ["--shots", 3]], ids=["all", "shots"])
def test_only_categories_without_good_pictures(
    allgood: Command, untrained: Path, tmp_path: Path, shots: list[Any]
) -> None:
    words = ["fit", untrained, "--out", tmp_path / "run", *TINY, "--categories", "felt", *shots]
    assert allgood.refused(*words).startswith(f"{untrained}: no good pictures to fit on")


@pytest.mark.parametrize(
    "promise",
    [
        ["--max-false-alarm", 0.05],
        ["--max-false-alarm", 7],
        ["--calibration-share", 0.15],
        ["--calibration-share", 5],
    ],
)
def test_few_shots_take_no_promise(
    allgood: Command, few: Path, tmp_path: Path, promise: list[Any]
) -> None:
    """There are no pictures to keep it with."""
    words = ["fit", few, "--out", tmp_path / "run", *TINY, "--shots", 3]
    assert allgood.refused(*words, *promise) == (
        "--shots keeps no pictures for thresholds: leave out --max-false-alarm and "
        "--calibration-share, and see `allgood calibrate`"
    )
    assert not (tmp_path / "run").exists()
    assert allgood(*words, "--calibration-share", 0).code == 0
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["calibration_share"], data["held_out_pictures"]) == (0, 0)


# -- copies --------------------------------------------------------------------------------------


def test_split_keeps_copies_on_one_side(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where they lie in two groups: then all pictures of both stay together."""
    samples = good_samples(120, group_of=2)
    known = {sample.path: str(i % 60) for i, sample in enumerate(samples)}
    fitting, held_out = split_for_calibration(samples, 0.15, 0.05, seed=0, strict=True, known=known)
    fitted, held = ({known[s.path] for s in side} for side in (fitting, held_out))
    assert not fitted & held
    assert (len(held), len(held_out)) == (20, 40)  # 19 different ones are needed, two to a group
    assert "60 of the 120 good pictures are copies of others" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"more than half of its 30"):
        copies = {path: str(int(name) % 30) for path, name in known.items()}
        split_for_calibration(samples, 0.15, 0.05, seed=0, strict=True, known=copies)


def test_copied_pictures_do_not_void_the_promise(tmp_path: Path) -> None:
    """Nothing that is fitted calibrates under another name, and a copy counts once."""
    data = tmp_path / "wood"
    for i in range(40):
        for folder in ("monday", "copied"):
            save(part("wood", i), data / folder / f"{i}.png")
    run = library.fit(
        data, out=tmp_path / "run", encoder="test_efficientnet", weights="random", image_size=32
    )
    calibrated_on = json.loads((run / "calibration.json").read_text())["categories"]["wood"]
    fitted_on = json.loads((run / "provenance.json").read_text())["fitted_on"]
    assert len(calibrated_on["image_scores"]) == 19
    assert not set(fitted_on) & set(calibrated_on["pictures"])


@pytest.mark.parametrize("white", [0, 1, 127])
def test_an_ignore_mask_without_white_is_refused(
    allgood: Command, few: Path, tmp_path: Path, white: int
) -> None:
    """A mask of 0 and 1 looks right in a program that stretches it, and would ignore nothing."""
    ignore = save(mask().point(lambda value: white if value else 0), tmp_path / "ignore.png")
    said = allgood.refused("fit", few, "--out", tmp_path / "run", *TINY, "--ignore", ignore)
    assert said.startswith(f"{ignore}: has no white pixel (128 of 255 or above), so nothing would")
