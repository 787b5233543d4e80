"""A table that names every picture: csv, tsv, json or jsonl -> list[Sample].

Columns, any case, with the aliases of `COLUMNS`: image (required), label, split, category, mask,
defect, group, mask_rule. All others are kept as `Sample.meta`. JSON may be a list of such objects,
`{"train": [...], "test": [...]}` (Real-IAD), or `{"train": {category: [...]}, ...}` (ADer).
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from allgood.data.files import BAD_NAMES, GOOD_NAMES, relative_id
from allgood.data.splits import good_split
from allgood.types import GOOD, InputError, Sample
from allgood.wording import listed, shown

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")

COLUMNS = {
    "image": ("image", "image_path", "img_path", "filename", "path", "file"),
    "label": ("label", "anomaly"),
    "split": ("split",),
    "category": ("category", "class", "cls_name", "clsname", "object"),
    "mask": ("mask", "mask_path", "maskname", "masks"),
    "defect": ("defect", "specie_name", "anomaly_class", "label_name"),
    "group": ("group",),
    "mask_rule": ("mask_rule",),
}
"""Our word -> column names that mean it, in the order of preference."""

Row = dict[str, str]
"""Our words, then the unknown columns, all as text; absent and empty are the same."""


def read_manifest(
    path: Path | str, *, base: Path | str | None = None, train_share: float = 0.8, seed: int = 0
) -> list[Sample]:
    """The pictures a manifest names, in its order.

    Without a label a row is good, unless its defect or its mask says otherwise; but where the
    column stands and a row outside train leaves it empty, nothing is guessed. Without `split` good
    rows are split by `splits.in_holdout` and defective ones are for testing; but pictures of one
    category's group go together, where any of them is decided. Without `category` there is one,
    named after the file. Masks: several are joined by `|`, or a list in JSON.

    Args:
        base: folder that paths are relative to; default: the manifest's own, or there the folder
            of the row's category.

    Raises:
        InputError: unreadable, no image column, a column whose name is nearly one of ours, a value
            with no meaning, a defective row in train, a group in train and in test, a picture or
            mask that does not exist. The row is named.
    """
    path = Path(path)
    folder = path.parent if base is None else Path(base)
    samples: list[Sample] = []
    missing: list[str] = []
    side_of: dict[tuple[str, str], Literal["train", "test"]] = {}
    """Category and group -> where one of its pictures stands, whatever the seed."""
    for number, row in enumerate(_rows(path), start=1):
        place = f"{shown(path)}: entry {number}"
        sample = _sample(row, place, path.stem, folder, train_share=train_share, seed=seed)
        samples.append(sample)
        if sample.group and (row.get("split") or not sample.is_good):
            side = side_of.setdefault((sample.category, sample.group), sample.split)
            if side != sample.split:
                raise InputError(
                    f"{place} stands in {sample.split}, but another picture of its group "
                    f"'{sample.group}' in {side}; give all pictures of one part the same split"
                )
        missing += [shown(f) for f in (sample.path, *sample.mask_paths) if not f.is_file()]
    if missing:
        raise InputError(
            f"{shown(path)}: names files that do not exist ({len(missing)}, first {missing[0]}); "
            f"paths are relative to {shown(folder) or '.'}"
        )
    if not samples:
        raise InputError(f"{shown(path)}: names no picture; add one row per picture")
    return [replace(s, split=side_of.get((s.category, s.group), s.split)) for s in samples]


# -- one row -------------------------------------------------------------------------------------


def _sample(
    row: Row, place: str, stem: str, folder: Path, *, train_share: float, seed: int
) -> Sample:
    if not row.get("image"):
        raise InputError(f"{place} has no image; fill in the column or delete the row")
    category = row.get("category") or stem
    image = _resolve(row["image"], folder, category)
    masks = [part.strip() for part in row.get("mask", "").split("|") if part.strip()]
    good = _is_good(row, place)
    id, group = relative_id(image, folder), row.get("group", "")
    split = _split(row, place)
    if split == "train" and not good:
        raise InputError(
            f"{place} is defective but stands in train, and training takes good pictures only; "
            "set its split to test"
        )
    if split is None:
        split = good_split(id, group, train_share=train_share, seed=seed) if good else "test"
    return Sample(
        path=image,
        category=category,
        split=split,
        defect=GOOD if good else _defect_name(row),
        id=id,
        mask_paths=() if good else tuple(_resolve(mask, folder, category) for mask in masks),
        mask_threshold=_threshold(row, place),
        group=group,
        meta={key: value for key, value in row.items() if key not in COLUMNS},
    )


def _resolve(text: str, folder: Path, category: str) -> Path:
    """A path of the manifest: below the folder, or (Real-IAD) below the category's folder in it."""
    for spelling in (text, text.replace("\\", "/")):  # manifests written on Windows
        for parent in (folder, folder / category):
            if (parent / spelling).is_file():
                return parent / spelling
    return folder / text


