"""AnomalyDINO: cosine distance of every patch token to the nearest token of a few good images.

Paper: Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2",
WACV 2025. MVTec AD, one shot at 672 pixels: image AUROC 96.6. "AnomalDF" in CostFilter-AD.
Kind: keeps a memory bank, learns nothing. Template: the nearest token of the bank.
Left out: nothing of the method; the tables' few-shot protocol is `fit(..., shots=k)`.

Letters: B images, C channels, h w patches, N = h * w, M bank rows; I images judged together.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.tiled import Encoder
from allgood.layers.categories import CategoryReferences
from allgood.layers.memory_bank import MemoryBank, draw_images, read_good_images
from allgood.layers.patch_store import PatchStore
from allgood.scoring import (
    gaussian_smooth,
    hidden_patches,
    hidden_pixels,
    resize_map,
    top_fraction_mean,
)
from allgood.types import Batch, InputError, Match, Prediction, Sample

MASKED_CATEGORIES = frozenset(
    {"capsule", "hazelnut", "pill", "screw", "toothbrush"}  # MVTec AD
    | {"candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2"}  # VisA
    | {"pcb1", "pcb2", "pcb3", "pcb4", "pipe_fryum"}
)
"""Categories whose background the authors mask: single objects in the middle of the picture."""


@dataclass(frozen=True)
class AnomalyDINOConfig:
    bank: Literal["per_category", "shared"] = "per_category"
    """`shared` compares with the tokens of all categories (category unknown at test time)."""
    templates: int | None = None
    """Keep only this many random good images per category (CostFilter-AD's N = 3); None: all
    given."""
    coreset_ratio: float = 1.0
    """Share of the tokens the bank keeps; below 1 a greedy coreset, which is not in the paper."""
    num_neighbors: int = 1
    """K: a token's distance is the mean of its K smallest distances."""
    mask_background: Literal["listed", "off", "all"] = "listed"
    """Which categories' test images are masked: those of the authors' list, none, or all."""
    mask_threshold: float = 10.0
    """On the tokens' first principal component; fits DINOv2 ViT-S/14 behind its final norm."""
    morphology: Literal["grid", "raster"] = "grid"
    """`raster` reproduces the reference code, which dilates along the flattened row of patches."""
    top_fraction: float = 0.01
    """Share of the patches averaged into image_score; masked patches count with 0."""
    sigma: float = 4.0
    """Of the Gaussian, in pixels of the map asked for (the paper: of the original picture)."""
    query: Literal["unit", "raw"] = "unit"
    """The image's tokens in `match`: as they are compared, or as the encoder gives them, which is
    what guides the published filters behind AnomalDF."""

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise InputError(f"top_fraction must be in (0, 1], got {self.top_fraction}")
        if not 0 < self.coreset_ratio <= 1:
            raise InputError(f"coreset_ratio must be in (0, 1], got {self.coreset_ratio}")
        if self.num_neighbors < 1 or (self.templates is not None and self.templates < 1):
            raise InputError("num_neighbors and templates must be at least 1")
        if self.sigma < 0:
            raise InputError(f"sigma must not be negative, got {self.sigma}")


class AnomalyDINO(nn.Module):
    """Anomaly detector of Damm et al. (2025); see the module docstring."""

    def __init__(
        self,
        config: AnomalyDINOConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.seed = seed
        listed = {"off": (), "listed": MASKED_CATEGORIES, "all": categories}[config.mask_background]
        self.masked = tuple(name for name in categories if name in listed)
        self.references = CategoryReferences(len(categories), sum(encoder.channels))
        self.bank = MemoryBank(
            categories, shared=config.bank == "shared", num_neighbors=config.num_neighbors
        )

    def remembered(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Those of which the bank has tokens; one that cannot be read is not replaced."""
        if self.config.templates is None:
            return samples
        return draw_images(samples, self.config.templates, self.seed)

    def fit(
        self,
        batches: Iterable[Batch],
        store: PatchStore,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the good images (and their rotated copies) once: the bank is their unit tokens.

        Reference images are not masked: missing boundary tokens would cause false alarms.

        Args:
            batches: good images.
            store: holds the tokens; batches it has already seen must not come again.
            progress: called with (rows chosen, rows to choose), where a coreset is chosen.
        """
        read_good_images(
            batches,
            store,
            self.categories,
            self.encoder,
            lambda levels: F.normalize(self.embed(levels), dim=1),
        )
        self.references.fit(*store.global_features())
        self.bank.choose(store, self.config.coreset_ratio, progress=progress)

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        levels = self.encoder(image)
        query, distance, nearest, category = self._search(levels, category, image_number)
        template = self.bank.patches[nearest[:, None, ..., 0]]  # (B, 1, h, w, C)
        if self.config.query == "raw":
            grid = (query.shape[-2], query.shape[-1])
            query = torch.cat([resize_map(level, grid) for level in levels], dim=1)
        return Match([query], [template.permute(0, 1, 4, 2, 3)], distance, category)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        _, distance, _, category = self._search(self.encoder(image), category)
        score = top_fraction_mean(hidden_patches(distance, ignore), self.config.top_fraction)
        size = (image.shape[-2], image.shape[-1])
        anomaly_map = self.anomaly_map(distance, size, ignore=ignore, map_size=map_size)
        return Prediction(anomaly_map, score, category)

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        distance = resize_map(hidden_patches(host_map, ignore), map_size or image_size)
        return hidden_pixels(gaussian_smooth(distance, self.config.sigma), ignore)

    def embed(self, levels: list[Tensor]) -> Tensor:
        """Tokens (B, C, h, w) of a ViT's level; several levels meet on the first one's grid."""
        grid = (levels[0].shape[-2], levels[0].shape[-1])
        if len(levels) == 1:
            return levels[0]
        return torch.cat([F.normalize(resize_map(level, grid), dim=1) for level in levels], dim=1)

    def _search(
        self, levels: list[Tensor], category: Tensor | None, image_number: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query (B, C, h, w), distance (B, 1, h, w), nearest rows (B, h, w, K), category (B,)."""
        if category is None:
            category = self.references.infer(levels)
        tokens = self.embed(levels)
        query = F.normalize(tokens, dim=1, eps=1e-12)
        visible = self._visible(tokens, category) if self.masked else None
        squared, nearest = self.bank.search(
            query, category, image_number=image_number, visible=visible
        )
        # Of unit vectors, half the squared distance is 1 - cosine.
        return query, squared / 2, nearest, category

    def _visible(self, tokens: Tensor, category: Tensor) -> Tensor:
        """(B, h, w) bool: patches of the object, in pictures of a category that is `masked`."""
        if torch.compiler.is_compiling():
            raise InputError(
                "a graph cannot mask the background, which rests on each picture's own components: "
                "fit with --settings mask_background=off"
            )
        visible = torch.ones_like(tokens[:, 0], dtype=torch.bool)
        for i, index in enumerate(category.tolist()):
            if self.categories[index] in self.masked:
                visible[i] = foreground_mask(
                    tokens[i], self.config.mask_threshold, morphology=self.config.morphology
                )
        return visible


def foreground_mask(
    tokens: Tensor, threshold: float, *, morphology: Literal["grid", "raster"] = "grid"
) -> Tensor:
    """Patches of the object: first principal component above a threshold, then dilated and closed.

    The component's sign is the one under which more than 35 % of the picture's middle is
    foreground; before that test its largest loading is positive, as scikit-learn has it.

    Args:
        tokens: (C, h, w), not normalised.
        threshold: on the centred projection.

    Returns:
        (h, w) bool.
    """
    _, height, width = tokens.shape
    rows = tokens.flatten(1).T.double()
    centred = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    component = vectors[:, -1]
    component = component * component[component.abs().argmax()].sign()
    projection = (centred @ component).view(height, width)
    mask = projection > threshold
    middle = mask[int(0.2 * height) : int(0.8 * height), int(0.2 * width) : int(0.8 * width)]
    if middle.numel() == 0 or middle.double().mean() <= 0.35:
        mask = -projection > threshold
    grid = mask if morphology == "grid" else mask.reshape(-1, 1)
    return _erode(_dilate(_dilate(grid))).view(height, width)


def _dilate(mask: Tensor) -> Tensor:
    """With 3 x 3 ones; outside is background."""
    return F.max_pool2d(mask[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0.5


def _erode(mask: Tensor) -> Tensor:
    """With 3 x 3 ones; outside counts as foreground, so that the border stays."""
    return ~_dilate(~mask)


def batched_zero_shot(
    tokens: Tensor,
    *,
    fraction: float = 0.001,
    foreground: Tensor | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """Patch scores of images judged against each other, without any reference image.

    With M patches in all other images and q the int(fraction * M)-th smallest cosine distance of a
    patch to them, its score is the mean of the distances strictly below q.

    Args:
        tokens: (I, N, C), I >= 2.
        foreground: (I, N) bool; other patches score 0.
        chunk_size: rows compared at a time; bounds memory at N * chunk_size floats.

    Returns:
        (I, N) in [0, 2].

    Raises:
        InputError: too few patches: the mean would be over nothing.
    """
    images, patches, _ = tokens.shape
    rank = int(fraction * (images - 1) * patches)
    if rank < 2:
        raise InputError(
            f"{images} images of {patches} patches are too few for a fraction of {fraction}: "
            f"at least {math.ceil(2 / (fraction * patches)) + 1} images are needed"
        )
    unit = F.normalize(tokens, dim=2, eps=1e-12)
    image_of = torch.arange(images, device=tokens.device).repeat_interleave(patches)
    scores = tokens.new_zeros(images, patches)
    for i in range(images):
        smallest = tokens.new_empty(patches, 0)
        for part, image in zip(
            unit.flatten(0, 1).split(chunk_size), image_of.split(chunk_size), strict=True
        ):
            distance = (1 - unit[i] @ part[image != i].T).clamp_(min=0)
            smallest = torch.cat([smallest, distance], dim=1)
            smallest = smallest.topk(min(rank, smallest.shape[1]), largest=False).values
        below = smallest < smallest[:, -1:]
        scores[i] = (smallest * below).sum(dim=1) / below.sum(dim=1).clamp(min=1)
    return scores if foreground is None else scores * foreground
