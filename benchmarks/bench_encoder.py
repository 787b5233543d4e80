"""Frozen encoders: timm's own forward pass up to the last level read, beside ours.

    python benchmarks/bench_encoder.py [--encoders efficientnet_lite0 ...] [--sizes 1 8]
        [--side 256] [--device cpu]

Both normalise the image first. Ours has its batch norms in its convolutions. Random weights: they
do not change how long it takes.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timing import interleaved, print_ratios
from torch import Tensor

from allgood.encoders.frozen import EncoderConfig, FrozenEncoder

ENCODERS = {
    "efficientnet_lite0": (2, 3),
    "tf_efficientnet_b4.aa_in1k": (0, 1, 2, 3),
    "wide_resnet50_2.tv_in1k": (1, 2, 3),
}


def plain(name: str, levels: tuple[int, ...], device: torch.device) -> Callable[[Tensor], object]:
    model: Any = timm.create_model(name, num_classes=0).eval()
    model.prune_intermediate_layers(list(levels), prune_norm=True, prune_head=True)
    model = model.to(device, memory_format=torch.channels_last)
    mean, std = (
        torch.tensor(model.pretrained_cfg[key], device=device)[:, None, None]
        for key in ("mean", "std")
    )

    def levels_of(image: Tensor) -> object:
        normalised = ((image - mean) / std).contiguous(memory_format=torch.channels_last)
        return model.forward_intermediates(
            normalised, indices=list(levels), stop_early=True, intermediates_only=True
        )

    return levels_of


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in arguments.encoders:
        levels = ENCODERS[name]
        ours = FrozenEncoder(EncoderConfig(name, levels, "random")).to(device)
        theirs = plain(name, levels, device)
        for batch in arguments.sizes:
            image = torch.rand(batch, 3, arguments.side, arguments.side, device=device)
            median = interleaved(
                {"timm": partial(theirs, image), "ours": partial(ours, image)},
                arguments.rounds,
                device,
            )
            print(f"{name}, batch {batch}\n{'':<18}{'s an image':>12}{'a second':>12}{'is':>12}")
            print_ratios("timm", median, (), per=batch)
            print_ratios("ours", median, ("timm",), per=batch)


if __name__ == "__main__":
    main()
