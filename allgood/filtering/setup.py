"""Behind `filter`: what is asked for, resolved.

The host, the settings, and which of the good pictures teach the filter, are its templates, measure
it, or set its thresholds.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from allgood import learning
from allgood.calibration import pictures_needed
from allgood.costfilter.config import FilterConfig
from allgood.data.fingerprint import content_digest, digests
from allgood.data.foreground import Foreground, choose_foreground
from allgood.data.images import read_image
from allgood.data.readers import read_data
from allgood.data.synthesis import SynthesisConfig, reference_config
from allgood.drawing import require_others
from allgood.inference import Inspector
from allgood.progress import say
from allgood.recipes import configured
from allgood.recipes.costfilter import FilterRecipe
from allgood.runs import CONFIG, PROVENANCE, WEIGHTS, read_json
from allgood.training.config import TrainConfig
from allgood.types import InputError, Sample

TRAIN: Mapping[str, Any] = {
    "steps": 1500,
    "batch_size": 8,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-5,
    "warmup_steps": 50,
    "beta2": 0.98,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "gradient_clip": 1.0,
}
"""Of a `small` filter; what was published: recipes/costfilter.py."""
DRAWS = 6
"""Of each picture, at most: of many pictures the training sees fewer."""
VALIDATION_PICTURES = 16
"""Of each category, at most: a tenth of its pictures is kept from training, to measure on."""
VALIDATION_DRAWS = 4


def resolved_configs(
    recipe: FilterRecipe | None,
    settings: Sequence[str],
    synthesis: Sequence[str],
    train: Sequence[str],
) -> tuple[FilterConfig, SynthesisConfig, TrainConfig]:
    """Of the filter, the anomalies and the training: the preset's or ours, and the user's words."""
    return (
        configured(FilterConfig, recipe.settings if recipe else {}, settings),
        configured(SynthesisConfig, asdict(reference_config()) if recipe else {}, synthesis),
        configured(TrainConfig, recipe.train if recipe else TRAIN, train),
    )


def open_host(run: Path, device: str) -> Inspector:
    """A run that can have a filter."""
    inspector = Inspector(run, device=device)
    inspector.require_fitted("filter")
    if "filter" in inspector.config:
        raise InputError(f"run '{run}' has a filter already: give the run behind it")
    if inspector.transform.keep_aspect:
        raise InputError(
            f"run '{run}' reads pictures of many sizes, and a filter learns one: fit it with "
            "--keep-aspect False"
        )
    return inspector


def open_training(config: TrainConfig, cache_root: Path | None, device: str) -> learning.Training:
    training = learning.open_training(
        config, cache_root=cache_root, device=device, devices=1, nodes=1, tensorboard=None
    )
    if config.precision != "fp32" and training.fabric.device.type == "cpu":
        raise InputError(
            "on a CPU a filter is trained in fp32, as the gradients of 3-D convolutions are not "
            "reliable in bf16 there: leave out --train precision"
        )
    return training


def draws_in_time(train: TrainConfig, num_pictures: int) -> int:
    """DRAWS, or as few as the training has time to see of each picture."""
    return max(1, min(DRAWS, -(-train.steps * train.batch_size // num_pictures)))


def foregrounds(samples: Sequence[Sample], categories: Sequence[str]) -> dict[str, Foreground]:
    """Category -> how its object is told from the background, see `choose_foreground`."""
    chosen = {}
    for name in categories:
        pictures = []
        for sample in [sample for sample in samples if sample.category == name][:12]:
            try:
                pictures.append(read_image(sample.path))
            except InputError:  # listed when it is to be learned
                continue
        chosen[name] = choose_foreground(pictures)
    return chosen


def read_good(
    inspector: Inspector, data: Sequence[Path], layout: str | None
) -> tuple[list[Sample], list[Sample], dict[Path, str]]:
    """The good training pictures that the host was fitted on, those that it was not, and the
    digests of all of their files."""
    roots = [data] if isinstance(data, str | Path) else list(data)
    config = inspector.config
    dataset = read_data(
        roots, layout=layout, train_share=config["data"]["train_share"], seed=config["seed"]
    ).only(inspector.categories)
    say(dataset.describe())
    digest, known = digests(dataset.train), fitted_on(inspector)
    learned = [sample for sample in dataset.train if digest.get(sample.path) in known]
    fresh = [sample for sample in dataset.train if digest.get(sample.path) not in known]
    missing = set(inspector.categories) - {sample.category for sample in learned}
    if missing:
        raise InputError(
            f"{', '.join(map(str, roots))}: none of the good pictures of category "
            f"'{sorted(missing)[0]}' is one that run '{inspector.run}' was fitted on; give the "
            "data as they were given to `allgood fit`"
        )
    num_absent = len(known.difference(digest[sample.path] for sample in learned))
    require_others(inspector.detector, inspector.run, learned, num_absent)
    return learned, fresh, digest


def require_enough(fresh: Sequence[Sample], inspector: Inspector, rate: float) -> None:
    """Before hours of training: a rate that is asked for can be promised of every category."""
    needed = pictures_needed(rate)
    for name in inspector.categories:
        count = sum(sample.category == name for sample in fresh)
        if count < needed:
            raise InputError(
                f"a false-alarm rate of {rate:g} needs {needed} good pictures of category '{name}' "
                f"that run '{inspector.run}' was not fitted on, and the data hold {count}: promise "
                "a larger rate with --max-false-alarm, or give more pictures"
            )


def fitted_on(inspector: Inspector) -> set[str]:
    """Digests of the pictures that the host was fitted on."""
    return set(read_json(inspector.run / PROVENANCE)["fitted_on"])


def keep_templates(
    samples: Sequence[Sample], config: FilterConfig, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """N pictures of each category to compare with, and the others, which are learned."""
    if config.templates == "match":
        return [], list(samples)
    kept = []
    for category in sorted({sample.category for sample in samples}):
        own = [sample for sample in samples if sample.category == category]
        order = random.Random(f"{seed}:{category}").sample(own, len(own))
        readable = (sample for sample in order if _is_readable(sample))
        chosen = list(islice(readable, config.num_templates))
        if len(chosen) < config.num_templates or len(chosen) == len(own):
            raise InputError(
                f"category '{category}' has {len(own)} good pictures, too few to keep "
                f"{config.num_templates} readable ones of them as templates: lower num_templates"
            )
        kept += chosen
    return kept, [sample for sample in samples if sample not in kept]


def hold_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """The pictures that are learned, and a tenth of each category to measure on."""
    held: set[int] = set()
    for category in sorted({sample.category for sample in samples}):
        own = [i for i, sample in enumerate(samples) if sample.category == category]
        count = min(VALIDATION_PICTURES, len(own) // 2, -(-len(own) // 10))
        held.update(random.Random(f"{seed}:{category}:held out").sample(own, count))
    return (
        [sample for i, sample in enumerate(samples) if i not in held],
        [sample for i, sample in enumerate(samples) if i in held],
    )


def _is_readable(sample: Sample) -> bool:
    try:
        read_image(sample.path)
    except InputError:  # listed when it is to be learned
        return False
    return True


def host_digest(run: Path) -> str:
    """Of what decides the host's matches."""
    return content_digest(run / CONFIG) + content_digest(run / WEIGHTS)
