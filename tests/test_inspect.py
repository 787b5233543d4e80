"""`allgood inspect` and `allgood.Inspector`: judgements, boxes, overlays, bad pictures."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_trees import save
from doors import DEFECT, SIZE, TINY, Command, content, draw_tree, part
from PIL import Image

import allgood as library
from allgood.cli import _json_line
from allgood.inspection import Inspection, Region, find_regions
from allgood.runs import WEIGHTS, read_weights, write_weights

pytest_plugins = ["doors_fixtures"]

FIELDS = [
    "path",
    "category",
    "category_inferred",
    "image_score",
    "p_value",
    "is_anomalous",
    "regions",
]


@pytest.fixture(scope="module")
def inspector(run: Path) -> library.Inspector:
    return library.Inspector(run)


def overlap(box: list[int], truth: tuple[int, int, int, int] = DEFECT) -> float:
    """Intersection over the truth's area."""
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    area = (truth[2] - truth[0]) * (truth[3] - truth[1])
    return max(0, width) * max(0, height) / area


def test_one_line_per_picture(allgood: Command, run: Path, tree: Path) -> None:
    test = tree / "wood" / "test"
    answer = allgood("inspect", run, test / "good", test / "hole" / "000.png")
    assert answer.code == 0
    assert [list(record) for record in answer.records] == [FIELDS] * 7
    assert [record["path"] for record in answer.records] == [
        *(str(path) for path in sorted((test / "good").iterdir())),
        str(test / "hole" / "000.png"),
    ]
    *good, bad = answer.records
    assert sum(record["is_anomalous"] for record in good) <= 1
    assert bad["is_anomalous"] is True
    assert bad["p_value"] == 1 / 20  # of 19 calibration pictures none looks as bad
    assert all(record["category"] == "wood" for record in answer.records)
    assert all(record["category_inferred"] is True for record in answer.records)
    assert all((record["regions"] != []) == record["is_anomalous"] for record in answer.records)
    best = bad["regions"][0]
    assert list(best) == ["box", "score"]
    assert overlap(best["box"]) > 0.5
    assert all(isinstance(number, int) for number in best["box"])


def test_category_given(allgood: Command, run: Path, tree: Path) -> None:
    picture = tree / "cloth" / "test" / "hole" / "000.png"
    (record,) = allgood("inspect", run, picture, "--category", "cloth").records
    assert (record["category"], record["category_inferred"]) == ("cloth", False)
    assert record["is_anomalous"] is True


def test_every_planted_defect_is_found(inspector: library.Inspector, tree: Path) -> None:
    for category in ("wood", "cloth"):
        for inspection in inspector.inspect(tree / category / "test" / "hole"):
            assert inspection.category == category
            assert inspection.is_anomalous
            assert overlap(list(inspection.regions[0].box)) > 0.5


def test_python_gives_what_the_command_prints(
    allgood: Command, inspector: library.Inspector, run: Path, tree: Path
) -> None:
    folder = tree / "cloth" / "test"
    printed = allgood("inspect", run, folder, "--batch-size", 3).records
    assert [inspection.to_json() for inspection in inspector.inspect([folder], batch_size=3)] == (
        printed
    )


