"""UniAS: levels rebuilt coarse to fine by attention and gated convolutions, their maps multiplied.

Paper: Ma et al., "Towards Accurate Unified Anomaly Segmentation", WACV 2025. Tables 1 to 3, MVTec
AD, one model for all: pixel AUROC 98.22, pixel AP 65.12, DSC 59.33.
Kind: rebuilds features. Template: the rebuilt levels.
Where paper and published code differ (neck, masks, channel branch, head, map) we follow the code,
which the reported numbers need; but its loss adds the cosine where the paper says distance, and
there we follow the paper.

Letters: B images, L levels fine to coarse, C channels, g grid, N = g * g tokens, D width. Stage k
of the decoder, coarse to fine, rebuilds level L - 1 - k.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import Encoder
from allgood.layers.attention import neighbour_mask
from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.cosine import cosine_distance
from allgood.layers.derived import Derived
from allgood.layers.dropout import Dropout
from allgood.layers.linear_head import ReconstructionHead
from allgood.layers.tokens import (
    EncoderLayer,
    align_levels,
    attend,
    feature_jitter,
    to_map,
    to_tokens,
)
from allgood.scoring import (
    gaussian_blur,
    hidden_patches,
    hidden_pixels,
    predict_from_map,
    resize_map,
    visible_deviation,
)
from allgood.types import InputError, Match, Prediction, TrainingBatch

HEADS = 4
NECK_LAYERS = 3
PATCH_WIDTH = {1: 1.0, 2: 1.0, 4: 1.5, 8: 2.0}
"""Patch size -> outputs of its embedding, as multiples of the width."""


@dataclass(frozen=True)
class UniASConfig:
    grid: int = 14
    """Side of the grid of tokens, so that of the pictures is 16 times as many pixels. Learned
    queries and the channel branch depend on it."""
    width: int = 256
    """C' in the paper."""
    ffn: int = 2048
    """Hidden width of the feed-forward layers."""
    dropout: float = 0.1
    feature_jitter: float = 20.0
    """Scale of the noise on the input."""
    jitter_probability: float = 0.5
    """For each level by itself, a whole batch at a time."""
    multi_level: bool = True
    """Table 4: rebuild each level, or, if not, all of them together on the coarsest grid."""
    query: Literal["reweighted", "learned", "tokens"] = "reweighted"
    """Table 4: `reweighted` by the sample (SAR), `learned` alone, or the coarsest level's own
    tokens, which makes self-attention of the first stage's cross-attention."""
    local: Literal["gated", "ungated", "conv3", "none"] = "gated"
    """Table 4: MGG-CNN, the same without gates, one 3 x 3 convolution, or none after attention."""
    neighbour_mask: int = 7
    """Side of the square of tokens around a query that its attention may not see; 0 hides none."""
    channel_attention: bool = True
    """A second branch in which channels attend to channels; the code has it for MVTec AD only."""
    head: Literal["convolutions", "transposed"] = "convolutions"
    """`convolutions` after a resize, as in the code, or one transposed as in the paper."""
    loss: Literal["cosine", "reference"] = "cosine"
    """`reference` adds the cosine instead of the cosine distance."""
    loss_weight: float = 1.0
    map_levels: tuple[int, ...] = ()
    """Table 5: the levels whose maps are multiplied, counted from 1, the finest; empty: all."""
    fusion: Literal["reference", "paper"] = "reference"
    """Multiply maps of half the picture's size, or of its full size."""
    smooth: bool = True
    """Smooth each level's map before; for fusion reference, the paper has none."""
    score: Literal["max", "std"] = "max"
    """What of the map is image_score."""

    def __post_init__(self) -> None:
        if not (0 <= self.dropout < 1 and 0 <= self.jitter_probability <= 1):
            raise InputError("dropout must be in [0, 1) and jitter_probability in [0, 1]")
        if self.width % 32 or min(self.width, self.ffn) < 1:
            raise InputError(f"width must be a multiple of 32 and ffn at least 1, got {self.width}")
        if self.grid < 3 or (self.channel_attention and self.grid % 2):
            raise InputError(
                f"grid must be even, or odd from 3 with channel_attention=false, got {self.grid}"
            )
        if self.neighbour_mask < 0 or (self.neighbour_mask and self.neighbour_mask % 2 == 0):
            raise InputError(f"neighbour_mask must be odd or 0, got {self.neighbour_mask}")
        if self.feature_jitter < 0 or self.loss_weight <= 0:
            raise InputError("feature_jitter must be at least 0, and loss_weight above 0")


