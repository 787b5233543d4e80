"""Roots on disk -> Dataset: finds the layout of each root, reads it, joins them, checks the whole.

Several roots make one multi-category set. Importing this file needs neither torch nor a picture.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allgood.data.files import (
    MASK_FOLDERS,
    child_named,
    folders_in,
    good_child,
    has_pictures,
    pictures_below,
    pictures_in,
    sounds_bad,
    sounds_good,
    without_mask_ending,
)
from allgood.data.layouts import (
    aebad_folder,
    elpv_folder,
    is_elpv_folder,
    is_good_and_bad,
    is_goodsad,
    is_mvtec_category,
    read_aebad,
    read_elpv,
    read_good_and_bad,
    read_good_folder,
    read_goodsad,
    read_mtd,
    read_mvtec,
)
from allgood.data.manifest import SUFFIXES as MANIFEST_SUFFIXES
from allgood.data.manifest import read_manifest
from allgood.types import InputError, Sample
from allgood.wording import listed, shown, unknown


@dataclass(frozen=True)
class Layout:
    """A way in which data lie on disk."""

    description: str
    read: Callable[..., list[Sample]]
    has_split: bool
    """Whether disk says what is for training; otherwise `read` takes train_share and seed."""


LAYOUTS: dict[str, Layout] = {
    "mvtec": Layout(
        "train/good, test/good, test/DEFECT, ground_truth/DEFECT; one category or several "
        "(MVTec AD, BTAD, MPDD, prepared VisA)",
        read_mvtec,
        has_split=True,
    ),
    "good_and_bad": Layout(
        "a folder good (or ok, normal, pass, free) and one folder per defect; masks optional",
        read_good_and_bad,
        has_split=False,
    ),
    "good_folder": Layout(
        "pictures of good parts only, sub-folders or not", read_good_folder, has_split=True
    ),
    "manifest": Layout(
        "a .csv, .tsv, .json or .jsonl file with one row per picture", read_manifest, False
    ),
    "goodsad": Layout(
        "GoodsAD: cigarette_box, drink_bottle, ... as in mvtec, pictures named by six digits",
        read_goodsad,
        has_split=True,
    ),
    "aebad": Layout(
        "AeBAD-S: as mvtec, with a folder same, background, illumination, view in each kind",
        read_aebad,
        has_split=True,
    ),
    "mtd": Layout(
        "magnetic tiles as published: MT_Free/Imgs, MT_Crack/Imgs, ...", read_mtd, has_split=False
    ),
    "elpv": Layout(
        "solar cells: the word elpv (package elpv-dataset), or a folder with its labels.csv",
        read_elpv,
        has_split=False,
    ),
}
"""Layout's name, as `--layout` takes it -> what it looks like and its reader."""

# Landmarks of sets whose reader is still to come; read as something else they would come out wrong.
_KNOWN_BUT_UNREAD = {
    "split_csv/1cls.csv": "VisA (use its prepared one-class folders)",
    "realiad_jsons": "Real-IAD (name one of its .json files, beside the category's folder)",
    "*/test/*/rgb": "MVTec 3D-AD",
    "test/*/rgb": "MVTec 3D-AD",
    "Class1/Train/Label": "DAGM 2007",
    "*/Data/Images/Normal": "VisA (use its prepared one-class folders)",
    "*/test/*/img": "BMAD",
    "test/*/img": "BMAD",
}


