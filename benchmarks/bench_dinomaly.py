"""Dinomaly: ours beside the reference's way of doing it, on random weights, in one process.

    python benchmarks/bench_dinomaly.py train  [--model vit_small_patch14_reg4_dinov2] [--side 280]
    python benchmarks/bench_dinomaly.py inspect [--sizes 1 8]
    python benchmarks/bench_dinomaly.py memory [--sides 280 392]

`train`: seconds per optimizer step. `inspect`: images per second, and how far the maps differ.
`memory`: peak resident memory of a few training steps from the cache, in a process of its own.
The reference is rebuilt here from the paper's description of it, pass by pass: float32, unfused
attention, all kept layers stacked, a loss with a hook, an optimizer that asks the GPU once per
tensor, maps in four passes. `reference` stops after the last block it keeps, as the authors' code
does; `all blocks` runs the whole encoder, as a port of it does. Both sides load one file of
weights, and before anything is timed their losses and maps are compared.

Letters: B images, L kept layers, N tokens with prefix, P patches, C channels, h w grid.
"""

import argparse
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from allgood.detectors.dinomaly import Dinomaly, DinomalyConfig
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder, middle_levels
from allgood.training.optim import StableAdamW
from allgood.types import TrainingBatch

LEARNING_RATE = 2e-3
GRADIENT_CLIP = 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# The reference, pass by pass --------------------------------------------------------------------


class PlainEncoderBlock(nn.Module):
    """A DINOv2 block whose attention keeps its N x N scores; parameters are named as timm's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        packed = self.attn["qkv"](self.norm1(x)).reshape(images, tokens, 3, self.heads, 64)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        scores = (q * 64**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
        out = (scores @ v).transpose(1, 2).reshape(images, tokens, width)
        x = x + self.ls1["gamma"] * self.attn["proj"](out)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainEncoder(nn.Module):
    """A DINOv2 with registers, frozen; the residual stream after each kept block."""

    def __init__(self, width: int, depth: int, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.kept = kept
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, stride=14)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 37 * 37, width))
        self.blocks = nn.ModuleList(PlainEncoderBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, image: Tensor, all_blocks: bool) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> L x (B, N, C)."""
        x = self.patch_embed["proj"]((image - self.mean) / self.std)
        grid = self.pos_embed.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        scale = tuple((side + 0.1) / 37 for side in x.shape[-2:])
        x = x + F.interpolate(grid, scale_factor=scale, mode="bicubic")
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(image), -1, -1)
        x = torch.cat([prefix, x.flatten(2).transpose(1, 2)], dim=1)
        layers = []
        for index, block in enumerate(self.blocks):
            if index > self.kept[-1] and not all_blocks:
                break
            x = block(x)
            if index in self.kept:
                layers.append(x)
        return layers


