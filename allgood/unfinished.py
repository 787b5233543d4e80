"""The state of a fit under way: which folder it may use, what a killed one left to go on with."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from allgood import __version__
from allgood.runs import CONFIG, STATE, WEIGHTS, publish, read_json, write_json
from allgood.types import InputError

_REQUEST = "request.json"
"""In state/: what the fit under way was asked for; only the same request goes on with it."""
_LOCK = "lock"
"""In state/: held while a fit writes there; the system frees it when the fit is killed."""
_WORK = ("training/checkpoint.json", f"run/{WEIGHTS}")
"""In state/: what a fit has learned so far; no mistake that shows later may cost it."""


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
    """Whether a killed fit left its state; the first things in it are the lock and the request."""
    state = out / STATE
    if not state.is_dir():
        return False
    return (state / _REQUEST).is_file() or all(
        path.name == _LOCK or _REQUEST in path.name for path in state.iterdir()
    )


def open_state(out: Path, request: Mapping[str, Any], overwrite: bool) -> None:
    """Make state/ ready, locked as it is: empty, or with what a killed fit of the same request
    left there."""
    state = out / STATE
    request = json.loads(json.dumps({"allgood": __version__, **request}))  # as it will be read
    if (state / _REQUEST).is_file() and read_json(state / _REQUEST) != request:
        if not overwrite:
            raise InputError(
                f"run '{out}' holds an unfinished fit of other data or settings: give that command "
                "again, name another folder with --out, or give --overwrite"
            )
        for path in state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
    write_json(state / _REQUEST, request)


@contextmanager
def locked(out: Path) -> Iterator[Path]:
    """The folder state/, made if missing; no other fit writes there meanwhile.

    Raises:
        InputError: another fit is writing there, or the folder cannot be made.
    """
    state = out / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(
            f"folder '{out}' cannot be made: a part of its path is a file; "
            "name another one with --out"
        ) from None
    lock = FileLock(state / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another fit is writing '{out}': wait until it is finished, or name another folder "
            "with --out"
        ) from None
    try:
        yield state
    finally:
        lock.release()


@contextmanager
def making(out: Path, request: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """A run comes to be: the block fills state/run of the state's folder that it is given, and
    calls `finish`; then the run is moved into place.

    The same request goes on with what a killed one left. A user's mistake leaves nothing behind,
    but for what was learned before it showed.
    """
    with locked(out) as state:
        open_state(out, request, overwrite)
        try:
            refuse_folder(out, overwrite)  # whoever had the lock before may have finished a run
            yield state
            publish(state / "run", out)
        except InputError:
            if not any((state / name).exists() for name in _WORK):
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
