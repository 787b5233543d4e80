"""Safe reading of pictures and masks: numpy arrays, or an InputError of one sentence.

A picture is decoded by its content, never by its name. Whatever a broken file makes Pillow do, the
caller sees an `InputError` that names the file, and nothing on stderr (save the line that libtiff
itself, in C, writes for a damaged compressed TIFF). Needs numpy and Pillow only.
Letters: H W pixels of the picture, h w pixels of the mask file.
"""

import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from allgood.types import InputError
from allgood.wording import shown

MAX_PIXELS = 100_000_000
"""Pictures above this are refused before they are decoded; about 300 MB as RGB."""

# Pillow opens many more, one of them (EPS) by starting a program; a camera writes none of those.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")


def read_image(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as people see it: (H, W, 3) uint8 RGB, in the displayed orientation.

    16-bit grey is divided by 257 (full range to full range, never stretched per picture), alpha is
    composited over black, of several frames the first is taken, EXIF orientation is applied.

    Raises:
        InputError: missing, not a regular file, empty, not a picture, damaged, more than
            `max_pixels` pixels (Pillow's own limit, 178,956,970, stays above it), floating-point
            pixels, or 32-bit integers outside 0 to 65535.
    """
    return read_oriented_image(path, max_pixels=max_pixels)[0]


def read_oriented_image(
    path: Path | str, *, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, int]:
    """`read_image` and the EXIF orientation (1 to 8) it applied, for `read_mask`."""
    return _decode(path, _to_rgb, max_pixels)


def read_mask(
    paths: Sequence[Path | str],
    *,
    size: tuple[int, int],
    threshold: int = 1,
    orientation: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The union of mask files: (H, W) bool, True where the part is anomalous.

    Each file is binarised at its own size: 8-bit value >= threshold (of colour the largest
    channel), 16 bits and float: nonzero if the threshold is 1, else value / 257 >= threshold. A
    palette that is grey, with black, counts by its values, any other by index != 0. Alpha is
    ignored. A mask that fits the displayed size is taken as it is; one that fits only the size as
    stored is turned like the picture. Of another size with the same aspect ratio, it is resized to
    `size` with nearest.

    Args:
        paths: mask files of one picture; none gives an all-False mask.
        size: (H, W) of the picture as displayed.
        threshold: 1 to 255.
        orientation: what `read_oriented_image` said of the picture.

    Raises:
        InputError: as `read_image`, or the mask's shape is not the picture's.
    """
    if not 1 <= threshold <= 255:
        raise InputError(f"a mask threshold must be between 1 and 255, got {threshold}")
    union = np.zeros(size, dtype=bool)
    for path in paths:
        mask, _ = _decode(path, lambda image: _to_bool(image, threshold), max_pixels)
        stored = mask.shape
        if orientation >= 5 and not _same_aspect(stored, size) and _same_aspect(stored[::-1], size):
            mask = _turn(mask, orientation)
        if not _same_aspect(mask.shape, size):
            raise InputError(
                f"{shown(path)}: the mask is {stored[1]}x{stored[0]} pixels but its picture is "
                f"{size[1]}x{size[0]}; export the mask at the picture's size"
            )
        union |= _resize_nearest(mask, size)
    return union


# -- decoding ------------------------------------------------------------------------------------


def _decode(
    path: Path | str, convert: Callable[[Image.Image], np.ndarray], max_pixels: int
) -> tuple[np.ndarray, int]:
    """Decode one file, convert it, turn it upright; also the orientation that was applied."""
    name = shown(path)
    with _open(path) as file, _quiet_pillow():
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_pixels(image.size, max_pixels, name)
                # Pillow turns a TIFF while loading it and forgets the tag, so ask before.
                turned = _orientation(image) if image.format == "TIFF" else 1
                image.load()
                left = _orientation(image)
                array = _turn(convert(image), left)
        except _Refused as error:
            raise InputError(f"{name}: {error}") from None
        except InputError:
            raise
        except UnidentifiedImageError:
            raise InputError(
                f"{name}: not a picture that can be read; save it as PNG, JPEG, TIFF, BMP or WebP"
            ) from None
        except Image.DecompressionBombError:
            raise InputError(
                f"{name}: more pixels than Pillow reads; crop it or make it smaller"
            ) from None
        except MemoryError:
            raise InputError(f"{name}: does not fit into memory; make it smaller") from None
        # A damaged file comes out of Pillow's plugins as any exception there is: OSError,
        # SyntaxError, ValueError, struct.error, KeyError, ... All mean the same to the user.
        except Exception as error:
            raise InputError(
                f"{name}: the picture is cut off or damaged ({_reason(error)}); "
                "copy it again or leave it out"
            ) from error
    return array, left if left != 1 else turned


def _open(path: Path | str) -> BinaryIO:
    name = shown(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{name}: is a folder, not a picture; name a file in it")
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device may never end
            raise InputError(f"{name}: is not a regular file; copy the picture into a file")
        if status.st_size == 0:
            raise InputError(f"{name}: the file is empty (0 bytes); copy it again or leave it out")
        return open(path, "rb")
    except FileNotFoundError:
        if os.path.islink(path):
            raise InputError(f"{name}: the link leads nowhere; mend it or leave it out") from None
        raise InputError(f"{name}: no such file; check the path") from None
    except PermissionError:
        raise InputError(f"{name}: reading is not permitted; change the file's rights") from None
    except InputError:  # a ValueError, so it must pass before the next clause
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be opened ({_reason(error)}); check the path") from None


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{name}: the picture has no pixels ({width}x{height}); leave it out")
    if width * height > max_pixels:
        raise InputError(
            f"{name}: {width}x{height} pixels are more than the limit of {max_pixels:,}; "
            "crop it or make it smaller"
        )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:117] + "...") if len(text) > 120 else text or type(error).__name__


class _Refused(Exception):
    """A picture that decodes but whose pixels have no agreed meaning; becomes an InputError."""


_pillow_log = logging.getLogger("PIL")
_quiet_lock = threading.Lock()
_quiet_readers = 0


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """No warning or log line of Pillow on stderr while any thread reads.

    `warnings.catch_warnings` swaps the whole filter list and so breaks when threads overlap; one
    entry, put in by the first reader and taken out by the last, does not.
    """
    global _quiet_readers
    with _quiet_lock:
        _quiet_readers += 1
        if not _pillow_log.handlers:  # without any, logging writes to stderr
            _pillow_log.addHandler(logging.NullHandler())
        if not _our_filters():
            warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_readers -= 1
            if _quiet_readers == 0:
                for entry in _our_filters():
                    warnings.filters.remove(entry)  # type: ignore[attr-defined]


def _our_filters() -> list[tuple]:
    return [f for f in warnings.filters if f[0] == "ignore" and _pattern(f[3]) == r"PIL\."]


def _pattern(module: object) -> object:
    return getattr(module, "pattern", module)


# -- pixels --------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, writable and contiguous."""
    if image.mode == "F":
        raise _Refused("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16, I;16B, I;16L, I;16N and I
        grey = _sixteen_to_eight(np.array(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _sixteen_to_eight(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise _Refused("32-bit pixels outside 0 to 65535; save it with 8 or 16 bits")
    return ((values + 128) // 257).astype(np.uint8)  # rounded; 65535 -> 255


def _to_bool(image: Image.Image, threshold: int) -> np.ndarray:
    """(h, w) bool at the mask's own size."""
    if image.mode in ("P", "PA"):
        index = np.array(image.getchannel(0))
        greys = _greys_of_palette(image, index)
        return index != 0 if greys is None else greys[index] >= threshold
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.array(image)
        if threshold == 1:
            return values != 0
        if image.mode == "F":
            raise _Refused(
                f"a floating-point mask cannot be cut at {threshold}; save it with 8 bits"
            )
        return _sixteen_to_eight(values) >= threshold
    if image.mode == "1":
        return np.array(image)
    if image.mode in ("L", "LA"):
        return np.array(image.getchannel(0)) >= threshold
    # The largest channel: weighing blue by 0.11 would round a small label value to nothing.
    return np.array(image.convert("RGB")).max(axis=2) >= threshold


def _greys_of_palette(image: Image.Image, index: np.ndarray) -> np.ndarray | None:
    """(256,) uint8: grey of each index, where the used ones are greys and black is one of them.

    Any order of entries is then a mask drawn in black and white, as it comes out of a conversion to
    GIF. Colours are names of labels (VOC), and so are entries that look alike: None.
    """
    entries = np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    entries[: len(stored)] = stored
    used = entries[np.unique(index)]
    greys = used[:, 0]
    if (used != greys[:, None]).any() or greys.min() > 0 or len(np.unique(greys)) < len(greys):
        return None
    return entries[:, 0]


# -- geometry ------------------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises anything; the pixels are still good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Stored rows and columns to displayed ones, EXIF 2.3 section 4.6.4 A."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _same_aspect(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether one scale, with both sides rounded to whole pixels, leads from size to shape."""
    (h, w), (height, width) = shape, size
    return (2 * h - 1) * width < (2 * w + 1) * height and (2 * w - 1) * height < (2 * h + 1) * width


def _resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if mask.shape == size:
        return mask
    rows = (2 * np.arange(size[0]) + 1) * mask.shape[0] // (2 * size[0])
    columns = (2 * np.arange(size[1]) + 1) * mask.shape[1] // (2 * size[1])
    return mask[rows[:, None], columns]
