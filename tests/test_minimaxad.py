"""MiniMaxAD's parts against the paper's formulas: structure, losses, merging, map, training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from test_minimaxad_golden import official_shapes, part_of
from test_unireplknet import count, noise, shaken
from tiny import CATEGORIES, good_batches, picture, random_encoder, training_batches, with_defect
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from allgood.detectors import minimaxad
from allgood.detectors.minimaxad import (
    Bottleneck,
    Decoder,
    MiniMaxAD,
    MiniMaxADConfig,
    adc_loss,
    coarse_distance,
    local_hm_loss,
)
from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import TiledEncoder
from allgood.encoders.unireplknet import MergedBlock, merge
from allgood.layers.cosine import reverse_distillation_loss
from allgood.official.minimaxad import from_official
from allgood.own_state import own_state
from allgood.recipes import RECIPES, configured
from allgood.training.config import TrainConfig
from allgood.types import InputError, TrainingBatch

WIDTHS, DEPTHS = (80, 160, 320), (2, 2, 8)


@pytest.fixture(scope="module")
def pyramid() -> FrozenEncoder:
    """Three levels of stride 4, 8 and 16; 24, 32 and 48 channels."""
    return random_encoder("test_efficientnet", (1, 2, 3))


def small(encoder: FrozenEncoder, seed: int = 0, **settings: Any) -> Any:
    settings = {"depths": (1, 1, 1), **settings}
    return MiniMaxAD(MiniMaxADConfig(**settings), encoder, CATEGORIES, seed=seed).eval()


def taught(model: Any) -> Any:
    """With weights and statistics of which every one does something."""
    shaken(model.bottleneck)
    shaken(model.decoder)
    return model


def images(count: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def training_batch(levels: tuple[Tensor, ...]) -> TrainingBatch:
    index = torch.arange(len(levels[0]))
    return TrainingBatch(levels, torch.zeros_like(index), index)


# Structure


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        bottleneck, decoder = Bottleneck(WIDTHS), Decoder(WIDTHS, DEPTHS)
    assert count(bottleneck) == 13_566_080 and count(decoder) == 9_452_600  # 23,018,680 trained
    merge(bottleneck)
    merge(decoder)
    # The three norms of the bottleneck leave a bias each.
    assert count(bottleneck) == 13_557_120 - (160 + 320 + 320)
    assert count(decoder) == 9_105_880
    # The paper's 33.1 M count those norms in full, and 1,847,520 that nothing reads.
    encoder = 8_637_240
    ours = encoder + count(bottleneck) + count(decoder)
    assert ours + 160 + 320 + 320 + 1_847_520 == 33_147_760


@pytest.mark.parametrize(
    "side, plain, merged", [(256, (1.128, 2.946), (1.128, 2.846)), (224, (0.864, 2.255), None)]
)
def test_multiplications(side: int, plain: Any, merged: Any) -> None:
    with torch.device("meta"):
        parts = [Bottleneck(WIDTHS).eval(), Decoder(WIDTHS, DEPTHS).eval()]
        levels = [
            torch.empty(1, width, side // 4 // 2**i, side // 4 // 2**i)
            for i, width in enumerate(WIDTHS)
        ]
    for form in (plain, merged or (0.864, 2.179)):
        x: Any = levels
        for part, expected in zip(parts, form, strict=True):
            with FlopCounterMode(display=False) as counter:
                x = part(x)
            assert counter.get_total_flops() / 2e9 == pytest.approx(expected, abs=6e-4)
            merge(part)
        assert [level.shape for level in x] == [level.shape for level in levels]


def test_levels_are_normalised_and_what_is_rebuilt_is_not(pyramid: FrozenEncoder) -> None:
    model = taught(small(pyramid))
    levels = model.encode(images())
    assert [tuple(level.shape) for level in levels] == [
        (2, 24, 16, 24),
        (2, 32, 8, 12),
        (2, 48, 4, 6),
    ]
    for level, raw in zip(levels, pyramid(images()), strict=True):
        centred = raw - raw.mean(dim=1, keepdim=True)
        expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
        assert not level.requires_grad
    rebuilt = model.decode(levels)
    assert [level.shape for level in rebuilt] == [level.shape for level in levels]
    assert all(level.mean(dim=1).abs().max() > 0.1 for level in rebuilt)


@pytest.mark.parametrize("size", [(64, 80), (112, 64)])
def test_sizes_that_the_decoder_could_not_meet(
    pyramid: FrozenEncoder, size: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match=r"sides are multiples of 32, got .* --image-size"):
        small(pyramid).predict(images(size=size))


def test_encoders_that_it_cannot_read(tiny_encoder: FrozenEncoder, pyramid: FrozenEncoder) -> None:
    for encoder in (tiny_encoder, random_encoder("test_vit", (0, 1, 2))):
        with pytest.raises(InputError, match="reads three levels, each of twice the stride"):
            small(encoder)
    with pytest.raises(InputError, match="leave out --tile"):
        small(TiledEncoder(pyramid, 96))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"p_hard": 0.0}, r"p_hard must be in \(0, 1\], got 0.0"),
        ({"p_lim": 1.5}, r"p_lim must be in \(0, 1\]"),
        ({"depths": (2, 2)}, "depths must be three numbers of at least 1"),
        ({"depths": (2, 0, 8)}, "depths must be three numbers of at least 1"),
        ({"top_fraction": -0.1}, r"top_fraction must be in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MiniMaxADConfig(**settings)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    bottleneck, decoder = Bottleneck((16, 32, 64)), Decoder((16, 32, 64), (1, 1, 1))
    before = {name: p.clone() for name, p in decoder.upsample.named_parameters()}
    for part in (bottleneck, decoder):
        part.apply(minimaxad._initialise)
    for module in [*bottleneck.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv2d):
            size = module.kernel_size[0]
            expected = (2 / (module.out_channels * size * size)) ** 0.5
            tolerance = 4 / module.weight.numel() ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)
    for name, p in decoder.upsample.named_parameters():
        assert torch.equal(p, before[name])
    block = decoder.stages[2][0]
    assert torch.equal(block.layer_scale, torch.full((64,), 1e-6))
    assert not block.grn_scale.any() and not block.grn_shift.any()


def test_weights_follow_from_the_seed_alone(pyramid: FrozenEncoder) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(pyramid, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = small(pyramid, seed=5).state_dict(), small(pyramid, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["bottleneck.fuse.weight"], other["bottleneck.fuse.weight"])


# Losses


def plain_adc(s: Tensor, p_hard: float, p_lim: float) -> tuple[Tensor, str, int]:
    """Eq. 7 as it is written, of maps of the image's size: value, branch, number kept."""
    flat = s.flatten()
    squares = flat**2
    variance = flat.detach().var()
    threshold = torch.quantile(flat.detach(), p_hard) - variance
    branch = "alpha"
    if (squares >= threshold).sum() < (1 - p_lim) * len(flat):
        threshold, branch = torch.quantile(squares.detach(), p_lim) - variance, "beta"
    kept = squares[squares >= threshold]
    return kept.mean(), branch, len(kept)


