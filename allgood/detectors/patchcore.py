"""PatchCore: the nearest neighbour of every patch in a coreset of normal patches.

Paper: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
WideResNet-50, MVTec AD, one model per category: image AUROC 99.2, pixel AUROC 98.1 (bank of 10 %).
Kind: keeps a memory bank. Template: the nearest row of the bank.
Left out: ensembles, the IVF-PQ index, the random projection before the coreset.
Ours: one bank over all categories or one per category; `balanced` patches (see PatchCoreConfig).

Letters: B images, L levels, C channels, h w patches, N = h * w, M bank rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.tiled import Encoder
from allgood.layers.categories import CategoryReferences
from allgood.layers.memory_bank import MemoryBank, read_good_images
from allgood.layers.nearest import nearest_distance
from allgood.layers.patch_store import PatchStore
from allgood.scoring import gaussian_smooth, hidden_patches, hidden_pixels, resize_map
from allgood.types import Batch, InputError, Match, Prediction, Sample

_BY_DIFFERENCE = "donot_use_mm_for_euclid_dist"
"""Distances without the expanded form, whose digits cancel where rows are near."""


@dataclass(frozen=True)
class PatchCoreConfig:
    embedding: Literal["balanced", "official"] = "balanced"
    """How the levels become one vector per patch. `balanced`: each level averaged over its 3 x 3
    neighbourhood and brought to unit length, so that no level and no bright patch outweighs the
    others. `official`: adaptive average pooling to `pretrain_dim` per level, then to
    `target_dim`."""
    pretrain_dim: int = 1024
    target_dim: int = 1024
    coreset_ratio: float = 0.01
    """Share of all patches that the bank keeps."""
    coreset_start: Literal["approximate", "exact", "first"] = "approximate"
    """First pick: farthest on average from 10 rows (official default), the largest norm of its
    distance row (all distances to all), or row 0."""
    bank: Literal["shared", "per_category"] = "shared"
    """`per_category` compares an image with patches of its own category only."""
    num_neighbors: int = 1
    """k: a patch's distance is the mean of its k smallest squared distances."""
    image_score: Literal["map_max", "patch_max"] = "map_max"
    """Maximum of the smoothed map, or of the patches (official)."""
    reweight: int = 0
    """b of the paper's Eq. 7 (9 there): weigh the score by the neighbourhood of the nearest row; 0:
    off, as in the official code. Needs image_score=patch_max."""
    sigma: float = 4.0
    """Of the Gaussian over the map, in pixels of the network's input."""

    def __post_init__(self) -> None:
        if not 0 < self.coreset_ratio <= 1:
            raise InputError(f"coreset_ratio must be in (0, 1], got {self.coreset_ratio}")
        if self.num_neighbors < 1:
            raise InputError(f"num_neighbors must be at least 1, got {self.num_neighbors}")
        if min(self.pretrain_dim, self.target_dim) < 1:
            raise InputError("pretrain_dim and target_dim must be at least 1")
        if min(self.reweight, self.sigma) < 0:
            raise InputError("reweight and sigma must not be negative")
        if self.reweight and self.image_score != "patch_max":
            raise InputError("reweight needs image_score=patch_max: it weighs the worst patch")


