"""Dinomaly against the official network: groups, loss, gradients, map and score.

Weights and inputs follow from a written rule (fill.py). The first tests hold a few of the official
answers themselves, so they run anywhere; others go through every number of the golden files, and
the last compares other weights with a network written out from the paper, in float64.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from fill import fill_state, uniform
from safetensors.torch import save_file
from torch import Tensor

from allgood.detectors.dinomaly import Dinomaly, DinomalyConfig
from allgood.encoders.frozen import FrozenEncoder, dinov2_position_embedding
from allgood.layers.cosine import cosine_distance
from allgood.official.dinomaly import from_official
from allgood.types import TrainingBatch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
WIDTHS = {"small": 384, "base": 768}
PREFIX = 5
"""Class token and four registers."""
STEPS = {"0": 0, "0.45": 500, "0.9": 1000}
"""Share of shrunk points -> training step at which the ramp to 0.9 reaches it."""
GRADIENTS = ("decoder.0.attn.qkv.weight", "decoder.7.mlp.fc2.bias", "bottleneck.0.fc1.bias")

# fmt: off
# Of dinomaly_small: name -> every n-th of the stored numbers, the first six.
NUMBERS = {
    "bottleneck": (307 * 329, (1.190201, -1.34785, 0.3238589, 0.06548583, -1.892278, -1.446792)),
    "decoder7": (307 * 329, (2.686608, -6.735038, 3.283439, -1.84727, 0.3184217, -7.58181)),
    "map_256": (67 * 326, (0.3542147, 1.021974, 0.9572857, 0.586205, 0.9758488, 0.9631448)),
    "point_distance_sorted0": (
        261, (1.123836, 1.036436, 1.010805, 0.9906884, 0.9682696, 0.9447364),
    ),
    "point_distance_sorted1": (
        261, (1.118826, 1.033998, 1.009016, 0.9904449, 0.9723155, 0.9507884),
    ),
    "score": (1, (1.057681322, 1.061117291)),
    "loss_p0": (1, (0.990598798,)),
    "loss_p0.45": (1, (0.990598798,)),
    "loss_p0.9": (1, (0.990598798,)),
    "grad_norm_p0": (1, (1.10708318,)),
    "grad_norm_p0.45": (1, (0.657963394,)),
    "grad_norm_p0.9": (1, (0.211353233,)),
    "grad_p0.9:decoder.7.mlp.fc2.bias": (
        64, (1.940518e-05, 2.000878e-06, 3.585742e-06, -1.770498e-05, -1.105359e-05, -1.399062e-05),
    ),
}
# fmt: on


def official_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict; 12 encoder and 8 decoder blocks."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
        shapes |= linear(f"{name}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{name}.attn.proj", width, width)
        shapes |= linear(f"{name}.mlp.fc1", width, 4 * width)
        return shapes | linear(f"{name}.mlp.fc2", 4 * width, width)

    shapes: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, width),
        "encoder.pos_embed": (1, 37 * 37 + 1, width),
        "encoder.register_tokens": (1, 4, width),
        "encoder.mask_token": (1, width),
        "encoder.patch_embed.proj.weight": (width, 3, 14, 14),
        "encoder.patch_embed.proj.bias": (width,),
        "encoder.norm.weight": (width,),
        "encoder.norm.bias": (width,),
    }
    for i in range(12):
        shapes |= block(f"encoder.blocks.{i}")
        shapes |= {f"encoder.blocks.{i}.{scale}.gamma": (width,) for scale in ("ls1", "ls2")}
    shapes |= linear("bottleneck.0.fc1", width, 4 * width)
    shapes |= linear("bottleneck.0.fc2", 4 * width, width)
    for i in range(8):
        shapes |= block(f"decoder.{i}")
    return shapes


def rebuilt(size: str, seed: int, folder: Path) -> Any:
    """Our detector with the weights of an official checkpoint, through the converter."""
    official = from_official(fill_state(official_shapes(WIDTHS[size]), seed))
    assert official.encoder.name == f"vit_{size}_patch14_reg4_dinov2"
    path = folder / "encoder.safetensors"
    save_file(official.encoder_weights, path)
    config = replace(official.encoder, weights=str(path))
    with pytest.MonkeyPatch.context() as patch:  # drawing what is then overwritten takes seconds
        for module in (torch.nn.init, timm.models.vision_transformer):
            patch.setattr(module, "trunc_normal_", lambda t, *_, **__: t.data.fill_(torch.nan))
        detector = Dinomaly(DinomalyConfig(), FrozenEncoder(config), ("a",)).eval()
    path.unlink()
    left_out, unknown = detector.load_state_dict(official.weights, strict=False)
    assert not unknown and all(name.startswith(("encoder.", "references.")) for name in left_out)
    return detector


def position_embeddings(size: str, seed: int) -> dict[str, Tensor]:
    state = fill_state({"encoder.pos_embed": (1, 1370, WIDTHS[size])}, seed)
    grids = {"392": (28, 28), "280": (20, 20), "392x280": (28, 20)}
    return {
        f"pos_embed_{name}": dinov2_position_embedding(
            state["encoder.pos_embed"], *grid, num_prefix=1
        )
        for name, grid in grids.items()
    }


def answers(size: str, folder: Path, rates: Sequence[str]) -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden files' names."""
    detector = rebuilt(size, 0, folder)
    encoder = detector.encoder
    image = uniform("input:dinomaly", (2, 3, 392, 392)) * 2 * encoder.std + encoder.mean
    out: dict[str, Tensor] = position_embeddings(size, 0)

    def keep(name: str) -> Any:
        return lambda module, inputs, output: out.setdefault(name, output.detach())

    hooks = [
        encoder.backbone.blocks[0].register_forward_pre_hook(
            lambda module, inputs: out.setdefault("tokens", inputs[0].detach())
        ),
        encoder.backbone.blocks[2].register_forward_hook(keep("block2")),
        detector.bottleneck.register_forward_hook(keep("bottleneck")),
        detector.decoder[0].register_forward_hook(keep("decoder0")),
        detector.decoder[7].register_forward_hook(keep("decoder7")),
    ]
    with torch.no_grad():
        match = detector.match(image)
        detector.match = lambda *_: match  # what predict would ask for again
        prediction = detector.predict(image, map_size=(256, 256))
    for hook in hooks:
        hook.remove()

    layers = encoder.tokens(image)
    out["block9"] = layers[-1]
    for g, (query, template) in enumerate(zip(match.query, match.template, strict=True)):
        out[f"encoder_group{g}"], out[f"decoder_group{g}"] = query, template[:, 0]
        distance = cosine_distance(query, template[:, 0], dim=1)
        out[f"point_distance_sorted{g}"] = distance.flatten().sort(descending=True).values
    out["map_392"] = F.interpolate(match.host_map, 392, mode="bilinear", align_corners=True)
    out["map_256"], out["score"] = prediction.anomaly_map[:, 0], prediction.image_score

    groups = tuple(torch.stack(layers[i : i + 4]).mean(dim=0) for i in (0, 4))
    batch = TrainingBatch(groups, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    parameters = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    for rate in rates:
        detector.zero_grad()
        loss = detector.training_loss(batch, STEPS[rate])  # in eval mode, so without dropout
        loss.backward()
        out[f"loss_p{rate}"] = loss.detach()
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        assert len(gradients) == 100
        norms = torch.stack([g.norm() for g in gradients.values()])
        out[f"grad_norm_p{rate}"] = norms.norm()
        for name in GRADIENTS:
            ours = gradients[name.replace("bottleneck.0", "bottleneck")]
            out[f"grad_p{rate}:{name}"] = ours.clone()
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return answers("small", tmp_path_factory.mktemp("small"), tuple(STEPS))


@pytest.mark.parametrize("name", NUMBERS)
def test_dinomaly_golden_numbers(name: str, small: dict[str, Tensor]) -> None:
    stride, expected = NUMBERS[name]
    found = small[name].flatten()
    # Gradients pass through more float32 sums than the rest.
    allowed = (1e-4 if name.startswith("grad") else 2e-5) * found.abs().max().item()
    assert found[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


def assert_as_in_file(item: str, ours: dict[str, Tensor], *, left_out: Sequence[str] = ()) -> None:
    """Every output of a golden file but those that start with `left_out`."""
    facts = json.loads((GOLDEN / f"{item}.json").read_text())
    stored = np.load(GOLDEN / f"{item}.npz")
    for name, entry in facts["outputs"].items():
        if name.startswith(tuple(left_out)):
            continue
        full = ours[name].numpy()
        if "value" in entry:
            assert float(full) == pytest.approx(entry["value"], rel=entry["tol"]), name
            continue
        assert list(full.shape) == entry["shape"], name
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]].astype(np.float64)
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=entry["tol"]), name


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


