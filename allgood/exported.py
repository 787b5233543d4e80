"""A detector that was exported: its graph, run on the CPU by OpenVINO or ONNX Runtime.

Letters: B images, P parts of the map (1, or 3 behind a CostFilter), H W pixels.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from allgood.progress import say
from allgood.scoring import resize_map
from allgood.types import InputError, Prediction

INFER = -1
"""As a category: the graph finds out which it is."""

Feed = dict[str, np.ndarray]
"""The graph's inputs by name: one picture's."""
Answer = Sequence[np.ndarray]
"""Its outputs: anomaly_map (1, P, H, W), image_score (1,) or (1, P), judged_as (1,)."""


class Engine(Protocol):
    """What computes a graph."""

    def __init__(self, model: Path) -> None: ...

    def __call__(self, feeds: Sequence[Feed]) -> list[Answer]:
        """The answers to several pictures, in their order."""
        ...


class OpenVino:
    """One picture has all cores; several share them, which judges more of them per second."""

    def __init__(self, model: Path) -> None:
        import openvino

        self._core = openvino.Core()
        self._model = self._core.read_model(model)
        self._queues: dict[str, Any] = {}
        self._lock = Lock()

    def __call__(self, feeds: Sequence[Feed]) -> list[Answer]:
        answers: list[Answer] = [()] * len(feeds)

        def keep(request: Any, number: int) -> None:
            answers[number] = [tensor.data.copy() for tensor in request.output_tensors]

        with self._lock:  # a queue serves one caller at a time
            queue = self._queue("LATENCY" if len(feeds) == 1 else "THROUGHPUT")
            queue.wait_all()  # for what an interrupted call has left
            queue.set_callback(keep)
            try:
                for number, feed in enumerate(feeds):
                    queue.start_async(feed, number)
            finally:
                queue.wait_all()
        return answers

    def _queue(self, hint: str) -> Any:
        """Compiled when first needed."""
        import openvino

        if hint not in self._queues:
            # Left alone it computes in bf16 on new processors, which distances do not survive.
            options = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32"}
            compiled = self._core.compile_model(self._model, "CPU", options)
            self._queues[hint] = openvino.AsyncInferQueue(compiled)
        return self._queues[hint]


class OnnxRuntime:
    """One picture after the other."""

    def __init__(self, model: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, feeds: Sequence[Feed]) -> list[Answer]:
        return [self._session.run(None, feed) for feed in feeds]


ENGINES: dict[str, type[Engine]] = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}
"""By the name of their package, the faster one first."""


def working_engines() -> Iterator[type[Engine]]:
    """Those whose packages can be imported, each imported when it is asked for.

    Raises:
        InputError: there is none.
    """
    found = False
    for package, engine in ENGINES.items():
        try:
            import_module(package)
        except Exception as error:  # a broken installation raises anything
            if find_spec(package):
                say(f"{package} is installed, but broken ({error}): it is left out")
            continue
        found = True
        yield engine
    if not found:
        raise InputError("nothing here runs exported runs: pip install openvino (or onnxruntime)")


class ExportedDetector:
    """Judges as the detector that it was made of, to rounding, one size of image only."""

    def __init__(
        self, model: Path, engine: type[Engine] | None = None, *, infers_category: bool = True
    ) -> None:
        """Load a graph.

        Args:
            model: the .onnx file.
            engine: None: the fastest one that works here.
            infers_category: see `Graph`.

        Raises:
            InputError: the file is missing or damaged, or nothing here could run it.
        """
        self._infers_category = infers_category
        engine = engine or next(working_engines())
        if not model.is_file():
            raise InputError(f"{model} is missing: export the run again")
        try:
            self._engine = engine(model)
        except Exception as error:  # each engine has its own
            reason = str(error).strip().rpartition("\n")[2]
            raise InputError(
                f"{model} cannot be used by {engine.__name__} ({reason}): export the run again"
            ) from error

    def predict(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        """As `Detector.predict`; a `map_size` resizes the map of the images' size."""
        parts = self.predict_parts(image, category, ignore=ignore, map_size=map_size)
        score = parts.image_score.reshape(len(image), -1)[:, 0]
        return Prediction(parts.anomaly_map[:, :1], score, parts.category)

    def predict_parts(
        self,
        image: Tensor,
        category: Tensor | None = None,
        *,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> Prediction:
        """As `FilteredDetector.predict_parts`, where there is a filter."""
        if category is None and not self._infers_category:
            raise InputError(
                "this run cannot tell the categories apart: say which one the pictures show with "
                "--category"
            )
        if category is None:
            category = torch.full((len(image),), INFER)
        inputs = {"image": image, "category": category}
        if ignore is not None:
            inputs["ignore"] = ignore
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        answers = self._engine(
            [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(len(image))]
        )
        anomaly_map, score, judged_as = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*answers, strict=True)
        )
        size = map_size or (image.shape[-2], image.shape[-1])
        return Prediction(resize_map(anomaly_map, size), score, judged_as)
