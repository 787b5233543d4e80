"""HVQ-Trans's parts against the paper's formulas: codebooks, transport, structure, training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from b4 import b4_shapes
from doors import Command, draw_tree
from fill import fill_state
from safetensors.torch import save_file
from test_hvqtrans_golden import Levels, official_shapes
from tiny import CATEGORIES, picture, random_encoder, with_defect
from torch import Tensor

from allgood.detectors.hvqtrans import CategoryLinear, HVQTrans, HVQTransConfig
from allgood.detectors.uniad import UniAD, UniADConfig
from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import TiledEncoder
from allgood.inference import Inspector
from allgood.layers.codebook import Codebooks, nearest_code, transport_cost
from allgood.layers.tokens import align_levels
from allgood.official.efficientnet import ENCODER, from_lukemelas
from allgood.official.hvqtrans import from_official
from allgood.recipes import RECIPES, configured
from allgood.training.config import TrainConfig
from allgood.training.loop import train
from allgood.training.runtime import open_fabric
from allgood.training.sources import OnlineFeatures
from allgood.types import InputError, TrainingBatch

pytest_plugins = ["doors_fixtures"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pyramid() -> FrozenEncoder:
    """Four levels, of stride 2, 4, 8 and 16."""
    return random_encoder("test_efficientnet", (0, 1, 2, 3))


def small(encoder: FrozenEncoder, seed: int = 0, **settings: Any) -> Any:
    sizes = {"grid": 6, "width": 32, "heads": 2, "layers": 2, "codebook_size": 30}
    return HVQTrans(HVQTransConfig(**{**sizes, **settings}), encoder, CATEGORIES, seed=seed).eval()


def good_batch(model: Any, count: int = 4, first: int = 0) -> TrainingBatch:
    """`count` good pictures of each category."""
    image = torch.stack([picture(name, first + i) for name in CATEGORIES for i in range(count)])
    category = torch.arange(len(CATEGORIES)).repeat_interleave(count)
    return TrainingBatch(model.encode(image), category, torch.arange(len(image)))


# Codebooks


def books(count: int = 3, width: int = 5, size: int = 7, seed: int = 0, **settings: Any) -> Any:
    codebooks: Any = Codebooks(count, width, size, **settings)
    codebooks.codes = noise(count, size, width, seed=seed)
    codebooks.sums, codebooks.counts = codebooks.codes.clone(), torch.ones(count, size)
    return codebooks


def slow_update(codes: Tensor, sums: Tensor, counts: Tensor, tokens: Tensor) -> None:
    """One update of one codebook (K, D) by tokens (T, D), in place, number by number."""
    size = len(codes)
    chosen = [int((codes - token).square().sum(dim=1).argmin()) for token in tokens]
    for k in range(size):
        own = [token for token, i in zip(tokens, chosen, strict=True) if i == k]
        counts[k] = 0.99 * counts[k] + 0.01 * len(own)
        sums[k] = 0.99 * sums[k] + 0.01 * sum(own, torch.zeros(tokens.shape[1]).double())
    total = counts.sum().item()
    for k in range(size):
        smooth = (counts[k] + 1e-5) / (total + size * 1e-5) * total
        codes[k] = sums[k] / smooth


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("update", ["batch", "image"])
def test_codes_follow_as_a_slow_loop_says(update: Any, seed: int) -> None:
    codebooks = books(seed=seed, update=update).train()
    codes, sums, counts = (
        getattr(codebooks, name).double().clone() for name in ("codes", "sums", "counts")
    )
    for step in range(5):
        x = noise(4, 6, 5, seed=100 * seed + step)
        which = torch.tensor([[0, 2, 0, 0], [2, 2, 0, 2]][step % 2])
        outputs = []
        if update == "batch":
            for i, tokens in zip(which.tolist(), x.double(), strict=True):
                distance = torch.cdist(tokens, codes[i])
                outputs.append(codes[i, distance.argmin(dim=1)])
            for i in set(which.tolist()):
                slow_update(codes[i], sums[i], counts[i], x[which == i].double().flatten(0, 1))
        else:
            for i, tokens in zip(which.tolist(), x.double(), strict=True):
                distance = torch.cdist(tokens, codes[i])
                outputs.append(codes[i, distance.argmin(dim=1)])
                slow_update(codes[i], sums[i], counts[i], tokens)
        quantised, commitment = codebooks(x, which)
        expected = torch.stack(outputs)
        torch.testing.assert_close(quantised.double(), expected, rtol=1e-4, atol=1e-5)
        squares = (expected - x).square().mean().item()
        assert commitment.item() == pytest.approx(squares, rel=1e-4)
        for name, slow in (("codes", codes), ("sums", sums), ("counts", counts)):
            torch.testing.assert_close(
                getattr(codebooks, name).double(), slow, rtol=1e-4, atol=1e-5
            )
    assert torch.equal(codebooks.counts[1], torch.ones(7))  # no picture of that category


def test_the_two_orders_of_updates_differ() -> None:
    x, which = noise(4, 6, 5), torch.tensor([0, 0, 1, 0])
    batch, image = books(update="batch").train(), books(update="image").train()
    batch(x, which)
    image(x, which)
    assert torch.allclose(batch.codes[1], image.codes[1])
    assert not torch.allclose(batch.codes[0], image.codes[0])


def test_gradients_pass_straight_through_and_reach_no_code() -> None:
    codebooks, which = books().train(), torch.tensor([0, 2])
    x = noise(2, 6, 5, seed=3).requires_grad_()
    codes = codebooks.codes[which]
    index = nearest_code(x.detach(), codes)
    nearest = torch.stack([codes[i, index[i]] for i in range(2)])
    weight = noise(2, 6, 5, seed=4)
    quantised, commitment = codebooks(x, which)
    torch.testing.assert_close(quantised, nearest)
    (quantised * weight).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, weight)  # type: ignore[arg-type]
    x.grad = None
    commitment.backward()
    torch.testing.assert_close(x.grad, 2 * (x - nearest).detach() / x.numel())
    assert not list(codebooks.parameters())
    assert not any(buffer.requires_grad for buffer in codebooks.buffers())


def test_codes_rest_in_evaluation_mode() -> None:
    for start in (books(), Codebooks(3, 5, 7)):
        before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
        start.eval()(noise(2, 6, 5), torch.tensor([0, 1]))
        assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


@pytest.mark.parametrize("update", ["batch", "image"])
def test_the_reference_start_moves_only_what_is_used(update: Any) -> None:
    codebooks = Codebooks(3, 5, 7, update).train()
    before = codebooks.codes.clone()
    codebooks(noise(2, 6, 5), torch.tensor([2, 2]))
    assert torch.equal(codebooks.codes[:2], before[:2])
    # Codes without tokens fly off, as the authors' do: their count is 0 and so divides by 1e-5.
    assert codebooks.codes[2].norm(dim=1).max() > 1e4 and codebooks.codes.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_is_as_image_by_image(training: bool) -> None:
    x, which = noise(5, 6, 5), torch.tensor([0, 2, 1, 0, 2])
    quantised, commitment = books().train(training)(x, which)
    alone = [books().eval()(x[i : i + 1], which[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(quantised, torch.cat([one for one, _ in alone]))
    torch.testing.assert_close(commitment, torch.stack([one for _, one in alone]).mean())
    assert not torch.allclose(quantised, books().eval()(x, which.roll(1))[0])


def test_all_processes_move_the_codes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Category 0 is on one process, 2 on the other, 1 on both."""
    x, which = noise(4, 6, 5), torch.tensor([0, 1, 1, 2])
    together = books().train()
    together(x, which)
    told: list[list[Tensor]] = []

    def record(tensor: Tensor) -> None:
        told[-1].append(tensor.clone())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", record)
    for half in (slice(0, 2), slice(2, 4)):
        told.append([])
        books().train()(x[half], which[half])
    for rank in (0, 1):
        others = iter(told[1 - rank])
        monkeypatch.setattr(dist, "all_reduce", lambda tensor, o=others: tensor.add_(next(o)))
        half, codebooks = slice(2 * rank, 2 * rank + 2), books().train()
        codebooks(x[half], which[half])
        for name, tensor in codebooks.state_dict().items():
            torch.testing.assert_close(tensor, together.state_dict()[name])
    with pytest.raises(InputError, match="train with one process"):
        books(update="image").train()(x, which)