class UniAS(nn.Module):
    """Anomaly detector of Ma et al. (2025); see the module docstring."""

    def __init__(
        self,
        config: UniASConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FrozenEncoder):
            raise InputError("unias compares whole images and takes no tiles: leave out --tile")
        factors = [encoder.strides[-1] // stride for stride in encoder.strides]
        if not set(factors) <= PATCH_WIDTH.keys():
            raise InputError(
                f"unias wants levels whose strides are 1, 2, 4 and 8 times apart, but those of "
                f"'{encoder.config.name}' are {encoder.strides}: choose others with --levels"
            )
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.encoding = "levels"
        self.side = config.grid * encoder.strides[-1]
        """Of the pictures."""
        channels = list(encoder.channels)
        if not config.multi_level:
            channels, factors = [sum(channels)], [1]
        if not set(config.map_levels) <= set(range(1, len(channels) + 1)):
            raise InputError(
                f"map_levels must be from 1 to {len(channels)}, got {list(config.map_levels)}"
            )
        self.references = CategoryReferences(len(categories), encoder.channels[-1])
        self.position: Tensor
        position = sine_position(config.grid, config.width)
        self.register_buffer("position", position, persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.neck = Neck(config, channels)
            self.decoder = Decoder(config, channels, factors)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """The encoder's levels, fine to coarse: L x (B, C, h, w)."""
        if image.shape[-2:] != (self.side, self.side):
            raise InputError(
                f"unias with grid {self.config.grid} takes pictures of {self.side} x {self.side}, "
                f"got {image.shape[-2]} x {image.shape[-1]}: give --image-size {self.side} without "
                "--keep-aspect, or train with another grid"
            )
        return tuple(self.encoder(image))

    def targets(self, features: Sequence[Tensor]) -> list[Tensor]:
        """z: the levels, each smoothed by a Gaussian of 3 x 3 (Eq. 2)."""
        smooth = [gaussian_blur(level.float(), 3, 1.0) for level in features]
        return smooth if self.config.multi_level else [self._aligned(smooth)]

    def rebuild(self, features: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """r: the levels again, of the targets' shapes. Input are target and residual (Eq. 2)."""
        if not self.config.multi_level:
            features = [self._aligned(features)]
        inputs = [
            self._jitter(torch.cat([z, f - z], dim=1))
            for f, z in zip(features, targets, strict=True)
        ]
        rebuilt: list[Tensor] = self.decoder(self.neck(inputs, self.position), self.position)
        return rebuilt

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        self.references.fit_batches(
            (global_feature([batch.features[-1]]), batch.category) for batch in batches
        )

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        """Sum over levels of squared error and cosine distance to the clean targets."""
        targets = self.targets(batch.features)
        total = torch.zeros((), device=targets[0].device)
        for z, r in zip(targets, self.rebuild(batch.features, targets), strict=True):
            cosine = F.cosine_similarity(r.float(), z, dim=1, eps=1e-8).mean()
            total = total + F.mse_loss(r.float(), z)
            total = total + (cosine if self.config.loss == "reference" else 1 - cosine)
        return self.config.loss_weight * total

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        features = self.encode(image)
        query = self.targets(features)
        template = [level.float() for level in self.rebuild(features, query)]
        if category is None:
            category = self.references.infer([features[-1]])
        host_map = self.fuse(level_maps(query, template))
        return Match(query, [level.unsqueeze(1) for level in template], host_map, category)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """The product of the levels' maps (Eq. 6): L x (B, 1, h, w) -> (B, 1, s, s).

        The reference smooths them with Gaussians of side 3, 5, 7 and 9 from the coarsest to the
        finest, and s is half the picture's side. The paper smooths none and s is the whole.
        """
        reference = self.config.fusion == "reference"
        side = self.side // 2 if reference else self.side
        product = torch.ones((), device=maps[0].device)
        for number, distance in enumerate(maps, start=1):
            if self.config.map_levels and number not in self.config.map_levels:
                continue
            distance = resize_map(distance, (side, side))
            if reference and self.config.smooth:
                size = 3 + 2 * (len(maps) - number)
                distance = gaussian_blur(distance, size, size / 3)
            product = product * distance
        return product

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        score = partial(torch.amax, dim=(1, 2, 3))
        if self.config.score == "std":
            score = partial(visible_deviation, ignore=ignore)
        return predict_from_map(self, image, category, score, ignore=ignore, map_size=map_size)

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        distance = hidden_patches(host_map.float(), ignore)
        full = hidden_pixels(resize_map(distance, image_size, align_corners=True), ignore)
        return hidden_pixels(resize_map(full, map_size or image_size), ignore)

    def _aligned(self, levels: Sequence[Tensor]) -> Tensor:
        return align_levels(levels, (self.config.grid, self.config.grid))

    def _jitter(self, level: Tensor) -> Tensor:
        if not self.training or torch.rand(()).item() >= self.config.jitter_probability:
            return level
        return feature_jitter(level, self.config.feature_jitter, dim=1)


class Neck(nn.Module):
    """Feature pyramid with a transformer at its top: inputs of 2 C channels -> maps of width D."""

    def __init__(self, config: UniASConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        self.project = nn.Conv2d(2 * channels[-1], width, 1)
        self.encoder = nn.ModuleList(
            EncoderLayer(width, HEADS, config.ffn, config.dropout) for _ in range(NECK_LAYERS)
        )
        self.top = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * c, width, 1, bias=False), nn.GroupNorm(32, width))
            for c in channels[:-1]
        )
        self.output = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.GroupNorm(32, width),
                nn.ReLU(),
            )
            for _ in channels[:-1]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _kaiming(module)
        _xavier(self.encoder)

    def forward(self, inputs: Sequence[Tensor], position: Tensor) -> list[Tensor]:
        """L x (B, 2 C, h, w) and (N, D) -> L x (B, D, h, w), fine to coarse."""
        top = self.project(inputs[-1])
        grid = (top.shape[-2], top.shape[-1])
        tokens = to_tokens(top)
        for layer in self.encoder:
            tokens = layer(tokens, position)
        maps = [F.relu(self.top(to_map(tokens, grid)))]
        for i in reversed(range(len(self.lateral))):
            lateral = self.lateral[i](inputs[i])
            lateral = lateral + resize_map(maps[0], (lateral.shape[-2], lateral.shape[-1]))
            maps.insert(0, self.output[i](lateral))
        return maps


