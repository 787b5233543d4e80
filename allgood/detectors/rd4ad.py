"""RD4AD: a frozen CNN, a one-class embedding of its pyramid, and a decoder that mirrors the CNN.

Paper: Deng and Li, "Anomaly Detection via Reverse Distillation from One-Class Embedding",
CVPR 2022. MVTec AD, one model for all, in later papers: image AUROC 94.6, AUPRO 91.1.
Kind: rebuilds features. Template: the rebuilt levels.
Left out: the authors' 1 x 1 convolution behind the embedding's concatenation; nothing reads it.

Letters: B images, C channels of a level, h w its grid, H W pixels; the levels are three, and each
halves the grid of the one before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.encoders.folding import folded_weights
from allgood.encoders.tiled import Encoder
from allgood.layers.categories import CategoryReferences, global_feature
from allgood.layers.cosine import cosine_distance, reverse_distillation_loss
from allgood.layers.derived import Derived
from allgood.layers.pyramid import require_halving, require_multiple
from allgood.scoring import (
    gaussian_smooth,
    hidden_patches,
    hidden_pixels,
    predict_from_map,
    resize_map,
)
from allgood.types import InputError, Match, Prediction, TrainingBatch

EMBEDDING_BLOCKS = 3
DECODER_BLOCKS = (3, 4, 6)
"""Of each stage, deepest first; in this order and not mirrored."""


@dataclass(frozen=True)
class RD4ADConfig:
    bottleneck_width: float = 0.5
    """Inner channels of the embedding's blocks, per channel that they put out. 0.5 is the authors'
    1024 of 2048; 0.25 the 512 of which multi-class benchmarks report."""
    sigma: float = 4.0
    """Of the Gaussian that smooths the map, in pixels of the input."""

    def __post_init__(self) -> None:
        if not 0 < self.bottleneck_width <= 1:
            raise InputError(f"bottleneck_width must be in (0, 1], got {self.bottleneck_width}")
        if not self.sigma >= 0:
            raise InputError(f"sigma must be at least 0, got {self.sigma}")


class RD4AD(nn.Module):
    """Anomaly detector of Deng and Li (2022); see the module docstring."""

    def __init__(
        self,
        config: RD4ADConfig,
        encoder: Encoder,
        categories: tuple[str, ...],
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_halving("rd4ad", encoder)
        self.config = config
        self.encoder = encoder
        self.categories = categories
        self.encoding = "levels"
        self.multiple = 2 * encoder.strides[-1]
        self.references = CategoryReferences(len(categories), encoder.channels[-1])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.bottleneck = OneClassEmbedding(encoder.channels, config.bottleneck_width)
            self.decoder = Decoder(encoder.channels, rectified=_is_rectified(encoder))
            self.bottleneck.apply(_initialise)
            self.decoder.apply(_initialise)
        self.to(memory_format=torch.channels_last)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """The three levels E1, E2, E3, shallow first: (B, C, h, w) each."""
        require_multiple("rd4ad", image, self.multiple)
        return tuple(self.encoder(image))

    def decode(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The rebuilt levels D1, D2, D3, of the shapes of `levels`."""
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        return self.decoder(self.bottleneck(levels))

    def prepare(self, batches: Iterable[TrainingBatch]) -> None:
        self.references.fit_batches(
            (global_feature([batch.features[-1]]), batch.category) for batch in batches
        )

    def training_loss(self, batch: TrainingBatch, step: int) -> Tensor:
        return reverse_distillation_loss(batch.features, self.decode(batch.features))

    def match(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        image_number: Tensor | None = None,
    ) -> Match:
        """`host_map` is (B, 1, H, W): the distances of the levels meet at the size of the image."""
        query = self.encode(image)
        rebuilt = [level.float() for level in self.decode(query)]
        host_map = distance_map(query, rebuilt, (image.shape[-2], image.shape[-1]))
        if category is None:
            category = self.references.infer([query[-1]])
        return Match(list(query), [level.unsqueeze(1) for level in rebuilt], host_map, category)

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        score = partial(torch.amax, dim=(1, 2, 3))
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
            distance = hidden_patches(host_map.float(), ignore)
            full = resize_map(distance, image_size, align_corners=True)
            smoothed = gaussian_smooth(full, self.config.sigma)
        return hidden_pixels(resize_map(smoothed, map_size or image_size), ignore)