def test_half_precision_does_not_reach_the_codes() -> None:
    x, which = noise(2, 40, 16), torch.tensor([0, 1])
    exact, half = (books(2, 16, 32).train() for _ in range(2))
    quantised, commitment = exact(x, which)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, distance = half(x, which)
    assert theirs.dtype == torch.float32
    assert torch.equal(quantised, theirs) and torch.equal(commitment, distance)
    assert torch.equal(exact.codes, half.codes)


def test_start_takes_tokens_at_equal_distances() -> None:
    codebooks, tokens = Codebooks(2, 3, 4), noise(9, 3)
    before = codebooks.codes[0].clone()
    codebooks.start(1, tokens)
    assert torch.equal(codebooks.codes[1], tokens[[0, 2, 4, 6]])
    assert torch.equal(codebooks.sums[1], codebooks.codes[1])
    assert codebooks.counts.tolist() == [[0] * 4, [1] * 4]
    assert torch.equal(codebooks.codes[0], before)
    codebooks.start(0, tokens[:2])  # too few
    assert torch.equal(codebooks.codes[0], tokens[[0, 0, 1, 1]])


def test_a_start_from_data_keeps_more_codes_alive() -> None:
    """20 clusters, 128 codes, 100 updates."""
    centres = 3 * noise(20, 8)

    def tokens(step: int) -> Tensor:
        which = torch.randint(20, (1, 196), generator=torch.Generator().manual_seed(step))
        return centres[which] + 0.2 * noise(1, 196, 8, seed=1000 + step)

    alive, commitments = [], []
    for from_data in (True, False):
        codebooks, which = Codebooks(1, 8, 128).train(), torch.tensor([0])
        if from_data:
            codebooks.start(0, tokens(-1)[0])
        for step in range(100):
            codebooks(tokens(step), which)
        used = nearest_code(tokens(1000), codebooks.eval().codes)
        alive.append(len(used.unique()))
        commitments.append(codebooks(tokens(1000), which)[1].item())
    assert alive[0] >= 20 and alive[1] <= 10
    assert commitments[0] < 0.1 * commitments[1]


