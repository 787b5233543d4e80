"""A run's folder: what is in it, and how it is written so that a kill never leaves half a file.

config.json         resolved settings; written last, so a folder that has it is complete
weights.safetensors trained weights and memory banks; never the frozen encoder's
ignore/             masks of regions that nobody should look at, one PNG per category
calibration.json    good scores and thresholds per category, and the promise made
provenance.json     package versions, git revision, data fingerprint, command, wall time, device
metrics.json        all metrics with their bounds; report.html, the same as a page
state/              what a killed fit needs to go on
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from allgood import __version__
from allgood.types import InputError

FORMAT = 1
"""Of the run's folder. A reader refuses any other number."""

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
CALIBRATION = "calibration.json"
PROVENANCE = "provenance.json"
METRICS = "metrics.json"
REPORT = "report.html"
IGNORE = "ignore"
STATE = "state"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it; on failure nothing of it stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """As `write_bytes`; NaN is refused, as JSON has none."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises InputError where the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}): fit the run again"
        ) from error


def write_weights(path: Path, state: Mapping[str, Any]) -> None:
    """Tensors as safetensors, atomically."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous().cpu() for name, tensor in state.items()}))


def read_weights(path: Path) -> dict[str, Any]:
    """Raises InputError where the file is missing or torn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged: fit the run again") from error


def read_config(run: Path) -> dict[str, Any]:
    """The resolved settings of a complete run.

    Raises:
        InputError: no such folder, not a run, an unfinished one, or one of another version.
    """
    if not run.is_dir():
        raise InputError(f"run '{run}' does not exist: `allgood fit DATA --out {run}` makes it")
    if not (run / CONFIG).is_file():
        if (run / STATE).is_dir():
            raise InputError(
                f"run '{run}' is unfinished: the same `allgood fit` command as before completes it"
            )
        raise InputError(f"'{run}' is not a run: it has no {CONFIG}")
    config = read_json(run / CONFIG)
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise InputError(
            f"run '{run}' has format {found}, but allgood {__version__} reads {FORMAT}: "
            "fit it again, or install the version that wrote it"
        )
    return config


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a result comes from: versions, revision, machine, command, and `facts`."""
    packages = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors")
    return {
        "allgood": __version__,
        "packages": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "git_revision": _git_revision(),
        "command": sys.argv,
        **facts,
    }


def _git_revision() -> str | None:
    """Of the code, when it runs from a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
