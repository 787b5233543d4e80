"""RD4AD against the network its multi-class numbers come from: embedding, levels, loss, map, score.

Weights and inputs follow from a written rule (fill.py). The first tests hold a few of the official
answers themselves, so they run anywhere; one goes through every number of the golden file, and the
last compares other weights with the network written out plainly, in float64.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill_state, uniform
from torch import Tensor, nn

from allgood.detectors.rd4ad import RD4AD, distance_map
from allgood.encoders.frozen import FrozenEncoder
from allgood.official.rd4ad import from_official
from allgood.types import TrainingBatch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CHANNELS = (256, 512, 1024)
GRADIENTS = {
    "mff_oce.conv1.weight": "bottleneck.shallow.0.conv.weight",
    "net_s.layer2.0.conv2.weight": "decoder.stages.1.0.conv2.conv.weight",
    "net_s.layer3.5.bn3.weight": "decoder.stages.2.5.conv3.norm.weight",
}

# fmt: off
# Name -> every n-th of the full answer, the first six.
NUMBERS = {
    "fusion_p": (
        263 * 332, (-0.1929425, 0.2469697, -0.3521858, -0.2185893, -0.1813462, -0.2125349),
    ),
    "embedding_block0": (
        137 * 319, (0.1759261, 0.4000219, 0.3781386, 0.1285529, 0.2774276, 0),
    ),
    "embedding": (137 * 319, (0.07452386, 0.7148494, 0, 0.1773544, 0.128191, 0.01206783)),
    "loss": (1, (1.23877048,)),
    "grad:mff_oce.conv1.weight": (
        593 * 331,
        (-7.162802e-06, 6.135994e-06, 6.558892e-06, -1.355226e-05, -6.936778e-05, -7.277325e-06),
    ),
    "grad:net_s.layer3.5.bn3.weight": (
        42, (0.001376103, -9.104859e-06, 0.000716363, 0.000146258, 0.0002426484, 0.000535122),
    ),
    "decoder1": (1049 * 333, (0.5470848, 0.05906426, 0, 0.2554334, 0.100712, 0.002293095)),
    "decoder2": (541 * 323, (0.04197519, 0.1066578, 0.1277288, 0.04059507, 0.2759241, 0.05881803)),
    "decoder3": (263 * 332, (0.2456873, 0.1987554, 0.5873051, 0.6942158, 0, 0.08629675)),
    "map_256": (67 * 326, (0.1394339, 0.138022, 0.1381494, 0.1354146, 0.1364935, 0.139122)),
    "map_256_unblurred": (
        67 * 326, (0.145009, 0.1425036, 0.1374402, 0.1327553, 0.1345604, 0.1411884),
    ),
    "score_max": (1, (0.1426866, 0.1417967)),
}
# fmt: on


class GivenLevels(FrozenEncoder):
    """An encoder that answers with given levels, or with noise from a ReLU."""

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        nn.Module.__init__(self)
        self.channels, self.strides = tuple(channels), (4, 8, 16)
        self.given: list[Tensor] | None = None

    def forward(self, image: Tensor) -> list[Tensor]:
        if self.given is not None:
            return self.given
        height, width = image.shape[-2:]
        return [
            torch.ones(len(image), channels, height // stride, width // stride)
            for channels, stride in zip(self.channels, self.strides, strict=True)
        ]


def block_shapes(name: str, inputs: int, inner: int, outputs: int, side: int, shortcut: str) -> Any:
    """Names and shapes of a bottleneck block; `side` of its middle convolution."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.conv1.weight": (inner, inputs, 1, 1),
        f"{name}.conv2.weight": (inner, inner, side, side),
        f"{name}.conv3.weight": (outputs, inner, 1, 1),
    }
    for number, width in ((1, inner), (2, inner), (3, outputs)):
        shapes |= norm_shapes(f"{name}.bn{number}", width)
    if shortcut == "downsample":
        shapes[f"{name}.downsample.0.weight"] = (outputs, inputs, 1, 1)
    elif shortcut == "upsample":  # transposed: inputs come first
        shapes[f"{name}.upsample.0.weight"] = (inputs, outputs, 2, 2)
    return shapes | (norm_shapes(f"{name}.{shortcut}.1", outputs) if shortcut else {})


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{v}": (width,) for v in vectors} | {f"{name}.num_batches_tracked": ()}


def embedding_shapes(channels: Sequence[int], inner: int) -> dict[str, tuple[int, ...]]:
    first, second, third = channels
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (second, first, 3, 3),
        "conv2.weight": (third, second, 3, 3),
        "conv3.weight": (third, second, 3, 3),
    }
    for number, width in ((1, second), (2, third), (3, third)):
        shapes |= norm_shapes(f"bn{number}", width)
    out = 2 * third
    shapes |= block_shapes("bn_layer.0", 3 * third, inner, out, 3, "downsample")
    for i in (1, 2):
        shapes |= block_shapes(f"bn_layer.{i}", out, inner, out, 3, "")
    return shapes


