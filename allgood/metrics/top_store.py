"""The highest scoring pixels of a test set, kept one by one.

An entry is one integer, key << 32 | owner, with the key of histogram.py. Every image has one owner
for its normal pixels and one per region, so owners tell the label, the region's weight and the
image; the owner's number is the place in the tables that the functions here are given.
"""

import numpy as np
from numpy.typing import NDArray

from allgood.metrics.histogram import KEY_END, Bins, Integers, Keys, concatenate

Entries = NDArray[np.uint64]

_CHUNK = 1 << 16
_KEY_SHIFT = np.uint64(32)
_OWNER_BITS = np.uint64(KEY_END - 1)


class TopStore:
    """All pixels whose key is at least `cut`.

    Args:
        limit: how many entries the store should hold at most once its owner has raised the cut;
            half as many more fit in between. None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.cut = 0
        self._buffer: Entries = np.empty(0, np.uint64)
        self._used = 0

    @property
    def entries(self) -> Entries:
        return self._buffer[: self._used]

    def has_room(self, count: int) -> bool:
        """Whether `count` more entries fit without raising the cut."""
        return self.limit is None or self._used + count <= self.limit + self._slack

    @property
    def _slack(self) -> int:
        return max((self.limit or 0) // 2, 2 * _CHUNK)

    def keep(self, entries: Entries) -> None:
        """Add entries, none below the cut."""
        needed = self._used + len(entries)
        if needed > len(self._buffer):
            size = 2 * needed
            if self.limit is not None:
                size = max(min(4 * needed, self.limit + self._slack), needed)
            grown = np.empty(size, np.uint64)
            grown[: self._used] = self.entries
            self._buffer = grown
        self._buffer[self._used : needed] = entries
        self._used = needed

    def raise_cut(self, cut: int) -> None:
        """Drop entries below `cut`; a lower cut than before changes nothing."""
        if cut <= self.cut:
            return
        self.cut = cut
        entries, dropped = self.entries, self._used
        if cut < KEY_END:
            dropped = int(np.count_nonzero(entries < np.uint64(cut << 32)))
        if 0 < dropped < self._used:
            entries.partition(dropped)  # in place, and faster than picking by a Boolean array
        self._used -= dropped
        self._buffer[: self._used] = entries[dropped:]

    def at_or_above_cut(self, entries: Entries) -> Entries:
        """Those of other entries that belong into this store."""
        if self.cut == KEY_END:
            return entries[:0]
        return entries[entries >= np.uint64(self.cut << 32)] if self.cut else entries

    def sort(self) -> None:
        self.entries.sort()

    def groups(self, owner_weight: Integers) -> tuple[Bins, Integers]:
        """Groups of equal score with a positive, descending, and the pixels above each.

        The entries must be sorted. `owner_weight` is 0 for owners of normal pixels.
        """
        ascending = self.entries
        parts: list[Bins] = []
        above: list[Integers] = []
        end = len(ascending)
        while end:
            # Chunks bound the memory; each begins where a group of equal scores begins.
            key = ascending[max(end - 2 * _CHUNK, 0)] >> _KEY_SHIFT << _KEY_SHIFT
            start = int(np.searchsorted(ascending, key))
            bins, first = _tie_groups(ascending[start:end][::-1], owner_weight)
            parts.append(bins)
            above.append(first + len(ascending) - end)
            end = start
        return concatenate(parts), np.concatenate([np.zeros(0, np.int64), *above])

    def renamed(self, owner: NDArray[np.uint64]) -> Entries:
        """Sorted entries with each owner replaced by owner[old number]."""
        old = (self.entries & _OWNER_BITS).astype(np.intp)
        return np.sort((self.entries >> _KEY_SHIFT << _KEY_SHIFT) | owner[old])


def make_entries(keys: Keys, owners: NDArray[np.int32] | None, first_owner: int) -> Entries:
    """Entries of pixels; owners count from `first_owner`, None for that one only."""
    entries = keys.astype(np.uint64)
    entries <<= _KEY_SHIFT
    if owners is not None:
        entries += owners.astype(np.uint64)
    entries += np.uint64(first_owner)
    return entries


def _tie_groups(entries: Entries, owner_weight: Integers) -> tuple[Bins, Integers]:
    """Groups of equal score with a positive among descending entries; and the entries above."""
    weight = owner_weight[(entries & _OWNER_BITS).astype(np.intp)]
    positive = np.flatnonzero(weight)
    keys = (entries >> _KEY_SHIFT).astype(np.uint32)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    group = np.searchsorted(starts, positive, side="right") - 1  # of each positive
    first = np.flatnonzero(np.diff(group, prepend=-1))  # the first positive of each group
    start = starts[group[first]]
    end = np.append(starts, len(keys))[group[first] + 1]
    weights = np.add.reduceat(weight[positive], first) if len(first) else first
    return Bins(keys[start], end - start, np.diff(first, append=len(positive)), weights), start
