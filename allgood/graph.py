"""A whole detector as one ONNX graph, for one picture at a time.

    image (1, 3, H, W), category (1,) [, ignore (1, 1, H, W)]
        -> anomaly_map (1, P, H, W), image_score (1,) or (1, P), judged_as (1,)

P is 1, or 3 behind a CostFilter: fused, detector, filter.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allgood.exported import INFER
from allgood.layers.categories import CategoryReferences
from allgood.layers.memory_bank import MemoryBank
from allgood.types import InputError, Prediction

OUTPUTS = ("anomaly_map", "image_score", "judged_as")


class Graph(nn.Module):
    """What is traced: the detector, with the category as a number that may be INFER.

    The detector is told no category, so that it asks its references for one; and they answer with
    what was given, where something was. So the detector is of no use outside the graph any more.

    Attributes:
        infers_category: whether INFER has an answer; a converted run may have learned none.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector
        owner = getattr(detector, "host", detector)
        known: CategoryReferences = owner.references
        self.infers_category = known.num_categories == 1 or len(known.features) > 0
        self.references = owner.references = _GivenOrInferred(known, self.infers_category)
        for part in detector.modules():
            if isinstance(part, MemoryBank):
                part.fix_shapes()

    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        category: Tensor,
        ignore: Tensor | None = None,
        map_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.references.given = category
        predict = getattr(self.detector, "predict_parts", self.detector.predict)
        prediction: Prediction = predict(image, None, ignore=ignore, map_size=map_size)
        return prediction.anomaly_map, prediction.image_score, prediction.category


class _GivenOrInferred(nn.Module):
    """CategoryReferences that look only where nobody says the category."""

    def __init__(self, references: CategoryReferences, infers: bool) -> None:
        super().__init__()
        self.references = references
        self.infers = infers
        self.given: Tensor

    def infer(self, levels: list[Tensor]) -> Tensor:
        if not self.infers:
            return self.given.clamp(min=0)  # as it is, OpenVINO would lose the input's name
        return torch.where(self.given == INFER, self.references.infer(levels), self.given)


@torch.no_grad()
def write_onnx(graph: Graph, inputs: dict[str, Tensor], path: Path) -> None:
    """Trace a graph and write it.

    Args:
        inputs: of one picture, by name.

    Raises:
        InputError: onnxscript is missing, or the detector computes what a graph cannot hold.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("an export needs more packages: pip install 'allgood[export]'") from None
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it leaves unfolded
    graph(**inputs)  # tables that depend on the size alone are made here and become constants
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own code
            program = torch.export.export(graph, (), inputs, strict=False)
            onnx = torch.onnx.export(
                program, dynamo=True, output_names=list(OUTPUTS), verbose=False
            )
    except InputError:
        raise
    except Exception as error:  # of whatever part of torch or onnxscript gives up first
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"this detector computes what a graph cannot hold ({type(error).__name__}: {reason}): "
            "fit it with other settings"
        ) from error
    assert onnx is not None
    onnx.save(path)
