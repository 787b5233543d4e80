"""Door: the command line. Each command is a plain function; the parser only fills its arguments.

Nothing heavy is imported to print help: the commands load what they need when they run.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from allgood.types import InputError

COMMANDS = {
    "demo": "learn two kinds of solar cells from good pictures, judge the rest, write a report",
    "fit": "learn what is good, from pictures of good parts",
    "calibrate": "set alarm thresholds from good pictures, with a promised false-alarm rate",
    "inspect": "judge pictures: one JSON line each",
    "evaluate": "measure a run on test pictures: table, metrics.json, report.html",
    "list": "name the detectors, encoders or data layouts",
}


def inspect(
    run: Path,
    pictures: list[Path],
    *,
    category: str | None = None,
    overlays: Path | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Judge pictures and print one JSON line for each; pictures that cannot be read come last.

    Args:
        run: folder of a fitted run.
        pictures: files or folders.
        category: what they show; default: inferred per picture.
        overlays: folder for heat maps over the pictures, in their own size.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.
    """
    from allgood.inference import Inspector

    paths = list(_pictures(pictures))
    inspector = Inspector(run, device=device)
    names = _overlay_names(paths)
    for inspection in inspector.inspect(paths, category=category, batch_size=batch_size):
        print(json.dumps(inspection.to_json(), ensure_ascii=False), flush=True)
        if overlays is not None and inspection.error is None:
            from allgood.data.images import read_image

            picture = read_image(inspection.path)
            _save_png(overlays / names[inspection.path], inspector.overlay(inspection, picture))


def list_(what: Literal["detectors", "encoders", "datasets"]) -> None:
    """Name what can be asked for.

    Args:
        what: detectors (for --detector), encoders (for --encoder) or datasets (for --layout).
    """
    for name, description in _listing(what).items():
        print(f"{name:<44} {description}" if what == "encoders" else f"{name:<14} {description}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for the user's mistakes, 1 for a failing
    machine."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from allgood import __version__

        print(f"allgood {__version__}")
        return 0
    try:
        command = _command(words[0])
        import tyro

        result = tyro.cli(
            command,
            prog=f"allgood {words[0]}",
            args=words[1:],
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        if result is not None:
            print(result)
    except InputError as error:
        print(f"allgood: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our lines has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            f"allgood: cannot write{where}: {error.strerror}; make room or choose another folder "
            "and give the same command again",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("allgood: stopped; the same command goes on where a fit was", file=sys.stderr)
        return 130
    return 0


def _command(name: str) -> Callable[..., Any]:
    match name:
        case "fit":
            from allgood.fitting import fit

            return fit
        case "calibrate":
            from allgood.calibrating import calibrate

            return calibrate
        case "evaluate":
            from allgood.evaluating import evaluate

            return evaluate
        case "demo":
            from allgood.demo import demo

            return demo
        case "inspect":
            return inspect
        case "list":
            return list_
    from allgood.data.files import did_you_mean

    raise InputError(f"unknown command '{name}'{did_you_mean(name, list(COMMANDS))}; see --help")


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
    from allgood.data.readers import LAYOUTS

    return {name: layout.description for name, layout in LAYOUTS.items()}


def _pictures(paths: list[Path]) -> Iterator[Path]:
    """Files as they are, folders as the pictures below them."""
    from allgood.data.files import pictures_below

    for path in paths:
        if path.is_dir():
            found = pictures_below(path)
            if not found:
                raise InputError(f"{path}: holds no picture; name another folder")
            yield from found
        elif not path.exists() and not path.suffix:
            raise InputError(f"{path}: no such file or folder; check the path")
        else:
            yield path


def _overlay_names(paths: list[Path]) -> dict[Path, Path]:
    """A file name per picture: its own with .png, below as many of its folders as tell it apart."""
    if not paths:
        return {}
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    names = {path: path.absolute().relative_to(root) for path in paths}
    stems = [name.with_suffix("") for name in names.values()]
    # a.jpg and a.png beside each other must not share one overlay
    clash = len(set(stems)) < len(set(paths))
    return {
        path: name.with_name(f"{name.name}.png") if clash else name.with_suffix(".png")
        for path, name in names.items()
    }


def _save_png(path: Path, picture: Any) -> None:
    import io

    from PIL import Image

    from allgood.runs import write_bytes

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
