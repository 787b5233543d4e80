"""Greedy coreset: ours beside the plain loop, on features of several shapes, in one process.

    python benchmarks/bench_coreset.py [--rows 20000] [--channels 384]

CPU seconds of both sides, their ratio, whether the picks agree, and the covering radius of each.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from allgood.layers.coreset import covering_radius, greedy_coreset


def plain_loop(features: Tensor, count: int) -> Tensor:
    """One distance row per step, as the algorithm is usually written; row 0 first."""
    squares = features.square().sum(dim=1)
    nearest = torch.full_like(squares, torch.inf)
    picks = [0]
    for _ in range(count - 1):
        last = picks[-1]
        row = torch.addmv(squares, features, features[last], alpha=-2).add_(squares[last])
        torch.minimum(nearest, row, out=nearest)
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


def normal(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, channels, generator=generator)


def uniform(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, channels, generator=generator)


def clustered(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    centres = 3 * torch.randn(50, channels, generator=generator)
    chosen = centres[torch.randint(50, (rows,), generator=generator)]
    return chosen + 0.3 * torch.randn(rows, channels, generator=generator)


def low_rank(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """Few true dimensions in many channels, as features of a network have."""
    factors = torch.randn(rows, 12, generator=generator) @ torch.randn(
        12, channels, generator=generator
    )
    return factors + 0.05 * torch.randn(rows, channels, generator=generator)


def cpu_seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--channels", type=int, default=384)
    arguments = parser.parse_args()
    print(
        f"{arguments.rows} x {arguments.channels}, {torch.get_num_threads()} threads, CPU seconds\n"
        f"{'features':<10} {'share':>5} {'plain':>7} {'ours':>7} {'ratio':>6} "
        f"{'same picks':>10} {'radius / plain':>14}"
    )
    for make in (normal, uniform, clustered, low_rank):
        features = make(arguments.rows, arguments.channels, torch.Generator().manual_seed(0))
        greedy_coreset(features, 10)  # warm up the matrix product
        for share in (0.01, 0.1):
            count = int(share * arguments.rows)
            plain, theirs = cpu_seconds(lambda f=features, n=count: plain_loop(f, n))
            ours, picks = cpu_seconds(lambda f=features, n=count: greedy_coreset(f, n))
            radius = covering_radius(features, picks) / covering_radius(features, theirs)
            same = float((picks == theirs).float().mean())
            print(
                f"{make.__name__:<10} {share:>5.0%} {plain:>7.2f} {ours:>7.2f} "
                f"{plain / ours:>6.1f} {same:>10.1%} {radius:>14.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
