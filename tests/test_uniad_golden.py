"""UniAD against the official network: tokens, layers, loss, gradients, map and score.

Weights and inputs follow from a written rule (fill.py). The first test holds a few of the official
answers itself, so it runs anywhere; another goes through every number of the golden file, and the
last compares other weights with a network written out from the paper, in float64.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from b4 import b4_shapes
from fill import fill_state, uniform
from torch import Tensor, nn

from allgood.detectors.uniad import UniAD
from allgood.encoders.frozen import FrozenEncoder
from allgood.official.uniad import from_official
from allgood.types import TrainingBatch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
LEVELS = ((24, 112), (32, 56), (56, 28), (160, 14))
"""Channels and side of what EfficientNet-B4 gives at 224 x 224."""
GRADIENTS = {
    "reconstruction.output_proj.weight": "output_projection.weight",
    "reconstruction.transformer.decoder.layers.2.self_attn.in_proj_weight": (
        "decoder_layers.2.memory_attention.in_proj_weight"
    ),
    "reconstruction.transformer.decoder.layers.1.learned_embed.weight": "decoder_layers.1.query",
    "reconstruction.transformer.encoder.layers.1.linear2.weight": (
        "encoder_layers.1.feed_forward.linear2.weight"
    ),
}

# fmt: off
# name -> every n-th of the stored numbers, the first six.
NUMBERS = {
    "input_tokens": (53 * 315, (-0.485287, -2.061629, 3.908552, 0.1003438, 2.568684, -1.55453)),
    "position": (
        29 * 288, (0.05249056, -0.06407306, -0.09523153, -0.07760472, 0.1019963, 0.01223304),
    ),
    "encoder": (53 * 315, (0.1561122, -2.841592, 2.125486, -1.706118, -0.7022467, -0.1372885)),
    "decoder0": (53 * 315, (0.656458, 0.216933, 2.21287, -0.09613431, 1.648254, -0.01703596)),
    "decoder": (53 * 315, (0.951906, 1.163045, 0.8341573, 1.274022, -0.4217856, -0.2625166)),
    "aligned": (59 * 301, (-2.661692, 0.8383473, 1.849681, -2.348821, 0.5659065, -2.605052)),
    "reconstruction": (
        59 * 301, (0.8269892, 0.0264214, -0.8301072, 0.7507936, 0.4210886, -0.6513355),
    ),
    "map_224": (53 * 315, (41.10647, 36.66409, 37.52002, 38.89151, 37.01466, 37.96229)),
    "loss": (1, (5.2339077,)),
    "grad:reconstruction.output_proj.weight": (
        37 * 313, (0.00404575, 0.0007523528, -0.002601622, -0.002901626, -0.009253798, -0.01194597),
    ),
    "grad:reconstruction.transformer.decoder.layers.2.self_attn.in_proj_weight": (
        101 * 324,
        (5.70359e-06, 7.338716e-07, -3.627898e-06, 2.768918e-05, 1.738956e-06, -0.007076883),
    ),
    "grad:reconstruction.transformer.decoder.layers.1.learned_embed.weight": (
        29 * 288,
        (-8.201676e-06, -1.613634e-05, -2.230302e-06, 1.212616e-05, 1.846613e-05, 3.406986e-06),
    ),
    "score_max": (1 * 1, (40.01944, 40.66583)),
    "score_std": (1 * 1, (1.143027, 1.108322)),
}
# fmt: on


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reconstruction in the authors' file."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        packed = {f"{name}.in_proj_weight": (768, 256), f"{name}.in_proj_bias": (768,)}
        return packed | linear(f"{name}.out_proj", 256, 256)

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (256,), f"{name}.bias": (256,)}

    transformer = "reconstruction.transformer"
    shapes: dict[str, tuple[int, ...]] = {
        "reconstruction.pos_embed.row_embed.weight": (14, 128),
        "reconstruction.pos_embed.col_embed.weight": (14, 128),
    }
    for half, attentions in (
        ("encoder", ("self_attn",)),
        ("decoder", ("self_attn", "multihead_attn")),
    ):
        for i in range(4):
            layer = f"{transformer}.{half}.layers.{i}"
            if half == "decoder":
                shapes[f"{layer}.learned_embed.weight"] = (196, 256)
            for name in attentions:
                shapes |= attention(f"{layer}.{name}")
            shapes |= linear(f"{layer}.linear1", 256, 1024) | linear(f"{layer}.linear2", 1024, 256)
            for number in range(1, 2 + len(attentions)):
                shapes |= norm(f"{layer}.norm{number}")
    shapes |= norm(f"{transformer}.decoder.norm")
    shapes |= linear("reconstruction.input_proj", 272, 256)
    return shapes | linear("reconstruction.output_proj", 256, 272)


class GivenLevels(FrozenEncoder):
    """Instead of EfficientNet-B4: answers with what it was made with."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        nn.Module.__init__(self)
        self.given = list(levels)
        self.channels = tuple(level.shape[1] for level in levels)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.given


