"""UniAS against the official network: neck, query, stages, rebuilt levels, loss, gradients, maps.

Weights and inputs follow from a written rule (fill.py). The first tests hold a few of the official
answers themselves, so they run anywhere; another goes through every number of the golden file, and
the last compares other weights with a network written out from the specification, in float64.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from b4 import b4_shapes
from fill import fill_state, uniform
from torch import Tensor, nn

import allgood
from allgood.detectors.unias import UniAS, UniASConfig, level_maps
from allgood.encoders.frozen import FrozenEncoder
from allgood.layers.tokens import to_map
from allgood.official.unias import from_official
from allgood.own_state import own_state
from allgood.scoring import gaussian_blur, visible_deviation
from allgood.types import InputError, TrainingBatch

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CHANNELS = (24, 32, 56, 160)
"""Of EfficientNet-B4's levels."""
GRADIENTS = {
    "predictor.spatial_query_feat.weight": "query.bank",
    "predictor.layer_adaptors.1.conv2.0.weight": "stages.1.local.branches.2.0.weight",
    "predictor.out_agg.1.3.weight": "heads.2.conv3.weight",
}

# fmt: off
# Name -> every n-th of all numbers, the first six.
NUMBERS = {
    "neck_res1": (1069187, (0.9585852, 0, 2.006924, 0, 0, 1.767883)),
    "stage3_tokens": (16637, (-0.4272853, -0.7232487, 0.1119175, 0.7392176, 0.4030806, 1.398829)),
    "query_initial": (
        16637, (0.1401262, -0.07657961, -0.003367733, 0.1462486, -0.1106062, -0.01447462),
    ),
    "stage3_mgg": (16637, (2.480831, 4.276096, -0.2283637, -0.0486953, 4.99122, 2.902981)),
    "reconstruction_stage0": (
        10449, (0.4484609, 1.879806, -1.068787, -0.5457824, 0.212892, 1.102245),
    ),
    "reconstruction_stage1": (
        14632, (0.09992243, 0.6831893, 0.563125, 0.385886, 0.1194286, 1.646405),
    ),
    "reconstruction_stage2": (
        33428, (0.05380686, 0.4725371, -0.8807319, -0.140384, 0.3749909, -1.539768),
    ),
    "reconstruction_stage3": (
        100205, (0.001839118, 1.935661, 0.3991993, -0.03615295, 0.9773588, 0.3856232),
    ),
    "map_224": (16683, (0.9590497, 1.100049, 1.066733, 1.042019, 0.9075034, 1.222775)),
    "score_max": (1, (1.874194, 1.897042)),
    "score_std": (1, (0.1797407, 0.1788636)),
    "recon_loss": (1, (5.207306861877441,)),
    "loss": (1, (52.07306671142578,)),
    "grad:sem_seg_head.predictor.out_agg.1.3.weight": (
        21449, (0.1021951, 0.03539186, -0.05842321, 0.156114, 0.005786083, 0.01694786),
    ),
}
# fmt: on


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
    channels: tuple[int, ...] = CHANNELS, width: int = 256, grid: int = 14, ffn: int = 2048
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict, without the backbone's."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, outputs: int, *inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    def attention(name: str, size: int) -> None:
        shapes[f"{name}.in_proj_weight"] = (3 * size, size)
        shapes[f"{name}.in_proj_bias"] = (3 * size,)
        layer(f"{name}.out_proj", size, size)

    def feed_forward(name: str, size: int) -> None:
        layer(f"{name}.linear1", ffn, size)
        layer(f"{name}.linear2", size, ffn)

    def local(name: str, inputs: int) -> None:
        layer(f"{name}.conv0", width, inputs, 1, 1)
        layer(f"{name}.conv1", width, inputs, 3, 3)
        for branch in (2, 3):
            for i in range(branch):
                layer(f"{name}.conv{branch}.{i}", width, width if i else inputs, 3, 3)

    neck, head = "pixel_decoder", "predictor"
    for i in (1, 2, 3):
        shapes[f"{neck}.adapter_{i}.weight"] = (width, 2 * channels[i - 1], 1, 1)
        layer(f"{neck}.adapter_{i}.norm", width)
        shapes[f"{neck}.layer_{i}.weight"] = (width, width, 3, 3)
        layer(f"{neck}.layer_{i}.norm", width)
        block = f"{neck}.transformer.encoder.layers.{i - 1}"
        attention(f"{block}.self_attn", width)
        feed_forward(block, width)
        layer(f"{block}.norm1", width)
        layer(f"{block}.norm2", width)
    layer(f"{neck}.input_proj", width, 2 * channels[3], 1, 1)
    shapes[f"{neck}.layer_4.weight"] = (width, width, 3, 3)
    for k, hidden in enumerate((width, width, width * 3 // 2, width * 2)):
        if k:
            layer(f"{head}.patch_embed.{k}.proj", hidden, width, 2**k, 2**k)
        layer(f"{head}.input_proj.{k}", width, hidden, 1, 1)
        for kind, size in (("Spatial", width), ("Channel", grid**2)):
            block = f"{head}.transformer_block.{k}.{kind}"
            for part, inner in (("SelfAttn", "self_attn"), ("CrossAttn", "multihead_attn")):
                attention(f"{block}{part}Layer.{inner}", size)
                layer(f"{block}{part}Layer.norm", size)
            feed_forward(f"{block}FFNLayer", size)
            layer(f"{block}FFNLayer.norm", size)
        local(f"{head}.layer_adaptors.{k}", width)
        for i, outputs in ((1, width), (2, width), (3, channels[3 - k])):
            layer(f"{head}.out_agg.{k}.{i}", outputs, width, 3, 3)
    shapes[f"{head}.spatial_query_feat.weight"] = (2 * grid**2, width)
    shapes[f"{head}.spatial_query_embed.weight"] = (grid**2, width)
    shapes[f"{head}.level_embed_src.weight"] = (4, width)
    layer(f"{head}.decoder_norm", width)
    layer(f"{head}.feature_projector", width, width, 3, 3)
    query = f"{head}.query_processor"
    for i, (outputs, inputs) in enumerate(((1, 2), (1, 1), (2, 1))):
        weight = (outputs * width // 2, inputs * width // 2)
        layer(f"{query}.channel_weight.agg.layers.{i}", *weight)
    layer(f"{query}.spatial_weight.conv", 1, 2, 7, 7)
    local(f"{query}.adaptor", 2 * width)
    return {f"sem_seg_head.{name}": shape for name, shape in shapes.items()}


def given_levels(channels: tuple[int, ...] = CHANNELS, grid: int = 14, seed: int = 0) -> Any:
    return [
        uniform(f"input:unias:level{i}", (2, c, grid * 16 // 2**i, grid * 16 // 2**i), seed) * 4
        for i, c in enumerate(channels, start=1)
    ]


def official_detector(
    shapes: dict[str, tuple[int, ...]], levels: list[Tensor], seed: int = 0, **settings: Any
) -> UniAS:
    """Our detector with an official checkpoint's weights, through the converter."""
    state = fill_state(shapes, seed)
    official = from_official({"state_dict": {f"module.{k}": v for k, v in state.items()}})
    with pytest.MonkeyPatch.context() as patch:  # drawing what is then overwritten takes seconds
        for name in ("xavier_uniform_", "kaiming_uniform_", "uniform_"):
            patch.setattr(nn.init, name, lambda t, *_, **__: t.data.fill_(torch.nan))
        config = replace(official.config, **settings)
        detector = UniAS(config, Levels(levels), ("part",)).eval()
    left_out, unknown = detector.load_state_dict(official.weights, strict=False)
    assert not unknown and all(name.startswith("references.") for name in left_out)
    return detector


def listen(detector: UniAS, out: dict[str, Tensor]) -> None:
    """Fill `out` with what the parts answer, under the golden file's names."""

    def keep(name: str, form: Any = lambda output: output) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            out.setdefault(name, form(output.detach()))

        return hook

    def swapped(output: Tensor) -> Tensor:
        return output.transpose(0, 1)  # the reference has the tokens first

    def keep_gates(*_: Any) -> None:
        out.setdefault("query_channel_weight", (pooled[0] + pooled[1]).detach().sigmoid())

    decoder, grid = detector.decoder, (detector.config.grid,) * 2
    query: Any = decoder.query
    detector.neck.encoder[2].register_forward_hook(
        keep("neck_transformer", lambda tokens: to_map(tokens, grid))
    )
    detector.neck.register_forward_hook(
        lambda module, inputs, maps: out.update(
            {f"neck_res{i}": level.detach() for i, level in enumerate(maps, start=1)}
        )
    )
    query.register_forward_hook(keep("query_initial", swapped))
    query.project.register_forward_hook(keep("query_projected"))
    query.spatial.register_forward_hook(keep("query_spatial_weight", torch.sigmoid))
    pooled: list[Tensor] = []
    query.channel.register_forward_hook(lambda *call: pooled.append(call[2]))
    query.mix.register_forward_hook(keep_gates)
    for k in range(4):
        stage: Any = decoder.stages[k]
        decoder.patches[3 - k].register_forward_hook(keep(f"stage{k}_tokens"))
        stage.spatial.norm.register_forward_hook(keep(f"stage{k}_spatial_cross", swapped))
        stage.channel.register_forward_hook(keep(f"stage{k}_channel_ffn", swapped))
        stage.local.register_forward_hook(keep(f"stage{k}_mgg"))
        before = keep(f"stage{k}_attention", lambda x: x.flatten(2).permute(2, 0, 1))
        stage.local.register_forward_pre_hook(
            lambda module, inputs, before=before: before(module, (), inputs[0])
        )


@pytest.fixture(scope="module")
def answers() -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden file's names."""
    levels, image = given_levels(), torch.empty(2, 3, 224, 224)
    detector = official_detector(official_shapes(), levels, loss="reference", loss_weight=10.0)
    out: dict[str, Tensor] = {}
    listen(detector, out)
    with torch.no_grad():
        match = detector.match(image)
        prediction = detector.predict(image)
    for i, (raw, target) in enumerate(zip(levels, match.query, strict=True), start=1):
        out[f"target{i}"], out[f"input{i}"] = target, torch.cat([target, raw - target], dim=1)
    maps = level_maps(match.query, [template[:, 0] for template in match.template])
    for k in range(4):
        out[f"reconstruction_stage{k}"] = match.template[3 - k][:, 0]
        detector.config = replace(detector.config, map_levels=(4 - k,))
        out[f"map_stage{k}"] = detector.fuse(maps)[:, 0]
    out["map_224"], out["score_max"] = prediction.anomaly_map, prediction.image_score
    out["score_std"] = visible_deviation(prediction.anomaly_map, None)
    impulse = F.pad(torch.ones(1, 1, 1, 1), (7, 7, 7, 7))
    for size in (3, 5, 7, 9):
        out[f"gaussian_{size}"] = gaussian_blur(impulse, size, size / 3)
    hidden = ~detector.decoder.mask
    out["attention_mask_row_sums"] = hidden.sum(dim=1).float()
    out["attention_mask_rows_0_105_195"] = hidden[[0, 105, 195]].float()
    out["sine_position"] = detector.position.T.view(1, 256, 14, 14)

    batch = TrainingBatch(tuple(levels), torch.zeros(2).long(), torch.arange(2))
    loss = detector.training_loss(batch, 0)  # in eval mode, so without dropout and jitter
    loss.backward()
    out["loss"], out["recon_loss"] = loss.detach(), loss.detach() / 10
    parameters = dict(detector.named_parameters())
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    for theirs, ours in GRADIENTS.items():
        gradient = parameters[f"decoder.{ours}"].grad
        out[f"grad:sem_seg_head.{theirs}"] = gradient.flatten(0, 1) if "bank" in ours else gradient
    out["grad:sem_seg_head.pixel_decoder.adapter_2.weight"] = parameters[
        "neck.lateral.1.0.weight"
    ].grad
    return out


@pytest.mark.parametrize("name", NUMBERS)
def test_unias_golden_numbers(name: str, answers: dict[str, Tensor]) -> None:
    stride, expected = NUMBERS[name]
    found = answers[name].flatten()
    allowed = 5e-5 * found.abs().max().item()
    assert found[::stride][:6].tolist() == pytest.approx(expected, abs=allowed, rel=0)


shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")


@pytest.mark.shared
@shared
def test_unias_golden_file(answers: dict[str, Tensor]) -> None:
    facts = json.loads((GOLDEN / "unias.json").read_text())
    official = facts["weights"]["model"]["shapes"]
    assert {name: list(shape) for name, shape in official_shapes().items()} == official
    stored = np.load(GOLDEN / "unias.npz")
    assert facts["seed"] == 0 and set(facts["outputs"]) == set(answers)
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
        assert norm == pytest.approx(entry["norm"], rel=max(entry["tol"], 1e-6)), name


def test_unias_golden_checkpoint_with_and_without_backbone() -> None:
    shapes = official_shapes((3, 4, 5, 6), width=32, grid=4, ffn=8)
    state = fill_state(shapes)
    plain = from_official(state)
    assert plain.config == UniASConfig(grid=4, width=32, ffn=8)
    assert plain.encoder_weights is None and plain.encoder.reference_padding
    assert plain.image_size == 64

    backbone = {name: torch.zeros(shape) for name, shape in b4_shapes("backbone.").items()}
    wrapped = {f"module.{k}": v for k, v in (state | backbone).items()}
    whole = from_official({"state_dict": wrapped, "epoch": 1000, "arch": "unias"})
    assert whole.encoder_weights is not None
    assert set(whole.encoder_weights) >= {"conv_stem.weight", "blocks.2.0.conv_dw.weight"}
    assert all(torch.equal(whole.weights[name], plain.weights[name]) for name in plain.weights)

    spatial = {name: tensor for name, tensor in state.items() if ".Channel" not in name}
    assert not from_official(spatial).config.channel_attention  # as the authors trained VisA


def test_unias_golden_checkpoints_that_are_something_else() -> None:
    state = fill_state(official_shapes((3, 4, 5, 6), width=32, grid=4, ffn=8))
    with pytest.raises(InputError, match=r"'sem_seg_head.predictor.extra' is no part of an"):
        from_official(state | {"sem_seg_head.predictor.extra": torch.zeros(1)})
    with pytest.raises(InputError, match=r"'decoder_norm.weight' is no part of an official UniAS"):
        from_official({"decoder_norm.weight": torch.zeros(1)})
    bank = "sem_seg_head.predictor.spatial_query_feat.weight"
    with pytest.raises(InputError, match=f"it lacks '{bank}'"):
        from_official({name: tensor for name, tensor in state.items() if name != bank})
    for wrong in (torch.zeros(32), torch.zeros(32, 32, 2), torch.zeros(0, 32)):
        with pytest.raises(InputError, match=f"its '{bank}' is .* and should have 2 axes"):
            from_official(state | {bank: wrong})
    with pytest.raises(InputError, match="30 queries is not two of a square grid"):
        from_official(state | {bank: torch.zeros(30, 32)})


# The network once more, plain and in float64, for the official names


class Plain:
    """Operations on the official weights, as the specification writes them."""

    def __init__(self, weights: dict[str, Tensor], grid: int) -> None:
        self.weights = {k.removeprefix("sem_seg_head."): v.double() for k, v in weights.items()}
        self.grid = grid
        row = torch.arange(grid).repeat_interleave(grid)
        column = torch.arange(grid).repeat(grid)
        far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
        self.hidden = far <= 3
        self.position = self.sine()

    def sine(self) -> Tensor:
        """(N, D), entry by entry."""
        half = self.weights["predictor.decoder_norm.weight"].shape[0] // 2
        table = torch.zeros(self.grid, self.grid, 2 * half, dtype=torch.float64)
        for y in range(self.grid):
            for x in range(self.grid):
                for m in range(half):
                    wave = math.cos if m % 2 else math.sin
                    slow = 10000 ** (-2 * (m // 2) / half) * 2 * math.pi / (self.grid + 1e-6)
                    table[y, x, m] = wave((y + 1) * slow)
                    table[y, x, half + m] = wave((x + 1) * slow)
        return table.flatten(0, 1)

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = 0 if stride > 1 else weight.shape[-1] // 2
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), padding=padding, stride=stride)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        unit = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        centred = groups - groups.mean(dim=2, keepdim=True)
        unit = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return unit.view_as(x) * scale[:, None, None] + shift[:, None, None]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, name: str, hidden: Tensor | None = None
    ) -> Tensor:
        width = query.shape[-1]
        matrices = self.weights[f"{name}.in_proj_weight"].split(width)
        biases = self.weights[f"{name}.in_proj_bias"].split(width)
        q, k, v = (
            x @ matrix.T + bias
            for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
        )
        heads, size = [], width // 4
        for i in range(0, width, size):
            score = q[..., i : i + size] @ k[..., i : i + size].transpose(1, 2) / size**0.5
            if hidden is not None:
                score = score.masked_fill(hidden, -math.inf)
            heads.append(score.softmax(dim=-1) @ v[..., i : i + size])
        return self.linear(torch.cat(heads, dim=-1), f"{name}.out_proj")

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        return self.linear(self.linear(x, f"{name}.linear1").clamp(min=0), f"{name}.linear2")

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def map(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def neck(self, inputs: list[Tensor]) -> list[Tensor]:
        x = self.tokens(self.conv(inputs[3], "pixel_decoder.input_proj"))
        for i in range(3):
            name = f"pixel_decoder.transformer.encoder.layers.{i}"
            where = x + self.position
            x = self.norm(x + self.attention(where, where, x, f"{name}.self_attn"), f"{name}.norm1")
            x = self.norm(x + self.feed_forward(x, name), f"{name}.norm2")
        maps = {4: self.conv(self.map(x), "pixel_decoder.layer_4").clamp(min=0)}
        for i in (3, 2, 1):
            name = f"pixel_decoder.adapter_{i}"
            lateral = self.group_norm(self.conv(inputs[i - 1], name), f"{name}.norm")
            size = lateral.shape[-2:]
            x = lateral + F.interpolate(maps[i + 1], size, mode="bilinear", align_corners=False)
            name = f"pixel_decoder.layer_{i}"
            maps[i] = self.group_norm(self.conv(x, name), f"{name}.norm").clamp(min=0)
        return [maps[i] for i in (1, 2, 3, 4)]

    def granularity(self, x: Tensor, name: str) -> Tensor:
        total = 0
        for branch, depth in (("conv0", 0), ("conv1", 0), ("conv2", 2), ("conv3", 3)):
            y = x if depth else self.conv(x, f"{name}.{branch}")
            for i in range(depth):
                y = self.conv(y, f"{name}.{branch}.{i}")
            total = total + y * (1 + torch.erf(y / 2**0.5)) / 2
        return total

    def query(self, top: Tensor) -> Tensor:
        name = "predictor.query_processor"
        f = self.conv(top, "predictor.feature_projector")
        gate = 0
        for pooled in (f.mean(dim=(2, 3)), f.amax(dim=(2, 3))):
            y = pooled
            for i in range(3):
                y = self.linear(y, f"{name}.channel_weight.agg.layers.{i}")
                y = y.clamp(min=0) if i < 2 else y
            gate = gate + y
        a = gate.sigmoid()
        s = self.conv(
            torch.stack([f.mean(dim=1), f.amax(dim=1)], dim=1), f"{name}.spatial_weight.conv"
        ).sigmoid()
        count = self.grid**2
        bank = self.weights["predictor.spatial_query_feat.weight"]
        channels = []
        for c in range(bank.shape[1]):
            for r in range(2):
                entry = bank[r * count : (r + 1) * count, c].view(self.grid, self.grid)
                channels.append(entry * a[:, c, None, None] + entry * s[:, 0])
        return self.tokens(self.granularity(torch.stack(channels, dim=1), f"{name}.adaptor"))

    def stage(self, q: Tensor, h: Tensor, k: int) -> Tensor:
        name, e = f"predictor.transformer_block.{k}", self.weights
        e = self.weights["predictor.spatial_query_embed.weight"]
        cross, own = "CrossAttnLayer.multihead_attn", "SelfAttnLayer.self_attn"
        x = self.attention(q + e, h + self.position, h, f"{name}.Spatial{cross}", self.hidden)
        x = self.norm(q + x, f"{name}.SpatialCrossAttnLayer.norm")
        y = self.attention(x + e, x + e, x, f"{name}.Spatial{own}", self.hidden)
        x = self.norm(x + y, f"{name}.SpatialSelfAttnLayer.norm")
        y = self.feed_forward(x, f"{name}.SpatialFFNLayer")
        x = self.norm(x + y, f"{name}.SpatialFFNLayer.norm")
        qt, ht = q.transpose(1, 2), h.transpose(1, 2)
        c = self.attention(qt, ht + self.position.T, ht, f"{name}.Channel{cross}")
        c = self.norm(qt + c, f"{name}.ChannelCrossAttnLayer.norm")
        c = self.norm(
            c + self.attention(c, c, c, f"{name}.Channel{own}"), f"{name}.ChannelSelfAttnLayer.norm"
        )
        y = self.feed_forward(c, f"{name}.ChannelFFNLayer")
        c = self.norm(c + y, f"{name}.ChannelFFNLayer.norm")
        mixed = self.map(x + c.transpose(1, 2))
        return self.tokens(self.granularity(mixed, f"predictor.layer_adaptors.{k}"))

    def rebuilt(self, levels: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
        inputs = [torch.cat([z, f - z], dim=1) for f, z in zip(levels, targets, strict=True)]
        maps = self.neck(inputs)
        q, out = self.query(maps[3]), []
        for k in range(4):
            x = maps[3 - k]
            if k:
                x = self.conv(x, f"predictor.patch_embed.{k}.proj", stride=2**k)
            h = self.tokens(self.conv(x, f"predictor.input_proj.{k}"))
            q = self.stage(q, h + self.weights["predictor.level_embed_src.weight"][k], k)
            x = self.map(self.norm(q, "predictor.decoder_norm"))
            side = self.grid * 2**k
            x = F.interpolate(x, (side, side), mode="bilinear", align_corners=True)
            for i in (1, 2, 3):
                x = self.conv(x, f"predictor.out_agg.{k}.{i}")
            out.insert(0, x)
        return out


def plain_gaussian(x: Tensor, size: int, sigma: float) -> Tensor:
    """Tap by tap."""
    radius = size // 2
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    offsets = range(-radius, radius + 1)
    weight = {
        (dy, dx): math.exp(-(dy * dy + dx * dx) / 2 / sigma**2) for dy in offsets for dx in offsets
    }
    height, width = x.shape[-2:]
    total = torch.zeros_like(x)
    for (dy, dx), w in weight.items():
        rows = slice(radius + dy, radius + dy + height)
        total += w * padded[..., rows, radius + dx : radius + dx + width]
    return total / sum(weight.values())


@pytest.mark.parametrize("fusion", ["reference", "paper"])
@pytest.mark.parametrize("loss", ["cosine", "reference"])
def test_unias_golden_for_another_seed(loss: str, fusion: str) -> None:
    """Weights nobody has golden answers for: levels, map, score, loss and one gradient."""
    channels, grid, seed = (5, 6, 7, 8), 8, 1
    shapes = official_shapes(channels, width=32, grid=grid, ffn=24)
    levels = given_levels(channels, grid, seed)
    detector = official_detector(shapes, levels, seed, loss=loss, fusion=fusion)
    plain = Plain(fill_state(shapes, seed), grid)
    early = plain.weights["pixel_decoder.input_proj.weight"].requires_grad_()
    doubles = [level.double() for level in levels]
    targets = [plain_gaussian(level, 3, 1.0) for level in doubles]
    expected = plain.rebuilt(doubles, targets)

    side = 16 * grid
    image = torch.empty(2, 3, side, side)
    with torch.no_grad():
        match, prediction = detector.match(image), detector.predict(image)
    for ours, theirs in zip(match.template, expected, strict=True):
        assert (ours[:, 0] - theirs).abs().max() < 2e-5 * theirs.abs().max()

    product, total = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, (z, r) in enumerate(zip(targets, expected, strict=True)):
        cosine = (z * r).sum(dim=1, keepdim=True) / (
            z.norm(dim=1, keepdim=True) * r.norm(dim=1, keepdim=True)
        )
        total = total + (z - r).square().mean()
        total = total + (cosine.mean() if loss == "reference" else (1 - cosine).mean())
        half = side // 2 if fusion == "reference" else side
        distance = F.interpolate(1 - cosine, (half, half), mode="bilinear", align_corners=False)
        size = 9 - 2 * i
        if fusion == "reference":
            distance = plain_gaussian(distance, size, size / 3)
        product = product * distance
    whole = F.interpolate(product, (side, side), mode="bilinear", align_corners=True)
    assert (match.host_map - product).abs().max() < 2e-5 * product.abs().max()
    assert (prediction.anomaly_map - whole).abs().max() < 2e-5 * whole.abs().max()
    torch.testing.assert_close(
        prediction.image_score, whole.amax(dim=(1, 2, 3)).float(), rtol=2e-5, atol=0
    )

    batch = TrainingBatch(tuple(levels), torch.zeros(2).long(), torch.arange(2))
    ours = detector.training_loss(batch, 0)
    assert ours.item() == pytest.approx(total.item(), rel=1e-5)
    ours.backward()
    total.backward()
    gradient = detector.neck.project.weight.grad
    assert gradient is not None and early.grad is not None
    assert (gradient - early.grad).abs().max() < 1e-3 * early.grad.abs().max()


def test_unias_golden_checkpoint_becomes_a_run(tmp_path: Path) -> None:
    state = fill_state(official_shapes(width=32, grid=8, ffn=8) | b4_shapes("backbone."))
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1000}, file)
    run = allgood.convert("unias", file, out=tmp_path / "run", categories=("cable", "pill"))
    detector = allgood.Inspector(run).detector
    assert detector.encoder.config.reference_padding and detector.side == 128
    official = from_official(state)
    for name, tensor in own_state(detector).items():
        if not name.startswith("references."):
            assert torch.equal(tensor, official.weights[name]), name
    with torch.inference_mode():
        prediction = detector.predict(torch.rand(1, 3, 128, 128), torch.tensor([1]))
    assert prediction.anomaly_map.shape == (1, 1, 128, 128)
