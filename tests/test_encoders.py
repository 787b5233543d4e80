"""Frozen encoders: what timm computes, no more of it than is read, and the same at every call."""

import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from fill import fill_weight
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, StdConv2d
from tiny import random_encoder
from torch import Tensor, nn

from allgood.encoders.folding import fold_batch_norms
from allgood.encoders.frozen import (
    EncoderConfig,
    FrozenEncoder,
    dinov2_position_embedding,
)
from allgood.encoders.tiled import TiledEncoder, tiled
from allgood.types import InputError

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
FAMILIES = {
    "test_efficientnet": (0, 2, 3),
    "test_resnet": (1, 3),
    "resnet18": (2, 3),
    "test_convnext": (0, 2),
    "test_byobnet": (1, 2),
    "swin_tiny_patch4_window7_224": (0, 1),
    "test_vit": (1, 3),
    "test_vit3": (0, 8),
}


def image_of(height: int, width: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def drawn_model(name: str) -> Any:
    """timm's own model, nothing cut off, with norms that have seen data."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.bias, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                assert tensor is not None
                tensor.data = torch.rand_like(tensor) + low
    return model


def plain_levels(model: Any, image: Tensor) -> list[Tensor]:
    """All levels as timm computes them."""
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    levels: list[Tensor] = model.forward_intermediates(
        (image - mean) / std, intermediates_only=True
    )
    return levels


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_levels_equal_the_whole_models(name: str, tmp_path: Path) -> None:
    drawn = drawn_model(name)
    save_file(drawn.state_dict(), tmp_path / "weights.safetensors")
    encoder = FrozenEncoder(
        EncoderConfig(name, FAMILIES[name], str(tmp_path / "weights.safetensors"))
    )
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())  # folded
    # Transformers are built for the size by timm itself.
    settings: dict[str, Any] = {"dynamic_img_size": True} if encoder.is_vit else {}
    settings |= {"img_size": (64, 96)} if "swin" in name else {}
    model = timm.create_model(name, **settings).eval()
    own = model.state_dict()  # Swin's last stages, which nobody reads, have other shapes there
    fitting = {k: v for k, v in drawn.state_dict().items() if v.shape == own[k].shape}
    model.load_state_dict(own | fitting)
    image = image_of(64, 96, count=2)
    expected = plain_levels(model, image)
    levels = encoder(image)
    assert len(levels) == len(FAMILIES[name])
    for i, level in enumerate(levels):
        shape = (2, encoder.channels[i], 64 // encoder.strides[i], 96 // encoder.strides[i])
        assert level.shape == shape and not level.requires_grad
        # Channels-last and folded norms sum in another order.
        torch.testing.assert_close(level, expected[encoder.levels[i]], rtol=1e-4, atol=1e-4)


class OddNorms(nn.Module):
    """A norm behind a standardised convolution, one behind a sum, and one that can be folded."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.standardised, self.norm1 = StdConv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), BatchNormAct2d(4)
        self.norm3 = nn.BatchNorm2d(4)

    def forward_intermediates(self, x: Tensor, **_: Any) -> Tensor:
        x = self.norm1(self.standardised(x))
        out: Tensor = self.norm3(x + self.norm2(self.conv2(x)))
        return out


@torch.no_grad()
def test_only_norms_behind_plain_convolutions_are_folded() -> None:
    torch.manual_seed(0)
    model = OddNorms()
    for _ in range(3):  # the norms see data
        model.forward_intermediates(torch.rand(4, 3, 8, 8) * 3 + 1)
    image = image_of(8, 8)
    expected = model.eval().forward_intermediates(image)
    fold_batch_norms(model, (0,))
    assert isinstance(model.norm1, nn.BatchNorm2d) and isinstance(model.norm3, nn.BatchNorm2d)
    assert isinstance(model.norm2, nn.ReLU)  # its activation
    torch.testing.assert_close(model.forward_intermediates(image), expected)


class ReadElsewhere(nn.Module):
    """Norms that share a convolution's answer: with a shortcut, and with who reads the level."""

    pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward_intermediates(self, x: Tensor, **_: Any) -> list[Tensor]:
        x = self.conv1(x)
        x = self.conv2(x + self.norm1(x))
        return [x, self.norm2(x)]


@torch.no_grad()
def test_a_norm_is_folded_only_where_nothing_else_reads_the_convolution() -> None:
    torch.manual_seed(0)
    model = ReadElsewhere()
    for _ in range(3):  # the norms see data
        model.forward_intermediates(torch.rand(4, 3, 8, 8) * 3 + 1)
    image = image_of(8, 8)
    expected = model.eval().forward_intermediates(image)
    fold_batch_norms(model, (0, 1))
    torch.testing.assert_close(model.forward_intermediates(image), expected)


@torch.no_grad()
def test_pre_norm_blocks_compute_the_same_when_folded() -> None:
    model = drawn_model("coatnet_pico_rw_224")
    image = image_of(224, 224)
    expected = plain_levels(model, image)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    fold_batch_norms(model, range(5))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert 0 < left < norms / 2  # each block's first one has a shortcut beside it
    for level, wanted in zip(plain_levels(model, image), expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_final_norm_of_a_vit() -> None:
    image = image_of(160, 160)
    with_norm = random_encoder("test_vit", (3, 5), norm=True)
    without = random_encoder("test_vit", (3, 5))
    norm = with_norm.backbone.norm
    for a, b in zip(with_norm(image), without(image), strict=True):
        expected = norm(b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(a, b, atol=1e-2)


def test_nothing_behind_the_last_level_remains() -> None:
    assert len(random_encoder("test_vit", (2,)).backbone.blocks) == 3
    shallow = random_encoder("test_efficientnet", (0, 1))
    assert len(shallow.backbone.blocks) == 2
    names = {name.split(".")[0] for name, _ in random_encoder("test_resnet").named_parameters()}
    assert names == {"backbone"}
    resnet = dict(random_encoder("test_resnet", (1, 3)).backbone.named_parameters())
    assert any(name.startswith("layer3") for name in resnet)
    assert not any(name.startswith(("layer4", "fc")) for name in resnet)


def test_never_trains(tiny_encoder: FrozenEncoder) -> None:
    parent = torch.nn.Module()
    parent.encoder = tiny_encoder
    before = tiny_encoder(image_of(64, 64))
    parent.train()
    assert parent.training and not any(module.training for module in tiny_encoder.modules())
    assert not any(p.requires_grad for p in tiny_encoder.parameters())
    for _ in range(2):  # batch norm in training would move, and see other batches
        after = tiny_encoder(torch.cat([image_of(64, 64), torch.zeros(1, 3, 64, 64)]))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-4, atol=1e-4)
    assert not ({"mean", "std"} & set(tiny_encoder.state_dict()))


def test_random_weights_follow_from_the_architecture_alone() -> None:
    torch.manual_seed(1)
    first = random_encoder("test_efficientnet")
    torch.manual_seed(2)
    second = random_encoder("test_efficientnet")
    assert first.digest == second.digest
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("config", [EncoderConfig(), EncoderConfig("test_vit", weights="random")])
def test_building_leaves_the_global_generators_alone(config: EncoderConfig) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    FrozenEncoder(config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def saved_weights(folder: Path, seed: int, *, head: bool | int = True) -> Path:
    """A local file with other weights than `random` gives; with a classifier, without, or with
    another number of classes."""
    torch.manual_seed(seed)
    classes = {} if head is True else {"num_classes": int(head)}
    state = timm.create_model("test_resnet", **classes).state_dict()
    path = folder / f"weights{seed}.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("head", [True, False, 7])
@torch.no_grad()
def test_local_files(tmp_path: Path, head: bool | int) -> None:
    path = saved_weights(tmp_path, 5, head=head)
    state = torch.load(path, weights_only=True)
    encoder = FrozenEncoder(EncoderConfig("test_resnet", weights=str(path)))
    model = timm.create_model("test_resnet", num_classes=len(state.get("fc.bias", ()))).eval()
    model.load_state_dict(state)
    image = image_of(64, 64)
    expected = plain_levels(model, image)
    for i, level in zip(encoder.levels, encoder(image), strict=True):
        torch.testing.assert_close(level, expected[i], rtol=1e-4, atol=1e-5)
    save_file(state, tmp_path / "weights.safetensors")
    same = FrozenEncoder(EncoderConfig("test_resnet", weights=f"{tmp_path}/weights.safetensors"))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    wrapped = FrozenEncoder(EncoderConfig("test_resnet", weights=str(path)))
    assert encoder.digest == same.digest == wrapped.digest
    assert encoder.digest != random_encoder("test_resnet").digest


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
@torch.no_grad()
def test_a_file_may_end_behind_the_last_level(name: str, tmp_path: Path) -> None:
    levels, path = (1, 2), str(tmp_path / "trunk.safetensors")
    whole = drawn_model(name)
    trunk: Any = timm.create_model(name)
    trunk.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
    save_file({key: whole.state_dict()[key] for key in trunk.state_dict()}, path)
    encoder = FrozenEncoder(EncoderConfig(name, levels, path))
    image = image_of(160, 160)
    expected = plain_levels(whole, image)
    for i, level in zip(levels, encoder(image), strict=True):
        torch.testing.assert_close(level, expected[i], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=f"does not hold the weights of encoder '{name}'"):
        FrozenEncoder(EncoderConfig(name, (1, 2, 3), path))


def test_digest_changes_with_one_number(tmp_path: Path) -> None:
    path = saved_weights(tmp_path, 5)
    first = FrozenEncoder(EncoderConfig("test_resnet", weights=str(path))).digest
    state = torch.load(path, weights_only=True)
    state["layer1.0.bn1.running_mean"][0] += 1e-6
    torch.save(state, path)
    assert FrozenEncoder(EncoderConfig("test_resnet", weights=str(path))).digest != first


class Payload:
    """What a malicious pickle does: run something while it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pickle_was_run"),))


def write_wrong_file(path: Path, kind: str) -> None:
    state = timm.create_model("test_resnet").state_dict()
    match kind:
        case "text":
            path.write_text("no weights")
        case "empty":
            path.write_bytes(b"")
        case "no tensors":
            torch.save({}, path)
        case "another network":
            torch.save(timm.create_model("test_vit").state_dict(), path)
        case "another network without classifier":
            torch.save(timm.create_model("test_byobnet", num_classes=0).state_dict(), path)
        case "a tensor missing":
            state.pop("layer2.0.conv1.weight")
            torch.save(state, path)
        case "another shape":
            state["conv1.0.weight"] = torch.zeros(5, 5)
            torch.save(state, path)
        case "one tensor":
            torch.save(torch.zeros(3), path)
        case "arbitrary objects":
            torch.save({"state_dict": state, "extra": Payload()}, path)
        case "plain pickle":
            path.write_bytes(pickle.dumps(Payload()))
        case "safetensors":
            path.write_bytes(b"\x00" * 40)


WRONG_FILES = ("text", "empty", "no tensors", "one tensor", "a tensor missing", "another shape")
WRONG_FILES += ("another network", "another network without classifier")
WRONG_FILES += ("arbitrary objects", "plain pickle", "safetensors")


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_files_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    write_wrong_file(path, kind)
    with pytest.raises(
        InputError, match="does not hold the weights of encoder 'test_resnet': "
    ) as error:
        FrozenEncoder(EncoderConfig("test_resnet", weights=str(path)))
    message = str(error.value)
    assert "\n" not in message and ". " not in message and len(message) < 300
    assert not (tmp_path / "pickle_was_run").exists()


def test_hub_failure_is_quick_and_names_the_ways_out() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="could not be fetched") as error:
        FrozenEncoder(EncoderConfig("wide_resnet50_2.tv_in1k"))
    assert time.monotonic() - started < 20
    for way in ("--weights FILE", "efficientnet_lite0", "--weights random"):
        assert way in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        (EncoderConfig("efficentnet_lite0"), "did you mean 'efficientnet_lite0'"),
        (EncoderConfig("resnet_18"), "did you mean 'resnet18'"),
        (EncoderConfig("???"), "unknown encoder '...'; .allgood list encoders"),
        (EncoderConfig("resnet18.nonsense", weights="random"), "no weights tagged 'nonsense'"),
        (EncoderConfig("test_vit", (6,), "random"), "levels 0 to 5, but level 6"),
        (EncoderConfig("test_vit", (-1,), "random"), "level -1"),
        (EncoderConfig("test_vit", (3, 1), "random"), "ascend without repeats"),
        (EncoderConfig("test_vit", (1, 1), "random"), "ascend without repeats"),
        (EncoderConfig("test_vit", (), "random"), "ascend without repeats"),
        (EncoderConfig("test_vit", weights="no.pth"), "nor a file that exists"),
    ],
)
def test_configs_that_cannot_be_used(config: EncoderConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FrozenEncoder(config)


def test_image_sizes_that_cannot_be_used(tiny_encoder: FrozenEncoder) -> None:
    with pytest.raises(InputError, match="8 x 64 pixels is too small for test_efficientnet"):
        tiny_encoder(image_of(8, 64))
    vit = random_encoder("test_vit")
    with pytest.raises(InputError, match="multiples of 16, got 64 x 72"):
        vit(image_of(64, 72))
    fixed = random_encoder("test_vit_relpos")
    assert fixed(image_of(160, 160))[0].shape[-2:] == (10, 10)
    with pytest.raises(InputError, match=r"64 x 64 pixels .*: it was made for 160 x 160"):
        fixed(image_of(64, 64))


def test_config_survives_json() -> None:
    for config in (EncoderConfig(), EncoderConfig("test_vit", (1, 2), "random", norm=True)):
        assert EncoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


# Position embedding of DINOv2


def test_position_embedding_by_hand() -> None:
    """A pixel of the resized grid against the bicubic formula (a = -0.75), written out."""
    side, prefix, channels, (height, width) = 9, 2, 3, (5, 7)
    position = fill_weight("pos", (1, prefix + side * side, channels))
    resized = dinov2_position_embedding(position, height, width, num_prefix=prefix)
    assert resized.shape == (1, prefix + height * width, channels)
    assert torch.equal(resized[:, :prefix], position[:, :prefix])

    def weights(target: int, size: int) -> np.ndarray:
        centre = (target + 0.5) * side / (size + 0.1) - 0.5  # the papers' offset of 0.1
        row = np.zeros(side)
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            x = abs(centre - tap)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            row[np.clip(tap, 0, side - 1)] += near if x <= 1 else far
        return row

    grid = position[0, prefix:].view(side, side, channels).double().numpy()
    rows = np.stack([weights(i, height) for i in range(height)])
    columns = np.stack([weights(i, width) for i in range(width)])
    expected = np.einsum("ia,jb,abc->ijc", rows, columns, grid).reshape(-1, channels)
    np.testing.assert_allclose(resized[0, prefix:].numpy(), expected, atol=1e-6)


# Reference code, pos_embed = fill("encoder.pos_embed", (1, 1370, 384), seed 0): every
# 151st number, the first eight of them.
POSITION_AT_392 = (
    -1.46640814e-03,
    2.24686088e-03,
    1.56931311e-03,
    -8.10247031e-04,
    1.28218555e-03,
    1.67115149e-03,
    -4.22129669e-04,
    -4.25953505e-04,
)


def test_position_embedding_golden_numbers() -> None:
    position = fill_weight("encoder.pos_embed", (1, 1370, 384))
    resized = dinov2_position_embedding(position, 28, 28, num_prefix=1)
    np.testing.assert_allclose(resized.reshape(-1)[:1208:151], POSITION_AT_392, rtol=1e-5)


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden files beside the repository")
@pytest.mark.parametrize(
    "name, grid", [("392", (28, 28)), ("280", (20, 20)), ("392x280", (28, 20))]
)
def test_position_embedding_golden(name: str, grid: tuple[int, int]) -> None:
    facts = json.loads((GOLDEN / "dinomaly_small.json").read_text())
    entry = facts["outputs"][f"pos_embed_{name}"]
    stored = np.load(GOLDEN / "dinomaly_small.npz")[f"pos_embed_{name}"]
    shape = tuple(facts["weights"]["model"]["shapes"]["encoder.pos_embed"])
    position = fill_weight("encoder.pos_embed", shape, facts["seed"])
    resized = dinov2_position_embedding(position, *grid, num_prefix=1)
    assert list(resized.shape) == entry["shape"]
    scale = max(abs(entry["min"]), abs(entry["max"]))
    difference = np.abs(resized.reshape(-1)[:: entry["stride"]].numpy() - stored).max()
    assert difference <= entry["tol"] * scale


@torch.no_grad()
def test_position_embedding_reaches_the_tokens_and_does_not_drift() -> None:
    name = "vit_small_patch14_dinov2"
    encoder = random_encoder(name, (0,))
    native = encoder.backbone.pos_embed.clone()
    wide, square = image_of(56, 84), image_of(70, 70)
    first = encoder(wide)[0].clone(), encoder(square)[0].clone()
    used = encoder.backbone.pos_embed
    assert torch.equal(used, dinov2_position_embedding(native, 5, 5, num_prefix=1))
    for _ in range(2):  # back and forth
        assert torch.equal(encoder(wide)[0], first[0])
        assert torch.equal(encoder(square)[0], first[1])
    # timm's own model, built for that size, with the embedding put in by hand
    model: Any = timm.create_model(name, img_size=(56, 84), num_classes=0, depth=1).eval()
    state = encoder.backbone.state_dict()
    state["pos_embed"] = dinov2_position_embedding(native, 4, 6, num_prefix=1)
    model.load_state_dict(state, strict=False)
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    expected = model.forward_intermediates((wide - mean) / std, intermediates_only=True)[0]
    torch.testing.assert_close(first[0], expected, rtol=1e-4, atol=1e-4)


# Tiles


@pytest.fixture(scope="module")
def shallow() -> FrozenEncoder:
    """A pyramid without global pooling, whose patches see less than 64 pixels around."""
    return random_encoder("efficientnet_lite0", (0, 1, 2))


@pytest.mark.parametrize("size", [(256, 256), (224, 416), (448, 160), (192, 224)])
def test_tiles_give_the_whole_images_features(
    shallow: FrozenEncoder, size: tuple[int, int]
) -> None:
    image = image_of(*size)
    pieces = TiledEncoder(shallow, 192, 64)(image)
    for level, piece in zip(shallow(image), pieces, strict=True):
        assert level.shape == piece.shape
        assert (level - piece).abs().max() <= 1e-4 * level.abs().max()


def test_without_margin_the_seams_are_felt(shallow: FrozenEncoder) -> None:
    image = image_of(256, 256)
    piece = TiledEncoder(shallow, 192, 0)(image)[-1]
    level = shallow(image)[-1]
    assert (level - piece).abs().max() > 1e-2 * level.abs().max()


def test_an_image_that_fits_one_tile_is_read_as_it_is(shallow: FrozenEncoder) -> None:
    image = image_of(192, 160)
    for a, b in zip(TiledEncoder(shallow, 192)(image), shallow(image), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [64, 96, 128, 160, 192, 256, 288, 480, 512, 992])
def test_cuts_cover_every_pixel_once(tiny_encoder: FrozenEncoder, length: int) -> None:
    for tile, margin in ((96, 0), (128, 32), (192, 64), (256, 32)):
        cuts = TiledEncoder(tiny_encoder, tile, margin)._cuts(length)
        covered = [pixel for _, first, last in cuts for pixel in range(first, last)]
        assert covered == list(range(length))
        for begin, first, last in cuts:
            assert begin % 32 == 0 and begin <= first < last <= begin + max(tile, length)
            if length > tile:
                assert 0 <= begin <= length - tile
                assert first == 0 or first >= begin + margin
                assert last == length or last <= begin + tile - margin


def test_tiled_looks_like_its_encoder(tiny_encoder: FrozenEncoder) -> None:
    assert tiled(tiny_encoder, None) is tiny_encoder
    wrapped = tiled(tiny_encoder, 256)
    assert isinstance(wrapped, TiledEncoder) and wrapped.margin == 32
    for name in ("config", "digest", "levels", "channels", "strides", "multiple"):
        assert getattr(wrapped, name) == getattr(tiny_encoder, name)


def test_tiles_that_cannot_be_used(tiny_encoder: FrozenEncoder) -> None:
    for tile in (100, 64):
        with pytest.raises(InputError, match="tile must be a multiple of 32 and at least 96"):
            TiledEncoder(tiny_encoder, tile)
    for margin in (10, 64, -32):
        with pytest.raises(InputError, match="margin must be a multiple of 32 below half a tile"):
            TiledEncoder(tiny_encoder, 128, margin)
    with pytest.raises(InputError, match="multiples of 32, got 200 x 100"):
        TiledEncoder(tiny_encoder, 128)(image_of(200, 100))


# Tokens with their prefix, and layer scales folded into the matrices before them


def scaled_weights(name: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """timm's random weights with layer scales that matter, between -1.5 and 1.5."""
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=0).state_dict()
    gammas = [key for key in state if key.endswith(".gamma")]
    assert gammas
    for key in gammas:
        state[key] = 3 * torch.rand_like(state[key]) - 1.5
    save_file(state, folder / "scaled.safetensors")
    return folder / "scaled.safetensors", state


@pytest.mark.parametrize(
    "name, prefix, size",
    [
        ("test_vit2", 1, (64, 96)),
        ("test_vit_relpos", 0, (160, 160)),  # takes its own size only
        ("vit_small_patch14_reg4_dinov2", 5, (56, 84)),
    ],
)
@torch.no_grad()
def test_tokens_and_levels_with_folded_layer_scales(
    name: str, prefix: int, size: tuple[int, int], tmp_path: Path
) -> None:
    path, state = scaled_weights(name, tmp_path)
    encoder = FrozenEncoder(EncoderConfig(name, (1, 3), str(path)))
    assert encoder.num_prefix == prefix
    assert not any(key.endswith("gamma") for key in encoder.backbone.state_dict())
    # timm's own model, whole and with its layer scales
    settings: dict[str, Any] = {} if name == "test_vit_relpos" else {"img_size": size}
    model: Any = timm.create_model(name, num_classes=0, **settings).eval()
    grid = size[0] // encoder.multiple, size[1] // encoder.multiple
    if "dinov2" in name:
        state["pos_embed"] = dinov2_position_embedding(state["pos_embed"], *grid, num_prefix=0)
    elif prefix:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(state)
    image = image_of(*size, count=2)
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    seen: dict[int, Tensor] = {}
    for i in encoder.levels:
        model.blocks[i].register_forward_hook(lambda _, __, out, i=i: seen.setdefault(i, out))
    model.forward_features((image - mean) / std)
    tokens, levels = encoder.tokens(image), encoder(image)
    assert len(tokens) == len(levels) == 2
    for i, found, level in zip(encoder.levels, tokens, levels, strict=True):
        assert found.shape == (2, prefix + grid[0] * grid[1], encoder.channels[0])
        assert (found - seen[i]).abs().max() < 1e-5 * seen[i].abs().max()
        patches = found[:, prefix:].transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(level, patches)
        assert not found.requires_grad


def test_folding_leaves_the_digest_that_of_the_file(tmp_path: Path) -> None:
    path, state = scaled_weights("test_vit2", tmp_path)
    digest = FrozenEncoder(EncoderConfig("test_vit2", (1,), str(path))).digest
    state["blocks.0.ls1.gamma"][0] += 1e-3
    save_file(state, path)
    assert FrozenEncoder(EncoderConfig("test_vit2", (1,), str(path))).digest != digest


def test_tokens_of_a_pyramid_are_refused(tiny_encoder: FrozenEncoder) -> None:
    with pytest.raises(
        InputError, match="'test_efficientnet' is no vision transformer and has no tokens"
    ):
        tiny_encoder.tokens(image_of(64, 64))
    with pytest.raises(InputError, match="multiples of 16, got 64 x 72"):
        random_encoder("test_vit").tokens(image_of(64, 72))