def given_levels(seed: int) -> list[Tensor]:
    return [
        uniform(f"input:uniad:level{i}", (2, channels, side, side), seed) * 4
        for i, (channels, side) in enumerate(LEVELS, start=1)
    ]


def rebuilt(seed: int) -> Any:
    """Our detector with the weights of an official checkpoint, through the converter."""
    state = fill_state(official_shapes(), seed)
    backbone = {name: torch.empty(shape) for name, shape in b4_shapes("backbone.").items()}
    wrapped = {f"module.{name}": tensor for name, tensor in (state | backbone).items()}
    official = from_official({"state_dict": wrapped, "epoch": 1000, "arch": "x", "optimizer": {}})
    assert official.encoder.reference_padding and official.image_size == 224
    encoder = GivenLevels(given_levels(seed))
    detector = UniAD(official.config, encoder, ("a",)).eval()
    left_out, unknown = detector.load_state_dict(official.weights, strict=False)
    assert not unknown and all(name.startswith("references.") for name in left_out)
    return detector


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden file's names."""
    detector = rebuilt(0)
    out: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: out.update({name: output.detach().transpose(0, 1)})

    hooks = [
        detector.input_projection.register_forward_hook(keep("input_tokens")),
        detector.encoder_layers[3].register_forward_hook(keep("encoder")),
        detector.decoder_layers[0].register_forward_hook(keep("decoder0")),
        detector.norm.register_forward_hook(keep("decoder")),
    ]
    image = torch.zeros(2, 3, 224, 224)
    with torch.no_grad():
        match = detector.match(image)
        for hook in hooks:
            hook.remove()
        prediction = detector.predict(image)
        out["position"] = detector.position()
    out["aligned"], out["reconstruction"] = match.query[0], match.template[0][:, 0]
    out["map_224"], out["score_max"] = prediction.anomaly_map, prediction.image_score
    out["score_std"] = prediction.anomaly_map.flatten(1).std(dim=1, correction=0)
    blocked = (~detector.mask).float()
    out["attention_mask_row_sums"] = blocked.sum(dim=1)
    out["attention_mask_rows_0_105_195"] = blocked[[0, 105, 195]]
    features = detector.encode(image)
    loss = detector.training_loss(TrainingBatch(features, torch.zeros(2), torch.arange(2)), 0)
    loss.backward()
    out["loss"] = loss.detach()
    for theirs, name in GRADIENTS.items():
        out[f"grad:{theirs}"] = detector.get_parameter(name).grad
    return out


@pytest.mark.parametrize("name", NUMBERS)
def test_uniad_golden_numbers(name: str, ours: dict[str, Tensor]) -> None:
    stride, expected = NUMBERS[name]
    found = ours[name].flatten()
    # Gradients pass through more float32 sums than the rest.
    allowed = (1e-4 if name.startswith("grad") else 2e-5) * found.abs().max().item()
    assert found[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


def test_uniad_golden_number_of_parameters() -> None:
    assert sum(p.numel() for p in rebuilt(0).parameters()) == 7_717_392


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


@pytest.mark.shared
@shared
def test_uniad_golden_file(ours: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "uniad.json").read_text())
    stored = np.load(GOLDEN / "uniad.npz")
    shapes = facts["weights"]["model"]["shapes"]
    assert {name: list(shape) for name, shape in official_shapes().items()} == shapes
    assert set(facts["outputs"]) == set(ours) and facts["seed"] == 0
    for name, entry in facts["outputs"].items():
        full = ours[name].contiguous().numpy()
        if "value" in entry:
            assert float(full) == pytest.approx(entry["value"], rel=entry["tol"]), name
            continue
        assert list(full.shape) == entry["shape"], name
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]].astype(np.float64)
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=entry["tol"]), name


