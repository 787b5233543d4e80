"""Layouts, their detection, the split of data without one, and the texts of errors."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import data_trees
import pytest
from data_trees import junk, picture, save, spot

from allgood.data.fingerprint import content_digest, fingerprint
from allgood.data.layouts import (
    read_elpv,
    read_good_and_bad,
    read_good_folder,
    read_mtd,
    read_mvtec,
)
from allgood.data.readers import LAYOUTS, detect_layout, read_data
from allgood.data.splits import good_split, in_holdout
from allgood.types import InputError, Sample


def kinds(samples: list[Sample] | tuple[Sample, ...]) -> Counter:
    return Counter((s.category, s.split, s.defect) for s in samples)


# -- mvtec ---------------------------------------------------------------------------------------


def test_mvtec_one_category(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path)
    assert detect_layout(root) == "mvtec"
    data = read_data([root])
    assert kinds(data.samples) == {
        ("bottle", "train", "good"): 3,
        ("bottle", "test", "good"): 2,
        ("bottle", "test", "crack"): 3,
    }
    masks = {s.id: [p.name for p in s.mask_paths] for s in data.samples if not s.is_good}
    assert masks == {
        "test/crack/000.png": ["000_mask.png"],
        "test/crack/001.png": ["001.bmp"],
        "test/crack/002.png": [],
    }
    assert [s.id for s in data.samples] == sorted(s.id for s in data.samples)
    assert "train/good/000.PNG" in {s.id for s in data.train}
    assert (len(data.train), len(data.test), data.untrained) == (3, 5, ())


def test_mvtec_several_categories_with_substring_names(tmp_path: Path) -> None:
    for category in ("capsule", "capsules", "größe 5"):
        data_trees.mvtec(tmp_path, category)
    (tmp_path / "license.txt").touch()
    (tmp_path / "empty").mkdir()
    data = read_data([tmp_path])
    assert data.categories == ("capsule", "capsules", "größe 5")
    assert set(Counter(s.category for s in data.samples).values()) == {8}
    assert data.samples[0].id == "capsule/test/crack/000.png"
    assert all(s.category == Path(s.id).parts[0] for s in data.samples)


@pytest.mark.parametrize("good, bad", [("ok", "ko"), ("OK", "NG"), ("Normal", "1"), ("pass", "x")])
def test_mvtec_with_other_names(tmp_path: Path, good: str, bad: str) -> None:
    root = data_trees.mvtec(tmp_path, "01", good=good, bad=bad)
    (root / "ground_truth").rename(root / "GT")
    found = kinds(read_data([root]).samples)
    assert found[("01", "test", "good")] == 2 and found[("01", "test", bad)] == 3
    assert sum(bool(s.mask_paths) for s in read_mvtec(root)) == 2


def test_mvtec_several_masks_per_picture(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path)
    save(picture(), root / "test" / "logical" / "000.png")
    for i in range(2):
        save(spot(), root / "ground_truth" / "logical" / "000" / f"{i:03}.png")
    (sample,) = [s for s in read_mvtec(root) if s.defect == "logical"]
    assert [p.name for p in sample.mask_paths] == ["000.png", "001.png"]


def test_mvtec_pictures_in_sub_folders(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path)
    for domain in ("same", "view"):
        save(picture(), root / "train" / "good" / domain / "000.png")
        save(picture(), root / "test" / "groove" / domain / "000.png")
    save(spot(), root / "ground_truth" / "groove" / "view" / "000.png")
    found = {s.id: s for s in read_mvtec(root)}
    assert found["test/groove/view/000.png"].mask_paths[0].parent.name == "view"
    assert found["test/groove/same/000.png"].mask_paths == ()
    assert "train/good/same/000.png" in found


def test_mvtec_without_test(tmp_path: Path) -> None:
    save(picture(), tmp_path / "part" / "train" / "good" / "0.png")
    assert kinds(read_data([tmp_path / "part"]).samples) == {("part", "train", "good"): 1}


def test_mvtec_refuses_what_it_would_misread(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path)
    save(picture(), tmp_path / "cable" / "test" / "cut" / "000.png")
    with pytest.raises(InputError, match=r"cable: holds pictures but no train/good, unlike 'bot"):
        read_data([tmp_path])
    save(picture(), root / "train" / "crack" / "000.png")
    with pytest.raises(InputError, match=r"train: holds 'crack' beside 'good'.*move defective"):
        read_data([root])
    shutil.rmtree(root / "train" / "crack")
    save(picture(), root / "test" / "000.png")
    with pytest.raises(InputError, match=r"test: holds '000.png' \(1 in all\) beside"):
        read_data([root])
    os.remove(root / "test" / "000.png")
    save(picture(), root / "test" / "normal" / "000.png")
    with pytest.raises(InputError, match=r"'good', 'normal' all mean good; keep one"):
        read_data([root])


@pytest.mark.parametrize("kind", ["good", "crack"])
def test_masks_beside_their_pictures_are_refused(tmp_path: Path, kind: str) -> None:
    root = data_trees.mvtec(tmp_path)
    save(picture(), root / "test" / kind / "7.jpg")
    save(spot(), root / "test" / kind / "7_mask.png")
    with pytest.raises(InputError, match=r"7_mask\.png: looks like the mask of '7' beside it"):
        read_data([root])


def test_a_folder_that_cannot_be_listed_stops_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passed over, its pictures would be missing without a word."""
    root = data_trees.mvtec(tmp_path)
    save(picture(), root / "train" / "good" / "monday" / "0.png")
    scandir = os.scandir

    def forbidding(path: str | Path) -> Iterator[os.DirEntry]:
        if Path(path).name == "monday":  # root, as which tests may run, may list everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(InputError, match=r"monday: cannot be listed \(Permission denied\); check"):
        read_data([root])


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path / "real")
    (root / "train" / "good" / "again").symlink_to(root / "train" / "good")
    (tmp_path / "linked").symlink_to(root)
    assert len(read_mvtec(tmp_path / "linked")) == 8
    assert {s.category for s in read_mvtec(tmp_path / "linked")} == {"linked"}


