"""PatchCore: the nearest neighbour of every patch in a coreset of normal patches.

Paper: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.
WideResNet-50, MVTec AD, one model per category: image AUROC 99.2, pixel AUROC 98.1 (bank of 10 %).
Kind: keeps a memory bank. Template: the nearest row of the bank. Left out: ensembles, the IVF-PQ
index.
Ours: one bank over all categories or one per category; patches as `balanced` features (see
PatchCoreConfig).

Letters: B images, L levels, C channels, h w patches, N = h * w, M bank rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.coreset import greedy_coreset
from allgood.layers.nearest import nearest_distance
from allgood.layers.patch_store import PatchStore
from allgood.scoring import gaussian_smooth, ignored_patches, resize_map, visible_rows
from allgood.types import Batch, InputError, Match, Prediction


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
    distance row (needs M x M distances), or row 0."""
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
        if self.reweight and self.image_score != "patch_max":
            raise InputError("reweight needs image_score=patch_max: it weighs the worst patch")


class PatchCore(nn.Module):
    """Anomaly detector of Roth et al. (2022); see the module docstring."""

    def __init__(
        self,
        config: PatchCoreConfig,
        encoder: nn.Module,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.seed = seed
        self.references = CategoryReferences(len(categories), sum(encoder.channels))
        self.bank: Tensor
        self.bank_category: Tensor
        self.register_buffer("bank", torch.empty(0, 0))  # (M, C)
        self.register_buffer("bank_category", torch.empty(0, dtype=torch.int64))  # (M,)

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
        index = {name: i for i, name in enumerate(self.categories)}
        for batch in batches:
            levels = self.encoder(batch.image)
            patches = self.embed(levels)
            size = (patches.shape[-2], patches.shape[-1])
            rows = patches.flatten(2).transpose(1, 2)  # (B, N, C)
            ignored = ignored_patches(batch.ignore, size)
            store.add(
                [sample.id for sample in batch.sample],
                visible_rows(rows, ignored),
                torch.tensor([index[sample.category] for sample in batch.sample]),
                global_feature(levels),
            )
        self.references.fit(*store.global_features())
        patches, category = store.patches()
        groups = (
            [category == i for i in range(len(self.categories))]
            if self.config.bank == "per_category"
            else [torch.ones_like(category, dtype=torch.bool)]
        )
        # The ratio is of the patches seen, not of those that the memory budget let stay.
        share = self.config.coreset_ratio * store.seen_rows / max(1, len(patches))
        picks = []
        for group in groups:
            rows = group.nonzero().squeeze(1)
            count = min(len(rows), max(1, int(share * len(rows))))
            features = patches if len(rows) == len(patches) else patches[rows]
            chosen = greedy_coreset(
                features,
                count,
                start=self._start(features),
                progress=None if progress is None else lambda done, n=count: progress(done, n),
            )
            picks.append(rows[chosen])
        chosen = torch.cat(picks)
        self.bank, self.bank_category = patches[chosen].clone(), category[chosen].clone()

    def match(self, image: Tensor, category: Tensor | None = None) -> Match:
        query, distance, nearest, _ = self._search(image, category)
        batch, channels, height, width = query.shape
        template = self.bank[nearest[..., 0].flatten()].view(batch, 1, height, width, channels)
        return Match([query], [template.permute(0, 1, 4, 2, 3)], distance)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        query, distance, nearest, category = self._search(image, category)
        ignored = ignored_patches(ignore, (distance.shape[-2], distance.shape[-1]))
        if ignored is not None:
            distance = distance.masked_fill(ignored, 0)
        size = (image.shape[-2], image.shape[-1])
        anomaly_map = gaussian_smooth(resize_map(distance, size), self.config.sigma)
        if ignore is not None:
            anomaly_map = anomaly_map.masked_fill(ignore, 0)
        if self.config.image_score == "map_max":
            score = anomaly_map.flatten(1).amax(dim=1)
        else:
            score = distance.flatten(1).amax(dim=1)
            if self.config.reweight:
                score = self._reweighted(query, distance, nearest)
        return Prediction(resize_map(anomaly_map, map_size or size), score, category)

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
        self, image: Tensor, category: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query (B, C, h, w), distance (B, 1, h, w), nearest rows (B, h, w, k), category (B,)."""
        levels = self.encoder(image)
        if category is None:
            category = self.references.infer(levels)
        query = self.embed(levels)
        batch, _, height, width = query.shape
        rows = query.flatten(2).transpose(1, 2)  # (B, N, C)
        k = self.config.num_neighbors
        if self.config.bank == "shared":
            distance, nearest = nearest_distance(rows.flatten(0, 1), self.bank, k=k)
        else:
            distance = rows.new_empty(batch, height * width, k)
            nearest = torch.empty_like(distance, dtype=torch.int64)
            for index in category.unique().tolist():
                mine = (category == index).nonzero().squeeze(1)
                own = (self.bank_category == index).nonzero().squeeze(1)
                found, row = nearest_distance(rows[mine].flatten(0, 1), self.bank[own], k=k)
                distance[mine] = found.view(len(mine), -1, k)
                nearest[mine] = own[row].view(len(mine), -1, k)
        distance = distance.view(batch, 1, height, width, k).mean(dim=-1)
        return query, distance, nearest.view(batch, height, width, k), category

    def _reweighted(self, query: Tensor, distance: Tensor, nearest: Tensor) -> Tensor:
        """Eq. 6 and 7: the worst patch's distance, less where its nearest row is a common sight."""
        scores = []
        for features, patches, rows in zip(
            query.flatten(2), distance.flatten(1), nearest[..., 0], strict=True
        ):
            worst = int(patches.argmax())
            patch, row = features[:, worst], self.bank[rows.flatten()[worst]]
            count = min(self.config.reweight, len(self.bank))
            _, around = nearest_distance(row[None], self.bank, k=count)  # the row itself first
            spread = (self.bank[around[0]] - patch).square().sum(dim=1).sqrt()
            weight = 1 - torch.softmax(spread, dim=0)[0]
            own = patches[worst].sqrt()
            scores.append(own * weight if count > 1 else own)
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
    """(M,) mean distance of each row to the anchor rows: the official approximate sampler's
    start."""
    return torch.cdist(features, features[anchors]).mean(dim=1)


def exact_start(features: Tensor) -> Tensor:
    """(M,) L2 norm of each row's distances to all rows: the official exact sampler's start."""
    parts = features.split(1024)
    return torch.cat([torch.cdist(part, features).norm(dim=1) for part in parts])
