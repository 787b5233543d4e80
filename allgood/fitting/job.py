"""Behind `fit`: one fit, all of it resolved -> its run's folder.

detector fitted -> files written -> calibrated -> published
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allgood.calibrating.job import calibrate_on
from allgood.data.fingerprint import fingerprint
from allgood.fitting.banking import fill_bank
from allgood.ignored import mask_digests, write_masks
from allgood.learning import Training, learn
from allgood.own_state import own_state
from allgood.pictures import Pictures
from allgood.progress import say
from allgood.runs import (
    CALIBRATION,
    CONFIG,
    PROVENANCE,
    STATE,
    TRAINING_LOG,
    WEIGHTS,
    finish,
    is_finished,
    provenance,
    read_json,
    write_json,
    write_weights,
)
from allgood.types import Failure, Sample
from allgood.unfinished import making


@dataclass(frozen=True)
class Job:
    """One fit, all of it resolved."""

    model: Any
    pictures: Pictures
    """To fit on."""
    held_out: Sequence[Sample]
    """To calibrate on."""
    angles: Sequence[float]
    """Every picture is learned once per angle."""
    batch_size: int
    seed: int
    budget_bytes: int
    """What the patches may take in memory."""
    training: Training | None
    """How a detector learns by gradient; None: it only reads the pictures."""
    max_false_alarm: float
    device: str
    digests: Mapping[Path, str]
    """Of the pictures' files."""
    config: dict[str, Any]
    """What config.json will hold."""
    facts: dict[str, Any]
    """What provenance.json will hold of this fit."""
    started: float

    def request(self) -> dict[str, Any]:
        """What a killed fit must agree in to be gone on with."""

        return self.config | {
            "fingerprint": self.facts["data_fingerprint"],
            "max_false_alarm": self.max_false_alarm,
            "ignore": mask_digests(self.pictures.ignore_of),
        }


def make_run(out: Path, job: Job, overwrite: bool) -> None:
    """Fit, write, calibrate in state/run, then move the new run into place.

    Of several processes the first does all but the training alone.
    """
    training = job.training
    if training is not None and not training.fabric.is_global_zero:
        if not training.fabric.broadcast(False):
            _learn(job, training, out / STATE / "training")
        return
    with making(out, job.request(), overwrite) as state:
        new = state / "run"
        finished = is_finished(new)
        if training is not None:
            finished = training.fabric.broadcast(finished)
        if not finished:
            failures = (
                _fill_bank(job, state / "patches")
                if training is None
                else _learn(job, training, state / "training")
            )
            _write_run(new, job, failures, state / "training")
    _say_result(out)


def _learn(job: Job, training: Training, folder: Path) -> list[Failure]:
    """Train the model, going on with what a killed training left in the folder.

    Returns:
        the pictures that could not be read.
    """
    key = {
        "pictures": fingerprint(job.pictures.samples, job.digests),
        "encoder": job.config["encoder"],
        "tile": job.config["tile"],
        "transform": job.config["transform"],
        "ignore": mask_digests(job.pictures.ignore_of),
        "augment": {name: list(how.shares()) for name, how in job.pictures.augment.items()},
        "encoding": job.model.encoding,
    }
    return learn(
        job.model,
        job.pictures,
        training,
        folder=folder,
        cache_key=key,
        batch_size=job.batch_size,
        seed=job.seed,
    )


def _fill_bank(job: Job, folder: Path) -> list[Failure]:
    """Fit the model, going on with what a killed fit left in the store's folder.

    Returns:
        the pictures that could not be read.
    """
    return fill_bank(
        job.model,
        job.pictures,
        angles=job.angles,
        folder=folder,
        budget_bytes=job.budget_bytes,
        batch_size=job.batch_size,
        seed=job.seed,
    )


def _write_run(new: Path, job: Job, failures: Sequence[Failure], training: Path) -> None:
    """All files of the run, the thresholds among them."""
    new.mkdir(exist_ok=True)
    write_weights(new / WEIGHTS, own_state(job.model))
    write_masks(new, job.pictures.ignore_of)
    if job.training is not None:
        shutil.copyfile(training / "log.jsonl", new / TRAINING_LOG)
    fitted = {"fitted_pictures": len(job.pictures.samples) - len(failures)}
    write_json(new / CONFIG, {**job.config, "data": job.config["data"] | fitted})
    unreadable = [*failures]
    if job.held_out:
        unreadable += calibrate_on(new, job.held_out, job.max_false_alarm, device=job.device)
    facts = job.facts | {
        "unreadable": [[str(failure.path), failure.reason] for failure in unreadable],
        "seconds": round(time.monotonic() - job.started, 1),
    }
    write_json(new / PROVENANCE, provenance(**facts))
    finish(new)


def _say_result(out: Path) -> None:
    """The end of a fit on stderr: what was left out, and what there is now."""
    config, facts = read_json(out / CONFIG), read_json(out / PROVENANCE)
    if facts["unreadable"]:
        say(f"left out, as they could not be read: {len(facts['unreadable'])} pictures")
        for _, reason in facts["unreadable"]:
            say(f"  {reason}")
    say(
        f"learned {len(config['categories'])} categories from "
        f"{config['data']['fitted_pictures']} good pictures in {facts['seconds']:.0f} s"
    )
    if not (out / CALIBRATION).is_file():
        say(f"without alarm thresholds: `allgood calibrate {out} GOOD` sets them")