class PlainDecoderBlock(nn.Module):
    """A decoder block; parameters are named as ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1 = nn.LayerNorm(width, eps=1e-8)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-8)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        packed = self.attn["qkv"](self.norm1(x)).reshape(images, tokens, 3, self.heads, 64)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        inverse = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(dim=-2))
        out = torch.einsum("bhde,bhnd,bhn->bhne", context, q, inverse)
        x = x + self.attn["proj"](out.transpose(1, 2).reshape(images, tokens, width))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainDinomaly(nn.Module):
    """The reference's model, training loss and map."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.encoder = PlainEncoder(width, depth, middle_levels(depth))
        self.bottleneck = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.decoder = nn.ModuleList(PlainDecoderBlock(width) for _ in range(8))

    def forward(self, image: Tensor, all_blocks: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) -> two groups of the encoder and two of the decoder, (B, C, h, w) each."""
        layers = self.encoder(image, all_blocks)
        x = torch.stack(layers, dim=1).mean(dim=1)
        x = F.dropout(x, self.dropout, self.training)
        x = F.dropout(F.gelu(self.bottleneck["fc1"](x)), self.dropout, self.training)
        x = F.dropout(self.bottleneck["fc2"](x), self.dropout, self.training)
        outputs = []
        for block in self.decoder:
            x = block(x)
            outputs.append(x)
        outputs = outputs[::-1]
        side = math.isqrt(x.shape[1] - 5)

        def groups(tokens: list[Tensor]) -> list[Tensor]:
            means = [torch.stack(tokens[i : i + 4], dim=1).mean(dim=1) for i in (0, 4)]
            return [
                mean[:, 5:].permute(0, 2, 1).reshape(len(mean), -1, side, side).contiguous()
                for mean in means
            ]

        return groups(layers), groups(outputs)

    def loss(self, image: Tensor, discard_rate: float, all_blocks: bool) -> Tensor:
        total = torch.zeros((), device=image.device)
        for target, group in zip(*self(image, all_blocks), strict=True):
            target = target.detach()
            with torch.no_grad():
                distance = 1 - F.cosine_similarity(target, group).unsqueeze(1)  # (B, 1, h, w)
            count = int(distance.numel() * (1 - discard_rate))
            easy = distance < torch.topk(distance.reshape(-1), count)[0][-1]
            total = total + (1 - F.cosine_similarity(target.flatten(1), group.flatten(1))).mean()
            if group.requires_grad:
                group.register_hook(lambda gradient, easy=easy: _shrunk(gradient, easy))
        return total / 2

    def predict(self, image: Tensor, all_blocks: bool) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> map (B, 1, 256, 256) and score (B,)."""
        maps = []
        for target, group in zip(*self(image, all_blocks), strict=True):
            distance = 1 - F.cosine_similarity(target, group).unsqueeze(1)
            maps.append(
                F.interpolate(distance, image.shape[-2:], mode="bilinear", align_corners=True)
            )
        whole = torch.cat(maps, dim=1).mean(dim=1, keepdim=True)
        whole = F.interpolate(whole, (256, 256), mode="bilinear", align_corners=False)
        line = torch.exp(-0.5 * (torch.arange(-2, 3, device=image.device) / 4) ** 2)
        line = line / line.sum()
        whole = F.conv2d(whole, (line[:, None] * line)[None, None], padding=2)
        ranked = whole.flatten(1).sort(dim=1, descending=True).values
        return whole, ranked[:, : int(ranked.shape[1] * 0.01)].mean(dim=1)


