"""Behind `synthesize`: which anomalies into which pictures, drawn, and written as one folder."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from allgood.data.files import PICTURE_SUFFIXES
from allgood.data.fingerprint import content_digest
from allgood.data.foreground import Foreground, choose_foreground, parse_foreground
from allgood.data.images import read_image
from allgood.data.readers import Dataset
from allgood.data.splits import good_split
from allgood.data.synthesis import Synthesizer, seeded
from allgood.data.transforms import Transform
from allgood.evaluation.overlay import mask_outline, shrink
from allgood.progress import bar
from allgood.runs import file_name
from allgood.types import Failure, InputError, Sample
from allgood.wording import shown as printable

DEFECT = "synthetic"
"""Folder of the drawn pictures, in test/ and ground_truth/."""

_LOOKS = 8
"""Good pictures per category from which the foreground is chosen."""
_SHOWN, _SHOWN_PER_CATEGORY = 96, 24
_THUMBNAIL = 200


@dataclass(frozen=True)
class _Task:
    """What becomes of one good picture."""

    sample: Sample
    name: str
    """Of its files, without suffix; unique in its category and split."""
    split: Literal["train", "test"]
    draws: int
    shown: frozenset[int]
    """Draws that go onto the contact sheet."""


@dataclass(frozen=True)
class _Done:
    digest: str = ""
    """Of the good picture's file."""
    files: tuple[str, ...] = ()
    """Below the root: the pictures that were made from it, the good one and those drawn into."""
    entries: tuple[Mapping[str, Any], ...] = ()
    shown: tuple[tuple[str, tuple[np.ndarray, ...]], ...] = ()
    """Caption, and the thumbnails good, synthetic, synthetic with the mask's outline."""
    failure: Failure | None = None


def plan_draws(
    dataset: Dataset, count: int, total: int | None, train_share: float, seed: int
) -> list[_Task]:
    train, test = [], []
    for category in dataset.categories:
        good = [s for s in dataset.samples if s.category == category and s.is_good]
        sides = [sample.split for sample in good]
        if "test" not in sides:
            sides = _split(good, train_share, seed)
        train += [sample for sample, side in zip(good, sides, strict=True) if side == "train"]
        test += [sample for sample, side in zip(good, sides, strict=True) if side == "test"]
    if not test:
        raise InputError("the data hold no good pictures: anomalies are drawn into good ones")
    draws = [count] * len(test)
    if total is not None:
        order = seeded(seed, "order").permutation(len(test))
        for place, i in enumerate(order):
            draws[i] = (total + len(test) - 1 - place) // len(test)
    shown = _shown(test, draws)
    tasks = [
        _Task(sample, name, "train", 0, frozenset())
        for sample, name in zip(train, _names(train), strict=True)
    ]
    for i, (sample, name) in enumerate(zip(test, _names(test), strict=True)):
        tasks.append(_Task(sample, name, "test", draws[i], frozenset(shown.get(i, ()))))
    return tasks


def _split(good: Sequence[Sample], train_share: float, seed: int) -> list[Literal["train", "test"]]:
    """The seeded split, with at least one picture for testing."""
    sides = [good_split(s.id, s.group, train_share=train_share, seed=seed) for s in good]
    if good and "test" not in sides:
        sides[-1] = "test"
    return sides


