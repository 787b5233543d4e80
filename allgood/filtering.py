"""Door: a fitted run and its good pictures -> a run with a CostFilter behind the same detector.

What is asked for is resolved and checked here, before anything is written; `filter_job` does it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from allgood.types import InputError

if TYPE_CHECKING:
    import numpy as np

    from allgood.costfilter.config import FilterConfig
    from allgood.data.synthesis import SynthesisConfig
    from allgood.drawing import Drawings
    from allgood.inference import Inspector
    from allgood.learning import Training
    from allgood.recipes.costfilter import FilterRecipe
    from allgood.training.config import TrainConfig
    from allgood.types import Sample

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


def filter(
    run: Path,
    data: list[Path],
    *,
    out: Path = Path("filtered"),
    preset: str | None = None,
    settings: tuple[str, ...] = (),
    synthesis: tuple[str, ...] = (),
    train: tuple[str, ...] = (),
    draws: int | None = None,
    fusion: Literal["fixed", "auto"] = "fixed",
    layout: str | None = None,
    max_false_alarm: float | None = None,
    cache: Path | None = None,
    no_cache: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Train a CostFilter behind a fitted detector, and make a run of both.

    The detector stays as it is. Its matches with synthetic anomalies, painted into the good
    pictures that it was fitted on, teach the filter what a real mismatch looks like. A picture is
    never compared with its own patches in a memory bank. A killed training goes on where it was
    when the same command is given again.

    Args:
        run: folder of a fitted run.
        data: the good pictures, as they were given to `allgood fit`.
        out: folder of the new run.
        preset: what was published for one detector, with all its deviations: reference-dinomaly,
            reference-hvq, reference-anomaldf or reference-glad; for a GPU. Left out: our own small
            filter.
        settings: of the filter, as name=value, e.g. fusion=0.3 size=full.
        synthesis: of the anomalies, as name=value.
        train: of the training, as name=value, e.g. steps=3000.
        draws: synthetic versions of each picture; left out: the preset's, or 6, but no more than
            the training has time to see.
        fusion: the filter's share of the map, lambda: as the settings say (fusion=0.5), or the one
            that is best on synthetic pictures kept from training. Test pictures are never used.
        layout: how the data lie on disk, where it is not recognised.
        max_false_alarm: share of good pictures that may raise an alarm. Default: what the run
            behind it promises, or 0.05.
        cache: folder for the frozen features of all trainings; default: in the user's cache folder.
        no_cache: run the detector in every step of the training instead.
        batch_size: pictures that pass the network together.
        seed: of all random choices.
        device: auto, cpu or cuda.
        overwrite: replace a run that stands in the folder.

    Returns:
        the new run's folder.

    Raises:
        InputError: anything given that cannot be used, in one sentence.
    """
    arguments = dict(locals())
    started = time.monotonic()
    from allgood.calibrating import require_rate
    from allgood.costfilter.filtered import FilteredDetector, shape_of_match, volume_grid
    from allgood.data.fingerprint import fingerprint
    from allgood.data.foreground import choose_foreground
    from allgood.data.synthesis import SynthesisConfig, Synthesizer
    from allgood.drawing import Drawings
    from allgood.filter_job import Job, make_run
    from allgood.ignored import digests
    from allgood.learning import default_cache_root
    from allgood.options import require_at_least
    from allgood.pictures import Pictures
    from allgood.progress import say
    from allgood.recipes.costfilter import find_filter
    from allgood.runs import command_line
    from allgood.unfinished import refuse_folder

    out = Path(out)
    require_at_least(1, batch_size=batch_size, draws=draws)
    if max_false_alarm is not None:
        require_rate(max_false_alarm)
    refuse_folder(out, overwrite)
    if fusion == "auto" and any(word.startswith("fusion=") for word in settings):
        raise InputError("--fusion auto chooses the fusion: leave it out of --settings")
    recipe = None if preset is None else find_filter(preset)
    config, synthesis_config, train_config = _configs(recipe, settings, synthesis, train)
    inspector = _open_host(run, device)
    kind = inspector.config["detector"]["name"]
    if recipe and recipe.host != kind:
        raise InputError(
            f"preset {preset} is for {recipe.host}, but run '{run}' is {kind}: take another "
            "preset, or none"
        )
    learned, fresh, digest = _good_pictures(inspector, data, layout)
    if max_false_alarm is not None:
        _require_enough(fresh, inspector, max_false_alarm)
    promised = inspector.calibration.max_false_alarm if inspector.calibration else 0.05
    templates, taught = _kept_templates(learned, config, seed)
    taught, held_out = _held_out(taught, seed)
    if fusion == "auto" and not held_out:
        raise InputError(
            "--fusion auto needs at least two good pictures of a category, one of them to choose "
            "on: leave it out"
        )
    if draws is None:
        draws = recipe.draws if recipe else _draws(train_config, len(taught))
    cache_root = None if no_cache else cache or default_cache_root()
    training = _open_training(train_config, cache_root, device)
    foreground = {
        name: choose_foreground(_some_pictures(taught, name)) for name in inspector.categories
    }
    painting = Synthesizer(synthesis_config, seed=seed, foreground=foreground)
    unpainted = Synthesizer(SynthesisConfig(clean_probability=1))

    def drawings(samples: Sequence[Sample], draws: int, synthesizer: Synthesizer) -> Drawings:
        pictures = Pictures(samples, inspector.transform, inspector.ignore)
        return Drawings(pictures, inspector.categories, draws, synthesizer, config.mask_side)

    image_size = inspector.transform.input_size(1, 1)  # that of any picture
    channels, grid = shape_of_match(inspector.detector, image_size, inspector.device)
    grid = volume_grid(config, grid)
    model = FilteredDetector(config, inspector.detector, channels, grid, seed)
    if templates:
        model.keep_templates(inspector.query_features(templates, batch_size=batch_size))
    wanted = {
        "settings": asdict(config),
        "channels": channels,
        "grid": list(grid),
        "seed": seed,
        "synthesis": asdict(synthesis_config) | {"foreground": foreground},
        "draws": draws,
        "train": asdict(train_config),
        "pictures": len(taught),
        "fusion": fusion,
    }
    key = {
        "host": _digest(inspector.run),
        "pictures": fingerprint(taught, digest),
        "ignore": digests(inspector.ignore),
        "synthesis": wanted["synthesis"],
        "draws": draws,
        "seed": seed,
        "encoding": model.encoding,
        "mask": config.mask_side,
    }
    facts = {
        "command": command_line(filter, arguments),
        "host": str(run),
        "data_fingerprint": fingerprint([*learned, *fresh], digest),
        "fitted_on": sorted(_fitted_on(inspector)),
        "device": str(training.fabric.device),
    }
    job = Job(
        model=model,
        inspector=inspector,
        as_they_are=drawings(taught, 1, unpainted),
        taught=drawings(taught, draws, painting),
        held_out=drawings(held_out, VALIDATION_DRAWS, painting),
        fresh=fresh,
        training=training,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        fusion=fusion,
        max_false_alarm=max_false_alarm or promised,
        device=device,
        config=wanted,
        cache_key=key,
        facts=facts,
        started=started,
    )
    make_run(out, job, overwrite)
    say(f"a filter behind {run}, from {len(taught)} good pictures, in {out}")
    return out


