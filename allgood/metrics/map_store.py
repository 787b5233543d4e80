"""Whole maps of a test set, kept for a second look once a threshold is known.

They lie in memory while they are few, then in a temporary file: 4 bytes per pixel, written once and
read front to back. An image's scores are kept in the order of its pixels, and those of its
positives once more behind them.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]

_IN_MEMORY = 1 << 23
"""Bytes of a store before it moves to the disk."""


class _File:
    """Only ever appended to, so that several stores may read from it."""

    def __init__(self) -> None:
        self.stream = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115, see __del__
        self.end = 0

    def __del__(self) -> None:
        self.stream.close()

    def append(self, scores: Scores) -> None:
        self.stream.seek(self.end)
        self.end += self.stream.write(np.ascontiguousarray(scores).data)

    def read(self, start: int, count: int) -> Scores:
        self.stream.seek(start)
        return np.frombuffer(self.stream.read(4 * count), np.float32)


@dataclass(frozen=True)
class _Place:
    file: _File
    start: int
    pixels: int
    positives: int


class MapStore:
    """Scores of images, in the order of their arrival.

    Attributes:
        lost: why nothing is kept any more, once the disk had no room; empty until then.
    """

    def __init__(self) -> None:
        self.lost = ""
        self._file = _File()
        self._places: list[_Place] = []

    def append(self, scores: Scores, positives: Scores) -> None:
        """Keep an image: all its pixels (N,), and its positives (P,) once more."""
        if self.lost:
            return
        place = _Place(self._file, self._file.end, len(scores), len(positives))
        try:
            self._file.append(scores)
            self._file.append(positives)
        except OSError as error:
            self._drop(f"no room for the maps in {tempfile.gettempdir()}: {error.strerror}")
        else:
            self._places.append(place)

    def merge(self, other: "MapStore") -> None:
        """Append the images of another store; they stay where they are."""
        if self.lost or other.lost:
            self._drop(self.lost or other.lost)
        else:
            self._places += other._places

    def image(self, index: int) -> tuple[Scores, Scores]:
        """All pixels of an image, and its positives."""
        place = self._places[index]
        both = place.file.read(place.start, place.pixels + place.positives)
        return both[: place.pixels], both[place.pixels :]

    def images(self) -> Iterator[tuple[Scores, Scores]]:
        return (self.image(index) for index in range(len(self._places)))

    def _drop(self, reason: str) -> None:
        self.lost = reason
        self._file, self._places = _File(), []