@pytest.mark.parametrize(
    "s, branch, kept, adc, local_hm",
    [
        (torch.linspace(0, 2, 10_000, dtype=torch.float64), "alpha", 3546, 2.74947567, 3.99840008),
        (torch.linspace(0, 0.5, 10_000, dtype=torch.float64), "beta", 432, 0.23937893, 0.24990001),
        (
            torch.cat([torch.full((9990,), 0.05), torch.linspace(0.2, 0.6, 10)]).double(),
            "beta",
            6,
            0.24477368,
            None,
        ),
    ],
)
def test_adc_of_worked_examples(
    s: Tensor, branch: str, kept: int, adc: float, local_hm: float | None
) -> None:
    s = s.view(1, 100, 100)
    assert plain_adc(s, 0.9999, 0.9995)[1:] == (branch, kept)
    assert adc_loss(s, 1, 0.9999, 0.9995).item() == pytest.approx(adc, abs=1e-8)
    if local_hm is not None:
        assert local_hm_loss(s, 1, 0.9995).item() == pytest.approx(local_hm, abs=1e-8)


@pytest.mark.parametrize("p_hard, p_lim", [(0.9999, 0.9995), (1.0, 0.999), (0.9995, 0.99)])
@pytest.mark.parametrize("size, branch", [(2.0, "alpha"), (0.1, "beta")])
def test_coarse_losses_are_those_of_the_whole_map(
    p_hard: float, p_lim: float, size: float, branch: str
) -> None:
    for seed in range(3):
        s = (size * noise(3, 16, 24, seed=seed).abs()).double().requires_grad_()
        whole = F.interpolate(s.unsqueeze(1), scale_factor=4).squeeze(1)
        value, taken, _ = plain_adc(whole, p_hard, p_lim)
        assert taken == branch
        (expected,) = torch.autograd.grad(value, s, retain_graph=True)
        ours = adc_loss(s, 16, p_hard, p_lim)
        (gradient,) = torch.autograd.grad(ours, s)
        assert ours.item() == pytest.approx(value.item(), rel=1e-12)
        torch.testing.assert_close(gradient, expected)

        squares = whole.detach().flatten() ** 2
        kept = squares[squares >= torch.quantile(squares, p_lim)]
        hard = local_hm_loss(s, 16, p_lim)
        assert hard.item() == pytest.approx(kept.mean().item(), rel=1e-12)