# Transport


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_transport_cost_by_definition(seed: int) -> None:
    x, codes = noise(2, 6, 5, seed=seed), noise(2, 9, 5, seed=50 + seed)
    cost = transport_cost(x, codes)
    assert cost.shape == (2, 6)
    for b in range(2):
        for n in range(6):
            token = x[b, n].double()
            shares = [math.exp(float(token @ e) / 9) for e in codes[b].double()]
            costs = [
                1 - float(token @ e) / float(token.norm() * e.norm()) for e in codes[b].double()
            ]
            slow = sum(p * c for p, c in zip(shares, costs, strict=True)) / sum(shares)
            assert cost[b, n].item() == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e6, 1e12])
def test_transport_cost_of_dead_codes_is_finite(size: float) -> None:
    codes = noise(1, 9, 5)
    codes[0, 3:] *= size
    cost = transport_cost(noise(1, 200, 5, seed=1), codes)
    assert cost.isfinite().all() and cost.min() >= -1e-6 and cost.max() <= 2 + 1e-6
    tokens = torch.zeros(1, 1, 5)
    assert transport_cost(tokens, codes).item() == 1  # of nothing


# Structure


@pytest.mark.parametrize(
    "channels, expected", [((24, 32, 56, 160), 17_944_304), ((16, 24, 40, 112), 17_308_224)]
)
def test_number_of_parameters(channels: tuple[int, ...], expected: int) -> None:
    categories = tuple(f"category {i}" for i in range(15))
    with torch.device("meta"):
        levels = Levels([torch.empty(1, count, 1, 1) for count in channels])
        model: Any = HVQTrans(HVQTransConfig(), levels, categories)
        shared: Any = HVQTrans(HVQTransConfig(shared_codebooks=True), levels, categories)

    def count(*parts: Any) -> int:
        return sum(p.numel() for part in parts for p in part.parameters())

    assert count(model) == expected
    assert count(model.encoder_layers) == 3_159_040
    assert count(model.decoder_layers, model.decoder_norm) == 12_618_752
    assert count(model.position) == 3_584
    books = [*model.codebooks.buffers(), *model.root.buffers()]
    assert sum(buffer.numel() for buffer in books) == 15 * 2_361_856
    books = [*shared.codebooks.buffers(), *shared.root.buffers()]
    assert sum(buffer.numel() for buffer in books) == 2_361_856
    assert count(model) - count(shared) == 14 * count(shared.output)


