"""HVQ-Trans against the official network: states, codes, rebuilt features, loss, gradients, maps,
and three updates of a codebook.

Weights and inputs follow from a written rule (fill.py). The first tests hold a few of the official
answers themselves, so they run anywhere; another goes through every number of the golden file, and
the last compares other weights with a network written out from the paper, in float64.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill_state, uniform
from torch import Tensor, nn

from allgood.detectors.hvqtrans import HVQTrans
from allgood.encoders.frozen import FrozenEncoder
from allgood.layers.codebook import Codebooks, nearest_code
from allgood.official.hvqtrans import from_official
from allgood.types import TrainingBatch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
LEVELS = ((24, 112), (32, 56), (56, 28), (160, 14))
"""Channels and side of what EfficientNet-B4 gives at 224 x 224."""
CATEGORIES = (3, 11)
"""Of the two pictures, out of 15."""
GRADIENTS = {
    "encoder.layers.3.linear1.weight": "encoder_layers.3.feed_forward.linear1.weight",
    "decoder.layers.0.multihead_attn.in_proj_weight": (
        "decoder_layers.0.cross_attention.in_proj_weight"
    ),
    "output_proj_list.3.weight": "output.weight",
    "quantize_conv_t.bias": "input_projection.bias",
}


class Levels(FrozenEncoder):
    """Instead of a backbone: feature levels that are given."""

    def __init__(self, levels: list[Tensor]) -> None:
        nn.Module.__init__(self)
        self.given = levels
        self.channels = tuple(level.shape[1] for level in levels)
        self.strides = tuple(2**i for i in range(1, len(levels) + 1))

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.given


def official_shapes(
    channels: int = 272, width: int = 256, size: int = 512, categories: int = 15, grid: int = 14
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, without the backbone's."""
    shapes: dict[str, tuple[int, ...]] = {
        "quantize_conv_t.weight": (width, channels, 1, 1),
        "quantize_conv_t.bias": (width,),
        "pos_embed.row_embed.weight": (grid, width // 2),
        "pos_embed.col_embed.weight": (grid, width // 2),
        "input_proj.weight": (width, channels),
        "input_proj.bias": (width,),
        "decoder.norm.weight": (2 * width,),
        "decoder.norm.bias": (2 * width,),
    }

    def layer(name: str, inner: int, attentions: list[str], norms: int) -> None:
        for attention in attentions:
            shapes[f"{name}.{attention}.in_proj_weight"] = (3 * inner, inner)
            shapes[f"{name}.{attention}.in_proj_bias"] = (3 * inner,)
            shapes[f"{name}.{attention}.out_proj.weight"] = (inner, inner)
            shapes[f"{name}.{attention}.out_proj.bias"] = (inner,)
        for i, (outputs, inputs) in enumerate(((4 * width, inner), (inner, 4 * width)), start=1):
            shapes[f"{name}.linear{i}.weight"] = (outputs, inputs)
            shapes[f"{name}.linear{i}.bias"] = (outputs,)
        for i in range(1, norms + 1):
            shapes[f"{name}.norm{i}.weight"] = shapes[f"{name}.norm{i}.bias"] = (inner,)

    for i in range(4):
        layer(f"encoder.layers.{i}", width, ["self_attn"], 2)
        layer(f"decoder.layers.{i}", 2 * width, ["self_attn", "multihead_attn"], 3)
    for c in range(categories):
        shapes[f"output_proj_list.{c}.weight"] = (channels, 2 * width)
        shapes[f"output_proj_list.{c}.bias"] = (channels,)
        for level in range(1, 6):
            inner = width if level == 5 else 2 * width
            shapes[f"quantize_list_{level}.{c}.embed"] = (inner, size)
            shapes[f"quantize_list_{level}.{c}.embed_avg"] = (inner, size)
            shapes[f"quantize_list_{level}.{c}.cluster_size"] = (size,)
    return shapes


def rebuilt(state: dict[str, Tensor], levels: list[Tensor], **changes: Any) -> Any:
    """Our detector with the weights of an official checkpoint, through the converter."""
    content = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    official = from_official({**content, "epoch": 7})
    assert official.num_categories is not None and official.encoder_weights is None
    assert official.image_size == 224 and official.encoder.levels == (0, 1, 2, 3)
    names = tuple(f"category {i}" for i in range(official.num_categories))
    detector = HVQTrans(official.config, Levels(levels), names).eval()
    left_out, unknown = detector.load_state_dict(official.weights, strict=False)
    assert not unknown and all(name.startswith("references.") for name in left_out)
    return detector


def pictures(seed: int = 0, levels: Any = LEVELS, count: int = 2) -> list[Tensor]:
    return [
        4 * uniform(f"input:hvqtrans:level{i}", (count, channels, side, side), seed)
        for i, (channels, side) in enumerate(levels, start=1)
    ]


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden file's names."""
    detector = rebuilt(fill_state(official_shapes(), 0), pictures())
    category = torch.tensor(CATEGORIES)
    image = torch.zeros(2, 3, 224, 224)
    out: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        out["decoder"] = output.detach().transpose(0, 1)

    hook = detector.decoder_norm.register_forward_hook(keep)
    with torch.no_grad():
        for prefix, transport in (("", True), ("without_ot:", False)):
            detector.config = replace(detector.config, optimal_transport=transport)
            prediction = detector.predict(image, category)
            (template,) = detector.match(image, category).template
            out[f"{prefix}reconstruction"] = template[:, 0]
            out[f"{prefix}map_224"] = prediction.anomaly_map
        hook.remove()
        (aligned,) = detector.encode(image)
        states = detector.encoder_states(aligned)
        out["tokens"] = states[0].transpose(1, 2).unflatten(2, (14, 14))
        out["position"] = detector.position()
        out["encoder_states"] = torch.stack(states).transpose(1, 2)
        root, _ = detector.root(states[4], category)
        asked = [torch.cat([state, root], dim=2) for state in states[:4]] + [states[4]]
        for level, x in enumerate(asked, start=1):
            codebooks = detector.root if level == 5 else detector.codebooks[level - 1]
            codes = nearest_code(x, codebooks.codes[category])
            quantised, _ = codebooks(x, category)
            for i, c in enumerate(CATEGORIES):
                out[f"codes_level{level}_class{c}"] = codes[i]
                out[f"quantized_level{level}_class{c}"] = quantised[i]

    before = detector.codebooks[0].codes.clone()
    loss = detector.training_loss(TrainingBatch((aligned,), category, torch.arange(2)), 0)
    loss.backward()
    assert torch.equal(detector.codebooks[0].codes, before)  # evaluation mode
    out["loss"] = out["without_ot:loss"] = loss.detach()
    gradients = {name: p.grad for name, p in detector.named_parameters()}
    for official, name in GRADIENTS.items():
        gradient = gradients[name]
        assert gradient is not None
        out[f"grad:{official}"] = gradient[3] if name == "output.weight" else gradient
    return out


@pytest.fixture(scope="module", params=["batch", "image"])
def updates(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Three updates of one codebook of 8 codes; with one picture both orders are the same."""
    embed = uniform("buffer:hvqtrans:embed", (16, 8))
    codebooks = Codebooks(1, 16, 8, request.param)
    codebooks.codes[0], codebooks.sums[0] = embed.T, embed.T
    out: dict[str, Tensor] = {}
    for i in range(3):
        x, which = uniform(f"input:hvqtrans:ema{i}", (1, 20, 16)), torch.zeros(1, dtype=torch.int64)
        out[f"ema{i}:codes"] = nearest_code(x, codebooks.codes)
        out[f"ema{i}:output"], out[f"ema{i}:commitment"] = codebooks(x, which)
        out[f"ema{i}:embed"] = codebooks.codes[0].T.clone()
        out[f"ema{i}:embed_avg"] = codebooks.sums[0].T.clone()
        out[f"ema{i}:cluster_size"] = codebooks.counts[0].clone()
    return out


# fmt: off
# Name -> every n-th of the official numbers, the first six.
NUMBERS = {
    "encoder_states": (
        251 * 333, (0.5222982, -0.9166717, 2.042307, -1.700758, -0.2008322, -0.1836754),
    ),
    "decoder": (101 * 331, (-0.01152322, -0.7924872, 0.8155935, 1.197016, 0.1778597, 0.0732391)),
    "reconstruction": (59 * 301, (0.115426, -0.04894524, 1.672127, 1.13616, 0.9343727, 0.9636793)),
    "map_224": (53 * 315, (121.2116, 116.6737, 119.1582, 118.1539, 116.0535, 116.8378)),
    "without_ot:map_224": (53 * 315, (41.52982, 36.60032, 39.05247, 37.99849, 36.0783, 36.8443)),
    "loss": (1, (6.367732,)),
    "codes_level5_class3": (32, (161, 286, 161, 149, 476, 161)),
    "quantized_level5_class3": (
        67 * 124,
        (-0.01391959, -0.06054854, -0.07465905, 0.07098772, 0.009343524, -0.05181012),
    ),
    "codes_level1_class11": (32, (69, 402, 95, 244, 291, 21)),
    "quantized_level1_class11": (
        127 * 131, (-0.06716156, 0.05268717, -0.04277422, -0.07422501, -0.06371862, 0.03796804),
    ),
    "grad:encoder.layers.3.linear1.weight": (
        179 * 244,
        (0.0002996556, -0.0009998353, -0.0003332799, 0.01520327, 0.001135034, 0.007744282),
    ),
    "grad:decoder.layers.0.multihead_attn.in_proj_weight": (
        541 * 242,
        (-2.407568e-06, -6.392905e-07, 2.522869e-07, 1.807553e-07, -1.605515e-06, -1.002899e-05),
    ),
    "grad:output_proj_list.3.weight": (
        97 * 239,
        (-0.0001057522, -0.003031963, 0.000585969, -0.001405934, -0.009182638, 0.001854908),
    ),
    "grad:quantize_conv_t.bias": (
        42, (-0.03433562, 0.05183642, 0.1286492, 0.07496191, -0.03511419, 0.03781496),
    ),
}
UPDATES = {
    "ema0:codes": (3, (3, 1, 1, 6, 2, 2)),
    "ema0:commitment": (1, (0.3972086,)),
    "ema0:embed": (21, (27612.39, -86886.11, -23.11956, 13489.73, -29.9087, -0.3456014)),
    "ema0:cluster_size": (1, (0, 0.04, 0.03, 0.06, 0.02, 0)),
    "ema1:codes": (3, (3, 3, 3, 3, 3, 3)),
    "ema1:output": (53, (-0.331579, -8.868776, 4.1081, 11.87915, 15.22139, 1.851211)),
    "ema1:commitment": (1, (56.274353,)),
    "ema2:output": (53, (-0.1527218, -2.169227, 0.9987072, 2.729719, 3.36766, 0.4577496)),
    "ema2:commitment": (1, (3.2094474,)),
    "ema2:embed": (21, (27055.72, -85134.49, -23.11327, 13217.78, -29.90046, -0.3455079)),
    "ema2:embed_avg": (21, (0.2705207, -0.8512302, -0.679739, 0.13216, -0.5863289, -0.01354692)),
    "ema2:cluster_size": (1, (0, 0.039204, 0.029403, 0.456806, 0.019602, 0)),
}
# fmt: on


def assert_numbers(found: Tensor, stride: int, expected: tuple[float, ...], tol: float) -> None:
    flat = found.detach().flatten()
    allowed = tol * flat.abs().max().item()
    assert flat[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


@pytest.mark.parametrize("name", NUMBERS)
def test_hvqtrans_golden_numbers(name: str, ours: dict[str, Tensor]) -> None:
    # The first gradient sums over codes that nearly cancel.
    tolerance = 5e-4 if name == "grad:quantize_conv_t.bias" else 5e-5
    assert_numbers(ours[name], *NUMBERS[name], 0 if name.startswith("codes") else tolerance)


@pytest.mark.parametrize("name", UPDATES)
def test_hvqtrans_golden_numbers_of_updates(name: str, updates: dict[str, Tensor]) -> None:
    assert_numbers(updates[name], *UPDATES[name], 0 if name.endswith("codes") else 1e-5)


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


def assert_as_in_file(ours: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "hvqtrans.json").read_text())
    stored = np.load(GOLDEN / "hvqtrans.npz")
    for name, full_tensor in ours.items():
        entry, full = facts["outputs"][name], full_tensor.detach().numpy()
        if "value" in entry:
            assert float(full) == pytest.approx(entry["value"], rel=entry["tol"]), name
            continue
        assert list(full.shape) == entry["shape"], name
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]].astype(np.float64)
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=max(entry["tol"], 1e-9)), name


@pytest.mark.shared
@shared
def test_hvqtrans_golden_names_are_the_official_ones() -> None:
    facts = json.loads((GOLDEN / "hvqtrans.json").read_text())
    official = facts["weights"]["model"]["shapes"]
    assert {k: list(v) for k, v in official_shapes().items()} == official
    assert facts["seed"] == 0 and tuple(facts["inputs"]["clslabel"]["values"]) == CATEGORIES


@pytest.mark.shared
@shared
def test_hvqtrans_golden_file(ours: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "hvqtrans.json").read_text())
    assert {name for name in facts["outputs"] if not name.startswith("ema")} == set(ours)
    assert_as_in_file(ours)


@pytest.mark.shared
@shared
def test_hvqtrans_golden_updates(updates: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "hvqtrans.json").read_text())
    assert {name for name in facts["outputs"] if name.startswith("ema")} == set(updates)
    assert_as_in_file(updates)


# The paper's network once more, plain and in float64


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return unit * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(query: Tensor, key: Tensor, value: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """Eight heads; (N, D) each."""
    parts = zip(
        w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3), strict=True
    )
    q, k, v = (
        x @ weight.T + bias for x, (weight, bias) in zip((query, key, value), parts, strict=True)
    )
    heads = []
    for a, b, c in zip(q.chunk(8, 1), k.chunk(8, 1), v.chunk(8, 1), strict=True):
        weight = (a @ b.T / a.shape[1] ** 0.5).exp()
        heads.append(weight / weight.sum(dim=1, keepdim=True) @ c)
    return linear(torch.cat(heads, dim=1), w, f"{name}.out_proj")


def feed_forward(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return linear(linear(x, w, f"{name}.linear1").clamp(min=0), w, f"{name}.linear2")


def quantise(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Straight-through codes of (N, D), and the commitment; code by code."""
    rows = []
    for token in x.detach():
        distance = (codes - token).square().sum(dim=1)
        rows.append(codes[distance == distance.min()][0])
    nearest = torch.stack(rows)
    return x + (nearest - x).detach(), (nearest - x).square().mean()


def plain(w: dict[str, Tensor], features: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """One picture's aligned features (C, h, w) -> rebuilt, commitment, transport cost."""
    side = features.shape[1]
    rows, columns = w["pos_embed.row_embed.weight"], w["pos_embed.col_embed.weight"]
    position = torch.stack(
        [torch.cat([columns[x], rows[y]]) for y in range(side) for x in range(side)]
    )
    w = {**w, "conv.weight": w["quantize_conv_t.weight"][..., 0, 0]}
    states = [features.flatten(1).T @ w["conv.weight"].T + w["quantize_conv_t.bias"]]
    for i in range(4):
        name, x = f"encoder.layers.{i}", states[-1]
        x = norm(
            x + attention(x + position, x + position, x, w, f"{name}.self_attn"), w, f"{name}.norm1"
        )
        states.append(norm(x + feed_forward(x, w, name), w, f"{name}.norm2"))
    root, commitment = quantise(states[4], w[f"quantize_list_5.{c}.embed"].T)
    memory = {}
    for i in range(4):
        codes = w[f"quantize_list_{i + 1}.{c}.embed"].T
        memory[i], distance = quantise(torch.cat([states[i], root], dim=1), codes)
        commitment = commitment + distance
    twice = torch.cat([position, position], dim=1)
    x = memory[3]
    for i in range(4):
        name, m = f"decoder.layers.{i}", memory[3 - i]
        x = norm(x + attention(x + twice, x + twice, x, w, f"{name}.self_attn"), w, f"{name}.norm1")
        read = attention(x + twice, m + twice, m, w, f"{name}.multihead_attn")
        x = norm(x + read, w, f"{name}.norm2")
        x = norm(x + feed_forward(x, w, name), w, f"{name}.norm3")
    out = linear(norm(x, w, "decoder.norm"), w, f"output_proj_list.{c}")

    codes, costs = w[f"quantize_list_1.{c}.embed"].T, []
    for token in torch.cat([states[0], root], dim=1):
        product = codes @ token
        share = (product / len(codes)).exp()
        cosine = product / (token.norm() * codes.norm(dim=1))
        costs.append((share / share.sum() * (1 - cosine)).sum())
    return out.T.unflatten(1, (side, side)), commitment, torch.stack(costs).view(side, side)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hvqtrans_golden_for_other_seeds(seed: int) -> None:
    """Weights nobody has golden answers for, another size; forward, loss, gradients, map, score."""
    shapes = official_shapes(channels=20, width=16, size=12, categories=3, grid=6)
    state = fill_state(shapes, seed)
    given = pictures(seed, ((4, 40), (6, 20), (10, 10)), count=3)
    detector = rebuilt(state, given)
    category = torch.tensor([2, 0, 2])
    w = {name: tensor.double() for name, tensor in state.items()}
    asked = ("quantize_conv_t.bias", "output_proj_list.2.weight", "encoder.layers.0.linear2.bias")
    for name in asked:
        w[name].requires_grad_()
    aligned = torch.cat(
        [F.interpolate(x.double(), (6, 6), mode="bilinear", align_corners=True) for x in given],
        dim=1,
    )
    answers = [plain(w, x, c) for x, c in zip(aligned, category.tolist(), strict=True)]
    features, commitments, costs = (torch.stack(part) for part in zip(*answers, strict=True))

    image = torch.zeros(3, 3, 80, 80)
    match = detector.match(image, category)
    torch.testing.assert_close(match.template[0][:, 0].double(), features, rtol=0, atol=2e-5)
    host_map = (features - aligned).square().sum(dim=1).sqrt() + 80 * costs
    torch.testing.assert_close(match.host_map[:, 0].double(), host_map, rtol=1e-5, atol=0)
    prediction = detector.predict(image, category)
    at_input = F.interpolate(
        host_map[:, None].detach(), (80, 80), mode="bilinear", align_corners=True
    )
    torch.testing.assert_close(prediction.anomaly_map.double(), at_input, rtol=1e-5, atol=0)
    squares = at_input.unfold(2, 16, 1).unfold(3, 16, 1).mean(dim=(4, 5))
    torch.testing.assert_close(
        prediction.image_score.double(), squares.flatten(1).amax(dim=1), rtol=1e-5, atol=0
    )

    loss = (features - aligned).square().mean() + 0.25 * commitments.mean()
    loss.backward()
    batch = TrainingBatch(detector.encode(image), category, torch.arange(3))
    ours = detector.training_loss(batch, 0)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    ours.backward()
    gradients = (
        detector.input_projection.bias.grad,
        detector.output.weight.grad[2],
        detector.encoder_layers[0].feed_forward.linear2.bias.grad,
    )
    for name, gradient in zip(asked, gradients, strict=True):
        expected = w[name].grad
        assert expected is not None
        allowed = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=allowed)
    assert not detector.output.weight.grad[1].any()  # of a category that no picture shows
