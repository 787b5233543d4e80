"""allgood: one model, all your products, good images only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Inspector",
    "calibrate",
    "convert",
    "evaluate",
    "export",
    "filter",
    "fit",
    "synthesize",
]

if TYPE_CHECKING:
    from allgood.calibrating.calibrate import calibrate
    from allgood.converting.convert import convert
    from allgood.evaluating.evaluate import evaluate
    from allgood.exporting import export
    from allgood.filtering.filter import filter
    from allgood.fitting.fit import fit
    from allgood.inference import Inspector
    from allgood.synthesizing.synthesize import synthesize
    from allgood.types import InputError

_HOME = {
    "InputError": "allgood.types",
    "Inspector": "allgood.inference",
    "calibrate": "allgood.calibrating.calibrate",
    "convert": "allgood.converting.convert",
    "evaluate": "allgood.evaluating.evaluate",
    "export": "allgood.exporting",
    "filter": "allgood.filtering.filter",
    "fit": "allgood.fitting.fit",
    "synthesize": "allgood.synthesizing.synthesize",
}


def __getattr__(name: str) -> Any:
    """The public names, loaded at first use: `import allgood` alone does not load torch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'allgood' has no attribute '{name}'")
