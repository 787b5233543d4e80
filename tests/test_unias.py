"""UniAS: its equations, its exact shortcuts, and the switches of its ablations."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import batch_of, picture, random_encoder, training_batches
from torch import Tensor, nn

from allgood.detectors.unias import (
    Neck,
    PatchEmbedding,
    SampleQuery,
    UniAS,
    UniASConfig,
    level_maps,
    sine_position,
)
from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import TiledEncoder
from allgood.layers.linear_head import ReconstructionHead, resize_matrix
from allgood.own_state import load_own_state, own_state
from allgood.recipes import RECIPES
from allgood.runs import write_weights
from allgood.types import InputError, TrainingBatch

SIDE = 64
TINY = UniASConfig(grid=4, width=32, ffn=16, neighbour_mask=3)


class Sizes(FrozenEncoder):
    """An encoder of which only the channels are asked."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        nn.Module.__init__(self)
        self.channels = channels
        self.strides = (2, 4, 8, 16)


@pytest.fixture(scope="module")
def encoder() -> FrozenEncoder:
    return random_encoder("test_efficientnet", (0, 1, 2, 3))


def tiny(encoder: FrozenEncoder, **settings: Any) -> UniAS:
    return UniAS(replace(TINY, **settings), encoder, ("wood",))


def taught(detector: UniAS, count: int = 2) -> TrainingBatch:
    images = [picture("wood", i, (SIDE, SIDE)) for i in range(count)]
    return training_batches(detector, [batch_of(images, ["wood"] * count)])[0]


