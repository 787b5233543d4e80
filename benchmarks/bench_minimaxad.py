"""MiniMaxAD: ours beside the plain way of doing it, on random weights, in one process.

    python benchmarks/bench_minimaxad.py loss     [--side 256] [--batch 16]
    python benchmarks/bench_minimaxad.py merge    [--side 256] [--batch 4]
    python benchmarks/bench_minimaxad.py train    [--side 256] [--batch 8]
    python benchmarks/bench_minimaxad.py inspect  [--side 256] [--sizes 1 16] [--device cuda]

`loss`: value and gradient of the adaptive contraction loss, on the finest level's grid and on the
whole image's. `merge`: encoder, bottleneck and decoder, merged and as trained. `train`: a step with
the encoder frozen and merged, and one whose gradient runs through the encoder too, as the authors'
code has it. `inspect`: images per second of encoder, bottleneck and decoder, beside RD4AD's on a
WideResNet-50-2; fp32, and fp16 on a GPU. The sides take turns, so that a busy machine slows all,
and whatever both compute is compared first.

Letters: B images, h w grid of the finest level.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import autocast, interleaved
from torch import Tensor, nn

from allgood.detectors.minimaxad import MiniMaxAD, MiniMaxADConfig, adc_loss
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.encoders.unireplknet import Block, MergedBlock, UniRepLKNet, channel_norm, merge
from allgood.types import TrainingBatch

P_HARD, P_LIM = 0.9999, 0.9995


# The plain way ------------------------------------------------------------------------------------


def plain_adc_loss(maps: list[Tensor], side: int) -> Tensor:
    """Eq. 7 as it is written, on maps of the image's size."""
    whole = sum(F.interpolate(m.unsqueeze(1), side).squeeze(1) for m in maps)
    flat = whole.flatten()
    squares = flat**2
    variance = flat.var()
    threshold = torch.quantile(flat, P_HARD) - variance
    if (squares >= threshold).sum() < (1 - P_LIM) * flat.numel():
        threshold = torch.quantile(squares, P_LIM) - variance
    return squares[squares >= threshold].mean()


def plain_feed_forward(block: Any, u: Tensor, shift: Tensor | None) -> Tensor:
    """The position-wise part with the channels last, step after step."""
    z = (u * block.se(u)[..., None, None]).permute(0, 2, 3, 1)
    z = F.gelu(block.expand(z))
    norm = z.norm(dim=(1, 2), keepdim=True)
    z = z + block.grn_scale * (z * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)))
    z = z if shift is None else z + shift
    y: Tensor = block.reduce(z).permute(0, 3, 1, 2)
    return y


class PlainBlock(nn.Module):
    """A block of ours, in the same form, computed step after step."""

    def __init__(self, block: Block | MergedBlock) -> None:
        super().__init__()
        self.block: Any = block

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if isinstance(block, MergedBlock):
            return x + plain_feed_forward(block, block.depthwise(x), None)
        y = plain_feed_forward(block, block.norm(block.depthwise(x)), block.grn_shift)
        return x + block.layer_scale.view(-1, 1, 1) * block.out_norm(y)


def made_plain(module: nn.Module) -> nn.Module:
    """In place: every block of ours computed step after step."""
    for name, child in module.named_children():
        if isinstance(child, Block | MergedBlock):
            setattr(module, name, PlainBlock(child))
        else:
            made_plain(child)
    return module


# Both sides ---------------------------------------------------------------------------------------


