"""Regions that nobody should look at: the user's masks, their place in a run, their way to a batch.

A mask is (H, W) bool of any size, True where nobody should look; one per category.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from allgood.data.files import pictures_in
from allgood.data.images import read_image
from allgood.data.transforms import Transform
from allgood.runs import ignore_file, write_bytes
from allgood.types import InputError


def read_given(
    ignore: Path | None, known: Sequence[str], learned: Sequence[str]
) -> dict[str, np.ndarray]:
    """The user's masks by category: one file for all, or a folder of CATEGORY.png.

    Args:
        known: categories of the whole data, which a folder may name.
        learned: those of them whose masks are wanted.

    Raises:
        InputError: a mask that is white all over, has no white, or is of no category.
    """
    if ignore is None:
        return {}
    ignore = Path(ignore)
    if not ignore.is_dir():
        return dict.fromkeys(learned, _read(ignore))
    files = {path.stem: path for path in pictures_in(ignore)}
    unknown = [name for name in files if name not in known]
    if unknown or not files:
        raise InputError(
            f"{ignore}: expected masks named after categories ({', '.join(known)}), "
            f"found {unknown[0] if unknown else 'none'}"
        )
    return {name: _read(path) for name, path in files.items() if name in learned}


def _read(path: Path) -> np.ndarray:
    mask = read_image(path).max(axis=2) >= 128  # not > 0: a JPEG's black is not all black
    if not mask.any():
        raise InputError(
            f"{path}: has no white pixel (128 of 255 or above), so nothing would be ignored; paint "
            "white what is to be ignored"
        )
    if mask.mean() > 0.98:
        raise InputError(
            f"{path}: is white all over, so nothing is left to look at; paint white only "
            "what is to be ignored"
        )
    return mask


def write_masks(run: Path, masks: Mapping[str, np.ndarray]) -> None:
    """Into the run's folder, one PNG per category."""
    for name, mask in masks.items():
        path = ignore_file(run, name)
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        write_bytes(path, buffer.getvalue())


def read_masks(run: Path, categories: Sequence[str]) -> dict[str, np.ndarray]:
    """What `write_masks` wrote."""
    files = {name: ignore_file(run, name) for name in categories}
    return {name: read_image(path)[..., 0] > 0 for name, path in files.items() if path.is_file()}


def mask_digests(masks: Mapping[str, np.ndarray]) -> dict[str, str]:
    """16 hex digits per mask."""
    return {
        name: hashlib.blake2b(mask.tobytes() + str(mask.shape).encode(), digest_size=8).hexdigest()
        for name, mask in masks.items()
    }


def to_inputs(
    masks: Mapping[str, np.ndarray],
    categories: Sequence[str],
    original_sizes: Sequence[tuple[int, int]],
    transform: Transform,
) -> Tensor:
    """(B, 1, h, w) bool: each category's mask, scaled to each picture and through its transform.

    Args:
        masks: by category; a category may lack one.
        categories: of each picture.
        original_sizes: (height, width) of each picture.
    """
    inputs = []
    for category, size in zip(categories, original_sizes, strict=True):
        mask = masks.get(category, np.zeros((1, 1), dtype=bool))
        rows = np.arange(size[0]) * mask.shape[0] // size[0]
        columns = np.arange(size[1]) * mask.shape[1] // size[1]
        inputs.append(transform.mask_to_input(mask[np.ix_(rows, columns)]))
    return torch.stack(inputs)[:, None]


def hide(image: Tensor, ignore: Tensor) -> Tensor:
    """The image (B, 3, H, W) with grey where nobody should look (B, 1, H, W).

    The network looks far beyond one patch: left as it is, what stands in the ignored region would
    be felt around it.
    """
    return image.masked_fill(ignore, 0.5)