def _shrunk(gradient: Tensor, easy: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[easy.expand_as(gradient)] *= 0.1
    return gradient


class PlainOptimizer:
    """Tensor after tensor, and the size of each update is read by the host."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.moments = [[torch.zeros_like(p) for _ in range(3)] for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        correction1, correction2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for p, (mean, square, largest) in zip(self.parameters, self.moments, strict=True):
            assert p.grad is not None
            p.mul_(1 - LEARNING_RATE * 1e-4)
            mean.mul_(0.9).add_(p.grad, alpha=0.1)
            square.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            torch.maximum(largest, square, out=largest)
            denominator = (largest.sqrt() / math.sqrt(correction2)).add_(1e-10)
            rms = (p.grad / denominator).norm(2) / p.numel() ** 0.5
            rate = LEARNING_RATE / correction1 / max(1.0, rms.item())
            p.addcdiv_(mean, denominator, value=-rate)


# Both sides -------------------------------------------------------------------------------------


def build(model: str, dropout: float, device: torch.device) -> tuple[PlainDinomaly, Dinomaly]:
    """Both sides with the same weights, all of them drawn."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.safetensors"
        state = timm.create_model(model, num_classes=0).state_dict()
        for name, value in state.items():
            if name.endswith("gamma"):  # 1e-5 as drawn, which would leave all blocks without effect
                value.uniform_(0.2, 1)
        save_file(state, path)
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        config = EncoderConfig(model, "middle", weights=str(path))
        ours = Dinomaly(DinomalyConfig(dropout=dropout), FrozenEncoder(config), ("all",))
        plain = PlainDinomaly(state["norm.weight"].shape[0], depth, dropout)
        plain.encoder.load_state_dict(load_file(path))
    plain.encoder.requires_grad_(False)
    plain.bottleneck.load_state_dict(ours.bottleneck.state_dict())
    plain.decoder.load_state_dict(ours.decoder.state_dict())
    return plain.to(device), ours.to(device)


def trainable(model: PlainDinomaly | Dinomaly) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def autocast(device: torch.device, enabled: bool):
    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def interleaved(
    sides: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, so that a busy machine slows all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, work in sides.items():
            elapsed = seconds(work, device)
            if round_:  # the first one warms up
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def print_ratios(name: str, of: dict[str, float], against: tuple[str, ...], per: float) -> None:
    """One line; `per` images or steps make one measurement."""
    ratios = "".join(f"{of[other] / of[name]:>12.2f}" for other in against)
    print(f"{name:<18}{of[name] / per:>12.3f}{per / of[name]:>12.2f}{ratios}", flush=True)


# Training ---------------------------------------------------------------------------------------


class CachedBatches:
    """Group means kept as float16, and read back as the training does: by index, as float32."""

    def __init__(self, groups: tuple[Tensor, ...], device: torch.device) -> None:
        self.groups = tuple(group.half().cpu() for group in groups)
        self.device = device

    def batches(self, batch_size: int) -> Iterator[TrainingBatch]:
        while True:
            for index in torch.randperm(len(self.groups[0])).split(batch_size):
                if len(index) == batch_size:
                    yield self.batch(index)

    def batch(self, index: Tensor) -> TrainingBatch:
        features = tuple(group[index].to(self.device).float() for group in self.groups)
        category = torch.zeros(len(index), dtype=torch.int64, device=self.device)
        return TrainingBatch(features, category, index)


class OurStep:
    """One optimizer step of ours, from features."""

    def __init__(self, model: Dinomaly, batches: Iterator[TrainingBatch], *, bf16: bool) -> None:
        self.model, self.batches, self.bf16 = model, batches, bf16
        self.parameters = trainable(model)
        self.optimizer = StableAdamW(self.parameters, learning_rate=LEARNING_RATE)
        self.device = self.parameters[0].device
        self.steps = 0

    def __call__(self) -> None:
        batch = next(self.batches)
        with autocast(self.device, self.bf16):
            loss = self.model.training_loss(batch, step=500 + self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        self.steps += 1


class PlainStep:
    """One optimizer step of the reference, from pictures in memory; it reads its loss each time."""

    def __init__(self, model: PlainDinomaly, image: Tensor, *, all_blocks: bool) -> None:
        self.model, self.image, self.all_blocks = model, image, all_blocks
        self.parameters = trainable(model)
        self.optimizer = PlainOptimizer(self.parameters)
        self.steps = 0

    def __call__(self) -> None:
        loss = self.model.loss(self.image, 0.9 * (500 + self.steps) / 1000, self.all_blocks)
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        loss.item()
        self.steps += 1


def train(arguments: argparse.Namespace) -> None:
    device, batch_size = torch.device(arguments.device), arguments.batch
    plain, ours = build(arguments.model, dropout=0.2, device=device)
    image = torch.rand(batch_size, 3, arguments.side, arguments.side, device=device)
    with torch.no_grad():
        cache = CachedBatches(ours.encode(image), device)
    check_first_step(plain, ours, image, cache)

    plain.train()
    ours.train()

    def online() -> Iterator[TrainingBatch]:
        category = torch.zeros(batch_size, dtype=torch.int64, device=device)
        while True:
            with torch.no_grad():
                features = ours.encode(image)
            yield TrainingBatch(features, category, torch.arange(batch_size))

    sides: dict[str, Callable[[], object]] = {
        "reference": PlainStep(plain, image, all_blocks=False),
        "all blocks": PlainStep(plain, image, all_blocks=True),
        "ours fp32": OurStep(ours, cache.batches(batch_size), bf16=False),
        "ours bf16": OurStep(ours, cache.batches(batch_size), bf16=True),
    }
    if arguments.encoder_in_loop:
        sides["ours fp32 online"] = OurStep(ours, online(), bf16=False)
    for name in arguments.skip:
        del sides[name]
    median = interleaved(sides, arguments.steps, device)
    against = tuple(name for name in ("reference", "all blocks") if name in median)
    print(f"{'':<18}{'s per step':>12}{'steps per s':>12}" + "".join(f"{n:>12}" for n in against))
    for name in median:
        print_ratios(name, median, against, per=1)


def check_first_step(
    plain: PlainDinomaly, ours: Dinomaly, image: Tensor, cache: CachedBatches
) -> None:
    """Without dropout both sides have the same loss and the same gradient."""
    plain.eval()
    ours.eval()
    loss = plain.loss(image, 0.45, all_blocks=False)
    loss.backward()
    batch = cache.batch(torch.arange(len(image)))
    our_loss = ours.training_loss(batch, step=500)
    our_loss.backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in trainable(model) if p.grad is not None])
        for model in (plain, ours)
    ]
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    with autocast(image.device, True):
        low = ours.training_loss(batch, step=500).item()
    print(
        f"first loss: reference {loss.item():.7f}, ours {our_loss.item():.7f}, bf16 {low:.7f}; "
        f"gradients differ by {difference:.1e} of their norm"
    )
    assert abs(loss.item() - our_loss.item()) < 1e-4
    assert difference < 1e-2
    for parameter in (*trainable(plain), *trainable(ours)):
        parameter.grad = None