class Network(nn.Module):
    """Encoder, bottleneck and decoder: image -> rebuilt levels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = UniRepLKNet()
        frozen = FrozenEncoder(EncoderConfig("unireplknet_n", (0, 1, 2), "random"))
        detector = MiniMaxAD(MiniMaxADConfig(), frozen, ("all",))
        self.bottleneck, self.decoder = detector.bottleneck, detector.decoder

    def encode(self, image: Tensor) -> list[Tensor]:
        levels = self.encoder.forward_intermediates(
            image, indices=(0, 1, 2), norm=False, stop_early=True, intermediates_only=True
        )
        return [channel_norm(level) for level in levels]

    def forward(self, image: Tensor) -> list[Tensor]:
        rebuilt: list[Tensor] = self.decoder(self.bottleneck(self.encode(image)))
        return rebuilt


def drawn(module: nn.Module) -> None:
    """Statistics and scales as a training leaves them: the initial ones hide most of a block."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_var", "norm.weight", "layer_scale")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith(("running_mean", "norm.bias", "grn_scale", "grn_shift")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def network(device: torch.device, *, merged: bool, plain: bool) -> Any:
    torch.manual_seed(0)
    model = Network()
    drawn(model)
    model.eval().to(device, memory_format=torch.channels_last)
    if merged:
        merge(model)
    if plain:
        made_plain(model)
    return model


def report(median: dict[str, float], ours: str, images: int, asked: float | None = None) -> None:
    """A line per side: milliseconds per image, images per second, how much faster `ours` is."""
    for name, value in median.items():
        ratio = "" if name == ours else f"   {ours} is {value / median[ours]:.2f} times as fast"
        print(f"{name:<28}{1000 * value / images:>10.3f} ms{images / value:>10.1f} /s{ratio}")
    if asked:
        print(f"asked for: {asked:.2f} times")


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)
    )


# Subcommands --------------------------------------------------------------------------------------


