"""A timm backbone that never trains, is not saved with a model, and runs only as far as it is read.

Letters: B images, C channels, H W pixels, h w patches.
"""

import hashlib
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn

from allgood.encoders import efficientnet, lite0, unireplknet
from allgood.encoders.folding import fold_batch_norms, fold_layer_scales
from allgood.types import InputError
from allgood.wording import unknown

EMBEDDED = "efficientnet_lite0"
"""Name of the default encoder, whose weights come with the installation."""


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that decides what an encoder answers."""

    name: str = EMBEDDED
    """`efficientnet_lite0` (the embedded default) or any timm backbone, with or without `.tag`."""
    levels: tuple[int, ...] | Literal["middle"] | None = None
    """Levels to read, by timm's index (stages of a pyramid, blocks of a ViT). None: the pyramid's
    levels of stride 8 and 16, or a ViT's last block; `middle`: see `middle_levels`."""
    weights: str = "pretrained"
    """`pretrained` (embedded, else timm's hub), `random` (seeded by the architecture alone, for
    tests), or a local .safetensors/.pth/.bin file."""
    norm: bool = False
    """Apply a ViT's final LayerNorm to the levels (AnomalyDINO does, Dinomaly does not)."""
    reference_padding: bool = False
    """Pad `tf_efficientnet_b4` as the authors of UniAD, UniAS and HVQ-Trans do; their checkpoints
    want it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EncoderConfig":
        levels = data["levels"]
        return cls(**{**data, "levels": tuple(levels) if isinstance(levels, list) else levels})


class FrozenEncoder(nn.Module):
    """Feature levels of a frozen backbone; owns mean, std and input range.

    Attributes:
        levels: the indices read, ascending.
        channels: C of each level.
        strides: input pixels per patch of each level.
        multiple: input height and width should be multiples of this.
        is_vit: one stride throughout, and so nothing but whole patches.
        num_prefix: tokens before the patches in `tokens`: class token and registers of a ViT.
        digest: 16 hex digits of the weights in use; a run keeps it, so that its memory bank is
            never compared with features of other weights.
    """

    def __init__(self, config: EncoderConfig = EncoderConfig()) -> None:
        super().__init__()
        self.config = config
        self.mean: Tensor
        self.std: Tensor
        # Weights are drawn and then overwritten; neither moves the generator of the caller.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.backbone: Any = _create(config)
        if not hasattr(self.backbone, "prune_intermediate_layers"):
            raise InputError(f"encoder '{config.name}' has no levels that could be read: {_LISTED}")
        info = self.backbone.feature_info
        self.levels = _checked_levels(config, info)
        self.channels = tuple(_field(info[i], "num_chs") for i in self.levels)
        self.strides = tuple(_field(info[i], "reduction") for i in self.levels)
        self.is_vit = len({_field(level, "reduction") for level in info}) == 1
        self.multiple = self.strides[-1] if self.is_vit else 32
        mean, std = (
            (lite0.MEAN, lite0.STD)
            if config.name == EMBEDDED
            else (self.backbone.pretrained_cfg["mean"], self.backbone.pretrained_cfg["std"])
        )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

        if config.reference_padding:
            efficientnet.pad_as_the_reference(self.backbone, config.name)
        _prune(self.backbone, self.levels, config.norm)
        self.num_prefix = int(getattr(self.backbone, "num_prefix_tokens", 0))
        self.digest = _digest(self.backbone.state_dict())
        self.requires_grad_(False)
        self.eval()
        if isinstance(self.backbone, unireplknet.UniRepLKNet):
            unireplknet.merge(self.backbone)
        else:
            fold_batch_norms(self.backbone, self.levels)
            fold_layer_scales(self.backbone)
        self.to(memory_format=torch.channels_last)
        self._native_position: Tensor | None = None
        if self.is_vit and _is_dinov2(config.name):
            self._native_position = self.backbone.pos_embed.detach().clone()

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode: batch-norm statistics are part of the features."""
        return super().train(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Feature levels of a batch.

        Args:
            image: (B, 3, H, W) float in [0, 1].

        Returns:
            One (B, C, h, w) per level, shallow first, float32 under autocast too, as distances are
            computed of them; h = ceil(H / stride) for most pyramids, H // patch size for ViTs.

        Raises:
            InputError: an image size that this backbone does not take.
        """
        return [level.float() for level in self._intermediates(image)]

    def tokens(self, image: Tensor) -> list[Tensor]:
        """All tokens of a ViT at each level, row-major and with the prefix, which `forward` drops.

        Returns:
            One (B, num_prefix + h*w, C) per level.

        Raises:
            InputError: as `forward`, or an encoder without tokens.
        """
        if not self.is_vit:
            raise InputError(
                f"encoder '{self.config.name}' is no vision transformer and has no tokens: "
                "choose a ViT with --encoder; `allgood list encoders` names some"
            )
        if not self.num_prefix:
            return self._intermediates(image, output_fmt="NLC")
        levels: Any = self._intermediates(image, output_fmt="NLC", return_prefix_tokens=True)
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in levels]

    def _intermediates(self, image: Tensor, **form: Any) -> list[Tensor]:
        if min(image.shape[-2:]) < max(self.strides):
            raise InputError(
                f"an image of {image.shape[-2]} x {image.shape[-1]} pixels is too small for "
                f"{self.config.name}, whose patches cover {max(self.strides)}: "
                "choose a larger image size"
            )
        if self.is_vit and (image.shape[-2] % self.multiple or image.shape[-1] % self.multiple):
            raise InputError(
                f"{self.config.name} needs images whose sides are multiples of {self.multiple}, "
                f"got {image.shape[-2]} x {image.shape[-1]}"
            )
        if self._native_position is not None:
            patch = self.strides[-1]
            self._set_position_embedding(image.shape[-2] // patch, image.shape[-1] // patch)
        normalised = (image - self.mean) / self.std
        try:
            with torch.no_grad():
                return self.backbone.forward_intermediates(
                    normalised.contiguous(memory_format=torch.channels_last),
                    indices=list(self.levels),
                    norm=self.config.norm,
                    stop_early=True,
                    intermediates_only=True,
                    **form,
                )
        except (AssertionError, RuntimeError) as error:
            native = tuple(self.backbone.pretrained_cfg["input_size"][1:])
            if isinstance(error, torch.OutOfMemoryError) or tuple(image.shape[-2:]) == native:
                raise
            raise InputError(
                f"{self.config.name} cannot read images of {image.shape[-2]} x {image.shape[-1]} "
                f"pixels ({_reason(error)}): it was made for {native[0]} x {native[1]}"
            ) from error

    def _set_position_embedding(self, height: int, width: int) -> None:
        native = self._native_position
        assert native is not None
        if self.backbone.patch_embed.grid_size != (height, width):
            prefix = 0 if self.backbone.no_embed_class else self.backbone.num_prefix_tokens
            resized = dinov2_position_embedding(native, height, width, num_prefix=prefix)
            self.backbone.pos_embed = nn.Parameter(
                resized.to(self.mean.device), requires_grad=False
            )
            self.backbone.patch_embed.grid_size = (height, width)


def dinov2_position_embedding(
    position: Tensor, height: int, width: int, *, num_prefix: int
) -> Tensor:
    """A DINOv2 position embedding at another grid, resampled as the papers' code does.

    Bicubic with the scale factor (n + 0.1) / native per axis and without antialias; timm resamples
    to the target size with antialias, which moves the features by about 0.4 %.

    Args:
        position: (1, num_prefix + n*n, C), the embedding as trained on a square grid.
        height, width: the grid wanted.
        num_prefix: leading entries that belong to no patch and stay as they are.

    Returns:
        (1, num_prefix + height*width, C).
    """
    prefix, grid = position[:, :num_prefix], position[:, num_prefix:]
    side = round(grid.shape[1] ** 0.5)
    if (height, width) == (side, side):
        return position
    square = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        square, scale_factor=((height + 0.1) / side, (width + 0.1) / side), mode="bicubic"
    )
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).reshape(1, height * width, -1)], dim=1)


_LISTED = "`allgood list encoders` names those we recommend"


def _create(config: EncoderConfig) -> Any:
    """The backbone with its weights, still whole."""
    name = lite0.ARCHITECTURE if config.name == EMBEDDED else config.name
    architecture, _, tag = name.partition(".")
    if architecture != unireplknet.NAME and not timm.is_model(architecture):
        known = [EMBEDDED, unireplknet.NAME, *timm.list_models()]
        raise unknown(f"unknown encoder '{config.name}'", config.name, known, _LISTED)
    if tag and name not in timm.list_pretrained(f"{architecture}.*"):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(
            f"encoder '{architecture}' has no weights tagged '{tag}'; known: {', '.join(tags)}"
        )
    if config.weights == "random":
        return _timm_model(name)
    if config.weights == "pretrained":
        if config.name == EMBEDDED:
            backbone = _timm_model(name)
            state = lite0.load_state()
            features = {k: v for k, v in state.items() if not k.startswith("classifier")}
            backbone.load_state_dict(features)
            return backbone
        try:
            return _timm_model(name, pretrained=True)
        except Exception as error:  # the hub's client raises a zoo of its own
            raise InputError(
                f"the weights of encoder '{config.name}' could not be fetched "
                f"({type(error).__name__}): give a local file with --weights FILE, "
                f"use the embedded '{EMBEDDED}', or ask for --weights random if you mean it"
            ) from error
    path = Path(config.weights)
    if not path.is_file():
        raise InputError(
            f"weights '{config.weights}' is neither 'pretrained', 'random' nor a file that exists"
        )
    try:
        return _with_weights_of(name, path, config)
    except Exception as error:  # torch, safetensors and timm each have their own
        raise InputError(
            f"{path} does not hold the weights of encoder '{config.name}': {_reason(error)}"
        ) from error


def _with_weights_of(name: str, path: Path, config: EncoderConfig) -> nn.Module:
    """The backbone with a file's weights, every one of them: timm alone would leave out silently.

    The file is as timm or the architecture's authors save it, with any classifier or none, or as
    the original PyTorch port of EfficientNet-B4 has it. It may end behind the last level read.
    """
    if name == unireplknet.NAME:
        return unireplknet.with_weights_of(path)
    # A pickle is read for its tensors only: it runs no code.
    state = load_state_dict(os.fspath(path), weights_only=True)
    if not state:
        raise ValueError("the file is empty")
    architecture = name.partition(".")[0]
    if architecture == efficientnet.B4 and efficientnet.is_original(state):
        state = efficientnet.timm_state(state, efficientnet.B4_REPEATS)
    source: dict[str, Any] = {"state_dict": state, "custom_load": False}
    try:
        # With the classifier of the published weights timm loads strictly.
        return _timm_model(name, num_classes=None, pretrained=True, pretrained_cfg_overlay=source)
    except RuntimeError:
        published = timm.get_pretrained_cfg(name)
        head = (published.classifier if published else None) or ()
        names = (head,) if isinstance(head, str) else tuple(head)
        source["state_dict"] = {
            key: value for key, value in state.items() if key.rpartition(".")[0] not in names
        }
        source |= {"num_classes": 0, "label_offset": 0}  # nothing is left out, so strictly again
    try:
        return _timm_model(name, pretrained=True, pretrained_cfg_overlay=source)
    except RuntimeError as error:
        backbone: Any = _timm_model(name)
        whole = backbone.state_dict().keys()
        _prune(backbone, _checked_levels(config, backbone.feature_info), config.norm)
        needed = backbone.state_dict().keys()
        given = source["state_dict"]
        if not needed <= given.keys() <= whole:
            raise error
        backbone.load_state_dict({key: given[key] for key in needed})
        return cast(nn.Module, backbone)


def _prune(backbone: Any, levels: Sequence[int], norm: bool) -> None:
    """Everything behind the last level used goes, so that it costs neither time nor memory."""
    backbone.prune_intermediate_layers(list(levels), prune_norm=not norm, prune_head=True)


def _timm_model(name: str, *, num_classes: int | None = 0, **kwargs: Any) -> nn.Module:
    if name == unireplknet.NAME:
        return unireplknet.from_hub() if kwargs.get("pretrained") else unireplknet.UniRepLKNet()
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if _is_dinov2(name):
        # We set the position embedding ourselves, see `_set_position_embedding`.
        backbone: Any = timm.create_model(name, **kwargs)
        backbone.patch_embed.strict_img_size = False
        return backbone
    try:
        return timm.create_model(name, dynamic_img_size=True, **kwargs)
    except TypeError:  # not a ViT: takes any size by itself, or refuses in forward()
        return timm.create_model(name, **kwargs)


def _reason(error: Exception) -> str:
    """The first thing an error says, on one line and without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if not line.endswith(":")), type(error).__name__)
    return textwrap.shorten(first.split(". ")[0].rstrip("."), 160, placeholder=" ...")


