"""Door: an official checkpoint -> a run's folder.

authors' file (tensors only) -> every name and shape understood, or refused -> encoder.safetensors
and weights.safetensors -> published as a run that every command takes
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from allgood.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from allgood.types import Sample


def convert(
    method: Literal["dinomaly"],
    official: Path,
    *,
    out: Path = Path("run"),
    good: tuple[Path, ...] = (),
    categories: tuple[str, ...] | None = None,
    layout: str | None = None,
    image_size: int = 448,
    crop: int | None = 392,
    batch_size: int = 8,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Make a run of a checkpoint that a paper's authors published.

    The file holds the encoder too; it becomes a part of the run, so no hub is needed. It does not
    say which categories it was trained on: name them, or give their good pictures, from which the
    run then learns to tell the categories apart.

    Args:
        method: whose checkpoint it is.
        official: the authors' file, .pth or .safetensors; only tensors are read from it.
        out: folder of the run.
        good: good pictures of the categories, best those that the checkpoint was trained on.
        categories: their names, where no pictures are given; more than one must then be said at
            every inspection.
        layout: how the pictures lie on disk, where it is not recognised.
        image_size: side to which pictures are brought.
        crop: side of the square that is then cut from the middle; with image-size 448 the paper's.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.
        overwrite: replace a run that stands in the folder.

    Returns:
        the run's folder, still without thresholds: `allgood calibrate` sets them.

    Raises:
        InputError: a file that is not, to the last name and shape, what this method's authors
            write.
    """
    arguments = dict(locals())
    started = time.monotonic()
    import shutil

    from safetensors.torch import save_file

    from allgood.data.fingerprint import digests, fingerprint
    from allgood.data.transforms import Transform
    from allgood.detectors.dinomaly import Dinomaly, DinomalyConfig
    from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
    from allgood.inference import choose_device, require_at_least
    from allgood.runs import ENCODER, FORMAT, command_line
    from allgood.unfinished import making, refuse_folder

    out, official = Path(out), Path(official)
    require_at_least(1, batch_size=batch_size, image_size=image_size, crop=crop)
    refuse_folder(out, overwrite)
    samples = _good_samples(good, layout, categories)
    names = tuple(sorted({sample.category for sample in samples})) or categories
    if not names:
        raise InputError("name what the checkpoint was trained on, with --categories or --good")
    where = choose_device(device)
    parts = from_official_dinomaly(_read_official(official))
    transform = Transform(image_size, multiple=14, center_crop=crop)
    with making(out, {"convert": str(official)}, overwrite=True) as state:
        new = state / "run"
        shutil.rmtree(new, ignore_errors=True)  # of a killed conversion
        new.mkdir()
        save_file(parts.encoder, new / ENCODER)
        settings = EncoderConfig(parts.architecture, "middle", str(new / ENCODER))
        encoder = FrozenEncoder(settings)
        model = Dinomaly(DinomalyConfig(), encoder, names).eval()
        _fill(model, parts.detector, official)
        if samples:
            _prepare(model.to(where), samples, transform, batch_size)
        config = {
            "format": FORMAT,
            "official": official.name,
            "detector": {"name": method, "settings": asdict(model.config)},
            "encoder": {
                "settings": settings.to_json()
                | {"levels": list(encoder.levels), "weights": ENCODER},
                "digest": encoder.digest,
            },
            "transform": transform.to_json(),
            "tile": None,
            "categories": list(names),
            "seed": 0,
            "data": {
                "roots": [str(root) for root in good],
                "layouts": {},
                "train_share": 0.8,
                "fitted_pictures": len(samples),
            },
        }
        digest = digests(samples)
        facts = {
            "command": command_line(convert, arguments),
            "official": str(official),
            "data_fingerprint": fingerprint(samples, digest),
            "fitted_on": sorted(set(digest.values())),
            "device": str(where),
            "seconds": round(time.monotonic() - started, 1),
        }
        _write_run(new, model, config, facts)
    return out


class Official(NamedTuple):
    """An official checkpoint in our words."""

    architecture: str
    """timm's name of the encoder."""
    encoder: dict[str, Tensor]
    """Under the names of the encoder's own authors, which timm reads."""
    detector: dict[str, Tensor]
    """Under our names: everything but the encoder and what comes from data."""


