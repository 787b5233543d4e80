"""Behind `convert`: what authors published -> a run's folder, or a refusal."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from allgood.costfilter.config import FilterConfig
from allgood.costfilter.filtered import FilteredDetector, shape_of_match
from allgood.data.fingerprint import digests, fingerprint
from allgood.data.readers import read_data
from allgood.data.transforms import Transform
from allgood.detectors import detector_classes
from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
from allgood.ignored import write_masks
from allgood.inference import Inspector
from allgood.learning import online_features
from allgood.official import Official, from_official, read
from allgood.official.costfilter import read_filter, renamed
from allgood.options import choose_device
from allgood.own_state import own_state
from allgood.pictures import Pictures, require_readable
from allgood.progress import say
from allgood.recipes.costfilter import FILTERS
from allgood.runs import (
    CONFIG,
    ENCODER,
    FORMAT,
    PROVENANCE,
    WEIGHTS,
    finish,
    provenance,
    read_json,
    write_json,
    write_weights,
)
from allgood.types import InputError, Sample, TrainingBatch
from allgood.unfinished import making


def convert_detector(
    method: str,
    path: Path,
    *,
    out: Path,
    good: Sequence[Path],
    categories: Sequence[str] | None,
    layout: str | None,
    weights: Path | None,
    image_size: int | None,
    crop: int | None,
    batch_size: int,
    device: str,
    command: str,
) -> Path:
    """A run of the authors' detector, see `convert`."""
    started = time.monotonic()
    _refuse_repeated(categories or ())
    samples = _good_samples(good, layout, categories)
    # HVQ-Trans has codebooks by category number, and its authors number alphabetically.
    names = tuple(sorted({sample.category for sample in samples} or categories or ()))
    if not names:
        raise InputError("name what the checkpoint was trained on, with --categories or --good")
    where = choose_device(device)
    parts = from_official(method, read(path))
    if parts.num_categories not in (None, len(names)):
        raise InputError(
            f"{path} was trained on {parts.num_categories} categories, but {len(names)} are named"
        )
    encoder_config = _with_weights(parts, path, weights)
    with making(out, {"convert": str(path)}, overwrite=True) as state:
        new = state / "run"
        shutil.rmtree(new, ignore_errors=True)  # of a killed conversion
        new.mkdir()
        if parts.encoder_weights is not None:
            save_file(parts.encoder_weights, new / ENCODER)
            encoder_config = replace(encoder_config, weights=str(new / ENCODER))
        encoder = FrozenEncoder(encoder_config)
        transform = Transform(
            image_size or parts.image_size,
            multiple=encoder.multiple,
            center_crop=crop if image_size else crop or parts.crop,
        )
        model = detector_classes(method)[1](parts.config, encoder, names).eval()
        _fill(model, parts.weights, path)
        model.to(where)
        _show_blank(model, transform, where)
        if samples:
            samples = _prepare(model, samples, transform, batch_size)
        settings = encoder_config.to_json() | {"levels": list(encoder.levels)}
        if parts.encoder_weights is not None:
            settings["weights"] = ENCODER
        config = {
            "format": FORMAT,
            "official": path.name,
            "detector": {"name": method, "settings": asdict(model.config)},
            "encoder": {"settings": settings, "digest": encoder.digest},
            "transform": transform.to_json(),
            "tile": None,
            "categories": list(names),
            "seed": 0,
            "batch_size": batch_size,
            "data": {
                "roots": [str(root) for root in good],
                "layouts": {},
                "train_share": 0.8,
                "fitted_pictures": len(samples),
            },
        }
        digest = digests(samples)
        facts = {
            "command": command,
            "official": str(path),
            "data_fingerprint": fingerprint(samples, digest),
            "fitted_on": sorted(set(digest.values())),
            "device": str(where),
            "seconds": round(time.monotonic() - started, 1),
        }
        _write_run(new, model, config, facts)
    return out