@pytest.mark.parametrize("size", [2.0, 0.3])
def test_processes_agree_on_one_threshold(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of their losses and gradients is that of all pictures together."""
    s = (size * noise(4, 8, 8).abs()).double().requires_grad_()
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda s: adc_loss(s, 16, 0.9999, 0.99),
        lambda s: local_hm_loss(s, 16, 0.99),
    ]
    for loss in losses:
        monkeypatch.undo()
        (expected,) = torch.autograd.grad(loss(s), s)
        whole = loss(s).item()
        monkeypatch.setattr(minimaxad, "of_all_processes", lambda _: s.detach())
        halves = [loss(half) for half in s.split(2)]
        assert torch.stack(halves).mean().item() == pytest.approx(whole)
        (gradient,) = torch.autograd.grad(torch.stack(halves).mean(), s)
        torch.testing.assert_close(gradient, expected)


def test_no_loss_waits_for_the_device_or_breaks_a_graph() -> None:
    with torch.device("meta"):  # a number asked of it would be an error
        s = torch.empty(2, 64, 64)
    assert adc_loss(s, 16, 0.9999, 0.9995).shape == local_hm_loss(s, 16, 0.9995).shape == ()
    compiled = torch.compile(adc_loss, fullgraph=True, backend="eager")
    real = noise(2, 16, 16).abs()
    expected = adc_loss(real, 16, 0.9999, 0.9995)
    torch.testing.assert_close(compiled(real, 16, 0.9999, 0.9995), expected)


def levels_of(seed: int) -> list[Tensor]:
    shapes = ((2, 6, 8, 12), (2, 8, 4, 6), (2, 10, 2, 3))
    return [noise(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def test_distances_are_added_on_the_finest_grid() -> None:
    targets, rebuilt = levels_of(0), levels_of(10)
    expected = torch.zeros(2, 8, 12).double()
    for target, level in zip(targets, rebuilt, strict=True):
        e, d = target.double(), level.double()
        distance = 1 - (e * d).sum(1) / (e.norm(dim=1) * d.norm(dim=1))
        factor = 8 // distance.shape[1]
        expected += distance.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    ours = coarse_distance(targets, rebuilt)
    torch.testing.assert_close(ours, expected.float())


def test_only_the_chosen_positions_learn_and_on_all_levels() -> None:
    targets = [level.requires_grad_() for level in levels_of(0)]
    rebuilt = [t.detach() + 0.05 * n for t, n in zip(targets, levels_of(10), strict=True)]
    rebuilt[0][1, :, 5, 7] = -targets[0].detach()[1, :, 5, 7]  # one bad position
    rebuilt = [level.requires_grad_() for level in rebuilt]
    adc_loss(coarse_distance(targets, rebuilt), 16, 0.9999, 0.9995).backward()
    assert all(target.grad is None for target in targets)
    for i, level in enumerate(rebuilt):
        assert level.grad is not None
        touched = level.grad.abs().sum(dim=1).nonzero().tolist()
        assert touched == [[1, 5 // 2**i, 7 // 2**i]]


def test_each_setting_trains_with_its_loss(pyramid: FrozenEncoder) -> None:
    model = small(pyramid)
    levels = model.encode(images())
    # Near enough that not every position passes the threshold.
    rebuilt = [level + 0.5 * noise(*level.shape, seed=i) for i, level in enumerate(levels)]
    model.decode = lambda asked: rebuilt if asked is levels else None
    s = coarse_distance(levels, rebuilt)
    flat = [
        1 - F.cosine_similarity(e.double().flatten(1), d.double().flatten(1)).mean()
        for e, d in zip(levels, rebuilt, strict=True)
    ]
    expected = {
        "adc": adc_loss(s, 16, 0.9, 0.8),
        "global": reverse_distillation_loss(levels, rebuilt),
        "local": s.square().mean(),
        "local_hm": local_hm_loss(s, 16, 0.8),
    }
    assert expected["global"].item() == pytest.approx(sum(flat).item(), rel=1e-5)
    for loss, value in expected.items():
        model.config = MiniMaxADConfig(loss=loss, p_hard=0.9, p_lim=0.8)  # type: ignore[arg-type]
        torch.testing.assert_close(model.training_loss(training_batch(levels), 0), value)
    assert len({round(value.item(), 4) for value in expected.values()}) == 4


# Merging


@torch.no_grad()
def test_inference_is_merged_and_what_is_saved_is_not(pyramid: FrozenEncoder) -> None:
    model = taught(small(pyramid))
    image = images()
    names = set(own_state(model))
    levels = model.encode(image)
    match = model.match(image, torch.zeros(2).long())
    for template, expected in zip(match.template, model.decode(levels), strict=True):
        error = (template[:, 0] - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()
    merged = [part._made for part in model._merged]
    blocks = [m for part in merged for m in part.modules() if isinstance(m, MergedBlock)]
    assert len(blocks) == 2 + 3
    assert set(own_state(model)) == names
    assert not any(isinstance(module, MergedBlock) for module in model.modules())
    model.train()
    assert not pyramid.training


@torch.no_grad()
def test_merged_weights_are_never_older_than_the_model(pyramid: FrozenEncoder) -> None:
    model, other = taught(small(pyramid)), small(pyramid, seed=1)
    image, category = images(), torch.zeros(2).long()
    first = model.predict(image, category).anomaly_map
    model.load_state_dict(other.state_dict())
    assert torch.equal(
        model.predict(image, category).anomaly_map, other.predict(image, category).anomaly_map
    )
    assert not torch.allclose(model.predict(image, category).anomaly_map, first, atol=1e-3)
    model.train()
    batch = training_batch(model.encode(image))
    with torch.enable_grad():
        model.training_loss(batch, 0).backward()
    for parameter in model.bottleneck.parameters():
        parameter -= 0.1 * parameter.grad
    model.eval()
    rebuilt = [template[:, 0] for template in model.match(image, category).template]
    for ours, expected in zip(rebuilt, model.decode(batch.features), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# Map and score


@torch.no_grad()
def test_map_and_score(pyramid: FrozenEncoder) -> None:
    model = taught(small(pyramid))
    image, category = images(size=(96, 160)), torch.zeros(2).long()
    match = model.match(image, category)
    expected = torch.zeros(2, 1, 96, 160).double()
    for query, template in zip(match.query, match.template, strict=True):
        e, d = query.double(), template[:, 0].double()
        distance = 1 - (e * d).sum(1, keepdim=True) / (e.norm(dim=1) * d.norm(dim=1)).unsqueeze(1)
        expected += F.interpolate(distance, (96, 160), mode="bilinear", align_corners=True) / 3
    torch.testing.assert_close(match.host_map, expected.float(), rtol=1e-4, atol=1e-5)

    line = torch.exp(-0.5 * (torch.arange(-2, 3).double() / 4) ** 2)
    square = (line[:, None] * line) / line.sum() ** 2
    narrow = F.conv2d(expected, square.view(1, 1, 5, 5), padding=2)
    prediction = model.predict(image, category)
    torch.testing.assert_close(prediction.anomaly_map, narrow.float(), rtol=1e-4, atol=1e-5)
    top = narrow.flatten(1).sort(descending=True).values[:, : int(0.01 * 96 * 160)].mean(dim=1)
    torch.testing.assert_close(prediction.image_score, top.float(), rtol=1e-4, atol=1e-5)

    model.config = replace(model.config, smoothing="wide", top_fraction=0.0)
    prediction = model.predict(image, category)
    for i in range(2):
        wide = ndimage.gaussian_filter(expected[i, 0].numpy(), sigma=4)
        torch.testing.assert_close(
            prediction.anomaly_map[i, 0].double(), torch.from_numpy(wide), rtol=1e-4, atol=1e-5
        )
        assert prediction.image_score[i] == prediction.anomaly_map[i].max()


@torch.no_grad()
def test_another_map_size_has_the_same_score(pyramid: FrozenEncoder) -> None:
    model = taught(small(pyramid))
    image, category = images(), torch.zeros(2).long()
    whole, half = (model.predict(image, category, map_size=s) for s in (None, (32, 48)))
    assert half.anomaly_map.shape == (2, 1, 32, 48)
    assert torch.equal(whole.image_score, half.image_score)


# Training


@pytest.mark.parametrize("loss", ["adc", "global", "local", "local_hm"])
def test_it_learns_to_rebuild_the_good(loss: str, pyramid: FrozenEncoder) -> None:
    """From seed to seed alike; defects stand out afterwards, and better than before."""
    results = []
    good = torch.stack([picture(name, 50, (64, 64)) for name in CATEGORIES])
    bad = torch.stack([with_defect(image, 20, 24, 16) for image in good])
    steps = 12 if loss == "adc" else 8
    share = {"p_lim": 0.9} if loss == "local_hm" else {}  # of small maps 0.9995 is one pixel
    for _ in range(2 if loss == "adc" else 1):
        model: Any = small(pyramid, loss=loss, **share).train()
        batches = training_batches(model, good_batches(size=(64, 64)))
        model.eval()
        model.prepare(batches)
        with torch.no_grad():
            before = model.predict(bad).image_score / model.predict(good).image_score
        model.train()
        statistics = {name: b.clone() for name, b in pyramid.named_buffers()}
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert len(parameters) == len([*model.bottleneck.parameters(), *model.decoder.parameters()])
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        values = []
        for step in range(steps):
            optimizer.zero_grad()
            value = torch.stack([model.training_loss(batch, step) for batch in batches]).mean()
            value.backward()
            optimizer.step()
            values.append(value.item())
        model.eval()
        with torch.no_grad():
            after = model.predict(bad).image_score / model.predict(good).image_score
        assert values[-1] < 0.75 * values[0]
        assert (after > 1.1).all() and (after > before).all()
        assert all(torch.equal(b, statistics[name]) for name, b in pyramid.named_buffers())
        results.append(values)
    assert all(values == results[0] for values in results)


# Official checkpoints and recipes


def official_content() -> dict[str, dict[str, Tensor]]:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in official_shapes().items()}
    return {part: part_of(state, part) for part in ("bn", "decoder")}


def test_official_names_are_all_of_ours() -> None:
    official = from_official(official_content())
    with torch.device("meta"):
        parts = {"bottleneck": Bottleneck(WIDTHS), "decoder": Decoder(WIDTHS, DEPTHS)}
    own = {f"{part}.{k}": v.shape for part in parts for k, v in parts[part].state_dict().items()}
    assert {name: tensor.shape for name, tensor in official.weights.items()} == own
    assert official.config == MiniMaxADConfig() and official.image_size == 256
    assert official.encoder.name == "unireplknet_n" and official.encoder_weights is None


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: {"decoder": c["decoder"]}, "it lacks 'bn' and 'decoder'"),
        (lambda c: {**c, "encoder": {}}, "'encoder' is no part of an official MiniMaxAD"),
        (lambda c: {**c, "bn": {"conv5.weight": torch.ones(1)}}, "'conv5.weight' is no part of"),
        (
            lambda c: {**c, "decoder": {"head.weight": torch.ones(1)}},
            "'head.weight' is no part of MiniMaxAD's decoder",
        ),
        (
            lambda c: {**c, "bn": {"stages.0.0.dwconv.bias": torch.ones(1)}},
            "merged for inference, which cannot be undone",
        ),
        (
            lambda c: {**c, "decoder": {"stages.1.0.dwconv.lk_origin.bias": torch.ones(1)}},
            "merged for inference, which cannot be undone",
        ),
        (lambda c: {**c, "bn": [1]}, "holds more than named tensors"),
    ],
)
def test_checkpoints_that_are_not_understood(change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_official(change(official_content()))


def test_recipes_are_the_papers() -> None:
    ours = {name: recipe for name, recipe in RECIPES.items() if recipe.detector == "minimaxad"}
    for name, recipe in ours.items():
        config = configured(MiniMaxADConfig, recipe.settings, [])
        train = configured(TrainConfig, recipe.train, [])
        assert (train.optimizer, train.schedule, train.batch_size) == ("adamw", "exponential", 16)
        assert (config.loss == "global") == (
            name in ("minimaxad_fp", "minimaxad_visa_separate", "minimaxad_aebad_s_separate")
        )
    ours = {name.removeprefix("minimaxad_"): recipe for name, recipe in ours.items()}
    steps = {name: recipe.train["steps"] for name, recipe in ours.items()}
    rate = {name: round(r.train["final_learning_rate"], 5) for name, r in ours.items()}
    assert steps["mvtec_ad"] == 160 * 226 and rate["mvtec_ad"] == 0.00224
    assert steps["visa"] == 160 * 541 and rate["visa_separate"] == 0.00236
    assert steps["real_iad"] == 2279 and rate["real_iad_separate"] == 0.00389
    assert steps["goodsad_separate"] == 7920 and rate["goodsad_separate"] == 0.0015
    assert steps["aebad_s_separate"] == 130 * 33 and rate["aebad_s_separate"] == 0.00261
    assert rate["aebad_s_mvtec"] == 0.00452