@pytest.mark.parametrize(
    ("channels", "channel_attention", "count"),
    [
        ((24, 32, 56, 160), True, 53_847_523),
        ((24, 32, 56, 160), False, 49_386_995),
        ((16, 24, 40, 112), True, 53_622_163),
    ],
)
def test_as_many_parameters_as_the_reference(
    channels: tuple[int, ...],
    channel_attention: bool,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("xavier_uniform_", "kaiming_uniform_", "uniform_"):  # drawing takes seconds
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    model = UniAS(UniASConfig(channel_attention=channel_attention), Sizes(channels), ("a",))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_initial_weights(encoder: FrozenEncoder) -> None:
    """Kaiming and Xavier uniform where the reference draws from them; the seed alone decides."""
    model, same, other = (
        UniAS(replace(TINY, width=64), encoder, ("wood",), seed=seed) for seed in (0, 0, 1)
    )
    for name, ours in own_state(model).items():
        assert torch.equal(ours, own_state(same)[name]), name
    assert not torch.equal(model.neck.project.weight, other.neck.project.weight)
    weight = model.neck.top.weight.detach()  # bound sqrt(3 / fan-in) of Kaiming with a = 1
    assert weight.abs().max() == pytest.approx(math.sqrt(3 / (64 * 9)), rel=0.01)
    query = model.decoder.query
    assert isinstance(query, SampleQuery)
    weight = query.channel[0].weight.detach()  # sqrt(6 / (fan-in + fan-out)) of Xavier
    assert weight.abs().max() == pytest.approx(math.sqrt(6 / (64 + 32)), rel=0.02)
    assert query.bank.detach().std() == pytest.approx(1, rel=0.05)
    assert not model.neck.project.bias.any() and not model.decoder.patches[0].embed.bias.any()


# Exact shortcuts


@pytest.mark.parametrize(("grid", "factor"), [(4, 1), (4, 2), (4, 4), (2, 4), (5, 8), (14, 8)])
@pytest.mark.parametrize("seed", [0, 7])
@torch.no_grad()
def test_composed_head_is_the_plain_one(grid: int, factor: int, seed: int) -> None:
    torch.manual_seed(seed)
    head = ReconstructionHead(32, 5, grid, factor)
    x = torch.randn(2, 32, grid, grid)
    expected = head.plain(x)
    assert expected.shape == (2, 5, grid * factor, grid * factor)
    torch.testing.assert_close(head(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # Every pixel has another share of border; all of it in float64 leaves no doubt.
    head.double()
    torch.testing.assert_close(head(x.double()), head.plain(x.double()), rtol=1e-6, atol=1e-7)


def test_composed_head_has_the_gradients_of_the_plain_one() -> None:
    torch.manual_seed(0)
    head = ReconstructionHead(8, 3, 4, 4).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    weight = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for forward in (head, head.plain):
        head.zero_grad()
        (forward(x) * weight).sum().backward()
        gradients.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
    assert len(gradients[0]) == 6
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_resize_matrix() -> None:
    x = torch.randn(1, 1, 5, 5)
    matrix = resize_matrix(5, 20)
    expected = F.interpolate(x, (20, 20), mode="bilinear", align_corners=True)
    torch.testing.assert_close(matrix @ x @ matrix.T, expected)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_folded_patch_embedding_is_both_convolutions(factor: int) -> None:
    torch.manual_seed(0)
    patches = PatchEmbedding(32, factor)
    for parameter in patches.parameters():
        nn.init.normal_(parameter, std=0.1)
    level = torch.randn(2, 32, 4 * factor, 4 * factor)
    expected = patches.project(patches.embed(level) if patches.embed else level)
    assert expected.shape == (2, 32, 4, 4)
    torch.testing.assert_close(patches(level), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["load_state_dict", "load_own_state", "step", "copy"])
def test_what_is_derived_from_weights_follows_them(change: str, encoder: FrozenEncoder) -> None:
    """And is neither saved nor moved about."""
    model = tiny(encoder).eval()
    other = UniAS(TINY, encoder, ("wood",), seed=1).eval()
    image = picture("wood", 0, (SIDE, SIDE))[None]
    with torch.inference_mode():
        before = model.predict(image).anomaly_map
    if change == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif change == "load_own_state":
        load_own_state(model, own_state(other))
    elif change == "copy":
        model = copy.deepcopy(other)
    else:
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                ours.add_(theirs - ours)
    with torch.inference_mode():
        after, expected = model.predict(image).anomaly_map, other.predict(image).anomaly_map
    assert not torch.allclose(before, after, rtol=1e-3)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
    assert own_state(model).keys() == own_state(tiny(encoder)).keys()


# Equations


def test_sine_position() -> None:
    grid, width = 6, 32
    table = sine_position(grid, width).unflatten(0, (grid, grid))
    for y, x, m in ((0, 0, 0), (1, 4, 3), (5, 2, 14), (3, 3, 15)):
        slow = 10000 ** (-2 * (m // 2) / (width // 2)) * 2 * math.pi / (grid + 1e-6)
        wave = math.cos if m % 2 else math.sin
        assert table[y, x, m].item() == pytest.approx(wave((y + 1) * slow), abs=1e-5)
        assert table[y, x, 16 + m].item() == pytest.approx(wave((x + 1) * slow), abs=1e-5)


def test_the_loss_of_one_position(encoder: FrozenEncoder) -> None:
    """z = (3, 4), r = (4, 3): squared error 1, cosine 0.96."""
    for loss, expected in (("cosine", 1.04), ("reference", 1.96)):
        model = tiny(encoder, loss=loss, loss_weight=10.0)
        z = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
        r = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
        model.rebuild = lambda features, targets, r=r: [r]  # type: ignore[method-assign]
        batch = TrainingBatch((z,), torch.zeros(1).long(), torch.zeros(1).long())
        assert model.training_loss(batch, 0).item() == pytest.approx(10 * expected, rel=1e-5)


@pytest.mark.parametrize("fusion", ["reference", "paper"])
def test_maps_are_multiplied(encoder: FrozenEncoder, fusion: str) -> None:
    model = tiny(encoder, fusion=fusion)
    maps = [torch.rand(2, 1, side, side) for side in (32, 16, 8, 4)]
    ones = [torch.ones_like(level) for level in maps]
    alone = [tiny(encoder, fusion=fusion, map_levels=(level,)).fuse(maps) for level in range(1, 5)]
    half = SIDE // 2 if fusion == "reference" else SIDE
    assert alone[0].shape == (2, 1, half, half)
    for i in range(4):
        others_good = [*ones[:i], maps[i], *ones[i + 1 :]]
        torch.testing.assert_close(model.fuse(others_good), alone[i])
    torch.testing.assert_close(model.fuse(maps), alone[0] * alone[1] * alone[2] * alone[3])
    two = tiny(encoder, fusion=fusion, map_levels=(1, 4)).fuse(maps)
    torch.testing.assert_close(two, alone[0] * alone[3])


def test_maps_without_smoothing_keep_their_values(encoder: FrozenEncoder) -> None:
    level = torch.rand(1, 1, 32, 32)  # already of half the picture's size
    maps = [level, *(torch.ones(1, 1, side, side) for side in (16, 8, 4))]
    torch.testing.assert_close(tiny(encoder, smooth=False).fuse(maps), level)
    assert (tiny(encoder).fuse(maps) - level).abs().max() > 0.05


def test_level_maps_of_equal_and_opposite_features() -> None:
    z = torch.randn(1, 3, 2, 2)
    same, opposite, nothing = level_maps([z, z, z], [2 * z, -z, torch.zeros_like(z)])
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-6, rtol=0)
    assert (same >= 0).all()
    torch.testing.assert_close(opposite, torch.full_like(opposite, 2))
    torch.testing.assert_close(nothing, torch.ones_like(nothing))


@torch.inference_mode()
def test_score_is_the_maximum_or_the_deviation_of_the_map(encoder: FrozenEncoder) -> None:
    image = torch.stack([picture("wood", i, (SIDE, SIDE)) for i in range(2)])
    for score in ("max", "std"):
        prediction = tiny(encoder, score=score).eval().predict(image, map_size=(30, 30))
        whole = tiny(encoder).eval().predict(image).anomaly_map.flatten(1)
        expected = whole.amax(dim=1) if score == "max" else whole.std(dim=1, correction=0)
        torch.testing.assert_close(prediction.image_score, expected)


# Training


def test_jitter_is_of_training_and_of_the_input_only(
    encoder: FrozenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good half of the levels get it, and its deviation is 20 / sqrt(2 C) of the size."""
    model = tiny(encoder, dropout=0.0)
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        Neck, "forward", lambda self, inputs, position: seen.append(inputs) or [None]
    )
    monkeypatch.setattr(type(model.decoder), "forward", lambda *_: [])
    features = model.encode(picture("wood", 0, (SIDE, SIDE))[None])
    targets = model.targets(features)
    before = [target.clone() for target in targets]
    model.eval().rebuild(features, targets)
    torch.manual_seed(0)
    model.train()
    for _ in range(200):
        model.rebuild(features, targets)
    assert all(torch.equal(a, b) for a, b in zip(targets, before, strict=True))
    clean, *noisy = seen
    for level, size in enumerate(x.shape[1] for x in clean):
        moved = [n[level] - clean[level] for n in noisy if not torch.equal(n[level], clean[level])]
        assert 70 < len(moved) < 130
        root_mean_square = clean[level].square().mean(dim=1, keepdim=True).sqrt()
        relative = (torch.cat(moved) / root_mean_square.clamp(min=1e-12)).std()
        assert relative.item() == pytest.approx(20 / math.sqrt(size), rel=0.05)


ABLATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"multi_level": False, "query": "tokens", "local": "none"},
    {"query": "tokens", "local": "none"},
    {"query": "learned", "local": "none"},
    {"local": "none"},
    {"local": "conv3"},
    {"local": "ungated"},
    {"channel_attention": False},
    {"head": "transposed", "fusion": "paper"},
    {"loss": "reference", "neighbour_mask": 0},
)


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_each_ablation_trains_every_weight_and_predicts(
    settings: dict[str, Any], encoder: FrozenEncoder
) -> None:
    model = tiny(encoder, dropout=0.0, **settings).train()
    batch = taught(model)
    model.training_loss(batch, 0).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    model.prepare([batch])
    image = picture("wood", 9, (SIDE, SIDE))[None]
    with torch.inference_mode():
        prediction = model.eval().predict(image)
    assert prediction.anomaly_map.shape == (1, 1, SIDE, SIDE)
    assert prediction.anomaly_map.isfinite().all()


@torch.inference_mode()
def test_the_query_follows_the_sample_only_where_it_is_reweighted(encoder: FrozenEncoder) -> None:
    top = torch.randn(2, 32, 4, 4)
    for query, differs in (("reweighted", True), ("learned", False)):
        module = tiny(encoder, query=query).decoder.query
        assert module is not None
        first, second = module(top)
        assert first.shape == (16, 32)
        assert bool((first - second).abs().max() > 1e-3) == differs


def test_training_lowers_every_levels_loss(encoder: FrozenEncoder) -> None:
    model = tiny(encoder, dropout=0.0)
    batch = taught(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def distances() -> list[float]:
        with torch.no_grad():
            targets = model.targets(batch.features)
            maps = level_maps(targets, model.eval().rebuild(batch.features, targets))
        return [float(level.mean()) for level in maps]

    before = distances()
    torch.manual_seed(0)
    model.train()
    for step in range(15):
        optimizer.zero_grad()
        model.training_loss(batch, step).backward()
        optimizer.step()
    for new, old in zip(distances(), before, strict=True):
        assert new < 0.7 * old


def test_saved_and_loaded(encoder: FrozenEncoder, tmp_path: Path) -> None:
    model = UniAS(TINY, encoder, ("wood",), seed=3).eval()
    model.prepare([taught(model)])
    write_weights(tmp_path / "weights.safetensors", own_state(model))
    state = load_file(tmp_path / "weights.safetensors")
    for word in ("backbone", "mask", "resize", "position"):  # the frozen, and constant tables
        assert not any(word in name for name in state if name != "decoder.query_position"), word
    again = UniAS(TINY, encoder, ("wood",)).eval()
    load_own_state(again, state)
    image = picture("wood", 5, (SIDE, SIDE))[None]
    with torch.inference_mode():
        ours, theirs = model.predict(image), again.predict(image)
    assert torch.equal(ours.anomaly_map, theirs.anomaly_map)


@torch.inference_mode()
def test_half_precision_leaves_distances_alone(encoder: FrozenEncoder) -> None:
    model = tiny(encoder).eval()
    image = picture("wood", 5, (SIDE, SIDE))[None]
    exact = model.predict(image).anomaly_map
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model.predict(image)
    assert prediction.anomaly_map.dtype == prediction.image_score.dtype == torch.float32
    torch.testing.assert_close(prediction.anomaly_map, exact, rtol=0.2, atol=0.02)
    torch.testing.assert_close(model.predict(image).anomaly_map, exact)


# What is refused, and recipes


def test_pictures_of_another_size(encoder: FrozenEncoder) -> None:
    with pytest.raises(InputError, match=r"takes pictures of 64 x 64, got 96 x 96: give --image-s"):
        tiny(encoder).predict(torch.zeros(1, 3, 96, 96))


def test_tiles_and_levels_that_do_not_fit(encoder: FrozenEncoder) -> None:
    with pytest.raises(InputError, match="leave out --tile"):
        UniAS(TINY, TiledEncoder(encoder, 96), ("wood",))
    with pytest.raises(InputError, match=r"\(2, 32\): choose others with --levels"):
        UniAS(TINY, random_encoder("test_efficientnet", (0, 4)), ("wood",))
    with pytest.raises(InputError, match=r"map_levels must be from 1 to 4, got \[0\]"):
        tiny(encoder, map_levels=(0,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, "dropout must be in"),
        ({"jitter_probability": 1.5}, "jitter_probability in"),
        ({"width": 48}, "width must be a multiple of 32 and ffn at least 1, got 48"),
        ({"ffn": 0}, "ffn at least 1"),
        ({"grid": 7}, "grid must be even"),
        ({"grid": 0}, "grid must be even"),
        ({"neighbour_mask": 4}, "neighbour_mask must be odd or 0, got 4"),
        ({"feature_jitter": -1.0}, "feature_jitter must be at least 0"),
        ({"loss_weight": 0.0}, "loss_weight above 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UniASConfig(**settings)


def test_recipes_fit_the_detector() -> None:
    names = [name for name in RECIPES if name.startswith("unias")]
    assert names == ["unias", "unias_light", "unias_mvtec_ad", "unias_visa"]
    for name in names:
        config = UniASConfig(**RECIPES[name].settings)
        assert RECIPES[name].image_size == 16 * config.grid
