"""MiniMaxAD: a small autoencoder of large kernels, trained on what it rebuilds worst.

Paper: Wang et al., "MiniMaxAD: A Lightweight Autoencoder for Feature-Rich Anomaly Detection", 2024.
Table 3, MVTec AD, one model for all: image AUROC 98.8, AUPRO 92.2.
Kind: rebuilds features. Template: the rebuilt levels.
Left out: the random crops and flips of AeBAD-S's training.

Letters: B images, C channels of a level, h w its grid, H W pixels, S the sum of the levels'
distances (Eq. 3); the levels are three, each of half the grid of the one before.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.tiled import Encoder, TiledEncoder
from allgood.encoders.unireplknet import Block, ChannelNorm, ConvNorm, channel_norm, merge
from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.cosine import cosine_distance, reverse_distillation_loss
from allgood.layers.derived import Derived
from allgood.layers.processes import of_all_processes
from allgood.layers.pyramid import require_halving, require_multiple
from allgood.scoring import (
    gaussian_kernel,
    gaussian_smooth,
    hidden_patches,
    hidden_pixels,
    predict_from_map,
    resize_map,
    top_fraction_mean,
)
from allgood.types import InputError, Match, Prediction, TrainingBatch

SIGMA = 4.0
"""Of the smoothing, in pixels of the input."""


@dataclass(frozen=True)
class MiniMaxADConfig:
    loss: Literal["adc", "global", "local", "local_hm"] = "adc"
    """`adc`: MiniMaxAD-fr, for many categories or much variation; `global`: MiniMaxAD-fp, for
    little; `local` and `local_hm`: ablations (Table 4)."""
    p_hard: float = 0.9999
    """Share of S below the threshold alpha of `adc`."""
    p_lim: float = 0.9995
    """Share of S^2 below beta, for `adc` and `local_hm`: no fewer than the others are learned."""
    depths: tuple[int, ...] = (2, 2, 8)
    """Blocks of the decoder at each level, finest first; as many as the encoder's in the paper."""
    smoothing: Literal["narrow", "wide"] = "narrow"
    """A Gaussian of sigma 4 on 5 x 5 pixels that takes the outside as 0, or on 33 x 33, mirrored
    (AeBAD-S)."""
    top_fraction: float = 0.01
    """Share of the map's highest pixels averaged into image_score; 0: the highest alone."""

    def __post_init__(self) -> None:
        for name in ("p_hard", "p_lim"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if len(self.depths) != 3 or min(self.depths) < 1:
            raise InputError(f"depths must be three numbers of at least 1, got {self.depths}")
        if not 0 <= self.top_fraction <= 1:
            raise InputError(f"top_fraction must be in [0, 1], got {self.top_fraction}")


class MiniMaxAD(nn.Module):
    """Anomaly detector of Wang et al. (2024); see the module docstring."""

    def __init__(
        self,
        config: MiniMaxADConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(encoder, TiledEncoder):
            raise InputError("minimaxad compares whole images and takes no tiles: leave out --tile")
        require_halving("minimaxad", encoder)
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.encoding = "levels, normalised over channels"
        self.multiple = 2 * encoder.strides[-1]
        self.references = CategoryReferences(len(categories), encoder.channels[-1])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.bottleneck = Bottleneck(encoder.channels)
            self.decoder = Decoder(encoder.channels, config.depths)
            self.bottleneck.apply(_initialise)
            self.decoder.apply(_initialise)
        self._merged: tuple[Derived[Any], Derived[Any]] = (Derived(), Derived())

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """The encoder's levels, each position normalised over its channels: 3 x (B, C, h, w)."""
        require_multiple("minimaxad", image, self.multiple)
        return tuple(channel_norm(level) for level in self.encoder(image))

    def decode(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The rebuilt levels, of the shapes of `levels` and not normalised, in training form."""
        return self.decoder(self.bottleneck(levels))

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        self.references.fit_batches(
            (global_feature([batch.features[-1]]), batch.category) for batch in batches
        )

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        targets, rebuilt = batch.features, self.decode(batch.features)
        if self.config.loss == "global":
            return reverse_distillation_loss(targets, rebuilt)  # Eq. 1
        distance = coarse_distance(targets, rebuilt)
        if self.config.loss == "local":
            return distance.square().mean()  # Eq. 6
        repeats = self.encoder.strides[0] ** 2
        if self.config.loss == "local_hm":
            return local_hm_loss(distance, repeats, self.config.p_lim)
        return adc_loss(distance, repeats, self.config.p_hard, self.config.p_lim)

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        """`host_map` is (B, 1, H, W): the distances of the levels meet at the size of the image."""
        query = self.encode(image)
        rebuilt = [level.float() for level in self._judge(query)]
        size = (image.shape[-2], image.shape[-1])
        maps = [
            resize_map(cosine_distance(q, r, dim=1).unsqueeze(1), size, align_corners=True)
            for q, r in zip(query, rebuilt, strict=True)
        ]
        if category is None:
            category = self.references.infer([query[-1]])
        templates = [level.unsqueeze(1) for level in rebuilt]
        return Match(list(query), templates, (maps[0] + maps[1] + maps[2]) / 3, category)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        score = partial(top_fraction_mean, fraction=self.config.top_fraction)
        return predict_from_map(self, image, category, score, ignore=ignore, map_size=map_size)

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        with torch.autocast(host_map.device.type, enabled=False):  # distances stay float32
            smoothed = hidden_patches(host_map.float(), ignore)
            if self.config.smoothing == "wide":
                smoothed = gaussian_smooth(smoothed, SIGMA)
            else:
                kernel = gaussian_kernel(SIGMA, radius=2).to(smoothed)
                smoothed = F.conv2d(smoothed, kernel.view(1, 1, 5, 1), padding=(2, 0))
                smoothed = F.conv2d(smoothed, kernel.view(1, 1, 1, 5), padding=(0, 2))
        smoothed = hidden_pixels(smoothed, ignore)
        return hidden_pixels(resize_map(smoothed, map_size or image_size), ignore)

    def _judge(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """As `decode`, but without gradients from merged copies."""
        if self.training or torch.is_grad_enabled():
            return self.decode(levels)
        bottleneck = self._merged[0](self.bottleneck, partial(_merged_copy, self.bottleneck))
        decoder = self._merged[1](self.decoder, partial(_merged_copy, self.decoder))
        rebuilt: list[Tensor] = decoder(bottleneck(levels))
        return rebuilt


def _merged_copy(part: nn.Module) -> nn.Module:
    return merge(copy.deepcopy(part))


class Bottleneck(nn.Module):
    """All levels in one, of half the deepest grid's sides and twice its channels."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        first, second, third = channels
        self.shallow = nn.Sequential(
            *(_halving(first, second), nn.ReLU(), _halving(second, third), nn.ReLU())
        )
        self.middle = nn.Sequential(_halving(second, third), nn.ReLU())
        self.fuse = nn.Conv2d(3 * third, 2 * third, 3, 2, padding=1, bias=False)
        self.blocks = nn.Sequential(Block(2 * third, 3), Block(2 * third, 3))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        shallow, middle, deep = levels
        joined = torch.cat([self.shallow(shallow), self.middle(middle), deep], dim=1)
        embedding: Tensor = self.blocks(self.fuse(joined))
        return embedding


class Decoder(nn.Module):
    """The encoder's stages backwards; only the finest has small kernels."""

    def __init__(self, channels: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.upsample = nn.ModuleList()  # deepest first
        width = 2 * channels[-1]
        for out in reversed(channels):
            self.upsample.append(
                nn.Sequential(nn.ConvTranspose2d(width, out, 2, 2, bias=False), ChannelNorm(out))
            )
            width = out
        self.stages = nn.ModuleList(  # finest first
            nn.Sequential(*(Block(width, kernel_size) for _ in range(depth)))
            for width, depth, kernel_size in zip(channels, depths, (3, 13, 13), strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Finest first, as the encoder's levels."""
        rebuilt: list[Tensor] = []
        for upsample, stage in zip(self.upsample, reversed(self.stages), strict=True):
            x = stage(upsample(x))
            rebuilt.insert(0, x)
        return rebuilt


# Losses -------------------------------------------------------------------------------------------


def coarse_distance(targets: Sequence[Tensor], rebuilt: Sequence[Tensor]) -> Tensor:
    """S of Eq. 3 on the finest level's grid, (B, h, w) in [0, 6].

    The paper's S has the image's size, by nearest neighbour: each value here stands for as many
    equal ones there, and statistics need only count them.
    """
    maps = [  # M of Eq. 2
        cosine_distance(target.detach(), level, dim=1)
        for target, level in zip(targets, rebuilt, strict=True)
    ]
    finest = maps[0].shape[-2:]
    coarser = [F.interpolate(m.unsqueeze(1), finest).squeeze(1) for m in maps[1:]]
    return maps[0] + coarser[0] + coarser[1]


def local_hm_loss(distance: Tensor, repeats: int, p_lim: float) -> Tensor:
    """Eq. 8: mean of S^2 where it is at least its quantile beta. Arguments as `adc_loss`."""
    everywhere = of_all_processes(distance.detach())
    beta = _upper_quantile(everywhere.square(), repeats, p_lim)
    return _mean_above(distance.square(), everywhere.square(), beta)


def adc_loss(distance: Tensor, repeats: int, p_hard: float, p_lim: float) -> Tensor:
    """Eq. 7: mean of S^2 over the pixels that are rebuilt worst.

    While many pixels have S^2 >= alpha - sigma^2, it is over those; once they are fewer than the
    share 1 - p_lim, over S^2 >= beta - sigma^2. alpha is the p_hard-quantile of S (not of S^2),
    beta the p_lim-quantile of S^2, sigma^2 the variance of S: all over the whole batch, of all
    processes. The gradient is that of the chosen S^2. Nothing waits for the device.

    Args:
        distance: (B, h, w), S with every value once.
        repeats: how many pixels each value stands for.

    Returns:
        scalar.
    """
    everywhere = of_all_processes(distance.detach())
    pixels = everywhere.numel() * repeats
    squares = everywhere.square()
    deviation = (everywhere - everywhere.mean()).square().sum()
    variance = repeats * deviation / (pixels - 1)
    high = _upper_quantile(everywhere, repeats, p_hard) - variance
    low = _upper_quantile(squares, repeats, p_lim) - variance
    enough = repeats * (squares >= high).sum() >= (1 - p_lim) * pixels
    return _mean_above(distance.square(), squares, torch.where(enough, high, low))


def _upper_quantile(values: Tensor, repeats: int, share: float) -> Tensor:
    """The linearly interpolated quantile of values that count `repeats` times each.

    Only as many of the largest are ordered as lie above it: a few dozen of a million pixels.
    """
    position = share * (values.numel() * repeats - 1)
    below = math.floor(position)
    above = min(below + 1, values.numel() * repeats - 1)
    ranks = [values.numel() - 1 - index // repeats for index in (below, above)]
    largest = values.flatten().topk(ranks[0] + 1).values
    return torch.lerp(largest[ranks[0]], largest[ranks[1]], position - below)


def _mean_above(squares: Tensor, everywhere: Tensor, threshold: Tensor) -> Tensor:
    """Mean of those of the values `everywhere` that reach the threshold; `squares` are our own."""
    processes = everywhere.numel() // squares.numel()
    chosen = torch.where(squares.detach() >= threshold, squares, 0).sum()
    return chosen * processes / (everywhere >= threshold).sum()


def _halving(inputs: int, outputs: int) -> ConvNorm:
    return ConvNorm(nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False))


def _initialise(module: nn.Module) -> None:
    """Convolutions normal with the variance 2 / (outputs x kernel); the rest as it is made."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
