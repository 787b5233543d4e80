"""The rooms and the arrows between them: who imports whom, as docs/architecture.md draws it.

A new arrow fails here, so that it is a decision and not an accident.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import allgood

PACKAGE = Path(allgood.__file__).parent

ROOMS = {
    "types": set(),
    "wording": {"types"},
    "scoring": {"types"},
    "data": {"types", "wording"},
    "encoders": {"types", "wording"},
    "layers": {"types", "scoring"},
    "detectors": {"types", "wording", "encoders", "layers", "scoring"},
    "official": {"types", "encoders", "detectors"},
    "metrics": {"types"},
    "costfilter": {"types", "layers", "scoring", "metrics"},
    "evaluation": {"types", "scoring", "metrics"},
    "calibration": {"types"},
    "runs": {"types", "allgood"},
    "unfinished": {"types", "runs", "allgood"},
    "ignored": {"types", "data", "runs"},
    "pictures": {"types", "data", "ignored"},
    "drawing": {"types", "data", "layers", "ignored", "pictures"},
    "progress": set(),
    "own_state": set(),
    "training": {"types", "runs", "progress", "own_state"},
    "recipes": {"types", "wording", "data"},
    "exported": {"types", "scoring", "progress"},
    "graph": {"types", "layers", "exported"},
    "inspection": {"data", "evaluation"},
    "options": {"types"},
}
"""Room -> the rooms it may import; each only rooms above it. `allgood` is the version."""

DOORS = {
    "inference": {
        "costfilter",
        *("types", "wording", "data", "encoders", "detectors", "calibration", "runs", "ignored"),
        *("own_state", "exported", "inspection", "options"),
    },
    "calibrating": {
        *("types", "data", "calibration", "runs", "progress", "inference", "options"),
    },
    "learning": {"types", "data", "pictures", "progress", "training"},
    "fitting": {
        *("types", "data", "encoders", "layers", "detectors", "calibration", "runs", "progress"),
        *("unfinished", "ignored", "pictures", "own_state", "recipes", "training", "options"),
        *("calibrating", "learning"),
    },
    "filtering": {
        *("types", "data", "calibration", "costfilter", "drawing", "recipes", "runs", "progress"),
        *("unfinished", "ignored", "pictures", "own_state", "training", "inference", "options"),
        *("calibrating", "learning"),
    },
    "converting": {
        *("types", "data", "encoders", "detectors", "official", "costfilter", "recipes"),
        *("runs", "progress", "unfinished", "own_state", "ignored", "pictures"),
        *("inference", "learning", "options"),
    },
    "exporting": {
        *("types", "ignored", "runs", "progress", "unfinished", "exported", "graph", "inference"),
    },
    "evaluating": {
        *("types", "data", "metrics", "evaluation", "calibration", "runs", "progress"),
        *("inference", "options"),
    },
    "synthesizing": {
        *("types", "wording", "data", "evaluation", "runs", "progress", "recipes", "options"),
    },
    "demo": {"fitting", "evaluating"},
    "cli": {
        *("types", "wording", "data", "encoders", "detectors", "recipes", "runs", "progress"),
        *("inference", "demo", "allgood"),
    },
    "allgood": {
        *("types", "inference", "calibrating", "fitting", "filtering", "converting", "evaluating"),
        *("synthesizing", "exporting"),
    },
    "__main__": {"cli"},
}
"""Door -> rooms and doors it may import. The package's __init__ names the doors for Python users,
and loads none of them before it is used."""

TYPES_ONLY = {("types", "layers")}
"""Arrows that only a type checker follows, under `if TYPE_CHECKING`."""


def room_of(module: str) -> str:
    """`allgood.data.files` -> data; `allgood` itself -> allgood."""
    return module.split(".")[1] if "." in module else module


def arrows(source: str, *, package: bool = True) -> set[tuple[str, bool]]:
    """(room imported, whether for a type checker only) of a file; imports in functions too."""
    found = set()
    tree = ast.parse(source)
    for_checker = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
        for part in test.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            names = [node.module or ""]
            if node.module == "allgood":  # `from allgood import scoring` imports the room
                names = [
                    f"allgood.{alias.name}" if alias.name in ROOMS | DOORS else "allgood"
                    for alias in node.names
                ]
        for name in names:
            if name.split(".")[0] == "allgood":
                found.add((room_of(name), id(node) in for_checker))
    return found


def files() -> dict[str, list[Path]]:
    """Room or door -> its files."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        parts.setdefault("allgood" if name == "__init__" else name, []).append(path)
    return parts


def test_every_part_stands_in_the_table() -> None:
    assert set(files()) == set(ROOMS | DOORS)


@pytest.mark.parametrize("name", ROOMS | DOORS)
def test_arrows(name: str) -> None:
    allowed = (ROOMS | DOORS)[name]
    for path in files()[name]:
        for target, checked in arrows(path.read_text(encoding="utf-8")):
            if target == name or (checked and (name, target) in TYPES_ONLY):
                continue
            assert target in allowed, f"{path.relative_to(PACKAGE)} imports {target}"


def test_no_room_imports_a_door_and_arrows_run_one_way() -> None:
    order = [*ROOMS, *DOORS]
    for name, allowed in (ROOMS | DOORS).items():
        if name in ROOMS:
            assert not allowed & (set(DOORS) - {"allgood"})
        for target in allowed - {"allgood"}:
            assert order.index(target) < order.index(name), f"{name} imports {target}"


def test_only_runs_and_doors_know_the_version() -> None:
    """`from allgood import ...` in them takes nothing but that."""
    for name in ("runs", "fitting", "cli"):
        for path in files()[name]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "allgood":
                    assert [alias.name for alias in node.names] == ["__version__"]


def test_a_new_arrow_would_be_seen() -> None:
    source = "def f():\n    from allgood import inference\n    import allgood.cli\n"
    assert arrows(source) == {("inference", False), ("cli", False)}
    source = "if TYPE_CHECKING:\n    from allgood.layers.x import Y\n"
    assert arrows(source) == {("layers", True)}


def test_importing_the_package_loads_no_room() -> None:

    code = "import sys, allgood; print(sorted(m for m in sys.modules if m.startswith('allgood')))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "['allgood']"


@pytest.mark.parametrize("name", allgood.__all__)
def test_public_names(name: str) -> None:
    assert getattr(allgood, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        _ = allgood.fitt  # type: ignore[attr-defined]
