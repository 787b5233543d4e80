"""Dinomaly: ours beside the reference's way of doing it, on random weights, in one process.

    python benchmarks/bench_dinomaly.py train  [--model vit_small_patch14_reg4_dinov2] [--side 280]
    python benchmarks/bench_dinomaly.py inspect [--sizes 1 8]
    python benchmarks/bench_dinomaly.py memory [--sides 280 392]

`train`: seconds per optimizer step. `inspect`: images per second, and how far the maps differ; on a
CPU also of what `allgood export` makes of ours, by the engine that it would take here.
`memory`: peak resident memory of a few training steps from the cache, in a process of its own.
The reference is rebuilt in plain_dinomaly.py from the paper's description of it. `reference` stops
after the last block it keeps, as the authors' code does; `all blocks` runs the whole encoder, as a
port of it does. Both sides load one file of weights, and before anything is timed their losses and
maps are compared.

Letters: B images, L kept layers, N tokens with prefix, P patches, C channels, h w grid.
"""

import argparse
import copy
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from plain_dinomaly import LEARNING_RATE, PlainDinomaly, PlainOptimizer
from safetensors.torch import load_file, save_file
from timing import CachedBatches, autocast, interleaved, print_ratios
from torch import Tensor, nn

from allgood.detectors.dinomaly import SCORE_SIDE, Dinomaly, DinomalyConfig
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.exported import INFER, ExportedDetector
from allgood.graph import Graph, write_onnx
from allgood.inference import round_weights
from allgood.training.optim import StableAdamW
from allgood.types import Prediction, TrainingBatch

GRADIENT_CLIP = 0.1


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


# Training ---------------------------------------------------------------------------------------


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


class AtScoreSide(nn.Module):
    """Ours with the maps of the reference's size, to be exported."""

    def __init__(self, ours: Dinomaly) -> None:
        super().__init__()
        self.host = ours

    def predict(self, image: Tensor, category: Tensor | None, **_: object) -> Prediction:
        return self.host.predict(image, category, map_size=(SCORE_SIDE, SCORE_SIDE))


def exported(ours: Dinomaly, side: int, folder: Path) -> ExportedDetector:
    inputs = {"image": torch.rand(1, 3, side, side), "category": torch.tensor([INFER])}
    write_onnx(Graph(AtScoreSide(copy.deepcopy(ours))), inputs, folder / "model.onnx")
    return ExportedDetector(folder / "model.onnx")


def inspect(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    plain, ours = build(arguments.model, dropout=0.2, device=device)
    plain.eval()
    ours.eval()
    with tempfile.TemporaryDirectory() as folder:
        graph = exported(ours, arguments.side, Path(folder)) if device.type == "cpu" else None
        for batch_size in arguments.sizes:
            image = torch.rand(batch_size, 3, arguments.side, arguments.side, device=device)
            inspect_batch(plain, ours, graph, image, max(1, arguments.images // batch_size))


def inspect_batch(
    plain: PlainDinomaly,
    ours: Dinomaly,
    graph: ExportedDetector | None,
    image: Tensor,
    rounds: int,
) -> None:
    device, size = image.device, (SCORE_SIDE, SCORE_SIDE)
    rounded = copy.deepcopy(ours)
    round_weights(rounded)

    def judged(bf16: bool = False) -> Prediction:
        with torch.inference_mode(), autocast(device, bf16):
            return (rounded if bf16 else ours).predict(image, map_size=size)

    def judged_plainly(all_blocks: bool = False) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return plain.predict(image, all_blocks)

    sides: dict[str, Callable[[], Prediction]] = {
        "ours fp32": judged,
        "ours bf16": lambda: judged(bf16=True),
    }
    if graph is not None:
        sides["exported fp32"] = lambda: graph.predict(image, map_size=size)
    expected, scores = judged_plainly()
    print(f"batch {len(image)}; maps of the reference reach {expected.max().item():.4f}")
    for name, judge in sides.items():
        prediction = judge()
        map_error = float((prediction.anomaly_map - expected).abs().max())
        score_error = float((prediction.image_score - scores).abs().max())
        print(f"  {name}: largest difference, map {map_error:.1e}, score {score_error:.1e}")
        assert "bf16" in name or map_error <= 1e-5
    median = interleaved(
        {
            "reference": judged_plainly,
            "all blocks": lambda: judged_plainly(all_blocks=True),
            **sides,
        },
        rounds,
        device,
    )
    print(f"{'':<18}{'s per image':>12}{'images/s':>12}{'reference':>12}{'all blocks':>12}")
    for name in median:
        print_ratios(name, median, ("reference", "all blocks"), per=len(image))


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
