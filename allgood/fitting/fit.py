"""Door: good pictures -> a run's folder. `allgood.fit` for Python users and the command line.

What is asked for is resolved and checked first, before anything is written: `setup` has parts of
that. `job` does it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from allgood.types import InputError

ROTATIONS = (0, 45, 90, 135, 180, 225, 270, 315)
"""Angles of the rotated copies of few-shot references (AnomalyDINO)."""


def fit(
    data: list[Path],
    *,
    recipe: str | None = None,
    detector: str | None = None,
    encoder: str | None = None,
    out: Path = Path("run"),
    levels: tuple[int, ...] | None = None,
    weights: str = "pretrained",
    image_size: int | None = None,
    crop: int | None = None,
    keep_aspect: bool | None = None,
    tile: int | None = None,
    ignore: Path | None = None,
    layout: str | None = None,
    categories: tuple[str, ...] | None = None,
    per_category: bool | None = None,
    train_share: float = 0.8,
    shots: int | None = None,
    rotate: bool | None = None,
    settings: tuple[str, ...] = (),
    train: tuple[str, ...] = (),
    augment: tuple[str, ...] = (),
    cache: Path | None = None,
    no_cache: bool = False,
    tensorboard: Path | None = None,
    calibration_share: float | None = None,
    max_false_alarm: float | None = None,
    memory_gb: float = 2.0,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Learn what is good, from pictures of good parts of one or many categories.

    A killed fit goes on where it was when the same command is given again.

    Args:
        data: folders or manifests; several make one multi-category set. `elpv` is the demo's set.
        recipe: complete settings of a paper's experiment, one of `allgood list recipes`; default:
            the detector's own. Whatever else is given replaces a part of it.
        detector: one of `allgood list detectors`; default: patchcore, or the recipe's.
        encoder: `efficientnet_lite0` (embedded) or any timm backbone; see `allgood list encoders`.
        out: folder of the run.
        levels: feature levels by timm's index; default: strides 8 and 16, or a ViT's last block;
            for dinomaly the eight middle blocks.
        weights: pretrained, random, or a local file.
        image_size: side of the network's input in pixels (with keep-aspect the shorter side).
        crop: side of the square that is then cut from the middle; the default goes with the
            default image-size only.
        keep_aspect: keep the picture's aspect ratio instead of squashing it to a square.
        tile: read large inputs in overlapping tiles of this side.
        ignore: a mask (white: nobody should look there) for all pictures, or a folder of
            CATEGORY.png; those of categories that are not learned do not matter.
        layout: how the data lie on disk, where it is not recognised; see `allgood list datasets`.
        categories: learn only these; default: all that the data hold.
        per_category: one model per category, in OUT/CATEGORY, instead of one for all; default:
            as the recipe has it. Those that the same command has finished stay, and are refused
            where their pictures or masks have changed since.
        train_share: share of the good pictures that is for fitting, where disk does not say.
        shots: use only this many good pictures per category (few-shot; the seed picks which).
        rotate: also learn 7 rotated copies of each picture; default: with anomalydino and shots.
        settings: of the detector, as name=value, e.g. bank=per_category coreset_ratio=0.1.
        train: of the training, as name=value, e.g. steps=5000 precision=bf16.
        augment: flip and turn training pictures, as CATEGORY=flip,rotate ... or all=flip,rotate
            (flip_horizontal, flip_vertical, none); default: as the recipe has it.
        cache: folder for the frozen features of all trainings; default: in the user's cache folder.
        no_cache: run the encoder in every step of a training instead.
        tensorboard: folder for TensorBoard's files.
        calibration_share: share of the good pictures kept from fitting for the thresholds; default
            0.15, and none with shots.
        max_false_alarm: share of good pictures that may raise an alarm; default 0.05, and no
            thresholds for a category that has too few pictures to promise it.
        memory_gb: what fitting may take in memory.
        batch_size: pictures that pass the network together.
        seed: of all random choices.
        device: auto, cpu or cuda.
        devices: processes of a training, each with a device of its own.
        nodes: machines of a training, which see the same folders; start the command on each.
        resume: go on with an unfinished fit, and refuse where there is none. The same command
            without it does so too.
        overwrite: replace a run that stands in the folder.

    Returns:
        the run's folder.

    Raises:
        InputError: anything given that cannot be used, in one sentence.
    """
    arguments = dict(locals())
    started = time.monotonic()
    from allgood.data.augmentation import augmentations
    from allgood.data.fingerprint import digests, fingerprint
    from allgood.detectors import detector_classes
    from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
    from allgood.encoders.tiled import tiled
    from allgood.fitting.held_out import split_for_calibration
    from allgood.fitting.job import Job, make_run
    from allgood.fitting.setup import few_shots, input_transform, read_good, resolved_recipe
    from allgood.ignored import read_given
    from allgood.options import choose_device, require_at_least
    from allgood.pictures import Pictures
    from allgood.recipes import configured
    from allgood.runs import FORMAT, command_line
    from allgood.types import Learner
    from allgood.unfinished import is_unfinished, refuse_folder

    out = Path(out)
    roots = [data] if isinstance(data, str | Path) else list(data)
    require_at_least(1, batch_size=batch_size, image_size=image_size, tile=tile, shots=shots)
    require_at_least(1, crop=crop, devices=devices, nodes=nodes)
    require_at_least(0, seed=seed)
    require_at_least(0.5, memory_gb=memory_gb)
    if shots is not None and (max_false_alarm is not None or calibration_share):
        raise InputError(
            "--shots keeps no pictures for thresholds: leave out --max-false-alarm and "
            "--calibration-share, and see `allgood calibrate`"
        )
    chosen_recipe = resolved_recipe(recipe, detector, encoder, levels)
    if chosen_recipe.per_category if per_category is None else per_category:
        return _fit_each(roots, arguments)
    refuse_folder(out, overwrite)
    if resume and not is_unfinished(out):
        raise InputError(f"'{out}' holds no unfinished fit: leave out --resume")
    config_class, detector_class = detector_classes(chosen_recipe.detector)
    detector_config = configured(config_class, chosen_recipe.settings, settings)
    dataset, known = read_good(roots, layout, categories, train_share, seed)
    promised = 0.05 if max_false_alarm is None else max_false_alarm
    if calibration_share is None:
        calibration_share = 0.15 if shots is None else 0.0
    if shots is None:
        digest = digests(dataset.train)
        chosen, held_out = split_for_calibration(
            dataset.train,
            calibration_share,
            promised,
            seed,
            strict=max_false_alarm is not None,
            known=digest,
        )
    else:
        chosen, held_out = few_shots(dataset, shots, seed), []
        digest = digests(chosen)
    # The split goes by groups and copies, but the feature cache knows a picture by its position.
    chosen.sort(key=lambda sample: (sample.category, sample.id))
    learned = tuple(sorted({sample.category for sample in chosen}))
    ignore_of = read_given(ignore, known, learned)
    augmented = augmentations(chosen_recipe.augment, augment, learned)
    if weights not in ("pretrained", "random"):
        weights = os.path.abspath(weights)  # the run must find them from everywhere
    encoder_config = EncoderConfig(
        chosen_recipe.encoder, chosen_recipe.levels, weights, norm=chosen_recipe.norm
    )
    frozen = FrozenEncoder(encoder_config)
    encoder_config = replace(encoder_config, levels=frozen.levels)
    transform = input_transform(chosen_recipe, frozen, image_size, crop, keep_aspect)
    model = detector_class(detector_config, tiled(frozen, tile), learned, seed=seed)
    if rotate is None:
        rotate = chosen_recipe.detector == "anomalydino" and shots is not None
    angles = ROTATIONS if rotate else (0,)
    config: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe,
        "detector": {"name": chosen_recipe.detector, "settings": asdict(detector_config)},
        "encoder": {"settings": encoder_config.to_json(), "digest": frozen.digest},
        "transform": transform.to_json(),
        "tile": tile,
        "categories": list(learned),
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
    training = None
    if isinstance(model, Learner):
        if rotate or transform.keep_aspect:
            raise InputError(
                f"{chosen_recipe.detector} is trained on upright pictures of one size: "
                "leave out --rotate and --keep-aspect"
            )
        from allgood.learning import default_cache_root, open_training
        from allgood.training.config import TrainConfig
        from allgood.training.runtime import require_joint_norms

        if devices * nodes > 1:
            require_joint_norms(model, choose_device(device))
        training = open_training(
            configured(TrainConfig, chosen_recipe.train, train),
            cache_root=None if no_cache else cache or default_cache_root(),
            device=device,
            devices=devices,
            nodes=nodes,
            tensorboard=tensorboard,
        )
        config["train"] = asdict(training.config) | {"processes": devices * nodes}
        if augmented:
            config["data"]["augment"] = {name: asdict(how) for name, how in augmented.items()}
    elif train or augment or devices * nodes > 1:
        raise InputError(
            f"{chosen_recipe.detector} is not trained, it only reads the pictures once: "
            "leave out --train, --augment, --devices and --nodes"
        )
    where = choose_device(device) if training is None else training.fabric.device
    facts: dict[str, Any] = {
        "command": command_line(fit, arguments),
        "data_fingerprint": fingerprint([*chosen, *held_out], digest),
        # So that they are recognised when they turn up in a test or a calibration.
        "fitted_on": sorted({digest[s.path] for s in chosen if s.path in digest}),
        "device": str(where),
    }

    job = Job(
        model=model.to(where).eval(),
        pictures=Pictures(chosen, transform, ignore_of, augmented),
        held_out=held_out,
        angles=angles,
        batch_size=batch_size,
        seed=seed,
        # Half of the budget: the rest is for the network, the pictures in flight and the choice.
        budget_bytes=int(memory_gb / 2 * 2**30),
        training=training,
        max_false_alarm=promised,
        device=device,
        digests=digest,
        config=config,
        facts=facts,
        started=started,
    )
    make_run(out, job, overwrite)
    return out


