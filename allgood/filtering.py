"""Door: a fitted run and its good pictures -> a run with a CostFilter behind the same detector.

good pictures -> synthetic anomalies -> the frozen host's match, once per drawing -> the training
loop -> measured on drawings kept from it -> calibrated on pictures that neither has learned ->
published
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from allgood.types import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from allgood.costfilter.config import FilterConfig
    from allgood.costfilter.filtered import FilteredDetector
    from allgood.drawing import Drawings
    from allgood.inference import Inspector
    from allgood.learning import Training
    from allgood.types import Failure, Sample

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
    max_false_alarm: float = 0.05,
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
        draws: synthetic versions of each picture; left out: 6, or the preset's.
        fusion: the filter's share of the map, lambda: as the settings say (fusion=0.5), or the one
            that is best on synthetic pictures kept from training. Test pictures are never used.
        layout: how the data lie on disk, where it is not recognised.
        max_false_alarm: share of good pictures that may raise an alarm.
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
    from allgood.costfilter.config import FilterConfig
    from allgood.costfilter.filtered import FilteredDetector, shape_of_match, volume_grid
    from allgood.data.fingerprint import fingerprint
    from allgood.data.foreground import choose_foreground
    from allgood.data.synthesis import SynthesisConfig, Synthesizer, reference_config
    from allgood.drawing import Drawings
    from allgood.inference import Inspector, require_at_least
    from allgood.learning import default_cache_root, open_training
    from allgood.pictures import Pictures
    from allgood.progress import say
    from allgood.recipes import configured
    from allgood.recipes.costfilter import find_filter
    from allgood.runs import PROVENANCE, command_line, finish, is_finished, read_json
    from allgood.training.config import TrainConfig
    from allgood.unfinished import making, refuse_folder

    out = Path(out)
    recipe = None if preset is None else find_filter(preset)
    draws = draws if draws is not None else recipe.draws if recipe else DRAWS
    require_at_least(1, batch_size=batch_size, draws=draws)
    refuse_folder(out, overwrite)
    config = configured(FilterConfig, recipe.settings if recipe else {}, settings)
    if fusion == "auto" and any(word.startswith("fusion=") for word in settings):
        raise InputError("--fusion auto chooses the fusion: leave it out of --settings")
    train_config = configured(TrainConfig, recipe.train if recipe else TRAIN, train)
    drawn = asdict(reference_config()) if recipe else {}
    synthesis_config = configured(SynthesisConfig, drawn, synthesis)
    inspector = Inspector(run, device=device)
    if "filter" in inspector.config:
        raise InputError(f"run '{run}' has a filter already: give the run behind it")
    kind = inspector.config["detector"]["name"]
    if recipe and recipe.host != kind:
        raise InputError(
            f"preset {preset} is for {recipe.host}, but run '{run}' is {kind}: take another "
            "preset, or none"
        )
    if inspector.transform.keep_aspect:
        raise InputError(
            f"run '{run}' reads pictures of many sizes, and a filter learns one: fit it with "
            "--keep-aspect False"
        )
    known = set(read_json(inspector.run / PROVENANCE)["fitted_on"])
    learned, fresh, digest = _good_pictures(inspector, data, layout, known)
    templates, taught = _kept_templates(learned, config, seed)
    taught, held_out = _held_out(taught, seed)
    if fusion == "auto" and not held_out:
        raise InputError(
            "--fusion auto needs at least two good pictures of a category, one of them to choose "
            "on: leave it out"
        )
    training = open_training(
        train_config,
        cache_root=None if no_cache else cache or default_cache_root(),
        device=device,
        devices=1,
        nodes=1,
        tensorboard=None,
    )
    if train_config.precision != "fp32" and training.fabric.device.type == "cpu":
        raise InputError(
            "on a CPU a filter is trained in fp32, as the gradients of 3-D convolutions are not "
            "reliable in bf16 there: leave out --train precision"
        )
    foreground = {
        name: choose_foreground(_some_pictures(taught, name)) for name in inspector.categories
    }
    synthesizer = Synthesizer(synthesis_config, seed=seed, foreground=foreground)

    def drawings(samples: Sequence[Sample], draws: int) -> Drawings:
        pictures = Pictures(samples, inspector.transform, inspector.ignore)
        return Drawings(pictures, inspector.categories, draws, synthesizer, config.mask_side)

    image_size = inspector.transform.input_size(*_picture(taught[0]).shape[:2])
    channels, grid = shape_of_match(inspector.detector, image_size, inspector.device)
    grid = volume_grid(config, grid)
    model = FilteredDetector(config, inspector.detector, channels, grid, seed)
    if templates:
        model.keep_templates(inspector.query_features(templates))
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
        "synthesis": wanted["synthesis"],
        "draws": draws,
        "seed": seed,
        "encoding": model.encoding,
        "mask": config.mask_side,
    }
    request = {"filter": wanted, "key": key, "max_false_alarm": max_false_alarm}
    with making(out, request, overwrite) as state:
        new = state / "run"
        if not is_finished(new):
            seen, folder = drawings(taught, draws), state / "training"
            failures = _train(model, seen, training, folder, key, batch_size, seed)
            unseen = drawings(held_out, VALIDATION_DRAWS)
            table = _validate(model, unseen, image_size, batch_size, fusion, inspector.device)
            facts = {
                "command": command_line(filter, arguments),
                "host": str(run),
                "data_fingerprint": fingerprint([*learned, *fresh], digest),
                "fitted_on": sorted(known),
                "device": str(training.fabric.device),
                "unreadable": [[str(f.path), f.reason] for f in failures],
                "synthetic_validation": table,
                "seconds": round(time.monotonic() - started, 1),
            }
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            # With the fusion that was chosen.
            settled = {**wanted, "settings": asdict(model.config)}
            _write_run(new, model, inspector, settled, facts, folder)
            _calibrate(new, fresh, max_false_alarm, device)
            finish(new)
    say(f"a filter behind {run}, from {len(taught)} good pictures, in {out}")
    return out


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
    inspector: Inspector, data: Sequence[Path], layout: str | None, known: set[str]
) -> tuple[list[Sample], list[Sample], dict[Path, str]]:
    """The good training pictures that the host was fitted on, those that it was not, and the
    digests of all of their files."""
    from allgood.data.fingerprint import digests
    from allgood.data.readers import read_data
    from allgood.progress import say

    roots = [data] if isinstance(data, str | Path) else list(data)
    config = inspector.config
    dataset = read_data(
        roots, layout=layout, train_share=config["data"]["train_share"], seed=config["seed"]
    ).only(inspector.categories)
    say(dataset.describe())
    digest = digests(dataset.train)
    learned = [sample for sample in dataset.train if digest.get(sample.path) in known]
    fresh = [sample for sample in dataset.train if digest.get(sample.path) not in known]
    missing = set(inspector.categories) - {sample.category for sample in learned}
    if missing:
        raise InputError(
            f"{', '.join(map(str, roots))}: none of the good pictures of category "
            f"'{sorted(missing)[0]}' is one that run '{inspector.run}' was fitted on; give the "
            "data as they were given to `allgood fit`"
        )
    return learned, fresh, digest


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
        if len(own) <= config.num_templates:
            raise InputError(
                f"category '{category}' has {len(own)} good pictures, too few to keep "
                f"{config.num_templates} of them as templates: lower num_templates"
            )
        kept += random.Random(f"{seed}:{category}").sample(own, config.num_templates)
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


def _picture(sample: Sample) -> np.ndarray:
    from allgood.data.images import read_image

    return read_image(sample.path)


def _train(
    model: FilteredDetector,
    drawings: Drawings,
    training: Training,
    folder: Path,
    key: Mapping[str, Any],
    batch_size: int,
    seed: int,
) -> list[Failure]:
    """Train the filter; the host answers every drawing once where the cache has room.

    Returns:
        the pictures that could not be read.
    """
    from allgood.learning import cached
    from allgood.training.loop import train
    from allgood.training.sources import OnlineFeatures

    fabric = training.fabric
    model.to(fabric.device)
    online = OnlineFeatures(drawings.read, model.encode, drawings.category(), fabric.device)
    source = cached(online, training, key, batch_size) or online
    train(model, source, training.config, fabric=fabric, folder=folder, seed=seed)
    return list({failure.path: failure for failure in source.failures.values()}.values())


def _validate(
    model: FilteredDetector,
    drawings: Drawings,
    image_size: tuple[int, int],
    batch_size: int,
    fusion: Literal["fixed", "auto"],
    device: torch.device,
) -> dict[str, Any]:
    """Measure on drawings kept from training, and set the fusion if that was asked for.

    Returns:
        for provenance.json: pixel AP of every part, of every category and on the mean.
    """
    from functools import partial

    from allgood.costfilter.validation import best_fusion, mean_over, validate
    from allgood.progress import say
    from allgood.training.sources import OnlineFeatures

    model.eval()
    encode = partial(model.encode, whole=True)
    source = OnlineFeatures(drawings.read, encode, drawings.category(), device)
    tables: dict[str, Any] = {}
    for i, name in enumerate(model.categories):
        own = (source.category == i).nonzero().flatten().tolist()
        order = [own[begin : begin + batch_size] for begin in range(0, len(own), batch_size)]
        table = validate(model, source.batches(order), image_size)
        if table is not None:
            tables[name] = table
    facts: dict[str, Any] = {
        "pictures": len(drawings.pictures.samples),
        "draws": drawings.draws,
        "categories": tables,
    }
    if not tables:
        say(
            "too few good pictures to measure the filter on: its share stays "
            f"{model.config.fusion:g}"
        )
        return facts
    mean = mean_over(tables)
    if fusion == "auto":
        model.config = replace(model.config, fusion=best_fusion(mean))
    share = model.config.fusion
    say(
        f"pixel AP on {len(source)} drawings kept from training: initial map "
        f"{mean['initial_map']:.3f}, detector {mean['host']:.3f}, filter {mean['filter']:.3f}, "
        f"both {mean['fusion'][f'{share:g}']:.3f} (fusion {share:g})"
    )
    return {**facts, "mean": mean, "chosen": fusion == "auto"}


def _write_run(
    new: Path,
    model: FilteredDetector,
    inspector: Inspector,
    wanted: Mapping[str, Any],
    facts: Mapping[str, Any],
    training: Path,
) -> None:
    """All files of the run but the thresholds."""
    from allgood.ignored import write_masks
    from allgood.own_state import own_state
    from allgood.runs import (
        CONFIG,
        ENCODER,
        PROVENANCE,
        TRAINING_LOG,
        WEIGHTS,
        provenance,
        write_json,
        write_weights,
    )

    write_weights(new / WEIGHTS, own_state(model))
    if (inspector.run / ENCODER).is_file():
        shutil.copyfile(inspector.run / ENCODER, new / ENCODER)
    write_masks(new, inspector.ignore)
    shutil.copyfile(training / "log.jsonl", new / TRAINING_LOG)
    write_json(new / CONFIG, {**inspector.config, "filter": wanted})
    write_json(new / PROVENANCE, provenance(**facts))


def _calibrate(new: Path, fresh: Sequence[Sample], max_false_alarm: float, device: str) -> None:
    from allgood.calibrating import calibrate_on
    from allgood.progress import say

    if not fresh:
        say("no good pictures are left for thresholds: `allgood calibrate` sets them")
        return
    for failure in calibrate_on(new, fresh, max_false_alarm, device=device):
        say(f"left out: {failure.reason}")


def _digest(run: Path) -> str:
    """Of what decides the host's matches."""
    from allgood.data.fingerprint import content_digest
    from allgood.runs import CONFIG, WEIGHTS

    return content_digest(run / CONFIG) + content_digest(run / WEIGHTS)