class Decoder(nn.Module):
    """Tokens of every level on one grid, the query, and one stage per level."""

    def __init__(
        self, config: UniASConfig, channels: Sequence[int], factors: Sequence[int]
    ) -> None:
        super().__init__()
        self.grid = (config.grid, config.grid)
        width, tokens = config.width, config.grid**2
        self.patches = nn.ModuleList(PatchEmbedding(width, factor) for factor in factors)
        self.level = nn.Parameter(torch.randn(len(channels), width))
        """In the order of the stages."""
        self.query: SampleQuery | LearnedQuery | None = None
        if config.query == "reweighted":
            self.query = SampleQuery(config)
        elif config.query == "learned":
            self.query = LearnedQuery(config)
        self.query_position = nn.Parameter(torch.randn(tokens, width))
        self.stages = nn.ModuleList(Stage(config) for _ in channels)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(
            nn.ConvTranspose2d(width, c, factor, stride=factor)
            if config.head == "transposed"
            else ReconstructionHead(width, c, config.grid, factor)
            for c, factor in zip(channels, factors, strict=True)
        )
        self.mask: Tensor | None
        mask = neighbour_mask(*self.grid, config.neighbour_mask) if config.neighbour_mask else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, maps: Sequence[Tensor], position: Tensor) -> list[Tensor]:
        """L x (B, D, h, w) and (N, D) -> L x (B, C, h, w), fine to coarse."""
        rebuilt: list[Tensor] = []  # coarse to fine, as the stages
        query: Tensor | None = None if self.query is None else self.query(maps[-1])
        patches, heads = reversed(self.patches), reversed(self.heads)
        for stage, level, embed, head, features in zip(
            self.stages, self.level, patches, heads, reversed(maps), strict=True
        ):
            tokens = to_tokens(embed(features)) + level
            query = tokens if query is None else query
            query = stage(query, tokens, position, self.query_position, self.mask)
            rebuilt.append(head(to_map(self.norm(query), self.grid)))
        return rebuilt[::-1]