def decoder_shapes(channels: Sequence[int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 2 * channels[-1]
    for stage, (out, count) in enumerate(zip(reversed(channels), (3, 4, 6), strict=True), 1):
        for i in range(count):
            shapes |= block_shapes(
                f"layer{stage}.{i}",
                out if i else inputs,
                out // 2,
                out,
                3 if i else 2,
                "" if i else "upsample",
            )
        inputs = out
    return shapes


def benchmark_shapes() -> dict[str, tuple[int, ...]]:
    """ADer's network without its teacher."""
    return {
        **{f"mff_oce.{name}": shape for name, shape in embedding_shapes(CHANNELS, 512).items()},
        **{f"net_s.{name}": shape for name, shape in decoder_shapes(CHANNELS).items()},
    }


def rebuilt(content: Any, encoder: FrozenEncoder) -> Any:
    """Our detector with the weights of an official checkpoint, through the converter."""
    official = from_official(content)
    with pytest.MonkeyPatch.context() as patch:  # drawing what is then overwritten takes seconds
        patch.setattr(nn.init, "kaiming_normal_", lambda t, **_: t.data.fill_(torch.nan))
        patch.setattr(nn.init, "kaiming_uniform_", lambda t, **_: t.data.fill_(torch.nan))
        detector = RD4AD(official.config, encoder, ("a",)).eval()
    left_out, unknown = detector.load_state_dict(official.weights, strict=False)
    assert not unknown and all(name.startswith("references.") for name in left_out)
    return detector


def levels_of(seed: int, channels: Sequence[int] = CHANNELS, side: int = 256) -> list[Tensor]:
    """Never negative, as after a ReLU."""
    return [
        uniform(f"input:rd4ad:layer{i}", (2, c, side // s, side // s), seed).abs()
        for i, (c, s) in enumerate(zip(channels, (4, 8, 16), strict=True), 1)
    ]


@pytest.fixture(scope="module")
def answers() -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden file's names."""
    encoder = GivenLevels()
    detector = rebuilt(fill_state(benchmark_shapes(), 0), encoder)
    encoder.given = levels_of(0)
    out: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            out[name] = output.detach().clone()

        return hook

    hooks = [
        detector.bottleneck.shallow[1].register_forward_hook(keep("fusion_p")),
        detector.bottleneck.blocks[0].register_forward_hook(keep("embedding_block0")),
        detector.bottleneck.register_forward_hook(keep("embedding")),
    ]
    image = torch.zeros(2, 3, 256, 256)
    with torch.no_grad():
        match = detector.match(image)
    detector.match = lambda *_: match  # what predict would ask for again
    prediction = detector.predict(image)
    for hook in hooks:
        hook.remove()
    for i, template in enumerate(match.template, 1):
        out[f"decoder{i}"] = template[:, 0]
    # The official code divides the sum of the three maps by nine.
    out["map_256_unblurred"] = match.host_map[:, 0] / 9
    out["map_256"], out["score_max"] = prediction.anomaly_map[:, 0] / 9, prediction.image_score / 9

    batch = TrainingBatch(tuple(encoder.given), torch.zeros(2).long(), torch.arange(2))
    loss = detector.training_loss(batch, 0)  # in eval mode, so with the stored statistics
    loss.backward()
    out["loss"] = loss.detach()
    for theirs, ours in GRADIENTS.items():
        out[f"grad:{theirs}"] = detector.get_parameter(ours).grad
    return out


@pytest.mark.parametrize("name", NUMBERS)
def test_rd4ad_golden_numbers(name: str, answers: dict[str, Tensor]) -> None:
    stride, expected = NUMBERS[name]
    found = answers[name].flatten()
    # Gradients pass through more float32 sums than the rest.
    allowed = (1e-3 if name.startswith("grad") else 2e-5) * found.abs().max().item()
    assert found[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


@pytest.mark.shared
@shared
def test_rd4ad_golden_names_are_the_official_ones() -> None:
    facts = json.loads((GOLDEN / "rd4ad.json").read_text())
    official = facts["weights"]["model"]["shapes"]
    assert {k: list(v) for k, v in benchmark_shapes().items()} == official
    assert facts["seed"] == 0


@pytest.mark.shared
@shared
def test_rd4ad_golden_file(answers: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "rd4ad.json").read_text())
    stored = np.load(GOLDEN / "rd4ad.npz")
    assert facts["outputs"].keys() == answers.keys()
    for name, entry in facts["outputs"].items():
        full = answers[name].numpy()
        if "value" in entry:
            assert float(full) == pytest.approx(entry["value"], rel=entry["tol"]), name
            continue
        assert list(full.shape) == entry["shape"], name
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]].astype(np.float64)
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=entry["tol"]), name


# The network once more, plain and in float64


def conv_norm(x: Tensor, weights: dict[str, Tensor], conv: str, norm: str, **grid: Any) -> Tensor:
    side = weights[f"{conv}.weight"].shape[-1]
    if side == 2:
        x = F.conv_transpose2d(x, weights[f"{conv}.weight"], stride=2)
    else:
        x = F.conv2d(x, weights[f"{conv}.weight"], padding=side // 2, **grid)
    mean, var, scale, shift = (
        weights[f"{norm}.{name}"].view(1, -1, 1, 1)
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def block(x: Tensor, weights: dict[str, Tensor], name: str, stride: int = 1) -> Tensor:
    inner = conv_norm(x, weights, f"{name}.conv1", f"{name}.bn1").relu()
    inner = conv_norm(inner, weights, f"{name}.conv2", f"{name}.bn2", stride=stride).relu()
    inner = conv_norm(inner, weights, f"{name}.conv3", f"{name}.bn3")
    for shortcut in ("downsample", "upsample"):
        if f"{name}.{shortcut}.0.weight" in weights:
            x = conv_norm(x, weights, f"{name}.{shortcut}.0", f"{name}.{shortcut}.1", stride=stride)
    return (inner + x).relu()


def plain_forward(weights: dict[str, Tensor], levels: list[Tensor]) -> list[Tensor]:
    """The rebuilt levels, shallow first; names as in the authors' file, after `bn.`, `decoder.`."""
    p = conv_norm(levels[0], weights, "bn.conv1", "bn.bn1", stride=2).relu()
    p = conv_norm(p, weights, "bn.conv2", "bn.bn2", stride=2).relu()
    q = conv_norm(levels[1], weights, "bn.conv3", "bn.bn3", stride=2).relu()
    x = torch.cat([p, q, levels[2]], dim=1)
    for i in range(3):
        x = block(x, weights, f"bn.bn_layer.{i}", stride=1 if i else 2)
    rebuilt = []
    for stage, count in enumerate((3, 4, 6), 1):
        for i in range(count):
            x = block(x, weights, f"decoder.layer{stage}.{i}")
        rebuilt.insert(0, x)
    return rebuilt


@pytest.mark.parametrize("seed", [1, 2])
def test_rd4ad_golden_for_another_seed(seed: int) -> None:
    """Narrow, from the authors' own file, with levels that nobody has golden answers for."""
    channels = (8, 12, 20)
    official = {
        "bn": embedding_shapes(channels, 20)
        | {"conv4.weight": (40, 80, 1, 1)}
        | norm_shapes("bn4", 40),
        "decoder": decoder_shapes(channels),
    }
    content = {part: fill_state(shapes, seed) for part, shapes in official.items()}
    encoder = GivenLevels(channels)
    detector = rebuilt(content, encoder)
    assert detector.config.bottleneck_width == 0.5
    encoder.given = levels_of(seed, channels, side=96)

    weights = {
        f"{part}.{name}": tensor.double()
        for part, state in content.items()
        for name, tensor in state.items()
    }
    early = weights["bn.conv1.weight"].requires_grad_()
    targets = [level.double() for level in encoder.given]
    expected = plain_forward(weights, targets)
    with torch.no_grad():
        match = detector.match(torch.zeros(2, 3, 96, 96))
    for template, plain in zip(match.template, expected, strict=True):
        difference = (template[:, 0] - plain.detach()).abs().max()
        assert difference < 1e-5 * plain.detach().abs().max()

    host_map = torch.zeros(2, 1, 96, 96, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for e, d in zip(targets, expected, strict=True):
        cosine = (e * d).sum(1) / (e.square().sum(1) * d.square().sum(1)).sqrt()
        host_map += F.interpolate(1 - cosine[:, None], 96, mode="bilinear", align_corners=True)
        for one, other in zip(e.flatten(1), d.flatten(1), strict=True):
            loss = loss + (1 - one @ other / (one.norm() * other.norm())) / len(e)
    torch.testing.assert_close(match.host_map.double(), host_map.detach(), rtol=0, atol=1e-5)
    ours = distance_map(match.query, [t[:, 0] for t in match.template], (96, 96))
    assert torch.equal(match.host_map, ours)

    batch = TrainingBatch(tuple(encoder.given), torch.zeros(2).long(), torch.arange(2))
    found = detector.training_loss(batch, 0)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    found.backward()
    gradient = detector.bottleneck.shallow[0].conv.weight.grad
    assert early.grad is not None
    assert (gradient - early.grad).abs().max() < 1e-3 * early.grad.abs().max()
