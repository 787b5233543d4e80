"""Manifests: every format and alias gives the same samples; what is wrong is named by its row."""

import csv
import json
from pathlib import Path

import pytest
from data_trees import picture, save, spot

from allgood.data.manifest import read_manifest
from allgood.data.readers import read_data
from allgood.types import InputError, Sample

ROWS = [
    {"image": "img/a.png", "label": "0", "split": "train", "class": "nut", "camera": "left"},
    {"image": "img/b.png", "label": "0", "split": "test", "class": "nut", "camera": "right"},
    {
        "image": "img/ü c.png",
        "label": "1",
        "split": "test",
        "class": "nut",
        "defect": "bent",
        "mask": "m/1.png|m/2.png",
        "mask_rule": ">= 128",
        "group": "part 3",
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "ü c.png"):
        save(picture(), tmp_path / "img" / name)
    for name in ("1.png", "2.png"):
        save(spot(), tmp_path / "m" / name)
    return tmp_path


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        delimiter = "\t" if path.suffix == ".tsv" else ","
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter=delimiter, restval="")
            writer.writeheader()
            writer.writerows(rows)
    return path


def core(samples: list[Sample]) -> list[tuple]:
    return [
        (s.id, s.category, s.split, s.defect, s.mask_paths, s.mask_threshold, s.group)
        for s in samples
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_every_format_says_the_same(folder: Path, suffix: str) -> None:
    samples = read_manifest(write(folder / f"list{suffix}", ROWS))
    masks = (folder / "m" / "1.png", folder / "m" / "2.png")
    assert core(samples) == [
        ("img/a.png", "nut", "train", "good", (), 1, ""),
        ("img/b.png", "nut", "test", "good", (), 1, ""),
        ("img/ü c.png", "nut", "test", "bent", masks, 128, "part 3"),
    ]
    assert samples[0].meta["camera"] == "left"
    assert read_data([folder / f"list{suffix}"]).layouts == {
        str(folder / f"list{suffix}"): "manifest"
    }


def test_excel_semicolons(folder: Path) -> None:
    path = folder / "list.csv"
    path.write_bytes(
        "\ufeffImage ; Label;Split\r\nimg/a.png; OK;train\r\nimg/b.png;ng;\r\n".encode()
    )
    assert [(s.defect, s.split) for s in read_manifest(path)] == [
        ("good", "train"),
        ("defective", "test"),
    ]


def test_uniad_aliases_and_windows_paths(folder: Path) -> None:
    rows = [
        {"filename": "img\\a.png", "label": 0, "label_name": "good", "clsname": "nut"},
        {
            "filename": "img\\b.png",
            "label": 1,
            "label_name": "bent",
            "clsname": "nut",
            "maskname": ["m/1.png", "m/2.png"],
        },
    ]
    first, second = read_manifest(write(folder / "list.jsonl", rows))
    assert first.is_good and first.id == "img/a.png"
    assert (second.defect, second.category, len(second.mask_paths)) == ("bent", "nut", 2)


def test_ader_meta_json(folder: Path) -> None:
    def entry(image: str, defect: str, mask: str) -> dict:
        bad = int(defect != "good")
        return {"img_path": image, "mask_path": mask, "specie_name": defect, "anomaly": bad}

    meta = {
        "train": {"nut": [entry("img/a.png", "good", "")]},
        "test": {"nut": [entry("img/b.png", "good", ""), entry("img/ü c.png", "bent", "m/1.png")]},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    assert [(s.category, s.split, s.defect) for s in read_manifest(folder / "meta.json")] == [
        ("nut", "train", "good"),
        ("nut", "test", "good"),
        ("nut", "test", "bent"),
    ]


def test_real_iad_lists_beside_the_category_folder(tmp_path: Path) -> None:
    def entry(image: str, code: str, mask: str | None) -> dict:
        return {"image_path": image, "anomaly_class": code, "mask_path": mask, "category": "toy"}

    for name in ("OK/S1/a.jpg", "OK/S2/b.jpg", "NG/BX/S3/c.jpg"):
        save(picture(), tmp_path / "toy" / name)
    save(spot(), tmp_path / "toy" / "NG/BX/S3/c_mask.png")
    content = {
        "meta": {"normal_class": "OK"},
        "train": [entry("OK/S1/a.jpg", "OK", None)],
        "test": [
            entry("OK/S2/b.jpg", "OK", None),
            entry("NG/BX/S3/c.jpg", "BX", "NG/BX/S3/c_mask.png"),
        ],
    }
    (tmp_path / "toy.json").write_text(json.dumps(content))
    samples = read_manifest(tmp_path / "toy.json")
    assert [(s.defect, s.split) for s in samples] == [
        ("good", "train"),
        ("good", "test"),
        ("BX", "test"),
    ]
    assert samples[2].mask_paths == (tmp_path / "toy" / "NG/BX/S3/c_mask.png",)
    elsewhere = write(tmp_path / "sub.json", [{"image": "OK/S1/a.jpg"}])
    assert read_manifest(elsewhere, base=tmp_path / "toy")[0].id == "OK/S1/a.jpg"


def test_what_is_absent_is_inferred(folder: Path) -> None:
    rows = [{"image": "img/a.png"}, {"image": "img/b.png", "mask": "m/1.png"}]
    first, second = read_manifest(write(folder / "screws.json", rows))
    assert first.is_good and first.category == "screws"
    assert (second.defect, second.split) == ("defective", "test")
    assert read_manifest(folder / "screws.json", train_share=1)[0].split == "train"
    groups = [{"image": f"img/{n}.png", "group": "g"} for n in "ab"]
    for seed in range(8):
        got = read_manifest(write(folder / "g.json", groups), train_share=0.5, seed=seed)
        assert got[0].split == got[1].split


def test_a_part_with_a_defect_is_not_learned(folder: Path) -> None:
    """One view of a part in training would make its defective view easy to find."""
    rows = [
        {"image": "img/a.png", "label": 0, "group": "part 1"},
        {"image": "img/b.png", "label": 1, "group": "part 1"},
        {"image": "img/ü c.png", "label": 0, "group": "part 2"},
    ]
    path = write(folder / "list.csv", rows)
    assert [s.split for s in read_manifest(path, train_share=1)] == ["test", "test", "train"]
    rows[0]["split"], rows[1]["category"] = "train", "other"  # other parts, numbered alike
    assert read_manifest(write(path, rows))[0].split == "train"


@pytest.mark.parametrize(
    "second", [{"label": 1}, {"label": 1, "split": "test"}, {"label": 0, "split": "test"}]
)
def test_a_group_on_two_given_sides(folder: Path, second: dict) -> None:
    rows = [
        {"image": "img/a.png", "label": 0, "split": "train", "group": "part 1"},
        {"image": "img/b.png", "group": "part 1"} | second,
    ]
    with pytest.raises(InputError, match=r"entry 2 stands in test, but another.*'part 1' in train"):
        read_manifest(write(folder / "list.json", rows))


@pytest.mark.parametrize("column", ["labels", "Lable", "is_anomaly", "defects"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_misnamed_column_is_refused(folder: Path, column: str, suffix: str) -> None:
    """Passed over, it would make every row good."""
    rows = [{"image": "img/a.png", column: 0}, {"image": "img/b.png", column: 1}]
    with pytest.raises(InputError, match=rf"a column '{column.lower()}'.*did you mean '\w+'\?"):
        read_manifest(write(folder / f"list{suffix}", rows))


def test_columns_of_the_users_own(folder: Path) -> None:
    """Also where they are nearly ours, if ours stands beside them."""
    row = {"image": "img/a.png", "label": 0, "labels": "x", "site": "B", "camera": "1", "lot": "7"}
    (sample,) = read_manifest(write(folder / "list.csv", [row]))
    assert sample.meta == {"labels": "x", "site": "B", "camera": "1", "lot": "7"}


@pytest.mark.parametrize("word", ["good", "bad", "OK", "NG"])
def test_a_label_called_class(folder: Path, word: str) -> None:
    rows = [{"image": "img/a.png", "class": word}]
    text = rf"entry 1 has the category '{word}' and no label; call the column 'label'"
    with pytest.raises(InputError, match=text):
        read_manifest(write(folder / "list.csv", rows))


@pytest.mark.parametrize(
    "row, text",
    [
        ({"image": ""}, r"entry 2 has no image"),
        ({"label": "1", "split": "train"}, r"entry 2 is defective but stands in train"),
        ({"label": "0.5"}, r"entry 2 has the label '0.5'; use 0 or good, 1 or bad"),
        ({"label": ""}, r"entry 2 has an empty label"),
        ({"split": "val"}, r"entry 2 has the split 'val'; use train, test"),
        ({"mask_rule": ">=999"}, r"entry 2 has the mask_rule '>=999'"),
        ({"image": "img/zz.png"}, r"files that do not exist \(1, first .*zz\.png\)"),
        ({"label": "1", "mask": "m/9.png"}, r"files that do not exist \(1, first .*9\.png\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_bad_rows(folder: Path, row: dict, text: str, suffix: str) -> None:
    rows = [{"image": "img/a.png", "label": "0"}, {"image": "img/b.png", "label": "0"} | row]
    with pytest.raises(InputError, match=text):
        read_manifest(write(folder / f"list{suffix}", rows))


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("x.json", b"{", r"x\.json: is not valid JSON"),
        ("x.json", b"[" * 100_000, r"x\.json: is not valid JSON"),
        ("x.json", b'{"a": 1}', r"neither a list of pictures nor an object with train and test"),
        ("x.json", b'{"train": 3}', r"'train' is not a list of objects"),
        ("x.json", b"[3]", r"an entry is no object"),
        ("x.json", b"[]", r"names no picture"),
        ("x.jsonl", b'{"image": "a"}\n{', r"line 2: is not valid JSON"),
        ("x.csv", b"", r"names no picture"),
        ("x.csv", b"imgae,label\na.png,0\n", r"no column 'image' but 'imgae', 'label'; call"),
        ("x.csv", b"bild,label\na.png,0\n", r"no column 'image' but 'bild', 'label'; call"),
        ("x.csv", b"image\na.png,0\n", r"line 2 has more cells than the header"),
        ("x.csv", b'image,label\n"a.png,0\n', r"is no valid table row"),
        ("x.csv", b"image\n\xff\xfe\n", r"is not UTF-8"),
        ("x.txt", b"image\n", r"a manifest ends in \.csv"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text):
        read_manifest(tmp_path / name)


def test_a_picture_named_twice(folder: Path) -> None:
    path = write(folder / "list.csv", [{"image": "img/a.png"}, {"image": "img/a.png"}])
    with pytest.raises(InputError, match=r"a\.png more than once \(1 such pictures\)"):
        read_data([path])
