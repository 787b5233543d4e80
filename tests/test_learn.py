"""The door `fit` for detectors that learn by gradient: cache, log, kills, refusals; recipes."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_trees import save
from doors import TINY, Command, content, draw_tree, mask, part
from killing import Killer

import allgood as library
from allgood.fitting import job as fit_job
from allgood.recipes import RECIPES, configured, find_recipe
from allgood.recipes.recipe import NUMBERS, Recipe
from allgood.training.config import TrainConfig
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]

LEARN = [
    *("--detector", "dinomaly", "--encoder", "test_vit", "--weights", "random"),
    *("--levels", "1", "2", "--settings", "decoder_depth=2", "--image-size", "32"),
    *("--max-false-alarm", "0.15"),
]
TRAIN = ["--train", "steps=12", "batch_size=4", "checkpoint_steps=3", "log_steps=5"]
RESULT = ("weights.safetensors", "calibration.json", "config.json")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = draw_tree(tmp_path_factory.mktemp("few"), train=14, good=3, bad=2)
    (root / "cloth" / "train" / "good" / "007.png").write_bytes(b"torn")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home" / "allgood" / "features"


def vit_weights(path: Path) -> Path:
    """Other weights of the tiny ViT than `random` are."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def of_run(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULT}


def test_a_trained_run_and_all_commands(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    answer = allgood("fit", few, "--out", out, *LEARN, *TRAIN)
    assert answer.code == 0, answer.err
    assert f"{cache}" in answer.err and "built" in answer.err
    assert "left out, as they could not be read: 1 pictures" in answer.err
    assert set(content(out)) == {*RESULT, "provenance.json", "training.jsonl"}
    log = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [5, 10, 12]
    config = json.loads((out / "config.json").read_text())
    assert config["train"]["steps"] == 12 and config["train"]["learning_rate"] == 2e-3
    assert config["encoder"]["settings"]["levels"] == [1, 2]

    picture = few / "wood" / "test" / "hole" / "000.png"
    (record,) = allgood("inspect", out, picture, "--overlays", tmp_path / "heat").records
    assert record["image_score"] > 0 and record["p_value"] is not None
    assert (tmp_path / "heat" / "000.png").is_file()
    (rounded,) = allgood("inspect", out, picture, "--precision", "bf16").records
    assert rounded["image_score"] == pytest.approx(record["image_score"], rel=0.02)
    assert rounded["image_score"] != record["image_score"]
    assert allgood("evaluate", out, few).code == 0
    assert (out / "report.html").is_file()
    # The same request in another folder finds the cache, and gives the same run.
    again = allgood("fit", few, "--out", tmp_path / "again", *LEARN, *TRAIN)
    assert "reused" in again.err
    assert of_run(tmp_path / "again") == of_run(out)


def test_without_cache(allgood: Command, few: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = allgood("fit", few, "--out", out, *LEARN, *TRAIN, "--no-cache")
    assert answer.code == 0
    assert "no feature cache: the encoder runs in every step" in answer.err
    assert not cache.exists()
    with_cache = tmp_path / "cached"
    words = ["--cache", tmp_path / "elsewhere", "--tensorboard", tmp_path / "board"]
    assert allgood("fit", few, "--out", with_cache, *LEARN, *TRAIN, *words).code == 0
    assert list((tmp_path / "elsewhere").iterdir()) and not cache.exists()
    assert list((tmp_path / "board").rglob("*tfevents*"))
    picture = few / "wood" / "test" / "hole" / "000.png"
    scores = [
        next(library.Inspector(run).inspect(picture)).image_score for run in (out, with_cache)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)  # features rounded to fp16


def test_a_full_disk_is_said(
    allgood: Command, few: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allgood.learning.room_for", lambda *_: False)
    answer = allgood("fit", few, "--out", tmp_path / "run", *LEARN, *TRAIN)
    assert answer.code == 0
    assert f"do not fit into {cache}, so the encoder runs in every step" in answer.err


LEVELS = [
    *("--encoder", "test_resnet", "--weights", "random", "--levels", "1", "2", "3"),
    *("--image-size", "128", "--train", "steps=2", "batch_size=4"),
]
SMALL = ["--settings", "width=16", "layers=1"]
SHORT = {
    "dinomaly": [*LEARN, "--train", "steps=2", "batch_size=4"],
    "rd4ad": ["--detector", "rd4ad", *LEVELS],
    "flipped": ["--detector", "rd4ad", *LEVELS, "--augment", "all=flip_horizontal"],
    "uniad": ["--detector", "uniad", *SMALL, *LEVELS],
}
"""Fits where only the features matter."""


@pytest.mark.parametrize(
    ("detector", "other"),
    [
        ("rd4ad", ["--tile", "96"]),
        ("rd4ad", ["--image-size", "192"]),
        ("rd4ad", ["--crop", "64"]),
        ("rd4ad", ["--ignore", "IGNORE"]),
        ("rd4ad", ["--categories", "wood"]),
        ("flipped", ["--augment", "all=flip_vertical"]),
        ("rd4ad", ["--detector", "minimaxad"]),
        ("uniad", [*SMALL, "grid=10"]),
        ("dinomaly", ["--seed", "1"]),  # keeps others of the pictures for the thresholds
        ("dinomaly", ["--levels", "0", "1"]),
        ("dinomaly", ["--weights", "WEIGHTS"]),
        ("dinomaly", ["--settings", "decoder_depth=2", "constraint=one_group"]),
        ("dinomaly", {"interpolation": "bicubic"}),
        ("dinomaly", {"norm": True}),
    ],
    ids=str,
)
def test_what_decides_the_features_decides_the_cache(
    allgood: Command,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    detector: str,
    other: list[str] | dict[str, Any],
) -> None:
    """A training finds no features of another one, and so is what it is with a cache of its own."""
    words, shared, own = SHORT[detector], tmp_path / "shared", tmp_path / "own"
    assert allgood("fit", few, "--out", tmp_path / "plain", *words, "--cache", shared).code == 0
    if isinstance(other, dict):  # a recipe has it, no option
        monkeypatch.setitem(RECIPES, "dinomaly", replace(RECIPES["dinomaly"], **other))
        other = []
    files = {
        "IGNORE": save(mask(), tmp_path / "ignore.png"),
        "WEIGHTS": vit_weights(tmp_path / "w.safetensors"),
    }
    other = [str(files.get(word, word)) for word in other]
    weights = []
    for cache in (shared, own):
        run = tmp_path / f"run_{cache.name}"
        answer = allgood("fit", few, "--out", run, *words, *other, "--cache", cache)
        assert answer.code == 0, answer.err
        assert "GB, built" in answer.err
        weights.append((run / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_caches_from_before_tiles_were_in_the_key_are_not_read(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    """A tiled training may have filled them under the name of one without tiles."""
    assert allgood("fit", few, "--out", tmp_path / "run", *SHORT["rd4ad"]).code == 0
    (index,) = cache.glob("*/index.json")
    assert "tile" in json.loads(index.read_text())["key"]


def test_copies_do_not_change_the_order_of_a_cache(allgood: Command, tmp_path: Path) -> None:
    """The split puts copies together, also where it keeps nothing: the same pictures, one cache."""
    data = draw_tree(tmp_path / "data", ("wood",), train=8, good=0, bad=0)
    good = data / "wood" / "train" / "good"
    shutil.copy(good / "000.png", good / "005.png")
    weights = []
    for i, (cache, share) in enumerate([("shared", 0.15), ("shared", 0), ("own", 0)]):
        words = [*SHORT["rd4ad"], "--calibration-share", share, "--cache", tmp_path / cache]
        answer = allgood("fit", data, "--out", tmp_path / str(i), *words)
        assert answer.code == 0, answer.err
        weights.append((tmp_path / str(i) / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]


LONG = ["--train", "steps=1000000", "batch_size=4"]  # so long that a test cannot wait for its end


def test_a_category_that_cannot_be_read_is_refused_before_the_training(
    allgood: Command, cache: Path, tmp_path: Path
) -> None:
    """Also where the cache remembers the pictures from another folder."""
    data, out = draw_tree(tmp_path / "data", train=3, good=0, bad=0), tmp_path / "run"
    for path in (data / "cloth" / "train" / "good").iterdir():
        path.write_bytes(b"torn")
    words = ["--out", out, *LEARN, *LONG, "--calibration-share", "0"]
    said = "none of the 3 good pictures of category 'cloth' could be read; the first: "
    assert allgood.refused("fit", data, *words).startswith(f"{said}{data}")
    moved = data.rename(tmp_path / "moved")
    assert allgood.refused("fit", moved, *words).startswith(f"{said}{moved}")
    assert allgood.refused("fit", moved, *words, "--no-cache").startswith(f"{said}{moved}")
    assert not out.exists()


def test_what_was_trained_outlives_a_mistake(
    allgood: Command, few: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's weights go away behind the training, and come back."""
    whole, out, weights = tmp_path / "whole", tmp_path / "run", tmp_path / "w.safetensors"
    vit_weights(weights)
    words = ["fit", few, *LEARN, *TRAIN, "--weights", weights]
    assert "training: " in allgood(*words, "--out", whole).err
    calibrate_on = fit_job.calibrate_on

    def bereft(*arguments: Any, **others: Any) -> Any:
        weights.rename(tmp_path / "away")
        return calibrate_on(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(fit_job, "calibrate_on", bereft)
        assert f"{weights}" in allgood.refused(*words, "--out", out)
    (tmp_path / "away").rename(weights)
    answer = allgood(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert "training: " not in answer.err  # not a step is made again
    assert of_run(out) == of_run(whole)


def test_killed_by_the_clock_at_random_moments(
    killer: Killer, few: Path, cache: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    words = ["fit", few, *LEARN, *TRAIN, "--cache"]
    code, text = killer(*words, tmp_path / "cache0", "--out", whole)
    assert code == 0, text
    seconds = json.loads((whole / "provenance.json").read_text())["seconds"]
    moments = random.Random(3)
    for turn in range(3):
        out = tmp_path / f"run{turn}"
        here = [*words, tmp_path / f"cache{turn + 1}", "--out", out]
        for _ in range(2):
            killer(*here, seconds=moments.uniform(0.05, 0.9) * seconds)
        if not (out / "config.json").exists():
            code, text = killer(*here)
            assert code == 0, text
        assert of_run(out) == of_run(whole)


def test_killed_at_renamings(killer: Killer, few: Path, cache: Path, tmp_path: Path) -> None:
    """Just before and after files come to be: cache index, checkpoints, the run's own files."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    words = ["fit", few, *LEARN, *TRAIN, "--cache"]
    code, text = killer(*words, tmp_path / "cache0", "--out", whole)
    assert code == 0, text
    kills = 0
    for moment in (1, 4, 5, 6, 7, 8, 11, 12, 15):
        code, text = killer(*words, tmp_path / "cache1", "--out", out, moment=moment)
        if code == 0:
            break
        assert code == -9, text
        kills += 1
        if (out / "config.json").exists():
            break
    assert kills >= 4
    if not (out / "config.json").exists():
        assert killer(*words, tmp_path / "cache1", "--out", out, "--resume")[0] == 0
    assert of_run(out) == of_run(whole)


def test_resume_refuses_where_there_is_nothing(allgood: Command, few: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert allgood.refused("fit", few, "--out", out, *LEARN, "--resume") == (
        f"'{out}' holds no unfinished fit: leave out --resume"
    )
    assert not out.exists()


def test_one_model_per_category(allgood: Command, few: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    assert allgood("fit", few, "--out", out, *LEARN, *TRAIN, "--per-category", "True").code == 0
    for category in ("cloth", "wood"):
        assert library.Inspector(out / category).categories == (category,)
    before = content(out)
    answer = allgood("fit", few, "--out", out, *LEARN, *TRAIN, "--per-category", "True")
    assert answer.code == 0 and "is finished" in answer.err
    assert content(out) == before
    # The one of a category is the model that its data alone make.
    alone = tmp_path / "wood"
    words = ["fit", few, "--out", alone, *LEARN, *TRAIN, "--categories", "wood"]
    assert allgood(*words).code == 0
    assert of_run(alone) == of_run(out / "wood")


BANK = ["--per-category", "True", *TINY, "--calibration-share", "0"]


def test_a_model_per_category_of_another_command_is_not_kept(
    allgood: Command, few: Path, tmp_path: Path
) -> None:
    """Or the models of one folder would be of different settings."""
    out = tmp_path / "runs"
    assert allgood("fit", few, "--out", out, *BANK).code == 0
    before = content(out)
    other = ["--settings", "coreset_ratio=0.2"]
    assert allgood.refused("fit", few, "--out", out, *BANK, *other) == (
        f"run '{out / 'cloth'}' was fitted by another command: give that command again, name "
        "another folder with --out, or give --overwrite"
    )
    assert content(out) == before
    assert allgood("fit", few, "--out", out, *BANK, *other, "--overwrite").code == 0
    again = allgood("fit", few, "--out", out, *BANK, *other, "--device", "cpu")
    assert again.code == 0 and again.err.count("is finished") == 2


@pytest.mark.parametrize("shots", [[], ["--shots", "3"]], ids=["all", "shots"])
def test_a_model_per_category_of_other_pictures_is_not_kept(
    allgood: Command, tmp_path: Path, shots: list[str]
) -> None:
    """A part that was labelled good by mistake does not stay learned when it is taken out."""
    data, out = draw_tree(tmp_path / "data", train=4, good=1, bad=1), tmp_path / "runs"
    words = ["fit", data, "--out", out, *TINY, "--per-category", "True", *shots]
    assert allgood(*words).code == 0
    before = content(out)
    save(part("wood", 99), data / "wood" / "test" / "good" / "999.png")
    again = allgood(*words)  # what is not learned does not matter
    assert again.code == 0 and again.err.count("is finished") == 2
    (data / "wood" / "train" / "good" / "002.png").unlink()
    assert allgood.refused(*words) == (
        f"run '{out / 'wood'}' was fitted on other pictures or ignored regions: give --overwrite "
        "to fit all categories again, or name another folder with --out"
    )
    assert content(out) == before
    assert allgood(*words, "--overwrite").code == 0
    again = allgood(*words)
    assert again.code == 0 and again.err.count("is finished") == 2


def test_masks_of_one_model_per_category(allgood: Command, few: Path, tmp_path: Path) -> None:
    """Each takes its own from the folder, which may lack one; one painted anew is another fit."""
    out, ignore = tmp_path / "runs", tmp_path / "ignore"
    masks = {name: save(mask(), ignore / f"{name}.png") for name in ("wood", "cloth")}
    words = ["fit", few, "--out", out, *BANK, "--ignore", ignore]
    assert allgood(*words).code == 0
    for name in masks:
        assert [path.stem for path in (out / name / "ignore").iterdir()] == [name]
    again = allgood(*words)
    assert again.code == 0 and again.err.count("is finished") == 2
    save(mask().rotate(180), masks["wood"])
    assert "was fitted on other pictures or ignored regions" in allgood.refused(*words)
    masks["cloth"].unlink()
    assert allgood(*words, "--overwrite").code == 0
    assert [path.parent.parent.name for path in out.glob("*/ignore/*")] == ["wood"]
    masks["wood"].rename(ignore / "wod.png")
    assert allgood.refused(*words, "--overwrite") == (
        f"{ignore}: expected masks named after categories (cloth, wood), found wod"
    )


def test_resuming_one_model_per_category(
    allgood: Command, killer: Killer, few: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    words = ["fit", few, "--out", out, *BANK]
    nothing = f"'{out}' holds no unfinished fit: leave out --resume"
    assert allgood.refused(*words, "--resume") == nothing
    assert killer(*words, moment=4)[0] == -9
    assert allgood(*words, "--resume").code == 0
    assert allgood.refused(*words, "--resume") == nothing
    (out / "wood" / "config.json").unlink()  # as if killed between the two
    shutil.rmtree(out / "wood")
    assert allgood(*words, "--resume").code == 0


def test_a_model_per_category_stays_in_its_folder(
    allgood: Command, few: Path, tmp_path: Path
) -> None:
    """A manifest may give a category any name."""
    rows = ["path,category,split,label"]
    for i in range(6):
        rows.append(f"{few / 'wood' / 'train' / 'good' / f'{i:03}.png'},../wood,train,good")
    manifest = tmp_path / "data.csv"
    manifest.write_text("\n".join(rows) + "\n")
    out = tmp_path / "runs"
    answer = allgood("fit", manifest, "--out", out, *BANK)
    assert answer.code == 0, answer.err
    assert [path.name for path in out.iterdir()] == ["%2E.%2Fwood"]
    assert library.Inspector(out / "%2E.%2Fwood").categories == ("../wood",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "runs"]


def test_a_recipe_may_ask_for_one_model_per_category(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    words = [word for word in LEARN if word not in ("--detector", "dinomaly")]
    words += ["--recipe", "dinomaly_mvtec_ad_separate", *TRAIN]
    assert allgood("fit", few, "--out", out, *words).code == 0
    assert {path.name for path in out.iterdir()} == {"cloth", "wood"}
    together = tmp_path / "run"
    assert allgood("fit", few, "--out", together, *words, "--per-category", "False").code == 0
    assert library.Inspector(together).categories == ("cloth", "wood")


FLIPPED = ["--augment", "wood=flip,rotate", "cloth=flip_horizontal"]


def test_augmented(allgood: Command, few: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = allgood("fit", few, "--out", out, *LEARN, *TRAIN, *FLIPPED)
    assert answer.code == 0, answer.err
    data = json.loads((out / "config.json").read_text())["data"]
    assert data["augment"] == {
        "cloth": {"flip_horizontal": 0.3, "flip_vertical": 0.0, "rotate": False},
        "wood": {"flip_horizontal": 0.3, "flip_vertical": 0.3, "rotate": True},
    }
    # 14 - 2 kept for the thresholds: 12 of wood in eight views, 12 of cloth in two.
    pictures = data["fitted_pictures"] + 1
    assert f"{pictures // 2 * 8 + pictures // 2 * 2} pictures" in answer.err
    assert "left out, as they could not be read: 1 pictures" in answer.err
    plain = tmp_path / "plain"
    asked = ["--augment", "all=flip", "wood=none", "cloth=none"]
    answer = allgood("fit", few, "--out", plain, *LEARN, *TRAIN, *asked)
    assert f"{pictures} pictures" in answer.err and "built" in answer.err
    assert "augment" not in json.loads((plain / "config.json").read_text())["data"]
    assert (plain / "weights.safetensors").read_bytes() != (
        out / "weights.safetensors"
    ).read_bytes()
    picture = few / "wood" / "test" / "hole" / "000.png"
    assert next(library.Inspector(out).inspect(picture)).image_score > 0


def test_a_recipe_augments_the_categories_that_there_are(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    words = ["--encoder", "test_efficientnet", "--weights", "random", "--levels", "0", "1"]
    words += ["--image-size", "32", "--recipe", "unias_mvtec_ad", *TRAIN, "--no-cache"]
    words += ["--settings", "width=32", "ffn=32", "grid=8", "--max-false-alarm", "0.15"]
    answer = allgood("fit", few, "--out", tmp_path / "run", *words)
    assert answer.code == 0, answer.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["augment"] == {
        "wood": {"flip_horizontal": 0.3, "flip_vertical": 0.3, "rotate": True}
    }


def test_one_model_per_category_is_augmented_by_its_own_words(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    words = [few, "--out", out, *LEARN, *TRAIN, "--per-category", "True"]
    said = allgood.refused("fit", *words, "--augment", "clot=flip")
    assert said.startswith("--augment: no category 'clot' is learned; did you mean 'cloth'?")
    assert not out.exists()
    assert allgood("fit", *words, "--augment", "wood=flip").code == 0
    found = {
        name: json.loads((out / name / "config.json").read_text()) for name in ("cloth", "wood")
    }
    assert list(found["wood"]["data"]["augment"]) == ["wood"]
    assert "augment" not in found["cloth"]["data"]


def test_killed_while_augmented(killer: Killer, few: Path, tmp_path: Path) -> None:
    """The cache's index, the checkpoints, and another command in between."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    words = ["fit", few, *LEARN, *TRAIN, *FLIPPED, "--cache"]
    code, text = killer(*words, tmp_path / "cache0", "--out", whole)
    assert code == 0, text
    for moment in (4, 7, 9):
        code, text = killer(*words, tmp_path / "cache1", "--out", out, moment=moment)
        assert code == -9, text
    assert killer(*words, tmp_path / "cache1", "--out", out, "--resume")[0] == 0
    assert of_run(out) == of_run(whole)


def test_processes_that_cannot_share_a_batch(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    """Refused before any of them starts."""
    words = ["--device", "cpu", "--devices", "3", "--train", "batch_size=16", "accumulate=2"]
    assert allgood.refused("fit", few, "--out", tmp_path / "run", *LEARN, *words) == (
        "batch_size 16 cannot be shared by 3 processes with 2 micro-batches each: choose a "
        "multiple of 6"
    )
    assert not cache.exists()


def test_batch_norm_in_several_processes_on_a_cpu(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    words = ["--detector", "rd4ad", "--encoder", "test_resnet", "--weights", "random"]
    words += ["--levels", "1", "2", "3", "--image-size", "64", "--device", "cpu", "--devices", "2"]
    said = allgood.refused("fit", few, "--out", tmp_path / "run", *words)
    assert said.startswith("a network with batch norm cannot be trained by several processes on CP")
    assert not cache.exists()


def test_a_nan_names_step_and_remedy(
    allgood: Command, few: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = ["--train", "steps=30", "batch_size=4", "learning_rate=1e30", "warmup_steps=0"]
    said = allgood.refused("fit", few, "--out", out, *LEARN, *train)
    assert "step" in said and "learning_rate" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep-aspect", "True"], "dinomaly is trained on upright pictures of one size"),
        (["--rotate", "True"], "dinomaly is trained on upright pictures of one size"),
        (
            ["--augment", "wod=flip"],
            "--augment: no category 'wod' is learned; did you mean 'wood'?",
        ),
        (["--augment", "flip"], "--augment 'flip' names no category: write all=flip"),
        (["--augment", "wood=flop"], "unknown augmentation 'flop'; did you mean 'flip'? known: "),
        (["--tile", "48"], "dinomaly compares whole images and takes no tiles"),
        (["--train", "steps=0"], "steps must be at least 1, got 0"),
        (["--train", "stepps=5"], "unknown setting 'stepps'; did you mean 'steps'?"),
        (["--train", "compile=perhaps"], "setting compile must be true or false, got 'perhaps'"),
        (["--train", "precision=fp8"], "setting precision must be one of fp32, bf16, fp16"),
        (["--settings", "dropout=1"], "dropout must be in [0, 1), got 1.0"),
        (["--settings", "constraint=dense", "decoder_depth=3"], "2 encoder levels and 3 decoder"),
        (["--recipe", "patchcore"], "recipe 'patchcore' is one of patchcore, not of dinomaly"),
        (["--recipe", "dinomaly_mvtec"], "unknown recipe 'dinomaly_mvtec'; did you mean"),
        (["--categories", "wod"], "the data hold no category 'wod'; did you mean 'wood'?"),
        (["--encoder", "test_efficientnet"], "encoder 'test_efficientnet' is no vision transf"),
        (["--crop", "20"], "center_crop must be a multiple of 16, got 20; use 16 or 32"),
    ],
)
def test_what_a_training_refuses(
    allgood: Command, few: Path, cache: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    out = tmp_path / "run"
    answer = allgood.refused("fit", few, "--out", out, *LEARN, *words)
    assert answer.startswith(said)
    assert not out.exists() and not cache.exists()


def test_a_memory_bank_is_not_trained(allgood: Command, few: Path, tmp_path: Path) -> None:
    for words in (["--train", "steps=5"], ["--devices", "2"], ["--augment", "all=flip"]):
        said = allgood.refused("fit", few, "--out", tmp_path / "run", *words)
        assert said.startswith("patchcore is not trained, it only reads the pictures once")


# -- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name: str) -> None:
    from allgood.detectors import detector_classes

    recipe = find_recipe(name)
    config_class, _ = detector_classes(recipe.detector)
    configured(config_class, recipe.settings, [])
    configured(TrainConfig, recipe.train, [])
    assert set(recipe.reported) <= {*NUMBERS, "dsc"}
    assert bool(recipe.reported) == bool(recipe.source) == bool(recipe.data)
    assert all(
        50 < value < 100 or metric != "image_auroc" for metric, value in recipe.reported.items()
    )


def test_the_papers_settings() -> None:
    """Spec 4.4: steps, dropout and optimiser per data set."""
    for name, steps, dropout in (
        ("dinomaly_mvtec_ad", 10_000, 0.2),
        ("dinomaly_visa", 10_000, 0.2),
        ("dinomaly_real_iad", 50_000, 0.4),
        ("dinomaly_mpdd", 10_000, 0.2),
        ("dinomaly_btad", 10_000, 0.2),
        ("dinomaly_uni_medical", 10_000, 0.4),
        ("dinomaly_mvtec_ad_separate", 5_000, 0.2),
        ("dinomaly_real_iad_separate", 5_000, 0.2),
        ("dinomaly_real_iad_2x", 100_000, 0.4),
    ):
        recipe: Recipe = RECIPES[name]
        train = configured(TrainConfig, recipe.train, [])
        assert (train.steps, recipe.settings.get("dropout", 0.2)) == (steps, dropout), name
        assert (train.batch_size, train.epsilon, train.gradient_clip) == (16, 1e-10, 0.1)
        assert (recipe.image_size, recipe.crop, recipe.levels) == (448, 392, "middle")
        assert recipe.per_category == name.endswith("_separate")
    with pytest.raises(InputError, match="did you mean 'dinomaly_visa'"):
        find_recipe("dinomaly_vsia")


def test_recipes_are_listed_with_their_numbers(allgood: Command) -> None:
    out = allgood("list", "recipes").out
    assert "image_auroc 99.6" in out and "one model per category" in out
