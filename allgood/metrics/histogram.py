"""A mergeable histogram over the order-preserving integer of a float32 score.

Key. The bits of a float32, with all bits flipped if negative and the top bit set otherwise, order
as unsigned 32-bit integers exactly like the numbers; -0.0 is made 0.0 first.

Pages. A fixed grid of bins over all keys is either huge or coarse: one exact 0 beside 1e-3 spans a
hundred empty binades. So a *page* is the 2^20 keys with the same upper 12 bits (an eighth of a
binade), and only pages that occur get bins, 2^(20 - shift) each. That makes clamping small scores
to a floor unnecessary: a lone 0 costs one page. `shift` is the smallest that keeps all pages within
`max_bins`; when pages are added and it must rise, neighbouring bins are added in pairs. Bins are
aligned to absolute keys and the set of pages only depends on the scores, so the final histogram is
the same for every order, batch size, partition and merge tree.

Clipped maps put much of their area on exactly 0 or 1. Each is the first key of its page, and often
the only one there; as long as it is, its bin is known to be a tie, however wide.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint32]
Integers = NDArray[np.int64]

PAGE_BITS = 20
NUM_PAGES = 1 << (32 - PAGE_BITS)
KEY_END = 1 << 32
"""One above the largest key."""
_KEY_OF_MINUS_INFINITY, _KEY_OF_INFINITY = np.uint32(0x007FFFFF), np.uint32(0xFF800000)
_ABSENT = np.int64(-(1 << 62))
_PAGES_OF_0_AND_1 = (0x800, 0xBF8)


def score_keys(scores: NDArray[np.float32]) -> Keys:
    """Order-preserving integers of scores of any shape; NaN is not allowed."""
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 turns -0.0 into 0.0
    if bits.size and bits.min() < 0:
        flip = bits >> 31
        flip &= 0x7FFFFFFF
        bits ^= flip
    keys = bits.view(np.uint32)
    keys ^= np.uint32(1 << 31)
    return keys


def key_scores(keys: Keys) -> NDArray[np.float64]:
    """The scores of keys; a bin's edge beyond an infinity (a NaN's bits) is that infinity."""
    number = np.clip(keys, _KEY_OF_MINUS_INFINITY, _KEY_OF_INFINITY)
    signed = (number ^ np.uint32(1 << 31)).view(np.int32)
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Bins:
    """Bins with their contents; all arrays are (K,)."""

    key: Keys
    """Lowest key of each bin."""
    pixels: Integers
    positives: Integers
    weight: Integers


class PagedHistogram:
    """Counts of pixels, of positive pixels, and their region weight, per bin of keys.

    Args:
        max_bins: memory budget, 24 bytes per bin; each page keeps at least one bin, so with many
            pages and a tiny budget up to 4096 bins are used.
    """

    def __init__(self, max_bins: int = 1 << 18) -> None:
        if max_bins < 1:
            raise ValueError(f"max_bins must be at least 1, got {max_bins}")
        self.max_bins = max_bins
        self.shift = 0
        self.mixed: set[int] = set()
        """Those of the pages of 0 and 1 in which another key occurred."""
        # page -> row of the arrays below, in order of arrival
        self._pages: dict[int, int] = {}
        # offset[page] + (key >> shift) is the key's slot
        self._offset = np.full(NUM_PAGES, _ABSENT)
        self._pixels = np.zeros(0, np.int64)
        self._positives = np.zeros(0, np.int64)
        self._weight = np.zeros(0, np.int64)

    @property
    def page_width(self) -> int:
        return 1 << (PAGE_BITS - self.shift)

    def add_pixels(self, keys: Keys) -> None:
        """Count pixels of either kind."""
        slots = self._slots(keys)
        np.add.at(self._pixels, slots, 1)

    def add_positives(self, keys: Keys, weight: Integers) -> None:
        """Mark pixels that `add_pixels` has already counted as positive."""
        slots = self._slots(keys)
        np.add.at(self._positives, slots, 1)
        np.add.at(self._weight, slots, weight)

    def merge(self, other: "PagedHistogram") -> None:
        """Add another histogram of the same budget."""
        self.mixed |= other.mixed
        self._reserve(list(other._pages))  # now our bins are at least as wide as the other's
        bins = other.bins()
        slots = self._slots(bins.key)
        np.add.at(self._pixels, slots, bins.pixels)
        held = np.flatnonzero(bins.positives)
        np.add.at(self._positives, slots[held], bins.positives[held])
        np.add.at(self._weight, slots[held], bins.weight[held])

    def add_bins(self, bins: Bins, shift: int) -> None:
        """Restore saved bins of the given shift."""
        self._reserve(np.unique(bins.key >> np.uint32(PAGE_BITS)).tolist())
        if self.shift != shift:
            raise ValueError(f"bins of shift {shift} do not fit pages that need {self.shift}")
        slots = self._slots(bins.key)
        self._pixels[slots] = bins.pixels
        self._positives[slots] = bins.positives
        self._weight[slots] = bins.weight

    def bins(self) -> Bins:
        """All bins that hold pixels, ascending."""
        parts = [self._page(page) for page in sorted(self._pages)]
        return concatenate([part for part in parts if len(part.key)])

    def _page(self, page: int) -> Bins:
        start = self._pages[page] * self.page_width
        pixels = self._pixels[start : start + self.page_width]
        held = np.flatnonzero(pixels)
        key = ((held << self.shift) + (page << PAGE_BITS)).astype(np.uint32)
        positives, weight = self._positives[start:][held], self._weight[start:][held]
        return Bins(key, pixels[held], positives, weight)

    def cut(self, limit: int) -> int:
        """Lowest bin edge with at most `limit` pixels at or above it; 0 if all pixels are."""
        room, width = limit, self.page_width
        for page in sorted(self._pages, reverse=True):
            start = self._pages[page] * width
            pixels = self._pixels[start : start + width]
            total = int(pixels.sum())
            if total > room:
                above = np.cumsum(pixels[::-1])
                fits = int(np.searchsorted(above, room, side="right"))
                return (page << PAGE_BITS) + ((width - fits) << self.shift)
            room -= total
        return 0

    def are_ties(self, bins: Keys) -> NDArray[np.bool_]:
        """Which bins, given by their lowest keys, are known to hold one score only."""
        if self.shift == 0:
            return np.ones(len(bins), np.bool_)
        pure = [page << PAGE_BITS for page in _PAGES_OF_0_AND_1 if page not in self.mixed]
        return np.isin(bins, np.array(pure, np.uint32))

    def positive_bins_below(self, cut: int) -> tuple[Bins, Integers]:
        """Bins under the key `cut` that hold positives, descending.

        Returns:
            The bins, and for each the number of pixels between it and `cut`.
        """
        parts: list[Bins] = []
        between: list[Integers] = []
        passed = 0
        for page in sorted(self._pages, reverse=True):
            end = min(max(cut - (page << PAGE_BITS), 0) >> self.shift, self.page_width)
            if not end:
                continue
            start = self._pages[page] * self.page_width
            pixels = self._pixels[start : start + end][::-1]
            positives = self._positives[start : start + end][::-1]
            weight = self._weight[start : start + end][::-1]
            running = np.cumsum(pixels)
            held = np.flatnonzero(positives)
            key = (page << PAGE_BITS) + ((end - 1 - held) << self.shift)
            parts.append(Bins(key.astype(np.uint32), pixels[held], positives[held], weight[held]))
            between.append(running[held] - pixels[held] + passed)
            passed += int(running[-1])
        return concatenate(parts), np.concatenate([np.zeros(0, np.int64), *between])

    def _slots(self, keys: Keys) -> Integers:
        if not len(keys):
            return np.zeros(0, np.int64)
        lowest, highest = int(keys.min()) >> PAGE_BITS, int(keys.max()) >> PAGE_BITS
        for page in _PAGES_OF_0_AND_1:
            if lowest <= page <= highest and page not in self.mixed:
                behind = keys - np.uint32((page << PAGE_BITS) + 1)  # wraps below it
                if (behind < np.uint32((1 << PAGE_BITS) - 1)).any():
                    self.mixed.add(page)
        offsets = self._offset[lowest : highest + 1]
        if offsets[0] != _ABSENT and (offsets == offsets[0]).all():
            # Neighbouring pages that lie side by side: most images, and no look-up per pixel.
            slots = (keys >> np.uint32(self.shift)).astype(np.int64)
            slots += offsets[0]
            return slots
        pages = (keys >> np.uint32(PAGE_BITS)).astype(np.intp)
        slots = self._offset.take(pages)
        if slots.min() == _ABSENT:
            self._reserve(np.flatnonzero(np.bincount(pages)).tolist())
            slots = self._offset.take(pages)
        slots += keys >> np.uint32(self.shift)
        return slots

    def _reserve(self, pages: list[int]) -> None:
        """Make room for pages, coarsening all bins if the budget asks for it."""
        new = [page for page in pages if self._offset[page] == _ABSENT]
        if not new:
            return
        count = len(self._pages) + len(new)
        shift = self.shift
        while shift < PAGE_BITS and count << (PAGE_BITS - shift) > self.max_bins:
            shift += 1
        halvings, used = shift - self.shift, len(self._pages) * self.page_width
        self.shift = shift
        if halvings or count * self.page_width > len(self._pixels):
            # Spare pages, up to the budget, so that single new pages do not copy everything.
            pages_within = max(self.max_bins // self.page_width, count)
            size = min(max(2 * count, 8), pages_within) * self.page_width
            self._pixels = _coarsen(self._pixels[:used], halvings, size)
            self._positives = _coarsen(self._positives[:used], halvings, size)
            self._weight = _coarsen(self._weight[:used], halvings, size)
        self._pages |= {page: row for row, page in enumerate(new, start=len(self._pages))}
        placed = np.array(list(self._pages), np.int64)
        self._offset[placed] = (np.arange(count) - placed) * self.page_width


def _coarsen(values: Integers, halvings: int, size: int) -> Integers:
    """Sums of 2^halvings neighbours, followed by zeros up to `size`."""
    for _ in range(halvings):
        values = values[0::2] + values[1::2]
    grown = np.zeros(size, np.int64)
    grown[: len(values)] = values
    return grown


def concatenate(parts: list[Bins]) -> Bins:
    """All bins of the parts, in their order."""
    empty = np.zeros(0, np.int64)
    return Bins(
        np.concatenate([np.zeros(0, np.uint32), *(b.key for b in parts)]),
        np.concatenate([empty, *(b.pixels for b in parts)]),
        np.concatenate([empty, *(b.positives for b in parts)]),
        np.concatenate([empty, *(b.weight for b in parts)]),
    )
