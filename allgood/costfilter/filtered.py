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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from allgood.costfilter.config import FilterConfig
from allgood.costfilter.losses import filter_loss
from allgood.costfilter.network import (
    CostFilterNetwork,
    NetworkConfig,
    anomaly_probability,
    fold,
    small,
)
from allgood.costfilter.volume import (
    Comparison,
    VolumeConfig,
    compare,
    initial_map,
    resize_aligned,
    spread_over_stages,
)
from allgood.layers.derived import Derived
from allgood.scoring import (
    gaussian_smooth,
    hidden_patches,
    hidden_pixels,
    ignored_patches,
    resize_map,
    top_fraction_mean,
    visible_rows,
)
from allgood.types import InputError, Match, Prediction, TrainingBatch

SHARES = (0.5, 0.995)
"""The percentiles of good pixels that H' puts at 0 and at 0.5."""


@dataclass(frozen=True)
class Maps:
    """(B, 1, H, W) each; ignored pixels are 0."""

    host: Tensor
    filter: Tensor
    fused: Tensor

    def side_by_side(self) -> Tensor:
        """(B, 3, H, W): fused, host, filter."""
        return torch.cat([self.fused, self.host, self.filter], dim=1)


@dataclass(frozen=True)
class Drawn:
    """What the host said of drawings, and what it should have found."""

    match: Match
    mask: Tensor
    """(B, 1, E, E') bool: what was painted."""
    ignore: Tensor
    """(B, 1, E, E') bool: where nobody should look; nothing is painted there."""


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
            channels, grid: C of each of the L levels of its matches, and the grid on which they
                are compared, see `shape_of_match` and `volume_grid`.
        """
        super().__init__()
        self.config = config
        self.host = host.eval().requires_grad_(False)
        self.categories: tuple[str, ...] = host.categories
        self.encoding = f"match, {config.templates}; host map on {grid[0]} x {grid[1]}"
        self.own_templates = config.templates == "good"
        self.host_levels = len(channels)
        widths = _split_widths(channels, config.split)
        levels = len(widths)
        self.volume = VolumeConfig(
            grid,
            config.num_templates if self.own_templates else 1,
            merge=config.merge,
            top_k=config.top_k,
            orientation=config.orientation,
        )
        classes = config.classes or len(self.categories)
        if classes < len(self.categories):
            raise InputError(
                f"classes must be at least {len(self.categories)}, one per category, got {classes}"
            )
        network = NetworkConfig(
            channels=self.volume.channels,
            levels=levels,
            guidance=tuple(spread_over_stages(widths)),
            matching=levels + (config.matching == "levels_and_host"),
            classes=classes,
            align_corners=config.align_corners,
            head=config.head,
        )
        if config.size == "small":
            network = small(network)
        if config.stem is not None:
            network = replace(network, stem=config.stem)
        self.network = CostFilterNetwork(network, seed)
        self._folded: Derived[CostFilterNetwork] = Derived()
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

    def keep_templates(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Features of the K * N good pictures to compare with, N of each category in order:
        batches of L levels (B, C, h, w) of any grid."""
        done = 0
        for levels in batches:
            for i, level in enumerate(levels):
                kept = getattr(self, f"template_{i}").flatten(0, 1)  # (K * N, C, *grid), a view
                kept[done : done + len(level)] = resize_aligned(level, self.volume.grid)
            done += len(levels[0])

    def encode(
        self,
        image: Tensor,
        mask: Tensor,
        ignore: Tensor,
        category: Tensor,
        image_number: Tensor,
        *,
        whole: bool = False,
    ) -> tuple[Tensor, ...]:
        """What the frozen host says of images with painted anomalies.

        Args:
            image: (B, 3, H, W) in [0, 1].
            mask, ignore: see `Drawn`.
            category: (B,) int64.
            image_number: as in `Detector.match`.
            whole: keep a host_map that is finer than the volume's grid, up to the size of the
                image, as `maps` wants it; training reads it on that grid.

        Returns:
            query levels, template levels where the match brings them, host_map in two parts (see
            `_parted`), mask, ignore: what `drawn` takes apart again.
        """
        match = self.host.match(image, category, image_number=image_number)
        templates = [] if self.own_templates else match.template
        host_map, grid = hidden_patches(match.host_map.float(), ignore), self.volume.grid
        if not whole and host_map[0].numel() > grid[0] * grid[1]:
            host_map = resize_aligned(host_map, grid)
        return (*match.query, *templates, *_parted(host_map), mask.float(), ignore.float())

    def drawn(self, batch: TrainingBatch) -> Drawn:
        """What `encode` gave, fresh or from a cache."""
        *levels, scaled, exponent, mask, ignore = batch.features
        query, rest = levels[: self.host_levels], levels[self.host_levels :]
        templates = self._templates(batch.category) if self.own_templates else rest
        match = Match(query, templates, _joined(scaled, exponent), batch.category)
        return Drawn(match, mask > 0.5, ignore > 0.5)

    def set_scale(self, batches: Iterable[TrainingBatch]) -> None:
        """Put the host's map of every category on a scale of its good pictures.

        Args:
            batches: of every good picture as it is, nothing painted.
        """
        values: list[list[Tensor]] = [[] for _ in self.categories]
        for batch in batches:
            drawn = self.drawn(batch)
            host_map = drawn.match.host_map
            ignored = ignored_patches(drawn.ignore, (host_map.shape[-2], host_map.shape[-1]))
            for index, pixels in zip(
                batch.category.tolist(), visible_rows(host_map.flatten(2).mT, ignored), strict=True
            ):
                values[index].append(pixels.flatten())
        for index, maps in enumerate(values):
            if any(len(pixels) for pixels in maps):
                pixels = torch.cat(maps).double()
                shares = torch.tensor(SHARES, dtype=torch.float64, device=pixels.device)
                self.good_range[index] = _quantiles(pixels, shares).float()

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        """Nothing: drawings may all be painted, so `set_scale` looks at the pictures before."""

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        drawn = self.drawn(batch)
        logits, classes = self._logits(drawn.match, self.network, with_classes=True)
        hard = [i for i, name in enumerate(self.categories) if name in self.config.hard_categories]
        mask, ignore, category = (
            x.repeat_interleave(self.volume.passes, dim=0)
            for x in (drawn.mask, drawn.ignore, batch.category)
        )
        return filter_loss(
            logits,
            classes,
            mask,
            category,
            gamma=self.config.gamma,
            ssim=self.config.ssim,
            hard_classes=hard,
            ignore=ignore,
        )

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
        parts = self.predict_parts(image, category, ignore=ignore, map_size=map_size)
        return Prediction(parts.anomaly_map[:, :1], parts.image_score[:, 0], parts.category)

    def predict_parts(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        """As `predict`, with what it is made of beside it: `anomaly_map` (B, 3, H, W) and
        `image_score` (B, 3) of the fused map, the host's and the filter's, scored alike."""
        size = (image.shape[-2], image.shape[-1])
        match = self.match(image, category)
        match = replace(match, host_map=hidden_patches(match.host_map, ignore))
        probability = self.probability(match, size)
        maps = self.maps(match, probability, size, ignore=ignore).side_by_side()
        score = top_fraction_mean(maps.flatten(0, 1), self.config.top_fraction)
        if map_size is not None and map_size != size:
            maps = self.maps(
                match, probability, size, ignore=ignore, map_size=map_size
            ).side_by_side()
        return Prediction(maps, score.unflatten(0, (-1, maps.shape[1])), match.category)

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

    def probability(self, match: Match, image_size: tuple[int, int]) -> Tensor:
        """P, what the network says: (B, 1, S, S)."""
        network = self.network
        if not (self.training or torch.is_grad_enabled()):  # as it only judges, fold its norms
            network = self._folded(network, partial(fold, network))
        logits, _ = self._logits(match, network, image_size=image_size)
        return anomaly_probability(logits, templates=self.volume.passes)

    def maps(
        self,
        match: Match,
        probability: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Maps:
        """The host's map as it enters the fusion, the filter's (of its `probability`), and both
        together."""
        size = map_size or image_size
        # Published fusions meet at the input's size; only then are they resized.
        meet = size if self.config.host == "scaled" else image_size
        probability = resize_aligned(probability, meet)
        if self.config.host == "scaled":
            host_map = self.host.anomaly_map(
                match.host_map, image_size, ignore=ignore, map_size=size
            )
            host_map = self._on_scale(host_map, match.category)
        else:
            raw = match.host_map if self.config.host == "raw" else self.least_cost(match)
            host_map = resize_aligned(hidden_patches(raw.float(), ignore), meet)
            host_map = gaussian_smooth(host_map, self.config.host_sigma)
        fused = self.fuse(host_map, probability, self.config.fusion)
        return Maps(
            *(
                hidden_pixels(resize_map(one, size), ignore)
                for one in (host_map, probability, fused)
            )
        )

    def fuse(self, host_map: Tensor, probability: Tensor, share: float) -> Tensor:
        """lambda P + (1 - lambda) H, for `share` = lambda."""
        fused = share * probability + (1 - share) * host_map
        return gaussian_smooth(fused, self.config.map_sigma)

    def least_cost(self, match: Match) -> Tensor:
        """What the filter starts from, the volume's minimum averaged over levels: (B, 1, h, w)."""
        comparison = compare(
            self._split(match.query, 1), self._split(match.template, 2), self.volume
        )
        least = initial_map(comparison).unflatten(0, (-1, self.volume.passes)).amin(dim=1)
        return least.mean(dim=1, keepdim=True)

    def train(self, mode: bool = True) -> FilteredDetector:
        """The host stays in evaluation mode."""
        super().train(mode)
        self.host.eval()
        return self

    def _logits(
        self,
        match: Match,
        network: CostFilterNetwork,
        *,
        with_classes: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        query, template = self._split(match.query, 1), self._split(match.template, 2)
        comparison = compare(query, template, self.volume)
        guidance = self._guidance(comparison, match, image_size)
        rebuilt = self.config.spatial == "template"
        spatial = spread_over_stages([t[:, 0] for t in template] if rebuilt else query)
        return network(comparison, spatial, guidance, with_classes=with_classes)

    def _guidance(
        self, comparison: Comparison, match: Match, image_size: tuple[int, int] | None
    ) -> Tensor:
        """The matching guidance: (B, L or L + 1, h, w), or as many rows as there are passes.

        Args:
            image_size: of the images that are judged; None in training, where the authors mix and
                resize the host's map otherwise.
        """
        mode, levels, grid = self.config.matching, len(comparison.levels), self.volume.grid
        host_map = match.host_map.float().repeat_interleave(self.volume.passes, dim=0)
        if mode == "host":
            if image_size is not None:
                host_map = resize_aligned(host_map, image_size)
            return host_map.expand(-1, levels, -1, -1)
        matching = initial_map(comparison)  # (B, L, h, w)
        if mode == "levels":
            return matching
        host_map = resize_aligned(host_map, grid)
        if mode == "levels_and_host":
            category = match.category.repeat_interleave(self.volume.passes)
            return torch.cat([matching, self._on_scale(host_map, category)], dim=1)
        host_map = 0.1 * host_map
        first = matching.mean(dim=1, keepdim=True)
        if mode == "hvq":
            first = first + host_map / 170
        else:
            first = (first + host_map) / (70 if image_size is None else 40)
        return torch.cat([first, matching[:, 1:]], dim=1)

    def _split(self, levels: list[Tensor], dim: int) -> list[Tensor]:
        """The host's levels, or its only one cut into `split`."""
        if not self.config.split:
            return levels
        return list(levels[0].split(self.config.split, dim=dim))

    def _on_scale(self, host_map: Tensor, category: Tensor) -> Tensor:
        """H': 0 and 0.5 where the category's good pixels have their SHARES; not below 0."""
        low, high = self.good_range[category].unbind(dim=1)
        spread = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = (host_map - low[:, None, None, None]) / (2 * spread[:, None, None, None])
        return scaled.clamp(min=0)

    def _templates(self, category: Tensor) -> list[Tensor]:
        return [getattr(self, f"template_{i}")[category] for i in range(self.host_levels)]


def shape_of_match(
    detector: Any, image_size: tuple[int, int], device: torch.device
) -> tuple[list[int], tuple[int, int]]:
    """Channels of each level of a detector's matches, and the grid of the first."""
    image = torch.zeros(1, 3, *image_size, device=device)
    category = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        query = detector.match(image, category).query
    return [level.shape[1] for level in query], (query[0].shape[-2], query[0].shape[-1])


def volume_grid(config: FilterConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid on which matches of this grid are compared: never finer than the network's own.

    Beyond it the cost of comparing grows with the square of the positions, and the network's first
    resize drops them again.
    """
    network = NetworkConfig(channels=1, levels=1, guidance=(1,) * 4, matching=1)  # of whatever
    side = (small(network) if config.size == "small" else network).side
    return min(grid[0], side), min(grid[1], side)


def _parted(host_map: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, h, w) -> the maps with their largest values in [0.5, 1), and the powers of two (B, 1)
    by which they were divided.

    A feature cache rounds to float16, and a product of small distances (UniAS) is less than the
    least that float16 holds.
    """
    exponent = torch.frexp(host_map.flatten(1).amax(dim=1, keepdim=True)).exponent.float()
    return torch.ldexp(host_map, -exponent[:, :, None, None]), exponent


def _joined(scaled: Tensor, exponent: Tensor) -> Tensor:
    """What `_parted` was given, but for the rounding of a cache."""
    return torch.ldexp(scaled, exponent[:, :, None, None])


def _split_widths(channels: Sequence[int], split: tuple[int, ...]) -> list[int]:
    """Channels of the levels that are compared."""
    if split and (len(channels) != 1 or sum(split) != channels[0]):
        given = ", ".join(map(str, channels))
        raise InputError(
            f"split cuts one level of {sum(split)} channels, but the detector's matches have "
            f"{given}: fit it on the encoder and levels that the filter is for, or set split"
        )
    return list(split or channels)


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """As `torch.quantile` (linear), which refuses more than 16 million values."""
    ordered = values.sort().values
    position = shares * (len(ordered) - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
