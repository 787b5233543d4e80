"""What the methods with a memory bank have in common: read the good images, choose rows, search.

Letters: B images, C channels, h w patches, N = h * w, R rows of the store, M bank rows,
k neighbours.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from allgood.layers.categories import global_feature
from allgood.layers.coreset import greedy_coreset
from allgood.layers.nearest import nearest_distance
from allgood.layers.patch_store import PatchStore, image_number
from allgood.scoring import ignored_patches, visible_rows
from allgood.types import Batch, InputError, Sample


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


def choose_rows(
    patches: Tensor,
    groups: Sequence[Tensor],
    ratio: float,
    *,
    start: Callable[[Tensor], Tensor | None] = lambda features: None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Rows of the memory bank: a greedy coreset of each group, one group after the other.

    Args:
        patches: (R, C).
        groups: rows that compete with each other.
        ratio: share of a group that is kept, at least one row; from 1 on all are kept, in order.
        start: features of a group -> distances before its first pick, see `greedy_coreset`.
        progress: called with (rows chosen, rows to choose).

    Returns:
        (M,) int64.
    """
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


def search_bank(
    rows: Tensor,
    bank: Tensor,
    k: int,
    *,
    own: tuple[Tensor, Tensor] | None = None,
    own_rows: Tensor | None = None,
    visible: Tensor | None = None,
    not_from: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared distance and index of the k nearest bank rows of every patch.

    Args:
        rows: (B, N, C).
        bank: (M, C).
        own: the images' categories (B,) and the bank rows' (M,), ascending: search only rows of
            the image's own category. None: all rows.
        own_rows: `rows_table` of the bank, for graphs: their shapes cannot depend on the category.
        visible: (B, N) bool; other patches get distance 0 to row 0. None: all.
        not_from: the images' numbers (B,) and the bank rows' (M,): no image is compared with rows
            of its own. None: with all rows.

    Returns:
        distances (B, N, k) float32, ascending, and bank rows (B, N, k) int64.

    Raises:
        ValueError: fewer than k rows to search.
    """
    if not_from is not None:
        return _search_others(rows, bank, k, own, visible, *not_from)
    batch, patches, _ = rows.shape
    if visible is None and own is None:
        distance, nearest = nearest_distance(rows.flatten(0, 1), bank, k=k)
        return distance.unflatten(0, (batch, patches)), nearest.unflatten(0, (batch, patches))
    if own is not None and own_rows is not None and visible is None:
        return _search_table(rows, bank, k, own_rows[own[0]])
    distance = rows.new_zeros(batch, patches, k)
    nearest = torch.zeros_like(distance, dtype=torch.int64)
    if visible is None:
        visible = torch.ones(batch, patches, dtype=torch.bool, device=rows.device)
    if own is None:
        searches = [(visible, 0, len(bank))]
    else:
        image_category, bank_category = own
        searches = [
            (
                visible & (image_category == index)[:, None],
                int((bank_category < index).sum()),
                int((bank_category <= index).sum()),
            )
            for index in image_category.unique()
        ]
    for mine, begin, end in searches:
        found, row = nearest_distance(rows[mine], bank[begin:end], k=k)
        distance[mine], nearest[mine] = found, row + begin
    return distance, nearest


def rows_table(bank_category: Tensor, num_categories: int) -> Tensor:
    """(K, R): the bank rows of each category, ascending, then -1 where it has fewer than R."""
    groups = [(bank_category == i).nonzero().squeeze(1) for i in range(num_categories)]
    return nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-1)


def _search_table(rows: Tensor, bank: Tensor, k: int, own_rows: Tensor) -> tuple[Tensor, Tensor]:
    """`search_bank` of all patches of each image in the rows (B, R) of its category."""
    found = []
    for patches, mine in zip(rows, own_rows, strict=True):
        distance, nearest = nearest_distance(patches, bank[mine], k=k, hidden=mine < 0)
        found.append((distance, mine[nearest]))
    return torch.stack([pair[0] for pair in found]), torch.stack([pair[1] for pair in found])


def _search_others(
    rows: Tensor,
    bank: Tensor,
    k: int,
    own: tuple[Tensor, Tensor] | None,
    visible: Tensor | None,
    image: Tensor,
    bank_image: Tensor,
) -> tuple[Tensor, Tensor]:
    """`search_bank` image by image, each in the bank without its own rows."""
    found = []
    for i, number in enumerate(image):
        others = (bank_image != number).nonzero().squeeze(1)
        mine = slice(i, i + 1)
        distance, nearest = search_bank(
            rows[mine],
            bank[others],
            k,
            own=None if own is None else (own[0][mine], own[1][others]),
            visible=None if visible is None else visible[mine],
        )
        found.append((distance, others[nearest]))
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
