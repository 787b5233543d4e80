"""CostFilter: ours beside the explicit way of doing it, on random weights, in one process.

    python benchmarks/bench_costfilter.py time   [--size full|small] [--images 1] [--threads 1]
    python benchmarks/bench_costfilter.py memory [--size full|small]

`time`: seconds from features to the filter's map, 32 x 32 positions, 4 levels of 768 channels; both
sides in turn, medians. The explicit side is written out here: it builds the volume, resizes it to
the working grid, then convolves it; keeps batch norms apart; runs the class head. Three settings:
one template; three in one volume (`concat`); three in a pass each, maps averaged (`loop_mean`).
`concat / loop` compares our one pass with the explicit three: what the slides' form saves over
the published one; they are two networks, so their maps differ. `memory`: peak resident memory of
three templates against one, each in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.costfilter.network import (
    CostFilterNetwork,
    NetworkConfig,
    anomaly_probability,
    fold,
    small,
)
from allgood.costfilter.volume import (
    VolumeConfig,
    compare,
    initial_map,
    spread_over_stages,
)

GRID, LEVELS, CHANNELS = (32, 32), 4, 768


# The explicit way, operation by operation -------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 1e-8)


def plain_volume(query: list[Tensor], template: list[Tensor]) -> Tensor:
    """(B, N D, L, h, w)."""
    levels = []
    for q, t in zip(query, template, strict=True):
        parts = [
            1 - unit(one.flatten(2)).transpose(1, 2) @ unit(q.flatten(2)) for one in t.unbind(1)
        ]
        levels.append(torch.cat(parts, dim=1).unflatten(2, GRID))
    return torch.stack(levels, dim=2)


class PlainFilter:
    """The paper's network over the weights of ours."""

    def __init__(self, network: CostFilterNetwork) -> None:
        self.weights = network.state_dict()
        self.side = network.config.side

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = [size // 2 for size in weight.shape[2:]]
        padding[0] = 0 if name == "collapse" else padding[0]
        return F.conv3d(x, weight, self.weights.get(f"{name}.bias"), padding=padding)

    def cbr(self, name: str, x: Tensor) -> Tensor:
        w, x = self.weights, self.conv(f"{name}.conv", x)
        mean, var = w[f"{name}.norm.running_mean"], w[f"{name}.norm.running_var"]
        x = F.batch_norm(x, mean, var, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"])
        return F.relu(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        return self.cbr(f"{name}.1", self.cbr(f"{name}.0", x))

    def channel(self, name: str, x: Tensor) -> Tensor:
        def mlp(pooled: Tensor) -> Tensor:
            return self.conv(f"{name}.expand", F.relu(self.conv(f"{name}.squeeze", pooled)))

        z = mlp(F.adaptive_avg_pool3d(x, 1)) + mlp(F.adaptive_max_pool3d(x, 1))
        return torch.sigmoid(z) * x + x

    def rcsa(self, name: str, x: Tensor) -> Tensor:
        x = self.channel(f"{name}.channel", x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], dim=1)
        return torch.sigmoid(self.conv(f"{name}.spatial", pooled)) * x + x

    def guide(self, name: str, x: Tensor, size: torch.Size) -> Tensor:
        x = self.cbr(f"{name}.reduce", x.unsqueeze(2))
        return self.cbr(f"{name}.smooth", F.interpolate(x, size, mode="trilinear"))

    def __call__(self, volume: Tensor, sg: list[Tensor], mg: Tensor) -> tuple[Tensor, Tensor]:
        size = (LEVELS, self.side, self.side)
        x = F.interpolate(volume, size, mode="trilinear", align_corners=True)
        mg = F.interpolate(mg, size[1:], mode="bilinear", align_corners=True)
        x = self.cbr("stem2", self.cbr("stem1", x))
        skips = []
        for i in range(6):
            if 0 < i < 5:
                x = F.max_pool3d(x, (1, 2, 2))
            x = self.block(f"encoder.{i}", x)
            if i in (0, 2, 3, 5):
                s = (0, 2, 3, 5).index(i)
                spatial = self.guide(f"spatial.{s}", sg[s], x.shape[2:])
                matching = self.guide(f"matching.{s}", mg, x.shape[2:])
                x = self.rcsa(f"fuse.{s}.attention", torch.cat([x, spatial, matching], dim=1))
                x = self.cbr(f"fuse.{s}.merge", x)
            skips.append(x)
        x = self.block("bridge", torch.cat([skips[5], skips[4]], dim=1))
        joined = x
        for i, skip in enumerate((skips[3], skips[2], skips[1], skips[0])):
            up = F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear", align_corners=True)
            joined = torch.cat([self.cbr(f"decoder.{i}.up", up), skip], dim=1)
            x = self.block(f"decoder.{i}.block", joined)
            if i != 1:
                x = self.rcsa(f"decoder.{i}.attention", x)
        flat = self.channel("collapse_attention", self.conv("collapse", x))
        least = flat.min(dim=1).values
        logits = F.conv2d(least, self.weights["head.weight"], self.weights["head.bias"])
        x = self.channel("class_head.attention", torch.cat([joined, x], dim=1))
        x = F.relu(self.conv("class_head.conv", x)).mean(dim=(2, 3, 4))
        w = self.weights
        return logits, F.linear(x, w["class_head.linear.weight"], w["class_head.linear.bias"])


# Both sides -------------------------------------------------------------------------------------


def build(size: str, templates: int, merge: str) -> tuple[VolumeConfig, CostFilterNetwork]:
    volume = VolumeConfig(GRID, templates, merge)  # type: ignore[arg-type]
    config = NetworkConfig(volume.channels, LEVELS, (CHANNELS,) * 4, LEVELS, classes=15, stem=384)
    network = CostFilterNetwork(small(config) if size == "small" else config).eval()
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):  # so that the map does not saturate
            bound = (3 / module.weight[0].numel()) ** 0.5
            module.weight.uniform_(-bound, bound, generator=generator)
        if isinstance(module, nn.BatchNorm3d):  # as after training, not as if never used
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.3, generator=generator)
    return volume, network


