"""Nearest-neighbour search against all distances in float64."""

import importlib.util

import pytest
import torch
from torch import Tensor

from allgood.layers import nearest
from allgood.layers.nearest import nearest_distance
from allgood.types import InputError

ENGINES = [
    "torch",
    pytest.param(
        "faiss",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("faiss") is None, reason="faiss is not installed"
        ),
    ),
    "auto",
]


def brute_force(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    between = (query.double()[:, None] - bank.double()[None]).square().sum(dim=2)
    return between.topk(k, dim=1, largest=False)


def rows(count: int, channels: int, seed: int) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [1, 3])
def test_equals_brute_force(k: int, engine: str) -> None:
    query, bank = rows(230, 16, 0), rows(170, 16, 1)
    distance, index = nearest_distance(query, bank, k=k, engine=engine)
    expected, where = brute_force(query, bank, k)
    assert distance.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(index, where)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5, 11])
@pytest.mark.parametrize("query_block, bank_block", [(1, 1), (7, 4), (1000, 2), (3, 1000)])
def test_blocks_do_not_matter(
    k: int, query_block: int, bank_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "_QUERY_BLOCK", query_block)
    monkeypatch.setattr(nearest, "_BANK_BLOCK", bank_block)
    query, bank = rows(19, 6, 2), rows(11, 6, 3)
    distance, index = nearest_distance(query, bank, k=k, engine="torch")
    expected, where = brute_force(query, bank, k)
    assert torch.equal(index, where)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_hidden_rows_are_nobodys_neighbours(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_BANK_BLOCK", 5)  # the first block is hidden as a whole
    query, bank = rows(30, 6, 2), rows(23, 6, 3)
    hidden = torch.arange(23) < 6
    distance, index = nearest_distance(query, bank, k=k, hidden=hidden)
    expected, where = brute_force(query, bank[6:], k)
    assert torch.equal(index, where + 6)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=1e-6)


def test_real_block_sizes_are_crossed() -> None:
    query, bank = rows(1030, 4, 4), rows(4100, 4, 5)
    distance, index = nearest_distance(query, bank, k=2, engine="torch")
    expected, where = brute_force(query, bank, 2)
    assert torch.equal(index, where)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_nearly_agree_keep_their_digits(engine: str) -> None:
    """Distances of 1e-8 between rows of norm 100: the expanded form alone answers noise."""
    bank = 20 * rows(50, 24, 6)
    query = bank + 1e-4 * rows(50, 24, 7)
    distance, index = nearest_distance(query, bank, engine=engine)
    expected, _ = brute_force(query, bank, 1)
    assert index[:, 0].tolist() == list(range(50))
    torch.testing.assert_close(distance.double(), expected, rtol=1e-5, atol=0)
    itself, _ = nearest_distance(bank, bank, engine=engine)
    assert torch.equal(itself, torch.zeros(50, 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_is_searched_in_float32(engine: str) -> None:
    """Under autocast too, as `inspect --precision bf16` has it."""
    query, bank = rows(40, 16, 0).bfloat16(), rows(300, 16, 1) + 100
    expected = nearest_distance(query.float(), bank, engine=engine)
    with torch.autocast("cpu", torch.bfloat16):
        distance, index = nearest_distance(query, bank, engine=engine)
    assert torch.equal(distance, expected[0])
    assert torch.equal(index, expected[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_distances_ascend(engine: str) -> None:
    centre = rows(1, 24, 8)
    bank = 100 * centre + 0.01 * rows(40, 24, 9)  # the search cannot tell their order
    distance, index = nearest_distance(100 * centre, bank, k=6, engine=engine)
    assert (distance.diff(dim=1) >= 0).all()
    assert len(set(index[0].tolist())) == 6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [1, 2])
def test_no_query_and_views(k: int, engine: str) -> None:
    bank = rows(8, 3, 10)
    distance, index = nearest_distance(bank[:0], bank, k=k, engine=engine)
    assert distance.shape == index.shape == (0, k)
    query = rows(3, 20, 11).T  # not contiguous
    distance, index = nearest_distance(query, bank, k=k, engine=engine)
    assert torch.equal(index, brute_force(query, bank, k)[1])


def test_empty_bank_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="holds 0 rows, too few for 1 neighbours: fit first"):
        nearest_distance(rows(2, 3, 0), torch.empty(0, 3))
    with pytest.raises(ValueError, match="holds 2 rows, too few for 3"):
        nearest_distance(rows(2, 3, 0), rows(2, 3, 0), k=3)


def test_other_channels() -> None:
    with pytest.raises(ValueError, match="query has 3 channels but the memory bank 4"):
        nearest_distance(rows(2, 3, 0), rows(2, 4, 0))


def test_faiss_is_asked_for_but_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_faiss", lambda: None)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        nearest_distance(rows(2, 3, 0), rows(2, 3, 0), engine="faiss")
    nearest_distance(rows(2, 3, 0), rows(2, 3, 0))
