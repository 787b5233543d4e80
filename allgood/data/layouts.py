"""One function per folder layout: root -> list[Sample]. Nothing is decoded here.

Readers answer with every picture the layout holds; `allgood.data.readers` finds the layout, joins
roots and checks the whole. The manifest has its own file, `allgood.data.manifest`.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from allgood.data.files import (
    CERTAIN_MASK_FOLDERS,
    MASK_FOLDERS,
    MaskIndex,
    category_name,
    child_named,
    folders_in,
    good_child,
    has_pictures,
    is_good_name,
    pictures_below,
    refuse_loose_pictures,
    relative_id,
)
from allgood.data.splits import good_split
from allgood.types import GOOD, InputError, Sample
from allgood.wording import listed, shown

Split = Literal["train", "test"]

# -- MVTec ---------------------------------------------------------------------------------------


def is_mvtec_category(folder: Path) -> bool:
    """Whether a folder has `train/<good>`."""
    train = child_named(folder, ["train"])
    return train is not None and good_child(train) is not None


def read_mvtec(root: Path | str) -> list[Sample]:
    """`train/good`, `test/good`, `test/<defect>`, `ground_truth/<defect>`; also BTAD, MPDD, LOCO.

    One category at the root, or several one level down. Good folders may be called good, ok,
    normal, pass or free; pictures may lie in sub-folders of good and defect folders. `validation/`
    is not read. A defective picture without a mask has `mask_paths == ()`.

    Raises:
        InputError: no category found, half a category, or train/ holds another folder with
            pictures than the good one.
    """
    root = Path(root)
    folders = _categories(root, is_mvtec_category, "train/good")
    return [sample for folder in folders for sample in _mvtec_category(folder, root)]


def _mvtec_category(folder: Path, root: Path) -> list[Sample]:
    category, train = category_name(folder), child_named(folder, ["train"])
    if train is None or (good := good_child(train)) is None:
        raise InputError(
            f"{shown(folder)}: has no train/good folder, as the MVTec layout has; "
            "add it or leave the category out"
        )
    refuse_loose_pictures(train)
    others = [child.name for child in folders_in(train) if child != good and has_pictures(child)]
    if others:
        raise InputError(
            f"{shown(train)}: holds {listed(others)} beside '{good.name}', but training takes good "
            "pictures only; move defective ones to test/"
        )
    samples = [_good(path, category, "train", root) for path in pictures_below(good)]
    test = child_named(folder, ["test"])
    if test is not None:
        refuse_loose_pictures(test)
        kind = good_child(test)
        if kind is not None:
            samples += [_good(path, category, "test", root) for path in pictures_below(kind)]
        defects = [child for child in folders_in(test) if child != kind]
        samples += _defective(defects, category, MaskIndex(child_named(folder, MASK_FOLDERS)), root)
    return samples


# -- folders without a split ---------------------------------------------------------------------


def is_good_and_bad(folder: Path) -> bool:
    """Whether a folder has a good folder and another with pictures, or folders have a good one."""
    children = folders_in(folder)
    if good_child(folder) is not None:
        return any(has_pictures(child) for child in children if not is_good_name(child.name))
    return any(good_child(child) is not None for child in children)


def read_good_and_bad(root: Path | str, *, train_share: float = 0.8, seed: int = 0) -> list[Sample]:
    """A folder called good (ok, normal, pass, free) and others, each named after its defect.

    One category at the root, or several one level down. Masks, if any, lie in `ground_truth`, `gt`,
    `mask(s)` or `label(s)` beside them; but where no file in `mask(s)` or `label(s)` has the name
    of a defective picture, the folder is a defect too. Good pictures are split by
    `splits.in_holdout`; defective ones are for testing.

    Raises:
        InputError: no good folder, several, a category without one, or masks of no defect.
    """
    root = Path(root)
    samples: list[Sample] = []
    folders = _categories(root, lambda folder: good_child(folder) is not None, "good")
    for folder in folders:
        refuse_loose_pictures(folder)
        category, good = category_name(folder), good_child(folder)
        for path in pictures_below(good) if good else []:
            id = relative_id(path, root)
            side = good_split(id, "", train_share=train_share, seed=seed)
            samples.append(_good(path, category, side, root))
        samples += _bad(folder, category, root)
    return samples


def _bad(folder: Path, category: str, root: Path) -> list[Sample]:
    """The defective pictures beside a good folder."""
    defects, masks = _defect_folders(folder), child_named(folder, MASK_FOLDERS)
    samples = _defective(defects, category, MaskIndex(masks), root)
    if masks is None or not has_pictures(masks):
        return samples
    if not samples:
        raise InputError(
            f"{shown(masks)}: its name says masks, but no folder beside it holds the pictures that "
            "they mark; if these are defective parts rename it after their defect, else move it "
            "away"
        )
    if masks.name.casefold() not in CERTAIN_MASK_FOLDERS and not any(s.mask_paths for s in samples):
        samples += _defective([masks], category, MaskIndex(None), root)
    return samples


def read_good_folder(root: Path | str, *, categories_from_folders: bool = False) -> list[Sample]:
    """Pictures only, all of them good and for training; there is nothing to test.

    Sub-folders are read too, but are no categories unless `categories_from_folders`.

    Raises:
        InputError: no picture found, or pictures beside the folders that should be categories.
    """
    root = Path(root)
    folders = [root]
    if categories_from_folders:
        refuse_loose_pictures(root)
        folders = folders_in(root)
    samples = [
        _good(path, category_name(folder), "train", root)
        for folder in folders
        for path in pictures_below(folder)
    ]
    if not samples:
        raise InputError(f"{shown(root)}: holds no picture; name a folder that does")
    return samples


# -- data sets with a layout of their own --------------------------------------------------------

GOODSAD_CATEGORIES = frozenset(
    {"cigarette_box", "drink_bottle", "drink_can", "food_bottle", "food_box", "food_package"}
)
_GOODSAD_STEM = re.compile(r"\d{6}")
"""Three digits of the product, three of its picture."""


def is_goodsad(folder: Path) -> bool:
    """Whether a folder is a category of GoodsAD, or holds nothing but such."""
    return all(map(_is_goodsad_category, _mvtec_folders(folder) or [folder]))


def _is_goodsad_category(folder: Path) -> bool:
    if category_name(folder) not in GOODSAD_CATEGORIES or not is_mvtec_category(folder):
        return False
    train = child_named(folder, ["train"])
    good = good_child(train) if train else None
    first = pictures_below(good)[:1] if good else []
    return any(_GOODSAD_STEM.fullmatch(path.stem) for path in first)


def read_goodsad(root: Path | str) -> list[Sample]:
    """GoodsAD: the MVTec layout, where `012345` is picture 345 of product 012 (`meta`).

    Raises:
        InputError: as `read_mvtec`, or a defective picture without a mask.
    """
    samples = []
    for sample in read_mvtec(root):
        if not sample.is_good and not sample.mask_paths:
            raise InputError(
                f"{shown(sample.path)}: has no mask of the same name in ground_truth, as all "
                "defective pictures of GoodsAD have; complete the copy, or read it with "
                "--layout mvtec"
            )
        stem = sample.path.stem
        known = _GOODSAD_STEM.fullmatch(stem)
        samples.append(replace(sample, meta={"product": stem[:3]}) if known else sample)
    return samples


AEBAD_DOMAINS = frozenset({"same", "background", "illumination", "view"})


def aebad_folder(root: Path | str) -> Path | None:
    """The folder of AeBAD-S: `root` itself, or AeBAD_S in it (AeBAD_V has no masks); or None."""
    root = Path(root)
    for folder in (root, child_named(root, ["aebad_s"])):
        test = child_named(folder, ["test"]) if folder and is_mvtec_category(folder) else None
        good = good_child(test) if test else None
        if good and {child.name for child in folders_in(good)} & AEBAD_DOMAINS:
            return folder
    return None


def read_aebad(root: Path | str) -> list[Sample]:
    """AeBAD-S: the MVTec layout with a folder per domain inside good and defect folders.

    One category to learn; `meta["domain"]` parts its test pictures by what has shifted: nothing
    (same), background, illumination or view.

    Raises:
        InputError: no such folder, as `read_mvtec`, or pictures outside the domains.
    """
    folder = aebad_folder(root)
    if folder is None:
        raise InputError(
            f"{shown(root)}: has no test/good with folders {', '.join(sorted(AEBAD_DOMAINS))}; "
            "name the folder AeBAD_S"
        )
    samples = []
    for sample in read_mvtec(folder):
        kind, *domain, _ = sample.path.relative_to(folder).parts[1:]
        if len(domain) != 1:
            raise InputError(
                f"{shown(sample.path)}: lies in no domain, as AeBAD-S has them; "
                f"move it into a folder of '{kind}'"
            )
        samples.append(
            replace(sample, id=relative_id(sample.path, Path(root)), meta={"domain": domain[0]})
        )
    return samples


MTD_MASK_THRESHOLD = 128
"""MTD's masks have soft edges and specks; > 0 would triple the regions of MT_Break."""


