"""Tiny encoders for all tests. Nothing is downloaded: whatever asks the hub is refused at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import pytest
import torch

from allgood.encoders.frozen import EncoderConfig, FrozenEncoder

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(scope="session")
def tiny_encoder() -> FrozenEncoder:
    """A random pyramid: two levels, of stride 8 and 16."""
    return FrozenEncoder(EncoderConfig("test_efficientnet", weights="random"))


@pytest.fixture(scope="session")
def tiny_vit() -> FrozenEncoder:
    """A random ViT with patches of 16 pixels and its final norm."""
    return FrozenEncoder(EncoderConfig("test_vit", weights="random", norm=True))
