"""The matching cost volume of CostFilter-AD, and the two ways around building it.

    C(j, n, l, i) = 1 - cos(where to detect: position i, what to match: position j of template n)

Positions i lie on H, W; layers l on depth; (j, n) on channels. `compare` says which features stand
on which side; `cost_volume` builds C, `project` gives C's first 1 x 1 x 1 convolution without it,
`initial_map` its minimum over (j, n). All arithmetic is float32, and it is the cost that would be
rounded, never the similarity.

Letters: B images, N templates, L levels, C channels, h w grid, P = h w positions that are judged,
D = h w positions of a template, K channels of the volume, O outputs of the convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from allgood.types import InputError

Level = TypeVar("Level")


@dataclass(frozen=True)
class VolumeConfig:
    grid: tuple[int, int]
    """(h, w) to which all levels are brought, bilinear with aligned corners, before they are
    compared. It fixes D, and with it the filter's first layer."""
    templates: int = 1
    """N, how many templates each image is compared with."""
    merge: Literal["concat", "loop_mean"] = "concat"
    """`concat`: one volume of N D channels, as the slides; `loop_mean`: N volumes of D channels,
    whose filtered maps are averaged (published GLAD)."""
    top_k: int | None = None
    """Only so many least costs of each position stay, in their order (published AnomalDF and
    Dinomaly); None: all."""
    orientation: Literal["input", "reference"] = "input"
    """Whose positions lie on H, W: the input's, or the templates' (the reference's Dinomaly)."""

    def __post_init__(self) -> None:
        if min(*self.grid, self.templates) < 1:
            raise InputError("grid and templates must be at least 1")
        if self.top_k is not None and not 1 <= self.top_k <= self.positions:
            raise InputError(f"top_k must be in [1, {self.positions}], got {self.top_k}")

    @property
    def passes(self) -> int:
        """Rows of the network's batch that each image takes."""
        return self.templates if self.merge == "loop_mean" else 1

    @property
    def positions(self) -> int:
        """What each position is compared with in one pass: N D, or D with `loop_mean`."""
        return self.templates // self.passes * self.grid[0] * self.grid[1]

    @property
    def channels(self) -> int:
        """K of the volume."""
        return self.top_k or self.positions


class Side(NamedTuple):
    """Features on one side of the volume, and what makes them unit vectors."""

    features: Tensor
    """(B, C, P)."""
    scale: Tensor
    """(B, 1, P), one over their norms: dividing products of features is cheaper than features."""


@dataclass(frozen=True)
class Comparison:
    """The two sides of a cost volume, not yet multiplied: N pairs (where, what) per level.

    With `loop_mean` the templates of an image stand one after the other as rows of the batch, so
    there B is B N, and N is 1.
    """

    levels: list[list[tuple[Side, Side]]]
    """L x N x (where: positions that are judged, what: positions they are matched with)."""
    config: VolumeConfig

    @property
    def selects(self) -> bool:
        """Whether only some costs go on: nothing linear, so the volume must be built."""
        return self.config.channels < self.config.positions


def compare(
    query: Sequence[Tensor], template: Sequence[Tensor], config: VolumeConfig
) -> Comparison:
    """Lay out what a `Match` holds for a cost volume; no cost is computed yet.

    Args:
        query: L levels (B, C, h, w); C and the grid may differ from level to level.
        template: L levels (B, N, C, h, w).

    Raises:
        InputError: levels, channels or the number of templates do not fit.
    """
    if len(query) != len(template):
        raise InputError(f"{len(query)} query levels but {len(template)} template levels")
    levels = []
    for q, t in zip(query, template, strict=True):
        if t.shape[1] != config.templates:
            raise InputError(
                f"the filter compares with {config.templates} templates, this detector gave "
                f"{t.shape[1]}: set `templates` to it and train the filter anew"
            )
        if q.shape[1] != t.shape[2] or len(q) != len(t):
            raise InputError(
                f"query {tuple(q.shape)} and template {tuple(t.shape)} must agree in B and C"
            )
        if config.merge == "loop_mean":
            q = q.repeat_interleave(config.templates, dim=0)
            t = t.flatten(0, 1).unsqueeze(1)
        image = _side(q, config)
        pairs = [(image, _side(one, config)) for one in t.unbind(dim=1)]
        if config.orientation == "reference":
            pairs = [(one, image) for image, one in pairs]
        levels.append(pairs)
    return Comparison(levels, config)