_WIDTHS = {384: "small", 768: "base", 1024: "large"}
_DEPTHS = {384: 12, 768: 12, 1024: 24}


def from_official_dinomaly(state: Mapping[str, Tensor]) -> Official:
    """The authors' `ViTill.state_dict()`, taken apart.

    Raises:
        InputError: a name that is not of this model, or one that is missing.
    """
    encoder = {
        name.removeprefix("encoder."): tensor
        for name, tensor in state.items()
        if name.startswith("encoder.")
    }
    detector = {
        re.sub(r"^bottleneck\.0\.", "bottleneck.", name): tensor
        for name, tensor in state.items()
        if re.match(r"bottleneck\.0\.|decoder\.\d+\.", name)
    }
    strange = [
        name for name in state if not re.match(r"encoder\.|bottleneck\.0\.|decoder\.\d+\.", name)
    ]
    if strange:
        raise InputError(f"'{strange[0]}' is no part of an official Dinomaly checkpoint")
    patch = encoder.get("patch_embed.proj.weight")
    if patch is None or not detector:
        missing = "encoder.patch_embed.proj.weight" if patch is None else "bottleneck and decoder"
        raise InputError(f"no official Dinomaly checkpoint: it lacks {missing}")
    width, _, *patch_size = patch.shape
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    registers = encoder.get("register_tokens")
    if (
        _DEPTHS.get(width) != depth
        or patch_size != [14, 14]
        or (registers is not None and registers.shape[1] != 4)
    ):
        raise InputError(
            f"an encoder of width {width}, {depth} blocks and patches of {patch_size} is none of "
            "the DINOv2 ViT-S/B/L 14 that this reads: fit it again with --detector dinomaly"
        )
    register_name = "" if registers is None else "reg4_"
    return Official(f"vit_{_WIDTHS[width]}_patch14_{register_name}dinov2", encoder, detector)


def _read_official(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. A pickle is read for its tensors only: it runs no code.

    Raises:
        InputError: no such file, or one with anything but tensors in it.
    """
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file; name the authors' checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors each have a zoo of their own
        raise InputError(
            f"{path} cannot be read as a checkpoint of tensors ({type(error).__name__}); "
            "download it again, or save its state_dict alone"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise InputError(f"{path} holds more than named tensors: save its state_dict alone")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"{path} is damaged: '{broken[0]}' holds numbers that are not finite")
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _fill(model: Any, weights: Mapping[str, Tensor], official: Path) -> None:
    """The trained part of a detector; InputError unless every name and shape agrees."""
    own = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
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
    from allgood.data.readers import read_data
    from allgood.progress import say

    if not roots:
        return []
    dataset = read_data(list(roots), layout=layout)
    if categories is not None:
        dataset = dataset.only(categories)
    say(dataset.describe())
    if not dataset.train:
        raise InputError(f"{', '.join(map(str, roots))}: no good pictures")
    return list(dataset.train)


def _prepare(model: Any, samples: Sequence[Sample], transform: Any, batch_size: int) -> None:
    """Show the pictures to the detector, which keeps a few of each category as references."""
    import torch

    from allgood.learning import online_features
    from allgood.pictures import Pictures
    from allgood.progress import say

    source = online_features(
        model, Pictures(samples, transform, {}), model.references.features.device
    )
    order = [
        range(begin, min(begin + batch_size, len(samples)))
        for begin in range(0, len(samples), batch_size)
    ]
    with torch.no_grad():
        model.prepare(batch for batch in source.batches(order) if len(batch.index))
    for failure in source.failures.values():
        say(f"left out: {failure.reason}")


def _write_run(new: Path, model: Any, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    from allgood.own_state import own_state
    from allgood.runs import (
        CONFIG,
        PROVENANCE,
        WEIGHTS,
        finish,
        provenance,
        write_json,
        write_weights,
    )

    write_weights(new / WEIGHTS, own_state(model))
    write_json(new / CONFIG, config)
    write_json(new / PROVENANCE, provenance(**facts))
    finish(new)