class PatchEmbedding(nn.Module):
    """One token per patch, and a projection of it; between them is nothing, so they are one."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        hidden = int(PATCH_WIDTH[factor] * width)
        self.embed = nn.Conv2d(width, hidden, factor, stride=factor) if factor > 1 else None
        self.project = nn.Conv2d(hidden, width, 1)
        self._folded: Derived[tuple[Tensor, Tensor]] = Derived()
        if self.embed is not None:
            _xavier(self.embed)
            nn.init.zeros_(self.embed.bias)  # type: ignore[arg-type]
        _kaiming(self.project)

    def forward(self, level: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, g, g)."""
        if self.embed is None:
            out: Tensor = self.project(level)
            return out
        kernel, bias = self._folded(self, self._fold)
        return F.conv2d(level, kernel, bias, stride=self.embed.stride)

    def _fold(self) -> tuple[Tensor, Tensor]:
        assert self.embed is not None and self.embed.bias is not None
        assert self.project.bias is not None
        matrix = self.project.weight.flatten(1)  # (D, hidden)
        kernel = matrix @ self.embed.weight.flatten(1)
        bias = torch.addmv(self.project.bias, matrix, self.embed.bias)
        return kernel.unflatten(1, self.embed.weight.shape[1:]), bias


class SampleQuery(nn.Module):
    """Sample-aware reweighting (Section 3.4): a bank of queries, weighted by the coarsest map.

    Channel and spatial weights are those of CBAM, but the bank takes their sum. Its two entries
    per position are then mixed into one.
    """

    def __init__(self, config: UniASConfig) -> None:
        super().__init__()
        width = config.width
        self.grid = (config.grid, config.grid)
        self.bank = nn.Parameter(torch.randn(2, config.grid**2, width))
        self.project = nn.Conv2d(width, width, 3, padding=1)
        self.channel = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, width),
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.mix = local_block(config.local, 2 * width, width)
        for module in (self.channel, self.spatial, self.mix):
            _xavier(module)

    def forward(self, top: Tensor) -> Tensor:
        """(B, D, g, g) -> (B, N, D)."""
        x = self.project(top)
        of_channels = self.channel(x.mean(dim=(2, 3))) + self.channel(x.amax(dim=(2, 3)))
        pooled = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)
        channel_weight = of_channels.sigmoid()[:, None, :]  # (B, 1, D)
        spatial_weight = to_tokens(self.spatial(pooled).sigmoid())  # (B, N, 1)
        bank = self.bank * (channel_weight + spatial_weight).unsqueeze(1)  # (B, 2, N, D)
        side_by_side = bank.permute(0, 3, 1, 2).flatten(1, 2)  # (B, 2 D, N), channel 2 c + entry
        return to_tokens(self.mix(side_by_side.unflatten(2, self.grid)))


class LearnedQuery(nn.Module):
    """The same query for every sample (Table 4, without SAR)."""

    def __init__(self, config: UniASConfig) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(config.grid**2, config.width))

    def forward(self, top: Tensor) -> Tensor:
        """(B, D, g, g) -> (B, N, D)."""
        return self.bank.expand(len(top), -1, -1)