# The paper's network once more, plain and in float64


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(
    query: Tensor, key: Tensor, value: Tensor, weights: dict[str, Tensor], name: str
) -> Tensor:
    """Eight heads; whoever is at most three rows and columns away is not seen."""
    places = [(y, x) for y in range(14) for x in range(14)]
    near = torch.tensor(
        [[abs(a - c) <= 3 and abs(b - d) <= 3 for c, d in places] for a, b in places]
    )
    packed, bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    query, key, value = (
        x @ w.T + b
        for x, w, b in zip((query, key, value), packed.split(256), bias.split(256), strict=True)
    )
    heads = []
    for i in range(0, 256, 32):
        q, k, v = (t[..., i : i + 32] for t in (query, key, value))
        weight = (q @ k.transpose(1, 2) / math.sqrt(32)).exp() * ~near
        heads.append(weight / weight.sum(dim=-1, keepdim=True) @ v)
    return linear(torch.cat(heads, dim=-1), weights, f"{name}.out_proj")


def feed_forward(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return linear(linear(x, weights, f"{name}.linear1").clamp(min=0), weights, f"{name}.linear2")


def plain_rebuild(weights: dict[str, Tensor], aligned: Tensor) -> Tensor:
    """(B, 272, 14, 14) -> (B, 272, 14, 14)."""
    rows = weights["reconstruction.pos_embed.row_embed.weight"]
    columns = weights["reconstruction.pos_embed.col_embed.weight"]
    position = torch.stack([torch.cat([columns[x], rows[y]]) for y in range(14) for x in range(14)])
    x = linear(aligned.flatten(2).transpose(1, 2), weights, "reconstruction.input_proj")
    for i in range(4):
        layer = f"reconstruction.transformer.encoder.layers.{i}"
        mixed = attention(x + position, x + position, x, weights, f"{layer}.self_attn")
        x = layer_norm(x + mixed, weights, f"{layer}.norm1")
        x = layer_norm(x + feed_forward(x, weights, layer), weights, f"{layer}.norm2")
    memory = x
    for i in range(4):
        layer = f"reconstruction.transformer.decoder.layers.{i}"
        y = weights[f"{layer}.learned_embed.weight"].expand(len(x), -1, -1)
        mixed = attention(y + position, memory + position, memory, weights, f"{layer}.self_attn")
        y = layer_norm(y + mixed, weights, f"{layer}.norm1")
        mixed = attention(y + position, x + position, x, weights, f"{layer}.multihead_attn")
        y = layer_norm(y + mixed, weights, f"{layer}.norm2")
        x = layer_norm(y + feed_forward(y, weights, layer), weights, f"{layer}.norm3")
    x = layer_norm(x, weights, "reconstruction.transformer.decoder.norm")
    x = linear(x, weights, "reconstruction.output_proj")
    return x.transpose(1, 2).unflatten(2, (14, 14))


def test_uniad_golden_for_another_seed() -> None:
    """Weights nobody has golden answers for; forward, map, score, loss and one gradient."""
    detector = rebuilt(7)
    weights = {k: v.double() for k, v in fill_state(official_shapes(), 7).items()}
    pairs = {
        "reconstruction.pos_embed.row_embed.weight": "position.row",
        "reconstruction.transformer.decoder.layers.1.multihead_attn.in_proj_weight": (
            "decoder_layers.1.output_attention.in_proj_weight"
        ),
    }
    for theirs in pairs:
        weights[theirs].requires_grad_()
    aligned = torch.cat(
        [
            F.interpolate(level.double(), (14, 14), mode="bilinear", align_corners=True)
            for level in given_levels(7)
        ],
        dim=1,
    )
    expected = plain_rebuild(weights, aligned)
    image = torch.zeros(2, 3, 224, 224)
    match = detector.match(image)
    assert (match.query[0] - aligned).abs().max() < 1e-4
    assert (match.template[0][:, 0] - expected).abs().max() < 2e-5 * expected.abs().max()
    distance = (expected - aligned).square().sum(dim=1, keepdim=True).sqrt()
    full = F.interpolate(distance, (224, 224), mode="bilinear", align_corners=True)
    prediction = detector.predict(image)
    assert (prediction.anomaly_map - full).abs().max() < 2e-5 * full.max()
    windows = full.unfold(2, 16, 1).unfold(3, 16, 1).mean(dim=(-2, -1))
    score = windows.amax(dim=(1, 2, 3))
    assert (prediction.image_score - score).abs().max() < 1e-5 * score.max()

    loss = (expected - aligned).square().mean()
    loss.backward()
    features = detector.encode(image)
    found = detector.training_loss(TrainingBatch(features, torch.zeros(2), torch.arange(2)), 0)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    found.backward()
    for theirs, ours in pairs.items():
        gradient, wanted = detector.get_parameter(ours).grad, weights[theirs].grad
        assert wanted is not None
        # A ReLU that float32 sees on the other side of 0 moves single numbers by more.
        assert (gradient - wanted).norm() < 2e-3 * wanted.norm(), ours