@pytest.mark.shared
@shared
@pytest.mark.parametrize("size", WIDTHS)
def test_dinomaly_golden_names_are_the_official_ones(size: str) -> None:
    facts = json.loads((GOLDEN / f"dinomaly_{size}.json").read_text())
    official = facts["weights"]["model"]["shapes"]
    assert {k: list(v) for k, v in official_shapes(WIDTHS[size]).items()} == official
    assert facts["seed"] == 0


@pytest.mark.shared
@shared
def test_dinomaly_golden_small_file(small: dict[str, Tensor]) -> None:
    assert_as_in_file("dinomaly_small", small)


@pytest.mark.shared
@shared
def test_dinomaly_golden_base_file(tmp_path: Path) -> None:
    """One discard rate only: each costs seconds of backward pass."""
    rates = ("_p0:", "_p0.45:")
    ours = answers("base", tmp_path, ["0.9"])
    skipped = [f"{kind}{rate}" for kind in ("loss", "grad", "grad_norm") for rate in rates]
    assert_as_in_file("dinomaly_base", ours, left_out=[name.removesuffix(":") for name in skipped])


# The paper's network once more, plain and in float64


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def mlp(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def attention(x: Tensor, weights: dict[str, Tensor], name: str, *, softmax: bool) -> Tensor:
    """Heads of 64, in the N x N form both of them."""
    width = x.shape[-1]
    query, key, value = linear(x, weights, f"{name}.qkv").split(width, dim=-1)
    heads = []
    for i in range(0, width, 64):
        q, k, v = (t[..., i : i + 64] for t in (query, key, value))
        if softmax:
            weight = (q @ k.transpose(1, 2) / 8).exp()
        else:
            q, k = (torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in (q, k))
            weight = q @ k.transpose(1, 2)
        heads.append(weight / weight.sum(dim=-1, keepdim=True) @ v)
    return linear(torch.cat(heads, dim=-1), weights, f"{name}.proj")


def plain_forward(
    weights: dict[str, Tensor], x: Tensor, position: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Normalised pictures (B, 3, H, W) -> paired groups (B, P, C): encoder's, decoder's."""
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14)  # (B, 3, h, w, 14, 14)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    kernel = weights["encoder.patch_embed.proj.weight"].flatten(1)
    patches = patches @ kernel.T + weights["encoder.patch_embed.proj.bias"]
    count = len(x)
    cls = (weights["encoder.cls_token"] + position[:, :1]).expand(count, -1, -1)
    registers = weights["encoder.register_tokens"].expand(count, -1, -1)
    x = torch.cat([cls, registers, patches + position[:, 1:]], dim=1)

    layers = []
    for i in range(10):
        block = f"encoder.blocks.{i}"
        normal = layer_norm(x, weights, f"{block}.norm1", 1e-6)
        mixed = attention(normal, weights, f"{block}.attn", softmax=True)
        x = x + weights[f"{block}.ls1.gamma"] * mixed
        normal = layer_norm(x, weights, f"{block}.norm2", 1e-6)
        x = x + weights[f"{block}.ls2.gamma"] * mlp(normal, weights, f"{block}.mlp")
        layers.append(x)
    kept = layers[2:10]

    x = mlp(sum(kept[1:], kept[0]) / 8, weights, "bottleneck.0")
    decoded = []
    for i in range(8):
        block = f"decoder.{i}"
        normal = layer_norm(x, weights, f"{block}.norm1", 1e-8)
        x = x + attention(normal, weights, f"{block}.attn", softmax=False)
        x = x + mlp(layer_norm(x, weights, f"{block}.norm2", 1e-8), weights, f"{block}.mlp")
        decoded.append(x)

    def group(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).mean(dim=0)[:, PREFIX:]

    shallow, deep = group(kept[:4]), group(kept[4:])
    return [shallow, deep], [group(decoded[4:]), group(decoded[:4])]


def test_dinomaly_golden_for_another_seed(tmp_path: Path) -> None:
    """Weights nobody has golden answers for, not square; forward, loss and one gradient."""
    size, grid = (70, 126), (5, 9)
    detector = rebuilt("small", 1, tmp_path)
    encoder = detector.encoder
    pictures = uniform("input:dinomaly", (2, 3, *size), seed=1) * 2
    image = pictures * encoder.std + encoder.mean
    weights = {k: v.double() for k, v in fill_state(official_shapes(384), seed=1).items()}
    early = weights["decoder.0.mlp.fc2.weight"].requires_grad_()
    position = dinov2_position_embedding(weights["encoder.pos_embed"], *grid, num_prefix=1)
    targets, expected = plain_forward(weights, pictures.double(), position)

    match = detector.match(image)
    for ours, plain in zip(
        [*match.query, *(t[:, 0] for t in match.template)], [*targets, *expected], strict=True
    ):
        plain = plain.detach().transpose(1, 2).unflatten(2, grid)
        assert ours.shape == plain.shape
        assert (ours.detach() - plain).abs().max() < 2e-5 * plain.abs().max()

    # Loss at the end of the ramp: whole pictures' cosines, gradients shrunk by a hook.
    losses = []
    for target, group in zip(targets, expected, strict=True):
        points = 1 - (target * group).sum(2) / (target.norm(dim=2) * group.norm(dim=2))
        kept = max(1, int(points.numel() * (1 - 0.9)))
        threshold = points.flatten().sort(descending=True).values[kept - 1]
        shrink = torch.where(points < threshold, 0.1, 1.0).unsqueeze(2).detach()
        group.register_hook(lambda gradient, shrink=shrink: gradient * shrink)
        losses += [
            1 - (e * d).sum() / (e.norm() * d.norm()) for e, d in zip(target, group, strict=True)
        ]
    loss = torch.stack(losses).mean()
    loss.backward()
    batch = TrainingBatch(detector.encode(image), torch.zeros(2).long(), torch.arange(2))
    ours = detector.training_loss(batch, step=5000)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    ours.backward()
    gradient = detector.decoder[0].mlp["fc2"].weight.grad
    assert early.grad is not None
    assert (gradient - early.grad).abs().max() < 2e-4 * early.grad.abs().max()
