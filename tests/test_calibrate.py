"""Thresholds and p-values against the plain definitions; `allgood calibrate` and its promise."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doors import TINY, Command, content, draw_tree, part
from hypothesis import given
from hypothesis import strategies as st

import allgood as library
from allgood.calibrating import job as calibrate_job
from allgood.calibration import (
    Calibration,
    GoodScores,
    least_rate,
    p_value,
    pictures_needed,
    threshold,
)
from allgood.cli import main
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]

# few different values, so that ties are common
SCORES = st.lists(st.integers(-3, 8).map(lambda n: n / 4) | st.floats(-1e6, 1e6), max_size=60)
RATES = (
    st.floats(1e-4, 0.999)
    | st.integers(1, 60).map(lambda n: 1 / (n + 1))
    | st.sampled_from([0.01, 0.05, 0.07, 0.1, 0.29, 0.3, 0.1 + 0.2, 0.5, 0.7])
)

# -- the numbers ---------------------------------------------------------------------------------


def test_p_value_by_hand() -> None:
    assert p_value(5, [1, 2, 3]) == 1 / 4
    assert p_value(3, [1, 2, 3]) == 2 / 4  # an equal score counts as at least as anomalous
    assert p_value(0, [1, 2, 3]) == 1
    assert p_value(2, [2, 2, 2]) == 1


def test_threshold_by_hand() -> None:
    scores = list(range(1, 20))  # 19 scores: 1 / 20 is the least p-value
    assert threshold(scores, 0.05) == 19
    assert threshold(scores, 0.099) == 19
    assert threshold(scores, 0.10) == 18
    assert threshold(scores, 0.5) == 10


@pytest.mark.parametrize(
    ("rate", "needed"),
    [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1), (0.3, 3), (1 / 3, 2), (0.001, 999), (0.99, 1)],
)
def test_pictures_needed(rate: float, needed: int) -> None:
    assert pictures_needed(rate) == needed
    threshold([0.0] * needed, rate)
    with pytest.raises(InputError, match=f"needs {needed} good pictures per category, got"):
        threshold([0.0] * (needed - 1), rate)


@given(RATES)
def test_pictures_needed_is_the_least(rate: float) -> None:
    needed = pictures_needed(rate)
    assert 1 / (needed + 1) <= rate
    assert needed == 0 or 1 / needed > rate


@pytest.mark.parametrize("count", [1, 2, 3, 9, 19, 99, 150, 1000])
def test_least_rate_is_enough_and_short(count: int) -> None:
    rate = least_rate(count)
    assert pictures_needed(rate) <= count
    assert rate <= 1.1 / (count + 1) + 1e-9
    assert len(f"{rate:g}") <= 7


@given(SCORES, st.integers(-4, 9).map(lambda n: n / 4) | st.floats(-1e6, 1e6), RATES)
def test_alarm_exactly_above_the_threshold(scores: list[float], new: float, rate: float) -> None:
    """score > threshold if and only if p <= alpha, ties and odd rates included."""
    if len(scores) < pictures_needed(rate):
        with pytest.raises(InputError):
            threshold(scores, rate)
        return
    limit = threshold(scores, rate)
    assert (p_value(new, scores) <= rate) == (new > limit)
    for score in (limit, np.nextafter(limit, np.inf), np.nextafter(limit, -np.inf)):
        assert (p_value(float(score), scores) <= rate) == (score > limit)


@given(SCORES.filter(len), RATES)
def test_threshold_by_brute_force(scores: list[float], rate: float) -> None:
    """Of the calibration scores, the least that may not be exceeded without an alarm."""
    if len(scores) < pictures_needed(rate):
        return
    quiet = [s for s in scores if (1 + sum(t > s for t in scores)) / (len(scores) + 1) <= rate]
    assert threshold(scores, rate) == min(quiet)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (30, 0.1), (99, 0.01), (40, 0.33)])
def test_the_promise_holds(count: int, rate: float) -> None:
    """Over many draws of calibration pictures, a good picture raises an alarm at most that often,
    and nearly that often: floor(alpha (n + 1)) / (n + 1) exactly."""
    generator = np.random.default_rng(0)
    draws = 20_000
    scores = generator.gamma(2.0, size=(draws, count))
    new = generator.gamma(2.0, size=draws)
    alarms = np.mean([score > threshold(own, rate) for own, score in zip(scores, new, strict=True)])
    expected = float(Fraction(int(rate * (count + 1) + 1e-9), count + 1))
    deviation = (expected * (1 - expected) / draws) ** 0.5
    assert alarms <= rate + 4 * deviation
    assert abs(alarms - expected) < 4 * deviation


def test_promise_holds_with_ties() -> None:
    """Scores that are often equal raise fewer alarms, never more."""
    generator = np.random.default_rng(1)
    alarms = [
        generator.integers(0, 4) > threshold(generator.integers(0, 4, 19).tolist(), 0.2)
        for _ in range(5000)
    ]
    assert np.mean(alarms) <= 0.2


# -- the record ----------------------------------------------------------------------------------


def test_record_goes_through_json() -> None:
    scores = {
        "a": GoodScores([0.25, 1.5, 0.75], [1.0, 2.0, 3.0], ["x"]),
        "b": GoodScores([2.0, 1.0], [5.0, 6.0]),
    }
    calibration = Calibration(0.5, scores)
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    for name in scores:
        assert again.image_threshold(name) == calibration.image_threshold(name)
        assert again.map_threshold(name) == calibration.map_threshold(name)
    assert again.categories["a"].pictures == ["x"]
    assert not again.knows("c")
    assert "at most 50 %" in calibration.to_json()["promise"]


def test_too_few_pictures_says_how_many() -> None:
    with pytest.raises(InputError) as caught:
        Calibration(0.01, {"bolt": GoodScores([1.0] * 20, [1.0] * 20)})
    assert str(caught.value) == (
        "category 'bolt' has 20 good calibration pictures, but a false-alarm rate of 0.01 needs "
        "99: give more, or promise no less than 0.048"
    )


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def uncalibrated(tree: Path, tmp_path: Path) -> Path:
    return library.fit(
        tree,
        out=tmp_path / "run",
        encoder="test_efficientnet",
        weights="random",
        image_size=32,
        calibration_share=0,
    )


@pytest.fixture
def wood_run(tree: Path, tmp_path: Path) -> Path:
    """Uncalibrated, of one of the two categories."""
    return library.fit(
        tree,
        out=tmp_path / "run",
        categories=("wood",),
        encoder="test_efficientnet",
        weights="random",
        image_size=32,
        calibration_share=0,
    )


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 more good pictures per category, in folders named after them."""
    root = tmp_path_factory.mktemp("fresh")
    for category in ("wood", "cloth"):
        (root / category).mkdir()
        for i in range(30):
            part(category, 5000 + i).save(root / category / f"{i}.png")
    return root