@dataclass(frozen=True)
class Dataset:
    """The pictures of all roots."""

    samples: tuple[Sample, ...]
    """Sorted by (category, id)."""
    layouts: Mapping[str, str]
    """Root as it was given -> name of its layout."""

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(sorted({sample.category for sample in self.samples}))

    @property
    def train(self) -> tuple[Sample, ...]:
        """Good pictures for training; may be empty, or lack a category."""
        return tuple(sample for sample in self.samples if sample.split == "train")

    @property
    def test(self) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.split == "test")

    @property
    def untrained(self) -> tuple[str, ...]:
        """Categories without any good picture for training."""
        trained = {sample.category for sample in self.train}
        return tuple(category for category in self.categories if category not in trained)

    def only(self, categories: Sequence[str]) -> "Dataset":
        """The pictures of these categories.

        Raises:
            InputError: the data hold no such category.
        """
        for category in categories:
            if category not in self.categories:
                problem = f"the data hold no category '{category}'"
                raise unknown(problem, category, self.categories)
        kept = tuple(sample for sample in self.samples if sample.category in categories)
        return Dataset(kept, self.layouts)

    def describe(self) -> str:
        """A few lines: the layout of each root, and one line of counts per category."""
        lines = [f"{root}: layout {layout}" for root, layout in self.layouts.items()]
        width = max(len(category) for category in self.categories)
        for category in self.categories:
            counts = Counter(_kind(s) for s in self.samples if s.category == category)
            masked = sum(bool(s.mask_paths) for s in self.samples if s.category == category)
            lines.append(
                f"  {category:<{width}}  train {counts['train']} good, "
                f"test {counts['test']} good + {counts['defective']} defective "
                f"({masked} with a mask)"
            )
            lines += self._domains(category)
        return "\n".join(lines)

    def _domains(self, category: str) -> list[str]:
        """One line per domain of a category whose test pictures name theirs."""
        counts = Counter(
            (sample.meta["domain"], _kind(sample))
            for sample in self.test
            if sample.category == category and "domain" in sample.meta
        )
        return [
            f"    {domain}: {counts[domain, 'test']} good + {counts[domain, 'defective']} defective"
            for domain in sorted({domain for domain, _ in counts})
        ]


def read_data(
    roots: Sequence[str | Path] | str | Path,
    *,
    layout: str | None = None,
    train_share: float = 0.8,
    seed: int = 0,
) -> Dataset:
    """Everything below the roots as one data set.

    Args:
        roots: folders, manifest files, or the word `elpv`.
        layout: a name in LAYOUTS, for all roots; default: found for each root.
        train_share: share of the good pictures that trains, where disk does not say; in (0, 1].
        seed: of that split.

    Raises:
        InputError: a root is missing, its layout is unknown or ambiguous, two roots hold the same
            category, a picture is named twice, or there is no picture.
    """
    roots = [roots] if isinstance(roots, str | Path) else list(roots)
    if not roots:
        raise InputError("no data given; name a folder of pictures")
    if layout is not None and layout not in LAYOUTS:
        raise unknown(f"unknown layout '{layout}'", layout, LAYOUTS)
    samples: list[Sample] = []
    layouts: dict[str, str] = {}
    owner: dict[str, str] = {}
    for root in roots:
        _require_exists(root)
        name = layout or detect_layout(root)
        layouts[shown(root)] = name
        options = {} if LAYOUTS[name].has_split else {"train_share": train_share, "seed": seed}
        found = LAYOUTS[name].read(root, **options)
        if not found:
            raise InputError(f"{shown(root)}: holds no picture; name a folder that does")
        _refuse_twice(found, shown(root))
        if name != "manifest":
            _refuse_masks(found)
        for category in sorted({sample.category for sample in found}):
            if category in owner:
                raise InputError(
                    f"{owner[category]} and {shown(root)} both hold the category '{category}'; "
                    "rename one folder, or write a manifest with a column 'category'"
                )
            owner[category] = shown(root)
        samples += found
    samples.sort(key=lambda sample: (sample.category, sample.id))
    return Dataset(tuple(samples), layouts)


def detect_layout(root: str | Path) -> str:
    """The name in LAYOUTS of what lies at the root: the first match, from the most telling sign.

    Raises:
        InputError: nothing matches, several do, or it is a known set that has no reader yet.
    """
    _require_exists(root)
    if _is_elpv(root):
        return "elpv"
    folder = Path(root)
    if not folder.is_dir():
        if folder.suffix.lower() in MANIFEST_SUFFIXES:
            return "manifest"
        raise InputError(
            f"{shown(root)}: is neither a folder nor a manifest ({', '.join(MANIFEST_SUFFIXES)})"
        )
    if child_named(folder, ["mt_free"]):
        return "mtd"
    for landmark, name in _KNOWN_BUT_UNREAD.items():
        if next(folder.glob(landmark), None):
            raise InputError(
                f"{shown(root)}: looks like {name}, whose own layout has no reader yet; "
                "write a manifest, or force one with --layout"
            )
    if aebad_folder(folder):
        return "aebad"
    if is_goodsad(folder):
        return "goodsad"
    children = folders_in(folder)
    if is_mvtec_category(folder) or any(map(is_mvtec_category, children)):
        return "mvtec"
    if is_good_and_bad(folder):
        return "good_and_bad"
    return _good_folder_or_error(folder, children)