def test_weights_follow_from_the_seed_alone(pyramid: FrozenEncoder) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = small(pyramid, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = small(pyramid, seed=5).state_dict(), small(pyramid, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("codebooks.1.codes", "decoder_layers.0.feed_forward.linear1.weight"):
        assert not torch.equal(first[name], other[name])
    name = "encoder_layers.{}.attention.in_proj_weight"
    assert not torch.equal(first[name.format(0)], first[name.format(1)])


def test_a_cache_is_shared_with_uniad(pyramid: FrozenEncoder) -> None:
    model, image = small(pyramid), torch.rand(2, 3, 96, 64)
    uniad = UniAD(UniADConfig(grid=6, width=32, neighbour_mask=3), pyramid, CATEGORIES).eval()
    assert model.encoding == uniad.encoding != small(pyramid, grid=5).encoding
    (ours,), (theirs,) = model.encode(image), uniad.encode(image)
    assert torch.equal(ours, theirs) and not ours.requires_grad
    assert torch.equal(ours, align_levels(pyramid(image), (6, 6)))


def test_category_linear_is_one_layer_each() -> None:
    linear, x, which = CategoryLinear(3, 5, 4), noise(4, 6, 5), torch.tensor([2, 0, 0, 1])
    y = linear(x, which)
    for i, c in enumerate(which.tolist()):
        torch.testing.assert_close(y[i], F.linear(x[i], linear.weight[c], linear.bias[c]))
    assert linear.weight.abs().max() <= 5**-0.5 and linear.weight.std() > 0.2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"grid": 0}, "grid must be at least 1, got 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"layers": -1}, "layers must be at least 1"),
        ({"width": 30}, r"width must be even and a multiple of heads \(8\), got 30"),
        ({"width": 9, "heads": 3}, "width must be even"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"commitment": -0.1}, "commitment and transport_weight must be"),
        ({"transport_weight": math.nan}, "commitment and transport_weight must be"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HVQTransConfig(**settings)


def test_tiles_are_refused(tiny_encoder: FrozenEncoder) -> None:
    with pytest.raises(InputError, match="takes no tiles: leave out --tile"):
        HVQTrans(HVQTransConfig(), TiledEncoder(tiny_encoder, 128), ("a",))


# Start


@torch.no_grad()
@pytest.mark.parametrize("training, size, pictures", [(True, 30, 1), (False, 36, 1), (True, 80, 3)])
def test_codebooks_start_from_their_own_pictures(
    pyramid: FrozenEncoder, training: bool, size: int, pictures: int
) -> None:
    """As many as have enough tokens, of 36 each."""
    model = small(pyramid, codebook_size=size).train(training)
    batch = good_batch(model)
    model.prepare([batch])
    assert model.training == training
    model.eval()
    for c, first in enumerate((0, 4)):
        states = model.encoder_states(batch.features[0][first : first + pictures])
        rows = [i * 36 * pictures // size for i in range(size)]
        torch.testing.assert_close(model.root.codes[c], states[-1].flatten(0, 1)[rows])
        root, commitment = model.root(states[-1], torch.full((pictures,), c))
        assert commitment < 0.2 * states[-1].square().mean()
        for i, codebooks in enumerate(model.codebooks):
            expected = torch.cat([states[i], root], dim=2).flatten(0, 1)[rows]
            torch.testing.assert_close(codebooks.codes[c], expected)
            assert torch.equal(codebooks.sums[c], codebooks.codes[c])
            assert (codebooks.counts == 1).all()


@torch.no_grad()
def test_no_level_drowns_the_others_when_categories_are_told_apart(pyramid: FrozenEncoder) -> None:
    model = small(pyramid)
    batch = good_batch(model)
    model.prepare([batch])
    levels = batch.features[0].mean(dim=(2, 3)).split(pyramid.channels, dim=1)
    expected = torch.cat([F.normalize(level, dim=1) for level in levels], dim=1)
    for c in (0, 1):
        ours = model.references.features[model.references.category == c]
        torch.testing.assert_close(ours, expected[4 * c : 4 * c + 4])


@torch.no_grad()
def test_other_starts(pyramid: FrozenEncoder) -> None:
    reference = small(pyramid, codebook_start="reference")
    batch = good_batch(reference)
    before = reference.codebooks[0].codes.clone()
    reference.prepare([batch])
    assert torch.equal(reference.codebooks[0].codes, before)
    assert not reference.codebooks[0].counts.any() and abs(before.std() - 1) < 0.05
    assert len(reference.references.features) == 8

    shared = small(pyramid, shared_codebooks=True)
    shared.prepare([batch])
    states = [shared.encoder_states(batch.features[0][[i]])[-1][0] for i in (0, 4)]
    rows = [i * 72 // 30 for i in range(30)]  # of both categories
    torch.testing.assert_close(shared.root.codes[0], torch.cat(states)[rows])


# Map and score


@torch.inference_mode()
def test_map_and_score_by_hand(pyramid: FrozenEncoder) -> None:
    model, known = (
        small(pyramid, optimal_transport=True, transport_weight=7.0),
        torch.tensor([0, 1]),
    )
    image = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    match = model.match(image, known)
    (aligned,), (template,) = match.query, match.template
    rebuilt = model.rebuild(aligned, known)
    assert torch.equal(template[:, 0], rebuilt.features)
    cost = transport_cost(rebuilt.shallow, model.codebooks[0].codes[known])
    distance = (aligned - template[:, 0]).square().sum(dim=1).sqrt()
    expected = distance + 7 * cost.view(2, 6, 6)
    torch.testing.assert_close(match.host_map[:, 0], expected)

    ignore = torch.zeros(2, 1, 96, 64, dtype=torch.bool)
    ignore[:, :, :40, :30] = True
    for where in (None, ignore):
        prediction = model.predict(image, known, ignore=where)
        hidden = expected[:, None].clone()
        if where is not None:
            hidden[:, :, :2, :2] = 0  # patches of 16 x 10.7 pixels that are ignored
            hidden[:, :, 2, :2] = expected[:, None, 2, :2]
            hidden[:, :, :2, 2] = 0
        full = F.interpolate(hidden, (96, 64), mode="bilinear", align_corners=True)
        full = full if where is None else full.masked_fill(where, 0)
        torch.testing.assert_close(prediction.anomaly_map, full)
        squares = full.unfold(2, 16, 1).unfold(3, 16, 1).mean(dim=(4, 5))
        torch.testing.assert_close(prediction.image_score, squares.flatten(1).amax(dim=1))
        resized = model.predict(image, known, ignore=where, map_size=(50, 70))
        assert torch.equal(resized.image_score, prediction.image_score)
        assert resized.anomaly_map.shape == (2, 1, 50, 70)


@torch.inference_mode()
def test_the_category_decides_unless_codebooks_are_shared(pyramid: FrozenEncoder) -> None:
    for shared in (False, True):
        model = small(pyramid, shared_codebooks=shared, optimal_transport=True)
        batch = good_batch(model)
        model.prepare([batch])
        fresh = torch.stack([picture(name, 20) for name in CATEGORIES])
        inferred = model.predict(fresh)
        right, wrong = (model.predict(fresh, torch.tensor(c)) for c in ([0, 1], [1, 0]))
        assert inferred.category.tolist() == right.category.tolist() == [0, 1]
        assert wrong.category.tolist() == [1, 0]
        assert torch.equal(inferred.anomaly_map, right.anomaly_map)
        assert torch.equal(right.anomaly_map, wrong.anomaly_map) == shared


# Learning


def taught(model: Any, batch: TrainingBatch, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimal_transport": True, "transport_weight": 0.5},  # these features are small
        {"shared_codebooks": True},
        {"codebook_start": "reference", "update": "image"},
    ],
    ids=str,
)
def test_it_learns_the_good_and_sees_a_defect(
    pyramid: FrozenEncoder, settings: dict[str, Any]
) -> None:
    model = small(pyramid, dropout=0.0, **settings)
    fresh = torch.stack([picture(name, 50 + seed) for name in CATEGORIES for seed in range(3)])
    broken = torch.stack([with_defect(image, 24, 48) for image in fresh])
    known = torch.tensor([0, 0, 0, 1, 1, 1])

    def contrast() -> float:
        """Worst defective over best good score."""
        with torch.inference_mode():
            good, bad = model.predict(fresh, known), model.predict(broken, known)
        return float(bad.image_score.min() / good.image_score.max())

    batch = good_batch(model, count=6)
    model.prepare([batch])
    before = contrast()
    losses = taught(model, batch, 50)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert contrast() > 1.8 * max(before, 1)
    if not settings:
        with torch.inference_mode():
            for anomaly_map in model.predict(broken, known).anomaly_map[:, 0]:
                inside = anomaly_map[24:48, 48:72].mean()
                assert inside > 2 * (anomaly_map.sum() - 576 * inside) / (96 * 96 - 576)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_learns(pyramid: FrozenEncoder, precision: str) -> None:
    model = small(pyramid).train()
    batch = good_batch(model)
    model.prepare([batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model.training_loss(batch, 0)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


class Stop(Exception):
    """What ends a training in the middle."""


@pytest.mark.parametrize("update", ["batch", "image"])
def test_a_killed_training_ends_with_the_same_codes(
    pyramid: FrozenEncoder, tmp_path: Path, update: Any
) -> None:
    fabric = open_fabric(device="cpu")
    config = TrainConfig(steps=6, batch_size=4, checkpoint_steps=2, learning_rate=1e-3)
    everything = good_batch(small(pyramid))

    def read(index: Sequence[int]) -> Any:
        return (everything.features[0][list(index)],), list(index), []

    def run(folder: str, stop: int | None = None) -> Any:
        source = OnlineFeatures(read, lambda x: (x,), everything.category, torch.device("cpu"))
        model = small(pyramid, seed=3, update=update)
        loss = model.training_loss

        def stopping(batch: TrainingBatch, step: int) -> Tensor:
            if step == stop:
                raise Stop
            return loss(batch, step)

        model.training_loss = stopping
        train(model, source, config, fabric=fabric, folder=tmp_path / folder, seed=1)
        return model.state_dict()

    undisturbed = run("whole")
    with pytest.raises(Stop):
        run("killed", stop=5)
    resumed = run("killed")
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert not (undisturbed["root.counts"] == 1).all()


def test_recipes_are_settings_that_exist() -> None:
    names = [name for name in RECIPES if name.startswith("hvqtrans")]
    assert names == ["hvqtrans", "hvqtrans_mvtec_ad", "hvqtrans_visa"]
    for name in names:
        recipe = RECIPES[name]
        assert configured(HVQTransConfig, recipe.settings, []).optimal_transport == (
            name != "hvqtrans"
        )
        train_config = configured(TrainConfig, recipe.train, [])
        assert (train_config.learning_rate, train_config.drops) == (1e-4, (0.8,))
        assert recipe.levels == (0, 1, 2, 3) and recipe.image_size == 224


# The authors' checkpoints

SMALL = {"width": 16, "size": 12, "categories": 2}


def test_a_converted_run_keeps_the_authors_codes(allgood: Command, tmp_path: Path) -> None:
    shapes = official_shapes(**SMALL)
    state = fill_state(shapes | b4_shapes("enc."), 4)
    content = {"state_dict": {f"module.{name}": x for name, x in state.items()}, "epoch": 9}
    path, run = tmp_path / "ckpt_best.pth.tar", tmp_path / "run"
    torch.save(content, path)
    data = draw_tree(tmp_path / "data", train=2, good=1, bad=1)
    size = ("--image-size", "96")
    answer = allgood("convert", "hvqtrans", path, "--out", run, "--good", data, *size)
    assert answer.code == 0, answer.err
    detector = Inspector(run).detector
    assert detector.config == replace(
        HVQTransConfig(), width=16, codebook_size=12, codebook_start="reference",
        optimal_transport=True,
    )  # fmt: skip
    assert len(detector.references.features) == 4
    for c in range(2):
        for level in range(1, 6):
            codebooks = detector.root if level == 5 else detector.codebooks[level - 1]
            name = f"quantize_list_{level}.{c}"
            assert torch.equal(codebooks.codes[c], state[f"{name}.embed"].T)
            assert torch.equal(codebooks.counts[c], state[f"{name}.cluster_size"])
    backbone = {n.removeprefix("enc."): x for n, x in state.items() if n.startswith("enc.")}
    save_file(from_lukemelas(backbone), tmp_path / "encoder.safetensors")
    config = replace(ENCODER, weights=str(tmp_path / "encoder.safetensors"))
    assert detector.encoder.digest == FrozenEncoder(config).digest
    picture = next((data / "wood" / "test" / "good").iterdir())
    (record,) = allgood("inspect", run, picture).records
    assert math.isfinite(record["image_score"])
    words = ("convert", "hvqtrans", path, "--out", tmp_path / "x", "--categories", "a", *size)
    assert "was trained on 2 categories, but 1 are named" in allgood.refused(*words)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s | {"prompt": torch.ones(1)}, "'prompt' is no part of an official HVQ-Trans"),
        (lambda s: {}, "it lacks 'quantize_conv_t.weight'"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("quantize_list_5")},
            "it lacks 'quantize_list_5.0.cluster_size'",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "quantize_list_2.1.embed"},
            "'codebooks.1.codes' is not there once for each of 2 categories",
        ),
        (
            lambda s: s | {"output_proj_list.1.bias": torch.ones(3)},
            "'output.bias' is not there once for each of 2 categories",
        ),
        (
            lambda s: s | {"quantize_conv_t.weight": torch.ones(16)},
            r"'quantize_conv_t.weight' is \(16,\) and should have 4 axes",
        ),
    ],
)
def test_what_is_not_understood_is_refused(change: Any, said: str) -> None:
    state = {name: torch.zeros(shape) for name, shape in official_shapes(**SMALL).items()}
    with pytest.raises(InputError, match=said):
        from_official(change(state))