class PatchCore(nn.Module):
    """Anomaly detector of Roth et al. (2022); see the module docstring."""

    def __init__(
        self,
        config: PatchCoreConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.seed = seed
        self.references = CategoryReferences(len(categories), sum(encoder.channels))
        self.bank = MemoryBank(
            categories, shared=config.bank == "shared", num_neighbors=config.num_neighbors
        )

    def remembered(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples

    def fit(
        self,
        batches: Iterable[Batch],
        store: PatchStore,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the good images once, then choose the bank.

        Args:
            batches: good images.
            store: holds the patches; batches it has already seen must not come again.
            progress: called with (rows chosen, rows to choose).
        """
        read_good_images(batches, store, self.categories, self.encoder, self.embed)
        self.references.fit(*store.global_features())
        self.bank.choose(
            store,
            self.config.coreset_ratio,
            together=self.bank.shared,
            start=self._start,
            progress=progress,
        )

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        query, distance, nearest, category = self._search(image, category, image_number)
        template = self.bank.patches[nearest[..., 0]].permute(0, 3, 1, 2)
        # Levels that stand side by side in a patch come apart again.
        official = self.config.embedding == "official"
        sizes = [query.shape[1]] if official else list(self.encoder.channels)
        return Match(
            list(query.split(sizes, dim=1)),
            [part.unsqueeze(1) for part in template.split(sizes, dim=1)],
            distance,
            category,
        )

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        query, distance, nearest, category = self._search(image, category)
        distance = hidden_patches(distance, ignore)
        size = (image.shape[-2], image.shape[-1])
        anomaly_map = self.anomaly_map(distance, size, ignore=ignore)
        if self.config.image_score == "map_max":
            score = anomaly_map.flatten(1).amax(dim=1)
        else:
            score = distance.flatten(1).amax(dim=1)
            if self.config.reweight:
                score = self._reweighted(query, distance, nearest, category)
        return Prediction(resize_map(anomaly_map, map_size or size), score, category)

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        distance = hidden_patches(host_map, ignore)
        anomaly_map = gaussian_smooth(resize_map(distance, image_size), self.config.sigma)
        return resize_map(hidden_pixels(anomaly_map, ignore), map_size or image_size)

    def embed(self, levels: list[Tensor]) -> Tensor:
        """Locally aware patch features (B, C, h, w) on the first level's grid."""
        grid = (levels[0].shape[-2], levels[0].shape[-1])
        if self.config.embedding == "balanced":
            pooled = [F.avg_pool2d(level, 3, stride=1, padding=1) for level in levels]
            return torch.cat([F.normalize(resize_map(p, grid), dim=1) for p in pooled], dim=1)
        return official_embedding(levels, self.config.pretrain_dim, self.config.target_dim)

    def _start(self, features: Tensor) -> Tensor | None:
        """Distances before the first pick, see `coreset_start`."""
        match self.config.coreset_start:
            case "first":
                return None
            case "exact":
                return exact_start(features)
            case "approximate":
                generator = torch.Generator().manual_seed(self.seed)
                anchors = torch.randperm(len(features), generator=generator)[:10]
                return approximate_start(features, anchors)

    def _search(
        self, image: Tensor, category: Tensor | None, image_number: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query (B, C, h, w), distance (B, 1, h, w), nearest rows (B, h, w, k), category (B,)."""
        levels = self.encoder(image)
        if category is None:
            category = self.references.infer(levels)
        query = self.embed(levels)
        distance, nearest = self.bank.search(query, category, image_number=image_number)
        return query, distance, nearest, category

    def _reweighted(
        self, query: Tensor, distance: Tensor, nearest: Tensor, category: Tensor
    ) -> Tensor:
        """Eq. 6 and 7: the worst patch's distance, less where its nearest row is a common sight.

        s = (1 - exp ||q - m*|| / sum over the b nearest rows m of m*: exp ||q - m||) ||q - m*||
        """
        if torch.compiler.is_compiling():
            raise InputError(
                "a graph cannot weigh the score by the worst patch's neighbours: fit with "
                "--settings reweight=0"
            )
        scores = []
        for features, patches, rows, index in zip(
            query.flatten(2), distance.flatten(1), nearest[..., 0].flatten(1), category, strict=True
        ):
            worst = int(patches.argmax())
            patch, row = features[:, worst], self.bank.patches[rows[worst]]  # q, m*
            bank = self.bank.patches[self.bank.rows_for(index)]
            count = min(self.config.reweight, len(bank))
            _, around = nearest_distance(row[None], bank, k=count)  # the row itself first
            spread = (bank[around[0]] - patch).square().sum(dim=1).sqrt()
            own = patches[worst].sqrt()
            scores.append(own * (1 - torch.softmax(spread, dim=0)[0]) if count > 1 else own)
        return torch.stack(scores)


def official_embedding(levels: list[Tensor], pretrain_dim: int, target_dim: int) -> Tensor:
    """Patch features of the official code: (B, target_dim, h, w) on the first level's grid.

    Per level: the 3 x 3 neighbourhood of each position (zero padding), flattened channel by channel
    and average-pooled to pretrain_dim numbers; brought to the first level's grid (bilinear). Then
    the stacked levels are average-pooled to target_dim. Pooling before resizing gives the same
    numbers, as both are linear, with a ninth of the memory.
    """
    grid = (levels[0].shape[-2], levels[0].shape[-1])
    pooled = []
    for level in levels:
        height, width = level.shape[-2:]
        windows = F.unfold(level, 3, padding=1).transpose(1, 2)  # (B, N, C * 9)
        vectors = F.adaptive_avg_pool1d(windows, pretrain_dim)
        pooled.append(resize_map(vectors.transpose(1, 2).unflatten(2, (height, width)), grid))
    stacked = torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)  # (B, N, L * pretrain_dim)
    return F.adaptive_avg_pool1d(stacked, target_dim).transpose(1, 2).unflatten(2, grid)


def approximate_start(features: Tensor, anchors: Tensor) -> Tensor:
    """(M,) mean distance of each row to the anchors: where the official approximate sampler starts.

    Args:
        features: (M, C).
        anchors: (A,) int64, rows of the features; they are not picked for that.
    """
    return torch.cdist(features, features[anchors], compute_mode=_BY_DIFFERENCE).mean(dim=1)


def exact_start(features: Tensor) -> Tensor:
    """(M,) L2 norm of each row's distances to all rows: where the official exact sampler starts."""
    parts = features.split(1024)
    return torch.cat([torch.cdist(part, features).norm(dim=1) for part in parts])
