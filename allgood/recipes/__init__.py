"""Named, complete settings: each method as its paper has it, with the numbers that it reports.

A recipe fills whatever `fit` is not told. Those called after the detectors serve where no recipe
is named. One file per method; nothing heavy is imported here: listing them is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from allgood.recipes import dinomaly, hvqtrans, minimaxad, rd4ad, uniad, unias
from allgood.recipes.recipe import Recipe
from allgood.types import InputError
from allgood.wording import unknown

RECIPES: dict[str, Recipe] = {
    "patchcore": Recipe("patchcore"),
    "anomalydino": Recipe(
        "anomalydino", norm=True, image_size=448, keep_aspect=True, interpolation="bicubic"
    ),
    "anomaldf": Recipe(
        "anomalydino",
        encoder="vit_base_patch8_224.dino",
        levels=(2, 5, 8, 11),
        settings={"templates": 4, "query": "raw"},
        note="what --preset reference-anomaldf stands behind",
    ),
    **dinomaly.RECIPES,
    **hvqtrans.RECIPES,
    **rd4ad.RECIPES,
    **uniad.RECIPES,
    **unias.RECIPES,
    **minimaxad.RECIPES,
}


def find_recipe(name: str) -> Recipe:
    """Raises InputError where there is no such recipe; the message suggests the nearest."""
    if name not in RECIPES:
        remedy = "`allgood list recipes` names them all"
        raise unknown(f"unknown recipe '{name}'", name, RECIPES, remedy)
    return RECIPES[name]


def configured(config_class: type, given: Mapping[str, Any], words: Sequence[str]) -> Any:
    """A config: its defaults, then what a recipe gives, then `name=value` words.

    Raises:
        InputError: an unknown name (the nearest is suggested) or a value of another type.
    """
    return config_class(**{**given, **_parsed(config_class, words)})


def _parsed(config_class: type, words: Sequence[str]) -> dict[str, Any]:
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in hints:
            raise unknown(f"unknown setting '{name}'", name, hints)
        if not equals:
            raise InputError(f"setting '{word}' has no value: write {name}=VALUE")
        hint = hints[name]
        options = get_args(hint)
        if type(None) in options:
            if text.lower() == "none":
                values[name] = None
                continue
            hint = next(option for option in options if option is not type(None))
        values[name] = _value(name, text, hint)
    return values


def _value(name: str, text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise InputError(
                f"setting {name} must be one of {', '.join(get_args(hint))}, got '{text}'"
            )
        return text
    if get_origin(hint) is tuple:  # of one type, with commas between
        item = get_args(hint)[0]
        return tuple(_value(name, part, item) for part in text.split(",") if part)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"setting {name} must be true or false, got '{text}'")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        kind = "a whole number" if hint is int else "a number"
        raise InputError(f"setting {name} must be {kind}, got '{text}'") from None
