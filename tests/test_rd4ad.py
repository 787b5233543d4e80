"""RD4AD's parts against the paper: structure, folding, loss, map, training, official files."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from test_rd4ad_golden import (
    CHANNELS,
    GivenLevels,
    decoder_shapes,
    embedding_shapes,
    norm_shapes,
)
from tiny import CATEGORIES, batch_of, picture, random_encoder, training_batches, with_defect
from torch import Tensor, nn

from allgood.detectors.rd4ad import (
    RD4AD,
    ConvNorm,
    Decoder,
    OneClassEmbedding,
    RD4ADConfig,
)
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.encoders.tiled import TiledEncoder
from allgood.layers.cosine import cosine_distance, reverse_distillation_loss
from allgood.official.rd4ad import from_official
from allgood.recipes import RECIPES, configured
from allgood.training.config import TrainConfig
from allgood.types import InputError, Match, TrainingBatch


@pytest.fixture(scope="module")
def resnet() -> FrozenEncoder:
    """Three levels of 32, 48 and 192 channels behind ReLUs."""
    return random_encoder("test_resnet", (1, 2, 3))


def small(encoder: Any = None, seed: int = 0, **settings: Any) -> Any:
    """Narrow, on levels of ones."""
    return RD4AD(RD4ADConfig(**settings), encoder or GivenLevels((4, 6, 8)), CATEGORIES, seed=seed)


def images(count: int = 2, size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=generator)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_statistics(model: nn.Module, seed: int = 0) -> Any:
    """Norms that a training could have left."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not any(
            module is inner for inner in getattr(model, "encoder", nn.Module()).modules()
        ):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return model


# Structure


def test_number_of_parameters() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    with torch.device("meta"):
        assert count(OneClassEmbedding(CHANNELS, 0.5)) == 58_885_120
        assert count(OneClassEmbedding(CHANNELS, 0.25)) == 30_829_568
        assert count(Decoder(CHANNELS, rectified=True)) == 24_917_504
        backbone: Any = timm.create_model("wide_resnet50_2", num_classes=0)
    backbone.prune_intermediate_layers([1, 2, 3], prune_norm=True, prune_head=True)
    assert count(backbone) == 24_862_528


