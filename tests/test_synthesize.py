"""`allgood synthesize`: a data set that every command reads, the same for the same seed, whole or
not there at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_trees import picture, save
from doors import SIZE, TINY, Command, content, draw_tree, part
from PIL import Image

from allgood.data.readers import read_data
from allgood.data.synthesis import Synthesizer
from allgood.synthesizing.synthesize import synthesize
from allgood.types import InputError

pytest_plugins = ["doors_fixtures"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tree(tmp_path_factory.mktemp("data"), train=6, good=3, bad=1)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_end_to_end(allgood: Command, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "synthetic"
    answer = allgood("synthesize", data, "--out", out, "--count", 2)
    assert answer.code == 0
    assert answer.out == f"{out}\n"
    assert "drew 12 anomalies; foreground: off; look at" in answer.err
    assert sorted(path.name for path in out.iterdir()) == [
        *("cloth", "contact_sheet.png", "synthesis.json", "wood")
    ]
    assert [path.name for path in out.parent.iterdir()] == ["synthetic"]  # nothing left beside it
    sheet = pixels(out / "contact_sheet.png")
    assert sheet.shape[1] > 1000 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100

    dataset = read_data(out)
    assert dataset.categories == ("cloth", "wood")
    assert len(dataset.train) == 12
    assert sum(sample.is_good for sample in dataset.test) == 6
    drawn = [sample for sample in dataset.test if not sample.is_good]
    assert len(drawn) == 12
    for sample in drawn:
        assert sample.defect == "synthetic" and len(sample.mask_paths) == 1
        mask, image = pixels(sample.mask_paths[0]), pixels(sample.path)
        name = sample.path.stem.rpartition("_")[0]
        good = pixels(out / sample.category / "test" / "good" / f"{name}.png")
        assert mask.shape == SIZE and set(np.unique(mask)) == {0, 255}
        assert np.array_equal(image[mask == 0], good[mask == 0])
        assert not np.array_equal(image[mask == 255], good[mask == 255])

    record = json.loads((out / "synthesis.json").read_text())
    assert record["command"] == f"allgood synthesize {data} --out {out} --count 2"
    assert record["foreground"] == {"cloth": "off", "wood": "off"}
    assert record["settings"]["clean_probability"] == 0
    assert len(record["pictures"]) == 12
    first = record["pictures"][0]
    assert (out / first["picture"]).is_file() and (out / first["mask"]).is_file()
    assert Path(first["from"]).is_file()


def test_other_commands_read_it(allgood: Command, data: Path, tmp_path: Path) -> None:
    out = synthesize([data], out=tmp_path / "s", categories=("wood",), count=2)
    assert allgood("fit", out, "--out", tmp_path / "run", *TINY).code == 0
    answer = allgood("evaluate", tmp_path / "run", out)
    assert answer.code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "pixel_auroc" in metrics["categories"]["wood"]


def test_clean_pictures_are_the_very_bytes(data: Path, tmp_path: Path) -> None:
    """So that an evaluation knows those that a run has learned from."""
    out = synthesize([data], out=tmp_path / "s")
    for part_of in ("train/good", "test/good"):
        assert content(out / "wood" / part_of) == content(data / "wood" / part_of)


def test_same_seed_same_files(data: Path, tmp_path: Path) -> None:
    one, two, other = (
        content(synthesize([data], out=tmp_path / name, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    drawn = [name for name in one if "/synthetic/" in name or name.endswith("sheet.png")]
    assert {name: one[name] for name in drawn} == {name: two[name] for name in drawn}
    assert all(one[name] != other[name] for name in drawn if "/test/" in name)


@pytest.mark.parametrize("total", [1, 4, 14])
def test_total(data: Path, tmp_path: Path, total: int) -> None:
    out = synthesize([data], out=tmp_path / "s", total=total)
    drawn = list(out.glob("*/test/synthetic/*.png"))
    assert len(drawn) == total == len(list(out.glob("*/ground_truth/synthetic/*.png")))
    sources = {(path.parts[-4], path.stem.rpartition("_")[0]) for path in drawn}
    assert len(sources) == min(total, 6)  # spread over all six pictures before any gets a second


def test_image_size(data: Path, tmp_path: Path) -> None:
    out = synthesize([data], out=tmp_path / "s", image_size=48)
    files = [path for path in out.rglob("*.png") if path.name != "contact_sheet.png"]
    assert {pixels(path).shape[:2] for path in files} == {(48, 48)}


def test_good_pictures_alone_are_parted(tmp_path: Path) -> None:
    """A folder of good pictures becomes a set to learn from and to test on; equal stems, formats
    that the readers know by content only, and a single picture are no obstacle."""
    for i in range(12):
        save(part("wood", i), tmp_path / "wood" / ("a" if i % 2 else "b") / f"{i // 2:03}.png")
    dataset = read_data(synthesize([tmp_path / "wood"], out=tmp_path / "s"))
    good = [sample for sample in dataset.samples if sample.is_good]
    drawn = len(dataset.samples) - len(good)
    assert len(good) == 12
    assert 0 < drawn == sum(sample.split == "test" for sample in good)
    save(part("wood", 0), tmp_path / "one" / "only.png")
    dataset = read_data(synthesize([tmp_path / "one"], out=tmp_path / "t"))
    assert not dataset.train and len(dataset.test) == 2


def test_foreground(allgood: Command, tmp_path: Path) -> None:
    row, column = np.mgrid[:64, :64]
    inside = (row - 32) ** 2 + (column - 32) ** 2 < 18**2
    for i in range(6):
        noise = np.random.default_rng(i).normal(0, 5, (64, 64, 1))
        grey = (np.where(inside, 190, 30)[..., None] + noise).clip(0, 255).astype(np.uint8)
        save(Image.fromarray(np.repeat(grey, 3, axis=2)), tmp_path / "d" / "nut" / f"{i}.png")
    data = tmp_path / "d" / "nut"

    def outside(*options: Any) -> int:
        out = tmp_path / f"s{len(list(tmp_path.iterdir()))}"
        answer = allgood("synthesize", data, "--out", out, "--count", 15, *options)
        assert answer.code == 0, answer
        masks = [pixels(path) > 0 for path in (out / "nut" / "ground_truth").rglob("*.png")]
        grown = (row - 32) ** 2 + (column - 32) ** 2 < 21**2
        return sum(int((mask & ~grown).sum()) for mask in masks)

    assert outside() == 0
    assert outside("--foreground", "off") > 0
    assert outside("--foreground-of", "nut=dark") > 0
    assert outside("--foreground", "dark", "--foreground-of", "nut=bright") == 0


def test_textures_and_settings(allgood: Command, data: Path, tmp_path: Path) -> None:
    save(picture(1), tmp_path / "textures" / "a.png")
    (tmp_path / "textures" / "torn.png").write_bytes(b"torn")
    weights = ("self_augment", "tile_shuffle", "scratch", "spot", "stain")
    out = tmp_path / "s"
    words = ["synthesize", data, "--out", out, "--textures", tmp_path / "textures", "--count", 4]
    answer = allgood(*words, "--settings", *(f"{name}=0" for name in weights))
    assert answer.code == 0
    pictures = json.loads((out / "synthesis.json").read_text())["pictures"]
    assert {entry["source"] for entry in pictures} <= {"texture", "fallback"}
    assert f"left out: {tmp_path / 'textures' / 'torn.png'}" in answer.err


def test_unreadable_pictures_are_listed(allgood: Command, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    torn = broken / "wood" / "test" / "good" / "001.png"
    torn.write_bytes(b"torn")
    (broken / "wood" / "train" / "good" / "002.png").write_bytes(b"")
    save(picture(size=(9, 9)), broken / "cloth" / "test" / "good" / "000.png")
    answer = allgood("synthesize", broken, "--out", tmp_path / "s")
    assert answer.code == 0
    lines = [line for line in answer.err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 3
    assert any(str(torn) in line for line in lines)
    assert any("9x9 pixels is too small for an anomaly" in line for line in lines)
    assert len(list((tmp_path / "s").glob("*/test/synthetic/*"))) == 4
    assert len(list((tmp_path / "s").glob("*/test/good/*"))) == 4


def test_nothing_readable(allgood: Command, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "broken")
    for path in broken.glob("*/*/good/*.png"):
        path.write_bytes(b"torn")
    said = allgood.refused("synthesize", broken, "--out", tmp_path / "s")
    assert said.startswith("no good test picture could be drawn on; the first: ")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_category_of_any_name_stays_in_the_folder(tmp_path: Path) -> None:
    rows = ["image,label,category"]
    for i in range(4):
        save(part("wood", i), tmp_path / f"{i}.png")
        rows.append(f"{i}.png,good,../up/x")
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    out = synthesize([tmp_path / "all.csv"], out=tmp_path / "in" / "s")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["s"]
    assert len(read_data(out).categories) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--count", 0], "count must be at least 1, got 0"),
        (["--total", 0], "total must be at least 1, got 0"),
        (["--image-size", -1], "image_size must be at least 1, got -1"),
        (["--image-size", 8], "no good test picture could be drawn on; the first: "),
        (["--seed", -1], "seed must be at least 0, got -1"),
        (["--textures", "gone"], "gone: no such folder of textures; check the path"),
        (["--foreground-of", "wod=dark"], "foreground 'wod=dark' names no category; did you mean"),
        (["--foreground-of", "wood=x"], "foreground of 'wood' must be off, dark or bright, got"),
        (["--settings", "scrach=0"], "unknown setting 'scrach'; did you mean 'scratch'? known: "),
        (["--settings", "operators=11"], "operators must lie between 1 and 10, got 11"),
        (["--categories", "steel"], "the data hold no category 'steel'; known: cloth, wood"),
        (["--layout", "mvtek"], "unknown layout 'mvtek'; did you mean 'mvtec'?"),
    ],
)
def test_refused(
    allgood: Command, data: Path, tmp_path: Path, options: list[Any], said: str
) -> None:
    assert allgood.refused("synthesize", data, "--out", tmp_path / "s", *options).startswith(said)
    assert not list(tmp_path.iterdir())


def test_no_data(allgood: Command, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert allgood.refused("synthesize", "--out", out) == "no data given; name a folder of pictures"
    said = allgood.refused("synthesize", tmp_path / "gone", "--out", out)
    assert said.startswith(f"{tmp_path / 'gone'}: no such file or folder")
    save(part("wood", 0, defective=True), tmp_path / "a.png")
    (tmp_path / "all.csv").write_text("image,label\na.png,defective\n")
    said = allgood.refused("synthesize", tmp_path / "all.csv", "--out", out)
    assert said == "the data hold no good pictures: anomalies are drawn into good ones"
    assert not out.exists()


def test_out_that_cannot_be(allgood: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "home" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("mine")
    for out, said in [
        (file.parent, f"folder '{file.parent}' is not empty: name another one with --out"),
        (file, f"'{file}' is a file: name a folder with --out"),
        (file / "s", f"folder '{file / 's'}' cannot be made: a part of its path is a file; "),
    ]:
        assert allgood.refused("synthesize", data, "--out", out).startswith(said)
    assert content(tmp_path) == {"home/thesis.txt": b"mine"}


def test_an_empty_folder_will_do(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    assert synthesize([data], out=out, total=1) == out
    assert (out / "synthesis.json").is_file()


def test_a_link_to_an_empty_folder_will_do(data: Path, tmp_path: Path) -> None:
    link, disk = tmp_path / "s", tmp_path / "disk" / "s"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    assert synthesize([data], out=link, total=1) == link
    assert link.is_symlink() and (disk / "synthesis.json").is_file()
    assert os.listdir(disk.parent) == ["s"]


def test_a_mount_point_is_refused_before_any_work(
    allgood: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    said = allgood.refused("synthesize", data, "--out", out)
    assert said.startswith(f"folder '{out}' is a mount point, which cannot be replaced")


def test_stopped_half_way_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    draw = Synthesizer.draw

    def fail(self: Synthesizer, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Synthesizer, "draw", fail)
    with pytest.raises(KeyboardInterrupt):
        synthesize([data], out=tmp_path / "s")
    assert not os.listdir(tmp_path)


def test_python_users_get_the_same_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        synthesize([data], out=tmp_path / "s", count=0)


def test_help(allgood: Command) -> None:
    answer = allgood("synthesize", "--help")
    assert "usage: allgood synthesize [-h] [OPTIONS] DATA ..." in answer.out
    text = " ".join(answer.out.split())
    for words in ("anomalies per good test picture", "of single categories, as CATEGORY=MODE"):
        assert words in text