def _good_folder_or_error(folder: Path, children: Sequence[Path]) -> str:
    """Pictures with nothing that says what they show are all good, unless names say otherwise."""
    loose, filled = pictures_in(folder), [child for child in children if has_pictures(child)]
    names = [child.name for child in filled]
    remedy = f"name the layout with --layout, one of {', '.join(LAYOUTS)}"
    if loose and filled:
        raise InputError(
            f"{shown(folder)}: holds {len(loose)} pictures beside folders with pictures "
            f"({listed(names)}), so what they show is unclear; {remedy}"
        )
    suspects = _suspects(folder)
    if suspects:
        raise InputError(
            f"{shown(folder)}: {listed(suspects)} would be taken for good; call the folder of good "
            f"pictures 'good', or {remedy}"
        )
    if (folder / "labels.csv").is_file():
        raise InputError(
            f"{shown(folder)}: holds labels.csv, which may say that some pictures are not good; "
            "name that file instead of the folder, or force --layout good_folder"
        )
    if not loose and not filled:
        seen = listed(child.name for child in children) or "no folders"
        raise InputError(
            f"{shown(folder)}: holds no picture ({seen}); name another folder, or {remedy}"
        )
    good_child(folder)  # refuses two folders that both mean good
    return "good_folder"


def _suspects(folder: Path) -> list[str]:
    """Folders of pictures, at any depth, whose own or neighbour's name says: these are not good."""
    beside: dict[Path, set[str]] = {}
    for parent in {path.parent for path in pictures_below(folder)}:
        parts = parent.relative_to(folder).parts
        for depth, name in enumerate(parts):
            beside.setdefault(Path(*parts[:depth]), set()).add(name)
    suspects = []
    for place, names in beside.items():
        others_are_good = any(map(sounds_good, names))
        suspects += [
            (place / name).as_posix()
            for name in names
            if sounds_bad(name)
            or name.casefold() in ("train", "test", *MASK_FOLDERS)
            or (others_are_good and not sounds_good(name))
        ]
    return sorted(suspects)


def _is_elpv(root: str | Path) -> bool:
    if str(root) == "elpv" and not Path(root).is_dir():
        return True
    return is_elpv_folder(Path(root))


def _require_exists(root: str | Path) -> None:
    if str(root) == "elpv":
        elpv_folder(root)  # says which extra to install
        return
    path = Path(root)
    try:
        found = path.exists()
    except (OSError, ValueError):  # a name no file can have
        found = False
    if not found:
        parent = path.parent
        siblings = [item.name for item in parent.iterdir()] if parent.is_dir() else []
        problem = f"{shown(root)}: no such file or folder"
        raise unknown(problem, path.name, siblings, "check the path")


def _refuse_twice(samples: Sequence[Sample], root: str) -> None:
    """The same picture twice would stand on both sides of a split, or weigh double."""
    counts = Counter(str(sample.path) for sample in samples)
    twice = [path for path, count in counts.items() if count > 1]
    if twice:
        raise InputError(
            f"{root}: names {shown(twice[0])} more than once ({len(twice)} such pictures); "
            "keep one entry per picture"
        )


def _refuse_masks(samples: Sequence[Sample]) -> None:
    """A mask beside its picture, in the same folder, would be taken for a picture itself."""
    pictures = {sample.path.with_suffix("") for sample in samples}
    for sample in samples:
        stem = without_mask_ending(sample.path.stem)
        if stem != sample.path.stem and sample.path.with_name(stem) in pictures:
            raise InputError(
                f"{shown(sample.path)}: looks like the mask of '{shown(stem)}' beside it; move "
                "masks to ground_truth, one folder per defect, or write a manifest"
            )


def _kind(sample: Sample) -> str:
    return sample.split if sample.is_good else "defective"
