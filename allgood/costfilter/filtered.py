"""FilteredDetector: any detector with a filter behind it; itself a detector, and a learner.

    host (frozen) -> Match -> cost volume -> 3-D U-Net -> P;  map = lambda P + (1 - lambda) H'

H' is the host's own map on a scale of the good pictures: 0 at their median pixel, 0.5 at their
99.5th percentile, per category. The filter learns from synthetic anomalies; the host never changes.

Paper: Zhang et al., "CostFilter-AD", ICML 2025. What the paper leaves open, the authors' code and
our defaults: docs/costfilter.md.

Letters: B images, N templates, L levels, K categories, C channels, h w grid, S side of the filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from allgood.costfilter.losses import LossConfig, filter_loss
from allgood.costfilter.network import (
    CostFilterNetwork,
    NetworkConfig,
    anomaly_probability,
    fold,
    small,
)
from allgood.costfilter.volume import (
    VolumeConfig,
    compare,
    initial_map,
    resize_aligned,
    spread_over_stages,
)
from allgood.scoring import hidden_pixels, top_fraction_mean
from allgood.types import InputError, Match, Prediction, TrainingBatch

SHARES = (0.5, 0.995)
"""The percentiles of good pixels that H' puts at 0 and at 0.5."""


@dataclass(frozen=True)
class FilterConfig:
    size: Literal["small", "full"] = "small"
    """`full` is the paper's network, for GPUs; `small` trains on a CPU in minutes, and is not."""
    templates: Literal["match", "good"] = "match"
    """What an image is compared with: what its host matched it with, or good pictures of its
    category that are kept for it and never trained on."""
    num_templates: int = 3
    """N, with `templates=good`."""
    fusion: float = 0.5
    """lambda: the filter's share of the map; 0 is the host alone, 1 the filter alone."""
    top_fraction: float = 0.0038
    """Share of the map's highest pixels averaged into image_score: 250 of 256 x 256."""
    gamma: Literal["slides", "reference", "constant"] = "slides"
    """Rule of the focal loss's exponent."""

    def __post_init__(self) -> None:
        if not 0 <= self.fusion <= 1:
            raise InputError(f"fusion must be in [0, 1], got {self.fusion}")
        if not 0 < self.top_fraction <= 1:
            raise InputError(f"top_fraction must be in (0, 1], got {self.top_fraction}")
        if self.num_templates < 1:
            raise InputError(f"num_templates must be at least 1, got {self.num_templates}")


@dataclass(frozen=True)
class Maps:
    """(B, 1, H, W) each; ignored pixels are 0."""

    host: Tensor
    filter: Tensor
    fused: Tensor