def features(images: int, templates: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (images, CHANNELS, *GRID)
    query = [torch.randn(shape, generator=generator) for _ in range(LEVELS)]
    noise = [
        torch.randn(images, templates, CHANNELS, *GRID, generator=generator) for _ in range(LEVELS)
    ]
    return query, [n + 0.5 * q.unsqueeze(1) for n, q in zip(noise, query, strict=True)]


def ours(size: str, images: int, templates: int, merge: str) -> Callable[[], Tensor]:
    volume, network = build(size, templates, merge)
    folded = fold(network)
    query, template = features(images, templates)

    def run() -> Tensor:
        comparison = compare(query, template, volume)
        logits, _ = folded(comparison, spread_over_stages(query), initial_map(comparison))
        return anomaly_probability(logits, templates=volume.passes)

    return run


def explicit(size: str, images: int, templates: int, merge: str) -> Callable[[], Tensor]:
    plain = PlainFilter(build(size, templates, merge)[1])
    query, template = features(images, templates)

    def run() -> Tensor:
        step = 1 if merge == "loop_mean" else templates
        maps = []
        for n in range(0, templates, step):
            volume = plain_volume(query, [t[:, n : n + step] for t in template])
            logits, _ = plain(volume, spread_over_stages(query), volume.amin(dim=1))
            maps.append(logits.softmax(dim=1)[:, 1:])
        return torch.stack(maps).mean(dim=0)

    return run


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure_time(size: str, images: int, repeats: int) -> None:
    print(
        f"{size}, {images} image(s), {torch.get_num_threads()} thread(s), medians of {repeats}\n"
        f"{'setting':<16} {'explicit':>9} {'ours':>8} {'ratio':>6} {'map differs by':>15}"
    )
    medians = {}
    for templates, merge in ((1, "concat"), (3, "concat"), (3, "loop_mean")):
        sides = [make(size, images, templates, merge) for make in (explicit, ours)]
        maps = [work() for work in sides]  # warm up
        rounds = [[seconds(work)[0] for work in sides] for _ in range(repeats)]
        plain, our = (statistics.median(side) for side in zip(*rounds, strict=True))
        medians[templates, merge] = (plain, our)
        print(
            f"{templates} {merge:<14} {plain:>8.3f}s {our:>7.3f}s {plain / our:>6.2f} "
            f"{float((maps[0] - maps[1]).abs().max()):>15.1e}",
            flush=True,
        )
    plain, our = medians[3, "loop_mean"][0], medians[3, "concat"][1]
    print(f"{'3 concat / loop':<16} {plain:>8.3f}s {our:>7.3f}s {plain / our:>6.2f}")


def measure_memory(size: str) -> None:
    print(f"{size}, 1 image: MiB resident before / peak / growth by the filter")
    peaks = {}
    for side in ("ours", "explicit"):
        for templates in (1, 3):
            command = [sys.executable, __file__, "peak", "--size", size, "--side", side]
            answer = subprocess.run(
                [*command, "--templates", str(templates)],
                capture_output=True,
                text=True,
                check=True,
            )
            before, peak = map(float, answer.stdout.split())
            peaks[side, templates] = (peak, peak - before)
            print(f"{side:<9} N={templates} {before:>8.0f} {peak:>8.0f} {peak - before:>8.0f}")
        total, growth = (peaks[side, 3][i] / peaks[side, 1][i] - 1 for i in range(2))
        print(f"{side:<9} N=3 over N=1: peak {total:+.1%}, growth by the filter {growth:+.1%}")


def print_peak(side: str, size: str, templates: int) -> None:
    work = (ours if side == "ours" else explicit)(size, 1, templates, "concat")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = resident("VmRSS")
    work()
    print(before, resident("VmHWM"))


def resident(what: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("time", "memory", "peak"))
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "explicit"), default="ours")
    parser.add_argument("--templates", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        if arguments.what == "time":
            measure_time(arguments.size, arguments.images, arguments.repeats)
        elif arguments.what == "memory":
            measure_memory(arguments.size)
        else:
            print_peak(arguments.side, arguments.size, arguments.templates)


if __name__ == "__main__":
    main()
