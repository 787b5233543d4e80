"""What a fit costs: CPU seconds and peak memory, for a growing number of pictures.

    python benchmarks/bench_fit.py [--pictures 200 5000] [--budget-gb 2]

The pictures are made here (textures, 256 x 256 PNG, seeded); each fit is its own process, so that
the peak is its own.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

FIT = """
import sys
from pathlib import Path
from allgood import fit
fit([Path(sys.argv[1])], out=Path(sys.argv[2]), memory_gb=float(sys.argv[3]), calibration_share=0,
    settings=(f"coreset_ratio={sys.argv[4]}",))
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_pictures(folder: Path, count: int) -> None:
    """Woven textures with noise, each a little different."""
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[0:256, 0:256]
    for i in range(count):
        generator = np.random.default_rng(i)
        period = 12 + generator.uniform(-1, 1)
        weave = np.sin(rows * 2 * np.pi / period) + np.sin(columns * 2 * np.pi / (period + 3))
        grain = generator.normal(0, 12, (256, 256, 3))
        picture = 128 + 40 * weave[..., None] + grain
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[200, 1000, 5000])
    parser.add_argument("--budget-gb", type=float, default=2.0)
    parser.add_argument("--coreset-ratio", type=float, default=0.01)
    arguments = parser.parse_args()
    print(
        f"{'pictures':>8} {'CPU s':>8} {'wall s':>8} {'peak GiB':>9}  of {arguments.budget_gb} GB"
    )
    for count in arguments.pictures:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pictures(folder / "texture", count)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            words = [folder / "texture", folder / "run", arguments.budget_gb]
            answer = subprocess.run(
                [sys.executable, "-c", FIT, *map(str, words), str(arguments.coreset_ratio)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            wall = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            peak = int(answer.stdout.split()[-1]) / 2**20
            print(f"{count:>8} {cpu:>8.0f} {wall:>8.0f} {peak:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