def test_command_and_python(allgood: Command, uncalibrated: Path, fresh: Path, tree: Path) -> None:
    words = ["calibrate", uncalibrated, fresh / "wood", fresh / "cloth"]
    answer = allgood(*words, "--max-false-alarm", 0.05)
    assert answer.code == 0
    first, *lines = answer.out.splitlines()
    assert first == "at most 5 % of good pictures raise an alarm"
    assert [line.split()[0] for line in lines] == ["cloth", "wood"]
    assert all("from 30 good pictures" in line for line in lines)

    written = (uncalibrated / "calibration.json").read_bytes()
    again = library.calibrate(uncalibrated, [fresh / "wood", fresh / "cloth"], max_false_alarm=0.05)
    assert (uncalibrated / "calibration.json").read_bytes() == written
    assert f"{again}\n" == answer.out

    inspector = library.Inspector(uncalibrated)
    scores = [i.image_score for i in inspector.inspect(fresh / "wood", category="wood")]
    assert sorted(again.categories["wood"].image) == pytest.approx(sorted(scores), rel=1e-4)
    picture = tree / "wood" / "test" / "hole" / "000.png"
    (inspection,) = inspector.inspect(picture, category="wood")
    assert inspection.p_value == p_value(inspection.image_score, scores)
    assert inspection.is_anomalous == (
        inspection.image_score > inspector.calibration.image_threshold("wood")
    )


def test_one_category_later(allgood: Command, uncalibrated: Path, fresh: Path) -> None:
    """Categories that are not shown keep their scores, and the run its rate unless told."""
    assert allgood("calibrate", uncalibrated, fresh / "wood", "--max-false-alarm", 0.05).code == 0
    one = json.loads((uncalibrated / "calibration.json").read_text())["categories"]
    words = ["calibrate", uncalibrated, fresh / "cloth", "--max-false-alarm", 0.04]
    assert allgood(*words).code == 0
    both = json.loads((uncalibrated / "calibration.json").read_text())
    assert list(both["categories"]) == ["cloth", "wood"]
    assert both["categories"]["wood"]["image_scores"] == one["wood"]["image_scores"]
    assert both["max_false_alarm"] == 0.04
    said = allgood.refused(*words[:-1], 0.01)
    assert "'wood' has 30 good calibration pictures from before, but a false-alarm" in said
    assert "calibrating on good pictures" not in said  # known before anything is judged
    assert allgood(*words[:-2]).code == 0
    assert json.loads((uncalibrated / "calibration.json").read_text()) == both


