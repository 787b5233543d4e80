"""Flips and quarter turns of training pictures, per category, as UniAS (Ma et al., WACV 2025) has.

They are the symmetries of the square: a picture has at most eight views. So a frozen encoder can
answer all of them once, and training draws one of the answers at each step.

Letters: H W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from allgood.types import InputError
from allgood.wording import unknown

if TYPE_CHECKING:  # recipes name augmentations, and are listed without loading torch
    from torch import Tensor

FLIP = 0.3
"""UniAS's probability of a flip, of each kind."""


class View(NamedTuple):
    """One of the eight ways to look at a square picture."""

    mirrored: bool = False
    """Left and right are exchanged, before any turn."""
    turns: int = 0
    """Quarter turns counter-clockwise, 0 to 3."""

    def of(self, image: Tensor) -> Tensor:
        """(..., H, W) -> the same shape.

        Raises:
            InputError: an odd number of quarter turns of what is no square.
        """
        height, width = image.shape[-2:]
        if self.turns % 2 and height != width:
            raise InputError(
                f"rotate needs a square input, got {height} x {width}: leave rotate out of "
                "--augment"
            )
        if self.mirrored:
            image = image.flip(-1)
        return image.rot90(self.turns, (-2, -1)) if self.turns else image


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training picture, one after the other and independently."""

    flip_horizontal: float = 0.0
    """Probability of exchanging left and right."""
    flip_vertical: float = 0.0
    """Probability of exchanging top and bottom."""
    rotate: bool = False
    """Turn by 0, 90, 180 or 270 degrees, each as likely."""

    def __post_init__(self) -> None:
        for name in ("flip_horizontal", "flip_vertical"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def shares(self) -> dict[View, float]:
        """How often a picture is seen in each view; the first is the picture as it is."""
        shares: dict[View, float] = defaultdict(float)
        for horizontal, often in ((False, 1 - self.flip_horizontal), (True, self.flip_horizontal)):
            for vertical, share in ((False, 1 - self.flip_vertical), (True, self.flip_vertical)):
                for turns in range(4) if self.rotate else (0,):
                    # A vertical flip is a horizontal one and half a turn.
                    view = View(horizontal != vertical, (turns + 2 * vertical) % 4)
                    shares[view] += often * share / (4 if self.rotate else 1)
        return {view: share for view, share in shares.items() if share > 0}


WORDS = {
    "flip": Augmentation(FLIP, FLIP),
    "flip_horizontal": Augmentation(flip_horizontal=FLIP),
    "flip_vertical": Augmentation(flip_vertical=FLIP),
    "rotate": Augmentation(rotate=True),
    "none": Augmentation(),
}
"""What a user may ask for."""


def augmentation(words: str) -> Augmentation:
    """Of `WORDS` with commas between, as `flip,rotate`.

    Raises:
        InputError: an unknown word; the message suggests the nearest.
    """
    whole = Augmentation()
    for word in words.split(","):
        if word not in WORDS:
            raise unknown(f"unknown augmentation '{word}'", word, WORDS)
        part = WORDS[word]
        whole = Augmentation(
            max(whole.flip_horizontal, part.flip_horizontal),
            max(whole.flip_vertical, part.flip_vertical),
            whole.rotate or part.rotate,
        )
    return whole


def augmentations(
    given: Mapping[str, Augmentation], asked: Iterable[str], categories: Sequence[str]
) -> dict[str, Augmentation]:
    """What happens to each category, those left out to which nothing does.

    Args:
        given: by category, of a recipe; those that are not among `categories` do not matter.
        asked: `CATEGORY=WORDS` by the user, instead of what is given; `all=WORDS` is for each
            category that is not named.
        categories: that are learned.

    Raises:
        InputError: a word or category that does not exist, or no `=`.
    """
    own = dict(given)
    named: dict[str, Augmentation] = {}
    for text in asked:
        category, equals, words = text.rpartition("=")
        if not equals:
            raise InputError(f"--augment '{text}' names no category: write all={text}")
        if category == "all":
            own = dict.fromkeys(categories, augmentation(words))
        elif category in categories:
            named[category] = augmentation(words)
        else:
            problem = f"--augment: no category '{category}' is learned"
            raise unknown(problem, category, categories)
    own |= named
    return {
        name: own[name] for name in categories if own.get(name, Augmentation()) != Augmentation()
    }


def asked_of(category: str, asked: Iterable[str]) -> tuple[str, ...]:
    """The texts of `augmentations` that concern this category."""
    return tuple(text for text in asked if text.rpartition("=")[0] in ("all", category))