def _configs(
    recipe: FilterRecipe | None,
    settings: Sequence[str],
    synthesis: Sequence[str],
    train: Sequence[str],
) -> tuple[FilterConfig, SynthesisConfig, TrainConfig]:
    """Of the filter, the anomalies and the training: the preset's or ours, and the user's words."""
    from allgood.costfilter.config import FilterConfig
    from allgood.data.synthesis import SynthesisConfig, reference_config
    from allgood.recipes import configured
    from allgood.training.config import TrainConfig

    return (
        configured(FilterConfig, recipe.settings if recipe else {}, settings),
        configured(SynthesisConfig, asdict(reference_config()) if recipe else {}, synthesis),
        configured(TrainConfig, recipe.train if recipe else TRAIN, train),
    )


def _open_host(run: Path, device: str) -> Inspector:
    """A run that can have a filter."""
    from allgood.inference import Inspector

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


def _open_training(config: TrainConfig, cache_root: Path | None, device: str) -> Training:
    from allgood.learning import open_training

    training = open_training(
        config, cache_root=cache_root, device=device, devices=1, nodes=1, tensorboard=None
    )
    if config.precision != "fp32" and training.fabric.device.type == "cpu":
        raise InputError(
            "on a CPU a filter is trained in fp32, as the gradients of 3-D convolutions are not "
            "reliable in bf16 there: leave out --train precision"
        )
    return training


def _draws(train: TrainConfig, num_pictures: int) -> int:
    """DRAWS, or as few as the training has time to see of each picture."""
    return max(1, min(DRAWS, -(-train.steps * train.batch_size // num_pictures)))


def _some_pictures(samples: Sequence[Sample], category: str, count: int = 12) -> list[np.ndarray]:
    from allgood.data.images import read_image

    pictures = []
    for sample in [sample for sample in samples if sample.category == category][:count]:
        try:
            pictures.append(read_image(sample.path))
        except InputError:  # listed when it is to be learned
            continue
    return pictures


def _good_pictures(
    inspector: Inspector, data: Sequence[Path], layout: str | None
) -> tuple[list[Sample], list[Sample], dict[Path, str]]:
    """The good training pictures that the host was fitted on, those that it was not, and the
    digests of all of their files."""
    from allgood.data.fingerprint import digests
    from allgood.data.readers import read_data
    from allgood.drawing import require_others
    from allgood.progress import say

    roots = [data] if isinstance(data, str | Path) else list(data)
    config = inspector.config
    dataset = read_data(
        roots, layout=layout, train_share=config["data"]["train_share"], seed=config["seed"]
    ).only(inspector.categories)
    say(dataset.describe())
    digest, known = digests(dataset.train), _fitted_on(inspector)
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


def _require_enough(fresh: Sequence[Sample], inspector: Inspector, rate: float) -> None:
    """Before hours of training: a rate that is asked for can be promised of every category."""
    from allgood.calibration import pictures_needed

    needed = pictures_needed(rate)
    for name in inspector.categories:
        count = sum(sample.category == name for sample in fresh)
        if count < needed:
            raise InputError(
                f"a false-alarm rate of {rate:g} needs {needed} good pictures of category '{name}' "
                f"that run '{inspector.run}' was not fitted on, and the data hold {count}: promise "
                "a larger rate with --max-false-alarm, or give more pictures"
            )


def _fitted_on(inspector: Inspector) -> set[str]:
    """Digests of the pictures that the host was fitted on."""
    from allgood.runs import PROVENANCE, read_json

    return set(read_json(inspector.run / PROVENANCE)["fitted_on"])


def _kept_templates(
    samples: Sequence[Sample], config: FilterConfig, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """N pictures of each category to compare with, and the others, which are learned."""
    import random

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


def _held_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """The pictures that are learned, and a tenth of each category to measure on."""
    import random

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
    from allgood.data.images import read_image

    try:
        read_image(sample.path)
    except InputError:  # listed when it is to be learned
        return False
    return True


def _digest(run: Path) -> str:
    """Of what decides the host's matches."""
    from allgood.data.fingerprint import content_digest
    from allgood.runs import CONFIG, WEIGHTS

    return content_digest(run / CONFIG) + content_digest(run / WEIGHTS)