def read_mtd(root: Path | str, *, train_share: float = 0.8, seed: int = 0) -> list[Sample]:
    """Magnetic tile defects: `MT_<Kind>/Imgs/*.jpg` with a `.png` mask of the same stem.

    Good tiles (MT_Free) are split by `splits.in_holdout`. Four masks of MT_Uneven are empty;
    they stay in `mask_paths`, and `load_batches`, which sees pixels, sets `has_mask` to False.

    Raises:
        InputError: no MT_Free folder.
    """
    root = Path(root)
    kinds = [child for child in folders_in(root) if child.name.lower().startswith("mt_")]
    if child_named(root, ["mt_free"]) is None:
        raise InputError(f"{shown(root)}: has no MT_Free folder; name the folder that holds MT_*")
    samples = []
    for kind in kinds:
        defect = kind.name.lower().removeprefix("mt_")
        for path in pictures_below(kind):
            if path.suffix.lower() not in (".jpg", ".jpeg"):  # .png is the mask
                continue
            if defect == "free":
                side = good_split(relative_id(path, root), "", train_share=train_share, seed=seed)
                samples.append(_good(path, category_name(root), side, root))
                continue
            mask = path.with_suffix(".png")
            samples.append(
                Sample(
                    path=path,
                    category=category_name(root),
                    split="test",
                    defect=defect,
                    id=relative_id(path, root),
                    mask_paths=(mask,) if mask.is_file() else (),
                    mask_threshold=MTD_MASK_THRESHOLD,
                )
            )
    return samples


