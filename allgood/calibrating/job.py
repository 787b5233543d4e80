"""Behind `calibrate`: which good pictures count, and what they score."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from allgood.calibration import Calibration, GoodScores, pictures_needed
from allgood.data.fingerprint import content_digest, digests, unseen
from allgood.data.readers import Dataset
from allgood.inference import Inspector
from allgood.progress import bar, say
from allgood.runs import (
    CALIBRATION,
    CONFIG,
    MODEL,
    MODEL_DATA,
    PROVENANCE,
    WEIGHTS,
    read_json,
    write_json,
)
from allgood.types import Failure, InputError, Sample


def calibrate_on(
    run: Path, samples: Sequence[Sample], max_false_alarm: float, *, device: str
) -> list[Failure]:
    """Calibrate right after fitting, on pictures kept from it.

    Where too few of a category's pictures could be read, it stays uncalibrated and is named on
    stderr: a long fit does not fail for the sake of a broken picture.

    Returns:
        the pictures that could not be read.
    """
    inspector = Inspector(run, device=device)
    scores, failures = score_good(inspector, samples, inspector.config["batch_size"])
    needed = pictures_needed(max_false_alarm)
    enough = {name: own for name, own in scores.items() if len(own.image) >= needed}
    for category in sorted({sample.category for sample in samples}.difference(enough)):
        num_read = len(scores[category].image) if category in scores else 0
        say(
            f"category '{category}' stays uncalibrated: a false-alarm rate of {max_false_alarm:g} "
            f"needs {needed} good pictures, and {num_read} of those kept for it could be read; see "
            "`allgood calibrate`"
        )
    if enough:
        write_json(run / CALIBRATION, Calibration(max_false_alarm, enough).to_json())
    return failures


def require_enough_kept(old: Calibration | None, shown: Collection[str], rate: float) -> None:
    """A rate holds for the whole run, so also for categories that are not shown this time."""
    needed = pictures_needed(rate)
    for name, scores in old.categories.items() if old is not None else ():
        count = len(scores.image)
        if name not in shown and count < needed:
            raise InputError(
                f"category '{name}' has {count} good calibration pictures from before, but a "
                f"false-alarm rate of {rate:g} needs {needed}: give good pictures of it too, or "
                "promise a larger rate with --max-false-alarm"
            )


def score_good(
    inspector: Inspector, samples: Sequence[Sample], batch_size: int
) -> tuple[dict[str, GoodScores], list[Failure]]:
    """Scores by category, and the pictures that could not be read."""
    digest = digests(samples)
    # A copy tells nothing new: counted twice, few pictures would seem to promise a small rate.
    different = {(s.category, digest.get(s.path, s.path)): s for s in samples}
    samples = list(different.values())
    scores: dict[str, list[tuple[float, float, str]]] = {}
    failures: list[Failure] = []
    done = 0
    with bar("calibrating on good pictures", len(samples)) as progress:
        for batch, prediction in inspector.predict(
            samples, failures=failures, batch_size=batch_size
        ):
            highest = prediction.anomaly_map.flatten(1).amax(dim=1)
            for i, sample in enumerate(batch.sample):
                scores.setdefault(sample.category, []).append(
                    (float(prediction.image_score[i]), float(highest[i]), digest[sample.path])
                )
            done += len(batch.sample)
            progress.at(done + len(failures))
    return {name: GoodScores(*zip(*rows, strict=True)) for name, rows in scores.items()}, failures


def unseen_by(
    samples: Sequence[Sample], inspector: Inspector, roots: Sequence[str | Path]
) -> list[Sample]:
    """Those that the run was not fitted on."""
    fresh = unseen(samples, roots, set(read_json(inspector.run / PROVENANCE)["fitted_on"]))
    if not fresh:
        raise InputError(
            f"{', '.join(map(str, roots))}: the run was fitted on all of these pictures; "
            "calibration needs good pictures that it has not seen"
        )
    if len(fresh) < len(samples):
        say(f"{len(samples) - len(fresh)} pictures left out: the run was fitted on them")
    return fresh


def learned_good(
    dataset: Dataset, roots: Sequence[str | Path], category: str | None, inspector: Inspector
) -> list[Sample]:
    """The good pictures of categories that the run has learned, under their names.

    One folder may be called anything, and a run of one category knows what it shows.
    """
    where = ", ".join(map(str, roots))
    good = [sample for sample in dataset.samples if sample.is_good]
    if not good:
        raise InputError(f"{where}: no good pictures to calibrate on")
    learned = inspector.categories
    if category is None and len(learned) == len(dataset.categories) == 1:
        category = learned[0]
    if category is not None:
        inspector.index_of(category)
        # No two roots hold the same category, so one of these holds several.
        if len(dataset.categories) > len(roots):
            raise InputError(
                f"{where}: the data hold several categories ({', '.join(dataset.categories)}): "
                f"leave out --category, or give the pictures of '{category}' alone"
            )
        return [replace(sample, category=category) for sample in good]
    kept = [sample for sample in good if sample.category in learned]
    others = sorted({sample.category for sample in good}.difference(learned))
    if not kept:
        raise InputError(
            f"category '{others[0]}' was never learned by run '{inspector.run}': where all "
            f"pictures show the same, name one of {', '.join(learned)} with --category"
        )
    if others:
        say(f"categories left out, as the run has not learned them: {', '.join(others)}")
    return kept


def run_digest(run: Path) -> list[str]:
    """Of what decides a run's scores; without config.json another run is being moved in."""
    paths = [Path(run, name) for name in (CONFIG, WEIGHTS, MODEL, MODEL_DATA)]
    return [content_digest(path) for path in paths if path.is_file()]
