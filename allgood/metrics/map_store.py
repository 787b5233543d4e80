"""Whole maps of a test set, kept for a second look once a threshold is known.

They lie in a temporary file, 4 bytes per pixel, which the system keeps in memory while it has room
to spare. An image's scores are kept in the order of its pixels, and those of its positives once
more behind them.
"""

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]


class _File:
    """Only ever appended to, so that several stores may read from it."""

    def __init__(self) -> None:
        # Unbuffered: images are written and read whole.
        self.stream = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        weakref.finalize(self, self.stream.close)
        self.end = 0
        self._buffer = np.empty(0, np.float32)

    def append(self, scores: Scores) -> None:
        rest = np.ascontiguousarray(scores).data.cast("B")
        self.stream.seek(self.end)
        while rest:  # a disk may take a part
            written = self.stream.write(rest)
            self.end += written
            rest = rest[written:]

    def read(self, start: int, count: int) -> Scores:
        """Into memory that the next reading takes again."""
        if len(self._buffer) < count:
            self._buffer = np.empty(count, np.float32)
        scores = self._buffer[:count]
        self.stream.seek(start)
        self.stream.readinto(scores.data)
        return scores


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
        self._file: _File | None = None
        self._places: list[_Place] = []

    def append(self, scores: Scores, positives: Scores) -> None:
        """Keep an image: all its pixels (N,), and its positives (P,) once more."""
        if self.lost:
            return
        try:
            file = self._file = self._file or _File()
            place = _Place(file, file.end, len(scores), len(positives))
            file.append(scores)
            file.append(positives)
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
        """All pixels of an image, and its positives; only valid until another one is read."""
        place = self._places[index]
        both = place.file.read(place.start, place.pixels + place.positives)
        return both[: place.pixels], both[place.pixels :]

    def images(self) -> Iterator[tuple[Scores, Scores]]:
        return (self.image(index) for index in range(len(self._places)))

    def _drop(self, reason: str) -> None:
        self.lost = reason
        self._file, self._places = None, []
