"""PatchCore against the official code: embeddings, coreset orders, scores and maps.

The inputs follow from a written rule (fill.py). The first tests hold a few of the official answers
themselves, so they run anywhere; the last goes through every number of the golden files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import uniform
from torch import Tensor

from allgood.detectors.patchcore import approximate_start, exact_start, official_embedding
from allgood.layers.coreset import greedy_coreset
from allgood.layers.nearest import nearest_distance
from allgood.scoring import gaussian_smooth, resize_map

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

LEVELS = {
    "wide": ([(2, 512, 28, 28), (2, 1024, 14, 14)], 1024, 1024),
    "odd": ([(2, 12, 9, 9), (2, 20, 5, 5)], 16, 10),
}
"""Sizes of layers 2 and 3, then the two pooled dimensions."""

# fmt: off
# Every 409th number of `wide`, every 151st of `odd`: the first eight of each.
WIDE = (
    -0.06764932, 0.130146, 0.005711421, 0.4933779, -0.06594713, -0.07778279, -0.1828612,
    0.03908003,
)
ODD = (
    0.01687473, 0.03802219, -0.1406545, 0.07095948, -0.1185291, 0.02260144, -0.09591554,
    0.1242447,
)
ORDERS = {
    "coreset_exact": [
        218, 290, 261, 16, 25, 140, 89, 210, 246, 123, 287, 86, 134, 94, 138, 119, 51, 233, 181,
        190, 1, 272, 81, 242, 209, 139, 258, 213, 30, 277,
    ],
    "coreset_approximate_10": [
        218, 123, 11, 193, 222, 94, 25, 277, 213, 16, 287, 242, 182, 278, 258, 81, 140, 181, 28,
        119, 209, 89, 149, 68, 167, 171, 1, 54, 283, 299,
    ],
    "coreset_approximate_1": [
        140, 218, 16, 36, 115, 220, 249, 134, 267, 208, 233, 132, 242, 94, 25, 86, 213, 81, 222,
        59, 92, 76, 281, 234, 154, 11, 210, 61, 159, 30,
    ],
}
# k: squared distances of the first four patches, then the scores of both images.
SCORES = {
    1: [10.47121, 7.407355, 9.935543, 8.07662, 12.53364, 12.67227],
    3: [11.27809, 8.724, 10.36036, 9.021054, 12.74381, 12.80755],
}
# fmt: on


def embedding(name: str, seed: int) -> Tensor:
    """(rows, C), image after image."""
    shapes, pretrain, target = LEVELS[name]
    levels = [
        uniform(f"input:patchcore:{name}:layer{i}", shape, seed)
        for i, shape in zip((2, 3), shapes, strict=True)
    ]
    return official_embedding(levels, pretrain, target).flatten(2).transpose(1, 2).flatten(0, 1)


def coreset_order(name: str, seed: int) -> Tensor:
    vectors = uniform("input:patchcore:vectors", (300, 32), seed)
    start = {
        "coreset_exact": lambda: exact_start(vectors),
        "coreset_approximate_10": lambda: approximate_start(vectors, torch.arange(0, 300, 30)),
        "coreset_approximate_1": lambda: approximate_start(vectors, torch.tensor([0])),
    }[name]()
    return greedy_coreset(vectors, 30, start=start)


def scores(k: int, seed: int) -> dict[str, Tensor]:
    """Two images of 7 x 7 patches against a bank of 50."""
    query = uniform("input:patchcore:query", (98, 24), seed)
    bank = uniform("input:patchcore:bank", (50, 24), seed)
    distance, nearest = nearest_distance(query, bank, k=k)
    patches = distance.mean(dim=1)
    maps = resize_map(patches.view(2, 1, 7, 7), (56, 56))
    return {
        f"k{k}:patch_scores": patches,
        f"k{k}:image_scores": patches.view(2, -1).amax(dim=1),
        f"k{k}:map_56": gaussian_smooth(maps, 4.0).squeeze(1),
        f"k{k}:nearest": nearest,
    }


def test_patchcore_golden_embedding() -> None:
    for name, stride, expected in (("wide", 409, WIDE), ("odd", 151, ODD)):
        found = embedding(name, seed=0).flatten()[::stride][:8]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ORDERS)
def test_patchcore_golden_coreset_order(name: str) -> None:
    assert coreset_order(name, seed=0).tolist() == ORDERS[name]


@pytest.mark.parametrize("k", [1, 3])
def test_patchcore_golden_scores(k: int) -> None:
    found = scores(k, seed=0)
    numbers = [*found[f"k{k}:patch_scores"][:4], *found[f"k{k}:image_scores"]]
    assert [float(number) for number in numbers] == pytest.approx(SCORES[k], rel=1e-5)


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")
def test_patchcore_golden_files() -> None:
    facts = json.loads((GOLDEN / "patchcore.json").read_text())
    stored = np.load(GOLDEN / "patchcore.npz")
    seed = facts["seed"]
    ours = {f"{name}:embedding": embedding(name, seed) for name in LEVELS}
    ours |= {name: coreset_order(name, seed) for name in ORDERS}
    ours |= scores(1, seed) | scores(3, seed)
    for name, entry in facts["outputs"].items():
        full = ours[name].numpy()
        assert list(full.shape) == entry["shape"], name
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]].astype(np.float64)
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=max(entry["tol"], 1e-12)), name


@pytest.mark.parametrize("seed", range(1, 13))
def test_patchcore_golden_orders_for_other_seeds(seed: int) -> None:
    """The official loops in float64, written out."""
    vectors = uniform("input:patchcore:vectors", (300, 32), seed).double()
    between = (vectors[:, None] - vectors[None]).square().sum(dim=2).sqrt()
    anchors = {
        "coreset_exact": between.norm(dim=1),
        "coreset_approximate_10": between[:, ::30].mean(dim=1),
        "coreset_approximate_1": between[:, :1].mean(dim=1),
    }
    for name, distance in anchors.items():
        picks = []
        for _ in range(30):
            picks.append(int(distance.argmax()))
            distance = torch.minimum(distance, between[:, picks[-1]])
        assert coreset_order(name, seed).tolist() == picks, name
