"""Features of the frozen encoder on disk, so that a training runs the encoder once per picture.

root/<16 hex digits>/     one cache; the digits are a hash of everything that made the features
  index.json              that key in full, shapes, and per picture a checksum or why it has none
  features-0.bin, ...     one file per feature tensor, one row per picture, 2 bytes a number
root/<16 hex digits>.lock held while a cache is being verified or built

It is built in blocks of pictures, and the index is written after each, so a killed build goes on.
A block is always encoded in the same batches: a resumed build gives the same bits. Whatever does
not fit its checksum when the cache is opened is made again, and pictures that could not be read are
tried again.

Letters: B images, N all training pictures.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from allgood.progress import late_bar, say
from allgood.runs import read_json, write_json
from allgood.training.sources import OnlineFeatures, Source, read_ahead
from allgood.types import Failure, InputError, TrainingBatch

_FORMAT = 1
_BIG = 1 << 30
"""Bytes of a cache whose verification takes long enough for a progress bar."""


@dataclass
class _Index:
    """index.json: what of the cache counts."""

    key: dict[str, Any]
    """What made the features."""
    checksum: list[int | None]
    """(N,) crc32 of each picture's rows; None: not there."""
    shapes: list[list[int]] = field(default_factory=list)
    """Of one picture's features; empty before the first could be read."""
    dtype: str = "float16"
    """`bfloat16` where float16 overflows."""
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Unreadable pictures: position -> path and reason."""
    format: int = _FORMAT


class CachedFeatures:
    """A `Source` that reads its features from disk, and fills the disk from another one first."""

    def __init__(
        self,
        root: Path,
        key: Mapping[str, Any],
        online: OnlineFeatures,
        *,
        block: int = 64,
        batch_size: int = 16,
        quiet: bool = False,
    ) -> None:
        """Open the cache of `key`: verify it, and make what is missing.

        Other processes that open the same cache wait, and find it complete.

        Args:
            root: folder of all caches; created if missing.
            key: JSON-able; everything that decides the features, the list of pictures included.
            online: reads and encodes the pictures that are not there yet.
            block: pictures between two commits.
            batch_size: pictures encoded together.
            quiet: show nothing, for all processes but one.

        Raises:
            InputError: the encoder gives NaN or inf.
            OSError: the disk is full, among others; `filename` names the file.
        """
        self.folder = _cache_folder(root, key)
        self.category = online.category
        self.views = online.views
        self.device = online.device
        self._online = online
        self._block, self._batch_size, self._quiet = block, batch_size, quiet
        self._index = self._empty_index(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            for path in self.folder.glob(".*.tmp"):  # of a killed write
                path.unlink()
            self._read_index()
            self._verify()
            self._retry()
            missing = self._missing_blocks()
            if missing:
                self._say(f"building the feature cache {self.folder}")
                self._build(missing)
        self._rows = self._map()
        gigabytes = sum(rows.nbytes for rows in self._rows) / 1e9
        done = "built" if missing else "reused"
        self._say(f"feature cache {self.folder}: {len(self)} pictures, {gigabytes:.2f} GB, {done}")
        self.failures = {
            int(i): Failure(Path(path), reason)
            for i, (path, reason) in self._index.failures.items()
        }

    def __len__(self) -> int:
        return len(self.category)

    def batches(self, order: Iterable[Sequence[int]]) -> Generator[TrainingBatch, None, None]:
        """See `Source`. The next batch is read from disk while this one is used."""
        for index, rows in read_ahead(self._gather, order):
            features = tuple(row.to(self.device, non_blocking=True).float() for row in rows)
            yield TrainingBatch(features, self.category[index].to(self.device), index)

    def _gather(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        readable = [i for i in indices if i not in self.failures]
        index = torch.tensor(readable, dtype=torch.int64)
        if not readable:
            return index, []
        rows = [
            torch.from_numpy(file[readable]).view(self._dtype).view(-1, *shape)
            for file, shape in zip(self._rows, self._index.shapes, strict=True)
        ]
        return index, [row.pin_memory() for row in rows] if self.device.type == "cuda" else rows

    # -- opening ---------------------------------------------------------------------------------

    def _empty_index(self, key: Mapping[str, Any]) -> _Index:
        return _Index(key=json.loads(json.dumps(key)), checksum=[None] * len(self.category))

    def _read_index(self) -> None:
        """What an earlier run left, or an empty index where that is of no use."""
        try:
            found = _Index(**read_json(self.folder / "index.json"))
            fits = (found.format, found.key) == (_FORMAT, self._index.key)
            if not fits or len(found.checksum) != len(self):
                return
            for path, shape in zip(self._files(found), found.shapes, strict=True):
                if path.stat().st_size != len(self) * _row_bytes(shape):
                    return
        except (InputError, TypeError, OSError):
            return
        self._index = found

    def _verify(self) -> None:
        """Forget every row that differs from its checksum."""
        rows = self._map()
        there = [i for i, checksum in enumerate(self._index.checksum) if checksum is not None]
        is_big = sum(file.nbytes for file in rows) > _BIG and not self._quiet
        with late_bar("verifying the feature cache") as progress, ThreadPoolExecutor() as threads:
            found = threads.map(lambda i: _checksum([file[i] for file in rows]), there)
            for done, (i, checksum) in enumerate(zip(there, found, strict=True), 1):
                if checksum != self._index.checksum[i]:
                    self._index.checksum[i] = None
                if is_big:
                    progress(done, len(there))

    def _retry(self) -> None:
        """Read once more what could not be read. Only a picture that now can be read has its block
        made again; of the others today's path and reason count."""
        unread = [int(i) for i in self._index.failures]
        self._index.failures.clear()
        for begin in range(0, len(unread), self._batch_size):
            _, _, failures = self._online.read(unread[begin : begin + self._batch_size])
            self._note(failures)

    def _note(self, failures: Mapping[int, Failure]) -> None:
        for i, failure in failures.items():
            self._index.failures[str(i)] = [str(failure.path), failure.reason]

    def _missing_blocks(self) -> list[range]:
        blocks = [
            range(begin, min(begin + self._block, len(self)))
            for begin in range(0, len(self), self._block)
        ]
        return [block for block in blocks if not all(self._is_done(i) for i in block)]

    def _is_done(self, i: int) -> bool:
        return self._index.checksum[i] is not None or str(i) in self._index.failures

    def _map(self) -> list[np.ndarray]:
        """Per feature tensor (N, numbers) int16, read-only."""
        return [
            np.memmap(path, np.int16, mode="r", shape=(len(self), math.prod(shape)))
            for path, shape in zip(self._files(), self._index.shapes, strict=True)
        ]

    def _files(self, index: _Index | None = None) -> list[Path]:
        shapes = (index or self._index).shapes
        return [self.folder / f"features-{i}.bin" for i in range(len(shapes))]

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._index.dtype)

    # -- building --------------------------------------------------------------------------------

    def _build(self, missing: list[range]) -> None:
        try:
            self._fill(missing)
        except _Overflow:
            self._say("these features do not fit into float16: the cache is made in bfloat16")
            self._index = self._empty_index(self._index.key)
            self._index.dtype = "bfloat16"
            self._fill(self._missing_blocks())

    def _fill(self, missing: list[range]) -> None:
        """Encode these blocks and commit each."""
        order = [
            list(block[begin : begin + self._batch_size])
            for block in missing
            for begin in range(0, len(block), self._batch_size)
        ]
        last = {block[-1] for block in missing}
        done = len(self) - sum(len(block) for block in missing)
        with (
            late_bar("encoding pictures") as progress,
            closing(self._online.batches(order)) as batches,
        ):
            for indices, batch in zip(order, batches, strict=True):
                self._keep(indices, batch)
                done += len(indices)
                if not self._quiet:
                    progress(done, len(self))
                if indices[-1] in last:
                    self._commit()

    def _keep(self, indices: list[int], batch: TrainingBatch) -> None:
        """Write the rows of a batch, or note why there are none."""
        rows = [self._rounded(feature) for feature in batch.features]
        shapes = [list(feature.shape[1:]) for feature in batch.features]
        if rows and not self._index.shapes:
            self._index.shapes = shapes
            self._create_files()
        if rows and shapes != self._index.shapes:
            raise InputError(
                f"features of shape {shapes} do not belong into the cache {self.folder}, whose "
                f"shape is {self._index.shapes}: delete that folder"
            )
        readable = batch.index.tolist()
        for path, values in zip(self._files(), rows, strict=False):  # no rows: nothing readable
            with _errors_name(path), path.open("r+b") as file:
                for i, row in zip(readable, values, strict=True):
                    file.seek(i * row.nbytes)
                    file.write(row.tobytes())
        for position, i in enumerate(readable):
            self._index.checksum[i] = _checksum([values[position] for values in rows])
            self._index.failures.pop(str(i), None)
        self._note({i: self._online.failures[i] for i in set(indices) - set(readable)})

    def _rounded(self, feature: Tensor) -> np.ndarray:
        """(B, ...) float32 -> (B, numbers) int16, the bits of the cache's dtype."""
        if not feature.isfinite().all():
            raise InputError(
                "the encoder gave a feature that is NaN or infinite: choose other weights, "
                "or run the encoder in fp32"
            )
        if feature.abs().amax() > torch.finfo(self._dtype).max:
            raise _Overflow
        return feature.to(self._dtype).cpu().contiguous().view(torch.int16).flatten(1).numpy()

    def _create_files(self) -> None:
        for path, shape in zip(self._files(), self._index.shapes, strict=True):
            path.unlink(missing_ok=True)  # another process may still have mapped the old file
            with _errors_name(path), path.open("wb") as file:
                file.truncate(len(self) * _row_bytes(shape))

    def _commit(self) -> None:
        """All rows written so far count from now on."""
        for path in self._files():
            with _errors_name(path), path.open("r+b") as file:
                os.fsync(file.fileno())
        write_json(self.folder / "index.json", vars(self._index))

    def _say(self, text: str) -> None:
        if not self._quiet:
            say(text)


def cache_bytes(source: Source) -> int:
    """What the cache of a source takes on disk, judged by the first picture that can be read."""
    for i in range(len(source)):
        with closing(source.batches([[i]])) as batches:
            features = next(batches).features
        if features:
            return len(source) * sum(_row_bytes(feature.shape[1:]) for feature in features)
    return 0


def room_for(root: Path, key: Mapping[str, Any], num_bytes: int) -> bool:
    """Whether the disk has room for a cache, what is there of it already counted in.

    5 % of the cache, and at least 1 GB, are left free for others.
    """
    folder = _cache_folder(root, key)
    sizes = (getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.glob("*.bin"))
    missing = num_bytes - sum(sizes)
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    reserve = max(num_bytes // 20, 10**9)
    return missing <= 0 or shutil.disk_usage(existing).free >= missing + reserve


class _Overflow(Exception):
    """A feature does not fit into the cache's dtype."""


def _cache_folder(root: Path, key: Mapping[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_bytes(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape)


def _checksum(rows: Sequence[np.ndarray]) -> int:
    """crc32 over the rows of one picture, all features in turn."""
    checksum = 0
    for row in rows:
        checksum = zlib.crc32(row.data, checksum)
    return checksum


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """A full disk does not say which file it had no room for."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