def _is_good(row: Row, place: str) -> bool:
    label = row.get("label", "").casefold()
    if not label:
        defect = row.get("defect", "").casefold()
        if row.get("mask") or (defect and defect not in GOOD_NAMES):
            return False
        if "label" in row and not defect and _split(row, place) != "train":
            raise InputError(f"{place} has an empty label; use 0 or good, 1 or bad")
        category = row.get("category", "")
        if "label" not in row and category.casefold() in GOOD_NAMES | BAD_NAMES:
            raise InputError(
                f"{place} has the category '{category}' and no label; call the column 'label'"
            )
        return True
    if label in GOOD_NAMES or label == "false":
        return True
    if label in BAD_NAMES or label == "true":
        return False
    try:
        return {0.0: True, 1.0: False}[float(label)]
    except (ValueError, KeyError):
        raise InputError(
            f"{place} has the label '{row['label']}'; use 0 or good, 1 or bad"
        ) from None


def _defect_name(row: Row) -> str:
    name = row.get("defect", "")
    return name if name and name.casefold() not in GOOD_NAMES else "defective"


def _split(row: Row, place: str) -> Literal["train", "test"] | None:
    text = row.get("split", "").casefold()
    if text == "train":
        return "train"
    if text == "test":
        return "test"
    if text:
        raise InputError(
            f"{place} has the split '{row['split']}'; use train, test, or leave it empty"
        )
    return None


def _threshold(row: Row, place: str) -> int:
    rule = row.get("mask_rule", "").replace(" ", "")
    if rule in ("", "nonzero", "label-values"):
        return 1
    number = rule.removeprefix(">=")
    if number.isdecimal() and 1 <= int(number) <= 255:
        return int(number)
    raise InputError(f"{place} has the mask_rule '{row['mask_rule']}'; use nonzero or >=128")


# -- one file ------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({error.strerror}); check it") from None
    except UnicodeDecodeError:
        raise InputError(f"{shown(path)}: is not UTF-8 text; save it as UTF-8") from None
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        entries = _json_lines(text, path) if suffix == ".jsonl" else _json_file(text, path)
        for entry in entries:
            if not isinstance(entry, dict):
                raise InputError(
                    f"{shown(path)}: an entry is no object; write one object per picture"
                )
            yield _our_words(entry, path)
    elif suffix in (".csv", ".tsv"):
        yield from _table(text, path)
    else:
        raise InputError(f"{shown(path)}: a manifest ends in {', '.join(SUFFIXES)}; rename it")


def _table(text: str, path: Path) -> Iterator[Row]:
    header = text.partition("\n")[0]
    # Excel writes semicolons where the comma is the decimal sign.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for entry in reader:
            if None in entry:  # DictReader's place for the cells beyond the header
                raise InputError(
                    f"{shown(path)}: line {reader.line_num} has more cells than the header; "
                    "quote cells that hold the separator"
                )
            yield _our_words(entry, path)
    except csv.Error as error:
        raise InputError(
            f"{shown(path)}: line {reader.line_num} is no valid table row ({error}); mend it"
        ) from None


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _json(line, f"{shown(path)}: line {number}")


def _json_file(text: str, path: Path) -> Iterator[Any]:
    """Entries of a list, of train and test lists, or of train and test objects of lists."""
    content = _json(text, shown(path))
    if isinstance(content, list):
        yield from content
        return
    if not isinstance(content, dict) or not ({"train", "test"} & content.keys()):
        raise InputError(
            f"{shown(path)}: is neither a list of pictures nor an object with train and test; "
            "write one object per picture"
        )
    for split in ("train", "test"):
        part = content.get(split) or []
        lists = part.items() if isinstance(part, dict) else [("", part)]
        for category, entries in lists:
            if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
                raise InputError(f"{shown(path)}: '{split}' is not a list of objects; mend it")
            given = {"split": split} | ({"cls_name": category} if category else {})
            yield from ({**given, **entry} for entry in entries)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: is not valid JSON ({error}); mend it") from None


def _our_words(entry: Mapping[str, Any], path: Path) -> Row:
    texts = {str(key).strip().casefold(): _text(value) for key, value in entry.items()}
    row: Row = {}
    for word, aliases in COLUMNS.items():
        alias = next((alias for alias in aliases if alias in texts), None)
        if alias is not None:
            row[word] = texts.pop(alias)
    if "image" not in row:
        raise InputError(
            f"{shown(path)}: has no column 'image' but {listed(map(str, entry)) or 'none'}; "
            "call the column with the pictures' paths 'image'"
        )
    lacking = tuple(word for word in COLUMNS if word not in row)
    for key in texts:
        alias = _near_alias(key, lacking)
        if alias is not None:
            raise InputError(
                f"{shown(path)}: has a column '{shown(key)}', which is not known; "
                f"did you mean '{alias}'? rename it so, or clearly otherwise"
            )
    # A second alias, as `label_name` beside `defect`, stays under its own name.
    return row | {key: value for key, value in texts.items() if key not in COLUMNS}


@lru_cache  # asked for every row, and mostly the same
def _near_alias(key: str, words: tuple[str, ...]) -> str | None:
    """The name of a column for one of our words that a name is nearly; or None.

    Passed over, a column `labels` would leave every row good.
    """
    aliases = [alias for word in words for alias in COLUMNS[word]]
    return next(iter(difflib.get_close_matches(key, aliases, n=1, cutoff=0.8)), None)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "|".join(_text(item) for item in value)
    return str(value).strip()
