"""Where anomalies may lie: on the object, where an even background surrounds one, else anywhere.

Otsu's threshold on grey, as in MemSeg and the CostFilter-AD code, whose modes are a hand-made list
per class; here they are chosen from good pictures. Letters: H W pixels.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from allgood.types import InputError
from allgood.wording import unknown

Foreground = Literal["off", "dark", "bright"]
"""Anywhere, or at most Otsu's threshold, or above it."""


def foreground_mask(image: np.ndarray, mode: Foreground) -> np.ndarray:
    """(H, W) bool: at or below Otsu's threshold (`dark`), above it (`bright`), or all (`off`)."""
    if mode == "off":
        return np.ones(image.shape[:2], bool)
    grey = _smooth_grey(image)
    threshold, _ = otsu(grey)
    return grey <= threshold if mode == "dark" else grey > threshold


def choose_foreground(images: Sequence[np.ndarray]) -> Foreground:
    """The mode for a category, from a few good pictures: what more than half of them ask for.

    A picture asks for a side of Otsu's threshold if the other side is an even background: it holds
    95 % of the border, the two sides explain 80 % of the grey levels' variance, the background
    varies by less than a quarter of the contrast, and the object fills 2 % to 85 % of the picture.
    All else, a texture that fills the picture or a part that leaves it, is `off`.
    """
    votes = Counter(_asks_for(image) for image in images)
    if not votes:
        return "off"
    mode, count = votes.most_common(1)[0]
    return mode if 2 * count > len(images) else "off"


def parse_foreground(words: Sequence[str], categories: Sequence[str]) -> dict[str, Foreground]:
    """`screw=dark` words -> {"screw": "dark"}.

    Raises:
        InputError: no such category or mode.
    """
    modes: dict[str, Foreground] = {}
    for word in words:
        category, _, mode = word.rpartition("=")
        if category not in categories:
            remedy = f"write CATEGORY=MODE, of {', '.join(categories)}"
            raise unknown(f"foreground '{word}' names no category", category, categories, remedy)
        if mode not in ("off", "dark", "bright"):
            raise InputError(
                f"foreground of '{category}' must be off, dark or bright, got '{mode}'"
            )
        modes[category] = mode  # type: ignore[assignment]
    return modes


def otsu(grey: np.ndarray) -> tuple[int, float]:
    """Otsu's threshold t of uint8 values, classes <= t and > t, and the share of the variance that
    lies between them; 0 where all values are equal."""
    count = np.bincount(grey.reshape(-1), minlength=256).astype(np.float64)
    level = np.arange(256)
    below = count.cumsum() / count.sum()
    mean = (count * level).cumsum() / count.sum()
    total = float((count * (level - mean[-1]) ** 2).sum() / count.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num((mean[-1] * below - mean) ** 2 / (below * (1 - below)), posinf=0)
    best = int(between.argmax())
    return best, float(between[best] / total) if total else 0.0


def _asks_for(image: np.ndarray) -> Foreground:
    grey = _smooth_grey(image)
    threshold, separation = otsu(grey)
    bright = grey > threshold
    ring = max(1, min(grey.shape) // 32)
    inner = np.zeros_like(bright)
    inner[ring:-ring, ring:-ring] = True
    bright_border = bright[~inner].mean()
    if separation < 0.8 or 0.05 < bright_border < 0.95:
        return "off"
    is_object = ~bright if bright_border > 0.5 else bright
    background, contrast = grey[~is_object], abs(grey[bright].mean() - grey[~bright].mean())
    if not 0.02 <= is_object.mean() <= 0.85 or background.std() > contrast / 4:
        return "off"
    return "dark" if bright_border > 0.5 else "bright"


def _smooth_grey(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8, without the specks that would make holes in a thresholded object."""
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.filter(ImageFilter.BoxBlur(max(1.0, min(image.shape[:2]) / 128))))
