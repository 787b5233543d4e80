"""Behind `filter`: one filter, all of it resolved -> its run's folder.

the host's scale -> synthetic anomalies -> its match, once per drawing -> the training loop ->
measured on drawings kept from it -> calibrated -> published
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from allgood.calibrating.job import calibrate_on
from allgood.costfilter.filtered import FilteredDetector
from allgood.costfilter.validation import best_fusion, mean_over, validate
from allgood.drawing import Drawings
from allgood.ignored import write_masks
from allgood.inference import Inspector
from allgood.learning import Training, cached
from allgood.own_state import own_state
from allgood.pictures import require_readable
from allgood.progress import Bar, bar, say
from allgood.runs import (
    CONFIG,
    ENCODER,
    PROVENANCE,
    TRAINING_LOG,
    WEIGHTS,
    finish,
    is_finished,
    provenance,
    read_json,
    write_json,
    write_weights,
)
from allgood.training.loop import train
from allgood.training.sources import OnlineFeatures
from allgood.types import Failure, Sample, TrainingBatch
from allgood.unfinished import making


@dataclass(frozen=True)
class Job:
    """One filter, all of it resolved."""

    model: FilteredDetector
    inspector: Inspector
    """The host's."""
    as_they_are: Drawings
    """Every taught picture once, nothing painted: for the scale of the host's map."""
    taught: Drawings
    held_out: Drawings
    """To measure on."""
    fresh: Sequence[Sample]
    """To calibrate on."""
    training: Training
    image_size: tuple[int, int]
    batch_size: int
    seed: int
    fusion: Literal["fixed", "auto"]
    max_false_alarm: float
    device: str
    config: dict[str, Any]
    """What config.json will hold of the filter."""
    cache_key: dict[str, Any]
    """Everything that decides what the host says of the drawings."""
    facts: dict[str, Any]
    """What provenance.json will hold of this filter."""
    started: float


def make_run(out: Path, job: Job, overwrite: bool) -> None:
    """Train, measure, write, calibrate in state/run, then move the new run into place."""
    request = {
        "filter": job.config,
        "key": job.cache_key,
        "max_false_alarm": job.max_false_alarm,
    }
    with making(out, request, overwrite) as state:
        new = state / "run"
        if is_finished(new):
            return
        training = state / "training"
        failures = _train(job, training)
        facts = job.facts | {
            "unreadable": [[str(f.path), f.reason] for f in failures],
            "synthetic_validation": _validate(job),
            "seconds": round(time.monotonic() - job.started, 1),
        }
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        _write_run(new, job, facts, training)
        _calibrate(new, job)
        finish(new)


def _train(job: Job, folder: Path) -> list[Failure]:
    """Train the filter; the host answers every drawing once where the cache has room.

    Returns:
        the pictures that could not be read.
    """
    model, drawings, training = job.model, job.taught, job.training
    model.to(training.fabric.device)
    folder.mkdir(exist_ok=True)
    _set_scale(job, folder / "scale.json")
    online = OnlineFeatures(
        drawings.read, model.encode, drawings.category(), training.fabric.device
    )
    source = cached(online, training, job.cache_key, job.batch_size) or online
    unreadable = train(
        model, source, training.config, fabric=training.fabric, folder=folder, seed=job.seed
    )
    return list({failure.path: failure for failure in unreadable.values()}.values())


def _set_scale(job: Job, path: Path) -> None:
    """Of the host's map, from every picture as it is; a killed training finds it in the file.

    Raises:
        InputError: no picture of a category could be read.
    """
    model, drawings = job.model, job.as_they_are
    if not path.is_file():
        source = OnlineFeatures(
            drawings.read, model.encode, drawings.category(), job.training.fabric.device
        )
        rows = range(len(source))
        order = [rows[begin : begin + job.batch_size] for begin in rows[:: job.batch_size]]
        with (
            bar("measuring the detector on good pictures", len(source)) as shown,
            closing(source.batches(order)) as batches,
        ):
            model.set_scale(_counted(batches, shown))
        require_readable(drawings.pictures.samples, source.failures)
        write_json(path, model.good_range.tolist())
    model.good_range.copy_(torch.tensor(read_json(path)))


def _counted(batches: Iterable[TrainingBatch], shown: Bar) -> Iterator[TrainingBatch]:
    """Those that hold a picture, and a bar that follows them."""
    for batch in batches:
        if len(batch.index):
            shown.at(int(batch.index[-1]) + 1)
            yield batch


def _validate(job: Job) -> dict[str, Any]:
    """Measure on drawings kept from training, and set the fusion if that was asked for.

    Returns:
        for provenance.json: pixel AP of every part, of every category and on the mean.
    """
    model, drawings, batch_size = job.model, job.held_out, job.batch_size
    model.eval()
    encode = partial(model.encode, whole=True)
    source = OnlineFeatures(drawings.read, encode, drawings.category(), job.inspector.device)
    tables: dict[str, Any] = {}
    for i, name in enumerate(model.categories):
        own = (source.category == i).nonzero().flatten().tolist()
        order = [own[begin : begin + batch_size] for begin in range(0, len(own), batch_size)]
        table = validate(model, source.batches(order), job.image_size)
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
    if job.fusion == "auto":
        model.config = replace(model.config, fusion=best_fusion(mean))
    share = model.config.fusion
    say(
        f"pixel AP on {len(source)} drawings kept from training: initial map "
        f"{mean['initial_map']:.3f}, detector {mean['host']:.3f}, filter {mean['filter']:.3f}, "
        f"both {mean['fusion'][f'{share:g}']:.3f} (fusion {share:g})"
    )
    return {**facts, "mean": mean, "chosen": job.fusion == "auto"}


def _write_run(new: Path, job: Job, facts: Mapping[str, Any], training: Path) -> None:
    """All files of the run but the thresholds."""
    inspector = job.inspector
    write_weights(new / WEIGHTS, own_state(job.model))
    if (inspector.run / ENCODER).is_file():
        shutil.copyfile(inspector.run / ENCODER, new / ENCODER)
    write_masks(new, inspector.ignore)
    shutil.copyfile(training / "log.jsonl", new / TRAINING_LOG)
    settled = {**job.config, "settings": asdict(job.model.config)}  # with the fusion chosen
    write_json(new / CONFIG, {**inspector.config, "filter": settled})
    write_json(new / PROVENANCE, provenance(**facts))


def _calibrate(new: Path, job: Job) -> None:
    if not job.fresh:
        say("no good pictures are left for thresholds: `allgood calibrate` sets them")
        return
    for failure in calibrate_on(new, job.fresh, job.max_false_alarm, device=job.device):
        say(f"left out: {failure.reason}")