ELPV_CATEGORIES = {"mono": "monocrystalline", "poly": "polycrystalline"}
ELPV_CELLS_PER_GROUP = 60
"""Cells of one solar module follow each other in the list; a module has about 60 of them."""


def read_elpv(
    root: Path | str = "elpv", *, train_share: float = 0.8, seed: int = 0
) -> list[Sample]:
    """Solar cells of the elpv-dataset package; `root` is `elpv` or a folder with labels.csv.

    Defect probability 0 is good, 1 is defective, 1/3 and 2/3 are left out. No masks. 60 consecutive
    rows are one group, so that neighbours in a module mostly stand on one side of the split. There
    are but 44 groups: the share that trains strays from train_share by ten percent and more.

    Raises:
        InputError: the package is not installed, or labels.csv is missing or malformed.
    """
    folder = elpv_folder(root)
    try:
        lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{shown(folder)}: has no readable labels.csv; name the data folder of elpv-dataset"
        ) from None
    samples = []
    for row, line in enumerate(lines):
        id, probability, category = _elpv_row(line, row, folder)
        if 1e-6 < probability < 1 - 1e-6:
            continue
        good, group = probability < 0.5, f"rows-{row // ELPV_CELLS_PER_GROUP:02d}"
        side = good_split(id, group, train_share=train_share, seed=seed) if good else "test"
        samples.append(
            Sample(
                path=folder / id,
                category=category,
                split=side,
                defect=GOOD if good else "defective",
                id=id,
                group=group,
                meta={"probability": f"{probability:g}"},
            )
        )
    return samples


def elpv_folder(root: Path | str) -> Path:
    """The folder of labels.csv: `root` itself, or for `elpv` the installed package's."""
    if str(root) != "elpv" or Path(root).is_dir():
        return Path(root)
    found = importlib.util.find_spec("elpv_dataset")
    if found is None or not found.submodule_search_locations:
        raise InputError(
            "elpv: the package elpv-dataset is not installed; pip install 'allgood[demo]'"
        )
    return Path(found.submodule_search_locations[0]) / "data"


def is_elpv_folder(folder: Path) -> bool:
    """Whether a folder has images/ and a labels.csv that begins as ELPV's does."""
    if not (folder / "images").is_dir():
        return False
    try:
        with open(folder / "labels.csv", encoding="utf-8") as file:
            _elpv_row(file.readline(), 0, folder)
    except (OSError, ValueError):  # none, not text, or another table
        return False
    return True


def _elpv_row(line: str, row: int, folder: Path) -> tuple[str, float, str]:
    try:
        id, probability, kind = line.split()
        return id, float(probability), ELPV_CATEGORIES[kind]
    except (ValueError, KeyError):
        raise InputError(
            f"{shown(folder / 'labels.csv')}: line {row + 1} is not 'path probability mono|poly'; "
            "take the file from the package elpv-dataset"
        ) from None


# -- shared --------------------------------------------------------------------------------------


def _mvtec_folders(root: Path) -> list[Path]:
    return [child for child in folders_in(root) if is_mvtec_category(child)]


def _categories(root: Path, is_category: Callable[[Path], bool], landmark: str) -> list[Path]:
    """The root itself, or its sub-folders that are categories. Half a category is an error."""
    if is_category(root):
        return [root]
    children = folders_in(root)
    found = [child for child in children if is_category(child)]
    if not found:
        raise InputError(
            f"{shown(root)}: neither it nor a folder in it has {landmark}; "
            f"it holds {listed(child.name for child in children) or 'no folders'}"
        )
    for child in children:
        if child not in found and has_pictures(child):
            raise InputError(
                f"{shown(child)}: holds pictures but no {landmark}, unlike '{found[0].name}' "
                "beside it; add it or move the folder away"
            )
    return found


def _good(path: Path, category: str, split: Split, root: Path) -> Sample:
    return Sample(
        path=path, category=category, split=split, defect=GOOD, id=relative_id(path, root)
    )


def _defective(
    folders: Iterable[Path], category: str, masks: MaskIndex, root: Path
) -> list[Sample]:
    return [
        Sample(
            path=path,
            category=category,
            split="test",
            defect=folder.name,
            id=relative_id(path, root),
            mask_paths=masks.find(
                folder.name, path.relative_to(folder).with_suffix("").as_posix(), path
            ),
        )
        for folder in folders
        for path in pictures_below(folder)
    ]


def _defect_folders(folder: Path) -> list[Path]:
    return [
        child
        for child in folders_in(folder)
        if not is_good_name(child.name) and child.name.casefold() not in MASK_FOLDERS
    ]
