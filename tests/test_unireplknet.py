"""UniRepLKNet-N: its blocks against plain float64 ones, merging, cost, and which files it reads."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_minimaxad_golden import official_shapes, part_of
from tiny import random_encoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.encoders.unireplknet import (
    BRANCHES,
    NAME,
    Block,
    ConvNorm,
    Depthwise,
    DilatedBranches,
    MergedBlock,
    UniRepLKNet,
    channel_norm,
    merge,
    renamed,
)
from allgood.types import InputError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(module: Any, seed: int = 0) -> Any:
    """Every number drawn anew, statistics and scales too: the initial ones hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
        elif name.endswith("layer_scale") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            size = 1 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.3
            tensor.copy_(size * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def assert_same(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == expected.shape
    assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()


# Blocks


def plain_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    fields = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, weight, bias = (t.double().view(-1, 1, 1) for t in fields)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def plain_depthwise(x: Tensor, conv: nn.Conv2d, dilation: int) -> Tensor:
    """Tap after tap, on a grid with zeros around it."""
    size = conv.weight.shape[-1]
    reach = dilation * (size // 2)
    padded = F.pad(x, [reach] * 4)
    out = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            rows = padded[..., i * dilation : i * dilation + x.shape[2], :]
            tap = conv.weight[:, 0, i, j].double().view(-1, 1, 1)
            out += tap * rows[..., j * dilation : j * dilation + x.shape[3]]
    return out


def plain_block(block: Any, x: Tensor) -> Tensor:
    """Step after step, in float64."""
    x = x.double()
    if isinstance(block.depthwise, DilatedBranches):
        u = torch.zeros_like(x)
        for branch, (_, dilation) in zip(block.depthwise.branches, BRANCHES, strict=True):
            u += plain_norm(plain_depthwise(x, branch.conv, dilation), branch.norm)
    else:
        u = plain_depthwise(x, block.depthwise, 1)
    u = plain_norm(u, block.norm)
    state = {name: tensor.double() for name, tensor in block.state_dict().items()}
    gate = u.mean(dim=(2, 3)) @ state["se.down.weight"][..., 0, 0].T + state["se.down.bias"]
    gate = gate.clamp(min=0) @ state["se.up.weight"][..., 0, 0].T + state["se.up.bias"]
    u = u / (1 + (-gate).exp())[..., None, None]
    z = u.permute(0, 2, 3, 1) @ state["expand.weight"].T + state["expand.bias"]
    z = z * (1 + torch.erf(z / 2**0.5)) / 2
    g = z.square().sum(dim=(1, 2), keepdim=True).sqrt()
    n = g / (g.mean(dim=3, keepdim=True) + 1e-6)
    z = state["grn_scale"] * (z * n) + state["grn_shift"] + z
    y = plain_norm((z @ state["reduce.weight"].T).permute(0, 3, 1, 2), block.out_norm)
    return x + state["layer_scale"].view(-1, 1, 1) * y


@pytest.mark.parametrize("kernel_size", [3, 13])
@pytest.mark.parametrize("size", [(20, 26), (5, 3)])  # more and fewer positions than channels
@torch.no_grad()
def test_a_block_and_its_merged_form(kernel_size: int, size: tuple[int, int]) -> None:
    block = shaken(Block(24, kernel_size))
    x = noise(2, 24, *size)
    expected = plain_block(block, x)
    assert (expected - x).abs().max() > 0.1 * x.abs().max()  # the block does something
    assert_same(block(x), expected)
    merged = block.merged()
    assert isinstance(merged, MergedBlock)
    assert merged.depthwise.weight.shape == (24, 1, kernel_size, kernel_size)
    assert_same(merged(x), expected)
    assert_same(merged(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("index", range(6))
@torch.no_grad()
def test_each_branch_is_part_of_the_merged_kernel(index: int) -> None:
    branches = shaken(DilatedBranches(4), seed=index)
    for i, branch in enumerate(branches.branches):
        if i != index:
            branch.conv.weight.zero_()
            branch.norm.bias.copy_(branch.norm.running_mean)
            branch.norm.weight.copy_((branch.norm.running_var + branch.norm.eps).sqrt())
    kernel, bias = branches.folded()
    size, dilation = BRANCHES[index]
    # Only this branch's taps, and in their places: symmetric around the centre.
    taps = (kernel[0, 0] != 0).nonzero() - 6
    reach = dilation * (size // 2)
    assert len(taps) == size * size
    assert taps.unique().tolist() == list(range(-reach, reach + 1, dilation))
    x = noise(2, 4, 17, 15)
    assert_same(F.conv2d(x.double(), kernel, bias, padding=6, groups=4), branches(x).double())


@torch.no_grad()
def test_a_dense_convolution_takes_its_norm_in() -> None:
    conv = shaken(ConvNorm(nn.Conv2d(6, 8, 3, 2, padding=1, bias=False)))
    x = noise(2, 6, 9, 12)
    merged = conv.merged()
    assert type(merged) is nn.Conv2d and merged.stride == (2, 2)
    assert_same(merged(x), conv(x).double())


@torch.no_grad()
def test_depthwise_kernels_answer_contiguously_however_their_weights_lie() -> None:
    conv = Depthwise(8, 13).to(memory_format=torch.channels_last)
    x = noise(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    assert not x.is_contiguous() and conv(x).is_contiguous()


def test_training_changes_statistics_of_every_norm_and_learns_everything() -> None:
    block = shaken(Block(8, 13)).train()
    x = noise(4, 8, 6, 6).requires_grad_()
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    block(x).square().sum().backward()
    assert len(before) == 3 * (7 + 1)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_half_precision_stays_near() -> None:
    block = shaken(Block(24, 13))
    x = noise(2, 24, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(block.merged()(x), plain_block(block, x), tolerance=0.05)


def test_channel_norm() -> None:
    x = noise(2, 7, 3, 5) * 4 + 2
    y = channel_norm(x)
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(2, 3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(dim=1, unbiased=False), torch.ones(2, 3, 5))


# Cost


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        backbone = UniRepLKNet()
    assert count(backbone) == 8_983_960
    assert count(backbone.downsample) == 607_680
    assert [count(stage) for stage in backbone.stages] == [113_160, 531_280, 7_731_840]
    merge(backbone)
    assert count(backbone) == 8_637_240
    assert [count(stage) for stage in backbone.stages] == [112_040, 492_880, 7_424_640]
    assert [count(stage[0]) for stage in backbone.stages] == [56_020, 246_440, 928_080]


@pytest.mark.parametrize("side, plain, merged", [(256, 3.160, 3.061), (224, 2.419, 2.343)])
def test_multiplications(side: int, plain: float, merged: float) -> None:
    with torch.device("meta"):
        backbone: Any = UniRepLKNet().eval()
        image = torch.empty(1, 3, side, side)
    for expected in (plain, merged):
        with FlopCounterMode(display=False) as counter:
            forward(backbone, image)
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, abs=6e-4)
        merge(backbone)


def forward(backbone: Any, x: Tensor, indices: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    levels: list[Tensor] = backbone.forward_intermediates(
        x, indices=indices, norm=False, stop_early=True, intermediates_only=True
    )
    return levels


# As an encoder


def official_state(seed: int = 0) -> dict[str, Tensor]:
    """The authors' file: stages that are read, and the rest of the classifier."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in part_of(official_shapes(), "encoder").items():  # type: ignore[arg-type]
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        else:
            state[name] = torch.rand(shape, generator=generator) * 0.1 + 0.05
    return state | {"head.weight": torch.rand(10, 640), "stages.3.0.gamma": torch.rand(640)}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return official_state()


def read(path: Path, levels: tuple[int, ...] = (0, 1, 2)) -> FrozenEncoder:
    return FrozenEncoder(EncoderConfig(NAME, levels, str(path)))


@torch.no_grad()
def test_levels_of_a_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pth")
    save_file(state, tmp_path / "plain.safetensors")
    encoder = read(tmp_path / "plain.pth")
    assert encoder.channels == (80, 160, 320) and encoder.strides == (4, 8, 16)
    assert not encoder.is_vit and encoder.multiple == 32
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    image = torch.rand(2, 3, 64, 96)
    levels = encoder(image)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (80, 16, 24),
        (160, 8, 12),
        (320, 4, 6),
    ]
    # The same network put together by hand, un-merged and in the authors' names.
    backbone = UniRepLKNet().eval()
    own = backbone.state_dict()
    ours = renamed(state)
    assert own.keys() <= ours.keys()
    backbone.load_state_dict({name: ours[name] for name in own})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for level, expected in zip(levels, forward(backbone, normalised), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)
    # Shallow levels do not need the rest of the network.
    shallow = read(tmp_path / "plain.safetensors", (0, 1))
    assert count(shallow) < count(encoder) / 5
    for level, expected in zip(shallow(image), levels, strict=False):
        assert torch.equal(level, expected)
    assert read(tmp_path / "plain.safetensors").digest == encoder.digest


@pytest.mark.parametrize("wrapper", ["model", "models", "state_dict", "model_ema"])
def test_wrapped_files(state: dict[str, Tensor], tmp_path: Path, wrapper: str) -> None:
    torch.save(state, tmp_path / "plain.pth")
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "wrapped.pth")
    assert read(tmp_path / "wrapped.pth").digest == read(tmp_path / "plain.pth").digest


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda s: without(s, "stages.2.7.dwconv.dil_conv_k3_5.weight"),
            r"'stages.2.7.depthwise.branches.5.conv.weight' is missing",
        ),
        (lambda s: without(s, "stages.0.1.act.1.beta"), "'stages.0.1.grn_shift' is missing"),
        (
            lambda s: s | {"stages.1.0.gamma": torch.ones(3)},
            r"'stages.1.0.layer_scale' has the shape \(3,\), not \(160,\)",
        ),
        (lambda s: {"weights": s}, "is missing"),
        (
            lambda s: {k: torch.ones_like(v) if "running_var" in k else v for k, v in s.items()},
            "its batch norms have never seen a picture",
        ),
    ],
)
def test_files_that_would_leave_a_part_random(
    state: dict[str, Tensor], tmp_path: Path, change: Any, said: str
) -> None:
    path = tmp_path / "file.pth"
    torch.save(change(state), path)
    with pytest.raises(InputError, match=f"the weights of encoder 'unireplknet_n': {said}|{said}"):
        read(path)


def test_the_hubs_file(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncoderConfig(NAME, (0,))
    with pytest.raises(InputError, match="weights of encoder 'unireplknet_n' could not be fetched"):
        FrozenEncoder(config)  # the tests have no hub
    path = tmp_path / "fetched.pth"
    torch.save({"model": state}, path)
    asked: list[tuple[str, str]] = []

    def fetch(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert FrozenEncoder(config).digest == read(path, (0,)).digest
    assert asked == [("DingXiaoH/UniRepLKNet", "unireplknet_n_in1k_224_acc81.64.pth")]


def test_random_weights_and_bad_questions() -> None:
    first, second = random_encoder(NAME, (1,)), random_encoder(NAME, (1,))
    assert first.digest == second.digest
    assert random_encoder(NAME).levels == (1, 2)  # strides 8 and 16, as of any pyramid
    with pytest.raises(InputError, match="has levels 0 to 2, but level 3 was asked for"):
        random_encoder(NAME, (0, 3))
    with pytest.raises(InputError, match="has no final norm"):
        random_encoder(NAME, (1,), norm=True)
    with pytest.raises(InputError, match="did you mean 'unireplknet_n'"):
        random_encoder("unireplknet")
