"""Dinomaly's parts against the paper's formulas: structure, noise, loss, map, score, training."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import CATEGORIES, picture, random_encoder, with_defect
from torch import Tensor, nn

from allgood.detectors.dinomaly import (
    Attention,
    ConvMixer,
    Dinomaly,
    DinomalyConfig,
    NoisyBottleneck,
    loose_loss,
    map_matrix,
)
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder, middle_levels
from allgood.encoders.tiled import TiledEncoder
from allgood.layers.attention import neighbour_mask
from allgood.layers.cosine import cosine_distance
from allgood.types import InputError, Match, TrainingBatch


class StubEncoder(FrozenEncoder):
    """Sizes without a network; level number i answers with i everywhere."""

    def __init__(self, width: int = 8, levels: int = 8, num_prefix: int = 5) -> None:
        nn.Module.__init__(self)
        self.levels = tuple(range(levels))
        self.channels = (width,) * levels
        self.strides = (14,) * levels
        self.num_prefix = num_prefix

    def tokens(self, image: Tensor) -> list[Tensor]:
        count = self.num_prefix + (image.shape[-2] // 14) * (image.shape[-1] // 14)
        shape = (len(image), count, self.channels[0])
        return [torch.full(shape, float(i)) for i in self.levels]


class Answers(nn.Module):
    """Instead of a layer: remembers what it was asked, answers one number everywhere."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number
        self.asked: list[Any] = []

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.asked.append((x, *rest))
        return torch.full_like(x, self.number)


@pytest.fixture(scope="module")
def vit() -> FrozenEncoder:
    """Two levels of width 64, one prefix token, patches of 16 pixels."""
    return random_encoder("test_vit", (1, 2))


def small(encoder: FrozenEncoder, seed: int = 0, **settings: Any) -> Any:
    settings = {"decoder_depth": 2, **settings}
    return Dinomaly(DinomalyConfig(**settings), encoder, CATEGORIES, seed=seed).eval()