def test_pictures_seen_in_fitting_are_left_out(
    allgood: Command, uncalibrated: Path, fresh: Path, tree: Path, tmp_path: Path
) -> None:
    """Also under other names: they are known by their bytes."""
    mixed = shutil.copytree(fresh / "wood", tmp_path / "wood")
    for i in range(4):
        shutil.copy(tree / "wood" / "train" / "good" / f"{i:03}.png", mixed / f"copy {i}.png")
    answer = allgood("calibrate", uncalibrated, mixed, "--max-false-alarm", 0.05)
    assert answer.code == 0
    assert "4 pictures left out: the run was fitted on them" in answer.err
    assert "from 30 good pictures" in answer.out
    said = allgood.refused("calibrate", uncalibrated, tree / "wood" / "train" / "good")
    assert "category 'good' was never learned" in said
    said = allgood.refused(
        "calibrate", uncalibrated, tree / "wood" / "train" / "good", "--category", "wood"
    )
    assert "the run was fitted on all of these pictures" in said


def test_a_copy_counts_once(
    allgood: Command, uncalibrated: Path, fresh: Path, tmp_path: Path
) -> None:
    """Counted twice, ten pictures would promise what takes nineteen."""
    for name in ("monday", "copied"):
        shutil.copytree(fresh / "wood", tmp_path / "wood" / name)
    words = ["calibrate", uncalibrated, tmp_path / "wood"]
    assert "from 30 good pictures" in allgood(*words, "--max-false-alarm", 0.05).out
    said = allgood.refused(*words, "--max-false-alarm", 0.02)
    assert "has 30 good calibration pictures" in said


def test_resized_copies_of_seen_pictures_are_left_out(
    allgood: Command, uncalibrated: Path, tree: Path, tmp_path: Path
) -> None:
    out = library.synthesize([tree], out=tmp_path / "s", image_size=48, categories=("wood",))
    answer = allgood("calibrate", uncalibrated, out, "--max-false-alarm", 0.2)
    assert "48 pictures left out" in answer.err
    assert "from 6 good pictures" in answer.out


def test_category_named(allgood: Command, uncalibrated: Path, fresh: Path, tmp_path: Path) -> None:
    shots = shutil.copytree(fresh / "wood", tmp_path / "monday")
    words = ["calibrate", uncalibrated, shots, "--max-false-alarm", 0.05]
    said = allgood.refused(*words)
    assert said == (
        f"category 'monday' was never learned by run '{uncalibrated}': "
        "where all pictures show the same, name one of cloth, wood with --category"
    )
    assert "did you mean 'wood'?" in allgood.refused(*words, "--category", "woood")
    assert not (uncalibrated / "calibration.json").exists()
    assert allgood(*words, "--category", "wood").code == 0


def test_one_category_run_takes_its_own_pictures(
    allgood: Command, wood_run: Path, fresh: Path, tmp_path: Path
) -> None:
    """Of data that name several categories; a single folder may be called anything."""
    data = tmp_path / "data"
    for category in ("wood", "cloth"):
        shutil.copytree(fresh / category, data / category / "train" / "good")
    table = tmp_path / "data.csv"
    rows = [f"{path},{path.parent.name}" for path in sorted(fresh.glob("*/*.png"))]
    table.write_text("\n".join(["image,category", *rows]))
    rate = ["--max-false-alarm", 0.05]
    alone = allgood("calibrate", wood_run, data / "wood", *rate)
    assert "from 30 good pictures" in alone.out
    for roots in ([data], [table], [fresh / "wood", fresh / "cloth"]):
        answer = allgood("calibrate", wood_run, *roots, *rate)
        assert (answer.code, answer.out) == (0, alone.out)
        assert "categories left out, as the run has not learned them: cloth" in answer.err
    shots = shutil.copytree(fresh / "wood", tmp_path / "monday")
    assert allgood("calibrate", wood_run, shots, *rate).out == alone.out


