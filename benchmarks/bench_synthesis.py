"""Made-up anomalies per second on one core.

    python benchmarks/bench_synthesis.py [--count 300]

Processor seconds of one thread: a busy machine answers nearly the same. All draws are anomalous (in
training half are clean and cost nothing). The picture: a bright object on dark ground with noise,
so that the foreground has work to do; textures are procedural.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from allgood.data.synthesis import SOURCES, SynthesisConfig, Synthesizer, reference_config


def picture(side: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    row, column = np.mgrid[:side, :side] / side - 0.5
    grey = np.where(row**2 + column**2 < 0.16, 160.0, 30.0)[..., None]
    colour = grey * np.array([1.0, 0.9, 0.8]) + generator.normal(0, 8, (side, side, 1))
    return colour.clip(0, 255).astype(np.uint8)


def rate(config: SynthesisConfig, side: int, count: int) -> float:
    image = picture(side)
    synthesizer = Synthesizer(replace(config, clean_probability=0), foreground={"part": "bright"})
    synthesizer.draw(image, category="part", picture="warm", index=0)
    started = time.process_time()
    for i in range(count):
        synthesizer.draw(image, category="part", picture="part", index=i)
    return count / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    count = parser.parse_args().count
    torch.set_num_threads(1)
    off = dict.fromkeys(SOURCES, 0.0)
    configs = {"default": SynthesisConfig(), "reference": reference_config()}
    configs |= {name: SynthesisConfig(**off | {name: 1.0}) for name in SOURCES}
    print(f"{'pictures/s, one core':<22} {'256 x 256':>10} {'448 x 448':>10}")
    with threadpool_limits(1):
        for name, config in configs.items():
            rates = "".join(f"{rate(config, side, count):>11.0f}" for side in (256, 448))
            print(f"{name:<22}{rates}", flush=True)


if __name__ == "__main__":
    main()