def _fit_each(roots: Sequence[str | Path], arguments: Mapping[str, Any]) -> Path:
    """One run per category, in OUT/CATEGORY; those that the same command has finished stay."""
    from allgood.data.augmentation import asked_of, augmentations
    from allgood.fitting.setup import few_shots, read_good, require_same
    from allgood.ignored import read_given
    from allgood.progress import say
    from allgood.runs import CONFIG, command_line, file_name
    from allgood.unfinished import is_unfinished

    asked = dict(arguments)
    out = Path(asked["out"])
    shots, seed = asked["shots"], asked["seed"]
    dataset, known = read_good(
        roots, asked["layout"], asked["categories"], asked["train_share"], seed
    )
    to_learn = dataset.train if shots is None else few_shots(dataset, shots, seed)
    names = sorted({sample.category for sample in to_learn})
    augmentations({}, asked["augment"], names)  # refuses a category that there is not
    to_fit = {}
    for category in names:
        folder = out / file_name(category)
        one = {"per_category": False, "categories": (category,), "out": folder, "resume": False}
        one["augment"] = asked_of(category, asked["augment"])
        if asked["overwrite"] or not (folder / CONFIG).is_file():
            to_fit[category] = asked | one
            continue
        own = [sample for sample in to_learn if sample.category == category]
        masks = read_given(asked["ignore"], known, [category])
        require_same(folder, command_line(fit, asked | one), own, masks)
        say(f"{folder} is finished")
    has_begun = len(to_fit) < len(names) or any(is_unfinished(a["out"]) for a in to_fit.values())
    if asked["resume"] and not (to_fit and has_begun):
        raise InputError(f"'{out}' holds no unfinished fit: leave out --resume")
    for category, its_arguments in to_fit.items():
        say(f"category {category}")
        fit(**its_arguments)
    return out