def convert_filter(
    official: Path,
    host: Path,
    *,
    out: Path,
    preset: str | None,
    good: Sequence[Path],
    layout: str | None,
    device: str,
    command: str,
) -> Path:
    """A run of the host with the authors' filter behind it, which fits to the last shape."""
    samples = _good_samples(good, layout, None)
    found = read_filter(read(official))
    variant = found.variant
    preset = preset or variant.presets[0]
    if preset not in variant.presets:
        raise InputError(
            f"{official} is a filter for {variant.title}: give --preset "
            f"{' or '.join(variant.presets)}, or leave it out"
        )
    inspector = Inspector(host, device=device)
    inspector.require_fitted("convert")
    kind = inspector.config["detector"]["name"]
    if "filter" in inspector.config or kind != variant.host:
        raise InputError(
            f"{official} is a filter for {variant.title}, and run '{host}' is "
            f"{kind}{' with a filter' if 'filter' in inspector.config else ''}: give a plain "
            f"{variant.host} run with --host"
        )
    side = variant.image_size
    size = inspector.transform.input_size(side, side)
    channels, grid = shape_of_match(inspector.detector, size, inspector.device)
    if (size, grid, channels) != ((side, side), (variant.grid,) * 2, list(variant.match)):
        raise InputError(
            f"{official} is for levels of {list(variant.match)} channels on {variant.grid} x "
            f"{variant.grid} of {side} x {side} pixels, but run '{host}' matches {channels} on "
            f"{grid[0]} x {grid[1]} of {size[0]} x {size[1]}: fit or convert it as the authors' "
            f"{variant.title}"
        )
    if kind == "anomalydino" and inspector.detector.config.query != "raw":
        raise InputError(
            f"{official} is guided by features as the encoder gives them, and run '{host}' has "
            "them scaled: fit it with --recipe anomaldf, or --settings query=raw"
        )
    settings = {**FILTERS[preset].settings, "classes": found.classes}
    if kind == "hvqtrans" and not inspector.detector.config.optimal_transport:
        settings |= {"matching": "hvq", "fusion": 0.9901}  # P + 0.01 H, as on VisA
    config = FilterConfig(**settings)
    model = FilteredDetector(config, inspector.detector, channels, grid)
    model.network.load_state_dict(renamed(model.network, found.state))
    if config.templates == "good":
        templates = _templates(samples, inspector.categories, config.num_templates, official)
        model.keep_templates(inspector.query_features(templates))
    elif samples:
        raise InputError(
            f"{official} compares with what its host rebuilds, not with good pictures: leave out "
            "--good"
        )
    behind = {
        "official": official.name,
        "settings": asdict(config),
        "channels": channels,
        "grid": list(grid),
        "seed": 0,
    }
    known = read_json(inspector.run / PROVENANCE)
    with making(out, {"convert": str(official), "host": str(host)}, overwrite=True) as state:
        new = state / "run"
        shutil.rmtree(new, ignore_errors=True)  # of a killed conversion
        new.mkdir()
        if (inspector.run / ENCODER).is_file():
            shutil.copyfile(inspector.run / ENCODER, new / ENCODER)
        write_masks(new, inspector.ignore)
        facts = {
            "command": command,
            "official": str(official),
            "host": str(host),
            "data_fingerprint": known["data_fingerprint"],
            "fitted_on": known["fitted_on"],
            "device": str(inspector.device),
        }
        _write_run(new, model, {**inspector.config, "filter": behind}, facts)
    return out


def _templates(
    good: Sequence[Sample], categories: Sequence[str], count: int, official: Path
) -> list[Sample]:
    """The first pictures of each category."""
    chosen = []
    for category in categories:
        own = [sample for sample in good if sample.category == category][:count]
        if len(own) < count:
            raise InputError(
                f"{official} compares with {count} good pictures of each category, and there are "
                f"{len(own)} of '{category}': give some with --good"
            )
        chosen += own
    return chosen


def _with_weights(parts: Official, official: Path, weights: Path | None) -> EncoderConfig:
    """The encoder, and the user's file with its weights where there is one."""
    if weights is None:
        return parts.encoder
    if parts.encoder_weights is not None:
        raise InputError(f"{official} holds the weights of its encoder: leave out --weights")
    if not weights.is_file():
        raise InputError(
            f"{weights}: no such file; name one with the weights of '{parts.encoder.name}', or "
            "leave out --weights to take them from the hub"
        )
    return replace(parts.encoder, weights=str(weights.absolute()))  # to be found from everywhere


def _fill(model: Any, weights: Mapping[str, Tensor], official: Path) -> None:
    """The trained part of a detector; InputError unless every name and shape agrees.

    What tells the categories apart is not part of it: that comes from pictures.
    """
    own = {k: v for k, v in own_state(model).items() if not k.startswith("references.")}
    for name in sorted(own.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else None
        wanted = tuple(own[name].shape) if name in own else None
        if found != wanted:
            raise InputError(
                f"{official} does not fit: '{name}' is {found or 'missing'} there, and "
                f"{wanted or 'nothing'} in {type(model).__name__}"
            )
    model.load_state_dict(weights, strict=False)


def _good_samples(
    roots: Sequence[Path], layout: str | None, categories: Sequence[str] | None
) -> list[Sample]:
    """The good training pictures."""
    if not roots:
        return []
    dataset = read_data(list(roots), layout=layout)
    if categories is not None:
        dataset = dataset.only(categories)
    say(dataset.describe())
    if not dataset.train:
        raise InputError(f"{', '.join(map(str, roots))}: no good pictures")
    return list(dataset.train)


def _refuse_repeated(categories: Sequence[str]) -> None:
    for name, count in Counter(categories).items():
        if count > 1:
            raise InputError(f"category '{name}' is named {count} times: name it once")


def _show_blank(model: Any, transform: Transform, device: torch.device) -> None:
    """Let one blank picture through: InputError where the detector does not take its size."""
    image = torch.zeros(1, 3, *transform.input_size(1, 1), device=device)  # that of all pictures
    with torch.no_grad():
        model.predict(image, torch.zeros(1, dtype=torch.int64, device=device))


def _prepare(
    model: Any, samples: Sequence[Sample], transform: Transform, batch_size: int
) -> list[Sample]:
    """Show the pictures to the detector, which keeps a few of each category as references.

    Returns:
        those that could be read.

    Raises:
        InputError: no picture of a category could be read.
    """
    source = online_features(
        model, Pictures(samples, transform, {}), model.references.features.device
    )
    order = [
        range(begin, min(begin + batch_size, len(samples)))
        for begin in range(0, len(samples), batch_size)
    ]

    def batches() -> Iterator[TrainingBatch]:
        yield from (batch for batch in source.batches(order) if len(batch.index))
        require_readable(samples, source.failures)  # before anything is kept

    with torch.no_grad():
        model.prepare(batches())
    for failure in source.failures.values():
        say(f"left out: {failure.reason}")
    return [sample for i, sample in enumerate(samples) if i not in source.failures]


def _write_run(new: Path, model: Any, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    write_weights(new / WEIGHTS, own_state(model))
    write_json(new / CONFIG, config)
    write_json(new / PROVENANCE, provenance(**facts))
    finish(new)