def _shown(test: Sequence[Sample], draws: Sequence[int]) -> dict[int, list[int]]:
    """Index of the test picture -> draws for the contact sheet, evenly over each category's."""
    categories = sorted({sample.category for sample in test})
    most = min(_SHOWN_PER_CATEGORY, max(1, _SHOWN // len(categories)))
    shown: dict[int, list[int]] = {}
    for category in categories:
        every = [
            (i, draw)
            for i, sample in enumerate(test)
            if sample.category == category
            for draw in range(draws[i])
        ]
        for place in range(min(most, len(every))):
            i, draw = every[place * len(every) // min(most, len(every))]
            shown.setdefault(i, []).append(draw)
    return shown


def _names(samples: Sequence[Sample]) -> list[str]:
    """The file's stem; where a category has several of one stem, with a number behind it."""
    seen: dict[tuple[str, str], int] = {}
    names = []
    for sample in samples:
        name = sample.path.stem
        while (sample.category, name.casefold()) in seen:
            key = (sample.category, sample.path.stem.casefold())
            seen[key] += 1
            name = f"{sample.path.stem}-{seen[key]}"
        seen[sample.category, name.casefold()] = 1
        names.append(name)
    return names


def foregrounds(
    dataset: Dataset, asked: Literal["auto", "off", "dark", "bright"], overrides: Sequence[str]
) -> dict[str, Foreground]:
    given = parse_foreground(overrides, dataset.categories)
    small = Transform(256)
    modes: dict[str, Foreground] = {}
    for category in dataset.categories:
        if category in given:
            modes[category] = given[category]
            continue
        if asked != "auto":
            modes[category] = asked
            continue
        looks: list[np.ndarray] = []
        for sample in dataset.samples:
            if sample.category == category and sample.is_good and len(looks) < _LOOKS:
                try:
                    looks.append(_resized(read_image(sample.path), small))
                except InputError:  # listed when it is to be drawn on
                    continue
        modes[category] = choose_foreground(looks)
    return modes


def _resized(image: np.ndarray, transform: Transform | None) -> np.ndarray:
    """(H, W, 3) -> (h, w, 3) uint8."""
    return image if transform is None else transform.resize(image).permute(1, 2, 0).numpy()


# -- drawing and writing -------------------------------------------------------------------------


def draw_all(
    plan: Sequence[_Task], root: Path, synthesizer: Synthesizer, image_size: int | None
) -> list[_Done]:
    for category in sorted({task.sample.category for task in plan}):
        folder = root / file_name(category)
        for part in ("train/good", "test/good", f"test/{DEFECT}", f"ground_truth/{DEFECT}"):
            (folder / part).mkdir(parents=True)
    transform = None if image_size is None else Transform(image_size)
    done: list[_Done] = []
    pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="allgood-draw")
    try:
        jobs = [pool.submit(_draw_one, task, root, synthesizer, transform) for task in plan]
        with bar("drawing anomalies into good pictures", len(jobs)) as progress:
            for job in jobs:
                done.append(job.result())
                progress.at(len(done))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if not any(item.entries for item in done):
        first = next(item.failure.reason for item in done if item.failure is not None)
        raise InputError(f"no good test picture could be drawn on; the first: {first}")
    return done


def _draw_one(
    task: _Task, root: Path, synthesizer: Synthesizer, transform: Transform | None
) -> _Done:
    sample, folder = task.sample, root / file_name(task.sample.category)
    suffix = sample.path.suffix
    try:
        image = _resized(read_image(sample.path), transform)
        draws = [
            synthesizer.draw(image, category=sample.category, picture=sample.id, index=index)
            for index in range(task.draws)
        ]
    except InputError as error:
        reason = str(error)
        if not reason.startswith(printable(sample.path)):
            reason = f"{printable(sample.path)}: {reason}"
        return _Done(failure=Failure(sample.path, reason))
    good = folder / task.split / "good" / f"{task.name}.png"
    if transform is None and suffix.lower() in PICTURE_SUFFIXES:
        # The very bytes: an evaluation still knows which pictures the run has learned from.
        good = good.with_name(f"{task.name}{suffix}")
        shutil.copyfile(sample.path, good)
    else:
        save_png(good, image)
    files = [good.relative_to(root).as_posix()]
    entries, looks = [], []
    for index, draw in enumerate(draws):
        picture = folder / "test" / DEFECT / f"{task.name}_{index:03}.png"
        mask = folder / "ground_truth" / DEFECT / f"{task.name}_{index:03}_mask.png"
        save_png(picture, draw.image)
        save_png(mask, draw.mask.astype("uint8") * 255)
        files.append(picture.relative_to(root).as_posix())
        entries.append(
            {
                "picture": picture.relative_to(root).as_posix(),
                "mask": mask.relative_to(root).as_posix(),
                "from": printable(sample.path),
                "draw": index,
                "source": draw.source,
            }
        )
        if index in task.shown:
            outlined = mask_outline(draw.image, draw.mask)
            thumbnails = tuple(shrink(each, _THUMBNAIL) for each in (image, draw.image, outlined))
            looks.append((f"{sample.category}  {draw.source}", thumbnails))
    return _Done(content_digest(sample.path), tuple(files), tuple(entries), tuple(looks))


def save_png(path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(path, compress_level=4)


def contact_sheet(looks: Sequence[tuple[str, tuple[np.ndarray, ...]]]) -> np.ndarray:
    """Two looks in a row, each with its caption above: good, synthetic, the mask's outline."""
    gap, line = 8, 18
    columns = min(2, len(looks))
    rows = [looks[i : i + columns] for i in range(0, len(looks), columns)]
    heights = [max(len(p) for _, pictures in row for p in pictures) + line + gap for row in rows]
    width = 3 * (_THUMBNAIL + 2) + 2 * gap
    sheet = Image.new("RGB", (columns * width, sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, (caption, pictures) in enumerate(row):
            left = i * width + gap
            # Pillow's own font knows few letters beyond ASCII.
            pen.text((left, top + 3), caption.encode("ascii", "replace").decode(), fill="black")
            for j, picture in enumerate(pictures):
                sheet.paste(Image.fromarray(picture), (left + j * (_THUMBNAIL + 2), top + line))
        top += height
    return np.asarray(sheet)


# -- the folder ----------------------------------------------------------------------------------


def require_empty(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: name a folder with --out")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"folder '{out}' is not empty: name another one with --out")
    if os.path.ismount(os.path.realpath(out)):
        raise InputError(
            f"folder '{out}' is a mount point, which cannot be replaced: name a folder in it "
            "with --out"
        )


@contextmanager
def built_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place at the end; on failure nothing stays."""
    out = Path(os.path.realpath(out))  # a link stays, and leads to the new folder
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"folder '{out}' cannot be made: a part of its path is a file; "
            "name another one with --out"
        ) from None
    try:
        shutil.rmtree(building, ignore_errors=True)  # of a killed process with the same number
        building.mkdir()
        yield building
        os.replace(building, out)  # an empty folder may give way, a filled one may not
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
