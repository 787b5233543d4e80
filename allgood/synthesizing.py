"""Door: good pictures -> pictures with made-up anomalies, their masks, and a sheet to look at.

data read -> foreground chosen -> anomalies drawn beside OUT -> moved to OUT as a whole
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from allgood.types import Failure, InputError, Sample

if TYPE_CHECKING:
    import numpy as np

    from allgood.data.foreground import Foreground
    from allgood.data.readers import Dataset
    from allgood.data.synthesis import Synthesizer
    from allgood.data.transforms import Transform

DEFECT = "synthetic"
"""Folder of the drawn pictures, in test/ and ground_truth/."""
SHEET = "contact_sheet.png"

_LOOKS = 8
"""Good pictures per category from which the foreground is chosen."""
_SHOWN, _SHOWN_PER_CATEGORY = 96, 24
_THUMBNAIL = 200


def synthesize(
    data: list[Path],
    *,
    out: Path = Path("synthetic"),
    count: int = 1,
    total: int | None = None,
    image_size: int | None = None,
    textures: Path | None = None,
    foreground: Literal["auto", "off", "dark", "bright"] = "auto",
    foreground_of: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    layout: str | None = None,
    categories: tuple[str, ...] | None = None,
    train_share: float = 0.8,
    seed: int = 0,
) -> Path:
    """Draw anomalies into good pictures: a data set with masks where no defects were ever seen.

    OUT has the MVTec layout, so every command reads it: the good training pictures in train/good,
    the good test pictures in test/good and, with anomalies, in test/synthetic; masks in
    ground_truth/synthetic. Where the data have no good test pictures, some of the training ones
    are taken for it. Beside them lie contact_sheet.png, to look at, and synthesis.json, which says
    what was drawn into what. Synthesize first, then fit on OUT: an evaluation leaves out what was
    drawn into pictures that the run has seen.

    Args:
        data: folders or manifests, as for fitting.
        out: a new or empty folder.
        count: anomalies per good test picture.
        total: so many in all instead, spread over the pictures in an order that the seed gives.
        image_size: side of a square to which pictures are squashed; default: their own size.
        textures: folder of pictures whose texture may appear; default: procedural textures.
        foreground: where anomalies may lie: off (anywhere), on the dark or the bright side of the
            picture, or auto: chosen per category, the object where an even background surrounds it.
        foreground_of: of single categories, as CATEGORY=MODE.
        settings: of the synthesis, as name=value, e.g. scratch=2 texture=0 min_change=20.
        layout: how the data lie on disk, where it is not recognised; see `allgood list datasets`.
        categories: only these; default: all that the data hold.
        train_share: share of the good pictures that is for training, where disk does not say.
        seed: of all random choices.

    Returns:
        the folder.

    Raises:
        InputError: anything given that cannot be used, in one sentence.
    """
    arguments = dict(locals())
    from allgood.data.fingerprint import SYNTHESIS_RECORD
    from allgood.data.readers import read_data
    from allgood.data.synthesis import SynthesisConfig, Synthesizer
    from allgood.options import require_at_least
    from allgood.progress import say
    from allgood.recipes import configured
    from allgood.runs import command_line, write_json

    require_at_least(1, count=count, total=total, image_size=image_size)
    require_at_least(0, seed=seed)
    # Whatever the settings say: a clean draw would be a good picture among the defective.
    config = replace(configured(SynthesisConfig, {}, settings), clean_probability=0.0)
    out = Path(os.path.abspath(out))
    _refuse(out)
    roots = [data] if isinstance(data, str | Path) else list(data)
    dataset = read_data(roots, layout=layout, train_share=train_share, seed=seed)
    dataset = dataset.only(categories) if categories else dataset
    plan = _plan(dataset, count, total, train_share, seed)
    modes = _foregrounds(dataset, foreground, foreground_of)
    synthesizer = Synthesizer(config, seed=seed, textures=textures, foreground=modes)
    with _built_beside(out) as building:
        done = _draw_all(plan, building, synthesizer, image_size)
        _save(building / SHEET, _sheet([pair for item in done for pair in item.shown]))
        entries = [entry for item in done for entry in item.entries]
        record = {
            "command": command_line(synthesize, arguments),
            "seed": seed,
            "settings": asdict(config),
            "foreground": modes,
            "pictures": entries,
            "made_from": {name: item.digest for item in done for name in item.files},
        }
        write_json(building / SYNTHESIS_RECORD, record)
    say(f"drew {len(entries)} anomalies; foreground: {_words(modes)}; look at {out / SHEET}")
    for reason in (
        *(item.failure.reason for item in done if item.failure is not None),
        *synthesizer.unreadable.values(),
    ):
        say(f"left out: {reason}")
    return out


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


def _plan(
    dataset: Dataset, count: int, total: int | None, train_share: float, seed: int
) -> list[_Task]:
    from allgood.data.synthesis import seeded

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
    from allgood.data.splits import good_split

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


def _foregrounds(
    dataset: Dataset, asked: Literal["auto", "off", "dark", "bright"], overrides: Sequence[str]
) -> dict[str, Foreground]:
    from allgood.data.foreground import choose_foreground, parse_foreground
    from allgood.data.images import read_image
    from allgood.data.transforms import Transform

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


def _draw_all(
    plan: Sequence[_Task], root: Path, synthesizer: Synthesizer, image_size: int | None
) -> list[_Done]:
    from allgood.data.transforms import Transform
    from allgood.progress import bar

    for category in sorted({task.sample.category for task in plan}):
        folder = root / _folder_name(category)
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
    from allgood.data.files import PICTURE_SUFFIXES
    from allgood.data.fingerprint import content_digest
    from allgood.data.images import read_image
    from allgood.evaluation.overlay import mask_outline, shrink
    from allgood.wording import shown

    sample, folder = task.sample, root / _folder_name(task.sample.category)
    suffix = sample.path.suffix
    try:
        image = _resized(read_image(sample.path), transform)
        draws = [
            synthesizer.draw(image, category=sample.category, picture=sample.id, index=index)
            for index in range(task.draws)
        ]
    except InputError as error:
        reason = str(error)
        if not reason.startswith(shown(sample.path)):
            reason = f"{shown(sample.path)}: {reason}"
        return _Done(failure=Failure(sample.path, reason))
    good = folder / task.split / "good" / f"{task.name}.png"
    if transform is None and suffix.lower() in PICTURE_SUFFIXES:
        # The very bytes: an evaluation still knows which pictures the run has learned from.
        good = good.with_name(f"{task.name}{suffix}")
        shutil.copyfile(sample.path, good)
    else:
        _save(good, image)
    files = [good.relative_to(root).as_posix()]
    entries, looks = [], []
    for index, draw in enumerate(draws):
        picture = folder / "test" / DEFECT / f"{task.name}_{index:03}.png"
        mask = folder / "ground_truth" / DEFECT / f"{task.name}_{index:03}_mask.png"
        _save(picture, draw.image)
        _save(mask, draw.mask.astype("uint8") * 255)
        files.append(picture.relative_to(root).as_posix())
        entries.append(
            {
                "picture": picture.relative_to(root).as_posix(),
                "mask": mask.relative_to(root).as_posix(),
                "from": shown(sample.path),
                "draw": index,
                "source": draw.source,
            }
        )
        if index in task.shown:
            outlined = mask_outline(draw.image, draw.mask)
            thumbnails = tuple(shrink(each, _THUMBNAIL) for each in (image, draw.image, outlined))
            looks.append((f"{sample.category}  {draw.source}", thumbnails))
    return _Done(content_digest(sample.path), tuple(files), tuple(entries), tuple(looks))


def _folder_name(category: str) -> str:
    """Whatever a manifest calls a category, it is one folder in OUT."""
    return re.sub(r"^\.|[%/\\:\0]", lambda found: f"%{ord(found[0]):02X}", category)


def _save(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, compress_level=4)


def _sheet(looks: Sequence[tuple[str, tuple[np.ndarray, ...]]]) -> np.ndarray:
    """Two looks in a row, each with its caption above: good, synthetic, the mask's outline."""
    import numpy as np
    from PIL import Image, ImageDraw

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


def _words(modes: Mapping[str, str]) -> str:
    """`bottle bright, tile off`; one word where all are alike."""
    alike = set(modes.values())
    if len(alike) == 1:
        return alike.pop()
    return ", ".join(f"{category} {mode}" for category, mode in modes.items())


# -- the folder ----------------------------------------------------------------------------------


def _refuse(out: Path) -> None:
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
def _built_beside(out: Path) -> Iterator[Path]:
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
