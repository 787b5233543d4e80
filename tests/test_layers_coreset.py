"""The fast greedy coreset against the algorithm as it is written: one row of distances per pick."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allgood.detectors.patchcore import approximate_start, exact_start
from allgood.layers import coreset
from allgood.layers.coreset import covering_radius, greedy_coreset


def all_distances(features: Tensor) -> Tensor:
    """(M, M) float64, from differences."""
    x = features.double()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def plain_greedy(features: Tensor, count: int, start: Tensor | None = None) -> Tensor:
    """The lowest row among equals; row 0 first without a start."""
    between = all_distances(features)
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64)
    if start is not None:
        nearest = start.double().clone()
    picks: list[int] = []
    for _ in range(count):
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, between[picks[-1]])
        nearest[picks[-1]] = -1
    return torch.tensor(picks)


def plain_radius(features: Tensor, picks: Tensor) -> float:
    return float(all_distances(features)[:, picks].amin(dim=1).max())


def assert_each_is_farthest(features: Tensor, picks: Tensor) -> None:
    """Every pick is a farthest row, given those before it: also where the plain loop's ties fall
    otherwise. Squared distances come from norms in float32, and are that exact."""
    between = all_distances(features)
    norms = (features.double() - features.double().mean(dim=0)).square().sum(dim=1)
    tolerance = 3e-6 * float(norms.max())
    nearest = between[picks[0]].clone()
    assert picks[0] == 0
    for i, pick in enumerate(picks[1:].tolist(), start=1):
        assert nearest[pick] ** 2 >= nearest.max() ** 2 - tolerance, f"pick {i}"
        nearest = torch.minimum(nearest, between[pick])
    assert len(set(picks.tolist())) == len(picks)


def random(generator: torch.Generator, rows: int) -> Tensor:
    return torch.randn(rows, 24, generator=generator)


def clustered(generator: torch.Generator, rows: int) -> Tensor:
    centres = 3 * torch.randn(12, 24, generator=generator)
    which = torch.randint(12, (rows,), generator=generator)
    return centres[which] + 0.05 * torch.randn(rows, 24, generator=generator)


def low_rank(generator: torch.Generator, rows: int) -> Tensor:
    factors = torch.randn(rows, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    return factors + 0.01 * torch.randn(rows, 24, generator=generator)


def far_from_zero(generator: torch.Generator, rows: int) -> Tensor:
    """Norms 10,000 times the distances: the expanded form would lose every digit."""
    return 1000 + 0.1 * torch.randn(rows, 24, generator=generator)


def duplicates(generator: torch.Generator, rows: int) -> Tensor:
    few = torch.randn(40, 24, generator=generator)
    return few[torch.randint(40, (rows,), generator=generator)]


def lattice(generator: torch.Generator, rows: int) -> Tensor:
    """Corners of a cube, many times: nearly all distances tie."""
    return torch.randint(2, (rows, 8), generator=generator).float()


def constant(generator: torch.Generator, rows: int) -> Tensor:
    return torch.full((rows, 5), 3.0)


DISTINCT = [random, clustered, low_rank, far_from_zero]
TIED = [duplicates, lattice, constant]


@pytest.mark.parametrize("make", DISTINCT)
@pytest.mark.parametrize("rows, count", [(1500, 15), (1500, 400), (2000, 200), (60, 60)])
def test_picks_equal_the_plain_loop(
    make: Callable[[torch.Generator, int], Tensor], rows: int, count: int
) -> None:
    features = make(torch.Generator().manual_seed(rows), rows)
    picks = greedy_coreset(features, count)
    plain = plain_greedy(features, count)
    # One pick per cluster; among rows of one, two may be equally far to float32.
    same = 12 if make is clustered else 60
    assert torch.equal(picks[:same], plain[:same])
    assert_each_is_farthest(features, picks)
    if count < rows:
        ratio = plain_radius(features, picks) / plain_radius(features, plain)
        assert ratio <= 1.0001


@pytest.mark.parametrize("make", TIED)
@pytest.mark.parametrize("count", [1, 7, 40, 300, 1600])
def test_ties(make: Callable[[torch.Generator, int], Tensor], count: int) -> None:
    features = make(torch.Generator().manual_seed(1), 1600)
    picks = greedy_coreset(features, count)
    assert_each_is_farthest(features, picks)
    assert plain_radius(features, picks) <= 1e-3 + 1.0001 * plain_radius(
        features, plain_greedy(features, count)
    )


def test_all_distinct_rows_come_before_any_duplicate() -> None:
    features = duplicates(torch.Generator().manual_seed(2), 2000)
    picks = greedy_coreset(features, 45)
    assert len(features[picks[:40]].unique(dim=0)) == 40


@pytest.mark.parametrize("active, centres", [(2, 3), (8, 5), (64, 16)])
@pytest.mark.parametrize("make", [random, clustered, lattice])
def test_block_sizes_do_not_matter(
    make: Callable[[torch.Generator, int], Tensor],
    active: int,
    centres: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiny blocks reach every branch: many rounds, rows left over, bounds of all ages."""
    features = make(torch.Generator().manual_seed(3), 400)
    monkeypatch.setattr(coreset, "_MOST_ACTIVE", active)
    monkeypatch.setattr(coreset, "_FEWEST_ACTIVE", min(active, 128))
    monkeypatch.setattr(coreset, "_CENTRES", centres)
    monkeypatch.setattr(coreset, "_PART", 7)
    picks = greedy_coreset(features, 150)
    assert_each_is_farthest(features, picks)
    if make is random:
        assert torch.equal(picks, plain_greedy(features, 150))


