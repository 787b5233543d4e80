"""MiniMaxAD against the official network: levels, losses, gradients, map, score, merged weights.

Weights and inputs follow from a written rule (fill.py). The first tests hold a few of the official
answers themselves, so they run anywhere; another goes through every number of the golden file, and
the last compares other weights with a network written out from the paper, in float64.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill_state, uniform
from safetensors.torch import save_file
from torch import Tensor

from allgood.detectors.minimaxad import (
    MiniMaxAD,
    MiniMaxADConfig,
    adc_loss,
    coarse_distance,
    local_hm_loss,
)
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.layers.cosine import reverse_distillation_loss
from allgood.official.minimaxad import from_official
from allgood.types import TrainingBatch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
WIDTHS, DEPTHS, KERNEL_SIZES = (80, 160, 320), (2, 2, 8), (3, 13, 13)
BRANCHES = {"k5_1": 5, "k7_2": 7, "k3_3": 3, "k3_4": 3, "k3_5": 3}
GRADIENTS = {
    "bn.conv4.weight": "bottleneck.fuse.weight",
    "decoder.stages.1.0.dwconv.lk_origin.weight": (
        "decoder.stages.1.0.depthwise.branches.0.conv.weight"
    ),
    "decoder.stages.0.1.act.1.gamma": "decoder.stages.0.1.grn_scale",
}
CASES = {"far": None, "near": 1.5, "close": 0.5}

# Name -> every n-th of the numbers, the first six.
NUMBERS = {
    "stage1_block0_depthwise": (
        419 * 130,
        (2.775724, -1.106349, 1.218269, 0.5296575, 1.810478, -0.8507457),
    ),
    "encoder3": (
        83 * 329,
        (-2.496177, -1.088379, 0.2323451, -1.300003, 0.1525178, 1.294688),
    ),
    "bottleneck": (
        103 * 132,
        (0.719208, 0.5034971, -0.2170056, -0.2037365, -0.0815331, -1.32563),
    ),
    "decoder1": (
        331 * 330,
        (-0.151199, 0.6060007, -1.868485, -0.1676696, 2.366796, -0.1893837),
    ),
    "decoder3": (
        83 * 329,
        (-1.148392, 2.777184, 1.215975, -1.021047, 1.982335, 3.136536),
    ),
    "grad_adc:bn.conv4.weight": (
        2767 * 333,
        (-5.23483e-05, -0.0008558215, 8.951168e-05, -0.00091984, 0.0001208634, -0.0003039012),
    ),
    "grad_global:decoder.stages.0.1.act.1.gamma": (
        1 * 53,
        (-3.666893e-05, -0.0003969158, -0.0001082848, -0.0003363051, -0.0001417166, -4.049211e-05),
    ),
    "map_256": (
        67 * 326,
        (0.3690822, 1.029845, 0.9992555, 0.594446, 0.9629076, 0.9757895),
    ),
    "map_sum_sigma4": (
        67 * 326,
        (3.015601, 3.033154, 3.055203, 2.986074, 2.930435, 2.927533),
    ),
    "close:grad_adc_decoder1": (
        3 * 113,
        (0, 0, 0, 0, 0, 0),
    ),
    "merged:encoder.stages.2.7.pwconv2.0.bias": (
        1 * 53,
        (-0.02791578, 0.1603583, -0.005434435, -0.006717554, -0.06562705, 0.01675883),
    ),
    "merged:decoder.stages.2.3.dwconv.lk_origin.weight": (
        59 * 152,
        (0.03482444, -0.05533264, -0.04329302, 0.02371122, 0.03900154, -0.02613724),
    ),
    "loss_global": (1, (2.9945519,)),
    "loss_adc": (1, (8.98744488,)),
    "far:loss_adc": (1, (9.5289526,)),
    "near:loss_adc": (1, (1.57024467,)),
    "close:loss_adc": (1, (0.173666015,)),
    "close:loss_local_hm": (1, (0.173666015,)),
    "score": (1, (1.06555676, 1.06571448)),
}


def norm_shapes(name: str, width: int, *, batch: bool) -> dict[str, tuple[int, ...]]:
    fields = ("weight", "bias", "running_mean", "running_var") if batch else ("weight", "bias")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{field}": (width,) for field in fields}
    return shapes | ({f"{name}.num_batches_tracked": ()} if batch else {})


def block_shapes(name: str, width: int, kernel_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.gamma": (width,)}
    if kernel_size == 3:
        shapes[f"{name}.dwconv.weight"] = (width, 1, 3, 3)
    else:
        shapes[f"{name}.dwconv.lk_origin.weight"] = (width, 1, 13, 13)
        shapes |= norm_shapes(f"{name}.dwconv.origin_bn", width, batch=True)
        for branch, size in BRANCHES.items():
            shapes[f"{name}.dwconv.dil_conv_{branch}.weight"] = (width, 1, size, size)
            shapes |= norm_shapes(f"{name}.dwconv.dil_bn_{branch}", width, batch=True)
    shapes |= norm_shapes(f"{name}.norm", width, batch=True)
    for part, outputs, inputs in (("down", width // 4, width), ("up", width, width // 4)):
        shapes[f"{name}.se.{part}.weight"] = (outputs, inputs, 1, 1)
        shapes[f"{name}.se.{part}.bias"] = (outputs,)
    shapes[f"{name}.pwconv1.1.weight"] = (4 * width, width)
    shapes[f"{name}.pwconv1.1.bias"] = (4 * width,)
    shapes |= {f"{name}.act.1.{field}": (1, 1, 1, 4 * width) for field in ("gamma", "beta")}
    shapes[f"{name}.pwconv2.0.weight"] = (width, 4 * width)
    return shapes | norm_shapes(f"{name}.pwconv2.2", width, batch=True)


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the three official state dicts, each with its prefix."""
    shapes: dict[str, tuple[int, ...]] = {}
    halvings = ((0, 0, 3, 40), (0, 3, 40, 80), (1, 0, 80, 160), (2, 0, 160, 320), (3, 0, 320, 640))
    for i, j, inputs, outputs in halvings:
        name = f"encoder.downsample_layers.{i}"
        shapes[f"{name}.{j}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"{name}.{j}.bias"] = (outputs,)
        shapes |= norm_shapes(f"{name}.{j + 1}", outputs, batch=False)
    for i, (width, depth, size) in enumerate(zip(WIDTHS, DEPTHS, KERNEL_SIZES, strict=True)):
        for part in ("encoder", "decoder"):
            for j in range(depth):
                shapes |= block_shapes(f"{part}.stages.{i}.{j}", width, size)
        name = f"decoder.upsample_layers.{2 - i}"
        shapes[f"{name}.0.weight"] = (2 * width, width, 2, 2)
        shapes |= norm_shapes(f"{name}.1", width, batch=False)
    for j in range(2):
        shapes |= block_shapes(f"bn.stages.0.{j}", 640, 3)
    for i, inputs, outputs in ((1, 80, 160), (2, 160, 320), (3, 160, 320)):
        shapes[f"bn.conv{i}.weight"] = (outputs, inputs, 3, 3)
        shapes |= norm_shapes(f"bn.bn{i}", outputs, batch=True)
    return shapes | {"bn.conv4.weight": (640, 960, 3, 3)}


def part_of(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def rebuilt(state: Mapping[str, Tensor], folder: Path) -> Any:
    """Our detector with the weights of official files, through the converter."""
    official = from_official({part: part_of(state, part) for part in ("bn", "decoder")})
    path = folder / "encoder.safetensors"
    save_file(part_of(state, "encoder"), path)
    encoder = FrozenEncoder(EncoderConfig(official.encoder.name, (0, 1, 2), weights=str(path)))
    path.unlink()
    detector = MiniMaxAD(official.config, encoder, ("a",)).eval()
    left_out, unknown = detector.load_state_dict(official.weights, strict=False)
    assert not unknown and all(name.startswith(("encoder.", "references.")) for name in left_out)
    return detector


def given_levels(case: str, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Encoder's and decoder's levels of the losses' cases, of an image of side 64."""
    shapes = ((2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4))
    name = "input:minimaxad:{}{}"
    targets = [uniform(name.format("encoder", i), s, seed) for i, s in enumerate(shapes)]
    other = [uniform(name.format("decoder", i), s, seed) for i, s in enumerate(shapes)]
    size = CASES[case]
    if size is not None:
        for i, (target, shape) in enumerate(zip(targets, shapes, strict=True)):
            amplitude = uniform(name.format("amp", i), (2, 1, *shape[2:]), seed) * 0.5 + 0.5
            other[i] = target + size * amplitude**6 * other[i]
    return targets, other


def loss_answers(case: str) -> dict[str, Tensor]:
    targets, given = given_levels(case)
    out: dict[str, Tensor] = {}
    for loss in ("global", "adc", "local", "local_hm"):
        levels = [level.clone().requires_grad_() for level in given]
        distance = coarse_distance(targets, levels)
        if loss == "global":
            value = reverse_distillation_loss(targets, levels)
        elif loss == "adc":
            value = adc_loss(distance, 16, 0.9999, 0.9995)
        elif loss == "local":
            value = distance.square().mean()
        else:
            value = local_hm_loss(distance, 16, 0.9995)
        value.backward()
        out[f"{case}:loss_{loss}"] = value.detach()
        for i, level in enumerate(levels):
            assert level.grad is not None
            out[f"{case}:grad_{loss}_decoder{i}"] = level.grad
        out[f"{case}:map"] = F.interpolate(distance.detach().unsqueeze(1), 64).squeeze(1)
    return out


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden file's names."""
    state = fill_state(official_shapes())
    detector = rebuilt(state, tmp_path_factory.mktemp("minimaxad"))
    encoder, backbone = detector.encoder, detector.encoder.backbone
    image = uniform("input:minimaxad", (2, 3, 256, 256)) * 2 * encoder.std + encoder.mean
    out: dict[str, Tensor] = {}

    def keep(name: str, module: torch.nn.Module) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            out.setdefault(name, output.detach())

        return module.register_forward_hook(hook)

    hooks = [
        keep("stem", backbone.downsample[0]),
        keep("stage0_block0", backbone.stages[0][0]),
        *(keep(f"stage{i}", backbone.stages[i]) for i in range(3)),
        keep("depthwise merged with its norm", backbone.stages[1][0].depthwise),
        keep("bottleneck_conv", detector.bottleneck.fuse),
        keep("bottleneck", detector.bottleneck),
        keep("decoder_up0", detector.decoder.upsample[0]),
    ]
    levels = detector.encode(image)
    rebuilt_levels = detector.decode(levels)
    for hook in hooks:
        hook.remove()
    for i, (target, level) in enumerate(zip(levels, rebuilt_levels, strict=True), start=1):
        out[f"encoder{i}"], out[f"decoder{i}"] = target, level.detach()
    # The encoder is merged, so its block's norm is part of the depthwise kernel: take it off.
    fields = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (
        state[f"encoder.stages.1.0.norm.{field}"].double().view(-1, 1, 1) for field in fields
    )
    merged = out.pop("depthwise merged with its norm").double()
    out["stage1_block0_depthwise"] = (merged - bias) / weight * (variance + 1e-5).sqrt() + mean

    batch = TrainingBatch(levels, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    detector.decode = lambda _: rebuilt_levels  # what the loss would compute again
    parameters = [detector.get_parameter(name) for name in GRADIENTS.values()]
    for loss in ("global", "adc"):
        detector.config = MiniMaxADConfig(loss=loss)
        value = detector.training_loss(batch, 0)
        gradients = torch.autograd.grad(value, parameters, retain_graph=True)
        out[f"loss_{loss}"] = value.detach()
        out |= {f"grad_{loss}:{n}": g for n, g in zip(GRADIENTS, gradients, strict=True)}
    distance = coarse_distance(levels, [level.detach() for level in rebuilt_levels])
    out["loss_map"] = F.interpolate(distance.unsqueeze(1), 256).squeeze(1)

    with torch.inference_mode():
        prediction = detector.predict(image)  # merged
        out["map_256"], out["score"] = prediction.anomaly_map[:, 0], prediction.image_score
        detector.config = MiniMaxADConfig(smoothing="wide")
        out["map_sum_sigma4"] = 3 * detector.predict(image).anomaly_map[:, 0]
    decoder = detector._merged[1]._made  # as just used
    stages = backbone.stages
    out |= {
        "merged:encoder.stages.0.0.dwconv.weight": stages[0][0].depthwise.weight,
        "merged:encoder.stages.0.0.dwconv.bias": stages[0][0].depthwise.bias,
        "merged:encoder.stages.1.0.dwconv.lk_origin.weight": stages[1][0].depthwise.weight,
        "merged:encoder.stages.1.0.dwconv.lk_origin.bias": stages[1][0].depthwise.bias,
        "merged:encoder.stages.2.7.pwconv2.0.weight": stages[2][7].reduce.weight,
        "merged:encoder.stages.2.7.pwconv2.0.bias": stages[2][7].reduce.bias,
        "merged:decoder.stages.2.3.dwconv.lk_origin.weight": decoder.stages[2][3].depthwise.weight,
    }
    for case in CASES:
        out |= loss_answers(case)
    for loss in ("global", "adc"):
        name = f"grad_{loss}:decoder.stages.0.1.act.1.gamma"
        out[name] = out[name].view(1, 1, 1, -1)
    return out


@pytest.mark.parametrize("name", NUMBERS)
def test_minimaxad_golden_numbers(name: str, ours: dict[str, Tensor]) -> None:
    stride, expected = NUMBERS[name]
    found = ours[name].detach().flatten()
    # Gradients pass through more float32 sums than the rest.
    allowed = (2e-4 if "grad" in name else 5e-5) * found.abs().max().item()
    assert found[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


@pytest.mark.shared
@shared
def test_minimaxad_golden_names_are_the_official_ones() -> None:
    facts = json.loads((GOLDEN / "minimaxad.json").read_text())
    shapes = official_shapes()
    for part in facts["weights"].values():
        for name, shape in part["shapes"].items():
            # The encoder's norms behind each stage have no weights that were ever learned.
            if not name.startswith("encoder.norm"):
                assert list(shapes.pop(name)) == shape, name
    assert not shapes and facts["seed"] == 0


@pytest.mark.shared
@shared
def test_minimaxad_golden_file(ours: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "minimaxad.json").read_text())
    stored = np.load(GOLDEN / "minimaxad.npz")
    for name, entry in facts["outputs"].items():
        full = ours[name].detach().numpy()
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


def batch_norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    fields = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (weights[f"{name}.{f}"].view(-1, 1, 1) for f in fields)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def over_channels(x: Tensor, weights: Mapping[str, Tensor] | None = None, name: str = "") -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    unit = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    if weights is None:
        return unit
    return unit * weights[f"{name}.weight"].view(-1, 1, 1) + weights[f"{name}.bias"].view(-1, 1, 1)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def block(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    width = x.shape[1]
    if f"{name}.dwconv.weight" in weights:
        u = F.conv2d(x, weights[f"{name}.dwconv.weight"], padding=1, groups=width)
    else:
        kernel = weights[f"{name}.dwconv.lk_origin.weight"]
        u = F.conv2d(x, kernel, padding=6, groups=width)
        u = batch_norm(u, weights, f"{name}.dwconv.origin_bn")
        for branch in BRANCHES:
            size, dilation = int(branch[1]), int(branch[3])
            kernel = weights[f"{name}.dwconv.dil_conv_{branch}.weight"]
            padding = dilation * (size // 2)
            part = F.conv2d(x, kernel, padding=padding, dilation=dilation, groups=width)
            u = u + batch_norm(part, weights, f"{name}.dwconv.dil_bn_{branch}")
    u = batch_norm(u, weights, f"{name}.norm")
    gate = u.mean(dim=(2, 3), keepdim=True)
    for part, after in (("down", torch.relu), ("up", torch.sigmoid)):
        gate = F.conv2d(
            gate, weights[f"{name}.se.{part}.weight"], weights[f"{name}.se.{part}.bias"]
        )
        gate = after(gate)
    z = (u * gate).permute(0, 2, 3, 1) @ weights[f"{name}.pwconv1.1.weight"].T
    z = gelu(z + weights[f"{name}.pwconv1.1.bias"])
    size = z.square().sum(dim=(1, 2), keepdim=True).sqrt()
    response = size / (size.mean(dim=3, keepdim=True) + 1e-6)
    z = weights[f"{name}.act.1.gamma"] * (z * response) + weights[f"{name}.act.1.beta"] + z
    y = (z @ weights[f"{name}.pwconv2.0.weight"].T).permute(0, 3, 1, 2)
    y = batch_norm(y, weights, f"{name}.pwconv2.2")
    return x + weights[f"{name}.gamma"].view(-1, 1, 1) * y


def plain_forward(weights: Mapping[str, Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Normalised pictures (B, 3, H, W) -> the encoder's levels and the decoder's."""

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), 2, 1)

    targets = []
    for i, depth in enumerate(DEPTHS):
        down = f"encoder.downsample_layers.{i}"
        x = over_channels(conv(x, f"{down}.0"), weights, f"{down}.1")
        if i == 0:
            x = over_channels(conv(gelu(x), f"{down}.3"), weights, f"{down}.4")
        for j in range(depth):
            x = block(x, weights, f"encoder.stages.{i}.{j}")
        targets.append(over_channels(x))

    shallow, middle, deep = targets
    for i in (1, 2):
        shallow = torch.relu(batch_norm(conv(shallow, f"bn.conv{i}"), weights, f"bn.bn{i}"))
    middle = torch.relu(batch_norm(conv(middle, "bn.conv3"), weights, "bn.bn3"))
    x = conv(torch.cat([shallow, middle, deep], dim=1), "bn.conv4")
    for j in range(2):
        x = block(x, weights, f"bn.stages.0.{j}")

    rebuilt: list[Tensor] = []
    for i in (2, 1, 0):
        name = f"decoder.upsample_layers.{2 - i}"
        x = over_channels(
            F.conv_transpose2d(x, weights[f"{name}.0.weight"], stride=2), weights, f"{name}.1"
        )
        for j in range(DEPTHS[i]):
            x = block(x, weights, f"decoder.stages.{i}.{j}")
        rebuilt.insert(0, x)
    return targets, rebuilt


def test_minimaxad_golden_for_another_seed(tmp_path: Path) -> None:
    """Weights nobody has golden answers for, not square; forward, loss and one gradient."""
    state = fill_state(official_shapes(), seed=1)
    detector = rebuilt(state, tmp_path)
    pictures = uniform("input:minimaxad", (2, 3, 64, 96), seed=1) * 2
    image = pictures * detector.encoder.std + detector.encoder.mean
    weights = {name: tensor.double() for name, tensor in state.items()}
    learned = weights["bn.conv1.weight"].requires_grad_()
    targets, expected = plain_forward(weights, pictures.double())

    with torch.no_grad():
        match = detector.match(image)
    for ours, plain in zip(
        [*match.query, *(t[:, 0] for t in match.template)], [*targets, *expected], strict=True
    ):
        plain = plain.detach()
        assert ours.shape == plain.shape
        assert (ours - plain).abs().max() < 2e-5 * plain.abs().max()

    whole = torch.zeros(2, 64, 96).double()
    for target, level in zip(targets, expected, strict=True):
        cosine = (target * level).sum(1) / (target.norm(dim=1) * level.norm(dim=1))
        whole = whole + F.interpolate((1 - cosine).unsqueeze(1), (64, 96)).squeeze(1)
    flat = whole.detach().flatten()
    threshold = torch.quantile(flat, 0.9999) - flat.var()
    assert (flat**2 >= threshold).sum() >= 0.0005 * len(flat)  # the branch of alpha
    loss = whole.square()[whole.square() >= threshold].mean()
    loss.backward()
    batch = TrainingBatch(detector.encode(image), torch.zeros(2).long(), torch.arange(2))
    ours = detector.training_loss(batch, 0)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    ours.backward()
    gradient = detector.bottleneck.shallow[0].conv.weight.grad
    assert learned.grad is not None
    assert (gradient - learned.grad).abs().max() < 2e-4 * learned.grad.abs().max()