# Inspection -------------------------------------------------------------------------------------


def inspect(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    plain, ours = build(arguments.model, dropout=0.2, device=device)
    plain.eval()
    ours.eval()
    for batch_size in arguments.sizes:
        image = torch.rand(batch_size, 3, arguments.side, arguments.side, device=device)

        def judged(bf16: bool, image: Tensor = image):
            with torch.inference_mode(), autocast(device, bf16):
                return ours.predict(image, map_size=(256, 256))

        def judged_plainly(all_blocks: bool, image: Tensor = image):
            with torch.no_grad():
                return plain.predict(image, all_blocks)

        expected, scores = judged_plainly(False)
        print(f"batch {batch_size}; maps of the reference reach {expected.max().item():.4f}")
        for name, bf16, limit in (("fp32", False, 1e-5), ("bf16", True, math.inf)):
            prediction = judged(bf16)
            map_error = float((prediction.anomaly_map - expected).abs().max())
            score_error = float((prediction.image_score - scores).abs().max())
            print(f"  {name}: largest difference, map {map_error:.1e}, score {score_error:.1e}")
            assert map_error <= limit
        rounds = max(1, arguments.images // batch_size)
        median = interleaved(
            {
                "reference": lambda: judged_plainly(False),
                "all blocks": lambda: judged_plainly(True),
                "ours fp32": lambda: judged(False),
                "ours bf16": lambda: judged(True),
            },
            rounds,
            device,
        )
        print(f"{'':<18}{'s per image':>12}{'images/s':>12}{'reference':>12}{'all blocks':>12}")
        for name in median:
            print_ratios(name, median, ("reference", "all blocks"), per=batch_size)


# Memory -----------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> None:
    for side in arguments.sides:
        for precision in ("fp32", "bf16"):
            command = [
                sys.executable, __file__, "_steps", "--model", arguments.model, "--side", str(side),
                "--batch", str(arguments.batch), "--precision", precision,
            ]  # fmt: skip
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, after = (float(number) for number in answer.split())
            print(
                f"{side:>4} pixels, batch {arguments.batch}, {precision}: peak {after:.2f} GiB, of "
                f"which {before:.2f} GiB before the first step",
                flush=True,
            )


def steps(arguments: argparse.Namespace) -> None:
    """A few steps from a cache of drawn features; prints the peak before and after them, in GiB."""
    encoder = EncoderConfig(arguments.model, "middle", "random")
    ours = Dinomaly(DinomalyConfig(), FrozenEncoder(encoder), ("all",)).train()
    shape = (2 * arguments.batch, (arguments.side // 14) ** 2 + 5, ours.encoder.channels[0])
    cache = CachedBatches((torch.randn(shape), torch.randn(shape)), torch.device("cpu"))
    before = _peak_gib()
    step = OurStep(ours, cache.batches(arguments.batch), bf16=arguments.precision == "bf16")
    for _ in range(3):
        step()
    print(before, _peak_gib())


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, command in (
        ("train", train), ("inspect", inspect), ("memory", memory), ("_steps", steps),
    ):  # fmt: skip
        options = commands.add_parser(name)
        options.set_defaults(command=command)
        options.add_argument("--model", default="vit_small_patch14_reg4_dinov2")
        options.add_argument("--side", type=int, default=280)
        options.add_argument("--batch", type=int, default=16)
        options.add_argument("--device", default="cpu")
        if command is train:
            options.add_argument("--steps", type=int, default=5, help="of each side")
            options.add_argument("--encoder-in-loop", action="store_true", help="one more side")
            options.add_argument("--skip", nargs="*", default=[], help="sides by their name")
        if command is inspect:
            options.add_argument("--sizes", type=int, nargs="+", default=[1, 8])
            options.add_argument("--images", type=int, default=40, help="of each side and size")
        if command is memory:
            options.add_argument("--sides", type=int, nargs="+", default=[280, 392])
        if command is steps:
            options.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use")
    if arguments.command is not steps:
        print(f"{arguments.model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    arguments.command(arguments)


if __name__ == "__main__":
    main()
