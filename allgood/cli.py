"""Door: the command line. Each command is a plain function; the parser only fills its arguments.

Nothing heavy is imported to print help: the commands load what they need when they run.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import allgood
from allgood.types import InputError
from allgood.wording import unknown

COMMANDS = {
    "demo": "learn two kinds of solar cells from good pictures, judge the rest, write a report",
    "fit": "learn what is good, from pictures of good parts",
    "calibrate": "set alarm thresholds from good pictures, with a promised false-alarm rate",
    "inspect": "judge pictures: one JSON line each",
    "evaluate": "measure a run on test pictures: table, metrics.json, report.html",
    "filter": "train a CostFilter behind a fitted detector",
    "synthesize": "draw anomalies with masks into good pictures: a test set where none exists",
    "export": "make one fast graph of a run, for machines that only judge",
    "convert": "make a run of an official checkpoint",
    "list": "name the detectors, encoders, recipes, filter presets or data layouts",
}


def inspect(
    run: Path,
    pictures: list[Path],
    *,
    category: str | None = None,
    overlays: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Judge pictures and print one JSON line for each; pictures that cannot be read come last.

    Args:
        run: folder of a fitted run.
        pictures: files, and folders that stand for all pictures below them.
        category: what they show; default: inferred per picture.
        overlays: folder for heat maps over the pictures, in their own size.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.
        precision: of the network; bf16 is faster where the processor knows it.
    """
    from allgood.data.images import read_image
    from allgood.inference import Inspector, picture_files

    paths = list(picture_files(pictures))
    if not paths:
        raise InputError("no pictures given: name files or folders after the run")
    overlay_of = _overlay_files(paths, overlays) if overlays is not None else {}
    inspector = Inspector(run, device=device, precision=precision)
    for inspection in inspector.inspect(paths, category=category, batch_size=batch_size):
        if inspection.path in overlay_of and inspection.error is None:
            overlay = inspection.overlay(read_image(inspection.path))
            _save_png(overlay_of[inspection.path], overlay)
        print(_json_line(inspection.to_json()), flush=True)


