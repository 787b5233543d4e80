"""Guessing the category: one nearest neighbour among a few good images of each."""

import torch
from tiny import picture
from torch import Tensor

from allgood.encoders.frozen import FrozenEncoder
from allgood.layers.categories import REFERENCES, CategoryReferences, global_feature


def test_global_feature_is_each_levels_mean_at_unit_length() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(2, 3, 4, 5, generator=generator),
        torch.randn(2, 2, 2, 3, generator=generator),
    ]
    feature = global_feature(levels)
    for i in range(2):
        expected: list[float] = []
        for level in levels:
            means = [float(channel.mean()) for channel in level[i]]
            length = sum(m * m for m in means) ** 0.5
            expected += [m / length for m in means]
        torch.testing.assert_close(feature[i], torch.tensor(expected))


def test_separated_categories_are_told_apart(tiny_encoder: FrozenEncoder) -> None:
    names = ("cloth", "wood")

    def levels(seeds: range) -> list[Tensor]:
        return tiny_encoder(
            torch.stack([picture(n, seed, (64, 64)) for n in names for seed in seeds])
        )

    references = CategoryReferences(2, sum(tiny_encoder.channels))
    references.fit(global_feature(levels(range(5))), torch.tensor([0] * 5 + [1] * 5))
    assert references.infer(levels(range(10, 16))).tolist() == [0] * 6 + [1] * 6


def test_nearest_reference_decides() -> None:
    references = CategoryReferences(3, 2)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    references.fit(features, torch.tensor([2, 0, 1, 2]))
    angles = torch.tensor([0.1, 1.5, 3.0, -1.4])
    levels = [torch.stack([angles.cos(), angles.sin()], dim=1).view(4, 2, 1, 1)]
    assert references.infer(levels).tolist() == [2, 0, 1, 2]


def test_a_single_category_needs_no_search() -> None:
    inferred = CategoryReferences(1, 2).infer([torch.rand(3, 2, 4, 4)])
    assert inferred.tolist() == [0, 0, 0] and inferred.dtype == torch.int64


def test_references_are_limited_and_cover_each_category() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2 * REFERENCES + 10, 3, generator=generator)
    features[70:75] += 50 * torch.arange(1, 6)[:, None]  # five odd images of category 0
    category = torch.zeros(len(features), dtype=torch.int64)
    category[-10:] = 1
    references = CategoryReferences(3, 3)  # category 2 has no image
    references.fit(features, category)
    assert references.category.bincount(minlength=3).tolist() == [REFERENCES, 10, 0]
    kept = {tuple(row) for row in references.features.tolist()}
    assert {tuple(row) for row in features[70:75].tolist()} <= kept  # cover, not the first 64
    assert {tuple(row) for row in features[-10:].tolist()} <= kept
