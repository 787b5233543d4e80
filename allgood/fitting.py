"""Door: good pictures -> a run's folder. `allgood.fit` for Python users and the command line.

settings resolved -> folder prepared -> detector fitted -> files written -> calibrated -> published
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from allgood.types import InputError

if TYPE_CHECKING:
    import numpy as np

    from allgood.data.readers import Dataset
    from allgood.data.transforms import Transform
    from allgood.encoders.frozen import FrozenEncoder
    from allgood.layers.patch_store import PatchStore
    from allgood.types import Batch, Failure, Sample

ROTATIONS = (0, 45, 90, 135, 180, 225, 270, 315)
"""Angles of the rotated copies of few-shot references (AnomalyDINO)."""


def fit(
    data: list[Path],
    *,
    detector: str = "patchcore",
    encoder: str = "efficientnet_lite0",
    out: Path = Path("run"),
    levels: tuple[int, ...] | None = None,
    weights: str = "pretrained",
    image_size: int | None = None,
    keep_aspect: bool | None = None,
    tile: int | None = None,
    ignore: Path | None = None,
    layout: str | None = None,
    train_share: float = 0.8,
    shots: int | None = None,
    rotate: bool | None = None,
    settings: tuple[str, ...] = (),
    calibration_share: float = 0.15,
    max_false_alarm: float = 0.05,
    memory_gb: float = 2.0,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Learn what is good, from pictures of good parts of one or many categories.

    A killed fit goes on where it was when the same command is given again.

    Args:
        data: folders or manifests; several make one multi-category set. `elpv` is the demo's set.
        detector: one of `allgood list detectors`.
        encoder: `efficientnet_lite0` (embedded) or any timm backbone; see `allgood list encoders`.
        out: folder of the run.
        levels: feature levels by timm's index; default: strides 8 and 16, or a ViT's last block.
        weights: pretrained, random, or a local file.
        image_size: side of the network's input in pixels (with keep-aspect the shorter side).
        keep_aspect: keep the picture's aspect ratio instead of squashing it to a square.
        tile: read large inputs in overlapping tiles of this side.
        ignore: a mask (white: nobody should look there) for all pictures, or a folder of
            CATEGORY.png.
        layout: how the data lie on disk, where it is not recognised; see `allgood list datasets`.
        train_share: share of the good pictures that is for fitting, where disk does not say.
        shots: use only this many good pictures per category (few-shot; the seed picks which).
        rotate: also learn 7 rotated copies of each picture; default: with anomalydino and shots.
        settings: of the detector, as name=value, e.g. bank=per_category coreset_ratio=0.1.
        calibration_share: share of the good pictures kept from fitting for the thresholds.
        max_false_alarm: share of good pictures that may raise an alarm.
        memory_gb: what fitting may take in memory.
        batch_size: pictures that pass the network together.
        seed: of all random choices.
        device: auto, cpu or cuda.
        overwrite: replace a run that stands in the folder.

    Returns:
        the run's folder.

    Raises:
        InputError: anything given that cannot be used, in one sentence.
    """
    started = time.monotonic()
    arguments = dict(locals())
    from allgood.calibrating import split_for_calibration
    from allgood.data.fingerprint import digests, fingerprint
    from allgood.detectors import detector_classes
    from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
    from allgood.encoders.tiled import tiled
    from allgood.inference import choose_device, require_at_least
    from allgood.runs import FORMAT, command_line
    from allgood.unfinished import refuse_folder

    # Everything asked for is resolved and checked here, and nothing is written yet.
    out = Path(out)
    roots = [data] if isinstance(data, str | Path) else list(data)
    require_at_least(1, batch_size=batch_size, image_size=image_size, tile=tile, shots=shots)
    require_at_least(0, seed=seed)
    require_at_least(0.5, memory_gb=memory_gb)
    refuse_folder(out, overwrite)
    config_class, detector_class = detector_classes(detector)
    detector_config = parse_settings(config_class, settings)
    where = choose_device(device)
    dataset = _read_good(roots, layout, train_share, seed)
    if shots is None:
        chosen, held_out = split_for_calibration(
            dataset.train, calibration_share, max_false_alarm, seed
        )
    else:
        chosen, held_out = few_shots(dataset, shots, seed), []
    categories = tuple(sorted({sample.category for sample in chosen}))
    if weights not in ("pretrained", "random"):
        weights = os.path.abspath(weights)  # the run must find them from everywhere
    encoder_config = EncoderConfig(encoder, levels, weights, norm=detector == "anomalydino")
    frozen = FrozenEncoder(encoder_config)
    transform = _transform(detector, frozen, image_size, keep_aspect)
    model = detector_class(detector_config, tiled(frozen, tile), categories, seed=seed)
    if rotate is None:
        rotate = detector == "anomalydino" and shots is not None
    angles = ROTATIONS if rotate else (0,)
    config: dict[str, Any] = {
        "format": FORMAT,
        "detector": {"name": detector, "settings": asdict(detector_config)},
        "encoder": {"settings": encoder_config.to_json(), "digest": frozen.digest},
        "transform": transform.to_json(),
        "tile": tile,
        "categories": list(categories),
        "seed": seed,
        "data": {
            "roots": [str(root) for root in roots],
            "layout": layout,
            "layouts": dict(dataset.layouts),
            "train_share": train_share,
            "shots": shots,
            "angles": list(angles),
            "calibration_share": calibration_share,
            "fitted_pictures": len(chosen),
            "held_out_pictures": len(held_out),
        },
        "memory_gb": memory_gb,
        "batch_size": batch_size,
    }
    facts: dict[str, Any] = {
        "command": command_line(fit, arguments),
        "data_fingerprint": fingerprint([*chosen, *held_out]),
        # So that they are recognised when they turn up in a test or a calibration.
        "fitted_on": sorted(set(digests(chosen).values())),
        "device": str(where),
    }

    job = _Job(
        model=model.to(where).eval(),
        transform=transform,
        samples=chosen,
        held_out=held_out,
        angles=angles,
        ignore_of=_ignore_masks(ignore, categories),
        batch_size=batch_size,
        seed=seed,
        # Half of the budget: the rest is for the network, the pictures in flight and the choice.
        budget_bytes=int(memory_gb / 2 * 2**30),
        max_false_alarm=max_false_alarm,
        device=device,
        config=config,
        facts=facts,
        started=started,
    )
    _make_run(out, job, overwrite)
    _say_result(out)
    return out


