"""Door: good pictures -> a run's folder. `allgood.fit` for Python users and the command line
alike."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allgood.types import InputError

if TYPE_CHECKING:
    from allgood.data.readers import Dataset
    from allgood.data.transforms import Transform
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
    from allgood.calibrating import calibrate_on, split_for_calibration
    from allgood.data.fingerprint import digests, fingerprint
    from allgood.data.readers import read_data
    from allgood.detectors import detector_classes
    from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
    from allgood.encoders.tiled import tiled
    from allgood.inference import choose_device, own_weights
    from allgood.layers.patch_store import PatchStore
    from allgood.progress import say
    from allgood.runs import (
        CONFIG,
        FORMAT,
        PROVENANCE,
        STATE,
        WEIGHTS,
        provenance,
        write_json,
        write_weights,
    )

    started = time.monotonic()
    out = Path(out)
    data = [data] if isinstance(data, str | Path) else list(data)
    config_class, detector_class = detector_classes(detector)
    detector_config = parse_settings(config_class, settings)
    if memory_gb < 0.5:
        raise InputError(f"memory_gb must be at least 0.5, got {memory_gb:g}")
    dataset = read_data(data, layout=layout, train_share=train_share, seed=seed)
    if not dataset.train:
        raise InputError(
            f"{', '.join(map(str, data))}: no good pictures to fit on; "
            "the layouts that are understood: allgood list datasets"
        )
    if dataset.untrained:
        say(f"without good pictures, and so not learned: {', '.join(dataset.untrained)}")
    for line in dataset.describe().splitlines():
        say(line)

    frozen = FrozenEncoder(EncoderConfig(encoder, levels, weights, norm=detector == "anomalydino"))
    transform = _transform(detector, frozen.multiple, image_size, keep_aspect)
    if shots is not None:
        chosen, held_out = few_shots(dataset, shots, seed), []
    else:
        chosen, held_out = split_for_calibration(
            dataset.train, calibration_share, max_false_alarm, seed
        )
    categories = tuple(sorted({sample.category for sample in chosen}))
    ignore_of = _ignore_masks(ignore, categories)
    if rotate is None:
        rotate = detector == "anomalydino" and shots is not None
    angles = ROTATIONS if rotate else (0,)
    config = {
        "format": FORMAT,
        "detector": {"name": detector, "settings": asdict(detector_config)},
        "encoder": {"settings": frozen.config.to_json(), "digest": frozen.digest},
        "transform": transform.to_json(),
        "tile": tile,
        "categories": list(categories),
        "seed": seed,
        "data": {
            "roots": [str(root) for root in data],
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
    request = config | {"fingerprint": fingerprint(chosen)}
    _prepare_folder(out, request, overwrite)

    model = detector_class(detector_config, tiled(frozen, tile), categories, seed=seed)
    model.to(choose_device(device)).eval()
    store = PatchStore(
        out / STATE / "patches",
        num_images=len(chosen) * len(angles),
        # Half of the budget: the rest is for the network, the pictures in flight and the choice.
        budget_bytes=int(memory_gb / 2 * 2**30),
        seed=seed,
    )
    if store.position:
        say(f"going on after {store.position} of {len(chosen) * len(angles)} pictures")
    failures = _fit(model, store, chosen, transform, angles, ignore_of, batch_size)
    write_weights(out / WEIGHTS, own_weights(model))
    _write_ignore(out, ignore_of)
    config["data"]["unreadable"] = [[str(f.path), f.reason] for f in failures]
    facts = provenance(
        data_fingerprint=fingerprint(dataset.samples),
        # So that they are recognised when they turn up in a test or a calibration.
        fitted_on=sorted(set(digests(chosen).values())),
        seconds=round(time.monotonic() - started, 1),
        device=str(choose_device(device)),
    )
    write_json(out / PROVENANCE, facts)
    write_json(out / CONFIG, config)
    if held_out:
        calibrate_on(out, held_out, max_false_alarm, device=device)
    shutil.rmtree(out / STATE)
    return out


def parse_settings(config_class: type, settings: Sequence[str]) -> Any:
    """A detector's config from `name=value` words.

    Raises:
        InputError: an unknown name (the nearest is suggested) or a value of another type.
    """
    from typing import get_args, get_origin, get_type_hints

    from allgood.data.files import did_you_mean

    hints = get_type_hints(config_class)
    values = {}
    for word in settings:
        name, equals, text = word.partition("=")
        if not equals or name not in hints:
            raise InputError(
                f"unknown setting '{word}'{did_you_mean(name, list(hints))}; "
                f"settings are name=value with the names {', '.join(hints)}"
            )
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
            raise InputError(f"setting {name} must be a {hint.__name__}, got '{text}'") from None
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


def _fit(
    model: Any,
    store: PatchStore,
    samples: Sequence[Sample],
    transform: Transform,
    angles: Sequence[float],
    ignore_of: Mapping[str, Any],
    batch_size: int,
) -> list[Failure]:
    """Run the detector's fit over what the store has not seen yet; returns all unreadable
    pictures."""
    import torch

    from allgood.data.batches import load_batches
    from allgood.inference import ignore_masks
    from allgood.progress import bar, late_bar

    place = {sample.id + sample.category: i for i, sample in enumerate(samples)}
    device = next(iter(model.buffers())).device
    total = len(samples) * len(angles)
    failures = list(store.failures)
    index = {name: i for i, name in enumerate(model.categories)}

    def batches() -> Iterator[Batch]:
        position = store.position
        reading.at(position)
        while position < total:
            turn, first = divmod(position, len(samples))
            turned = replace(transform, angle=float(angles[turn]))
            for batch in load_batches(
                samples[first:], turned, failures=failures, batch_size=batch_size
            ):
                if ignore_of:
                    category = torch.tensor([index[sample.category] for sample in batch.sample])
                    masks = ignore_masks(ignore_of, model.categories, category, batch, turned)
                    batch = replace(batch, ignore=masks.to(device))
                yield replace(batch, image=batch.image.to(device))
                # The detector has taken the batch in when it asks for the next one.
                last = batch.sample[-1]
                position = turn * len(samples) + place[last.id + last.category] + 1
                store.commit(position, failures)
                reading.at(position)
            position = (turn + 1) * len(samples)
            store.commit(position, failures)
            reading.at(position)

    with (
        torch.inference_mode(),
        late_bar("choosing the memory bank") as choosing,
        bar("reading good pictures", total) as reading,
    ):
        model.fit(batches(), store, progress=choosing)
    if len({failure.path for failure in failures}) == len(samples):
        raise InputError(
            f"none of the {len(samples)} good pictures could be read; {failures[0].reason}"
        )
    return failures


def _transform(
    detector: str, multiple: int, image_size: int | None, keep_aspect: bool | None
) -> Transform:
    """Each paper's own input geometry where the user says nothing."""
    from allgood.data.transforms import Transform

    if detector == "anomalydino":
        size, keep, interpolation = image_size or 448, keep_aspect is not False, "bicubic"
    else:
        size, keep, interpolation = image_size or 256, bool(keep_aspect), "bilinear"
    if image_size is None:
        size -= size % multiple
    return Transform(size, keep, multiple, interpolation=interpolation)