def test_many_rows_whose_floor_is_sampled() -> None:
    features = torch.randn(140_000, 2, generator=torch.Generator().manual_seed(4))
    nearest = torch.full((len(features),), torch.inf)
    expected = [0]
    for _ in range(11):
        row = (features - features[expected[-1]]).square().sum(dim=1)
        nearest = torch.minimum(nearest, row)
        expected.append(int(nearest.argmax()))
    assert greedy_coreset(features, 12).tolist() == expected


@pytest.mark.parametrize("start_of", [approximate_start, exact_start])
def test_official_starts(start_of: Callable[..., Tensor]) -> None:
    features = random(torch.Generator().manual_seed(5), 1200)
    between = all_distances(features)
    if start_of is approximate_start:
        anchors = torch.tensor([3, 700, 44, 1199])
        start = approximate_start(features, anchors)
        expected = between[:, anchors].mean(dim=1)
    else:
        start = exact_start(features)
        expected = between.norm(dim=1)
    torch.testing.assert_close(start.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        greedy_coreset(features, 120, start=start), plain_greedy(features, 120, expected)
    )


def test_a_start_of_zeros_still_picks() -> None:
    features = random(torch.Generator().manual_seed(6), 20)
    assert sorted(greedy_coreset(features, 20, start=torch.zeros(20)).tolist()) == list(range(20))


@pytest.mark.parametrize("make", [random, duplicates])
def test_a_shorter_coreset_is_the_beginning_of_a_longer_one(
    make: Callable[[torch.Generator, int], Tensor],
) -> None:
    features = make(torch.Generator().manual_seed(7), 900)
    longest = greedy_coreset(features, 40)
    for count in (1, 2, 13, 39):
        assert torch.equal(greedy_coreset(features, count), longest[:count])


def test_one_row_and_all_rows() -> None:
    assert greedy_coreset(torch.rand(1, 4), 1).tolist() == [0]
    features = random(torch.Generator().manual_seed(8), 1300)
    assert sorted(greedy_coreset(features, 1300).tolist()) == list(range(1300))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=24),
    st.data(),
)
def test_any_small_set_of_points(points: list[list[int]], data: st.DataObject) -> None:
    features = torch.tensor(points, dtype=torch.float32)
    count = data.draw(st.integers(1, len(points)))
    assert_each_is_farthest(features, greedy_coreset(features, count))


def test_features_are_not_changed_and_progress_is_told() -> None:
    features = random(torch.Generator().manual_seed(9), 2000)
    before = features.clone()
    told: list[int] = []
    greedy_coreset(features, 500, progress=told.append)
    assert torch.equal(features, before)
    assert told == sorted(told) and told[-1] == 500 and len(told) > 1


def test_covering_radius_by_definition() -> None:
    features = random(torch.Generator().manual_seed(10), 700)
    picks = torch.tensor([0, 5, 600])
    assert covering_radius(features, picks) == pytest.approx(plain_radius(features, picks))
    assert covering_radius(features, torch.arange(700)) == 0


@pytest.mark.parametrize("count", [0, -1, 6])
def test_counts_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count must be in \[1, 5\], got {count}"):
        greedy_coreset(torch.rand(5, 3), count)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_do_not_hang(bad: float) -> None:
    features = torch.rand(9, 3)
    with pytest.raises(ValueError, match="must be finite"):
        greedy_coreset(features, 3, start=torch.full((9,), bad))
    features[4, 1] = bad
    with pytest.raises(ValueError, match="must be finite"):
        greedy_coreset(features, 3)