def _make_run(out: Path, job: _Job, overwrite: bool) -> None:
    """Fit, write, calibrate in state/run, then move the new run into place.

    The same request goes on with what a killed fit left there.
    """
    from allgood.runs import is_finished, publish
    from allgood.unfinished import open_state, withdraw

    state = open_state(out, job.request(), overwrite)
    new = state / "run"
    try:
        if not is_finished(new):
            failures = _fit_detector(job, state / "patches")
            _write_run(new, job, failures)
        shutil.rmtree(state / "patches", ignore_errors=True)
        publish(new, out)
    except InputError:  # the user must change something, so there is nothing to go on with
        withdraw(out)
        raise
    except OSError as error:
        error.filename = error.filename or str(state)
        raise
    shutil.rmtree(state)


def parse_settings(config_class: type, settings: Sequence[str]) -> Any:
    """A detector's config from `name=value` words.

    Raises:
        InputError: an unknown name (the nearest is suggested) or a value of another type.
    """
    from typing import get_args, get_origin, get_type_hints

    from allgood.data.files import did_you_mean

    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for word in settings:
        name, equals, text = word.partition("=")
        if name not in hints:
            raise InputError(
                f"unknown setting '{name}'{did_you_mean(name, list(hints)) or ';'} "
                f"known: {', '.join(hints)}"
            )
        if not equals:
            raise InputError(f"setting '{word}' has no value: write {name}=VALUE")
        hint = hints[name]
        options = get_args(hint)
        if type(None) in options:
            if text.lower() == "none":
                values[name] = None
                continue
            hint = next(option for option in options if option is not type(None))
        if get_origin(hint) is not None:  # Literal
            if text not in options:
                raise InputError(
                    f"setting {name} must be one of {', '.join(options)}, got '{text}'"
                )
            values[name] = text
            continue
        try:
            values[name] = hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise InputError(f"setting {name} must be {kind}, got '{text}'") from None
    return config_class(**values)