# -- good and bad, good only ---------------------------------------------------------------------


def test_good_and_bad(tmp_path: Path) -> None:
    root = data_trees.good_and_bad(tmp_path / "seal")
    assert detect_layout(root) == "good_and_bad"
    data = read_data([root], train_share=0.75, seed=3)
    held = [f"OK/g{i:02}.png" for i in range(20) if in_holdout(f"OK/g{i:02}.png", 0.25, 3)]
    assert [s.id for s in data.test if s.is_good] == held and 0 < len(held) < 20
    bad = {s.id: s for s in data.test if not s.is_good}
    assert set(bad) == {"Kratzer groß/a b.png", "dent/c.tif"}
    assert bad["Kratzer groß/a b.png"].mask_paths == (root / "masks" / "a b_label.png",)
    assert bad["dent/c.tif"].mask_paths == ()


def test_good_and_bad_of_several_products(tmp_path: Path) -> None:
    for product in ("a", "b"):
        data_trees.good_and_bad(tmp_path / product, good="pass")
    save(picture(), tmp_path / "only_good" / "ok" / "0.png")
    assert read_data([tmp_path]).categories == ("a", "b", "only_good")
    save(picture(), tmp_path / "c" / "0.png")
    with pytest.raises(InputError, match=r"c: holds pictures but no good"):
        read_data([tmp_path])


def test_products_with_good_pictures_only(tmp_path: Path) -> None:
    for product in ("bottle", "cable"):
        for i in range(3):
            save(picture(i), tmp_path / product / "good" / f"{i}.png")
    data = read_data([tmp_path])
    assert data.layouts == {str(tmp_path): "good_and_bad"}
    assert data.categories == ("bottle", "cable")
    assert len(data.samples) == 6 and all(s.is_good for s in data.samples)


@pytest.mark.parametrize("name", ["label", "masks", "ground_truth"])
@pytest.mark.parametrize("product", ["", "bottle"])
def test_masks_of_no_defect_are_refused(tmp_path: Path, name: str, product: str) -> None:
    """Whether they are masks or defective parts, good they are not."""
    save(picture(), tmp_path / product / "good" / "000.png")
    save(spot(), tmp_path / product / name / "000.png")
    with pytest.raises(InputError, match=rf"{name}: its name says masks, but no folder beside it"):
        read_data([tmp_path])


def test_a_defect_called_label(tmp_path: Path) -> None:
    root = tmp_path / "bottle"
    for name in ("good/0.png", "scratch/1.png", "label/2.png"):
        save(picture(), root / name)
    found = {s.id: s.defect for s in read_data([root]).samples}
    assert found == {"good/0.png": "good", "scratch/1.png": "scratch", "label/2.png": "label"}
    (root / "label" / "2.png").rename(root / "label" / "1.png")
    masks = {s.id: s.mask_paths for s in read_data([root]).samples}
    assert masks == {"good/0.png": (), "scratch/1.png": (root / "label" / "1.png",)}


