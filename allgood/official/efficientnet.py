"""The EfficientNet-B4 in the checkpoints of UniAD's, UniAS's and HVQ-Trans's authors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from allgood.encoders.efficientnet import B4_REPEATS, timm_state
from allgood.encoders.frozen import EncoderConfig

ENCODER = EncoderConfig("tf_efficientnet_b4.aa_in1k", (0, 1, 2, 3), reference_padding=True)
"""What they read of it: blocks 1, 5, 9 and 21, with strides 2, 4, 8 and 16."""


_BEHIND = ("blocks.5.", "blocks.6.", "conv_head.", "bn2.", "classifier.")
"""What nobody reads: four fifths of the network's weights."""


def from_lukemelas(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `ENCODER` reads of it: names of the original PyTorch port -> timm's.

    Raises:
        InputError: a name that is not this network's.
    """
    renamed = timm_state(state, B4_REPEATS)
    return {name: tensor for name, tensor in renamed.items() if not name.startswith(_BEHIND)}