def _prepare_folder(out: Path, request: Mapping[str, Any], overwrite: bool) -> None:
    """Make the run's folder, or find in it the unfinished fit of the same request."""
    from allgood.runs import CONFIG, STATE, read_json, write_json

    if (out / CONFIG).exists() and not overwrite:
        raise InputError(f"run '{out}' exists: name another folder with --out, or give --overwrite")
    if out.exists() and not out.is_dir():
        raise InputError(f"'{out}' is a file: name a folder with --out")
    state = out / STATE / "request.json"
    if state.exists() and read_json(state) != request:
        if not overwrite:
            raise InputError(
                f"run '{out}' holds an unfinished fit of other data or settings: give that command "
                "again, name another folder with --out, or give --overwrite"
            )
        shutil.rmtree(out / STATE)
    if overwrite and (out / CONFIG).exists():
        (out / CONFIG).unlink()
    if out.exists() and not state.exists() and not overwrite and any(out.iterdir()):
        raise InputError(f"folder '{out}' is not empty and no run: name another one with --out")
    (out / STATE).mkdir(parents=True, exist_ok=True)
    write_json(state, request)


def _ignore_masks(ignore: Path | None, categories: Sequence[str]) -> dict[str, Any]:
    """Per category (H, W) bool; a single file is for all of them."""
    from allgood.data.images import read_image

    if ignore is None:
        return {}
    ignore = Path(ignore)
    if not ignore.is_dir():
        mask = read_image(ignore)[..., 0] > 0
        return dict.fromkeys(categories, mask)
    files = {path.stem: path for path in sorted(ignore.iterdir())}
    unknown = [name for name in files if name not in categories]
    if unknown or not files:
        raise InputError(
            f"{ignore}: expected masks named after categories ({', '.join(categories)}), "
            f"found {unknown[0] if unknown else 'none'}"
        )
    return {name: read_image(path)[..., 0] > 0 for name, path in files.items()}


def _write_ignore(out: Path, masks: Mapping[str, Any]) -> None:
    import io

    from PIL import Image

    from allgood.runs import IGNORE, write_bytes

    for name, mask in masks.items():
        (out / IGNORE).mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "PNG")
        write_bytes(out / IGNORE / f"{name}.png", buffer.getvalue())
