"""The state of a fit under way: which folder it may use, what a killed one left to go on with."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allgood import __version__
from allgood.runs import CONFIG, STATE, publish, read_json, write_json
from allgood.types import InputError

_REQUEST = "request.json"
"""In state/: what the fit under way was asked for; only the same request goes on with it."""


def refuse_folder(out: Path, overwrite: bool) -> None:
    """InputError where the folder holds something that this fit must not touch."""
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: name a folder with --out")
    if (out / CONFIG).exists():
        if not overwrite:
            raise InputError(
                f"run '{out}' exists: name another folder with --out, or give --overwrite"
            )
    elif out.is_dir() and any(out.iterdir()) and not is_unfinished(out):
        raise InputError(f"folder '{out}' is not empty and no run: name another one with --out")


def is_unfinished(out: Path) -> bool:
    """Whether a killed fit left its state; the first thing it writes is the request."""
    state = out / STATE
    if not state.is_dir():
        return False
    return (state / _REQUEST).is_file() or all(_REQUEST in path.name for path in state.iterdir())


def open_state(out: Path, request: Mapping[str, Any], overwrite: bool) -> Path:
    """The folder state/, new or with what a killed fit of the same request left there."""
    state = out / STATE
    request = json.loads(json.dumps({"allgood": __version__, **request}))  # as it will be read
    if (state / _REQUEST).is_file() and read_json(state / _REQUEST) != request:
        if not overwrite:
            raise InputError(
                f"run '{out}' holds an unfinished fit of other data or settings: give that command "
                "again, name another folder with --out, or give --overwrite"
            )
        shutil.rmtree(state)
    try:
        state.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"folder '{out}' cannot be made: a part of its path is a file; "
            "name another one with --out"
        ) from None
    write_json(state / _REQUEST, request)
    return state


@contextmanager
def making(out: Path, request: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """A run comes to be: the block fills state/run of the state's folder that it is given, and
    calls `finish`; then the run is moved into place.

    The same request goes on with what a killed one left. A user's mistake leaves nothing behind.
    """
    state = open_state(out, request, overwrite)
    try:
        yield state
        publish(state / "run", out)
    except InputError:  # the user must change something, so there is nothing to go on with
        withdraw(out)
        raise
    except OSError as error:
        error.filename = error.filename or str(state)
        raise
    shutil.rmtree(state)


def withdraw(out: Path) -> None:
    """Leave nothing of a fit that cannot come to an end; an older run stays."""
    shutil.rmtree(out / STATE, ignore_errors=True)
    if not any(out.iterdir()):
        out.rmdir()
