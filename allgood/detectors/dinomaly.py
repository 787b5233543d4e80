"""Dinomaly: a frozen foundation ViT, and a noisy, unfocused decoder that rebuilds only the good.

Paper: Guo et al., "Dinomaly: The Less Is More Philosophy in Multi-Class Unsupervised Anomaly
Detection", CVPR 2025. Table 1, MVTec AD, one model for all: image AUROC 99.6, AUPRO 94.8.
Kind: rebuilds features. Template: the rebuilt groups of layers.
Left out: the sparse layer-to-layer rows of Table A6.

Letters: B images, L kept layers, G groups, N tokens with prefix, P patches, C channels, h w grid.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import Encoder
from allgood.layers.attention import linear_attention, neighbour_mask, softmax_attention
from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.cosine import cosine_distance
from allgood.layers.dropout import dropout
from allgood.layers.processes import of_all_processes
from allgood.layers.tokens import feature_jitter
from allgood.scoring import (
    axis_matrix,
    gaussian_kernel,
    hidden_patches,
    hidden_pixels,
    predict_from_map,
    top_fraction_mean,
)
from allgood.types import InputError, Match, Prediction, TrainingBatch

SCORE_SIDE = 256
"""The paper scores and measures maps of this side, whatever the input's size."""


@dataclass(frozen=True)
class DinomalyConfig:
    dropout: float = 0.2
    """Of the noisy bottleneck: on its input, its hidden layer and its output. 0.4 for Real-IAD."""
    feature_jitter: float = 0.0
    """Scale of UniAD's noise on the bottleneck's input (Table A8: 1 to 20, without dropout)."""
    patch_masking: float = 0.0
    """Share of patch tokens set to 0 before the bottleneck (Table A8: 0.1 to 0.4)."""
    mixer: Literal["linear", "softmax", "conv"] = "linear"
    """How the decoder's tokens exchange (Table A7)."""
    kernel_size: int = 7
    """Of the conv mixer: 3, 5 or 7."""
    neighbour_mask: int = 0
    """Side of the square of patches hidden from each query; 0 hides none (Table A7: 1, 3)."""
    constraint: Literal["two_groups", "one_group", "dense"] = "two_groups"
    """Which sums of layers the decoder rebuilds (Table A6); dense is layer by layer."""
    loss: Literal["loose", "point"] = "loose"
    """`loose`: global cosine with shrunk easy points; `point`: mean distance of the patches, which
    is in no table of the paper."""
    discard_rate: float = 0.9
    """Share of the easiest patches whose gradient is shrunk, at the end of its ramp; 0 leaves the
    plain global cosine (Table 3, without loose loss)."""
    discard_steps: int = 1000
    """Length of the ramp from 0 to `discard_rate`."""
    shrink: float = 0.1
    """What the gradient of easy patches is multiplied by (Eq. 5)."""
    decoder_depth: int = 8
    attention_epsilon: float = 1e-6
    """In linear attention's denominator; the reference has none."""
    top_fraction: float = 0.01
    """Share of the 256 x 256 map's highest pixels averaged into image_score."""

    def __post_init__(self) -> None:
        for name in ("dropout", "patch_masking", "discard_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.top_fraction <= 1:
            raise InputError(f"top_fraction must be in (0, 1], got {self.top_fraction}")
        if self.kernel_size % 2 == 0 or (self.neighbour_mask and self.neighbour_mask % 2 == 0):
            raise InputError("kernel_size and neighbour_mask must be odd (or neighbour_mask 0)")
        if self.mixer == "conv" and self.neighbour_mask:
            raise InputError("neighbour_mask needs attention: take mixer linear or softmax")
        if min(self.decoder_depth, self.discard_steps) < 1 or self.feature_jitter < 0:
            raise InputError(
                "decoder_depth and discard_steps must be at least 1, feature_jitter at least 0"
            )


class Dinomaly(nn.Module):
    """Anomaly detector of Guo et al. (2025); see the module docstring."""

    def __init__(
        self,
        config: DinomalyConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, FrozenEncoder):
            raise InputError("dinomaly compares whole images and takes no tiles: leave out --tile")
        layers = len(encoder.levels)
        self.num_groups = {"two_groups": 2, "one_group": 1, "dense": layers}[config.constraint]
        if layers % self.num_groups or config.decoder_depth % self.num_groups:
            raise InputError(
                f"{layers} encoder levels and {config.decoder_depth} decoder blocks do not divide "
                f"into {self.num_groups} groups (constraint {config.constraint})"
            )
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.encoding = f"means of {self.num_groups} groups of levels, all tokens"
        width = encoder.channels[0]
        if width % 64 and width > 64:
            raise InputError(
                f"encoder '{encoder.config.name}' is {width} wide, no multiple of the decoder's "
                "heads of 64: choose another with --encoder"
            )
        self.references = CategoryReferences(len(categories), width)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.bottleneck = NoisyBottleneck(config, width)
            self.decoder = nn.ModuleList(
                DecoderBlock(config, width, max(1, width // 64))
                for _ in range(config.decoder_depth)
            )
            self.bottleneck.apply(_initialise)
            self.decoder.apply(_initialise)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """The means of each group of encoder layers, shallow first: G x (B, N, C).

        All that training needs: the bottleneck reads their mean, the decoder rebuilds them.

        Raises:
            InputError: the image is not square, but training will have to know its grid.
        """
        height, width = image.shape[-2:]
        if height != width and (self.config.mixer == "conv" or self.config.neighbour_mask):
            raise InputError(
                "the conv mixer and the neighbour mask train on square images only, got "
                f"{height} x {width}: make them square, or train with mixer linear or softmax and "
                "neighbour_mask 0"
            )
        return self._groups(image)

    def decode(self, groups: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """The rebuilt groups, paired with `groups`: G x (B, N, C).

        The last decoder blocks answer to the shallowest encoder layers.
        """
        # The groups are of one size, so the mean of their means is that of all layers.
        x = self.bottleneck(_mean(groups), self.encoder.num_prefix)
        mask = None
        if self.config.neighbour_mask:
            mask = neighbour_mask(
                *grid, self.config.neighbour_mask, num_prefix=self.encoder.num_prefix
            ).to(x.device)
        outputs = []
        for block in self.decoder:
            x = block(x, grid, mask)
            outputs.append(x)
        return [_mean(layers) for layers in _chunks(outputs[::-1], self.num_groups)]

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        self.references.fit_batches(
            (global_feature([self._patches(batch.features[-1])]), batch.category)
            for batch in batches
        )

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        prefix = self.encoder.num_prefix
        # The grid matters only where `encode` has made sure that it is square.
        side = math.isqrt(batch.features[0].shape[1] - prefix)
        rebuilt = self.decode(batch.features, (side, side))
        targets = [group[:, prefix:] for group in batch.features]
        rebuilt = [group[:, prefix:] for group in rebuilt]
        if self.config.loss == "point":
            return torch.stack(
                [cosine_distance(e, d).mean() for e, d in zip(targets, rebuilt, strict=True)]
            ).mean()
        ramp = min(step / self.config.discard_steps, 1.0)
        return loose_loss(
            targets, rebuilt, self.config.discard_rate * ramp, shrink=self.config.shrink
        )

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        groups = self._groups(image)
        rebuilt = self.decode(groups, self._grid(image))
        query = [self._patches(group, self._grid(image)) for group in groups]
        template = [self._patches(group, self._grid(image)) for group in rebuilt]
        distance = _mean(
            [cosine_distance(q, t, dim=1) for q, t in zip(query, template, strict=True)]
        )
        if category is None:
            category = self.references.infer([query[-1]])
        templates = [level.unsqueeze(1) for level in template]
        return Match(query, templates, distance.unsqueeze(1), category)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        score = partial(top_fraction_mean, fraction=self.config.top_fraction)
        return predict_from_map(
            self,
            image,
            category,
            score,
            ignore=ignore,
            map_size=map_size,
            score_size=(SCORE_SIDE, SCORE_SIDE),
        )

    def anomaly_map(
        self,
        host_map: Tensor,
        image_size: tuple[int, int],
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Tensor:
        size = map_size or image_size
        rows = map_matrix(host_map.shape[-2], image_size[0], size[0]).to(host_map.device)
        columns = map_matrix(host_map.shape[-1], image_size[1], size[1]).to(host_map.device)
        with torch.autocast(host_map.device.type, enabled=False):  # distances stay float32
            smoothed = rows @ hidden_patches(host_map.float(), ignore) @ columns.T
        return hidden_pixels(smoothed, ignore)

    def _groups(self, image: Tensor) -> tuple[Tensor, ...]:
        layers = self.encoder.tokens(image)
        return tuple(_mean(group) for group in _chunks(layers, self.num_groups))

    def _grid(self, image: Tensor) -> tuple[int, int]:
        patch = self.encoder.strides[0]
        return image.shape[-2] // patch, image.shape[-1] // patch

    def _patches(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N, C) -> (B, C, h, w), or (B, C, P, 1) where the grid does not matter."""
        patches = tokens[:, self.encoder.num_prefix :].transpose(1, 2)
        return patches.unflatten(2, grid or (-1, 1)).float()


class NoisyBottleneck(nn.Module):
    """The MLP whose dropout is the noise (Section 3.2); one, without residual or norm."""

    def __init__(self, config: DinomalyConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, num_prefix: int) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        rate = self.config.dropout
        if self.training and self.config.feature_jitter:
            x = feature_jitter(x, self.config.feature_jitter)
        if self.training and self.config.patch_masking:
            kept = torch.rand(x.shape[:2], device=x.device) >= self.config.patch_masking
            kept[:, :num_prefix] = True
            x = x * kept.unsqueeze(-1)
        x = dropout(x, rate, self.training)
        x = dropout(F.gelu(self.fc1(x)), rate, self.training)
        return dropout(self.fc2(x), rate, self.training)


class DecoderBlock(nn.Module):
    """A pre-norm transformer block without layer scale or position."""

    def __init__(self, config: DinomalyConfig, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-8)
        self.attn: nn.Module = (
            ConvMixer(width, config.kernel_size)
            if config.mixer == "conv"
            else Attention(config, width, heads)
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-8)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), grid, mask)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Attention(nn.Module):
    """Multi-head linear (default) or softmax attention."""

    def __init__(self, config: DinomalyConfig, width: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor:
        packed = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, C / heads)
        qkv = packed.permute(2, 0, 3, 1, 4)
        if self.config.mixer == "linear":
            out = linear_attention(qkv, epsilon=self.config.attention_epsilon, mask=mask)
        else:
            out = softmax_attention(*qkv, mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2).to(x.dtype))


class ConvMixer(nn.Module):
    """The convolution of Table A7, an inverted bottleneck: 1 x 1, GELU, depthwise k x k, 1 x 1.

    Class and register tokens have no place in the grid and get nothing from it.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(
            2 * width, 2 * width, kernel_size, padding=kernel_size // 2, groups=2 * width
        )
        self.reduce = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None) -> Tensor:
        num_prefix = x.shape[1] - grid[0] * grid[1]
        patches = x[:, num_prefix:].transpose(1, 2).unflatten(2, grid)
        mixed = self.reduce(self.depthwise(F.gelu(self.expand(patches))))
        return F.pad(mixed.flatten(2).transpose(1, 2), (0, 0, num_prefix, 0))


def loose_loss(
    targets: Sequence[Tensor], rebuilt: Sequence[Tensor], discard_rate: float, *, shrink: float
) -> Tensor:
    """Global cosine distance that hardly learns from the easiest patches (Eqs. 4 to 6).

    Per group: one minus the cosine of each image's features as one flat vector, averaged over the
    batch. The value does not depend on `discard_rate`; only the gradient of the patches whose own
    distance is below the k-th largest of the batch, k = (1 - discard_rate) B P, is multiplied by
    `shrink`. Several processes agree on one threshold for all their images.

    Args:
        targets, rebuilt: G x (B, P, C).
    """
    losses = []
    for target, group in zip(targets, rebuilt, strict=True):
        target, group = target.detach().float(), group.float()
        easy = _easy_points(target, group.detach(), discard_rate)  # (B, P)
        group = torch.where(easy.unsqueeze(-1), torch.lerp(group.detach(), group, shrink), group)
        losses.append(cosine_distance(target.flatten(1), group.flatten(1)).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def _easy_points(target: Tensor, rebuilt: Tensor, discard_rate: float) -> Tensor:
    """(B, P) bool: patches with a distance below the k-th largest of the whole batch."""
    distance = cosine_distance(target, rebuilt)
    whole = of_all_processes(distance.flatten())
    count = max(1, int(len(whole) * (1 - discard_rate)))
    return distance < whole.topk(count).values[-1]


@lru_cache(maxsize=32)
def map_matrix(patches: int, side: int, size: int) -> Tensor:
    """(size, patches) float32: one axis of the way from patches to map, all of it linear.

    Up to the input's `side` (corners aligned), down to 256 (half-pixel centres), a Gaussian of 5
    pixels and sigma 4 that takes the outside as 0, and, where another size is asked for, on to
    `size`. So map = A M A^T, instead of three passes over images.
    """

    def step(x: Tensor) -> Tensor:
        x = F.interpolate(x, side, mode="linear", align_corners=True)
        x = F.interpolate(x, SCORE_SIDE, mode="linear", align_corners=False)
        x = F.conv1d(x, gaussian_kernel(4.0, radius=2)[None, None], padding=2)
        if size != SCORE_SIDE:
            x = F.interpolate(x, size, mode="linear", align_corners=False)
        return x

    return axis_matrix(patches, step)


def _chunks(layers: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    size = len(layers) // count
    return [layers[i * size : (i + 1) * size] for i in range(count)]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """As a running sum: a stack would hold all of them twice."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


def _initialise(module: nn.Module) -> None:
    """As the reference: linear weights normal(0, 0.01) cut at 0.03, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
        nn.init.zeros_(module.bias)