def shaken(model: Any, seed: int = 0) -> Any:
    """With weights so large that the decoder does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.5 / math.sqrt(parameter.shape[-1]))
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 2, size: tuple[int, int] = (96, 96), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=generator)


def training_batch(model: Any, image: Tensor, category: Sequence[int] | None = None) -> Any:
    index = torch.arange(len(image))
    which = torch.zeros_like(index) if category is None else torch.tensor(category)
    return TrainingBatch(model.encode(image), which, index)


# Structure


@pytest.mark.parametrize(
    "width, expected", [(384, 15_377_280), (768, 61_425_408), (1024, 109_163_520)]
)
def test_number_of_parameters(width: int, expected: int) -> None:
    with torch.device("meta"):
        model: Any = Dinomaly(DinomalyConfig(), StubEncoder(width), ("a",))
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == expected
    assert len(parameters) == 100
    assert model.decoder[0].attn.heads == width // 64
    assert model.decoder[0].norm1.eps == model.decoder[7].norm2.eps == 1e-8


def test_the_eight_middle_blocks() -> None:
    assert middle_levels(12) == (2, 3, 4, 5, 6, 7, 8, 9)
    assert middle_levels(24) == (4, 6, 8, 10, 12, 14, 16, 18)
    for depth in (6, 11, 13, 40):
        with pytest.raises(InputError, match=r"name them with --levels"):
            middle_levels(depth)
    with pytest.raises(InputError, match="--levels"):
        FrozenEncoder(EncoderConfig("test_vit", "middle", "random"))  # six blocks
    encoder = FrozenEncoder(EncoderConfig("vit_tiny_patch16_224", "middle", "random"))
    assert encoder.levels == (2, 3, 4, 5, 6, 7, 8, 9) and len(encoder.backbone.blocks) == 10


PAIRS: dict[str, tuple[list[float], list[float]]] = {
    # Means of the encoder's levels, and the decoder blocks' that answer to them.
    "two_groups": ([1.5, 5.5], [5.5, 1.5]),
    "one_group": ([3.5], [3.5]),
    "dense": ([0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]),
}


@pytest.mark.parametrize("constraint", PAIRS)
def test_which_blocks_answer_to_which_levels(constraint: Any) -> None:
    model: Any = Dinomaly(DinomalyConfig(constraint=constraint), StubEncoder(), ("a",)).eval()
    model.bottleneck = Answers(-1.0)
    model.decoder = nn.ModuleList(Answers(i) for i in range(8))
    groups = model.encode(images(2, (28, 42)))
    rebuilt = model.decode(groups, (2, 3))
    shallow_first, reversed_order = PAIRS[constraint]
    for found, expected in ((groups, shallow_first), (rebuilt, reversed_order)):
        assert [group.unique().tolist() for group in found] == [[number] for number in expected]
        assert all(group.shape == (2, 5 + 6, 8) for group in found)
    # The bottleneck reads the mean of all levels, every block what the one before it says.
    assert model.bottleneck.asked[0][0].unique().tolist() == [3.5]
    for i, block in enumerate(model.decoder):
        x, grid, mask = block.asked[0]
        assert x.unique().tolist() == [i - 1] and grid == (2, 3) and mask is None


def test_groups_are_means_of_the_encoders_tokens() -> None:
    encoder = random_encoder("test_vit", (0, 1, 2, 3))
    model = small(encoder)
    image = images()
    tokens = encoder.tokens(image)
    groups = model.encode(image)
    assert [group.shape for group in groups] == [(2, 1 + 36, 64)] * 2
    assert not any(group.requires_grad for group in groups)
    torch.testing.assert_close(groups[0], (tokens[0] + tokens[1]) / 2)
    torch.testing.assert_close(groups[1], (tokens[2] + tokens[3]) / 2)
    model.bottleneck = Answers(0.0)
    model.decode(groups, (6, 6))
    torch.testing.assert_close(model.bottleneck.asked[0][0], sum(tokens) / 4)


def test_a_decoder_block_is_the_pre_norm_transformer(vit: FrozenEncoder) -> None:
    block = shaken(small(vit)).decoder[0].double()
    x = noise(2, 7, 64).double()
    scaled = F.layer_norm(x, (64,), eps=1e-8) * block.norm1.weight + block.norm1.bias
    query, key, value = block.attn.qkv(scaled).split(64, dim=-1)  # one head
    query, key = F.elu(query) + 1, F.elu(key) + 1
    weight = query @ key.transpose(1, 2)
    y = x + block.attn.proj(weight / weight.sum(dim=2, keepdim=True) @ value)
    scaled = F.layer_norm(y, (64,), eps=1e-8) * block.norm2.weight + block.norm2.bias
    hidden = block.mlp["fc1"](scaled)
    y = y + block.mlp["fc2"](hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    assert (block(x, (2, 3), None) - y).abs().max() < 1e-5 * y.abs().max()  # attention in float32


@pytest.mark.parametrize("width, heads", [(64, 1), (192, 3), (384, 6)])
def test_initial_weights(width: int, heads: int) -> None:
    model = small(StubEncoder(width, levels=2))
    assert model.decoder[0].attn.heads == heads
    weights = []
    for module in [*model.bottleneck.modules(), *model.decoder.modules()]:
        if isinstance(module, nn.Linear):
            weights.append(module.weight.flatten())
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    flat = torch.cat(weights).double()
    assert len(weights) == 2 + 4 * 2
    assert flat.std().item() == pytest.approx(0.00987, abs=5e-5)
    assert flat.mean().item() == pytest.approx(0, abs=1e-4)
    assert 0.029 < flat.abs().max() <= 0.03


def test_weights_follow_from_the_seed_alone(vit: FrozenEncoder) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(vit, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = small(vit, seed=5).state_dict(), small(vit, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "decoder.1.attn.qkv.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["decoder.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"patch_masking": -0.1}, r"patch_masking must be in \[0, 1\)"),
        ({"discard_rate": 1.0}, r"discard_rate must be in \[0, 1\)"),
        ({"top_fraction": 0.0}, r"top_fraction must be in \(0, 1\]"),
        ({"kernel_size": 4}, "must be odd"),
        ({"neighbour_mask": 2}, "must be odd"),
        ({"mixer": "conv", "neighbour_mask": 3}, "neighbour_mask needs attention"),
        ({"decoder_depth": 0}, "decoder_depth and discard_steps must be at least 1"),
        ({"discard_steps": 0}, "decoder_depth and discard_steps must be at least 1"),
        ({"feature_jitter": -1.0}, "feature_jitter at least 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DinomalyConfig(**settings)


@pytest.mark.parametrize(
    "levels, settings, message",
    [
        (3, {}, "3 encoder levels and 8 decoder blocks do not divide into 2 groups"),
        (8, {"decoder_depth": 3}, "8 encoder levels and 3 decoder blocks do not divide into 2"),
        (3, {"constraint": "dense"}, r"into 3 groups \(constraint dense\)"),
    ],
)
def test_levels_that_form_no_groups(levels: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dinomaly(DinomalyConfig(**settings), StubEncoder(levels=levels), ("a",))


def test_tiles_and_pyramids_are_refused(tiny_encoder: FrozenEncoder) -> None:
    with pytest.raises(InputError, match="takes no tiles: leave out --tile"):
        Dinomaly(DinomalyConfig(), TiledEncoder(tiny_encoder, 128), ("a",))
    with pytest.raises(InputError, match="no vision transformer and has no tokens"):
        small(tiny_encoder).predict(images())


# Noise


def identity_bottleneck(width: int = 8, **settings: Any) -> NoisyBottleneck:
    """fc2(gelu(fc1(x))) = x for large positive x."""
    bottleneck = NoisyBottleneck(DinomalyConfig(**settings), width)
    for linear in (bottleneck.fc1, bottleneck.fc2):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return bottleneck


def test_dropout_at_three_places_in_training_only() -> None:
    x = torch.full((4, 500, 8), 100.0)
    for rate in (0.2, 0.4):
        bottleneck = identity_bottleneck(dropout=rate)
        torch.manual_seed(0)
        y = bottleneck(x, 5)
        assert torch.allclose(y.unique(), torch.tensor([0.0, 100 / (1 - rate) ** 3]))
        assert (y > 0).float().mean().item() == pytest.approx((1 - rate) ** 3, abs=0.02)
        assert torch.equal(bottleneck.eval()(x, 5), x)


def test_what_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(small(StubEncoder(16, levels=2), dropout=0.3))
    seen: list[tuple[Tensor, float, bool]] = []

    def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
        seen.append((x.detach(), probability, training))
        return x

    monkeypatch.setattr("allgood.detectors.dinomaly.dropout", dropout)
    x = noise(2, 11, 16)
    for training in (True, False):
        seen.clear()
        model.train(training)
        model.decode([x, x], (2, 3))
        hidden = F.gelu(F.linear(x, model.bottleneck.fc1.weight, model.bottleneck.fc1.bias))
        out = F.linear(hidden, model.bottleneck.fc2.weight, model.bottleneck.fc2.bias)
        assert len(seen) == 3  # none in the decoder
        assert [(p, on) for _, p, on in seen] == [(0.3, training)] * 3
        for (found, _, _), expected in zip(seen, (x, hidden, out), strict=True):
            torch.testing.assert_close(found, expected)


def test_feature_jitter() -> None:
    """Noise of standard deviation scale * |x| / C, token by token."""
    bottleneck = identity_bottleneck(dropout=0.0, feature_jitter=0.5)
    x = torch.full((1, 2, 8), 1000.0).repeat(1, 20_000, 1)
    x[:, 1::2] = 4000
    torch.manual_seed(0)
    added = bottleneck(x, 1) - x
    for start, size in ((0, 1000), (1, 4000)):
        expected = 0.5 * size * math.sqrt(8) / 8
        one = added[:, start::2]
        assert one.std().item() == pytest.approx(expected, rel=0.01)
        assert abs(one.mean()) < 0.01 * expected
    assert torch.equal(bottleneck.eval()(x, 1), x)


def test_patch_masking_hits_whole_patches_only() -> None:
    bottleneck = identity_bottleneck(dropout=0.0, patch_masking=0.4)
    x = torch.full((10, 5 + 1000, 8), 100.0)
    torch.manual_seed(0)
    y = bottleneck(x, 5)
    assert torch.equal(y[:, :5], x[:, :5])
    gone = (y == 0).float().mean(dim=2)
    assert gone.unique().tolist() == [0, 1]  # whole tokens
    assert gone[:, 5:].mean().item() == pytest.approx(0.4, abs=0.02)
    assert not torch.equal(gone[0], gone[1])
    assert torch.equal(bottleneck.eval()(x, 5), x)


# Loss


def distances(target: Tensor, rebuilt: Tensor) -> Tensor:
    target, rebuilt = target.double(), rebuilt.double()
    return 1 - (target * rebuilt).sum(-1) / (target.norm(dim=-1) * rebuilt.norm(dim=-1))


def by_closed_form(
    targets: list[Tensor], rebuilt: list[Tensor], rate: float, shrink: float
) -> tuple[float, list[Tensor]]:
    """Value and gradients, picture by picture in float64."""
    value, gradients = 0.0, []
    for e, d in zip([t.double() for t in targets], [t.double() for t in rebuilt], strict=True):
        point = distances(e, d)
        kept = max(1, int(point.numel() * (1 - rate)))
        threshold = point.flatten().sort(descending=True).values[kept - 1]
        gradient = torch.zeros_like(d)
        for b in range(len(e)):
            norms = e[b].norm() * d[b].norm()
            cosine = (e[b] * d[b]).sum() / norms
            value += (1 - cosine.item()) / len(e) / len(targets)
            weight = torch.where(point[b] < threshold, shrink, 1.0).unsqueeze(1)
            direction = e[b] / norms - cosine * d[b] / d[b].norm() ** 2
            gradient[b] = -weight * direction / len(e) / len(targets)
        gradients.append(gradient)
    return value, gradients


def groups_of(count: int, batch: int = 3, patches: int = 40, width: int = 12) -> Any:
    targets = [noise(batch, patches, width, seed=10 + g) for g in range(count)]
    rebuilt = [t + noise(*t.shape, seed=20 + g) for g, t in enumerate(targets)]
    return targets, [group.requires_grad_() for group in rebuilt]


@pytest.mark.parametrize("rate", [0, 0.45, 0.9, 0.999])
@pytest.mark.parametrize("shrink", [0.1, 0.0])
@pytest.mark.parametrize("count", [1, 2])
def test_loose_loss_is_the_closed_form(rate: float, shrink: float, count: int) -> None:
    targets, rebuilt = groups_of(count)
    loss = loose_loss(targets, rebuilt, rate, shrink=shrink)
    loss.backward()
    value, gradients = by_closed_form(targets, [d.detach() for d in rebuilt], rate, shrink)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    for group, expected in zip(rebuilt, gradients, strict=True):
        assert (group.grad - expected).abs().max() < 1e-6 * expected.abs().max()


def test_loose_loss_does_not_depend_on_the_rate() -> None:
    targets, rebuilt = groups_of(2)
    values = {loose_loss(targets, rebuilt, p, shrink=0.1).item() for p in (0, 0.3, 0.45, 0.9)}
    assert len(values) == 1


def test_targets_learn_nothing() -> None:
    targets, rebuilt = groups_of(1)
    targets[0].requires_grad_()
    loose_loss(targets, rebuilt, 0.5, shrink=0.1).backward()
    assert targets[0].grad is None


def kept_points(target: Tensor, rebuilt: Tensor, rate: float) -> Tensor:
    """(B, P) bool: points with a gradient, when that of the easy ones is multiplied by 0."""
    rebuilt = rebuilt.detach().requires_grad_()
    loose_loss([target], [rebuilt], rate, shrink=0.0).backward()
    assert rebuilt.grad is not None
    return rebuilt.grad.abs().amax(dim=2) > 0


@pytest.mark.parametrize("rate, kept", [(0, 12544), (0.45, 6899), (0.9, 1254)])
def test_number_of_hard_points(rate: float, kept: int) -> None:
    target, rebuilt = noise(16, 784, 4), noise(16, 784, 4, seed=1)
    hard = kept_points(target, rebuilt, rate)
    assert hard.sum() == kept
    distance = cosine_distance(target, rebuilt)
    assert rate == 0 or distance[hard].min() > distance[~hard].max()
    # The whole batch shares one threshold.
    assert rate == 0 or len(hard.sum(dim=1).unique()) > 1


def test_ties_keep_their_full_weight() -> None:
    target = torch.zeros(1, 10, 2)
    target[..., 0] = 1
    rebuilt = target.clone()
    rebuilt[0, :6, 1] = 1  # six points at one distance, four at 0
    assert kept_points(target, rebuilt, 0.9)[0].tolist() == [True] * 6 + [False] * 4
    assert kept_points(target, rebuilt, 0.5)[0].tolist() == [True] * 6 + [False] * 4
    assert kept_points(target, rebuilt, 0.2)[0].all()


@pytest.mark.parametrize("step, rate", [(0, 0), (1, 0.009), (50, 0.45), (100, 0.9), (5000, 0.9)])
def test_the_rate_ramps_up(vit: FrozenEncoder, step: int, rate: float) -> None:
    model = shaken(small(vit, discard_steps=100, shrink=0.0))
    batch = training_batch(model, images(3))
    found = gradients_of(model, model.training_loss(batch, step))
    rebuilt = [group[:, 1:] for group in model.decode(batch.features, (6, 6))]
    targets = [group[:, 1:] for group in batch.features]
    expected = gradients_of(model, loose_loss(targets, rebuilt, rate, shrink=0.0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    others = gradients_of(model, model.training_loss(batch, step + 30 if step < 100 else 50))
    assert not torch.equal(found[0], others[0])


def gradients_of(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_all_processes_share_one_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    target, rebuilt = noise(4, 50, 6), noise(4, 50, 6, seed=1)
    rebuilt[2:] += 3 * target[2:]  # the other process has easier points
    together = kept_points(target, rebuilt, 0.7)
    alone = kept_points(target[:2], rebuilt[:2], 0.7)
    halves = [
        cosine_distance(t, r).flatten()
        for t, r in zip(target.split(2), rebuilt.split(2), strict=True)
    ]

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        assert any(torch.equal(own, half) for half in halves)
        for part, half in zip(parts, halves, strict=True):
            part.copy_(half)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    for rank in (0, 1):
        own = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(kept_points(target[own], rebuilt[own], 0.7), together[own])
    assert not torch.equal(alone, together[:2])


def test_point_loss_is_the_mean_distance(vit: FrozenEncoder) -> None:
    model = shaken(small(vit, loss="point"))
    batch = training_batch(model, images(3))
    rebuilt = model.decode(batch.features, (6, 6))
    expected = [distances(e[:, 1:], d[:, 1:]) for e, d in zip(batch.features, rebuilt, strict=True)]
    for step in (0, 5000):
        found = model.training_loss(batch, step)
        assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert all(g.abs().sum() > 0 for g in gradients_of(model, found))


def test_the_prefix_is_no_part_of_the_loss(vit: FrozenEncoder) -> None:
    model = small(vit)
    batch = training_batch(model, images(2))
    rebuilt = [noise(2, 37, 64, seed=g) for g in (0, 1)]
    model.decode = lambda groups, grid: rebuilt
    before = model.training_loss(batch, 10).item()
    for group in rebuilt:
        group[:, 0] += 100
    assert model.training_loss(batch, 10).item() == before
    rebuilt[0][:, 1] += 100
    assert model.training_loss(batch, 10).item() != before


# Map and score


def blur(maps: Tensor) -> Tensor:
    """5 x 5 Gaussian of sigma 4, the outside being 0."""
    offsets = torch.arange(-2, 3).double()
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 4.0**2))
    kernel = (kernel / kernel.sum())[None, None]
    return F.conv2d(maps, kernel, padding=2)


def four_steps(host_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Up to the input's size, down to 256, blurred; as the reference does it, in float64."""
    x = F.interpolate(host_map.double(), size, mode="bilinear", align_corners=True)
    return blur(F.interpolate(x, (256, 256), mode="bilinear", align_corners=False))


