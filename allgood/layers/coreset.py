"""Greedy coreset: the farthest-point order of PatchCore (minimax facility location), but faster.

The plain algorithm keeps for each row its distance to the nearest selected row, and computes one
more row of distances per step: count x M distances, each step limited by memory bandwidth. But
those distances only ever fall, so an old one is an upper bound, and a row whose bound is below the
current farthest distance cannot be the next pick. We therefore bring up to date only the rows that
could be picked, many of them against many selected rows at once: one matrix product instead of many
passes over the features. The picks are those of the plain algorithm.

Letters: M rows, C channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allgood.layers.nearest import nearest_distance

_FEWEST_ACTIVE, _MOST_ACTIVE = 128, 1024
"""Rows that compete for the next picks, whose mutual distances are all computed: as many as the
last round's picks deserve, few enough to stay in cache."""
_CENTRES = 256
"""Selected rows per matrix product; bounds the distances computed but not needed."""
_PART = 8192
"""Rows copied at a time."""
_PICKED = -1.0
"""Bound of a row that is picked: below every distance."""


def greedy_coreset(
    features: Tensor,
    count: int,
    *,
    start: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Indices of `count` rows, each the farthest from all picked before it.

    pick_t = argmax_i min(start_i, min_{s < t} ||x_i - x_{pick_s}||_2), equal ones in any order

    Args:
        features: (M, C) float32.
        count: number of rows to pick, 1 <= count <= M.
        start: (M,) distances before the first pick, >= 0. Its largest entry is picked first. None:
            row 0 is picked first.
        progress: called now and then with the number of rows picked so far.

    Returns:
        (count,) int64 in order of selection, without repeats. The first n of them are the coreset
        of n rows.

    Raises:
        ValueError: count is out of range, or a number is not finite.
    """
    total = len(features)
    if not 1 <= count <= total:
        raise ValueError(f"count must be in [1, {total}], got {count}")
    selection = _Selection(features, start, count)
    bound = selection.bound
    refresh = active = _MOST_ACTIVE
    while selection.size < count:
        floor = _floor_of_top(bound, refresh)
        rows = (bound >= floor).nonzero().squeeze(1)
        selection.bring_up_to_date(rows)
        picked, short_of_rows = selection.pick_among(rows, floor, active)
        # As many rows as the picks need: more while rows left outside end the rounds early (the
        # radius is falling fast), fewer when the competition among the active ends them.
        if not short_of_rows:
            refresh = max(refresh // 2, _MOST_ACTIVE)
        elif picked < refresh // 32:
            refresh = min(2 * refresh, total)
        if picked > active // 4:
            active = min(2 * active, _MOST_ACTIVE)
        elif picked < active // 16:
            active = max(active // 2, _FEWEST_ACTIVE)
        if progress is not None:
            progress(selection.size)
    return selection.picks


class _Selection:
    """What is picked so far, and how old each row's bound is."""

    def __init__(self, features: Tensor, start: Tensor | None, count: int) -> None:
        self.features = features
        # Distances do not change when the origin moves, but their expanded form is most exact
        # where norms are small. Subtracted from the rows read, so that there is no second copy.
        self.mean = features.mean(dim=0)
        self.squares = torch.cat(
            [(part - self.mean).square().sum(dim=1) for part in features.split(_PART)]
        )
        # (M,) squared distance to the nearest of the first `age` picks; of a pick itself, _PICKED
        if start is None:
            self.bound = torch.full_like(self.squares, torch.finfo(self.squares.dtype).max)
            self.bound[0] = torch.inf
        else:
            self.bound = start.to(self.squares).square()
        if not (self.squares.isfinite().all() and (start is None or start.isfinite().all())):
            raise ValueError("features and start must be finite")
        self.age = torch.zeros(len(features), dtype=torch.int32, device=features.device)
        self.picks = torch.empty(count, dtype=torch.int64, device=features.device)
        self.centres = features.new_empty(count, features.shape[1])
        self.centre_squares = features.new_empty(count)
        self.size = 0

    def bring_up_to_date(self, rows: Tensor) -> None:
        """Lower the bounds of `rows` to their distances to everything picked so far."""
        age = self.age[rows]
        first = int(age.min()) if len(rows) else self.size
        for begin in range(first, self.size, _CENTRES):
            end = min(begin + _CENTRES, self.size)
            for part in rows[age < end].split(_PART):
                distance = torch.addmm(
                    self.centre_squares[begin:end],
                    self.features[part] - self.mean,
                    self.centres[begin:end].T,
                    alpha=-2,
                ).amin(dim=1)
                distance += self.squares[part]
                self.bound[part] = torch.minimum(self.bound[part], distance.clamp_(min=0))
        self.bound[self.picks[: self.size]] = _PICKED
        self.age[rows] = self.size

    def pick_among(self, rows: Tensor, floor: float, active: int) -> tuple[int, bool]:
        """Pick while the farthest of `rows` is at least `floor`, the bound of all other rows.

        Only the `active` farthest of them compete; what they leave behind bounds them too.

        Returns:
            the number of picks, and whether they ended for want of rows above `floor`.
        """
        bound = self.bound[rows]
        limit = floor
        if len(rows) > active:
            keep = bound.topk(active).indices.sort().values
            limit = max(floor, float(bound[keep].min()))
            rows, bound = rows[keep], bound[keep]
        features, squares = self.features[rows] - self.mean, self.squares[rows]
        between = torch.addmm(squares, features, features.T, alpha=-2).add_(squares[:, None])
        begin = self.size
        order = _farthest_order(
            between.clamp_(min=0).cpu().numpy(),
            bound.cpu().numpy().copy(),
            count=len(self.picks) - begin,
            floor=limit,
        )
        self.size += len(order.picks)
        picked = torch.from_numpy(order.picks).to(rows.device)
        self.picks[begin : self.size] = rows[picked]
        self.centres[begin : self.size] = features[picked]
        self.centre_squares[begin : self.size] = squares[picked]
        self.bound[rows] = torch.from_numpy(order.bound).to(bound)
        self.age[rows] = self.size
        return self.size - begin, limit == floor


class _Order(NamedTuple):
    picks: np.ndarray
    bound: np.ndarray


def _farthest_order(between: np.ndarray, bound: np.ndarray, *, count: int, floor: float) -> _Order:
    """The plain greedy loop over a few rows whose mutual squared distances are known.

    NumPy, because a thousand numbers are too few for a tensor library's overhead per call.
    """
    picks: list[int] = []
    while len(picks) < count:
        best = int(bound.argmax())
        if bound[best] < floor or bound[best] < 0:
            break
        picks.append(best)
        np.minimum(bound, between[best], out=bound)
        bound[picks] = _PICKED
    return _Order(np.array(picks, dtype=np.int64), bound)


def _floor_of_top(values: Tensor, count: int) -> float:
    """A value that about `count` entries reach; exactly that many are not needed, speed is."""
    if len(values) <= count:
        return float(values.min())
    sample = values[:: max(1, len(values) // 65536)]
    keep = max(1, count * len(sample) // len(values))
    return float(sample.topk(keep).values[-1])


def covering_radius(features: Tensor, picks: Tensor) -> float:
    """Largest distance of a row to its nearest picked row; greedy selection keeps it small."""
    squared, _ = nearest_distance(features, features[picks], engine="torch")
    return float(squared.max().sqrt())