def _is_dinov2(name: str) -> bool:
    return "dinov2" in name


def middle_levels(depth: int) -> tuple[int, ...]:
    """The eight middle blocks of a ViT (Dinomaly): 2 to 9 of 12, every second from 4 of 24.

    Raises:
        InputError: the paper says nothing of another depth.
    """
    if depth not in (12, 24):
        raise InputError(
            f"which of {depth} levels are the middle ones is defined for ViTs of 12 or 24 blocks: "
            "name them with --levels, or choose a ViT with --encoder"
        )
    return tuple(range(2, 10)) if depth == 12 else tuple(range(4, 19, 2))


def _checked_levels(config: EncoderConfig, info: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    levels = config.levels
    if levels == "middle":
        return middle_levels(len(info))
    if levels is None:
        levels = tuple(i for i, level in enumerate(info) if _field(level, "reduction") in (8, 16))
        if len({_field(info[i], "reduction") for i in levels}) < 2:  # a ViT, or an odd pyramid
            levels = (len(info) - 1,)
    for level in levels:
        if not 0 <= level < len(info):
            raise InputError(
                f"encoder '{config.name}' has levels 0 to {len(info) - 1}, "
                f"but level {level} was asked for"
            )
    if list(levels) != sorted(set(levels)) or not levels:
        raise InputError(f"levels must ascend without repeats, got {list(levels)}")
    return tuple(levels)


def _field(level: Mapping[str, Any], name: str) -> int:
    return int(level[name])


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
