"""Door: a fitted run -> the same run as one ONNX graph, for a machine that only judges.

encoder, match, filter, map and score in one graph -> judged beside PyTorch, by every engine that is
installed -> published as a run that every command takes, but those that learn
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from allgood.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from allgood.exported import ExportedDetector
    from allgood.graph import Graph
    from allgood.inference import Inspector
    from allgood.types import Prediction

TOLERANCE = 1e-4
"""By which maps and scores may differ from PyTorch's, as a share of the largest value."""


def export(run: Path, *, out: Path = Path("exported"), overwrite: bool = False) -> Path:
    """Make one ONNX graph of a run: the same answers, up to several times as fast on a CPU.

    The new run takes `inspect`, `evaluate` and `calibrate` as the old one does, and keeps its
    thresholds. It needs OpenVINO or ONNX Runtime, but no encoder weights, judges on the CPU in fp32
    and cannot learn. What the graph takes and gives, for programs of your own: docs/export.md.

    Args:
        run: folder of a fitted run.
        out: folder of the new run.
        overwrite: replace a run that stands in the folder.

    Returns:
        the new run's folder.

    Raises:
        InputError: the run reads pictures of many sizes, or computes what a graph cannot hold.
    """
    arguments = dict(locals())
    started = time.monotonic()
    import shutil

    from allgood.exported import ExportedDetector, working_engines
    from allgood.graph import Graph, write_onnx
    from allgood.ignored import write_masks
    from allgood.inference import Inspector
    from allgood.progress import say
    from allgood.runs import (
        CALIBRATION,
        CONFIG,
        MODEL,
        PROVENANCE,
        command_line,
        finish,
        provenance,
        read_json,
        write_json,
    )
    from allgood.unfinished import making, refuse_folder

    out = Path(out)
    if out.resolve() == Path(run).resolve():
        raise InputError(f"'{out}' is the run itself, and stays: name another folder with --out")
    refuse_folder(out, overwrite)
    engines = list(working_engines())
    inspector = Inspector(run, device="cpu")
    inspector.require_fitted("export")
    if inspector.transform.keep_aspect:
        raise InputError(
            f"run '{run}' reads pictures of many sizes, and a graph has one: fit it with "
            "--keep-aspect False"
        )
    graph = Graph(inspector.detector)
    with making(out, {"export": str(run)}, overwrite) as state:
        new = state / "run"
        shutil.rmtree(new, ignore_errors=True)  # of a killed export
        new.mkdir()
        say(f"tracing {run}")
        write_onnx(graph, _inputs(inspector), new / MODEL)
        models = [ExportedDetector(new / MODEL, engine) for engine in engines]
        difference = max(_difference(graph, model, inspector) for model in models)
        if difference > TOLERANCE:
            raise InputError(
                f"the graph of run '{run}' answers otherwise than the run (by {difference:.1e} of "
                "the largest value) and is not kept: use the run itself"
            )
        write_masks(new, inspector.ignore)
        if inspector.calibration is not None:
            shutil.copyfile(inspector.run / CALIBRATION, new / CALIBRATION)
        exported = {
            "infers_category": graph.infers_category,
            "any_map_size": _resizes_alike(graph, models[0], inspector),
        }
        write_json(new / CONFIG, {**inspector.config, "exported": exported})
        known = read_json(inspector.run / PROVENANCE)
        facts = {
            "largest_difference": difference,
            "seconds": round(time.monotonic() - started, 1),
        }
        command = f"{known['command']} && {command_line(export, arguments)}"
        write_json(new / PROVENANCE, {**known, "command": command, "exported": provenance(**facts)})
        finish(new)
    say(f"maps and scores differ from those of {run} by {difference:.0e} of the largest value")
    return out


def _inputs(inspector: Inspector, seed: int = 0, category: int | None = 0) -> dict[str, Tensor]:
    """Of a picture of noise, with a corner of it ignored where the run has ignored regions."""
    import torch

    from allgood.exported import INFER

    generator = torch.Generator().manual_seed(seed)
    height, width = inspector.transform.input_size(1, 1)  # that of any picture
    inputs = {
        "image": torch.rand(1, 3, height, width, generator=generator),
        "category": torch.tensor([INFER if category is None else category]),
    }
    if inspector.ignore:
        inputs["ignore"] = torch.zeros(1, 1, height, width, dtype=torch.bool)
        inputs["ignore"][..., : height // 4, : width // 4] = True
    return inputs


def _difference(graph: Graph, exported: ExportedDetector, inspector: Inspector) -> float:
    """The largest one between the graph in PyTorch and in an engine, as a share of the largest
    value, over a picture for each category and one whose category is inferred."""
    largest = 0.0
    categories: list[int | None] = list(range(len(inspector.categories)))
    if graph.infers_category:
        categories.append(None)
    for seed, category in enumerate(categories):
        inputs = _inputs(inspector, seed, category)
        anomaly_map, score, judged_as = graph(**inputs)
        answer = _ask(exported, inputs)
        if int(judged_as) != int(answer.category):
            return float("inf")
        largest = max(
            largest, _share(anomaly_map, answer.anomaly_map), _share(score, answer.image_score)
        )
    return largest


def _resizes_alike(graph: Graph, exported: ExportedDetector, inspector: Inspector) -> bool:
    """Whether the detector's map of another size is its map, resized; AnomalyDINO smooths after."""
    inputs = _inputs(inspector)
    height, width = inputs["image"].shape[-2:]
    size = (2 * height, 3 * width)
    anomaly_map, *_ = graph(**inputs, map_size=size)
    return _share(anomaly_map, _ask(exported, inputs, size).anomaly_map) <= TOLERANCE


def _ask(
    exported: ExportedDetector, inputs: dict[str, Tensor], map_size: tuple[int, int] | None = None
) -> Prediction:
    ignore = inputs.get("ignore")
    return exported.predict_parts(
        inputs["image"], inputs["category"], ignore=ignore, map_size=map_size
    )


def _share(expected: Tensor, answer: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where one is no number."""
    share = (expected - answer).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(share.nan_to_num(nan=float("inf")))