class OneClassEmbedding(nn.Module):
    """The paper's OCBE: brings the levels to the deepest grid, joins them and compresses them.

    The output has half the deepest grid's sides and twice its channels.
    """

    def __init__(self, channels: Sequence[int], width: float) -> None:
        super().__init__()
        first, second, third = channels
        out = 2 * third
        inner = max(1, round(width * out))
        self.shallow = nn.ModuleList([_halving(first, second), _halving(second, third)])
        self.middle = _halving(second, third)
        self.blocks = nn.Sequential(
            Bottleneck(3 * third, inner, out, "down"),
            *(Bottleneck(out, inner, out) for _ in range(EMBEDDING_BLOCKS - 1)),
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        shallow, middle, deep = levels
        for halve in self.shallow:
            shallow = F.relu(halve(shallow), inplace=True)
        middle = F.relu(self.middle(middle), inplace=True)
        joined: Tensor = self.blocks(torch.cat([shallow, middle, deep], dim=1))
        return joined


class Decoder(nn.Module):
    """The encoder's three stages backwards, each twice the grid of the one before."""

    def __init__(self, channels: Sequence[int], *, rectified: bool) -> None:
        """`rectified`: the encoder's levels are never negative, so neither is what is rebuilt."""
        super().__init__()
        self.stages = nn.ModuleList()
        width = 2 * channels[-1]
        for out, count in zip(reversed(channels), DECODER_BLOCKS, strict=True):
            inner = max(1, out // 2)
            blocks = [Bottleneck(width, inner, out, "up")]
            blocks += [Bottleneck(out, inner, out) for _ in range(count - 1)]
            blocks[-1].rectified = rectified
            self.stages.append(nn.Sequential(*blocks))
            width = out

    def forward(self, x: Tensor) -> list[Tensor]:
        """Shallow first, as the encoder's levels."""
        rebuilt: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            rebuilt.insert(0, x)
        return rebuilt


class Bottleneck(nn.Module):
    """ResNet's block of 1 x 1, 3 x 3 and 1 x 1; where the grid changes, so does its shortcut.

    `down` halves the grid with the 3 x 3; `up` doubles it with a transposed 2 x 2 in its place.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, grid: str = "same") -> None:
        super().__init__()
        self.rectified = True
        spatial: nn.Conv2d | nn.ConvTranspose2d = nn.Conv2d(
            inner, inner, 3, 2 if grid == "down" else 1, padding=1, bias=False
        )
        self.shortcut: ConvNorm | None = None
        if grid == "down":
            self.shortcut = ConvNorm(nn.Conv2d(inputs, outputs, 1, 2, bias=False))
        elif grid == "up":
            spatial = nn.ConvTranspose2d(inner, inner, 2, 2, bias=False)
            self.shortcut = ConvNorm(nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False))
        self.conv1 = ConvNorm(nn.Conv2d(inputs, inner, 1, bias=False))
        self.conv2 = ConvNorm(spatial)
        self.conv3 = ConvNorm(nn.Conv2d(inner, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.conv1(x), inplace=True)
        inner = F.relu(self.conv2(inner), inplace=True)
        out = self.conv3(inner) + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(out, inplace=True) if self.rectified else out


class ConvNorm(nn.Module):
    """A convolution and its batch norm; one convolution of the same values once it only judges."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels)
        self._folded: Derived[tuple[Tensor, Tensor]] = Derived()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            normed: Tensor = self.norm(self.conv(x))
            return normed
        weight, bias = self._folded(self, self._fold)
        if isinstance(self.conv, nn.ConvTranspose2d):
            return F.conv_transpose2d(x, weight, bias, self.conv.stride)
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding)

    def _fold(self) -> tuple[Tensor, Tensor]:
        transposed = isinstance(self.conv, nn.ConvTranspose2d)
        weight, bias = folded_weights(self.conv.weight, None, self.norm, transposed=transposed)
        return weight.to(self.conv.weight.dtype), bias.to(self.conv.weight.dtype)


def distance_map(
    query: Sequence[Tensor], template: Sequence[Tensor], size: tuple[int, int]
) -> Tensor:
    """(B, 1, H, W): sum over levels of 1 - cosine at each position, brought to `size` (H, W)."""
    maps = [
        resize_map(cosine_distance(q, t, dim=1).unsqueeze(1), size, align_corners=True)
        for q, t in zip(query, template, strict=True)
    ]
    return torch.stack(maps).sum(dim=0)


def _halving(inputs: int, outputs: int) -> ConvNorm:
    return ConvNorm(nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False))


def _is_rectified(encoder: Encoder) -> bool:
    """Whether the levels come out of a ReLU, as a ResNet's do and a MobileNet's do not."""
    side = 4 * encoder.strides[-1]
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return all(bool((level >= 0).all()) for level in encoder(noise))


def _initialise(module: nn.Module) -> None:
    """As ResNet: normal with the variance 2 / fan-out; transposed convolutions as PyTorch has
    them."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