def list_(what: Literal["detectors", "encoders", "recipes", "presets", "datasets"]) -> None:
    """Name what can be asked for.

    Args:
        what: detectors (for --detector), encoders (for --encoder), recipes (for --recipe, with
            the numbers their papers report), presets (for --preset of `allgood filter`) or
            datasets (for --layout).
    """
    listing = _listing(what)
    width = max(len(name) for name in listing)
    for name, description in listing.items():
        print(f"{name:<{width}}  {description}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code: 2 for the user's mistakes, 1 for a failing machine.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"allgood {allgood.__version__}")
        return 0
    try:
        result = _call(words[0], words[1:])
        if result is not None:
            from allgood.progress import is_first_process

            if is_first_process():
                print(result)
    except InputError as error:
        print(f"allgood: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # the parser printed its help, or what is wrong with the options
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of our lines has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        remedy = (
            "; make room or choose another folder, and give the same command again"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
            else ""
        )
        print(f"allgood: {what}{remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("allgood: stopped; the same command goes on where a fit was", file=sys.stderr)
        return 130
    return 0


def _call(name: str, words: list[str]) -> Any:
    """Parse the words as the command's arguments, and call it."""
    command = _command(name)
    import tyro

    def parsed(**arguments: Any) -> Any:
        return command(**arguments)

    # tyro reads the signature. It shall not look at what the command returns, nor offer None as a
    # value: an option that may be left out is one that one leaves out.
    parameters = signature(command).parameters.values()
    hints = get_type_hints(command, localns=_RETURNED)
    parsed.__signature__ = Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    )
    parsed.__annotations__ = {
        parameter.name: _described(hints[parameter.name], parameter, tyro.conf.arg)
        for parameter in parameters
    }
    # One line per argument: the parser keeps line breaks, and has its own width.
    parsed.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", getdoc(command) or "")
    return tyro.cli(
        parsed,
        prog=f"allgood {name}",
        args=words,
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )


_RETURNED = {"Calibration": Any, "Evaluation": Any}
"""Names in the commands' return types, which only type checkers import."""


def _described(hint: Any, parameter: Parameter, arg: Callable[..., Any]) -> Any:
    """The parameter's type, with what the help shows in the place of its value."""
    required = parameter.default is Parameter.empty
    options = {}
    if get_origin(hint) in (Union, UnionType):  # X | None
        kind = next(option for option in get_args(hint) if option is not NoneType)
        options = {"metavar": _metavar(kind), "help_behavior_hint": ""}
    elif get_origin(hint) in (list, tuple):
        options = {"metavar": f"{parameter.name.upper()} ..." if required else _metavar(hint)}
        options["help_behavior_hint"] = "(required)" if required else ""
    elif required and hint is Path:
        options = {"metavar": parameter.name.upper()}
    return Annotated[hint, arg(**options)] if options else hint


def _metavar(kind: Any) -> str:
    if kind is bool:
        return "{True,False}"
    if get_origin(kind) in (list, tuple):
        return f"{_metavar(get_args(kind)[0])} ..."
    return kind.__name__.upper()


def _command(name: str) -> Callable[..., Any]:
    if name not in COMMANDS:
        raise unknown(f"unknown command '{name}'", name, COMMANDS)
    match name:
        case "inspect":
            return inspect
        case "list":
            return list_
        case "demo":
            from allgood.demo import demo

            return demo
    command: Callable[..., Any] = getattr(allgood, name)  # the same for Python users
    return command


def _usage() -> str:
    lines = [
        "usage: allgood COMMAND ...",
        "",
        "Visual anomaly detection in production: one model, all your products, good images only.",
        "",
        *(f"  {name:<10} {summary}" for name, summary in COMMANDS.items()),
        "",
        "allgood COMMAND --help explains a command; allgood --version.",
    ]
    return "\n".join(lines)


def _listing(what: str) -> dict[str, str]:
    if what == "detectors":
        from allgood.detectors import DETECTORS

        return {name: entry.summary for name, entry in DETECTORS.items()}
    if what == "encoders":
        from allgood.encoders import RECOMMENDED

        return RECOMMENDED
    if what == "recipes":
        from allgood.recipes import RECIPES

        return {name: recipe.describe() for name, recipe in RECIPES.items()}
    if what == "presets":
        from allgood.recipes.costfilter import FILTERS

        return {name: preset.describe() for name, preset in FILTERS.items()}
    from allgood.data.readers import LAYOUTS

    return {name: layout.description for name, layout in LAYOUTS.items()}


def _json_line(record: dict[str, Any]) -> str:
    """JSON with letters as they are, as far as stdout can carry them; bytes of a file name that are
    no UTF-8 become escapes, from which a reader gets the very same path."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, allow_nan=False)
    return line


def _overlay_files(paths: list[Path], folder: Path) -> dict[Path, Path]:
    """A file per picture: its name with .png, below its folders from the one common to all on.

    Raises:
        InputError: the folder is a file, or a heat map would take the place of a picture.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: name a folder with --overlays")
    absolute = {path: Path(os.path.abspath(path)) for path in paths}
    root = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    names = {path: whole.relative_to(root) for path, whole in absolute.items()}
    # a.jpg and a.png beside each other must not share one overlay
    clash = len({name.with_suffix("") for name in names.values()}) < len(set(names.values()))
    files = {
        path: folder / (name.with_name(f"{name.name}.png") if clash else name.with_suffix(".png"))
        for path, name in names.items()
    }
    originals = {os.path.realpath(path) for path in paths}
    for file in files.values():
        if os.path.realpath(file) in originals:
            raise InputError(
                f"the heat map would replace the picture {file}: name another folder with "
                "--overlays"
            )
    return files


def _save_png(path: Path, picture: Any) -> None:
    import io

    from PIL import Image

    from allgood.runs import write_bytes

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