def loss(arguments: argparse.Namespace) -> None:
    device, side = torch.device(arguments.device), arguments.side
    for name, size in (("early", 1.0), ("late", 0.05)):
        torch.manual_seed(0)
        maps = [
            (size * torch.rand(arguments.batch, side // s, side // s, device=device) ** 2)
            .clone()
            .requires_grad_()
            for s in (4, 8, 16)
        ]

        def whole(maps: list[Tensor] = maps) -> tuple[Tensor, list[Tensor]]:
            value = plain_adc_loss(maps, side)
            return value, list(torch.autograd.grad(value, maps))

        def coarse(maps: list[Tensor] = maps) -> tuple[Tensor, list[Tensor]]:
            grid = maps[0].shape[-2:]
            levels = [F.interpolate(m.unsqueeze(1), grid).squeeze(1) for m in maps[1:]]
            value = adc_loss(maps[0] + levels[0] + levels[1], 16, P_HARD, P_LIM)
            return value, list(torch.autograd.grad(value, maps))

        (plain_value, plain_gradient), (value, gradient) = whole(), coarse()
        apart = difference(gradient, plain_gradient)
        both = f"plain {plain_value.item():.6f}, ours {value.item():.6f}"
        print(f"{name}: {both}, gradients differ by {apart:.0e}")
        assert abs(plain_value.item() - value.item()) < 1e-4 * plain_value.item() and apart < 1e-3
        median = interleaved({"plain": whole, "ours": coarse}, arguments.rounds, device)
        report(median, "ours", arguments.batch, asked=5)


@torch.inference_mode()
def merged(arguments: argparse.Namespace) -> None:
    device, batch = torch.device(arguments.device), arguments.batch
    ours = network(device, merged=True, plain=False)
    trained = network(device, merged=False, plain=False)
    step_by_step = network(device, merged=True, plain=True)
    reference = network(device, merged=False, plain=True)
    image = torch.randn(batch, 3, arguments.side, arguments.side, device=device)
    image = image.to(memory_format=torch.channels_last)
    expected = reference(image)
    for model in (ours, trained, step_by_step):
        apart = difference(model(image), expected)
        print(f"largest difference, relative: {apart:.1e}")
        assert apart < 1e-4
    median = interleaved(
        {
            "reference, as trained": lambda: reference(image),
            "reference, merged": lambda: step_by_step(image),
            "ours, as trained": lambda: trained(image),
            "ours, merged": lambda: ours(image),
        },
        arguments.rounds,
        device,
    )
    report(median, "ours, merged", batch, asked=1.3)


def train(arguments: argparse.Namespace) -> None:
    device, batch = torch.device(arguments.device), arguments.batch
    image = torch.rand(batch, 3, arguments.side, arguments.side, device=device)
    frozen = FrozenEncoder(EncoderConfig("unireplknet_n", (0, 1, 2), "random"))
    models = {
        name: MiniMaxAD(MiniMaxADConfig(), frozen, ("all",)).to(device).train()
        for name in ("reference", "cached", "ours")
    }
    open_encoder = network(device, merged=False, plain=False)
    index = torch.arange(batch)
    category = torch.zeros(batch, dtype=torch.int64, device=device)
    cache = models["cached"].encode(image)

    def step(name: str, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        model = models[name]

        def one() -> None:
            levels = model.encode(image) if name == "ours" else cache
            optimizer.zero_grad()
            model.training_loss(TrainingBatch(levels, category, index), 0).backward()
            optimizer.step()

        return one

    # The gradient that the reference computes and does not use; our loss would detach it.
    def through_encoder(model: Any, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def one() -> None:
            levels = open_encoder.encode((image - frozen.mean) / frozen.std)
            maps = [
                1 - F.cosine_similarity(target, level)
                for target, level in zip(levels, model.decode(levels), strict=True)
            ]
            optimizer.zero_grad()
            open_encoder.zero_grad()
            plain_adc_loss(maps, arguments.side).backward()
            optimizer.step()

        return one

    def optimizer_of(model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    sides = {
        "gradient through encoder": through_encoder(
            models["reference"], optimizer_of(models["reference"])
        ),
        "ours": step("ours", optimizer_of(models["ours"])),
        "ours, levels from a cache": step("cached", optimizer_of(models["cached"])),
    }
    median = interleaved(sides, arguments.rounds, device)
    report(median, "ours", batch, asked=1.25)


@torch.inference_mode()
def inspect(arguments: argparse.Namespace) -> None:
    from allgood.detectors.rd4ad import RD4AD, RD4ADConfig

    device = torch.device(arguments.device)
    wide = FrozenEncoder(EncoderConfig("wide_resnet50_2", (1, 2, 3), "random"))
    ours = FrozenEncoder(EncoderConfig("unireplknet_n", (0, 1, 2), "random"))
    models: dict[str, Any] = {
        "RD4AD, WideResNet-50-2": RD4AD(RD4ADConfig(), wide, ("all",)),
        "MiniMaxAD-N": MiniMaxAD(MiniMaxADConfig(), ours, ("all",)),
    }
    for name, model in models.items():
        model.to(device).eval()
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters / 1e6:.1f} M parameters as trained")

    def judged(name: str, image: Tensor, half: bool) -> None:
        model = models[name]
        with autocast(device, half, torch.float16):
            levels = model.encode(image)
            if name == "MiniMaxAD-N":
                model._judge(levels)
            else:
                model.decode(levels)

    for batch in arguments.sizes:
        image = torch.rand(batch, 3, arguments.side, arguments.side, device=device)
        for half in (False, True) if device.type == "cuda" else (False,):
            print(f"batch {batch}, {'fp16' if half else 'fp32'}")
            median = interleaved(
                {
                    name: lambda name=name, image=image, half=half: judged(name, image, half)
                    for name in models
                },
                arguments.rounds,
                device,
            )
            report(median, "MiniMaxAD-N", batch, asked=1.36)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, batch, rounds in (("loss", 16, 15), ("merge", 4, 7), ("train", 8, 2)):
        command = commands.add_parser(name)
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--rounds", type=int, default=rounds)
    command = commands.add_parser("inspect")
    command.add_argument("--sizes", type=int, nargs="+", default=[1, 16])
    command.add_argument("--rounds", type=int, default=5)
    for command in commands.choices.values():
        command.add_argument("--side", type=int, default=256)
        command.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    {"loss": loss, "merge": merged, "train": train, "inspect": inspect}[arguments.command](
        arguments
    )


if __name__ == "__main__":
    main()
