"""CostFilter against the official code: volumes, guidance, maps, losses, and three whole networks.

Weights and inputs follow from a written rule (fill.py). The first tests hold a few of the official
answers themselves, so they run anywhere; the others go through every number of the golden files.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill, uniform
from torch import Tensor

from allgood.costfilter.losses import (
    filter_loss,
    focal_gamma,
    focal_loss,
    soft_iou_loss,
    ssim_loss,
)
from allgood.costfilter.network import (
    CostFilterNetwork,
    NetworkConfig,
    anomaly_probability,
)
from allgood.costfilter.volume import (
    VolumeConfig,
    compare,
    cost_volume,
    initial_map,
    resize_aligned,
    spread_over_stages,
)
from allgood.official.costfilter import official_name, renamed
from allgood.scoring import gaussian_kernel, top_fraction_mean
from allgood.types import InputError

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
shared = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")
HVQ_CHANNELS = (24, 32, 56, 160)
NETWORKS = {
    "dinomaly": (NetworkConfig(768, 2, (768,) * 4, 2, classes=15), 28, 392),
    "hvq": (NetworkConfig(196, 4, HVQ_CHANNELS, 4, classes=15), 14, 224),
    "glad": (NetworkConfig(1024, 4, (768,) * 4, 4, classes=15, stem=384), 32, 256),
}
"""The official networks; side of the guidance, side of the map."""
UNUSED = {
    "decoder_segment.conv2.weight": (2, 48, 1, 3, 3),
    "decoder_segment.conv2.bias": (2,),
}

# fmt: off
# name -> every n-th of the stored numbers, the first six.
NETWORK_NUMBERS = {
    "stem": (6299, (0.0273722, 0.03482774, 0.0, 0.1078934, 0.0, 0.0)),
    "fused1": (3163, (0.0, 0.5927444, 0.6149837, 0.2895299, 0.0, 0.4569526)),
    "guide_spatial6": (101, (0.06898011, 0.0, 0.1323879, 0.0, 0.0, 0.0)),
    "decoder4": (3163, (0.0, 0.07131547, 0.0, 0.0, 0.0, 0.0)),
    "depth_collapsed": (
        787, (0.37386, -0.004377509, -0.09443682, 0.02564255, 0.01341101, 0.05758698),
    ),
    "logits": (5, (-0.3154155, -0.4115604, -0.3363222, -0.3765579, -0.4095252, -0.3846754)),
    "class_logits": (1, (-0.06982272, -0.3639983, -0.1673429, -0.2260637, 0.316351, -0.1797408)),
    "map": (29, (0.5084029, 0.5033619, 0.4979912, 0.4927675, 0.5007334, 0.4974298)),
}
VOLUME_NUMBERS = {
    "dinomaly:volume": (3163, (0.8503286, 1.066393, 1.024207, 0.8791895, 1.07481, 1.026334)),
    "hvq_ot:training:matching": (
        11, (0.1709357, 0.1304118, 0.1102671, 0.1454184, 0.08957107, 0.1347439),
    ),
    "glad:matching_template0": (
        11, (0.4043295, 0.3435205, 0.4351019, 0.4048332, 0.3740462, 0.3270078),
    ),
    "glad:volume_template2": (8389, (0.7565024, 0.86828, 1.202072, 0.9130805, 1.223371, 0.9892192)),
    "glad:bottle:score": (1, (0.6159336, 0.6166863)),
}
LOSS_NUMBERS = {
    "dinomaly:total": (1, (1.7601255178451538,)),
    "glad:total": (1, (1.773090124130249,)),
    "ssim": (1, (0.9699048399925232,)),
    "iou": (1, (0.8229406476020813,)),
    "dinomaly:gamma": (1, (1.5, 1.921546, 3.5, 1.5)),
    "dinomaly:focal_per_image": (1, (0.5375046, 0.4691264, 0.23227, 0.4530388)),
    "glad:grad_logits": (
        1, (0.000274318, 0.0001105679, 0.0005961056, 0.0001071963, -0.0001904612, -8.376243e-05),
    ),
    "dinomaly:grad_classes": (
        1, (0.006422913, 0.001305128, 0.0001840903, 0.002179331, -0.08037096, 0.001020907),
    ),
}
# fmt: on


def given(item: str, name: str, shape: tuple[int, ...], scale: float, offset: float = 0) -> Tensor:
    return uniform(f"input:costfilter_{item}:{name}", shape) * scale + offset


@lru_cache(maxsize=1000)
def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Most of the three networks' parameters agree in name and shape, and so in value."""
    return fill(name, shape)


