"""What the methods with a memory bank have in common: read the good images, choose rows, search.

Letters: B images, C channels, h w patches, N = h * w, R rows of the store, M bank rows,
K categories, k neighbours.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from allgood.layers.categories import global_feature
from allgood.layers.coreset import greedy_coreset
from allgood.layers.nearest import nearest_distance
from allgood.layers.patch_store import PatchStore, image_number
from allgood.scoring import ignored_patches, visible_rows
from allgood.types import Batch, InputError, Sample


class MemoryBank(nn.Module):
    """Patches of good images, among which those of an image find their nearest neighbours.

    Attributes:
        patches: (M, C) float32; none before `choose`.
        category: (M,) int64, ascending where the bank is not shared.
        image: (M,) int64, the `image_number` of the good image that a patch is of.
    """

    def __init__(self, categories: Sequence[str], *, shared: bool, num_neighbors: int) -> None:
        """
        Args:
            shared: compare an image with patches of all categories, not only of its own.
            num_neighbors: k.
        """
        super().__init__()
        self.categories = categories
        self.shared = shared
        self.num_neighbors = num_neighbors
        self.patches: Tensor
        self.category: Tensor
        self.image: Tensor
        self.register_buffer("patches", torch.empty(0, 0))
        self.register_buffer("category", torch.empty(0, dtype=torch.int64))
        self.register_buffer("image", torch.empty(0, dtype=torch.int64))
        self._table: Tensor | None = None  # see `fix_shapes`

    def choose(
        self,
        store: PatchStore,
        ratio: float,
        *,
        together: bool = False,
        start: Callable[[Tensor], Tensor | None] = lambda features: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Keep a greedy coreset of the patches in a store.

        Args:
            ratio: share of all patches seen that is kept.
            together: all patches compete; else those of each category among themselves. Of each
                at least one is kept.
            start: features that compete -> distances before the first pick, see `greedy_coreset`.
            progress: called with (rows chosen, rows to choose).

        Raises:
            InputError: the store has no patch of a category.
        """
        patches, category = store.patches()
        groups = rows_by_category(category, self.categories)
        if together:
            groups = [torch.arange(len(patches))]
        # The ratio is of the patches seen, not of those that the memory budget let stay.
        ratio *= store.seen_rows / len(patches)
        chosen = _coreset(patches, groups, ratio, start, progress)
        device = self.patches.device
        self.patches = patches[chosen].to(device)
        self.category = category[chosen].to(device)
        self.image = store.patch_images()[chosen].to(device)

    def rows_for(self, category: int | Tensor) -> slice:
        """The rows that an image of a category is compared with."""
        if self.shared:
            return slice(0, len(self.patches))
        return slice(int((self.category < category).sum()), int((self.category <= category).sum()))

    def search(
        self,
        query: Tensor,
        category: Tensor,
        *,
        image_number: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k nearest bank rows of every patch, and the mean squared distance to them.

        Args:
            query: (B, C, h, w).
            category: (B,) int64.
            image_number: (B,) int64: no image is compared with patches of this number. None: with
                all.
            visible: (B, h, w) bool; other patches get distance 0 to row 0. None: all.

        Returns:
            distance (B, 1, h, w) float32 >= 0, and bank rows (B, h, w, k) int64, nearest first.

        Raises:
            ValueError: fewer than k rows to search.
        """
        if image_number is not None:
            return self._search_others(query, category, image_number, visible)
        batch, _, height, width = query.shape
        k = self.num_neighbors
        rows = query.flatten(2).transpose(1, 2)  # (B, N, C)
        if visible is None and self.shared:
            distance, nearest = nearest_distance(rows.flatten(0, 1), self.patches, k=k)
        elif visible is None and self._table is not None:
            distance, nearest = self._search_table(rows, self._table[category])
        else:
            distance, nearest = self._search_groups(rows, category, visible)
        distance = distance.view(batch, 1, height, width, k).mean(dim=-1)
        return distance, nearest.view(batch, height, width, k)

    def fix_shapes(self) -> None:
        """Search from now on as a graph can: no shape depends on the category."""
        if not self.shared:
            groups = rows_by_category(self.category, self.categories)
            # (K, most rows of a category), filled up with -1
            self._table = nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-1)

    def require_others(self, run: Path, samples: Sequence[Sample], num_absent: int) -> None:
        """See that every picture can be compared with the patches of others.

        Args:
            run: the detector's, for the message.
            samples: good pictures that it was fitted on.
            num_absent: how many more it was fitted on.

        Raises:
            InputError: the pictures' ids are not those of the fit, so that the bank does not know
                them; or without a picture's own patches too few are left.
        """
        num_unknown = 0
        for index, category in enumerate(self.categories):
            given = {image_number(sample.id) for sample in samples if sample.category == category}
            held = set(self.image[self.category == index].tolist())
            num_unknown += len(held - given)
            if num_unknown > num_absent or (held and held.isdisjoint(given)):
                raise InputError(
                    f"the good pictures have other names below their folder than when run '{run}' "
                    "was fitted, and its memory bank knows its own by name: give the data as they "
                    "were given to `allgood fit`"
                )
            searched = Counter(self.image[self.rows_for(index)].tolist())
            most = max((searched[number] for number in given), default=0)
            if searched.total() - most < self.num_neighbors:
                raise InputError(
                    f"the memory bank of run '{run}' holds too few pictures of category "
                    f"'{category}' to compare each with others: fit it on at least two"
                )

    def _search_others(
        self, query: Tensor, category: Tensor, image_number: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`search` image by image, each in a bank without its own rows."""
        distances, nearest = [], []
        for i, number in enumerate(image_number):
            others = (self.image != number).nonzero().squeeze(1)
            bank = MemoryBank(self.categories, shared=self.shared, num_neighbors=self.num_neighbors)
            bank.patches, bank.category = self.patches[others], self.category[others]
            one = slice(i, i + 1)
            distance, found = bank.search(
                query[one], category[one], visible=None if visible is None else visible[one]
            )
            distances.append(distance)
            nearest.append(others[found])
        return torch.cat(distances), torch.cat(nearest)

    def _search_groups(
        self, rows: Tensor, category: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of rows (B, N, C), the visible ones, category by category."""
        asked = torch.ones_like(rows[..., 0], dtype=torch.bool)
        if visible is not None:
            asked = visible.flatten(1)
        k = self.num_neighbors
        distance = torch.zeros(*asked.shape, k, device=rows.device)
        nearest = torch.zeros_like(distance, dtype=torch.int64)
        for index in category.unique():
            mine, part = asked & (category == index)[:, None], self.rows_for(index)
            distance[mine], found = nearest_distance(rows[mine], self.patches[part], k=k)
            nearest[mine] = found + part.start
        return distance, nearest

    def _search_table(self, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows (B, N, C), those of each image among the bank rows in its row of the table."""
        distances, nearest = [], []
        for own, part in zip(rows, table, strict=True):
            distance, found = nearest_distance(
                own, self.patches[part], k=self.num_neighbors, hidden=part < 0
            )
            distances.append(distance)
            nearest.append(part[found])
        return torch.stack(distances), torch.stack(nearest)


def read_good_images(
    batches: Iterable[Batch],
    store: PatchStore,
    categories: Sequence[str],
    encoder: nn.Module,
    embed: Callable[[list[Tensor]], Tensor],
) -> None:
    """Put every visible patch of the batches, and each image's global feature, into the store.

    Args:
        embed: levels -> (B, C, h, w), one vector per patch.
    """
    index = {name: i for i, name in enumerate(categories)}
    for batch in batches:
        levels = encoder(batch.image)
        patches = embed(levels)
        ignored = ignored_patches(batch.ignore, (patches.shape[-2], patches.shape[-1]))
        store.add(
            [sample.id for sample in batch.sample],
            visible_rows(patches.flatten(2).transpose(1, 2), ignored),
            torch.tensor([index[sample.category] for sample in batch.sample]),
            global_feature(levels),
        )


def rows_by_category(category: Tensor, categories: Sequence[str]) -> list[Tensor]:
    """Where each category's rows stand in (R,) `category`.

    Raises:
        InputError: a category has none.
    """
    groups = [(category == i).nonzero().squeeze(1) for i in range(len(categories))]
    for name, rows in zip(categories, groups, strict=True):
        if len(rows) == 0:
            raise InputError(
                f"category '{name}' left nothing to learn from: none of its good pictures "
                "could be read, or all of their area is ignored"
            )
    return groups


def draw_images(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` random images of each category, whatever their order is."""
    drawn = []
    for category in sorted({sample.category for sample in samples}):
        own = [sample for sample in samples if sample.category == category]
        numbers = sorted({image_number(sample.id) for sample in own})
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{category}".encode()))
        order = torch.randperm(len(numbers), generator=generator)
        chosen = {numbers[i] for i in order[:count].tolist()}
        drawn += [sample for sample in own if image_number(sample.id) in chosen]
    return drawn


def _coreset(
    patches: Tensor,
    groups: Sequence[Tensor],
    ratio: float,
    start: Callable[[Tensor], Tensor | None],
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """(M,) int64: a greedy coreset of each group of rows, one after the other; see `choose`."""
    if ratio >= 1:
        return torch.cat(list(groups))
    counts = [max(1, int(ratio * len(rows))) for rows in groups]
    picks: list[Tensor] = []

    def report(done: int) -> None:
        if progress is not None:
            progress(sum(counts[: len(picks)]) + done, sum(counts))

    for rows, count in zip(groups, counts, strict=True):
        features = patches if len(rows) == len(patches) else patches[rows]
        picks.append(rows[greedy_coreset(features, count, start=start(features), progress=report)])
    return torch.cat(picks)
