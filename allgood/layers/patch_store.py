"""Patch features of the good images on disk: within a memory budget, and proof against a kill.

A memory bank is chosen from all patches of all good images, and these may not fit into memory. The
budget and the number of images are known beforehand, so each image may keep the same number of
rows: where it has more, a random subset is taken, seeded by the image's id. What is kept therefore
depends neither on the order of the images nor on where an earlier run was killed.

Letters: B images, N patches per image, C channels, G length of the global feature, R rows.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allgood.types import Failure

_DTYPE = {
    "patches": np.float32,  # (R, C)
    "patch_category": np.int64,  # (R, 1)
    "patch_image": np.int64,  # (R, 1), a hash of the image's id
    "global_feature": np.float32,  # (images, G)
    "image_category": np.int64,  # (images, 1)
}
"""What stands in each file, row after row."""


class PatchStore:
    """Append-only files of rows, and a JSON file that says how much of them counts.

    Attributes:
        position: how many of the list's pictures are behind us, the unreadable ones included.
        failures: the unreadable ones among them.
        seen_rows: patches of the images that are kept, those that the budget left out included.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_images: int,
        only: Set[tuple[int, str]] | None = None,
        budget_bytes: int = 1 << 30,
        seed: int = 0,
    ) -> None:
        """Open the store in `folder`, or go on where an earlier run was killed.

        Args:
            folder: created if missing; holds nothing else.
            num_images: images whose patches are kept, for the share that each may have.
            only: category and id of those images; None: all. Of others there is the global feature.
            budget_bytes: what all rows together may take once they are in memory.
            seed: of the choice of rows.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.seed = seed
        self._only = only
        self._bytes_per_image = max(1, budget_bytes // max(1, num_images))
        self._commit_file = folder / "committed.json"
        self._committed: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        self.position = 0
        self.failures: list[Failure] = []
        self.seen_rows = 0
        if self._commit_file.exists():
            state = json.loads(self._commit_file.read_text())
            self._committed, self._columns = state["bytes"], state["columns"]
            self.position, self.seen_rows = state["position"], state["seen_rows"]
            self.failures = [Failure(Path(path), reason) for path, reason in state["failures"]]

    def rows_per_image(self, channels: int) -> int:
        """How many patches of `channels` float32 numbers an image may keep."""
        return max(1, self._bytes_per_image // (4 * channels))

    def add(
        self,
        ids: Sequence[str],
        patches: Sequence[Tensor],
        category: Tensor,
        global_feature: Tensor,
    ) -> None:
        """Append the patches of one batch; nothing counts before `commit`.

        Args:
            ids: of the images; seed the choice of rows.
            patches: per image (N, C) float32.
            category: (B,) int64.
            global_feature: (B, G) float32.
        """
        for id, rows, index in zip(ids, patches, category.tolist(), strict=True):
            if self._only is not None and (index, id) not in self._only:
                continue
            self.seen_rows += len(rows)
            limit = self.rows_per_image(rows.shape[1])
            if len(rows) > limit:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{id}".encode()))
                rows = rows[torch.randperm(len(rows), generator=generator)[:limit].sort().values]
            self._append("patches", rows.cpu().numpy())
            self._append("patch_category", np.full((len(rows), 1), index))
            self._append("patch_image", np.full((len(rows), 1), image_number(id)))
        self._append("global_feature", global_feature.cpu().numpy())
        self._append("image_category", category.cpu().numpy()[:, None])

    def commit(self, position: int, failures: Sequence[Failure]) -> None:
        """All that was added counts from now on, whenever the run is killed."""
        self.position, self.failures = position, list(failures)
        state = {
            "bytes": self._committed,
            "columns": self._columns,
            "position": position,
            "seen_rows": self.seen_rows,
            "failures": [[str(failure.path), failure.reason] for failure in failures],
        }
        temporary = self._commit_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._commit_file)

    def patches(self) -> tuple[Tensor, Tensor]:
        """All rows (R, C) float32 and their categories (R,) int64, in the order they were added."""
        return self._read("patches"), self._read("patch_category").squeeze(1)

    def patch_images(self) -> Tensor:
        """(R,) int64: rows with the same number come from images with the same id."""
        return self._read("patch_image").squeeze(1)

    def global_features(self) -> tuple[Tensor, Tensor]:
        """(images, G) float32 and the images' categories (images,) int64."""
        return self._read("global_feature"), self._read("image_category").squeeze(1)

    def _append(self, name: str, rows: np.ndarray) -> None:
        rows = np.ascontiguousarray(rows, dtype=_DTYPE[name])
        begin = self._committed.get(name, 0)
        self._columns[name] = rows.shape[1]
        path = self._file(name)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(begin)  # over whatever a killed run wrote and did not commit
            file.write(rows.tobytes())
        self._committed[name] = begin + rows.nbytes

    def _read(self, name: str) -> Tensor:
        dtype = np.dtype(_DTYPE[name])
        count = self._committed.get(name, 0) // dtype.itemsize
        numbers = np.fromfile(self._file(name), dtype, count) if count else np.empty(0, dtype)
        return torch.from_numpy(numbers).view(-1, self._columns.get(name, 1))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.{np.dtype(_DTYPE[name])}"


def image_number(id: str) -> int:
    """63 bits of a sample's id, the same in every process: by them a bank knows its own images."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") >> 1