def official_state(config: NetworkConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        ours = CostFilterNetwork(config).state_dict()
    shapes = {official_name(name): tuple(value.shape) for name, value in ours.items()}
    return {name: weight(name, shape) for name, shape in (shapes | UNUSED).items()}


@lru_cache(maxsize=1)
def network_answers(host: str) -> dict[str, Tensor]:
    """What our network says where the official one was asked, under the golden file's names."""
    config, grid, size = NETWORKS[host]
    with torch.device("meta"):
        network = CostFilterNetwork(config).eval()
    network.load_state_dict(renamed(network, official_state(config)), assign=True)
    out: dict[str, Tensor] = {}

    def keep(module: Any, name: str) -> None:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            out[name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    keep(network.stem2, "stem")
    for i in (1, 2, 5):
        keep(network.encoder[i - 1], f"block{i}")
    for s, i in enumerate((1, 3, 4, 6)):
        keep(network.spatial[s], f"guide_spatial{i}")
        keep(network.fuse[s], f"fused{i}")
    keep(network.matching[0], "guide_matching1")
    keep(network.bridge, "bridge")
    for i in range(4):
        keep(network.decoder[i], f"decoder{i + 1}")
    keep(network.collapse_attention, "depth_collapsed")

    levels = 2 if host == "dinomaly" else 4
    volume = given(host, "volume", (2, config.channels, config.levels, 64, 64), 0.5, 0.5)
    tokens = [
        given(host, f"guidance{i}", (2, grid * grid, config.guidance[i * 4 // levels]), 1)
        for i in range(levels)
    ]
    sg = spread_over_stages([t.transpose(1, 2).unflatten(2, (grid, grid)) for t in tokens])
    mg = given(host, "matching", (2, config.levels, 64, 64), 0.5, 0.5)
    with torch.no_grad():
        out["logits"], classes = network(volume, sg, mg, with_classes=True)
    assert classes is not None
    out["class_logits"] = classes
    out["probability_64"] = anomaly_probability(out["logits"])
    out["map"] = resize_aligned(out["probability_64"], (size, size))
    return out


def dinomaly_volume_answers() -> dict[str, Tensor]:
    shape = (2, 32, 28, 28)
    encoder = [given("volume", f"dinomaly:encoder{i}", shape, 1) for i in range(2)]
    decoder = [
        given("volume", f"dinomaly:decoder{i}", shape, 1) + 0.5 * e for i, e in enumerate(encoder)
    ]
    config = VolumeConfig((28, 28), top_k=768, orientation="reference")
    volume = cost_volume(compare(encoder, [d.unsqueeze(1) for d in decoder], config))
    host = torch.stack(
        [1 - F.cosine_similarity(e, d, dim=1) for e, d in zip(encoder, decoder, strict=True)]
    ).mean(dim=0)[:, None]
    host_392 = resize_aligned(host, (392, 392))
    matching = resize_aligned(host_392, (64, 64)).expand(-1, 2, -1, -1)
    probability = anomaly_probability(given("volume", "dinomaly:logits", (2, 2, 64, 64), 3))
    fused = 0.05 * resize_aligned(probability, (392, 392)) + 0.95 * host_392
    return {
        "dinomaly:volume": resize_aligned(volume, (64, 64)),
        "dinomaly:matching": matching,
        "dinomaly:guidance0": spread_over_stages(encoder)[0].flatten(2).transpose(1, 2),
        "dinomaly:host_map_28": host,
        "dinomaly:matching_training": resize_aligned(host, (64, 64)),
        "dinomaly:fused_map": fused[:, 0],
        "dinomaly:score": top_fraction_mean(fused, 0.01),
    }


def hvq_volume_answers() -> dict[str, Tensor]:
    org = given("volume", "hvq:org", (2, 272, 14, 14), 1)
    rec = given("volume", "hvq:rec", (2, 272, 14, 14), 1) + 0.5 * org
    ot = given("volume", "hvq:ot", (2, 196), 0.5, 1).view(2, 1, 14, 14)
    query, rebuilt = org.split(HVQ_CHANNELS, dim=1), rec.split(HVQ_CHANNELS, dim=1)
    comparison = compare(query, [t.unsqueeze(1) for t in rebuilt], VolumeConfig((14, 14)))
    least = resize_aligned(initial_map(comparison), (64, 64))
    distance = (rec - org).norm(dim=1, keepdim=True)

    def matching(host: Tensor, *, of_host: float = 1, of_both: float = 1) -> Tensor:
        first = least.mean(dim=1, keepdim=True) + 0.1 * resize_aligned(host, (64, 64)) / of_host
        return torch.cat([first / of_both, least[:, 1:]], dim=1)

    with_ot = distance + 80 * ot
    return {
        "hvq_ot:training:matching": matching(with_ot, of_both=70),
        "hvq_ot:training:volume": resize_aligned(cost_volume(comparison), (64, 64)),
        "hvq_ot:training:guidance3": rebuilt[3].flatten(2).transpose(1, 2),
        "hvq_ot:test:matching": matching(with_ot, of_both=40)[:1],
        "hvq_ot:test:pred_224": resize_aligned(with_ot[:1], (224, 224)),
        "hvq_no_ot:training:matching": matching(distance, of_host=170),
        "hvq_no_ot:test:pred_224": resize_aligned(distance[:1], (224, 224)),
        "hvq_no_ot:test:matching": matching(distance, of_host=170)[:1],
    }


def smoothed(host: Tensor) -> Tensor:
    """The official sigma 6 on 49 pixels, mirrored without repeating the edge."""
    kernel = gaussian_kernel(6.0, radius=24).float()
    padded = F.pad(host, (24, 24, 24, 24), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def glad_volume_answers() -> dict[str, Tensor]:
    tokens = [given("volume", f"glad:layer{i}", (8, 1025, 24), 1) for i in range(4)]
    query, template = [], []
    for level in tokens:
        level = level[:, 1:].transpose(1, 2).unflatten(2, (32, 32))
        query.append(level[:2])
        rows = level[2:].unflatten(0, (3, 2)) + 0.5 * level[:2]
        template.append(rows.transpose(0, 1))  # (B, N, C, h, w)
    out = {"glad:guidance3": query[3].flatten(2).transpose(1, 2)}
    looped = compare(query, template, VolumeConfig((32, 32), 3, merge="loop_mean"))
    least = initial_map(looped).unflatten(0, (2, 3))
    for n in range(3):
        out[f"glad:matching_template{n}"] = resize_aligned(least[:, n], (64, 64))
    concat = cost_volume(compare(query, template, VolumeConfig((32, 32), 3)))
    for n in (0, 2):
        volume = concat.unflatten(1, (3, 1024))[:, n]
        out[f"glad:volume_template{n}"] = resize_aligned(volume, (64, 64))

    final = [t[:, 2:] for t in template]
    backwards = initial_map(compare(query, final, VolumeConfig((32, 32), orientation="reference")))
    probability = anomaly_probability(given("volume", "glad:logits", (2, 2, 64, 64), 3))
    probability = resize_aligned(probability, (256, 256))
    mask = uniform("mask:costfilter_volume:glad:object", (2, 1, 4, 4)) > -0.5
    part = mask.float().repeat_interleave(64, dim=2).repeat_interleave(64, dim=3)
    for category, host in {
        "bottle": least[:, 2],
        "transistor": (least[:, 2] + backwards) / 2,
    }.items():
        smooth = resize_aligned(host.mean(dim=1, keepdim=True), (256, 256))
        smooth = smoothed(smooth)
        fused = (0.4 * probability + 0.6 * smooth) * part
        out[f"glad:{category}:fused_map"] = fused[:, 0]
        out[f"glad:{category}:score"] = fused.flatten(1).topk(250).values.mean(dim=1)
    return out


def loss_answers() -> dict[str, Tensor]:
    order = (
        *("hazelnut", "capsule", "grid", "carpet", "leather", "tile", "wood", "bottle"),
        *("cable", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper"),
    )
    hard_names = ("hazelnut", "capsule", "wood", "cable", "pill", "screw", "transistor", "zipper")
    hard = tuple(order.index(name) for name in hard_names)
    factor = torch.tensor([3, 1.2, 0.5, 2])[:, None]
    classes = (given("losses", "classes", (4, 15), 1) * factor).requires_grad_()
    logits = given("losses", "logits", (4, 2, 16, 16), 3).requires_grad_()
    category = classes.argmax(dim=1)
    category[2] = (category[2] + 1) % 15
    mask = uniform("mask:costfilter_losses", (4, 1, 8, 8)) > 0.4
    mask = mask.repeat_interleave(6, dim=2).repeat_interleave(6, dim=3)
    mask[1] = False
    y = mask.float()
    probability = resize_aligned(logits.softmax(dim=1), (48, 48))
    p = probability[:, 1:]
    out = {
        "ssim": ssim_loss(p, y),
        "mse": F.mse_loss(p, y),
        "iou": soft_iou_loss(p, y),
        "ce": F.cross_entropy(classes, category),
        "iou_all_normal": soft_iou_loss(p, torch.zeros_like(y)),
        "ssim_loss_per_image": 1
        - torch.stack([ssim_loss(a, b) for a, b in zip(p[:, None], y[:, None], strict=True)]),
    }
    for power in (0, 2, 3.5):
        out[f"focal_gamma{power}"] = focal_loss(probability, y, torch.full((4,), float(power)))
    rows = torch.arange(90)
    cases = given("losses", "gamma", (90, 15), 0.4)
    cases[rows, rows % 15] += torch.tensor([0.2, 1.0, 2.5])[rows % 3]
    labels = torch.where(rows < 45, cases.argmax(dim=1), 7 * rows % 15)
    for host, hard_classes, ssim in (("dinomaly", (), 0.1), ("glad", hard, 0.2)):
        gamma = focal_gamma(classes, category, "reference", hard_classes)
        focal = focal_loss(probability, y, gamma)
        total = filter_loss(
            *(logits, classes, mask, category),
            gamma="reference",
            ssim=ssim,
            hard_classes=hard_classes,
        )
        gradients = torch.autograd.grad(total, (logits, classes), retain_graph=True)
        out |= {
            f"{host}:gamma": gamma,
            f"{host}:focal_per_image": focal,
            f"{host}:total": total,
            f"{host}:grad_logits": gradients[0],
            f"{host}:grad_classes": gradients[1],
            f"gamma_cases_{host}": focal_gamma(cases, labels, "reference", hard_classes),
        }
    out["focal"] = out["dinomaly:focal_per_image"].mean()
    return {name: value.detach() for name, value in out.items()}


def assert_as_in_file(item: str, ours: dict[str, Tensor], prefix: str = "") -> None:
    facts = json.loads((GOLDEN / f"{item}.json").read_text())
    stored = np.load(GOLDEN / f"{item}.npz")
    seen = 0
    for name, entry in facts["outputs"].items():
        if not name.startswith(prefix):
            continue
        seen += 1
        full = ours[name].numpy()
        if "value" in entry:
            assert float(full) == pytest.approx(entry["value"], rel=entry["tol"]), name
            continue
        assert list(full.shape) == entry["shape"], name
        allowed = entry["tol"] * max(abs(entry["min"]), abs(entry["max"]))
        sampled = full.reshape(-1)[:: entry["stride"]].astype(np.float64)
        assert np.abs(sampled - stored[name].reshape(-1)).max() <= allowed, name
        norm = np.linalg.norm(full.reshape(-1).astype(np.float64))
        assert norm == pytest.approx(entry["norm"], rel=entry["tol"]), name
    assert seen


def close(found: Tensor, numbers: tuple[int, tuple[float, ...]]) -> bool:
    stride, expected = numbers
    sampled = found.flatten()[::stride][:6]
    return bool((sampled - torch.tensor(expected)).abs().max() <= 2e-5 * found.abs().max())


def test_costfilter_golden_network_numbers() -> None:
    answers = network_answers("hvq")
    for name, numbers in NETWORK_NUMBERS.items():
        assert close(answers[name], numbers), name


def test_costfilter_golden_volume_numbers() -> None:
    answers = dinomaly_volume_answers() | hvq_volume_answers() | glad_volume_answers()
    for name, numbers in VOLUME_NUMBERS.items():
        assert close(answers[name], numbers), name


def test_costfilter_golden_loss_numbers() -> None:
    answers = loss_answers()
    for name, numbers in LOSS_NUMBERS.items():
        assert close(answers[name], numbers), name


@pytest.mark.parametrize(
    ("host", "parameters"), [("dinomaly", 43_566_047), ("hvq", 42_985_727), ("glad", 43_836_863)]
)
def test_costfilter_golden_parameters(host: str, parameters: int) -> None:
    """The authors' totals count a layer of 866 that they declare and never use."""
    with torch.device("meta"):
        network = CostFilterNetwork(NETWORKS[host][0])
    assert sum(p.numel() for p in network.parameters()) + 866 == parameters


def test_a_foreign_checkpoint_is_refused() -> None:
    config = NetworkConfig(16, 2, (3, 4, 5, 6), 2, classes=3, width=8, side=16, stem=8)
    network = CostFilterNetwork(config)
    state = {official_name(name): value for name, value in network.state_dict().items()}
    assert renamed(network, state).keys() == network.state_dict().keys()
    missing = dict(list(state.items())[1:])
    with pytest.raises(InputError, match=r"down_channel1.conv.weight"):
        renamed(network, missing)
    state["decoder_segment.conv1.weight"] = torch.zeros(8, 8, 3, 1, 1)
    with pytest.raises(InputError, match=r"conv1.weight is \(8, 8, 3, 1, 1\)"):
        renamed(network, state)


@pytest.mark.shared
@shared
@pytest.mark.parametrize("host", NETWORKS)
def test_costfilter_golden_network_file(host: str) -> None:
    facts = json.loads((GOLDEN / f"costfilter_net_{host}.json").read_text())
    official = {name: tuple(s) for name, s in facts["weights"]["model"]["shapes"].items()}
    state = official_state(NETWORKS[host][0])
    assert {name: tuple(value.shape) for name, value in state.items()} == official
    assert_as_in_file(f"costfilter_net_{host}", network_answers(host))


@pytest.mark.shared
@shared
@pytest.mark.parametrize("host", ["dinomaly", "hvq", "glad"])
def test_costfilter_golden_volume_file(host: str) -> None:
    answers = {
        "dinomaly": dinomaly_volume_answers,
        "hvq": hvq_volume_answers,
        "glad": glad_volume_answers,
    }[host]()
    assert_as_in_file("costfilter_volume", answers, prefix=host)


@pytest.mark.shared
@shared
def test_costfilter_golden_losses_file() -> None:
    assert_as_in_file("costfilter_losses", loss_answers())
