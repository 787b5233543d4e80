"""The memory bank's search, against a plain loop over the patches."""

from itertools import product

import pytest
import torch
from torch import Tensor

from allgood.layers.memory_bank import MemoryBank

CATEGORY = torch.tensor([1, 0, 1])
NUMBER = torch.tensor([7, 5, 9])
"""Of the three images that are searched; the bank has patches of all but the last."""


def bank_of(*, shared: bool, num_neighbors: int) -> MemoryBank:
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(("cloth", "wood"), shared=shared, num_neighbors=num_neighbors)
    bank.patches = torch.randn(15, 4, generator=generator)
    bank.category = torch.tensor([0] * 5 + [1] * 10)
    bank.image = torch.tensor([5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 8, 8, 8, 8])
    return bank


def plain(
    bank: MemoryBank, query: Tensor, number: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = query.shape
    distance = torch.zeros(batch, 1, height, width)
    nearest = torch.zeros(batch, height, width, bank.num_neighbors, dtype=torch.int64)
    for i, row, column in product(range(batch), range(height), range(width)):
        squared = (bank.patches - query[i, :, row, column]).square().sum(dim=1)
        if not bank.shared:
            squared[bank.category != CATEGORY[i]] = torch.inf
        if number is not None:
            squared[bank.image == number[i]] = torch.inf
        if visible is None or visible[i, row, column]:
            values, rows = squared.sort()
            distance[i, 0, row, column] = values[: bank.num_neighbors].mean()
            nearest[i, row, column] = rows[: bank.num_neighbors]
    return distance, nearest


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", [None, NUMBER], ids=["all", "others"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_search_by_definition(shared: bool, k: int, number: Tensor | None, masked: bool) -> None:
    bank = bank_of(shared=shared, num_neighbors=k)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(3, 4, 2, 5, generator=generator)
    visible = torch.rand(3, 2, 5, generator=generator) > 0.4 if masked else None
    distance, nearest = plain(bank, query, number, visible)
    for _ in range(2):  # the second time as a graph does it
        found, rows = bank.search(query, CATEGORY, image_number=number, visible=visible)
        torch.testing.assert_close(found, distance)
        shown = slice(None) if visible is None else visible
        assert torch.equal(rows[shown], nearest[shown])
        bank.fix_shapes()


def test_too_few_patches_of_others() -> None:
    bank = bank_of(shared=False, num_neighbors=4)
    query = torch.zeros(1, 4, 1, 1)
    bank.search(query, torch.tensor([0]))
    with pytest.raises(ValueError, match="holds 3 rows, too few for 4 neighbours"):
        bank.search(query, torch.tensor([0]), image_number=torch.tensor([5]))