@pytest.mark.parametrize(
    "grid, size", [((28, 28), (392, 392)), ((20, 28), (280, 392)), ((6, 9), (84, 144))]
)
def test_map_matrices_are_the_four_steps(grid: tuple[int, int], size: tuple[int, int]) -> None:
    host_map = noise(2, 1, *grid).abs()
    rows, columns = (map_matrix(n, side, 256) for n, side in zip(grid, size, strict=True))
    assert rows.shape == (256, grid[0]) and rows.dtype == torch.float32
    expected = four_steps(host_map, size)
    assert (rows @ host_map @ columns.T - expected).abs().max() < 1e-6


def test_the_maps_frame_is_darker() -> None:
    sums = map_matrix(28, 392, 256).sum(dim=1)
    assert sums[:3].tolist() == pytest.approx([0.606, 0.812, 1.0], abs=5e-4)
    assert sums[-2:].tolist() == pytest.approx([0.812, 0.606], abs=5e-4)
    assert (sums[2:-2] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
@torch.no_grad()
def test_predict_is_the_pipeline(vit: FrozenEncoder, size: tuple[int, int]) -> None:
    model = shaken(small(vit))
    image = images(3, size)
    category = torch.tensor([1, 0, 1])
    host_map = model.match(image, category).host_map
    expected = four_steps(host_map, size)
    prediction = model.predict(image, category, map_size=(256, 256))
    assert (prediction.anomaly_map - expected).abs().max() < 2e-6
    assert torch.equal(prediction.category, category)
    top = expected.flatten(1).sort(dim=1, descending=True).values[:, :655].mean(dim=1)
    assert prediction.image_score.tolist() == pytest.approx(top.tolist(), rel=1e-6)
    for map_size in (None, (100, 300), (37, 41)):  # None: the picture's
        resized = F.interpolate(
            expected, map_size or size, mode="bilinear", align_corners=False, antialias=False
        )
        other = model.predict(image, category, map_size=map_size)
        assert other.anomaly_map.shape == resized.shape
        assert other.anomaly_map.dtype == torch.float32
        assert (other.anomaly_map - resized).abs().max() < 2e-6
        assert torch.equal(other.image_score, prediction.image_score)


def answering(model: Any, host_map: Tensor) -> Any:
    feature = torch.ones(len(host_map), 64, *host_map.shape[-2:])
    model.match = lambda image, category=None: Match(
        [feature], [feature.unsqueeze(1)], host_map, category
    )
    return model


def test_image_score_by_hand(vit: FrozenEncoder) -> None:
    known = torch.zeros(2, dtype=torch.int64)
    even = answering(small(vit), torch.tensor([0.25, 1.5]).view(2, 1, 1, 1).repeat(1, 1, 6, 6))
    prediction = even.predict(images(), known)
    assert prediction.image_score.tolist() == pytest.approx([0.25, 1.5])
    assert prediction.anomaly_map[0, 0, 1:-1, 1:-1].unique().tolist() == pytest.approx([0.25])
    # Every pixel: in each direction 252 whole ones, 2 of 0.812 and 2 of 0.606.
    whole = answering(small(vit, top_fraction=1.0), torch.ones(2, 1, 6, 6))
    expected = ((252 + 2 * 0.8123 + 2 * 0.6063) / 256) ** 2
    assert whole.predict(images(), known).image_score[0].item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_ignored_regions(vit: FrozenEncoder) -> None:
    model = small(vit)
    host_map = noise(1, 1, 6, 6).abs() * 0.1
    host_map[..., :3, :2] = 5  # the worst stands where nobody should look
    answering(model, host_map)
    ignore = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    ignore[..., :48, :32] = True
    ignore[..., 90:, 90:] = True  # less than half a patch
    known = torch.zeros(1, dtype=torch.int64)
    masked = host_map.clone()
    masked[..., :3, :2] = 0
    expected = four_steps(masked, (96, 96))
    expected[..., :128, :86] = 0  # 32 / 96 of 256 is 85.3: pixel 85's centre is ignored too
    expected[..., 240:, 240:] = 0
    found = model.predict(images(1), known, ignore=ignore, map_size=(256, 256))
    assert (found.anomaly_map - expected).abs().max() < 1e-6
    score = expected.flatten().sort(descending=True).values[:655].mean()
    assert found.image_score.item() == pytest.approx(score.item(), rel=1e-6)
    assert model.predict(images(1), known).image_score > 4
    own_size = model.predict(images(1), known, ignore=ignore).anomaly_map
    assert not own_size[ignore].any() and own_size[~ignore].min() > 0
    nothing = model.predict(images(1), known, ignore=torch.zeros_like(ignore))
    assert torch.equal(nothing.anomaly_map, model.predict(images(1), known).anomaly_map)


@pytest.mark.parametrize("constraint, count", [("two_groups", 2), ("one_group", 1), ("dense", 4)])
@torch.no_grad()
def test_match(constraint: Any, count: int) -> None:
    model = shaken(
        small(random_encoder("test_vit", (0, 1, 2, 3)), constraint=constraint, decoder_depth=4)
    )
    image = images(2, (64, 96))
    match = model.match(image, torch.tensor([1, 0]))
    assert match.category.tolist() == [1, 0]
    assert [q.shape for q in match.query] == [(2, 64, 4, 6)] * count
    assert [t.shape for t in match.template] == [(2, 1, 64, 4, 6)] * count
    assert match.host_map.shape == (2, 1, 4, 6)
    groups = model.encode(image)
    rebuilt = model.decode(groups, (4, 6))
    for g in range(count):
        for row, column in ((0, 0), (1, 2), (3, 5)):
            token = 1 + row * 6 + column
            assert torch.equal(match.query[g][:, :, row, column], groups[g][:, token])
            assert torch.equal(match.template[g][:, 0, :, row, column], rebuilt[g][:, token])
    expected = torch.stack([distances(e, d)[:, 1:] for e, d in zip(groups, rebuilt, strict=True)])
    torch.testing.assert_close(
        match.host_map.flatten(1).double(), expected.mean(dim=0), rtol=0, atol=1e-6
    )


def test_a_look_in_inference_mode_leaves_gradients_possible(vit: FrozenEncoder) -> None:
    """The matrices of the map are kept between calls, whatever mode the first came in."""
    map_matrix.cache_clear()
    model = small(vit)
    known = torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        before = model.predict(images(), known)
    after = model.predict(images(), known)
    torch.testing.assert_close(before.anomaly_map, after.anomaly_map.detach())


# The other mixers


MIXERS: list[dict[str, Any]] = [
    {},
    {"neighbour_mask": 1},
    {"neighbour_mask": 3},
    {"mixer": "softmax"},
    {"mixer": "softmax", "neighbour_mask": 3},
    {"mixer": "conv", "kernel_size": 3},
    {"mixer": "conv"},
    {"loss": "point"},
    {"constraint": "one_group"},
    {"constraint": "dense"},
    {"feature_jitter": 5.0, "patch_masking": 0.2, "dropout": 0.0},
]


@pytest.mark.parametrize("settings", MIXERS, ids=str)
def test_every_parameter_learns(vit: FrozenEncoder, settings: dict[str, Any]) -> None:
    model = small(vit, **settings).train()
    torch.manual_seed(0)
    loss = model.training_loss(training_batch(model, images(3)), 100)
    assert torch.isfinite(loss) and 0 < loss.item() < 2
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        prediction = model.eval().predict(images(2, (64, 96)), torch.zeros(2, dtype=torch.int64))
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    assert torch.isfinite(prediction.anomaly_map).all()


def test_the_decoder_is_told_its_grid_and_mask(vit: FrozenEncoder) -> None:
    model = small(vit, neighbour_mask=3)
    model.decoder = nn.ModuleList(Answers(i) for i in range(2))
    model.match(images(1, (64, 96)), torch.tensor([0]))
    model.training_loss(training_batch(model, images(1)), 0)
    for block in model.decoder:
        for asked, grid in zip(block.asked, ((4, 6), (6, 6)), strict=True):
            assert asked[1] == grid
            assert torch.equal(asked[2], neighbour_mask(*grid, 3, num_prefix=1))


@pytest.mark.parametrize("mixer", ["linear", "softmax"])
@torch.no_grad()
def test_neighbours_are_not_seen(mixer: Any) -> None:
    config = DinomalyConfig(mixer=mixer, neighbour_mask=3)
    attention = Attention(config, 16, 2)
    mask = neighbour_mask(5, 5, 3, num_prefix=1)
    attention.qkv.weight[:16] = 0  # all queries alike, so that only keys and values tell
    x = noise(1, 26, 16)
    before = attention(x, (5, 5), mask)
    changed = x.clone()
    changed[0, 1 + 12] += 10  # the patch in the middle
    felt = (attention(changed, (5, 5), mask) - before)[0].abs().amax(dim=1) > 1e-5
    near = [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert [i for i in range(25) if not felt[1 + i]] == near and felt[0]


@torch.no_grad()
def test_the_conv_mixer_keeps_to_the_grid() -> None:
    mixer: Any = ConvMixer(8, 3)
    x = noise(2, 5 + 4 * 6, 8)
    y = mixer(x, (4, 6), None)
    assert not y[:, :5].any()  # class and register tokens get nothing ...
    changed = x.clone()
    changed[:, :5] += 100
    assert torch.equal(mixer(changed, (4, 6), None), y)  # ... and give nothing
    # Token by token: 1 x 1, GELU, a sum over the neighbours channel by channel, 1 x 1.
    expand, reduce = mixer.expand.weight[:, :, 0, 0], mixer.reduce.weight[:, :, 0, 0]
    hidden = F.gelu(x[0, 5:] @ expand.T + mixer.expand.bias).view(4, 6, 16)
    for row in range(4):
        for column in range(6):
            total = mixer.depthwise.bias.clone()
            for i in range(max(0, row - 1), min(4, row + 2)):
                for j in range(max(0, column - 1), min(6, column + 2)):
                    total += (
                        hidden[i, j] * mixer.depthwise.weight[:, 0, i - row + 1, j - column + 1]
                    )
            expected = reduce @ total + mixer.reduce.bias
            torch.testing.assert_close(y[0, 5 + row * 6 + column], expected, rtol=1e-4, atol=1e-5)


def test_only_some_mixers_need_square_training_images(vit: FrozenEncoder) -> None:
    for size in ((64, 96), (64, 144)):  # of 4 x 9 patches could be 6 x 6
        oblong = images(2, size)
        for settings in ({"mixer": "conv"}, {"neighbour_mask": 1}):
            with pytest.raises(InputError, match="train on square images only, got 64 x "):
                small(vit, **settings).encode(oblong)  # before all of them are encoded
        model = small(vit)
        assert torch.isfinite(model.training_loss(training_batch(model, oblong), 0))


# Learning


def trained(model: Any, pictures: Tensor, steps: int, rate: float = 2e-3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    batch = training_batch(model, pictures)
    torch.manual_seed(0)
    losses = []
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.training_loss(batch, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("settings", [{}, {"mixer": "conv", "kernel_size": 3}, {"loss": "point"}])
def test_it_learns_the_good_and_sees_a_defect(vit: FrozenEncoder, settings: dict[str, Any]) -> None:
    model = small(vit, dropout=0.1, discard_steps=100, **settings)
    good = torch.stack([picture(name, seed) for name in CATEGORIES for seed in range(6)])
    losses = trained(model, good, 120)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    fresh = torch.stack([picture(name, 50 + seed) for name in CATEGORIES for seed in range(3)])
    broken = torch.stack([with_defect(image, 24, 48) for image in fresh])
    known = torch.zeros(6, dtype=torch.int64)
    with torch.inference_mode():
        ours, theirs = model.predict(fresh, known), model.predict(broken, known)
    assert theirs.image_score.min() > ours.image_score.max()
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[24:48, 48:72] = True
    for anomaly_map in theirs.anomaly_map[:, 0]:
        assert anomaly_map[inside].mean() > 1.5 * anomaly_map[~inside].mean()


@torch.no_grad()
def test_the_category_is_inferred_after_prepare(vit: FrozenEncoder) -> None:
    model = small(vit)
    batches = []
    for seed in range(4):
        both = torch.stack([picture(name, seed) for name in CATEGORIES])
        batches.append(training_batch(model, both, [0, 1]))
    with pytest.raises(InputError, match="cannot be told apart"):
        model.predict(images())
    model.prepare(batches)
    fresh = torch.stack([picture(name, 20 + i) for i in range(3) for name in CATEGORIES])
    assert model.predict(fresh).category.tolist() == [0, 1] * 3
    # Nearest neighbour by the deepest group's mean patch at unit length.
    deepest = torch.cat([batch.features[-1][:, 1:].mean(dim=1) for batch in batches])
    torch.testing.assert_close(
        model.references.features[model.references.category == 0],
        F.normalize(deepest[0::2], dim=1),
    )
    assert model.predict(fresh, torch.ones(6, dtype=torch.int64)).category.tolist() == [1] * 6
