"""Behind `fit`: what is asked for, resolved: recipe, good pictures, the network's input."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from allgood.data.fingerprint import fingerprint
from allgood.data.readers import Dataset, read_data
from allgood.data.transforms import Transform
from allgood.detectors import detector_classes
from allgood.encoders.frozen import FrozenEncoder
from allgood.ignored import mask_digests, read_masks
from allgood.progress import say
from allgood.recipes import find_recipe
from allgood.recipes.recipe import Recipe
from allgood.runs import PROVENANCE, read_json
from allgood.types import InputError, Sample

INCIDENTAL = ("--out", "--cache", "--no-cache", "--tensorboard", "--device", "--overwrite")
"""Options by which two commands may differ and still ask for the same run."""


def require_same(
    run: Path, command: str, samples: Sequence[Sample], masks: Mapping[str, np.ndarray]
) -> None:
    """InputError where a finished run is of another command, or its data have changed since."""
    facts = read_json(run / PROVENANCE)
    if _decisive_words(facts["command"]) != _decisive_words(command):
        raise InputError(
            f"run '{run}' was fitted by another command: give that command again, name another "
            "folder with --out, or give --overwrite"
        )
    categories = sorted({sample.category for sample in samples})
    if facts["data_fingerprint"] != fingerprint(samples) or (
        mask_digests(read_masks(run, categories)) != mask_digests(masks)
    ):
        raise InputError(
            f"run '{run}' was fitted on other pictures or ignored regions: give --overwrite to fit "
            "all categories again, or name another folder with --out"
        )


def _decisive_words(command: str) -> list[str]:
    """The words of a command that decide what is learned."""
    words, is_decisive = [], True
    for word in shlex.split(command):
        if word.startswith("--"):
            is_decisive = word not in INCIDENTAL
        if is_decisive:
            words.append(word)
    return words


def few_shots(dataset: Dataset, shots: int, seed: int) -> list[Sample]:
    """The AnomalyDINO protocol: entries seed*k ... (seed+1)*k - 1 of each category's sorted good
    list; a category without good pictures has no part in it."""
    chosen = []
    for category in sorted({sample.category for sample in dataset.train}):
        good = [sample for sample in dataset.train if sample.category == category]
        block = good[seed * shots : (seed + 1) * shots]
        if len(block) < shots:
            raise InputError(
                f"category '{category}' has {len(good)} good pictures, too few for "
                f"{shots} shots with seed {seed}, which needs {(seed + 1) * shots}"
            )
        chosen += block
    return chosen


def resolved_recipe(
    name: str | None,
    detector: str | None,
    encoder: str | None,
    levels: tuple[int, ...] | None,
) -> Recipe:
    """The recipe named, or the detector's own, with what the user says otherwise."""
    if name is None:
        detector = detector or "patchcore"
        detector_classes(detector)  # so that the user reads of detectors, not of recipes
    recipe = find_recipe(name or detector or "")
    if detector is not None and detector != recipe.detector:
        raise InputError(
            f"recipe '{name}' is one of {recipe.detector}, not of {detector}: leave out --detector"
        )
    if encoder is not None:
        recipe = replace(recipe, encoder=encoder)
    return recipe if levels is None else replace(recipe, levels=levels)


def read_good(
    roots: Sequence[str | Path],
    layout: str | None,
    categories: Sequence[str] | None,
    train_share: float,
    seed: int,
) -> tuple[Dataset, tuple[str, ...]]:
    """The data of the categories asked for, described on stderr, and the names of all categories
    that lie there; there is something to learn from."""
    dataset = read_data(roots, layout=layout, train_share=train_share, seed=seed)
    known = dataset.categories
    if categories is not None:
        dataset = dataset.only(categories)
    if not dataset.train:
        raise InputError(
            f"{', '.join(map(str, roots))}: no good pictures to fit on; "
            "the layouts that are understood: allgood list datasets"
        )
    say(dataset.describe())
    if dataset.untrained:
        say(f"without good pictures, and so not learned: {', '.join(dataset.untrained)}")
    return dataset, known


def input_transform(
    recipe: Recipe,
    encoder: FrozenEncoder,
    image_size: int | None,
    crop: int | None,
    keep_aspect: bool | None,
) -> Transform:
    """The recipe's input geometry, or the user's."""
    multiple = encoder.multiple
    keep = recipe.keep_aspect if keep_aspect is None else keep_aspect
    if image_size is None:
        size, recipe_crop = recipe.image_size, recipe.crop
        if recipe.patch is not None and encoder.is_vit:  # as many patches as the paper has
            size = size * multiple // recipe.patch
            recipe_crop = recipe_crop and recipe_crop * multiple // recipe.patch
        size -= size % multiple
        crop = crop or recipe_crop
    else:
        size = image_size
        if crop is None and (size < multiple or (size % multiple and not keep)):
            lower = size - size % multiple
            near = f"{lower} or {lower + multiple}" if lower else str(multiple)
            raise InputError(
                f"image_size must be a multiple of {multiple} for encoder "
                f"'{encoder.config.name}', got {size}: take {near}"
            )
    return Transform(size, keep, multiple, crop, interpolation=recipe.interpolation)