def few_shots(dataset: Dataset, shots: int, seed: int) -> list[Sample]:
    """The AnomalyDINO protocol: entries seed*k ... (seed+1)*k - 1 of each category's sorted good
    list."""
    chosen = []
    for category in dataset.categories:
        good = [sample for sample in dataset.train if sample.category == category]
        block = good[seed * shots : (seed + 1) * shots]
        if len(block) < shots:
            raise InputError(
                f"category '{category}' has {len(good)} good pictures, too few for "
                f"{shots} shots with seed {seed}, which needs {(seed + 1) * shots}"
            )
        chosen += block
    return chosen


@dataclass(frozen=True)
class _Job:
    """One fit, all of it resolved."""

    model: Any
    transform: Transform
    samples: Sequence[Sample]
    """To fit on."""
    held_out: Sequence[Sample]
    """To calibrate on."""
    angles: Sequence[float]
    """Every picture is learned once per angle."""
    ignore_of: Mapping[str, np.ndarray]
    batch_size: int
    seed: int
    budget_bytes: int
    """What the patches may take in memory."""
    max_false_alarm: float
    device: str
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
            "ignore": _digest(self.ignore_of),
        }


def _read_good(
    roots: Sequence[str | Path], layout: str | None, train_share: float, seed: int
) -> Dataset:
    """The data, described on stderr; there is something to learn from."""
    from allgood.data.readers import read_data
    from allgood.progress import say

    dataset = read_data(roots, layout=layout, train_share=train_share, seed=seed)
    if not dataset.train:
        raise InputError(
            f"{', '.join(map(str, roots))}: no good pictures to fit on; "
            "the layouts that are understood: allgood list datasets"
        )
    say(dataset.describe())
    if dataset.untrained:
        say(f"without good pictures, and so not learned: {', '.join(dataset.untrained)}")
    return dataset


def _fit_detector(job: _Job, folder: Path) -> list[Failure]:
    """Fit the model, going on with what a killed fit left in the store's folder.

    Returns:
        the pictures that could not be read.

    Raises:
        InputError: no good picture of a category could be read.
    """
    import torch

    from allgood.layers.patch_store import PatchStore
    from allgood.progress import late_bar, say

    total = len(job.samples) * len(job.angles)
    store = PatchStore(folder, num_images=total, budget_bytes=job.budget_bytes, seed=job.seed)
    if store.position:
        say(f"going on after {store.position} of {total} pictures")
    failures = list(store.failures)
    with (
        torch.inference_mode(),
        closing(_batches(job, store, failures)) as batches,
        late_bar("choosing the memory bank") as choosing,
    ):
        job.model.fit(batches, store, progress=choosing)
    # Rotated copies fail once per angle, and one read ahead of a kill fails again.
    return list({failure.path: failure for failure in failures}.values())


def _batches(job: _Job, store: PatchStore, failures: list[Failure]) -> Generator[Batch]:
    """Batches that the store has not seen yet; each counts as seen when the next is asked for."""
    import torch

    from allgood.data.batches import load_batches
    from allgood.inference import hide, ignore_masks
    from allgood.progress import bar

    samples, categories = job.samples, job.model.categories
    place = {(sample.category, sample.id): i for i, sample in enumerate(samples)}
    index = {name: i for i, name in enumerate(categories)}
    device = next(iter(job.model.buffers())).device
    total = len(samples) * len(job.angles)
    position = store.position

    def seen(now: int) -> None:
        nonlocal position
        position = now
        store.commit(position, failures)
        reading.at(position)

    with bar("reading good pictures", total) as reading:
        reading.at(position)
        while position < total:
            turn, first = divmod(position, len(samples))
            turned = replace(job.transform, angle=float(job.angles[turn]))
            for batch in load_batches(
                samples[first:], turned, failures=failures, batch_size=job.batch_size
            ):
                image, ignore = batch.image.to(device), None
                if job.ignore_of:
                    category = torch.tensor([index[sample.category] for sample in batch.sample])
                    masks = ignore_masks(
                        job.ignore_of, categories, category, batch.original_size, turned
                    )
                    ignore = masks.to(device)
                    image = hide(image, ignore)
                yield replace(batch, image=image, ignore=ignore)
                last = batch.sample[-1]
                seen(turn * len(samples) + place[last.category, last.id] + 1)
            seen((turn + 1) * len(samples))  # past the unreadable ones at the end
    _require_readable(samples, failures)