@pytest.mark.parametrize("side", [64, 96])
def test_shapes(side: int) -> None:
    model = small()
    levels = model.encode(torch.zeros(2, 3, side, side + 32))
    embedded = model.bottleneck.eval()(levels)
    assert embedded.shape == (2, 16, side // 32, side // 32 + 1)
    for level, rebuilt in zip(levels, model.eval().decode(levels), strict=True):
        assert rebuilt.shape == level.shape
    assert [len(stage) for stage in model.decoder.stages] == [3, 4, 6]


def test_levels_are_those_behind_the_last_relu() -> None:
    """timm's levels 1, 2, 3 are what layer1, layer2 and layer3 put out."""
    encoder = random_encoder("wide_resnet50_2.tv_in1k", (1, 2, 3))
    assert encoder.channels == CHANNELS and encoder.strides == (4, 8, 16)
    assert not list(encoder.backbone.layer4.parameters())  # never run
    seen = []
    for name in ("layer1", "layer2", "layer3"):
        stage = getattr(encoder.backbone, name)
        stage.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    levels = encoder(images(1))
    for level, output in zip(levels, seen, strict=True):
        assert torch.equal(level, output) and level.min() == 0 < level.max()


@pytest.mark.parametrize("name, rectified", [("test_resnet", True), ("test_efficientnet", False)])
def test_what_is_rebuilt_has_the_sign_of_the_levels(name: str, rectified: bool) -> None:
    encoder = random_encoder(name, (1, 2, 3))
    model = small(encoder).eval()
    for level, rebuilt in zip(encoder(images()), model.decode(encoder(images())), strict=True):
        assert (level.min() >= 0) == (rebuilt.min() >= 0) == rectified


def test_initial_weights() -> None:
    model = small(GivenLevels((16, 32, 64)))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            spread = module.weight.double().std().item()
            assert spread == pytest.approx((2 / fan_out) ** 0.5, rel=0.25), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, nn.ConvTranspose2d):
            bound = (module.out_channels * 4) ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.bias is None


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = small(seed=5).state_dict(), small(seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "decoder.stages.0.0.conv1.conv.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bottleneck_width": 0.0}, r"bottleneck_width must be in \(0, 1\], got 0.0"),
        ({"bottleneck_width": float("nan")}, r"bottleneck_width must be in \(0, 1\]"),
        ({"sigma": -1.0}, "sigma must be at least 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RD4ADConfig(**settings)


@pytest.mark.parametrize("name, levels", [("test_resnet", (1, 2)), ("test_vit", (0, 1, 2))])
def test_encoders_without_three_halvings_are_refused(name: str, levels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="with --levels 1,2,3"):
        small(random_encoder(name, levels))


def test_sides_that_cannot_be_halved_five_times() -> None:
    model = small().eval()
    with pytest.raises(InputError, match=r"multiples of 32, got 64 x 80: .* --image-size"):
        model.predict(torch.zeros(1, 3, 64, 80))
    deeper = GivenLevels((4, 6, 8))
    deeper.strides = (8, 16, 32)
    with pytest.raises(InputError, match="multiples of 64"):
        small(deeper).encode(torch.zeros(1, 3, 96, 96))


def test_tiles(resnet: FrozenEncoder) -> None:
    model = small(TiledEncoder(resnet, 96)).eval()
    prediction = model.predict(images(1, (128, 96)), torch.tensor([0]))
    assert prediction.anomaly_map.shape == (1, 1, 128, 96)


# Folding


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 8, 3, 2, padding=1, bias=False),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.ConvTranspose2d(6, 8, 2, 2, bias=False),
    ],
)
def test_one_convolution_instead_of_two_steps(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    folded = with_statistics(ConvNorm(conv)).eval()
    x = noise(2, 6, 8, 8)
    expected = folded.norm(folded.conv(x)).detach()
    assert torch.equal(folded(x).detach(), expected)  # it could be taught
    with torch.no_grad():
        assert (folded(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert not torch.equal(folded(x), expected)  # it took the other way


@torch.no_grad()
def test_the_folded_network_is_the_network(resnet: FrozenEncoder) -> None:
    model = with_statistics(small(resnet)).eval()
    levels = model.encode(images())
    with torch.enable_grad():
        unfolded = [level.detach() for level in model.decode(levels)]
    for folded, level in zip(model.decode(levels), unfolded, strict=True):
        assert (folded - level).abs().max() < 1e-5 * level.abs().max()


@torch.no_grad()
def test_folded_weights_are_not_kept_when_the_weights_change() -> None:
    layer = with_statistics(ConvNorm(nn.Conv2d(3, 4, 1, bias=False))).eval()
    x = noise(1, 3, 4, 4)
    other = {name: tensor * 2 for name, tensor in layer.state_dict().items()}
    before = layer(x)
    assert not any("folded" in name for name in layer.state_dict())
    layer.load_state_dict(other)
    after = layer(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, layer.norm(layer.conv(x)))
    assert layer.double()(x.double()).dtype == torch.float64
    layer.train()(x.double())  # moves the statistics
    layer.eval()
    torch.testing.assert_close(layer(x.double()), layer.norm(layer.conv(x.double())))


# Loss


def test_the_loss_is_the_plain_formula() -> None:
    targets = [noise(3, c, 4, 4, seed=c).abs() for c in (5, 7, 9)]
    rebuilt = [noise(3, c, 4, 4, seed=10 + c).abs().requires_grad_() for c in (5, 7, 9)]
    expected = 0.0
    for e, d in zip(targets, rebuilt, strict=True):
        for one, other in zip(e.double(), d.double().detach(), strict=True):
            cosine = (one * other).sum() / (one.square().sum() * other.square().sum()).sqrt()
            expected += (1 - cosine.item()) / 3
    loss = reverse_distillation_loss(targets, rebuilt)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    per_position = sum(
        (1 - F.cosine_similarity(e, d)).mean().item() for e, d in zip(targets, rebuilt, strict=True)
    )
    assert abs(per_position - expected) > 1e-3  # another method


def test_loss_of_equal_and_of_orthogonal_features() -> None:
    levels = [noise(2, 4, s, s, seed=s).abs() for s in (8, 4, 2)]
    assert reverse_distillation_loss(levels, levels).item() == pytest.approx(0, abs=1e-6)
    left, right = [level.clone() for level in levels], [level.clone() for level in levels]
    for a, b in zip(left, right, strict=True):
        a[:, :2], b[:, 2:] = 0, 0
    assert reverse_distillation_loss(left, right).item() == pytest.approx(3, abs=1e-6)
    assert reverse_distillation_loss(levels, [-x for x in levels]).item() == pytest.approx(6)
    zero = [torch.zeros_like(x).requires_grad_() for x in levels]
    loss = reverse_distillation_loss(levels, zero)
    loss.backward()
    assert loss.item() == 3 and all(x.grad is not None and x.grad.isfinite().all() for x in zero)


def test_distance_in_half_precision() -> None:
    a, b = noise(2, 1000, seed=1).abs(), noise(2, 1000, seed=2).abs()
    expected = cosine_distance(a.half().float(), b.half().float())
    assert torch.equal(cosine_distance(a.half(), b.half()), expected)


# Map and score


def test_the_map_is_the_plain_formula() -> None:
    model = small(sigma=4.0)
    host_map = noise(2, 1, 64, 96).abs()
    found = model.anomaly_map(host_map, (64, 96))
    for ours, plain in zip(found, host_map, strict=True):
        expected = gaussian_filter(plain[0].double().numpy(), sigma=4)
        assert np.abs(ours[0].numpy() - expected).max() < 1e-5


def test_the_score_is_the_largest_smoothed_value() -> None:
    model = small().eval()
    host_map = noise(2, 1, 64, 64).abs()
    match = Match([], [], host_map, torch.zeros(2, dtype=torch.int64))
    model.match = lambda *_: match
    smoothed = model.anomaly_map(host_map, (64, 64))
    for size in (None, (64, 64), (32, 48)):  # the map's size does not matter
        prediction = model.predict(images(), map_size=size)
        assert torch.equal(prediction.image_score, smoothed.amax(dim=(1, 2, 3)))
        assert prediction.anomaly_map.shape[-2:] == (size or (64, 64))


@torch.no_grad()
def test_equal_features_make_no_distance() -> None:
    model = small().eval()
    model.decode = lambda levels: list(levels)
    prediction = model.predict(images(), torch.tensor([0, 1]))
    assert prediction.anomaly_map.abs().max() < 1e-6


# Training


def training_batch(model: Any, image: Tensor) -> TrainingBatch:
    return TrainingBatch(
        model.encode(image), torch.zeros(len(image), dtype=torch.int64), torch.arange(len(image))
    )


def test_the_encoder_stays_as_it_is(resnet: FrozenEncoder) -> None:
    model = small(resnet).train()
    before = {name: t.clone() for name, t in model.encoder.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.005, betas=(0.5, 0.999))
    model.training_loss(training_batch(model, images()), 0).backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable)
    optimizer.step()
    model.encode(images(seed=1))
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any("encoder" in n for n, p in model.named_parameters() if p.requires_grad)


def test_training_tells_anomalies_from_normals() -> None:
    """Both categories by one model, with the recipe's optimiser."""
    size = (64, 64)
    model = small(random_encoder("test_efficientnet", (1, 2, 3)), seed=3)
    pictures = [(picture(name, i, size), name) for name in CATEGORIES for i in range(8)]
    good = torch.stack([picture(name, 100 + i, size) for name in CATEGORIES for i in range(4)])
    bad = torch.stack([with_defect(image, 20, 28, 16) for image in good])

    def gap() -> tuple[float, float]:
        """Worst good and weakest bad score, relative to the good ones' mean."""
        category = torch.tensor([0] * 4 + [1] * 4)
        with torch.no_grad():
            scores = [model.eval().predict(x, category).image_score for x in (good, bad)]
        mean = scores[0].mean()
        return (scores[0].max() / mean).item(), (scores[1].min() / mean).item()

    batch = training_batches(model, [batch_of(*zip(*pictures, strict=True))])[0]
    model.prepare([batch])
    at_first = gap()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.005, betas=(0.5, 0.999))
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = model.training_loss(batch, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    highest_good, lowest_bad = gap()
    assert lowest_bad > 1.2 * highest_good
    assert lowest_bad > 1.2 * at_first[1]
    assert model.predict(good).category.tolist() == [0] * 4 + [1] * 4


# Recipes and official files


def test_recipes() -> None:
    for name, recipe in RECIPES.items():
        if recipe.detector != "rd4ad":
            continue
        train = TrainConfig(**recipe.train)
        assert (train.optimizer, train.beta1, train.beta2) == ("adam", 0.5, 0.999)
        assert train.learning_rate == train.final_learning_rate == 0.005  # constant
        assert (train.warmup_steps, train.weight_decay, train.gradient_clip) == (0, 0, 0)
        assert (train.batch_size, recipe.image_size, recipe.levels) == (16, 256, (1, 2, 3))
        config = configured(RD4ADConfig, recipe.settings, ["sigma=2"])
        assert config.bottleneck_width == (0.5 if name == "rd4ad" else 0.25)
        if name != "rd4ad":
            assert recipe.encoder == "wide_resnet50_2.tv_in1k"


def official_file(channels: tuple[int, ...] = (8, 12, 20), inner: int = 20) -> dict[str, Any]:
    parts = {
        "bn": embedding_shapes(channels, inner) | norm_shapes("bn4", 40),
        "decoder": decoder_shapes(channels),
    }
    return {
        part: {name: torch.zeros(shape) for name, shape in shapes.items()}
        for part, shapes in parts.items()
    }


def test_official_files_are_understood_whole() -> None:
    ours = from_official(official_file())
    assert ours.config == RD4ADConfig() and ours.image_size == 256
    assert ours.encoder == EncoderConfig("wide_resnet50_2.tv_in1k", (1, 2, 3))
    assert ours.encoder_weights is None
    file = official_file(inner=10)
    network = {f"mff_oce.{k}": v for k, v in file["bn"].items() if not k.startswith("bn4")}
    network |= {f"net_s.{k}": v for k, v in file["decoder"].items()}
    theirs = from_official({"net": network, "optimizer": {"state": {}}, "epoch": 3})
    assert theirs.config == RD4ADConfig(bottleneck_width=0.25)
    assert theirs.encoder.name == "wide_resnet50_2.racm_in1k"
    assert theirs.weights.keys() == ours.weights.keys()
    model = small(GivenLevels((8, 12, 20)))
    own = {name for name in model.state_dict() if not name.startswith("references.")}
    assert own == ours.weights.keys()


def broken(part: str, name: str) -> dict[str, Any]:
    content = official_file()
    content[part][name] = torch.zeros(1)
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        (broken("bn", "conv5.weight"), "'conv5.weight' is no part of RD4AD's one-class embedding"),
        (broken("bn", "bn_layer.0.conv3.weight"), r"is \(1,\) and should have 4 axes"),
        (broken("bn", "bn_layer.0.conv4.weight"), "'conv4.weight' is no part of a block"),
        (broken("decoder", "layer4.0.conv1.weight"), "is no part of RD4AD's decoder"),
        (broken("decoder", "layer1.0.downsample.0.weight"), "is no part of a block"),
        ({**official_file(), "encoder": {}}, "'encoder' is no part of an official RD4AD"),
        ({"bn": {}, "decoder": {}}, "it lacks 'bn_layer.0.conv1.weight'"),
        ({"net": {"net_x.conv1.weight": torch.zeros(1)}}, "'net_x.conv1.weight' is no part"),
        ({"bn": {"conv1.weight": 3}, "decoder": {}}, "more than named tensors"),
        ({"net_t.conv1.weight": torch.zeros(1)}, "no wide_resnet50_2 of timm: it lacks"),
    ],
)
def test_official_files_that_are_not_understood(content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_official(content)


def test_a_file_with_its_teacher_brings_the_encoder() -> None:
    with torch.device("meta"):
        whole: Any = timm.create_model("wide_resnet50_2", num_classes=0)
    values = {
        f"net_t.{name}": torch.full((), i, dtype=tensor.dtype).expand(tensor.shape)
        for i, (name, tensor) in enumerate(whole.state_dict().items())
        if not name.startswith("layer4")
    }
    file = official_file()
    network = {f"mff_oce.{k}": v for k, v in file["bn"].items() if not k.startswith("bn4")}
    network |= {f"net_s.{k}": v for k, v in file["decoder"].items()}
    official = from_official(network | values)
    assert official.encoder_weights is not None
    whole.load_state_dict(official.encoder_weights, assign=True)  # strictly
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, values.get(f"net_t.{name}", torch.zeros_like(tensor))), name
    with pytest.raises(InputError, match="it has 'layer5'"):
        from_official(network | values | {"net_t.layer5": torch.zeros(1)})
