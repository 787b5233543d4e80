"""`allgood evaluate`: its numbers against scikit-learn on the scores, and what it says of them."""

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_trees import save
from doors import SIZE, TINY, Command, content, draw_tree, part
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import allgood as library
from allgood.calibration import threshold
from allgood.data.transforms import Transform
from allgood.evaluating import results
from allgood.evaluation import judged
from allgood.inference import Inspector
from allgood.metrics import PixelState
from allgood.scoring import resize_map
from allgood.types import Batch, Prediction

pytest_plugins = ["doors_fixtures"]


def refuse_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def metrics_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse_constant)


@pytest.fixture(scope="module")
def evaluated(run: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shared run's evaluation, and the folder it was written to."""
    out = tmp_path_factory.mktemp("evaluated")
    return library.evaluate(run, [tree], out=out), out


def image_numbers(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "image_auroc": roc_auc_score(labels, scores),
        "image_ap": average_precision_score(labels, scores),
        "image_f1max": f1.max(),
    }


def test_what_is_written(evaluated: Any) -> None:
    evaluation, out = evaluated
    assert sorted(content(out)) == ["metrics.json", "report.html"]
    numbers = metrics_in(out)
    assert numbers == json.loads(json.dumps(evaluation.metrics))
    assert list(numbers["categories"]) == ["cloth", "wood"]
    for row in (*numbers["categories"].values(), numbers["mean"]):
        assert {"image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap"} <= set(row)
        assert {"pixel_f1max", "aupro", "dsc", "mad"} <= set(row)
        assert all(set(metric) == {"value", "bound"} for metric in row.values())
    assert not [name for name in numbers["pooled"] if name.startswith("dsc")]
    assert all(isinstance(sentence, str) for sentence in numbers["protocol"])
    page = (out / "report.html").read_text()
    assert "wood" in page
    assert "allgood fit" in page


def test_table_is_printed(allgood: Command, run: Path, tree: Path, tmp_path: Path) -> None:
    answer = allgood("evaluate", run, tree, "--out", tmp_path / "new" / "folder")
    assert answer.code == 0
    assert answer.out.splitlines()[-2:] == [
        f"metrics  {tmp_path / 'new' / 'folder' / 'metrics.json'}",
        f"report   {tmp_path / 'new' / 'folder' / 'report.html'}",
    ]
    for word in ("cloth", "wood", "Mean of categories", "AUROC"):
        assert word in answer.out


def test_image_numbers_equal_scikit_learn(evaluated: Any, run: Path, tree: Path) -> None:
    """On the scores that `inspect` gives for the same pictures."""
    evaluation, _ = evaluated
    inspector = library.Inspector(run)
    every_score, every_label = [], []
    for name in ("cloth", "wood"):
        test = tree / name / "test"
        good = [i.image_score for i in inspector.inspect(test / "good", category=name)]
        bad = [i.image_score for i in inspector.inspect(test / "hole", category=name)]
        scores = np.array([*good, *bad])
        labels = np.repeat([False, True], [len(good), len(bad)])
        for metric, value in image_numbers(scores, labels).items():
            assert evaluation.metrics["categories"][name][metric]["value"] == pytest.approx(value)
        every_score.append(scores)
        every_label.append(labels)
    pooled = image_numbers(np.concatenate(every_score), np.concatenate(every_label))
    for metric, value in pooled.items():
        assert evaluation.metrics["pooled"][metric]["value"] == pytest.approx(value)
        mean = np.mean(
            [evaluation.metrics["categories"][n][metric]["value"] for n in ("cloth", "wood")]
        )
        assert evaluation.metrics["mean"][metric]["value"] == pytest.approx(mean)


@pytest.mark.parametrize("pixel_size", [48, 0])
@pytest.mark.parametrize("exact", [False, True])
def test_pixel_numbers_equal_scikit_learn(
    run: Path, tree: Path, tmp_path: Path, pixel_size: int, exact: bool
) -> None:
    """Over all pixels of all test pictures; 0: at each picture's own size."""
    evaluation = library.evaluate(
        run, tree / "wood", out=tmp_path, pixel_size=pixel_size, exact=exact
    )
    inspector = library.Inspector(run)
    scores, labels = [], []
    for defect in ("good", "hole"):
        for inspection in inspector.inspect(tree / "wood" / "test" / defect, category="wood"):
            size = (pixel_size, pixel_size) if pixel_size else SIZE
            assert inspection.input_map is not None
            scores.append(resize_map(inspection.input_map[None, None], size).numpy().ravel())
            truth = np.zeros(SIZE, np.float32)
            if defect == "hole":
                truth[16:34, 40:58] = 1
            labels.append(
                torch.nn.functional.interpolate(
                    torch.tensor(truth)[None, None], size, mode="nearest-exact"
                )
                .numpy()
                .ravel()
            )
    row = evaluation.metrics["categories"]["wood"]
    labels_, scores_ = np.concatenate(labels), np.concatenate(scores)
    for name, value in (
        ("pixel_auroc", roc_auc_score(labels_, scores_)),
        ("pixel_ap", average_precision_score(labels_, scores_)),
    ):
        assert row[name]["value"] == pytest.approx(value, abs=2e-4)
        if exact:
            assert row[name]["bound"] == 0
    assert evaluation.metrics["pixel_size"] == (pixel_size or "own")


# -- with a centre crop --------------------------------------------------------------------------

CROP = 64
CROP_OF = 96
"""Side of the square that `CROP` is cut from: rows 12 to 60 of 72, columns 11 to 53 of 64."""


@pytest.fixture(scope="module")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees the middle of each picture only."""
    folder = tmp_path_factory.mktemp("cropped")
    return library.fit(
        draw_tree(folder / "data", ("wood",), train=4, good=1, bad=1),
        out=folder / "run",
        encoder="test_efficientnet",
        weights="random",
        image_size=CROP_OF,
        crop=CROP,
        calibration_share=0,
    )


def see_truth(monkeypatch: pytest.MonkeyPatch, truth: np.ndarray) -> None:
    """Maps are the crop of the true mask from now on, with some noise where the part is good."""
    noise = 0.5 * torch.rand(CROP, CROP, generator=torch.Generator().manual_seed(0))

    def predict_batch(self: Inspector, batch: Batch, *_: Any, **__: Any) -> Prediction:
        inside = self.transform.mask_to_input(truth).float()
        maps = [noise if sample.is_good else noise.maximum(inside) for sample in batch.sample]
        count = len(maps)
        return Prediction(
            torch.stack(maps)[:, None], torch.ones(count), torch.zeros(count, dtype=torch.int64)
        )

    monkeypatch.setattr(Inspector, "predict_batch", predict_batch)


def picture_table(folder: Path, truth: np.ndarray) -> Path:
    """Two good pictures and one with this mask, in a test domain."""
    for i in range(3):
        save(part("wood", 3000 + i), folder / f"{i}.png")
    save(Image.fromarray(truth), folder / "mask.png")
    table = folder / "test.csv"
    rows = ["0.png,good,", "1.png,good,", "2.png,bad,mask.png"]
    table.write_text(
        "image,label,mask,split,category,domain\n"
        + "".join(f"{row},test,wood,new\n" for row in rows)
    )
    return table


@pytest.mark.parametrize("pixel_size", [CROP_OF, 40, 0])
def test_map_lies_where_the_crop_was(
    cropped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixel_size: int
) -> None:
    truth = np.zeros(SIZE, bool)
    truth[18:36, 14:32] = True  # inside the crop, but not in its middle
    see_truth(monkeypatch, truth)
    table = picture_table(tmp_path, truth)
    numbers = library.evaluate(cropped, table, out=tmp_path, pixel_size=pixel_size).metrics
    row = numbers["categories"]["wood/new"]
    for name in ("pixel_ap", "aupro", "dsc", "aupro_per_image"):
        # 1 but for the mask's own edge, where sizes are no multiples of each other
        assert row[name]["value"] == pytest.approx(1, abs=1e-6 if pixel_size == CROP_OF else 0.08)
    assert any("sees the middle of each picture only" in said for said in numbers["protocol"])


def test_outside_the_crop_nothing_is_found_and_nothing_is_alarmed(
    cropped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect that reaches over the crop's edge: what lies outside comes last in the ranking."""
    truth = np.zeros(SIZE, bool)
    truth[24:48, 32:64] = True  # columns 48 to 96 of 96, of which the crop has those to 80
    see_truth(monkeypatch, truth)
    table = picture_table(tmp_path, truth)
    numbers = library.evaluate(cropped, table, out=tmp_path, pixel_size=CROP_OF).metrics
    found = 2 / 3
    prevalence = (32 * 48) / (3 * CROP_OF**2)
    row = numbers["categories"]["wood/new"]
    assert row["pixel_ap"]["value"] == pytest.approx(found + (1 - found) * prevalence)
    assert row["pixel_f1max"]["value"] == pytest.approx(2 * found / (1 + found))


@pytest.mark.parametrize(
    ("size", "top", "left"), [((96, 160), 8, 29), ((160, 96), 29, 8), ((50, 50), 8, 8)]
)
def test_crop_lies_where_the_shape_of_the_picture_puts_it(
    size: tuple[int, int], top: int, left: int
) -> None:
    """With the aspect kept; all maps of a run with a CostFilter alike."""
    transform = Transform(64, keep_aspect=True, center_crop=48)
    maps = torch.rand(3, 48, 48)
    mask_size = (48 + 2 * top, 48 + 2 * left)
    whole = transform.map_beside_mask(maps, size, mask_size)
    assert whole.shape == (3, *mask_size)
    inside = (..., slice(top, top + 48), slice(left, left + 48))
    assert torch.equal(whole[inside], maps)
    whole[inside] = -torch.inf
    assert (whole == -torch.inf).all()


# -- alarms and rows -----------------------------------------------------------------------------


def test_alarms_are_those_of_inspect(evaluated: Any, run: Path, tree: Path) -> None:
    evaluation, _ = evaluated
    inspector = library.Inspector(run)
    calibration = inspector.calibration
    assert calibration is not None
    pooled = [score for name in ("cloth", "wood") for score in calibration.categories[name].image]
    limit = threshold(pooled, 0.05)
    found = over = 0
    for name in ("cloth", "wood"):
        bad = list(inspector.inspect(tree / name / "test" / "hole", category=name))
        good = list(inspector.inspect(tree / name / "test" / "good", category=name))
        assert evaluation.metrics["alarms"][name] == {
            "threshold": calibration.image_threshold(name),
            "promised_false_alarm_rate": 0.05,
            "found": sum(bool(i.is_anomalous) for i in bad),
            "defective": 5,
            "false_alarms": sum(bool(i.is_anomalous) for i in good),
            "good": 6,
        }
        found += sum(i.image_score > limit for i in bad)
        over += sum(i.image_score > limit for i in good)
    row = evaluation.metrics["alarms"]["pooled"]
    assert (row["threshold"], row["found"], row["false_alarms"]) == (limit, found, over)
    assert (row["defective"], row["good"]) == (10, 12)


def test_pixels_of_one_row_are_in_memory_at_a_time(
    run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: Any
) -> None:
    """However many categories there are, and in whatever order the folders are given."""
    alive: weakref.WeakValueDictionary[int, PixelState] = weakref.WeakValueDictionary()
    most = 0

    class Counted(PixelState):
        def update(self, *arguments: Any, **options: Any) -> None:
            nonlocal most
            super().update(*arguments, **options)
            alive[id(self)] = self
            most = max(most, len(alive))

    monkeypatch.setattr(judged, "PixelState", Counted)
    numbers = library.evaluate(run, [tree / "wood", tree / "cloth"], out=tmp_path).metrics
    assert most == 2  # a category's, and the pooled one
    assert numbers["categories"] == evaluated[0].metrics["categories"]


# -- the gallery ---------------------------------------------------------------------------------


def test_gallery_holds_small_pictures(run: Path, tmp_path: Path) -> None:
    """Painted small too: the line around a defect is as thin as on any small picture."""
    data = draw_tree(tmp_path / "data", ("wood",), train=1, good=0, bad=1)
    for name in ("test/hole/000.png", "ground_truth/hole/000_mask.png"):
        path = data / "wood" / name
        with Image.open(path) as picture:
            save(picture.resize((1280, 1440), Image.Resampling.NEAREST), path)
    (item,) = library.evaluate(run, data, out=tmp_path).content.gallery
    assert item.outline is not None
    small = (320, 284, 3)
    assert item.picture.shape == item.overlay.shape == item.outline.shape == small
    line = (item.outline == (0x00, 0xE5, 0xFF)).all(axis=2)
    rows, columns = np.nonzero(line)
    # DEFECT is (40, 16, 58, 34) of 64 x 72: times 284 / 64, with two pixels around it
    assert np.abs(np.array([columns.min(), columns.max()]) - (175, 259)).max() <= 1
    assert np.abs(np.array([rows.min(), rows.max()]) - (69, 152)).max() <= 1


def test_gallery_is_spread_over_the_categories(
    run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = library.evaluate(run, tree, out=tmp_path).content.gallery
    assert [item.category for item in gallery].count("cloth") >= 3
    monkeypatch.setattr(results, "GALLERY_SIZE", 4)
    few = library.evaluate(run, tree, out=tmp_path).content.gallery
    assert [item.category for item in few] == ["cloth", "cloth", "wood", "wood"]
    assert {item.name for item in few} < {item.name for item in gallery}


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_numbers_and_page_are_written_before_the_gallery_is_drawn(
    run: Path,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    """So neither is lost, and none stays of the evaluation before."""
    first = library.evaluate(run, tree / "wood", out=tmp_path)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(results, "gallery", fail)
    with pytest.raises(error):
        library.evaluate(run, tree, out=tmp_path)
    numbers, page = metrics_in(tmp_path), (tmp_path / "report.html").read_text()
    assert numbers["categories"]["cloth"]["image_auroc"]["value"] > 0.9
    assert numbers["test_data_fingerprint"] in page
    assert first.metrics["test_data_fingerprint"] not in page


# -- other data ----------------------------------------------------------------------------------


def test_category_inferred(run: Path, tree: Path, tmp_path: Path, evaluated: Any) -> None:
    """Judged as what it looks like: alarms then are those of `inspect` without a category."""
    evaluation = library.evaluate(run, [tree], out=tmp_path, infer_category=True)
    assert (
        "The category was inferred from each picture, rightly for 22 of 22."
        in (evaluation.metrics["protocol"])
    )
    assert evaluation.metrics["alarms"] == evaluated[0].metrics["alarms"]
    assert "The category of each picture was known." in evaluated[0].metrics["protocol"]


def test_category_inferred_wrongly(run: Path, tree: Path, tmp_path: Path) -> None:
    """Wood called cloth is judged by the thresholds of what it looks like."""
    data = tmp_path / "data"
    shutil.copytree(tree / "wood", data / "cloth")
    evaluation = library.evaluate(run, data, out=tmp_path, infer_category=True)
    assert any("rightly for 0 of 11" in s for s in evaluation.metrics["protocol"])
    inspections = list(library.Inspector(run).inspect(data / "cloth" / "test" / "good"))
    assert evaluation.metrics["alarms"]["cloth"]["false_alarms"] == sum(
        bool(inspection.is_anomalous) for inspection in inspections
    )


def test_missing_masks(run: Path, tree: Path, tmp_path: Path) -> None:
    """Without masks there are no pixel numbers, and the reason is said; the other category has
    them, and the mean is theirs."""
    data = shutil.copytree(tree, tmp_path / "data")
    shutil.rmtree(data / "wood" / "ground_truth")
    evaluation = library.evaluate(run, data, out=tmp_path)
    numbers = metrics_in(tmp_path)
    assert evaluation.content.categories[1].num_with_masks == 0
    wood = numbers["categories"]["wood"]["pixel_ap"]
    assert wood["value"] is None
    assert "no defective pixels" in wood["reason"]
    assert numbers["categories"]["wood"]["image_auroc"]["value"] > 0.9
    assert numbers["categories"]["cloth"]["pixel_ap"]["value"] > 0
    assert "pixel" in str(evaluation)


def test_good_pictures_only(run: Path, tree: Path, tmp_path: Path) -> None:
    """Nothing to rank, but false alarms can be counted."""
    data = shutil.copytree(tree / "wood", tmp_path / "data" / "wood")
    shutil.rmtree(data / "test" / "hole")
    library.evaluate(run, data, out=tmp_path)
    numbers = metrics_in(tmp_path)
    assert numbers["categories"]["wood"]["image_auroc"] == {
        "value": None,
        "bound": None,
        "reason": "no defective images",
    }
    assert numbers["alarms"]["wood"]["good"] == 6


def test_uncalibrated_run(tree: Path, tmp_path: Path) -> None:
    run = library.fit(
        tree,
        out=tmp_path / "run",
        encoder="test_efficientnet",
        weights="random",
        image_size=32,
        calibration_share=0,
    )
    library.evaluate(run, tree)
    numbers = metrics_in(run)
    assert numbers["alarms"] == {"cloth": None, "wood": None, "pooled": None}
    assert "The run is not calibrated: no alarms, ranking metrics only." in numbers["protocol"]
    library.calibrate(run, tree, max_false_alarm=0.3)  # on the good test pictures
    said = library.evaluate(run, tree).metrics
    assert said["alarms"]["wood"]["good"] == 0
    assert any(
        sentence.startswith("12 test pictures were left out: the run was fitted or calibrated")
        for sentence in said["protocol"]
    )


def test_categories_never_learned_are_not_judged(
    allgood: Command, tree: Path, tmp_path: Path
) -> None:
    """The very data that a run of one category was fitted on; the numbers are its own."""
    run = tmp_path / "run"
    assert allgood("fit", tree, "--categories", "wood", "--out", run, *TINY).code == 0
    alone = library.evaluate(run, tree / "wood").metrics
    answer = allgood("evaluate", run, tree)
    assert answer.code == 0
    assert "categories not judged, as the run has not learned them: cloth" in answer.err
    numbers = metrics_in(run)
    assert numbers["protocol"] == [
        *alone["protocol"],
        "Categories not judged, as the run has not learned them: cloth.",
    ]
    for part_of in ("categories", "mean", "pooled", "alarms"):
        assert numbers[part_of] == alone[part_of]
    assert "Categories not judged, as" in (run / "report.html").read_text()


def test_seen_pictures_are_left_out(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tree / "wood", tmp_path / "data" / "wood")
    for i in range(48):  # fitted on, or kept from fitting for the thresholds
        name = f"{i:03}.png"
        shutil.copy(data / "train" / "good" / name, data / "test" / "good" / f"copy {name}")
    evaluation = library.evaluate(run, data, out=tmp_path)
    assert evaluation.metrics["alarms"]["wood"]["good"] == 6
    assert any("48 test pictures were left out" in s for s in evaluation.metrics["protocol"])
    shutil.rmtree(data / "test" / "hole")
    for i in range(6):
        (data / "test" / "good" / f"{i:03}.png").unlink()
    said = allgood.refused("evaluate", run, data, "--out", tmp_path / "other")
    assert said == f"{data}: no test pictures; all 48 were seen in fitting or calibration"
    assert not (tmp_path / "other").exists()


def test_unreadable_pictures_are_counted(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tree, tmp_path / "data")
    torn = data / "wood" / "test" / "hole" / "002.png"
    torn.write_bytes(torn.read_bytes()[:500])
    answer = allgood("evaluate", run, data, "--out", tmp_path)
    assert answer.code == 0
    assert f"left out: {torn}" in answer.err
    numbers = metrics_in(tmp_path)
    assert [path for path, _ in numbers["unreadable"]] == [str(torn)]
    assert numbers["alarms"]["wood"]["defective"] == 4
    for path in data.rglob("test/*/*.png"):
        path.write_bytes(b"torn " + str(path).encode())
    assert allgood.refused("evaluate", run, data, "--out", tmp_path).startswith(
        "none of the 22 test pictures could be read; "
    )


def test_name_that_is_no_utf8(run: Path, tree: Path, tmp_path: Path) -> None:
    """It stands in both files, as far as each can carry it."""
    data = shutil.copytree(tree / "wood", tmp_path / "data" / "wood")
    torn = os.fsencode(data / "test" / "hole") + b"/caf\xe9.png"
    Path(os.fsdecode(torn)).write_bytes(b"torn")
    library.evaluate(run, data, out=tmp_path)
    ((path, _),) = metrics_in(tmp_path)["unreadable"]
    assert os.fsencode(path) == torn
    assert "caf?.png" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_says_how_to_reproduce(run: Path, tree: Path, evaluated: Any) -> None:
    """Shell commands, also where it all happened in Python."""
    evaluation, out = evaluated
    fit, evaluate = evaluation.content.commands
    assert fit == (f"allgood fit {tree} --out {run} --image-size 64 --settings coreset_ratio=0.1")
    assert evaluate == f"allgood evaluate {run} {tree} --out {out}"


def test_layout_without_a_split(tmp_path: Path) -> None:
    """Where disk does not say which pictures are for testing, the run's split says it, and no
    picture stands on both sides."""
    data = tmp_path / "wood"
    for i in range(40):
        save(part("wood", i), data / "good" / f"{i}.png")
    for i in range(4):
        save(part("wood", 100 + i, defective=True), data / "hole" / f"{i}.png")
    run = library.fit(
        data,
        out=tmp_path / "run",
        encoder="test_efficientnet",
        weights="random",
        image_size=32,
        train_share=0.6,
        seed=3,
    )
    config = json.loads((run / "config.json").read_text())["data"]
    numbers = library.evaluate(run, data).metrics
    assert not any("left out" in sentence for sentence in numbers["protocol"])
    tested = len(library.evaluate(run, data).content.categories[0].good_scores)
    assert config["fitted_pictures"] + config["held_out_pictures"] + tested == 40


def test_big_and_small_pictures_at_their_own_size(allgood: Command, tmp_path: Path) -> None:
    data = draw_tree(tmp_path / "data", ("wood",), train=4, good=2, bad=2)
    big = part("wood", 77, defective=True).resize((128, 144))
    save(big, data / "wood" / "test" / "hole" / "000.png")
    assert allgood("fit", data, "--out", tmp_path / "run", *TINY).code == 0
    assert allgood("evaluate", tmp_path / "run", data, "--pixel-size", 0).code == 0
    assert metrics_in(tmp_path / "run")["categories"]["wood"]["aupro"]["value"] is not None


@pytest.mark.parametrize("image_size", [None, 48])
def test_anomalies_drawn_into_seen_pictures_are_left_out(
    allgood: Command, tmp_path: Path, image_size: int | None
) -> None:
    """What lies in OUT are new files, but of pictures that the run has learned."""
    data = tmp_path / "wood"
    for i in range(16):
        save(part("wood", i), data / f"{i}.png")
    out = library.synthesize([data], out=tmp_path / "s", count=2, image_size=image_size)
    drawn = len(list(out.glob("wood/test/synthetic/*")))
    assert allgood("fit", data, "--out", tmp_path / "late", *TINY).code == 0
    said = allgood.refused("evaluate", tmp_path / "late", out)
    assert said == (
        f"{out}: no test pictures; all {drawn + drawn // 2} were seen in fitting or calibration, "
        "or drawn into pictures that were: synthesize first, then fit on its output"
    )
    assert "no test pictures" in allgood.refused("evaluate", tmp_path / "late", out / "wood")
    assert allgood("fit", out, "--out", tmp_path / "run", *TINY).code == 0
    assert allgood("evaluate", tmp_path / "run", out).code == 0
    assert not any("left out" in line for line in metrics_in(tmp_path / "run")["protocol"])


def test_a_damaged_record_of_a_synthesis(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tree, tmp_path / "recorded")
    (data / "synthesis.json").write_text("[]")
    said = allgood.refused("evaluate", run, data)
    assert said.startswith(f"{data / 'synthesis.json'}: is no record of allgood synthesize; copy")