def _require_readable(samples: Sequence[Sample], failures: Sequence[Failure]) -> None:
    failed = {failure.path for failure in failures}
    for category in sorted({sample.category for sample in samples}):
        own = [sample.path for sample in samples if sample.category == category]
        if failed.issuperset(own):
            reason = next(failure.reason for failure in failures if failure.path in own)
            raise InputError(
                f"none of the {len(own)} good pictures of category '{category}' could be read; "
                f"the first: {reason}"
            )


def _write_run(new: Path, job: _Job, failures: Sequence[Failure]) -> None:
    """All files of the run, the thresholds among them."""
    from allgood.calibrating import calibrate_on
    from allgood.inference import own_weights
    from allgood.runs import (
        CONFIG,
        IGNORE,
        PROVENANCE,
        WEIGHTS,
        finish,
        ignore_file,
        provenance,
        write_json,
        write_weights,
    )

    new.mkdir(exist_ok=True)
    write_weights(new / WEIGHTS, own_weights(job.model))
    if job.ignore_of:
        (new / IGNORE).mkdir(exist_ok=True)
    for name, mask in job.ignore_of.items():
        _write_mask(ignore_file(new, name), mask)
    fitted = {"fitted_pictures": len(job.samples) - len(failures)}
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
    from allgood.progress import say
    from allgood.runs import CALIBRATION, CONFIG, PROVENANCE, read_json

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


def _transform(
    detector: str, encoder: FrozenEncoder, image_size: int | None, keep_aspect: bool | None
) -> Transform:
    """Each paper's own input geometry where the user says nothing."""
    from allgood.data.transforms import Transform

    multiple = encoder.multiple
    interpolation: Literal["bilinear", "bicubic"]
    if detector == "anomalydino":
        size, keep, interpolation = image_size or 448, keep_aspect is not False, "bicubic"
    else:
        size, keep, interpolation = image_size or 256, bool(keep_aspect), "bilinear"
    if image_size is None:
        size -= size % multiple
    elif size < multiple or (size % multiple and not keep):
        lower = size - size % multiple
        near = f"{lower} or {lower + multiple}" if lower else str(multiple)
        raise InputError(
            f"image_size must be a multiple of {multiple} for encoder '{encoder.config.name}', "
            f"got {size}: take {near}"
        )
    return Transform(size, keep, multiple, interpolation=interpolation)


# -- ignored regions -----------------------------------------------------------------------------


def _ignore_masks(ignore: Path | None, categories: Sequence[str]) -> dict[str, np.ndarray]:
    """Per category (H, W) bool; a single file is for all of them."""
    from allgood.data.files import pictures_in
    from allgood.data.images import read_image

    def read(path: Path) -> np.ndarray:
        mask = read_image(path).max(axis=2) >= 128  # not > 0: a JPEG's black is not all black
        if mask.mean() > 0.98:
            raise InputError(
                f"{path}: is white all over, so nothing is left to look at; paint white only "
                "what is to be ignored"
            )
        return mask

    if ignore is None:
        return {}
    ignore = Path(ignore)
    if not ignore.is_dir():
        return dict.fromkeys(categories, read(ignore))
    files = {path.stem: path for path in pictures_in(ignore)}
    unknown = [name for name in files if name not in categories]
    if unknown or not files:
        raise InputError(
            f"{ignore}: expected masks named after categories ({', '.join(categories)}), "
            f"found {unknown[0] if unknown else 'none'}"
        )
    return {name: read(path) for name, path in files.items()}


def _write_mask(path: Path, mask: np.ndarray) -> None:
    import io

    from PIL import Image

    from allgood.runs import write_bytes

    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _digest(masks: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {
        name: hashlib.blake2b(mask.tobytes() + str(mask.shape).encode(), digest_size=8).hexdigest()
        for name, mask in masks.items()
    }
