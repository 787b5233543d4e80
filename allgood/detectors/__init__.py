"""Room 3: levels -> Match and Prediction; one file per paper.

DETECTORS maps the name on the command line to where the method lives, so that listing them loads
nothing.
"""

from importlib import import_module
from typing import Any, NamedTuple

from allgood.wording import unknown


class Entry(NamedTuple):
    module: str
    config: str
    detector: str
    summary: str


DETECTORS = {
    "patchcore": Entry(
        "allgood.detectors.patchcore",
        "PatchCoreConfig",
        "PatchCore",
        "memory bank of patches, greedy coreset (Roth et al., CVPR 2022)",
    ),
    "anomalydino": Entry(
        "allgood.detectors.anomalydino",
        "AnomalyDINOConfig",
        "AnomalyDINO",
        "few-shot memory bank of ViT tokens, cosine distance (Damm et al., WACV 2025)",
    ),
    "dinomaly": Entry(
        "allgood.detectors.dinomaly",
        "DinomalyConfig",
        "Dinomaly",
        "noisy bottleneck and linear-attention decoder on a ViT (Guo et al., CVPR 2025)",
    ),
    "rd4ad": Entry(
        "allgood.detectors.rd4ad",
        "RD4ADConfig",
        "RD4AD",
        "one-class embedding and mirrored decoder of a CNN (Deng and Li, CVPR 2022)",
    ),
    "uniad": Entry(
        "allgood.detectors.uniad",
        "UniADConfig",
        "UniAD",
        "neighbour-masked transformer on jittered CNN features (You et al., NeurIPS 2022)",
    ),
    "hvqtrans": Entry(
        "allgood.detectors.hvqtrans",
        "HVQTransConfig",
        "HVQTrans",
        "transformer on normal codes of each category (Lu et al., NeurIPS 2023)",
    ),
    "unias": Entry(
        "allgood.detectors.unias",
        "UniASConfig",
        "UniAS",
        "levels rebuilt coarse to fine, their maps multiplied (Ma et al., WACV 2025)",
    ),
    "minimaxad": Entry(
        "allgood.detectors.minimaxad",
        "MiniMaxADConfig",
        "MiniMaxAD",
        "small autoencoder of large kernels, trained on what it does worst (Wang et al., 2024)",
    ),
}


def detector_classes(name: str) -> tuple[type[Any], type[Any]]:
    """(config class, detector class) of a method.

    Raises:
        InputError: no such method; the message suggests the nearest name.
    """
    if name not in DETECTORS:
        raise unknown(f"unknown detector '{name}'", name, sorted(DETECTORS))
    entry = DETECTORS[name]
    module = import_module(entry.module)
    return getattr(module, entry.config), getattr(module, entry.detector)
