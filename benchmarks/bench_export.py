"""Exported runs beside the runs that they were made of: pictures per second, in one process.

    python benchmarks/bench_export.py RUN...  [--sizes 1 8] [--images 40]

Each run is exported to a temporary folder; both sides then judge the same noise of the run's size,
from tensor to tensor: no files are read. `torch` is the run itself.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, print_ratios
from torch import Tensor

import allgood
from allgood.exported import ENGINES, ExportedDetector
from allgood.runs import MODEL
from allgood.types import Prediction


@torch.inference_mode()
def judged(detector: Any, image: Tensor, ignore: Tensor | None) -> Prediction:
    return detector.predict(image, ignore=ignore)


def measure(run: Path, sizes: list[int], images: int) -> None:
    inspector = allgood.Inspector(run, device="cpu")
    height, width = inspector.transform.input_size(1, 1)
    print(f"{run}: {inspector.config['detector']['name']}, {height} x {width}")
    with tempfile.TemporaryDirectory() as folder:
        out = allgood.export(run, out=Path(folder) / "run")
        graphs = {name: ExportedDetector(out / MODEL, engine) for name, engine in ENGINES.items()}
        for size in sizes:
            image = torch.rand(size, 3, height, width)
            ignore = torch.zeros(size, 1, height, width).bool() if inspector.ignore else None
            sides: dict[str, Callable[[], Prediction]] = {
                name: partial(judged, detector, image, ignore)
                for name, detector in {"torch": inspector.detector, **graphs}.items()
            }
            expected = sides["torch"]().anomaly_map
            for name in graphs:
                error = float((sides[name]().anomaly_map - expected).abs().max())
                print(f"  {name}: maps differ by {error / float(expected.abs().max()):.1e}")
            median = interleaved(sides, max(5, images // size), torch.device("cpu"))
            print(f"{f'batch {size}':<18}{'s per image':>12}{'images/s':>12}{'torch':>12}")
            for name in median:
                print_ratios(name, median, ("torch",), per=size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=40, help="of each side and size")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for run in arguments.runs:
        measure(run, arguments.sizes, arguments.images)


if __name__ == "__main__":
    main()
