"""UniAD against the formulas of its paper: structure, mask, noise, loss, map, score, training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CATEGORIES, batch_of, picture, random_encoder, training_batches, with_defect
from torch import Tensor, nn

from allgood.detectors.uniad import DecoderLayer, UniAD, UniADConfig
from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import TiledEncoder
from allgood.inference import load_weights
from allgood.own_state import own_state
from allgood.recipes import RECIPES
from allgood.runs import write_weights
from allgood.training.config import TrainConfig
from allgood.types import InputError, Match, TrainingBatch

TINY: dict[str, Any] = {"grid": 6, "neighbour_mask": 3, "width": 32, "layers": 2, "heads": 2}


class Widths(FrozenEncoder):
    """Channels without a network."""

    def __init__(self, *channels: int) -> None:
        nn.Module.__init__(self)
        self.channels = channels


@pytest.fixture(scope="module")
def pyramid() -> FrozenEncoder:
    encoder: FrozenEncoder = random_encoder("test_efficientnet", (0, 1, 2, 3))
    return encoder


def small(encoder: FrozenEncoder, seed: int = 0, **settings: Any) -> Any:
    return UniAD(UniADConfig(**{**TINY, **settings}), encoder, CATEGORIES, seed=seed).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 2, size: tuple[int, int] = (96, 96)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def batch_of_features(features: Tensor) -> TrainingBatch:
    count = len(features)
    return TrainingBatch((features,), torch.zeros(count).long(), torch.arange(count))


# Structure


@pytest.mark.parametrize(
    "channels, expected", [((24, 32, 56, 160), 7_717_392), ((16, 24, 40, 112), 7_676_352)]
)
def test_number_of_parameters(channels: tuple[int, ...], expected: int) -> None:
    model = UniAD(UniADConfig(), Widths(*channels), ("a",))
    assert sum(p.numel() for p in model.parameters()) == expected
    assert all(p.requires_grad for p in model.parameters())


def test_initial_weights() -> None:
    model = UniAD(UniADConfig(), Widths(24, 32, 56, 160), ("a",), seed=3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            bound = math.sqrt(6 / (inputs + outputs))  # Xavier's
            assert 0.98 * bound < module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert not module.bias.any()
        elif isinstance(module, nn.MultiheadAttention):
            bound = math.sqrt(6 / (256 + 768))
            assert 0.98 * bound < module.in_proj_weight.abs().max() <= bound
            assert not module.in_proj_bias.any()
        elif isinstance(module, DecoderLayer):
            assert module.query.shape == (196, 256)
            assert module.query.std().item() == pytest.approx(1, abs=0.02)
            assert abs(module.query.mean().item()) < 0.02


def test_weights_follow_from_the_seed_alone(pyramid: FrozenEncoder) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = own_state(small(pyramid, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = own_state(small(pyramid, seed=5)), own_state(small(pyramid, seed=6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "decoder_layers.1.query"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["decoder_layers.0.query"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"neighbour_mask": 2}, "neighbour_mask must be odd, or 0, got 2"),
        ({"neighbour_mask": -1}, "neighbour_mask must be odd, or 0, got -1"),
        ({"grid": 0}, "grid must be at least 1"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"width": 250}, "width must be even and a multiple of heads = 8, got 250"),
        ({"width": 15, "heads": 5}, "width must be even"),
        ({"width": 0}, "width must be even"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"feature_jitter": -1.0}, "feature_jitter must be at least 0"),
        ({"feature_jitter": math.nan}, "feature_jitter must be at least 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UniADConfig(**settings)


def test_a_mask_that_hides_everything_and_tiles(pyramid: FrozenEncoder) -> None:
    with pytest.raises(InputError, match="7 x 7 hides the whole grid of 4 x 4"):
        small(pyramid, grid=4, neighbour_mask=7)
    with pytest.raises(InputError, match="takes no tiles: leave out --tile"):
        UniAD(UniADConfig(**TINY), TiledEncoder(pyramid, 96), CATEGORIES)


def test_the_mask_hides_a_square_around_each_query() -> None:
    mask: Any = UniAD(UniADConfig(), Widths(8), ("a",)).mask
    hidden = (~mask).sum(dim=1).view(14, 14)
    assert hidden.sum() == 7396  # of the official network
    assert hidden[0, 0] == hidden[13, 13] == 16 and hidden[7, 7] == 49 and hidden[0, 7] == 28
    assert not mask[7 * 14 + 7, 4 * 14 + 10] and mask[7 * 14 + 7, 3 * 14 + 7]
    assert UniAD(UniADConfig(neighbour_mask=0), Widths(8), ("a",)).mask is None


def test_no_position_sees_its_neighbours(pyramid: FrozenEncoder) -> None:
    """With one layer and nothing but zeros to add, information comes from outside the square."""
    model = small(pyramid, layers=1, dropout=0.0)
    features = noise(1, 120, 6, 6)
    changed = features.clone()
    changed[..., 2, 3] += 5
    memory = model.input_projection(features.flatten(2).transpose(1, 2))
    other = model.input_projection(changed.flatten(2).transpose(1, 2))
    layer = model.decoder_layers[0]
    difference = layer(other, other, model.position(), model.mask) - layer(
        memory, memory, model.position(), model.mask
    )
    moved = (difference.abs().amax(dim=2) > 1e-7).view(6, 6)
    expected = torch.ones(6, 6, dtype=torch.bool)
    expected[1:4, 2:5] = False
    assert torch.equal(moved, expected)


def test_a_decoder_layer_knows_the_previous_one_by_attention_only(pyramid: FrozenEncoder) -> None:
    layer = small(pyramid).decoder_layers[0].double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * noise(*parameter.shape)
    output, memory = noise(2, 36, 32, seed=1).double(), noise(2, 36, 32, seed=2).double()
    position = noise(36, 32, seed=3).double()

    def attention(part: nn.MultiheadAttention, query: Tensor, value: Tensor) -> Tensor:
        key = value + position
        found: Tensor = part(query + position, key, value, need_weights=True)[0]
        return found

    query = layer.query.expand(2, -1, -1)
    y = layer.memory_norm(query + attention(layer.memory_attention, query, memory))
    y = layer.output_norm(y + attention(layer.output_attention, y, output))
    torch.testing.assert_close(layer(output, memory, position), layer.feed_forward(y))


def test_features_are_the_levels_on_one_grid(pyramid: FrozenEncoder) -> None:
    model = small(pyramid)
    for size in ((96, 96), (64, 160)):
        image = images(2, size)
        (features,) = model.encode(image)
        assert features.shape == (2, sum(pyramid.channels), 6, 6) and not features.requires_grad
        first = 0
        for level in pyramid(image):
            width = level.shape[1]
            ours = features[:, first : first + width]
            for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):  # corners lie on corners
                torch.testing.assert_close(ours[:, :, *corner], level[:, :, *corner])
            first += width


# Noise and loss


def test_noise_is_for_training_only_and_never_in_the_target(pyramid: FrozenEncoder) -> None:
    model = small(pyramid, dropout=0.0)
    clean = noise(3, 120, 6, 6)
    kept = clean.clone()
    seen: list[Tensor] = []

    def rebuild(features: Tensor) -> Tensor:
        seen.append(features)
        return torch.zeros_like(features)

    model.rebuild = rebuild
    batch = batch_of_features(clean)
    for training in (True, False):
        model.train(training)
        loss = model.training_loss(batch, 0)
        assert loss.item() == pytest.approx(kept.square().mean().item(), rel=1e-6)
        assert torch.equal(clean, kept)
    jittered, plain = seen
    assert torch.equal(plain, kept)
    deviation = (jittered - kept).std(dim=1)
    expected = 20 * kept.norm(dim=1) / 120
    assert (deviation / expected).mean().item() == pytest.approx(1, abs=0.02)
    model.config = UniADConfig(**TINY, feature_jitter=0.0)
    model.train().training_loss(batch, 0)
    assert torch.equal(seen[-1], kept)


def test_two_steps_draw_other_noise(pyramid: FrozenEncoder) -> None:
    model = small(pyramid, dropout=0.0).train()
    batch = batch_of_features(noise(3, 120, 6, 6))
    torch.manual_seed(0)
    first, second = (model.training_loss(batch, 0).item() for _ in range(2))
    torch.manual_seed(0)
    assert model.training_loss(batch, 0).item() == first != second


def test_gradients_reach_everything_that_is_trained(pyramid: FrozenEncoder) -> None:
    model = small(pyramid).train()
    model.training_loss(batch_of_features(noise(3, 120, 6, 6)), 0).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().max() > 0, name


# Map and score


def matched(model: Any, host_map: Tensor) -> None:
    model.match = lambda *_: Match([], [], host_map, torch.zeros(len(host_map)).long())


def test_the_distance_is_euclidean_and_the_map_bilinear(pyramid: FrozenEncoder) -> None:
    model = small(pyramid)
    image = images(2, (96, 160))
    with torch.no_grad():
        match = model.match(image, torch.zeros(2).long())
        prediction = model.predict(image, torch.zeros(2).long())
    query, template = match.query[0].double(), match.template[0][:, 0].double()
    distance = (query - template).square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(match.host_map.double(), distance, rtol=1e-5, atol=0)
    full = F.interpolate(distance, (96, 160), mode="bilinear", align_corners=True)
    torch.testing.assert_close(prediction.anomaly_map.double(), full, rtol=1e-5, atol=0)
    windows = full.unfold(2, 16, 1).unfold(3, 16, 1).mean(dim=(-2, -1))
    score = windows.amax(dim=(1, 2, 3))
    torch.testing.assert_close(prediction.image_score.double(), score, rtol=1e-5, atol=0)


def test_the_score_does_not_depend_on_the_maps_size(pyramid: FrozenEncoder) -> None:
    model = small(pyramid)
    with torch.no_grad():
        scores = [
            model.predict(images(), torch.zeros(2).long(), map_size=size).image_score
            for size in (None, (256, 256), (20, 30))
        ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_one_bright_position_makes_the_score(pyramid: FrozenEncoder) -> None:
    model = small(pyramid)
    host_map = torch.ones(1, 1, 6, 6)
    host_map[..., 3, 2] = 11
    matched(model, host_map)
    prediction = model.predict(torch.zeros(1, 3, 96, 96))
    # A tent of height 10 and half-width 19 pixels on a floor of 1, averaged over 16 x 16.
    offsets = torch.arange(96, dtype=torch.float64)
    tents = [(1 - (offsets - 19 * place).abs() / 19).clamp(min=0) for place in (3, 2)]
    means = [tent.unfold(0, 16, 1).mean(dim=1).max() for tent in tents]
    assert prediction.image_score.item() == pytest.approx(1 + 10 * float(means[0] * means[1]))
    ignore = torch.zeros(1, 1, 96, 96, dtype=torch.bool)
    ignore[..., 36:78, 17:59] = True
    hidden = model.predict(torch.zeros(1, 3, 96, 96), ignore=ignore)
    assert hidden.image_score.item() <= 1 and (hidden.anomaly_map[ignore] == 0).all()


def test_half_precision_answers_in_float32(pyramid: FrozenEncoder) -> None:
    model, image = small(pyramid), images()
    model.prepare(training_batches(model, [batch_of(list(image), CATEGORIES)]))
    with torch.inference_mode():
        exact = model.predict(image)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.predict(image)
    assert rough.anomaly_map.dtype == rough.image_score.dtype == torch.float32
    torch.testing.assert_close(rough.anomaly_map, exact.anomaly_map, rtol=0.02, atol=0)
    assert torch.equal(rough.category, exact.category)


# Training


@pytest.fixture(scope="module")
def learned(pyramid: FrozenEncoder) -> tuple[Any, list[float], list[float]]:
    """A model taught for a moment; its losses, and the scores' ratio before."""
    model = small(pyramid, grid=8, layers=1)
    good = [(picture(name, seed), name) for name in CATEGORIES for seed in range(8)]
    (batch,) = training_batches(model, [batch_of(*zip(*good, strict=True))])
    model.prepare([batch])
    before = ratios(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(80):
            optimizer.zero_grad()
            loss = model.training_loss(batch, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model.eval(), losses, before


@torch.no_grad()
def ratios(model: Any) -> list[float]:
    """Per category: the score of a new picture with a defect over that of the same without."""
    out = []
    for category, name in enumerate(CATEGORIES):
        good = picture(name, 99)
        pair = torch.stack([good, with_defect(good, 40, 56)])
        score = model.predict(pair, torch.tensor([category] * 2)).image_score
        out.append(float(score[1] / score[0]))
    return out


def test_learning_helps(learned: tuple[Any, list[float], list[float]]) -> None:
    model, losses, before = learned
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    for first, last in zip(before, ratios(model), strict=True):
        assert last > 2 and last > 1.5 * first


@torch.inference_mode()
def test_a_saved_model_answers_the_same(
    learned: tuple[Any, list[float], list[float]], tmp_path: Path
) -> None:
    model = learned[0]
    write_weights(tmp_path / "weights.safetensors", own_state(model))
    again = UniAD(model.config, model.encoder, CATEGORIES, seed=9).eval()
    load_weights(again, tmp_path / "weights.safetensors")
    image = torch.stack([picture(name, 5) for name in CATEGORIES])
    ours, theirs = again.predict(image), model.predict(image)
    assert torch.equal(ours.anomaly_map, theirs.anomaly_map)
    assert torch.equal(ours.image_score, theirs.image_score)
    assert ours.category.tolist() == theirs.category.tolist() == [0, 1]


def test_recipes() -> None:
    for name, pictures in (("uniad_mvtec_ad", 3629), ("uniad_visa", 8659)):
        recipe = RECIPES[name]
        train = TrainConfig(**recipe.train)
        epochs = train.steps * train.batch_size / pictures
        assert epochs == pytest.approx(1000, rel=0.01)
        assert recipe.levels == (0, 1, 2, 3) and recipe.image_size == 224
        assert train.drops == (0.8,) and train.optimizer == "adamw"
        assert (train.learning_rate, train.weight_decay, train.gradient_clip) == (1e-4, 1e-4, 0.1)
    assert UniADConfig(**RECIPES["uniad"].settings) == UniADConfig()
