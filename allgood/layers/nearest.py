"""Exact nearest-neighbour search of patches in a memory bank, in blocks.

Letters: N query rows, M bank rows, C channels, k neighbours.
"""

import math
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from allgood.types import InputError

_QUERY_BLOCK = 1024
_BANK_BLOCK = 4096
"""One block of distances is 16 MB: enough for a fast matrix product, and still near the core."""
_FAISS_BELOW = 5_000_000
"""FAISS wins on few distances (query rows x bank rows), the blocked product on many; measured by
benchmarks/bench_nearest.py."""


def nearest_distance(
    query: Tensor,
    bank: Tensor,
    *,
    k: int = 1,
    hidden: Tensor | None = None,
    engine: Literal["auto", "torch", "faiss"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Squared Euclidean distances from each query row to its k nearest bank rows.

    d(q, m) = ||q - m||^2, from the expanded form in float32; the k winners are computed again from
    the difference, because the expanded form loses all digits where query and bank row nearly
    agree.

    Args:
        query: (N, C); half precision, as autocast leaves it, is searched as float32.
        bank: (M, C) float32, M >= k, on the query's device.
        k: number of neighbours.
        hidden: (M,) bool, bank rows that are nobody's neighbours; torch's search only. At least k
            rows must be left.
        engine: `faiss` needs the package and CPU tensors; `auto` takes it where there and faster.

    Returns:
        distances (N, k) float32 >= 0, ascending, and the bank rows' indices (N, k) int64.

    Raises:
        ValueError: the bank has fewer than k rows, or other channels than the query.
        InputError: faiss was asked for and is not installed.
    """
    if len(bank) < k:
        raise ValueError(
            f"the memory bank holds {len(bank)} rows, too few for {k} neighbours: fit first"
        )
    if query.shape[1] != bank.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} channels but the memory bank {bank.shape[1]}: "
            "both must come from the same encoder and levels"
        )
    query = query.float()
    small = len(query) * len(bank) <= _FAISS_BELOW and query.device.type == "cpu"
    # A graph that is traced holds torch's operators only.
    faiss_pays = small and hidden is None and not torch.compiler.is_compiling()
    faiss = _faiss() if engine == "faiss" or (engine == "auto" and faiss_pays) else None
    if faiss is None and engine == "faiss":
        raise InputError("faiss is not installed: pip install faiss-cpu")
    if faiss is not None:
        _, index = faiss.knn(query.numpy(), bank.numpy(), k)
        nearest = torch.from_numpy(index)
    else:
        squares = bank.square().sum(dim=1)
        if hidden is not None:
            squares = squares.masked_fill(hidden, math.inf)
        with torch.autocast(query.device.type, enabled=False):  # else its products lose all digits
            nearest = torch.cat(
                [_nearest_rows(part, bank, squares, k) for part in query.split(_QUERY_BLOCK)]
            )
    distance = torch.cat(
        [
            (part[:, None] - bank[rows]).square().sum(dim=2)
            for part, rows in zip(
                query.split(_QUERY_BLOCK), nearest.split(_QUERY_BLOCK), strict=True
            )
        ]
    )
    distance, order = distance.sort(dim=1)
    return distance, nearest.gather(1, order)


def _nearest_rows(query: Tensor, bank: Tensor, squares: Tensor, k: int) -> Tensor:
    """(N, k) indices; ||q||^2 is the same for all bank rows and is left out."""
    best: Tensor | None = None
    rows = torch.empty(0)
    for begin in range(0, len(bank), _BANK_BLOCK):
        part = bank[begin : begin + _BANK_BLOCK]
        partial = torch.addmm(squares[begin : begin + _BANK_BLOCK], query, part.T, alpha=-2)
        if k == 1:  # min is several times faster than topk
            values, index = partial.min(dim=1, keepdim=True)
        else:
            values, index = partial.topk(min(k, len(part)), dim=1, largest=False)
        index += begin
        if best is None:
            best, rows = values, index
        else:
            both = torch.cat([best, values], dim=1)
            best, keep = both.topk(min(k, both.shape[1]), dim=1, largest=False)
            rows = torch.cat([rows, index], dim=1).gather(1, keep)
    return rows


@cache
def _faiss() -> ModuleType | None:
    try:
        import faiss
    except ImportError:
        return None
    return faiss
