"""UniAD: a transformer that may not look at a patch's neighbours rebuilds noisy CNN features.

Paper: You et al., "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022. MVTec AD, one
model for all: image AUROC 96.5, pixel AUROC 96.8.
Kind: rebuilds features. Template: the rebuilt features, on one grid.
Left out: sine positions, other image scores than the maximum, CIFAR-10's protocol.

Letters: B images, C channels of all levels together, h w grid, N = h w tokens, D width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import Encoder
from allgood.layers.attention import neighbour_mask
from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.dropout import Dropout
from allgood.layers.tokens import (
    EncoderLayer,
    FeedForward,
    GridPosition,
    align_levels,
    attend,
    feature_jitter,
    to_map,
    to_tokens,
)
from allgood.scoring import (
    hidden_patches,
    hidden_pixels,
    highest_window_mean,
    predict_from_map,
    resize_map,
)
from allgood.types import InputError, Match, Prediction, TrainingBatch


@dataclass(frozen=True)
class UniADConfig:
    grid: int = 14
    """Positions per side; all levels are brought to it, whatever the picture's size. The paper: 14,
    which is the size of the last level at 224 x 224."""
    neighbour_mask: int = 7
    """Side of the square of positions hidden from each query; 0 hides none."""
    feature_jitter: float = 20.0
    """Scale of the noise on the features, in every step of training; 0: none. On the embedded
    encoder, which has fewer channels, 16.8 is as much noise as 20 on EfficientNet-B4."""
    width: int = 256
    """Channels of the transformer; its feed-forward layers have four times as many."""
    layers: int = 4
    """Of the encoder, and as many of the decoder."""
    heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("grid", "layers", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width < 1 or self.width % self.heads or self.width % 2:
            raise InputError(
                f"width must be even and a multiple of heads = {self.heads}, got {self.width}"
            )
        if self.neighbour_mask < 0 or (self.neighbour_mask and self.neighbour_mask % 2 == 0):
            raise InputError(f"neighbour_mask must be odd, or 0, got {self.neighbour_mask}")
        if not self.feature_jitter >= 0:
            raise InputError(f"feature_jitter must be at least 0, got {self.feature_jitter}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")


class UniAD(nn.Module):
    """Anomaly detector of You et al. (2022); see the module docstring."""

    def __init__(
        self,
        config: UniADConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FrozenEncoder):
            raise InputError("uniad rebuilds whole images and takes no tiles: leave out --tile")
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.grid = (config.grid, config.grid)
        self.encoding = f"levels side by side on a grid of {config.grid} x {config.grid}"
        channels = sum(encoder.channels)
        self.references = CategoryReferences(len(categories), channels)
        side = config.neighbour_mask
        self.mask: Tensor | None
        self.register_buffer(
            "mask", neighbour_mask(*self.grid, side) if side else None, persistent=False
        )
        sizes = (config.width, config.heads, 4 * config.width, config.dropout)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.input_projection = nn.Linear(channels, config.width)
            self.position = GridPosition(self.grid, config.width)
            self.encoder_layers = nn.ModuleList(EncoderLayer(*sizes) for _ in range(config.layers))
            self.decoder_layers = nn.ModuleList(
                DecoderLayer(config.grid**2, *sizes) for _ in range(config.layers)
            )
            self.norm = nn.LayerNorm(config.width)
            self.output_projection = nn.Linear(config.width, channels)
            for part in (self.encoder_layers, self.decoder_layers):
                part.apply(_initialise)
            for linear in (self.input_projection, self.output_projection):
                _initialise(linear)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """All levels on one grid, shallow first: one tensor (B, C, h, w) float32."""
        return (align_levels([level.float() for level in self.encoder(image)], self.grid),)

    def rebuild(self, features: Tensor) -> Tensor:
        """What the transformer makes of (B, C, h, w), jittered or not; of the same shape."""
        position = self.position()
        x = self.input_projection(to_tokens(features))
        for layer in self.encoder_layers:
            x = layer(x, position, self.mask)
        memory = x
        for layer in self.decoder_layers:
            x = layer(x, memory, position, self.mask)
        return to_map(self.output_projection(self.norm(x)), self.grid)

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        self.references.fit_batches(
            (global_feature(self._levels(batch.features[0])), batch.category) for batch in batches
        )

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        """Mean squared error of what is rebuilt from noisy features; the target is the clean."""
        (clean,) = batch.features
        noisy = clean
        if self.training and self.config.feature_jitter:
            noisy = feature_jitter(clean, self.config.feature_jitter, dim=1)
        return F.mse_loss(self.rebuild(noisy).float(), clean)

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        (features,) = self.encode(image)
        rebuilt = self.rebuild(features).float()
        distance = (rebuilt - features).norm(dim=1, keepdim=True)
        if category is None:
            category = self.references.infer(self._levels(features))
        return Match([features], [rebuilt.unsqueeze(1)], distance, category)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        return predict_from_map(
            self, image, category, highest_window_mean, ignore=ignore, map_size=map_size
        )

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        distance = hidden_patches(host_map.float(), ignore)
        full = resize_map(distance, image_size, align_corners=True)
        return hidden_pixels(resize_map(full, map_size or image_size), ignore)

    def _levels(self, features: Tensor) -> list[Tensor]:
        """(B, C, h, w) -> each level by itself, so that none drowns the others."""
        return list(features.split(self.encoder.channels, dim=1))


class DecoderLayer(nn.Module):
    """A learned query that asks the encoder's answer, then the previous layer's.

    No residual leads from the previous layer: it enters through the second attention only, so it
    cannot be handed on as it is.
    """

    def __init__(self, positions: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(positions, width))
        self.memory_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.memory_norm = nn.LayerNorm(width)
        self.output_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.output_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self, output: Tensor, memory: Tensor, position: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            output: (B, N, D) of the previous layer; of the first layer: `memory`.
            memory: (B, N, D), the encoder's answer.
            position: (N, D), added to queries and keys.
            mask: as in `attend`.
        """
        y = self.query.expand_as(memory)
        attended = attend(self.memory_attention, y + position, memory + position, memory, mask)
        y = self.memory_norm(y + self.dropout(attended))
        attended = attend(self.output_attention, y + position, output + position, output, mask)
        y = self.output_norm(y + self.dropout(attended))
        return self.feed_forward(y)


def _initialise(module: nn.Module) -> None:
    """As the reference: linear weights Xavier-uniform, biases 0, as attention inputs have them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
