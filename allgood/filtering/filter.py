"""Door: a fitted run and its good pictures -> a run with a CostFilter behind the same detector.

What is asked for is resolved and checked first, before anything is written: `setup` has the parts
of that. `job` does it.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from allgood.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from allgood.data.synthesis import Synthesizer
    from allgood.drawing import Drawings
    from allgood.types import Sample


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
    from allgood.calibration import require_rate
    from allgood.costfilter.filtered import FilteredDetector, shape_of_match, volume_grid
    from allgood.data.fingerprint import fingerprint
    from allgood.data.synthesis import SynthesisConfig, Synthesizer
    from allgood.drawing import Drawings
    from allgood.filtering.job import Job, make_run
    from allgood.filtering.setup import (
        VALIDATION_DRAWS,
        draws_in_time,
        fitted_on,
        foregrounds,
        hold_out,
        host_digest,
        keep_templates,
        open_host,
        open_training,
        read_good,
        require_enough,
        resolved_configs,
    )
    from allgood.ignored import mask_digests
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
    config, synthesis_config, train_config = resolved_configs(recipe, settings, synthesis, train)
    inspector = open_host(run, device)
    kind = inspector.config["detector"]["name"]
    if recipe and recipe.host != kind:
        raise InputError(
            f"preset {preset} is for {recipe.host}, but run '{run}' is {kind}: take another "
            "preset, or none"
        )
    learned, fresh, digest = read_good(inspector, data, layout)
    if max_false_alarm is not None:
        require_enough(fresh, inspector, max_false_alarm)
    promised = inspector.calibration.max_false_alarm if inspector.calibration else 0.05
    templates, taught = keep_templates(learned, config, seed)
    taught, held_out = hold_out(taught, seed)
    if fusion == "auto" and not held_out:
        raise InputError(
            "--fusion auto needs at least two good pictures of a category, one of them to choose "
            "on: leave it out"
        )
    if draws is None:
        draws = recipe.draws if recipe else draws_in_time(train_config, len(taught))
    cache_root = None if no_cache else cache or default_cache_root()
    training = open_training(train_config, cache_root, device)
    foreground = foregrounds(taught, inspector.categories)
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
        "host": host_digest(inspector.run),
        "pictures": fingerprint(taught, digest),
        "ignore": mask_digests(inspector.ignore),
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
        "fitted_on": sorted(fitted_on(inspector)),
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