def cost_volume(comparison: Comparison) -> Tensor:
    """C, (B, K, L, h, w) float32 in [0, 2]; channels template by template."""
    config = comparison.config
    levels = []
    with _float32(comparison):
        for pairs in comparison.levels:
            costs = [
                1 - (what.features * what.scale).mT @ (where.features * where.scale)
                for where, what in pairs
            ]
            level = torch.cat(costs, dim=1)  # (B, N D, P)
            if comparison.selects:
                level = _least(level, config.channels)
            levels.append(level.unflatten(2, config.grid))
    return torch.stack(levels, dim=2)


def project(comparison: Comparison, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1 x 1 x 1 convolution of the cost volume, without the volume where that is exact.

    W (1 - T^T F) + b = (W 1 + b) - (W T^T) F: the weights meet the templates first, so nothing of
    size D P, and nothing that grows with N, is held, nor kept for the gradient of W. A selection
    of the least costs is not linear and does build the volume.

    Args:
        weight: (O, K, 1, 1, 1).
        bias: (O,), or None.

    Returns:
        (B, O, L, h, w) float32.
    """
    if comparison.selects:
        return F.conv3d(cost_volume(comparison), weight, bias)
    levels = []
    with _float32(comparison):
        weight = weight.flatten(1).float()  # (O, N D)
        constant = weight.sum(dim=1, keepdim=True)
        if bias is not None:
            constant = constant + bias[:, None]
        for pairs in comparison.levels:
            kernels = weight.chunk(len(pairs), dim=1)  # N x (O, D)
            similar = constant.new_zeros(())
            if comparison.config.orientation == "input":  # one product with the image for all N
                for (_, what), kernel in zip(pairs, kernels, strict=True):
                    similar = similar + (kernel * what.scale) @ what.features.mT  # (B, O, C)
                where = pairs[0][0]
                similar = (similar @ where.features) * where.scale
            else:
                for (where, what), kernel in zip(pairs, kernels, strict=True):
                    seen = (kernel * what.scale) @ what.features.mT
                    similar = similar + (seen @ where.features) * where.scale
            levels.append((constant - similar).unflatten(2, comparison.config.grid))
    return torch.stack(levels, dim=2)


@torch.no_grad()
def initial_map(comparison: Comparison, *, block: int = 1024) -> Tensor:
    """Mbar, the least cost of each position over all templates: (B, L, h, w) float32, no gradient.

    Args:
        block: positions to match with per step; memory is bound by block * P floats an image.
    """
    levels = []
    with _float32(comparison):
        for pairs in comparison.levels:
            best = []
            for where, what in pairs:
                parts = zip(
                    what.features.split(block, dim=2), what.scale.split(block, dim=2), strict=True
                )
                most = [
                    (part.mT @ where.features).mul_(scale.mT).amax(dim=1) for part, scale in parts
                ]
                best.append(torch.stack(most).amax(dim=0) * where.scale[:, 0])
            least = 1 - torch.stack(best).amax(dim=0)  # (B, P)
            levels.append(least.unflatten(1, comparison.config.grid))
    return torch.stack(levels, dim=1)


def spread_over_stages(levels: Sequence[Level]) -> list[Level]:
    """L levels -> the four stages that are guided; stage s of 1..4 sees level floor((s-1) L / 4).

    The spatial guidance, or its channels: the query's levels as the detector gave them, not
    normalised.
    """
    return [levels[stage * len(levels) // 4] for stage in range(4)]


def resize_aligned(x: Tensor, size: tuple[int, int], *, align_corners: bool = True) -> Tensor:
    """(..., h, w) -> (..., *size), bilinear; the paper aligns corners."""
    if x.shape[-2:] == size:
        return x
    # As one channel: with more, PyTorch's CPU kernel turns the tensor channels-last and back.
    single = x.reshape(-1, 1, *x.shape[-2:])
    single = F.interpolate(single, size, mode="bilinear", align_corners=align_corners)
    return single.view(*x.shape[:-2], *size)


def _side(features: Tensor, config: VolumeConfig) -> Side:
    """(B, C, h, w) of any grid -> one side of the volume."""
    flat = resize_aligned(features.float(), config.grid).flatten(2)
    norm = flat.square().sum(dim=1, keepdim=True).sqrt()
    return Side(flat, 1 / (norm + 1e-8))  # so a zero feature has cost 1 to everything


def _float32(comparison: Comparison) -> torch.autocast:
    """Products of features keep their precision where the network's convolutions need not."""
    return torch.autocast(comparison.levels[0][0][0].features.device.type, enabled=False)


def _least(costs: Tensor, count: int) -> Tensor:
    """(B, D, P) -> (B, count, P): each position's smallest costs, in the order they stood in."""
    index = costs.topk(count, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    return costs.gather(1, index)
