"""HVQ-Trans: a transformer rebuilds features from the normal codes of the picture's category.

Paper: Lu et al., "Hierarchical Vector Quantized Transformer for Multi-class Unsupervised Anomaly
Detection", NeurIPS 2023. MVTec AD, one model for all: image AUROC 98.0, pixel AUROC 97.3.
Kind: rebuilds features. Template: the rebuilt feature pyramid.
Left out: the reference's live batch-norm statistics and stochastic depth, by which its backbone
changes while training; ours is frozen. A test picture's category is given or the nearest one, as
for every detector; the paper's classifier was never released.

Letters: B images, S codebook sets, K codes, C channels of the pyramid, h w grid, N = h w tokens,
D width, E_i state of the tokens after encoder layer i.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import Encoder
from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.codebook import Codebooks, transport_cost
from allgood.layers.dropout import Dropout
from allgood.layers.tokens import (
    EncoderLayer,
    FeedForward,
    GridPosition,
    align_levels,
    attend,
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
class HVQTransConfig:
    grid: int = 14
    """Positions per side; all levels are brought to it, whatever the picture's size."""
    width: int = 256
    """Channels of the encoder; the decoder's are twice as many, the feed-forward layers' four
    times."""
    heads: int = 8
    layers: int = 4
    """Of the encoder, and as many of the decoder; each but the encoder's last has codebooks of its
    own."""
    dropout: float = 0.1
    codebook_size: int = 512
    """Codes per codebook."""
    shared_codebooks: bool = False
    """One set of codebooks and one output layer for all categories instead of one each: not the
    paper's method, but free of the category."""
    codebook_start: Literal["data", "reference"] = "data"
    """`data`: tokens of each category's first pictures; `reference`: normal noise, of which few
    codes survive."""
    update: Literal["batch", "image"] = "batch"
    """When codes follow the tokens: each codebook once per (micro-)batch, or, as the reference,
    after every picture."""
    commitment: float = 0.25
    """Weight of the tokens' distance to their codes in the loss."""
    optimal_transport: bool = False
    """Add what it costs to carry the tokens to the shallowest codes to the distance, as for the
    paper's numbers."""
    transport_weight: float = 80.0

    def __post_init__(self) -> None:
        for name in ("grid", "width", "heads", "layers", "codebook_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 2 or self.width % self.heads:
            raise InputError(
                f"width must be even and a multiple of heads ({self.heads}), got {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")
        if not (0 <= self.commitment < math.inf and 0 <= self.transport_weight < math.inf):
            raise InputError("commitment and transport_weight must be numbers of at least 0")


class Rebuilt(NamedTuple):
    features: Tensor
    """(B, C, h, w)."""
    commitment: Tensor
    """Scalar, summed over the hierarchy."""
    shallow: Tensor
    """(B, N, 2 D): the first state with the root's codes, before it was quantised itself."""


class HVQTrans(nn.Module):
    """Anomaly detector of Lu et al. (2023); see the module docstring."""

    def __init__(
        self,
        config: HVQTransConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FrozenEncoder):
            raise InputError("hvqtrans rebuilds whole images and takes no tiles: leave out --tile")
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.encoding = f"levels side by side on a grid of {config.grid} x {config.grid}"
        self.grid = (config.grid, config.grid)
        channels, width, layers = sum(encoder.channels), config.width, config.layers
        sets = 1 if config.shared_codebooks else len(categories)
        sizes = (config.heads, 4 * width, config.dropout)
        self.references = CategoryReferences(len(categories), channels)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.input_projection = nn.Linear(channels, width)
            self.position = GridPosition(self.grid, width)
            self.encoder_layers = nn.ModuleList(EncoderLayer(width, *sizes) for _ in range(layers))
            books = (config.codebook_size, config.update)
            self.codebooks: Any = nn.ModuleList(  # of E_0, E_1, ...
                Codebooks(sets, 2 * width, *books) for _ in range(layers)
            )
            self.root = Codebooks(sets, width, *books)  # of the deepest state
            self.decoder_layers = nn.ModuleList(
                DecoderLayer(2 * width, *sizes) for _ in range(layers)
            )
            self.decoder_norm = nn.LayerNorm(2 * width)
            self.output = CategoryLinear(sets, 2 * width, channels)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """All levels on one grid, side by side: one (B, C, h, w)."""
        return (align_levels(self.encoder(image), self.grid),)

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        """Keep references of the categories, and let the codebooks start from their pictures."""
        enough = -(-self.config.codebook_size // math.prod(self.grid))  # pictures for K tokens
        first: dict[int, list[Tensor]] = {i: [] for i in range(len(self.categories))}
        features, category = [], []
        for batch in batches:
            (aligned,) = batch.features
            features.append(self._global_feature(aligned))
            category.append(batch.category)
            for picture, i in zip(aligned, batch.category.tolist(), strict=True):
                if len(first[i]) < enough:
                    first[i].append(picture)
        self.references.fit(torch.cat(features), torch.cat(category))
        if self.config.codebook_start == "reference":
            return
        if self.config.shared_codebooks:
            first = {0: [picture for pictures in first.values() for picture in pictures]}
        for which, pictures in first.items():
            if pictures:
                self._start_codebooks(which, torch.stack(pictures))

    def rebuild(self, aligned: Tensor, category: Tensor) -> Rebuilt:
        """The features that the category's codes make of an image.

        Args:
            aligned: (B, C, h, w), as `encode` gives it.
            category: (B,) int64.
        """
        which = self._which(category)
        states = self.encoder_states(aligned)
        root, commitment = self.root(states[-1], which)
        levels = [torch.cat([state, root], dim=2) for state in states[:-1]]
        quantised = []
        for level, codebooks in zip(levels, self.codebooks, strict=True):
            codes, distance = codebooks(level, which)
            quantised.append(codes)
            commitment = commitment + distance

        # Deep first: the decoder starts from the deepest level and then reads one after another.
        position = self.position().repeat(1, 2)
        x = quantised[-1]
        for layer, memory in zip(self.decoder_layers, reversed(quantised), strict=True):
            x = layer(x, memory, position)
        features = self.output(self.decoder_norm(x), which)
        return Rebuilt(to_map(features, self.grid).float(), commitment, levels[0])

    def encoder_states(self, aligned: Tensor) -> list[Tensor]:
        """E_0, the projected features, and the answer of every layer: layers + 1 x (B, N, D)."""
        states = [self.input_projection(to_tokens(aligned))]
        position = self.position()
        for layer in self.encoder_layers:
            states.append(layer(states[-1], position))
        return states

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        (aligned,) = batch.features
        rebuilt = self.rebuild(aligned, batch.category)
        return F.mse_loss(rebuilt.features, aligned) + self.config.commitment * rebuilt.commitment

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        (aligned,) = self.encode(image)
        if category is None:
            category = self.references.infer(self._levels(aligned))
        rebuilt = self.rebuild(aligned, category)
        distance = (rebuilt.features - aligned).norm(dim=1, keepdim=True)
        if self.config.optimal_transport:
            codes = self.codebooks[0].codes[self._which(category)]
            cost = transport_cost(rebuilt.shallow, codes).unsqueeze(2)
            distance = distance + self.config.transport_weight * to_map(cost, self.grid)
        return Match([aligned], [rebuilt.features.unsqueeze(1)], distance, category)

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

    @torch.no_grad()
    def _start_codebooks(self, which: int, aligned: Tensor) -> None:
        """Let a set of codebooks begin with what the untrained encoder makes of pictures."""
        training = self.training
        self.eval()  # without dropout, and lookups move no code
        states = self.encoder_states(aligned)
        self.root.start(which, states[-1].flatten(0, 1))
        chosen = torch.full((len(aligned),), which, device=aligned.device)
        root, _ = self.root(states[-1], chosen)
        for state, codebooks in zip(states[:-1], self.codebooks, strict=True):
            codebooks.start(which, torch.cat([state, root], dim=2).flatten(0, 1))
        self.train(training)

    def _which(self, category: Tensor) -> Tensor:
        """(B,) -> (B,): the set of codebooks that each image uses."""
        return torch.zeros_like(category) if self.config.shared_codebooks else category

    def _levels(self, aligned: Tensor) -> list[Tensor]:
        """(B, C, h, w) -> the encoder's levels, L x (B, C_l, h, w)."""
        return list(aligned.split(self.encoder.channels, dim=1))

    def _global_feature(self, aligned: Tensor) -> Tensor:
        return global_feature(self._levels(aligned))


class DecoderLayer(nn.Module):
    """Self-attention, attention to one level of codes, feed-forward; all post-norm."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """
        Args:
            x, memory: (B, N, D).
            position: (N, D), on queries and keys only.
        """
        where = x + position
        x = self.self_norm(x + self.dropout(attend(self.self_attention, where, where, x)))
        read = attend(self.cross_attention, x + position, memory + position, memory)
        return self.feed_forward(self.cross_norm(x + self.dropout(read)))


class CategoryLinear(nn.Module):
    """S linear layers in one tensor, of which each image passes its own."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        """(B, N, inputs), (B,) -> (B, N, outputs)."""
        return torch.baddbmm(self.bias[which].unsqueeze(1), x, self.weight[which].transpose(1, 2))
