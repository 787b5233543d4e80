"""What the folder readers share: which files are pictures, which names mean good, mask pairing."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from allgood.types import InputError
from allgood.wording import listed, shown

PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
)
"""Compared in lower case. Only for listing folders: decoding goes by content."""

GOOD_NAMES = frozenset({"good", "ok", "normal", "pass", "free", "oks", "normals"})
"""Folder names and labels that mean a good part, compared in lower case."""

BAD_NAMES = frozenset(
    {"bad", "ko", "ng", "fail", "defect", "defects", "defective", "anomaly", "anomalies"}
    | {"anomalous", "abnormal", "reject", "rejects", "ungood", "not_good", "nok"}
)

CERTAIN_MASK_FOLDERS = ("ground_truth", "gt")
MASK_FOLDERS = (*CERTAIN_MASK_FOLDERS, "mask", "masks", "label", "labels")
MASK_ENDINGS = ("_mask", "_label")


def is_good_name(name: str) -> bool:
    return name.casefold() in GOOD_NAMES


def sounds_good(name: str) -> bool:
    """Whether a word of a name means good, as in `good_images` or `0_ok`."""
    return bool(_words(name) & GOOD_NAMES) and not sounds_bad(name)


def sounds_bad(name: str) -> bool:
    """Whether a name or a word of it means bad, as in `bad_images`, `NG_parts` or `not_ok`."""
    return name.casefold() in BAD_NAMES or bool(_words(name) & (BAD_NAMES | {"not", "non"}))


def is_picture_name(name: str) -> bool:
    """By suffix, and not one of the files that macOS leaves beside the real ones (`._000.png`)."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES


def pictures_below(folder: Path) -> list[Path]:
    """All pictures in a folder and its sub-folders, sorted; links are followed, once each."""
    return sorted(_walk(folder), key=lambda path: path.as_posix())


def has_pictures(folder: Path) -> bool:
    return next(_walk(folder), None) is not None


def pictures_in(folder: Path) -> list[Path]:
    """Pictures directly in a folder, sorted."""
    return sorted(folder / name for name in os.listdir(folder) if is_picture_name(name))


def folders_in(folder: Path) -> list[Path]:
    """Sub-folders that may hold data, sorted; hidden ones and `__MACOSX` are passed over.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(folder)
            if _is_data_folder(entry.name) and entry.is_dir()
        )
    except OSError as error:
        _refuse_unlisted(error)


def child_named(folder: Path, names: Iterable[str]) -> Path | None:
    """The sub-folder with one of these names, in any case; the first of `names` wins."""
    by_name = {child.name.casefold(): child for child in folders_in(folder)}
    return next((by_name[name] for name in names if name in by_name), None)


def refuse_loose_pictures(folder: Path) -> None:
    """InputError if pictures lie directly in a folder whose sub-folders say what they show."""
    loose = pictures_in(folder)
    if loose:
        raise InputError(
            f"{shown(folder)}: holds {listed(path.name for path in loose[:1])} "
            f"({len(loose)} in all) beside its sub-folders, which name what pictures show; "
            "move every picture into one"
        )


def good_child(folder: Path) -> Path | None:
    """The sub-folder of good pictures, or None.

    Raises:
        InputError: several sub-folders have a name that means good.
    """
    found = [child for child in folders_in(folder) if is_good_name(child.name)]
    if len(found) > 1:
        raise InputError(
            f"{shown(folder)}: {listed(child.name for child in found)} all mean good; keep one"
        )
    return found[0] if found else None


def category_name(root: Path) -> str:
    """A root folder's name, also for `.` and `..`."""
    return Path(os.path.abspath(root)).name or "data"


def relative_id(path: Path, root: Path) -> str:
    """Path below the root with forward slashes; `../x` for a file outside."""
    return Path(os.path.relpath(path, root)).as_posix()


class MaskIndex:
    """Mask files of one category, found by the picture's stem and never by position.

    A picture `crack/000.png` has the masks `crack/000.*`, `crack/000_mask.*`, `crack/000_label.*`
    and everything in the folder `crack/000/` (one file per defect, as in LOCO). Where the mask
    folder has no sub-folder for the defect, masks directly in it are taken, if stems tell enough.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._by_defect: dict[str, dict[str, list[Path]]] = {}
        self._flat = _by_stem(folder, pictures_in(folder)) if folder else {}
        self._flat_owner: dict[str, Path] = {}

    def find(self, defect: str, stem: str, picture: Path) -> tuple[Path, ...]:
        """Masks of the picture with this path below its defect folder, without suffix.

        Raises:
            InputError: two pictures claim one mask of a folder that does not part the defects.
        """
        if self.folder is None:
            return ()
        if defect not in self._by_defect:
            child = self.folder / defect
            masks = pictures_below(child) if child.is_dir() else []
            self._by_defect[defect] = _by_stem(child, masks)
        found = self._by_defect[defect].get(stem, [])
        if not found and stem in self._flat:
            owner = self._flat_owner.setdefault(stem, picture)
            if owner.parent != picture.parent:
                raise InputError(
                    f"{shown(self._flat[stem][0])}: is the mask of {shown(owner)} or of "
                    f"{shown(picture)}; put masks into one sub-folder per defect"
                )
            found = self._flat[stem]
        return tuple(found)


def _by_stem(folder: Path, masks: list[Path]) -> dict[str, list[Path]]:
    index: dict[str, list[Path]] = {}
    for path in masks:
        relative = path.relative_to(folder).with_suffix("")
        index.setdefault(without_mask_ending(relative.as_posix()), []).append(path)
    for path in masks:  # stem/000.png, stem/001.png: several masks of one picture
        parent = path.relative_to(folder).parent.as_posix()
        if parent != ".":
            index.setdefault(parent, []).append(path)
    return index


def without_mask_ending(stem: str) -> str:
    for ending in MASK_ENDINGS:
        if stem.lower().endswith(ending):
            return stem[: -len(ending)]
    return stem


def _words(name: str) -> set[str]:
    """The words of a name, also where only a capital parts them: `OkParts`."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return set(re.findall(r"[^\W\d_]+", parted.casefold()))


def _is_data_folder(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _refuse_unlisted(error: OSError) -> NoReturn:
    raise InputError(
        f"{shown(error.filename)}: cannot be listed ({error.strerror}); "
        "check the path and its rights"
    ) from None


def _walk(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for parent, children, names in os.walk(folder, onerror=_refuse_unlisted, followlinks=True):
        real = os.path.realpath(parent)
        children[:] = sorted(filter(_is_data_folder, children)) if real not in visited else []
        if real not in visited:
            visited.add(real)
            yield from (Path(parent, name) for name in names if is_picture_name(name))
