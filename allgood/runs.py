"""A run's folder: what is in it, and how it is written so that a kill never leaves half a file.

config.json         resolved settings; moved in last, so a folder that has it is complete
weights.safetensors trained weights and memory banks; never the frozen encoder's
encoder.safetensors the frozen encoder's weights, in converted runs only
model.onnx          in exported runs, instead of all weights: the whole detector as a graph
training.jsonl      loss and rate while it was trained, one JSON line per report
ignore/             masks of regions that nobody should look at, one PNG per category
calibration.json    good scores and thresholds per category, and the promise made
provenance.json     versions, git revision, data fingerprint, command, unreadable pictures, time
metrics.json        all metrics with their bounds; report.html, the same as a page
state/              what a killed fit needs to go on; in state/run the new run comes to be

A fit builds the whole run in state/run and only then moves it into place (`publish`). So a run that
is to be replaced serves until the new one is finished, and no folder holds parts of both.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile
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
ENCODER = "encoder.safetensors"
MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
"""Beside a graph of more than 2 GB, which one file of its format cannot hold."""
TRAINING_LOG = "training.jsonl"
REPORT = "report.html"
IGNORE = "ignore"
STATE = "state"

_PARTS = (
    *(WEIGHTS, ENCODER, MODEL, MODEL_DATA, IGNORE, CALIBRATION),
    *(PROVENANCE, TRAINING_LOG, METRICS, REPORT),
)
"""Everything that belongs to one fit, but for the config, which stands for the whole."""
_FINISHED = "finished.json"
"""In a new run's folder: names the files of the run, once all of them are there."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it; on failure nothing of it stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say which file it had no room for
            error.filename = str(path)
        raise


def require_writable(folder: Path, names: Sequence[str]) -> None:
    """Make a folder, and see that files of these names can be written there: long before they are.

    Raises:
        InputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"folder '{folder}' cannot be written ({error.strerror}): make it writable, or name "
            "another one"
        ) from error
    for name in names:
        if (folder / name).is_dir():
            raise InputError(f"'{folder / name}' is a folder: remove it, or name another one")


def write_json(path: Path, data: Any) -> None:
    """As `write_bytes`; NaN is refused, as JSON has none."""
    write_bytes(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, *, remedy: str = "fit the run again") -> Any:
    """Raises InputError, which ends with the remedy, where the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): {remedy}") from error


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


def ignore_file(run: Path, category: str) -> Path:
    """Where the mask of a category lies."""
    return run / IGNORE / f"{file_name(category)}.png"


def file_name(category: str) -> str:
    """Whatever a category is called, a name that stays in the folder it is put into."""
    return re.sub(r"^\.|[%/\\:\0]", lambda found: f"%{ord(found[0]):02X}", category)


def finish(new: Path) -> None:
    """Say that the run being built in `new` has all its files; from here on it can only be
    published."""
    names = [name for name in (*_PARTS, CONFIG) if (new / name).exists()]
    write_json(new / _FINISHED, names)


def is_finished(new: Path) -> bool:
    return (new / _FINISHED).is_file()


def publish(new: Path, run: Path) -> None:
    """Move a finished run to its place; an older run there goes, with its metrics and report.

    Killed half-way, it leaves a folder without config.json, which nobody takes for a run; called
    again it does the rest.
    """
    names = read_json(new / _FINISHED)
    if (new / CONFIG).exists():  # otherwise an earlier call came to the end
        (run / CONFIG).unlink(missing_ok=True)
        for name in _PARTS:
            if name not in names:
                _remove(run / name)
            elif (new / name).exists():
                _remove(run / name)
                os.replace(new / name, run / name)
        os.replace(new / CONFIG, run / CONFIG)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
                f"run '{run}' is unfinished: the same `allgood` command as before completes it"
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
    """Where a result comes from: versions, revision, machine, and `facts`."""
    packages = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors")
    return {
        "allgood": __version__,
        "packages": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "git_revision": _git_revision(),
        **facts,
    }


def command_line(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The shell command that does what a Python call did; defaults are left out.

    Args:
        function: one whose arguments are a command's; those without default are positional.
        arguments: all of them by name.
    """
    words = ["allgood", function.__name__]
    options = []
    for name, parameter in signature(function).parameters.items():
        value = arguments[name]
        if parameter.default is parameter.empty:
            words += _words(value)
        elif value != parameter.default:
            flag = "--" + name.replace("_", "-")
            is_switch = isinstance(parameter.default, bool)
            options += [flag] if is_switch else [flag, *_words(value)]
    return shlex.join([*words, *options])


def _words(value: Any) -> list[str]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [str(item) for item in value]
    return [str(value)]


def _git_revision() -> str | None:
    """Of the code, when it runs from its own checkout and not as a package in somebody else's."""
    root = Path(__file__).resolve().parents[1]
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--show-toplevel", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    top, _, revision = answer.stdout.strip().partition("\n")
    return revision if answer.returncode == 0 and Path(top).resolve() == root else None
