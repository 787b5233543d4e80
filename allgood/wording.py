"""How names stand in messages: printable, in a list, and beside the nearest known one."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from allgood.types import InputError

_LISTED = 8


def shown(name: Path | str) -> str:
    """A name that can be printed anywhere: bytes that are no UTF-8 become question marks."""
    return os.fspath(name).encode("utf-8", "replace").decode("utf-8")


def listed(names: Iterable[Path | str]) -> str:
    """`'a', 'b' and 3 more`: the first eight."""
    quoted = [f"'{shown(name)}'" for name in names]
    more = f" and {len(quoted) - _LISTED} more" if len(quoted) > _LISTED else ""
    return ", ".join(quoted[:_LISTED]) + more


def unknown(problem: str, name: str, known: Iterable[str], remedy: str | None = None) -> InputError:
    """The error for a name that is none of those known: `PROBLEM; did you mean 'x'? REMEDY`.

    Args:
        problem: what is wrong, e.g. `unknown recipe 'dino'`.
        name: the one that was given, whose nearest is suggested.
        known: those there are.
        remedy: left out: all that are known.
    """
    by_case = {item.casefold(): item for item in known}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1, cutoff=0.5)
    hint = f"; did you mean '{shown(by_case[near[0]])}'?" if near else ";"
    return InputError(f"{problem}{hint} {remedy or 'known: ' + ', '.join(by_case.values())}")
