"""What the doors' tests share: two products drawn by numpy with real defects, and a way to call."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from data_trees import save
from PIL import Image

from allgood.cli import main

SIZE = (72, 64)
"""(height, width), on purpose no square."""
IMAGE_SIZE = 64
TINY = ["--encoder", "test_efficientnet", "--weights", "random", "--image-size", "32"]
"""Options of a fit where only speed matters."""
DEFECT = (40, 16, 58, 34)
"""left, top, right, bottom of the planted defect."""


def part(category: str, seed: int, *, defective: bool = False) -> Image.Image:
    """A good part, or one with a dark hole at DEFECT: `wood` has brown stripes, `cloth` a weave."""
    generator = np.random.default_rng([seed, len(category)])
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    if category == "wood":
        grain = np.sin(rows / 3 + generator.uniform(0, 6) + 0.3 * np.sin(columns / 9))
        colour = np.array([170, 120, 70])
    else:
        grain = np.sin(rows * 1.1 + generator.uniform(0, 6)) * np.sin(columns * 1.1)
        colour = np.array([90, 110, 180])
    image = colour + 25 * grain[..., None] + generator.normal(0, 4, (*SIZE, 1))
    if defective:
        left, top, right, bottom = DEFECT
        image[top:bottom, left:right] = [25, 20, 30]
        image[top + 6 : top + 9, left:right] = [240, 240, 200]
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def mask() -> Image.Image:
    pixels = np.zeros(SIZE, np.uint8)
    left, top, right, bottom = DEFECT
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def draw_tree(
    root: Path,
    categories: tuple[str, ...] = ("wood", "cloth"),
    *,
    train: int = 48,
    good: int = 6,
    bad: int = 5,
) -> Path:
    """The MVTec layout with `train` good pictures per category, and masks."""
    for category in categories:
        folder = root / category
        for i in range(train):
            save(part(category, i), folder / "train" / "good" / f"{i:03}.png")
        for i in range(good):
            save(part(category, 1000 + i), folder / "test" / "good" / f"{i:03}.png")
        for i in range(bad):
            picture = part(category, 2000 + i, defective=True)
            save(picture, folder / "test" / "hole" / f"{i:03}.png")
            save(mask(), folder / "ground_truth" / "hole" / f"{i:03}_mask.png")
    return root


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


class Command:
    """`allgood WORD ...`, called as a user calls it but without a new process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> Answer:
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = self.capsys.readouterr()
        return Answer(code, out, err)

    def refused(self, *words: object) -> str:
        """The one sentence with which the command refuses; exit code 2."""
        answer = self(*words)
        lines = answer.err.splitlines()
        assert answer.code == 2, answer
        assert not answer.out
        assert lines[-1].startswith("allgood: "), answer.err
        assert "Traceback" not in answer.err
        return lines[-1].removeprefix("allgood: ")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
