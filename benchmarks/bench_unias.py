"""UniAS: ours beside the form in which its authors compute it, on random weights, in one process.

    python benchmarks/bench_unias.py inspect [--images 1] [--threads 1] [--rounds 7]
    python benchmarks/bench_unias.py train [--light] [--batch 16] [--threads 1] [--rounds 3]
    python benchmarks/bench_unias.py levels RUN DATA [DATA ...]

`inspect`: seconds from pictures to maps and scores, the full model on the embedded encoder at 224 x
224. `train`: seconds for a step of AdamW on cached features. The plain side shares all weights and
runs the three convolutions of each head at full resolution and each patch embedding apart from its
projection. Both sides in turn, medians.

`levels`: of a trained run, the pixel AP of each level's map alone, 1 the finest, and of their
product; and the share of the variance of good test pictures' features that each level leaves.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from timing import interleaved
from torch import Tensor

from allgood import Inspector
from allgood.data.batches import load_batches
from allgood.data.readers import read_data
from allgood.detectors.unias import PatchEmbedding, UniAS, UniASConfig, level_maps
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.layers.linear_head import ReconstructionHead
from allgood.metrics import PixelState
from allgood.types import TrainingBatch


def model(light: bool) -> UniAS:
    config = UniASConfig(width=128, ffn=512) if light else UniASConfig()
    levels = (1, 2, 3) if light else (0, 1, 2, 3)
    return UniAS(config, FrozenEncoder(EncoderConfig(levels=levels)), ("part",))


def plain_patches(patches: PatchEmbedding, level: Tensor) -> Tensor:
    out: Tensor = patches.project(level if patches.embed is None else patches.embed(level))
    return out


@contextmanager
def plain() -> Iterator[None]:
    """The authors' operations instead of ours."""
    ours = ReconstructionHead.forward, PatchEmbedding.forward
    ReconstructionHead.forward = ReconstructionHead.plain  # type: ignore[method-assign]
    PatchEmbedding.forward = plain_patches  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ReconstructionHead.forward, PatchEmbedding.forward = ours  # type: ignore[method-assign]


def compare(run: Callable[[], Tensor], rounds: int) -> tuple[Tensor, Tensor]:
    """Print the times; what ours and the plain side answer."""
    answers: dict[str, Tensor] = {}

    def as_ours() -> None:
        answers["ours"] = run()

    def as_authors() -> None:
        with plain():
            answers["plain"] = run()

    sides = {"ours": as_ours, "plain": as_authors}
    ours, other = interleaved(sides, rounds, torch.device("cpu")).values()
    print(f"ours {ours:.3f} s, plain {other:.3f} s, ratio {other / ours:.2f}")
    return answers["ours"], answers["plain"]


def inspect(images: int, rounds: int) -> None:
    detector = model(light=False).eval()
    image = torch.rand(images, 3, detector.side, detector.side)

    @torch.inference_mode()
    def run() -> Tensor:
        return detector.predict(image).anomaly_map

    ours, other = compare(run, rounds)
    print(f"maps differ by {(ours - other).abs().max():.1e} at most, up to {other.max():.3f}")


def train(light: bool, batch: int, rounds: int) -> None:
    detector = model(light).train()
    features = detector.encode(torch.rand(batch, 3, detector.side, detector.side))
    taught = TrainingBatch(features, torch.zeros(batch).long(), torch.arange(batch))
    parameters = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = detector.training_loss(taught, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        return loss.detach()

    compare(run, rounds)
    numbers = sum(feature[0].numel() for feature in features)
    print(f"{2 * numbers / 1e3:.0f} kB per picture in the cache")


@torch.inference_mode()
def levels(run: Path, data: list[Path]) -> None:
    inspector = Inspector(run)
    detector = inspector.detector
    share, seed = inspector.config["data"]["train_share"], inspector.config["seed"]
    samples = read_data(data, train_share=share, seed=seed).test
    every = detector.config
    states: dict[tuple[str, str], PixelState] = {}
    unexplained: dict[tuple[str, str], list[float]] = {}
    for batch in load_batches(
        samples, inspector.transform, failures=[], batch_size=16, mask_size="input"
    ):
        assert batch.mask is not None
        features = detector.encode(batch.image)
        targets = detector.targets(features)
        rebuilt = detector.rebuild(features, targets)
        maps = level_maps(targets, rebuilt)
        size = (batch.image.shape[-2], batch.image.shape[-1])
        for number in range(len(maps) + 1):
            name = f"level {number}" if number else "product"
            detector.config = replace(every, map_levels=(number,) if number else ())
            anomaly_map = detector.anomaly_map(detector.fuse(maps), size)
            for i, sample in enumerate(batch.sample):
                if sample.is_good or batch.has_mask[i]:
                    state = states.setdefault((sample.category, name), PixelState(exact=True))
                    state.update(anomaly_map[i, 0].numpy(), batch.mask[i, 0].numpy(), [sample.id])
        for number, (target, level) in enumerate(zip(targets, rebuilt, strict=True), start=1):
            rest = (target - level).square().sum(dim=(1, 2, 3))
            whole = (target - target.mean(dim=(2, 3), keepdim=True)).square().sum(dim=(1, 2, 3))
            for sample, left in zip(batch.sample, (rest / whole).tolist(), strict=True):
                if sample.is_good:
                    unexplained.setdefault((sample.category, f"level {number}"), []).append(left)
    print(f"{'category':<16}{'map':<10}{'pixel AP':>10}{'unexplained':>13}")
    for (category, name), state in sorted(states.items()):
        left = unexplained.get((category, name))
        column = "" if left is None else f"{statistics.mean(left):>13.3f}"
        print(f"{category:<16}{name:<10}{state.result()['pixel_ap'].value:>10.3f}{column}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["inspect", "train", "levels"])
    parser.add_argument("paths", nargs="*", type=Path, help="of `levels`: RUN DATA [DATA ...]")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--light", action="store_true")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.what == "inspect":
        inspect(arguments.images, arguments.rounds)
    elif arguments.what == "levels":
        levels(arguments.paths[0], arguments.paths[1:])
    else:
        train(arguments.light, arguments.batch, arguments.rounds)