def test_one_flat_mask_for_two_pictures(tmp_path: Path) -> None:
    root = data_trees.good_and_bad(tmp_path / "seal")
    save(picture(), root / "dent" / "a b.png")
    with pytest.raises(InputError, match=r"one sub-folder per defect"):
        read_data([root])


def test_good_only(tmp_path: Path) -> None:
    root = tmp_path / "lid"
    for name in ("monday/0.png", "tuesday/0.webp"):
        save(picture(), root / name)
    junk(root / "monday")
    assert detect_layout(root) == "good_folder"
    assert kinds(read_data([root]).samples) == {("lid", "train", "good"): 2}
    split = read_good_folder(root, categories_from_folders=True)
    assert [s.category for s in split] == ["monday", "tuesday"]
    save(picture(), root / "0.png")
    with pytest.raises(InputError, match=r"holds '0.png'"):
        read_good_folder(root, categories_from_folders=True)
    assert len(read_data([root], layout="good_folder").train) == 3


@pytest.mark.parametrize("names", [("2026-01", "2026-02"), ("shift_a", "tests"), ("ok_1", "ok_2")])
def test_sub_folders_of_good_parts(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        save(picture(), tmp_path / "lid" / name / "0.png")
    assert detect_layout(tmp_path / "lid") == "good_folder"


@pytest.mark.parametrize(
    "files, text",
    [
        (["0.png", "day/1.png"], r"1 pictures beside folders with pictures \('day'\).*--layout"),
        (["scratch/0.png", "Defective/1.png"], r"'Defective' would be taken for good"),
        (["train/x/0.png", "test/y/0.png"], r"'test', 'train' would be taken for good"),
        (["good_images/0.png", "bad_images/1.png"], r": 'bad_images' would be taken for good"),
        (["OK_parts/0.png", "NG_parts/1.png"], r": 'NG_parts' would be taken for good"),
        (["0_ok/0.png", "1_not_ok/1.png"], r": '1_not_ok' would be taken for good"),
        (["GoodParts/0.png", "BadParts/1.png"], r": 'BadParts' would be taken for good"),
        (["good-1/0.png", "good-2/1.png", "scratch/2.png"], r": 'scratch' would be taken for good"),
        (["nut/ok_1/0.png", "nut/ng_1/0.png"], r": 'nut/ng_1' would be taken for good"),
        (["images/0.png", "masks/0.png"], r": 'masks' would be taken for good"),
        (["good/0.png", "normal/1.png"], r"'good', 'normal' all mean good"),
        (["notes.txt"], r"holds no picture \(no folders\)"),
        (["split_csv/1cls.csv", "candle/x.png"], r"looks like VisA"),
        (["bagel/test/crack/rgb/0.png"], r"looks like MVTec 3D-AD"),
    ],
)
def test_ambiguous_folders_say_what_was_seen(tmp_path: Path, files: list[str], text: str) -> None:
    for name in files:
        if name.endswith(".png"):
            save(picture(), tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
    with pytest.raises(InputError, match=text):
        read_data([tmp_path])


# -- data sets with their own layout -------------------------------------------------------------


def test_goodsad(tmp_path: Path) -> None:
    root = data_trees.goodsad(tmp_path / "GoodsAD")
    assert detect_layout(root) == detect_layout(root / "drink_can") == "goodsad"
    data = read_data([root])
    assert kinds(data.samples) == {
        (category, split, defect): count
        for category in ("drink_can", "food_box")
        for (split, defect), count in {
            ("train", "good"): 3,
            ("test", "good"): 1,
            ("test", "surface_damage"): 2,
        }.items()
    }
    masks = {s.path.stem: [p.name for p in s.mask_paths] for s in data.test if not s.is_good}
    assert masks == {"001004": ["001004.png"], "058002": ["058002_mask.png"]}
    assert Counter(s.meta["product"] for s in data.train) == {"001": 4, "057": 2}
    assert all(s.group == "" for s in data.samples)


def test_goodsad_without_a_mask_and_what_only_looks_like_it(tmp_path: Path) -> None:
    root = data_trees.goodsad(tmp_path / "GoodsAD")
    (root / "food_box" / "ground_truth" / "surface_damage" / "001004.png").unlink()
    with pytest.raises(InputError, match=r"food_box.*001004\.jpg: has no mask of the same name"):
        read_data([root])
    assert len(read_data([root], layout="mvtec").samples) == 12
    data_trees.mvtec(tmp_path, "food_box")  # of somebody else: other names
    assert detect_layout(tmp_path / "food_box") == "mvtec"
    data_trees.mvtec(root, "bottle")
    assert detect_layout(root) == "mvtec"


@pytest.mark.parametrize("above", [False, True])
def test_aebad(tmp_path: Path, above: bool) -> None:
    folder = data_trees.aebad(tmp_path / "AeBAD")
    data_trees.mvtec(tmp_path / "AeBAD", "AeBAD_V")  # beside it, and not read
    root = folder.parent if above else folder
    assert detect_layout(root) == "aebad"
    data = read_data([root])
    assert data.categories == ("AeBAD_S",)
    assert (len(data.train), len(data.test)) == (6, 16)
    for domain in ("same", "background", "illumination", "view"):
        test = [s for s in data.test if s.meta["domain"] == domain]
        assert Counter(s.defect for s in test) == {"good": 2, "ablation": 1, "groove": 1}
        for sample in test:
            assert sample.path.parent.name == domain
            expected = [("ground_truth", sample.defect, domain, sample.path.name)]
            found = [path.relative_to(folder).parts for path in sample.mask_paths]
            assert found == ([] if sample.is_good else expected)
    assert {s.meta["domain"] for s in data.train} == {"background", "illumination", "view"}
    assert all((Path(root) / s.id) == s.path for s in data.samples)
    assert "    view: 2 good + 2 defective" in data.describe().splitlines()


def test_aebad_pictures_outside_the_domains(tmp_path: Path) -> None:
    folder = data_trees.aebad(tmp_path)
    save(picture(7), folder / "test" / "groove" / "deep" / "er" / "000.png")
    with pytest.raises(InputError, match="lies in no domain"):
        read_data([folder])
    with pytest.raises(InputError, match="name the folder AeBAD_S"):
        read_data([data_trees.mvtec(tmp_path)], layout="aebad")


def test_domains_beside_other_categories(tmp_path: Path) -> None:
    data = read_data([data_trees.aebad(tmp_path), data_trees.goodsad(tmp_path / "goods")])
    assert data.categories == ("AeBAD_S", "drink_can", "food_box")
    assert {s.category for s in data.samples if "domain" in s.meta} == {"AeBAD_S"}


def test_mtd(tmp_path: Path) -> None:
    root = data_trees.mtd(tmp_path / "tile")
    assert detect_layout(root) == "mtd"
    samples = read_mtd(root)
    found = Counter(s.defect for s in samples)
    assert found == {"good": 10, "crack": 2, "uneven": 1}
    assert {s.category for s in samples} == {"tile"}
    assert all(s.path.suffix == ".jpg" for s in samples)
    assert all(s.mask_threshold == 128 and s.mask_paths for s in samples if not s.is_good)
    assert all(s.split == "test" for s in samples if not s.is_good)
    with pytest.raises(InputError, match="MT_Free"):
        read_mtd(root / "MT_Crack")


def test_elpv_folder(tmp_path: Path) -> None:
    root = data_trees.elpv(tmp_path / "cells")
    assert detect_layout(root) == "elpv"
    samples = read_elpv(root)
    assert Counter(s.category for s in samples) == {"monocrystalline": 60, "polycrystalline": 30}
    assert Counter(s.defect for s in samples) == {"good": 45, "defective": 45}
    assert Counter(s.group for s in samples) == {"rows-00": 30, "rows-01": 30, "rows-02": 30}
    for group in {s.group for s in samples}:
        assert len({s.split for s in samples if s.group == group and s.is_good}) == 1
    (root / "labels.csv").write_text("images/cell0000.png 0.0 amorphous\n")
    with pytest.raises(InputError, match=r"labels\.csv: line 1 is not"):
        read_elpv(root)


def test_elpv_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'allgood\[demo\]'"):
        read_data(["elpv"])
    data_trees.elpv(tmp_path / "elpv")  # a folder of that name goes first
    assert len(read_data(["elpv"]).samples) == 90


def test_labels_csv_that_is_a_manifest(tmp_path: Path) -> None:
    for i in range(2):
        save(picture(i), tmp_path / "images" / f"{i}.png")
    (tmp_path / "labels.csv").write_text("image,label\nimages/0.png,0\nimages/1.png,1\n")
    with pytest.raises(InputError, match=r"holds labels\.csv, which.*name that file instead"):
        read_data([tmp_path])
    assert len(read_data([tmp_path / "labels.csv"]).samples) == 2
    assert len(read_data([tmp_path], layout="good_folder").samples) == 2


# -- many roots ----------------------------------------------------------------------------------


def test_roots_are_joined(tmp_path: Path) -> None:
    roots = [data_trees.mvtec(tmp_path), data_trees.good_and_bad(tmp_path / "seal")]
    data = read_data(roots)
    assert data.categories == ("bottle", "seal")
    assert list(data.layouts.values()) == ["mvtec", "good_and_bad"]
    assert read_data(roots[::-1]).samples == data.samples
    text = data.describe()
    assert f"{roots[0]}: layout mvtec" in text
    assert "bottle  train 3 good, test 2 good + 3 defective (2 with a mask)" in text


def test_the_same_category_twice(tmp_path: Path) -> None:
    first, second = data_trees.mvtec(tmp_path / "1"), data_trees.mvtec(tmp_path / "2")
    with pytest.raises(InputError) as caught:
        read_data([first, second])
    assert str(first) in str(caught.value) and str(second) in str(caught.value)
    assert "both hold the category 'bottle'; rename one folder" in str(caught.value)


def test_missing_and_unknown(tmp_path: Path) -> None:
    data_trees.mvtec(tmp_path)
    with pytest.raises(InputError, match=r"botle: no such file or folder; did you mean 'bottle'\?"):
        read_data([tmp_path / "botle"])
    with pytest.raises(InputError, match=r"no such file or folder; check the path"):
        read_data([tmp_path / "x" / "y"])
    with pytest.raises(
        InputError, match=r"unknown layout 'mvtek'; did you mean 'mvtec'\? known: m"
    ):
        read_data([tmp_path], layout="mvtek")
    with pytest.raises(InputError, match=r"no data given"):
        read_data([])
    with pytest.raises(InputError, match=r"neither a folder nor a manifest"):
        read_data([save(picture(), tmp_path / "x.png")])
    for name in LAYOUTS:
        with pytest.raises(InputError):  # never a bare exception for a forced wrong layout
            read_data([tmp_path / "bottle" / "ground_truth" / "none"], layout=name)
        (tmp_path / "void").mkdir(exist_ok=True)
        with pytest.raises(InputError):
            read_data([tmp_path / "void"], layout=name)


def test_the_root_may_be_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_trees.mvtec(tmp_path))
    assert read_data(["."]).categories == ("bottle",)
    assert read_data(".").samples[0].id == "test/crack/000.png"


# -- the split -----------------------------------------------------------------------------------


def test_holdout_is_the_written_rule() -> None:
    for id in ("a.png", "größe/b.png"):
        first = hashlib.sha256(f"7:{id}".encode()).digest()[:8]
        fraction = int.from_bytes(first, "big") / 2**64
        assert not in_holdout(id, fraction, 7) and in_holdout(id, fraction + 1e-9, 7)
    in_holdout("surrogate \udce9", 0.5, 0)  # a file name that is no UTF-8
    share = sum(in_holdout(str(i), 0.2, 0) for i in range(5000)) / 5000
    assert share == pytest.approx(0.2, abs=0.02)


def test_holdout_moves_no_file_when_files_are_added(tmp_path: Path) -> None:
    def held(num_good: int, seed: int = 0) -> set[str]:
        root = data_trees.good_and_bad(tmp_path / "seal", num_good=num_good)
        return {s.id for s in read_good_and_bad(root, seed=seed) if s.is_good and s.split == "test"}

    few = held(15)
    many = held(40)
    assert few == {id for id in many if id < "OK/g15.png"}
    assert held(40, seed=1) != many


def test_a_group_stays_together() -> None:
    sides = {good_split(str(i), "part 7", train_share=0.5, seed=0) for i in range(50)}
    assert len(sides) == 1
    for share in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="train_share"):
            good_split("x", "", train_share=share, seed=0)
    assert all(good_split(str(i), "", train_share=1, seed=0) == "train" for i in range(200))


# -- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path / "1")
    data = read_data([root])
    print_ = fingerprint(data.samples)
    assert len(print_) == 16 and int(print_, 16) >= 0
    assert fingerprint(reversed(data.samples)) == print_
    copy = shutil.copytree(root, tmp_path / "2" / "bottle")
    assert fingerprint(read_data([copy]).samples) == print_
    save(picture(99), copy / "train" / "good" / "000.PNG")
    assert fingerprint(read_data([copy]).samples) != print_
    (root / "train" / "good" / "000.PNG").unlink()  # gone after listing: still a fingerprint
    assert fingerprint(data.samples) != print_


def test_content_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = hashlib.blake2b(b"abc", digest_size=8).hexdigest()
    assert content_digest(tmp_path / "a") == expected
    with pytest.raises(InputError, match="cannot be read"):
        content_digest(tmp_path / "b")


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys, allgood.data.readers, allgood.data.images; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