class Stage(nn.Module):
    """Attention for what is global and convolutions for what is local (Eqs. 4 and 5)."""

    def __init__(self, config: UniASConfig) -> None:
        super().__init__()
        self.grid = (config.grid, config.grid)
        self.spatial = QueryAttention(config.width, config)
        self.channel = QueryAttention(config.grid**2, config) if config.channel_attention else None
        self.local = local_block(config.local, config.width, config.width)
        for module in (self.spatial, self.channel, self.local):
            if module is not None:
                _xavier(module)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        position: Tensor,
        query_position: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """
        Args:
            query: (B, N, D), of the stage before.
            tokens: (B, N, D), of this stage's level.
            position, query_position: (N, D), of the tokens and of the query.
            mask: (N, N) bool, as `neighbour_mask` gives it, or None.

        Returns:
            (B, N, D).
        """
        out = self.spatial(query, tokens, position, query_position, mask)
        if self.channel is not None:  # channels are the tokens, and have no position of their own
            swapped = (query.transpose(1, 2), tokens.transpose(1, 2), position.T)
            out = out + self.channel(*swapped, query_position=None).transpose(1, 2)
        return to_tokens(self.local(to_map(out, self.grid)))


class QueryAttention(nn.Module):
    """Cross-attention, self-attention and feed-forward, all post-norm."""

    def __init__(self, width: int, config: UniASConfig) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(width, HEADS, config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)
        self.layer = EncoderLayer(width, HEADS, config.ffn, config.dropout)

    def forward(
        self,
        query: Tensor,
        tokens: Tensor,
        position: Tensor,
        query_position: Tensor | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if query_position is None:
            query_position = query.new_zeros(())
        attended = attend(self.cross, query + query_position, tokens + position, tokens, mask)
        x = self.norm(query + self.dropout(attended))
        out: Tensor = self.layer(x, query_position, mask)
        return out


class MultiGranularity(nn.Module):
    """MGG-CNN: receptive fields of 1, 3, 5 and 7, each through its own gate, summed (Eq. 5)."""

    def __init__(self, inputs: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.gate: nn.Module = nn.GELU() if gated else nn.Identity()
        point = nn.Sequential(nn.Conv2d(inputs, width, 1))
        stacks = [
            nn.Sequential(
                nn.Conv2d(inputs, width, 3, padding=1),
                *(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth - 1)),
            )
            for depth in (1, 2, 3)
        ]
        self.branches = nn.ModuleList([point, *stacks])

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, g, g) -> (B, D, g, g)."""
        # One convolution for the first of all branches gives the same, and no sooner (measured).
        total: Tensor = self.gate(self.branches[0](x))
        for branch in self.branches[1:]:
            total = total + self.gate(branch(x))
        return total


def local_block(kind: str, inputs: int, width: int) -> nn.Module:
    """What follows attention, and mixes the bank: as `UniASConfig.local` says."""
    if kind == "conv3":
        return nn.Conv2d(inputs, width, 3, padding=1)
    if kind == "none":  # the bank's two entries must still become one
        return nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)
    return MultiGranularity(inputs, width, gated=kind == "gated")


def level_maps(query: Sequence[Tensor], template: Sequence[Tensor]) -> list[Tensor]:
    """1 - cos at each position of each level, in [0, 2]: L x (B, 1, h, w)."""
    return [
        cosine_distance(z, r, dim=1).clamp(min=0).unsqueeze(1)
        for z, r in zip(query, template, strict=True)
    ]


def sine_position(grid: int, width: int) -> Tensor:
    """(N, D): sines and cosines of the row in the first half of the channels, then of the column.

    Rows and columns count from 1 and are scaled to 2 pi; channel m turns with
    10000^(-2 floor(m / 2) / (D / 2)).
    """
    half = width // 2
    place = torch.arange(1, grid + 1) * 2 * math.pi / (grid + 1e-6)
    channel = torch.arange(half)
    angle = place[:, None] / 10000 ** (2 * (channel // 2) / half)
    wave = torch.where(channel % 2 == 0, angle.sin(), angle.cos())  # (g, D / 2)
    return torch.cat([wave.repeat_interleave(grid, dim=0), wave.repeat(grid, 1)], dim=1)


def _xavier(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def _kaiming(conv: nn.Conv2d) -> None:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
