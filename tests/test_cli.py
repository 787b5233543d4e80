"""The command line as a user meets it: help, exit codes, what goes to stdout."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doors import TINY, Answer, Command
from rich.console import Console

from allgood import __version__, progress
from allgood.recipes.costfilter import FILTERS

pytest_plugins = ["doors_fixtures"]

MEASURED = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
words = [sys.executable, "-m", "allgood", *sys.argv[1:]]
done = subprocess.run(words, capture_output=True, text=True)
seconds = time.perf_counter() - started
kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, done.stdout, done.stderr, seconds, kilobytes]))
"""


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["--version"]])
def test_help_is_quick_and_small(words: list[str]) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, check=True
    )
    code, out, err, seconds, kilobytes = json.loads(answer.stdout)
    assert code == (0 if words else 2)
    assert not err
    assert ("usage: allgood" in out) or out == f"allgood {__version__}\n"
    assert seconds < 2  # 0.1 s on an idle machine; this one may be busy
    assert kilobytes < 60_000


def loaded_by(words: list[str]) -> set[str]:
    """Top-level modules that are loaded once the command has answered."""
    code = (
        "import sys\nfrom allgood.cli import main\n"
        f"assert main({words!r}) in (0, 2)\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in answer.stdout.splitlines()[-1].split()}


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by(["--help"]) & {"torch", "numpy", "tyro", "PIL", "rich"}


@pytest.mark.parametrize("command", ["fit", "calibrate", "inspect", "evaluate", "demo", "list"])
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    assert not loaded_by([command, "--help"]) & {"torch", "numpy", "timm"}


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("fit", "allgood fit [-h] [OPTIONS] DATA ..."),
        ("calibrate", "allgood calibrate [-h] [OPTIONS] RUN GOOD ..."),
        ("inspect", "allgood inspect [-h] [OPTIONS] RUN PICTURES ..."),
        ("evaluate", "allgood evaluate [-h] [OPTIONS] RUN DATA ..."),
    ],
)
def test_help_of_a_command(allgood: Command, command: str, usage: str) -> None:
    answer = allgood(command, "--help")
    assert answer.code == 0
    assert f"usage: {usage}\n" in answer.out
    assert "None" not in answer.out


def test_help_explains_every_option(allgood: Command) -> None:
    """A docstring whose `Args` fell apart once lost the options behind it."""
    text = " ".join(allgood("calibrate", "--help").out.split())
    for words in ("what the pictures show", "how the pictures lie on disk", "auto, cpu or cuda"):
        assert words in text


def test_list(allgood: Command) -> None:
    assert "patchcore" in allgood("list", "detectors").out
    assert allgood("list", "encoders").out.startswith("efficientnet_lite0 ")
    assert "mvtec" in allgood("list", "datasets").out
    lines = allgood("list", "presets").out.splitlines()
    assert [line.split()[0] for line in lines] == list(FILTERS)
    (line,) = (line for line in lines if line.startswith("reference-dinomaly "))
    assert "behind dinomaly: full network, 5100 steps of 12 pictures, fusion 0.05" in line


@pytest.mark.parametrize("what", ["recipes", "presets"])
def test_listing_recipes_loads_nothing_heavy(what: str) -> None:
    assert not loaded_by(["list", what]) & {"torch", "numpy", "PIL"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], "unknown command 'fitt'; did you mean 'fit'? known: demo, fit"),
        (["zzz"], "unknown command 'zzz'; known: demo"),
    ],
)
def test_unknown_command(allgood: Command, words: list[str], said: str) -> None:
    assert allgood.refused(*words).startswith(said)


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "x", "--detectr", "patchcore"],
        ["fit", "x", "--seed", "one"],
        ["list", "detecors"],
        ["inspect"],
    ],
)
def test_options_that_cannot_be_parsed(allgood: Command, words: list[str]) -> None:
    answer = allgood(*words)
    assert answer.code == 2
    assert not answer.out
    assert "--help" in answer.err


def test_closed_pipe_is_no_traceback() -> None:
    """`allgood inspect ... | head -1`: the reader leaves, we stop without a word."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "allgood", "list", "detectors"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_progress_with_time_left_on_a_terminal(
    allgood: Command, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bars on stderr, one after the other; stdout has the run's folder and nothing else."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=100)
    monkeypatch.setattr(progress, "console", terminal)
    answer = allgood("fit", tree, "--out", tmp_path / "run", *TINY)
    assert answer.out == f"{tmp_path / 'run'}\n"
    text = screen.getvalue()
    places = [
        text.index(words)
        for words in (
            "reading good pictures",
            "choosing the memory bank",
            "calibrating on good pictures",
            "learned 2 categories",
        )
    ]
    assert places == sorted(places)
    assert re.search(r"\d+/58 .*(\d:\d\d:\d\d|-:--:--)", text)


def test_no_bars_where_there_is_no_terminal(allgood: Command, tree: Path, tmp_path: Path) -> None:
    lines = allgood("fit", tree, "--out", tmp_path / "run", *TINY).err.splitlines()
    assert lines.count("reading good pictures: 58") == 1
    assert not any("━" in line or "\x1b" in line for line in lines)


def test_failing_machine(allgood: Command, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 and one sentence; with a remedy where it is about writing."""

    def fail(number: int) -> Callable[..., None]:
        def read_data(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), "disk/run")

        return read_data

    monkeypatch.setattr("allgood.fitting.setup.read_data", fail(errno.EIO))
    assert allgood("fit", tree) == Answer(1, "", "allgood: disk/run: Input/output error\n")
    monkeypatch.setattr("allgood.fitting.setup.read_data", fail(errno.EACCES))
    answer = allgood("fit", tree)
    assert answer.code == 1
    assert answer.err == (
        "allgood: disk/run: Permission denied; make room or choose another folder, "
        "and give the same command again\n"
    )


def test_stopped_by_the_user(allgood: Command, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("allgood.fitting.setup.read_data", stop)
    answer = allgood("fit", tree)
    assert answer.code == 130
    assert answer.err == "allgood: stopped; the same command goes on where a fit was\n"
