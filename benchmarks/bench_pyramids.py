"""UniAD and HVQ-Trans: training from the feature cache beside the encoder in the loop.

    python benchmarks/bench_pyramids.py train [--detectors uniad hvqtrans] [--encoders NAME ...]
        [--side 224] [--batch 8] [--steps 5] [--precision fp32] [--device cpu]

`train`: seconds per optimizer step, at the authors' batch of 8 and learning rate. All sides start
from the same drawn weights, see the same pictures and draw the same jitter and dropout; the cached
one reads float16 rows by index, as the training does. `whole encoder` is timm's as it is and to its
end, channels first, as the authors run theirs; `encoder in loop` is ours, which is faster. The
losses stand side by side, and must agree up to that rounding. EfficientNet-B4 is drawn too: what it
computes does not change how long it takes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import CachedBatches, autocast, interleaved, print_ratios
from torch import Tensor, nn

from allgood.detectors import detector_classes
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder, _create
from allgood.types import TrainingBatch

ASKED = 1.3
"""How many times as long a step with the encoder in the loop shall take."""
PICTURES = 4
"""Batches in the cache."""
ENCODERS = ("efficientnet_lite0", "tf_efficientnet_b4.aa_in1k")


class Step:
    """One optimizer step of a side that has its own copy of the detector; keeps its losses."""

    def __init__(self, model: Any, batch: Callable[[int], TrainingBatch], bf16: bool) -> None:
        self.model, self.batch, self.bf16 = model.train(), batch, bf16
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-4, fused=True)
        self.losses: list[float] = []

    def __call__(self) -> None:
        step = len(self.losses)
        torch.manual_seed(step)  # the same jitter and dropout on both sides
        with autocast(self.parameters[0].device, self.bf16):
            loss = self.model.training_loss(self.batch(step), step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.losses.append(loss.item())


def build(detector: str, encoder: FrozenEncoder, device: torch.device) -> Any:
    config_class, detector_class = detector_classes(detector)
    return detector_class(config_class(), encoder, ("all",), seed=0).to(device)


def train(arguments: argparse.Namespace) -> None:
    device, batch = torch.device(arguments.device), arguments.batch
    for encoder_name in arguments.encoders:
        weights = "pretrained" if encoder_name == ENCODERS[0] else "random"
        encoder = FrozenEncoder(EncoderConfig(encoder_name, (0, 1, 2, 3), weights)).to(device)
        image = torch.rand(PICTURES * batch, 3, arguments.side, arguments.side)
        for detector in arguments.detectors:
            sides = all_sides(
                detector, encoder, image, batch, device, bf16=arguments.precision == "bf16"
            )
            size = f"{batch} pictures of {arguments.side} a step"
            print(f"{detector} on {encoder_name}, {size}, {arguments.precision}")
            median = interleaved(sides, arguments.steps, device)
            for losses in zip(*(side.losses for side in sides.values()), strict=True):
                named = zip(sides, losses, strict=True)
                print("  loss: " + ", ".join(f"{name} {loss:.6f}" for name, loss in named))
                assert max(losses) - min(losses) < 1e-2 * min(losses)
            print(f"{'':<18}{'s per step':>12}{'steps per s':>12}{'cached is':>24}")
            print_ratios("whole encoder", median, (), per=1)
            print_ratios("encoder in loop", median, (), per=1)
            print_ratios("cached", median, ("encoder in loop", "whole encoder"), per=1)
            print(f"asked for: {ASKED}", flush=True)


class WholeEncoder(FrozenEncoder):
    """timm's network as it is, run to its end, with the weights that ours has."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.whole: Any = _create(config).eval()

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        normalised = (image - self.mean) / self.std
        _, levels = self.whole.forward_intermediates(normalised, indices=list(self.levels))
        # Jitter is drawn in the order of memory, which is ours then.
        return [level.contiguous(memory_format=torch.channels_last) for level in levels]


def all_sides(
    detector: str,
    encoder: FrozenEncoder,
    image: Tensor,
    batch: int,
    device: torch.device,
    *,
    bf16: bool,
) -> dict[str, Step]:
    """From one start; which pictures a step sees is a permutation that all know."""
    whole = WholeEncoder(encoder.config).to(device)
    models = [build(detector, one, device) for one in (encoder, encoder, whole)]
    with torch.no_grad():
        parts = [models[0].encode(part.to(device)) for part in image.split(batch)]
    cache = CachedBatches(tuple(torch.cat(part) for part in zip(*parts, strict=True)), device)
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0)).split(batch)
    for model in models:
        model.prepare([cache.batch(index) for index in order])

    def cached(step: int) -> TrainingBatch:
        return cache.batch(order[step % len(order)])

    def online(model: Any) -> Callable[[int], TrainingBatch]:
        def batch_of(step: int) -> TrainingBatch:
            index = order[step % len(order)]
            with torch.no_grad():
                features = model.encode(image[index].to(device))
            return TrainingBatch(features, torch.zeros(len(index)).long().to(device), index)

        return batch_of

    return {
        "cached": Step(models[0], cached, bf16),
        "encoder in loop": Step(models[1], online(models[1]), bf16),
        "whole encoder": Step(models[2], online(models[2]), bf16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("train")
    options.add_argument("--detectors", nargs="+", default=["uniad", "hvqtrans"])
    options.add_argument("--encoders", nargs="+", default=list(ENCODERS))
    options.add_argument("--side", type=int, default=224)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=5, help="of each side")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    train(arguments)


if __name__ == "__main__":
    main()
