"""Room: what a paper's authors published -> the same in our words; one file per method.

Each file has `from_official(content)`: it takes what `read` gave and answers with an `Official`,
or refuses whatever it does not fully understand.
"""

from importlib import import_module
from typing import Any

from allgood.official.checkpoint import Official, read

METHODS = ("dinomaly", "hvqtrans", "minimaxad", "rd4ad", "uniad", "unias")
"""Each is a module of this room."""


def from_official(method: str, content: Any) -> Official:
    """The content of an official checkpoint, taken apart.

    Raises:
        InputError: anything in it that is not this method's.
    """
    official: Official = import_module(f"allgood.official.{method}").from_official(content)
    return official


__all__ = ["METHODS", "Official", "from_official", "read"]
