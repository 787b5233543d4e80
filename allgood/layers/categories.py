"""Which category an image shows, when nobody says: the nearest category by global feature.

Letters: B images, C channels, h w patches, K categories, R reference images.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.layers.coreset import greedy_coreset
from allgood.layers.nearest import nearest_distance
from allgood.types import InputError

REFERENCES = 64
"""Good images kept per category, chosen to cover it (greedy coreset)."""


def global_feature(levels: list[Tensor]) -> Tensor:
    """One vector per image: each level's mean over positions, at unit length; (B, sum of C)."""
    return torch.cat([F.normalize(level.mean(dim=(2, 3)), dim=1) for level in levels], dim=1)


class CategoryReferences(nn.Module):
    """Global features of a few good images of each category; one nearest neighbour decides."""

    def __init__(self, num_categories: int, channels: int) -> None:
        super().__init__()
        self.num_categories = num_categories
        self.features: Tensor
        self.category: Tensor
        self.register_buffer("features", torch.empty(0, channels))  # (R, C)
        self.register_buffer("category", torch.empty(0, dtype=torch.int64))  # (R,)

    def fit(self, features: Tensor, category: Tensor) -> None:
        """Keep at most REFERENCES images of each category.

        Args:
            features: (images, C) global features of the good images.
            category: (images,) int64 in [0, K).
        """
        kept = []
        for index in range(self.num_categories):
            rows = (category == index).nonzero().squeeze(1)
            if len(rows) > REFERENCES:
                rows = rows[greedy_coreset(features[rows], REFERENCES)]
            kept.append(rows)
        chosen = torch.cat(kept)
        device = self.features.device
        self.features, self.category = features[chosen].to(device), category[chosen].to(device)

    def fit_batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """As `fit`, from (features, category) of one batch after another."""
        features, category = zip(*batches, strict=True)
        self.fit(torch.cat(features), torch.cat(category))

    def infer(self, levels: list[Tensor]) -> Tensor:
        """(B,) int64: the category whose reference image is nearest.

        Raises:
            InputError: there are several categories, but no references.
        """
        if self.num_categories == 1:
            return torch.zeros(len(levels[0]), dtype=torch.int64, device=levels[0].device)
        if not len(self.features):
            raise InputError(
                "without good pictures the categories cannot be told apart: fit first, or say "
                "which one the pictures show with --category"
            )
        _, nearest = nearest_distance(global_feature(levels), self.features)
        return self.category[nearest[:, 0]]