def test_several_categories_are_never_taken_for_one(
    allgood: Command, wood_run: Path, fresh: Path, tmp_path: Path
) -> None:
    for name, category in (("oak", "wood"), ("linen", "cloth")):
        shutil.copytree(fresh / category, tmp_path / "data" / name / "train" / "good")
    words = ["calibrate", wood_run, tmp_path / "data", "--max-false-alarm", 0.05]
    assert "category 'linen' was never learned" in allgood.refused(*words)
    assert allgood.refused(*words, "--category", "wood") == (
        f"{tmp_path / 'data'}: the data hold several categories (linen, oak): leave out "
        "--category, or give the pictures of 'wood' alone"
    )
    assert not (wood_run / "calibration.json").exists()
    folders = [shutil.copytree(fresh / "wood", tmp_path / "monday")]
    folders.append(tmp_path / "tuesday")
    folders[1].mkdir()
    for i in range(9):
        part("wood", 7000 + i).save(folders[1] / f"{i}.png")
    answer = allgood("calibrate", wood_run, *folders, "--category", "wood", *words[-2:])
    assert "from 39 good pictures" in answer.out


def test_run_replaced_meanwhile_keeps_its_own_thresholds(
    allgood: Command, tree: Path, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fit = ["fit", tree, "--out", run, *TINY, "--overwrite"]
    assert allgood(*fit).code == 0
    score, other = calibrate_job.score_good, {}

    def score_and_replace(*arguments: Any) -> Any:
        monkeypatch.setattr(calibrate_job, "score_good", score)
        scores = score(*arguments)
        assert main([str(word) for word in [*fit, "--settings", "coreset_ratio=0.5"]]) == 0
        other.update(content(run))
        return scores

    monkeypatch.setattr(calibrate_job, "score_good", score_and_replace)
    words = ["calibrate", run, fresh / "wood"]
    said = allgood(*words).err.splitlines()[-1]
    assert said == f"allgood: run '{run}' was replaced by another meanwhile: calibrate it again"
    assert content(run) == other
    assert allgood(*words).code == 0


def test_report_of_the_thresholds_before_is_named(
    allgood: Command, uncalibrated: Path, fresh: Path, tree: Path
) -> None:
    words = ["calibrate", uncalibrated, fresh / "wood", "--max-false-alarm", 0.05]
    assert "these thresholds" not in allgood(*words).err
    assert allgood("evaluate", uncalibrated, tree).code == 0
    before = content(uncalibrated)
    answer = allgood(*words[:-1], 0.2)
    assert answer.err.splitlines()[-1] == (
        f"metrics.json and report.html of run '{uncalibrated}' do not know these "
        "thresholds: `allgood evaluate` writes both anew"
    )
    assert content(uncalibrated)["report.html"] == before["report.html"]


def test_defective_pictures_do_not_calibrate(
    allgood: Command, uncalibrated: Path, tree: Path
) -> None:
    """Of a labelled set the good pictures count, of every split, and no others."""
    answer = allgood("calibrate", uncalibrated, tree, "--max-false-alarm", 0.2)
    assert answer.code == 0
    assert "96 pictures left out" in answer.err
    assert answer.out.count("from 6 good pictures") == 2


def test_unreadable_pictures_are_left_out(
    allgood: Command, uncalibrated: Path, fresh: Path, tmp_path: Path
) -> None:
    shots = shutil.copytree(fresh / "wood", tmp_path / "wood")
    (shots / "7.png").write_bytes(b"torn")
    answer = allgood("calibrate", uncalibrated, shots, "--max-false-alarm", 0.05)
    assert answer.code == 0
    assert "from 29 good pictures" in answer.out
    assert f"left out: {shots / '7.png'}" in answer.err
    for path in shots.iterdir():
        path.write_bytes(b"torn " + path.name.encode())
    assert allgood.refused("calibrate", uncalibrated, shots).startswith(
        "none of the good pictures could be read; "
    )


def test_broken_held_out_pictures_do_not_fail_the_fit(allgood: Command, tmp_path: Path) -> None:
    """Where too few of the pictures kept from fitting are readable, the category stays
    uncalibrated, and the run stands."""
    data = draw_tree(tmp_path / "data", train=40, good=1, bad=1)
    for path in sorted((data / "wood" / "train" / "good").iterdir())[::2]:
        path.write_bytes(b"torn " + path.name.encode())
    answer = allgood("fit", data, "--out", tmp_path / "run", *TINY)
    assert answer.code == 0
    assert "category 'wood' stays uncalibrated: a false-alarm rate of 0.05 needs 19" in answer.err
    calibration = library.Inspector(tmp_path / "run").calibration
    assert calibration is not None
    assert calibration.knows("cloth")
    assert not calibration.knows("wood")
    assert "left out, as they could not be read: 20 pictures" in answer.err