def test_bad_pictures_cost_only_themselves(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "Prüf stand" / "tief drin"
    good = tree / "wood" / "test" / "good" / "000.png"
    for name in ("a b.png", "größe.png", "zz.png"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(good, folder / name)
    (folder / "leer.png").touch()
    (folder / "torn.png").write_bytes(good.read_bytes()[:600])
    (folder / "words.jpg").write_text("not a picture")
    gone = tmp_path / "gone.png"
    answer = allgood("inspect", run, tmp_path, gone)
    assert answer.code == 0
    *judged, first, second, third, missing = answer.records
    assert [Path(record["path"]).name for record in judged] == ["a b.png", "größe.png", "zz.png"]
    assert len({record["image_score"] for record in judged}) == 1
    assert "größe" in answer.out  # letters as they are
    for record, name in [(first, "leer.png"), (second, "torn.png"), (third, "words.jpg")]:
        assert list(record) == ["path", "error"]
        assert record["path"] == str(folder / name)
        assert name in record["error"]
    assert missing == {"path": str(gone), "error": f"{gone}: no such file; check the path"}


def test_name_that_is_no_utf8(allgood: Command, run: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    save(part("wood", 7), tmp_path / "x.png")
    os.rename(tmp_path / "x.png", path)
    (record,) = allgood("inspect", run, tmp_path, "--overlays", tmp_path / "heat").records
    assert os.fsencode(record["path"]) == path
    assert len(list((tmp_path / "heat").iterdir())) == 1


@pytest.mark.parametrize("size", [(72, 64), (30, 200), (200, 31), (1, 1), (500, 480), (7, 9)])
def test_boxes_and_maps_of_any_size(
    inspector: library.Inspector, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Maps have the picture's size, boxes lie inside it and are not empty."""
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = save(Image.fromarray(noise), tmp_path / "noise.png")
    (inspection,) = inspector.inspect(picture)
    assert inspection.error is None
    assert inspection.anomaly_map().shape == size
    assert inspection.is_anomalous
    assert inspection.regions
    for region in inspection.regions:
        left, top, right, bottom = region.box
        assert 0 <= left < right <= size[1]
        assert 0 <= top < bottom <= size[0]


def test_exif_turned_picture_is_judged_upright(
    inspector: library.Inspector, tmp_path: Path
) -> None:
    """Stored turned by 90 degrees, with the tag that says so: same verdict, boxes as displayed."""
    upright = part("wood", 2000, defective=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    turned = save(upright.transpose(Image.Transpose.ROTATE_90), tmp_path / "t.png", exif=exif)
    straight = save(upright, tmp_path / "s.png")
    one, two = inspector.inspect([turned, straight])
    assert one.image_score == pytest.approx(two.image_score, rel=1e-5)
    assert one.original_size == two.original_size == SIZE
    assert [region.box for region in one.regions] == [region.box for region in two.regions]


def test_mixed_sizes_in_one_call(inspector: library.Inspector, tmp_path: Path) -> None:
    """Pictures of several sizes get the scores that each gets alone."""
    paths = [
        save(part("wood", 3).resize(size), tmp_path / f"{i}.png")
        for i, size in enumerate([(64, 72), (128, 100), (64, 72), (50, 50)])
    ]
    together = [inspection.image_score for inspection in inspector.inspect(paths)]
    alone = [next(inspector.inspect(path)).image_score for path in paths]
    assert together == pytest.approx(alone, rel=1e-4)


# -- overlays ------------------------------------------------------------------------------------


def overlays_of(allgood: Command, run: Path, out: Path, *pictures: Path) -> list[str]:
    assert allgood("inspect", run, *pictures, "--overlays", out).code == 0
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_overlays_have_the_size_of_the_picture(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    test = tree / "wood" / "test"
    wide = save(part("wood", 1).resize((200, 90)), tmp_path / "in" / "wide.jpg")
    pictures = [test / "good" / "000.png", test / "hole" / "001.png", wide]
    overlays_of(allgood, run, tmp_path / "heat", *pictures)
    change = []
    for path in pictures:
        (painted,) = (tmp_path / "heat").rglob(f"{path.stem}.png")
        with Image.open(painted) as heat, Image.open(path) as original:
            assert heat.format == "PNG"
            assert heat.size == original.size
            left, top, right, bottom = DEFECT
            difference = np.asarray(heat).astype(int) - np.asarray(original)
            change.append(np.abs(difference[top:bottom, left:right]).mean())
    assert change[1] > 3 * change[0]  # the hole glows, good wood hardly does


def test_overlay_over_a_smaller_copy(inspector: library.Inspector) -> None:
    """Boxes are those of the picture, in the copy's pixels."""
    inspection = Inspection(
        path=Path("a.png"),
        category="wood",
        regions=(Region((10, 20, 30, 41), 1.0),),
        input_map=torch.zeros(64, 64),
        original_size=(144, 128),
        transform=inspector.transform,
    )
    painted = inspection.overlay(np.full((72, 64, 3), 100, np.uint8))
    rows, columns = np.nonzero((painted == (0x00, 0xE5, 0xFF)).all(axis=2))
    # (5, 10, 15, 21) with one pixel around it
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (4, 9, 15, 21)


def test_overlay_names_do_not_clash(allgood: Command, run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "in"
    for name in ("a.png", "a.jpg", "b/a.png", "c/a.png"):
        save(part("wood", 1), pictures / name)
    assert overlays_of(allgood, run, tmp_path / "heat", pictures) == [
        "a.jpg.png",
        "a.png.png",
        "b/a.png.png",
        "c/a.png.png",
    ]


def test_overlays_stay_in_their_folder(
    allgood: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`..` in a picture's path once led the overlay out of the folder, onto the picture itself."""
    for name in ("p/a.png", "w/q/b.png"):
        save(part("wood", 1), tmp_path / name)
    monkeypatch.chdir(tmp_path / "w")
    assert overlays_of(allgood, run, Path("heat"), Path("../p/a.png"), Path("q/b.png")) == [
        "p/a.png",
        "w/q/b.png",
    ]


def test_overlays_never_replace_a_picture(allgood: Command, run: Path, tmp_path: Path) -> None:
    picture = save(part("wood", 1), tmp_path / "a.png")
    before = picture.read_bytes()
    said = allgood.refused("inspect", run, tmp_path, "--overlays", tmp_path)
    assert said.startswith(f"the heat map would replace the picture {picture}")
    assert picture.read_bytes() == before


def test_overlays_into_a_file(allgood: Command, run: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "heat").write_text("")
    picture = tree / "wood" / "test" / "good" / "000.png"
    said = allgood.refused("inspect", run, picture, "--overlays", tmp_path / "heat")
    assert said == f"'{tmp_path / 'heat'}' is a file: name a folder with --overlays"


# -- ignored regions -----------------------------------------------------------------------------


def ignore_mask(path: Path, *, scale: int = 1) -> Path:
    """White where the planted defect is, with some pixels around it."""
    pixels = np.zeros((SIZE[0], SIZE[1]), np.uint8)
    left, top, right, bottom = DEFECT
    pixels[top - 12 : bottom + 12, left - 16 : right + 6] = 255
    mask = Image.fromarray(pixels).resize((scale * SIZE[1], scale * SIZE[0]), Image.Resampling.BOX)
    return save(mask, path)


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_no_alarm_where_nobody_should_look(
    allgood: Command, tree: Path, tmp_path: Path, layout: str
) -> None:
    """The mask, of another size than the pictures, travels with the run."""
    if layout == "file":
        ignore, masked = ignore_mask(tmp_path / "ignore.png", scale=2), {"wood", "cloth"}
    else:
        ignore, masked = ignore_mask(tmp_path / "ignore" / "wood.png").parent, {"wood"}
    out = tmp_path / "run"
    options = ["--image-size", 64, "--ignore", ignore, "--settings", "coreset_ratio=0.1"]
    assert allgood("fit", tree, "--out", out, *options).code == 0
    shutil.rmtree(ignore, ignore_errors=True)
    inspector = library.Inspector(out)
    left, top, right, bottom = DEFECT
    for category in ("wood", "cloth"):
        twins = [  # the defective pictures of the tree, without their defects
            save(part(category, 2000 + i), tmp_path / category / f"{i}.png") for i in range(5)
        ]
        for given in (None, category):
            good = list(inspector.inspect(twins, category=given))
            bad = list(inspector.inspect(tree / category / "test" / "hole", category=given))
            assert [inspection.category for inspection in bad] == [category] * 5
            if category not in masked:
                assert all(inspection.is_anomalous for inspection in bad)
                continue
            for one, other in zip(good, bad, strict=True):
                assert one.image_score == pytest.approx(other.image_score, rel=1e-4)
                assert one.is_anomalous == other.is_anomalous
                assert (other.anomaly_map()[top:bottom, left:right] == 0).all()


def test_defect_beside_the_ignored_region_is_found(
    allgood: Command, tree: Path, tmp_path: Path
) -> None:
    ignore, out = ignore_mask(tmp_path / "ignore.png"), tmp_path / "run"
    options = ["--image-size", 64, "--ignore", ignore, "--settings", "coreset_ratio=0.1"]
    assert allgood("fit", tree / "wood", "--out", out, *options).code == 0
    pixels = np.asarray(part("wood", 9)).copy()
    pixels[50:66, 4:20] = [25, 20, 30]
    other = save(Image.fromarray(pixels), tmp_path / "other.png")
    (record,) = allgood("inspect", out, other).records
    assert record["is_anomalous"]
    assert overlap(record["regions"][0]["box"], (4, 50, 20, 66)) > 0.5


# -- geometry of the input -----------------------------------------------------------------------


def test_tiles_and_kept_aspect(allgood: Command, tree: Path, tmp_path: Path) -> None:
    """Large inputs in tiles, aspect kept: the defect is where it is, in the picture's pixels."""
    out = tmp_path / "run"
    options = ["--image-size", 128, "--tile", 96, "--keep-aspect", "True"]
    assert allgood("fit", tree / "wood", "--out", out, *options).code == 0
    config = json.loads((out / "config.json").read_text())
    assert config["tile"] == 96
    assert config["transform"]["keep_aspect"] is True
    inspector = library.Inspector(out)
    (inspection,) = inspector.inspect(tree / "wood" / "test" / "hole" / "000.png")
    assert inspection.input_map is not None
    assert inspection.input_map.shape == (128, 128)  # 144 cut to a multiple of 32
    assert inspection.is_anomalous
    assert overlap(list(inspection.regions[0].box)) > 0.5


def test_wide_picture_keeps_its_aspect(allgood: Command, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert allgood("fit", tree / "wood", "--out", out, *TINY, "--keep-aspect", "True").code == 0
    wide = save(part("wood", 5).resize((160, 64)), tmp_path / "wide.png")
    (inspection,) = library.Inspector(out).inspect(wide)
    assert inspection.input_map is not None
    assert inspection.input_map.shape == (32, 64)  # 80 cut to a multiple of 32
    assert inspection.anomaly_map().shape == (64, 160)


# -- before calibration, and the records ---------------------------------------------------------


def test_before_calibration_there_is_no_verdict(allgood: Command, tmp_path: Path) -> None:
    draw_tree(tmp_path / "data", ("wood",), train=4, good=1, bad=1)
    out = tmp_path / "run"
    answer = allgood("fit", tmp_path / "data", "--out", out, *TINY)
    assert answer.code == 0
    assert "'wood' stays uncalibrated" in answer.err
    assert f"`allgood calibrate {out} GOOD`" in answer.err
    picture = tmp_path / "data" / "wood" / "test" / "hole" / "000.png"
    (record,) = allgood("inspect", out, picture, "--overlays", tmp_path / "heat").records
    assert record["p_value"] is None
    assert record["is_anomalous"] is None
    assert record["regions"] == []
    assert record["image_score"] > 0
    assert record["category_inferred"] is False  # there is but one
    assert (tmp_path / "heat" / "000.png").is_file()


def test_scores_that_are_no_numbers_are_refused(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    """Wherever they would be used: as a verdict, in a metric, as a threshold."""
    broken = shutil.copytree(run, tmp_path / "run")
    weights = read_weights(broken / WEIGHTS)
    weights["bank.patches"] = weights["bank.patches"] * torch.nan
    write_weights(broken / WEIGHTS, weights)
    before = content(broken)
    good = tree / "wood" / "test" / "good"
    for command, pictures in [
        ("inspect", [good]),
        ("evaluate", [tree / "wood"]),
        ("calibrate", [good, "--category", "wood", "--max-false-alarm", 0.3]),
    ]:
        said = allgood.refused(command, broken, *pictures)
        assert said.startswith(f"run '{broken}' gives picture {tree / 'wood' / 'test'}")
        assert said.endswith(
            "a score that is not a finite number: its weights are damaged, fit it again"
        )
    assert content(broken) == before
    with pytest.raises(ValueError, match="not JSON compliant"):
        _json_line({"image_score": float("nan")})


def test_no_map_of_an_unreadable_picture() -> None:
    with pytest.raises(ValueError, match="has no anomaly map: torn"):
        Inspection(path=Path("a.png"), error="torn").anomaly_map()


def test_a_region_even_if_no_pixel_is_above_the_map_threshold(
    inspector: library.Inspector,
) -> None:
    """The peak is shown; of a flat map, all of it."""
    values = torch.zeros(64, 64)
    values[10:14, 20:24] = 1
    (region,) = find_regions(values, 5.0, inspector.transform, (64, 64))
    assert region.box == (20, 10, 24, 14)
    assert region.score == 1
    (region,) = find_regions(torch.zeros(64, 64), 5.0, inspector.transform, (64, 64))
    assert region.box == (0, 0, 64, 64)


def test_regions_are_separate_and_the_highest_comes_first(inspector: library.Inspector) -> None:
    values = torch.zeros(64, 64)
    values[2:4, 2:4] = 2
    values[30:40, 30:50] = 3
    first, second = find_regions(values, 1.0, inspector.transform, (128, 64))
    assert (first.box, first.score) == ((30, 60, 50, 80), 3)
    assert (second.box, second.score) == ((2, 4, 4, 8), 2)