class FilteredDetector(nn.Module):
    """A host with a CostFilter behind it; see the module docstring."""

    def __init__(
        self,
        config: FilterConfig,
        host: Any,
        channels: Sequence[int],
        grid: tuple[int, int],
        seed: int = 0,
    ) -> None:
        """
        Args:
            host: a fitted detector.
            channels, grid: C of each of the L levels of its matches, and the grid of the first.
        """
        super().__init__()
        self.config = config
        self.host = host.eval().requires_grad_(False)
        self.categories: tuple[str, ...] = host.categories
        self.encoding = f"match, {config.templates}"
        self.own_templates = config.templates == "good"
        levels = len(channels)
        self.volume = VolumeConfig(grid, config.num_templates if self.own_templates else 1)
        network = NetworkConfig(
            channels=self.volume.channels,
            levels=levels,
            guidance=(
                channels[0],
                channels[levels // 4],
                channels[2 * levels // 4],
                channels[3 * levels // 4],
            ),
            matching=levels + 1,
            classes=len(self.categories),
            head="opposite",
        )
        self.network = CostFilterNetwork(
            small(network) if config.size == "small" else network, seed
        )
        self._folded: list[CostFilterNetwork] = []  # in a list it is no part of the state
        self.good_range: Tensor
        # (K, 2): the host's map at SHARES of each category's good pixels.
        self.register_buffer(
            "good_range", torch.tensor([[0.0, 1.0]]).repeat(len(self.categories), 1)
        )
        if self.own_templates:
            for i, width in enumerate(channels):
                shape = (len(self.categories), config.num_templates, width, *grid)
                self.register_buffer(f"template_{i}", torch.zeros(shape))

    # -- learning ----------------------------------------------------------------------------------

    def keep_templates(self, levels: Sequence[Tensor]) -> None:
        """Features of the good pictures to compare with: L x (K, N, C, h, w) of any grid."""
        for i, level in enumerate(levels):
            getattr(self, f"template_{i}").copy_(resize_aligned(level, self.volume.grid))

    def encode(
        self, image: Tensor, mask: Tensor, category: Tensor, image_number: Tensor
    ) -> tuple[Tensor, ...]:
        """What the frozen host says of images with painted anomalies.

        Args:
            image: (B, 3, H, W) in [0, 1].
            mask: (B, 1, E, E') what was painted, {0, 1}.
            category: (B,) int64.
            image_number: as in `Detector.match`.

        Returns:
            query levels, template levels where the match brings them, host_map, mask.
        """
        match = self.host.match(image, category, image_number=image_number)
        templates = [] if self.own_templates else match.template
        return (*match.query, *templates, match.host_map, mask.float())

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        """Put the host's map of every category on a scale of its good pictures."""
        values: list[list[Tensor]] = [[] for _ in self.categories]
        for batch in batches:
            *_, host_map, mask = batch.features
            for i, index in enumerate(batch.category.tolist()):
                if not mask[i].any():
                    values[index].append(host_map[i].flatten())
        for index, maps in enumerate(values):
            if maps:
                pixels = torch.cat(maps).double()
                shares = torch.tensor(SHARES, dtype=torch.float64, device=pixels.device)
                self.good_range[index] = _quantiles(pixels, shares).float()

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        *levels, host_map, mask = batch.features
        count = len(levels) if self.own_templates else len(levels) // 2
        templates = self._templates(batch.category) if self.own_templates else levels[count:]
        match = Match(levels[:count], templates, host_map, batch.category)
        logits, classes = self._logits(match, self.network, with_classes=True)
        loss = LossConfig(gamma=self.config.gamma)
        return filter_loss(logits, classes, mask > 0.5, batch.category, loss)

    # -- judging -----------------------------------------------------------------------------------

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        """The host's."""
        match = self.host.match(image, category, image_number=image_number)
        if not self.own_templates:
            return match
        return Match(match.query, self._templates(match.category), match.host_map, match.category)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        size = (image.shape[-2], image.shape[-1])
        match = self.match(image, category)
        maps = self.maps(match, size, ignore=ignore, map_size=size)
        score = top_fraction_mean(maps.fused, self.config.top_fraction)
        if map_size is not None and map_size != size:
            maps = self.maps(match, size, ignore=ignore, map_size=map_size)
        return Prediction(maps.fused, score, match.category)

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """The host's."""
        return self.host.anomaly_map(host_map, image_size, ignore=ignore, map_size=map_size)

    def maps(
        self,
        match: Match,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Maps:
        """The host's map on the scale of good pictures, the filter's, and both together."""
        size = map_size or image_size
        network = self._folded[0] if self._folded else self.network
        logits, _ = self._logits(match, network)
        probability = resize_aligned(anomaly_probability(logits), size)
        host_map = self.host.anomaly_map(match.host_map, image_size, ignore=ignore, map_size=size)
        host_map = self._on_scale(host_map, match.category)
        share = self.config.fusion
        fused = share * probability + (1 - share) * host_map
        return Maps(
            hidden_pixels(host_map, ignore),
            hidden_pixels(probability, ignore),
            hidden_pixels(fused, ignore),
        )

    def train(self, mode: bool = True) -> FilteredDetector:
        """The host stays in evaluation mode; for inference the network's norms are folded."""
        super().train(mode)
        self.host.eval()
        self._folded = [] if mode else [fold(self.network)]
        return self

    def _logits(
        self, match: Match, network: CostFilterNetwork, *, with_classes: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        comparison = compare(match.query, match.template, self.volume)
        matching = initial_map(comparison)  # (B, L, h, w)
        host_map = self._on_scale(match.host_map, match.category)
        host_map = resize_aligned(host_map, (matching.shape[-2], matching.shape[-1]))
        guidance = torch.cat([matching, host_map], dim=1)
        spatial = spread_over_stages(match.query)
        return network(comparison, spatial, guidance, with_classes=with_classes)

    def _on_scale(self, host_map: Tensor, category: Tensor) -> Tensor:
        """H': 0 and 0.5 where the category's good pixels have their SHARES; not below 0."""
        low, high = self.good_range[category].unbind(dim=1)
        spread = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = (host_map - low[:, None, None, None]) / (2 * spread[:, None, None, None])
        return scaled.clamp(min=0)

    def _templates(self, category: Tensor) -> list[Tensor]:
        return [getattr(self, f"template_{i}")[category] for i in range(self.network.config.levels)]


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """As `torch.quantile` (linear), which refuses more than 16 million values."""
    ordered = values.sort().values
    position = shares * (len(ordered) - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
