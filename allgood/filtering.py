"""Door: a fitted run and its good pictures -> a run with a CostFilter behind the same detector.

good pictures -> synthetic anomalies -> the frozen host's match, once per drawing -> the training
loop -> calibrated on pictures that neither has learned -> published
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allgood.types import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from allgood.costfilter.filtered import FilterConfig, FilteredDetector
    from allgood.data.synthesis import SynthesisConfig
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
"""Of a `small` filter; the paper's, and presets of what was published: docs/costfilter.md."""
MASK_SIDE = 128
"""Side of the masks that the filter learns from."""


def filter(
    run: Path,
    data: list[Path],
    *,
    out: Path = Path("filtered"),
    settings: tuple[str, ...] = (),
    synthesis: tuple[str, ...] = (),
    train: tuple[str, ...] = (),
    draws: int = 6,
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
    never compared with its own patches in a memory bank.

    Args:
        run: folder of a fitted run.
        data: the good pictures, as they were given to `allgood fit`.
        out: folder of the new run.
        settings: of the filter, as name=value, e.g. fusion=0.3 size=full.
        synthesis: of the anomalies, as name=value.
        train: of the training, as name=value, e.g. steps=3000.
        draws: synthetic versions of each picture.
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
    from allgood.costfilter.filtered import FilterConfig, FilteredDetector
    from allgood.data.fingerprint import fingerprint
    from allgood.data.synthesis import SynthesisConfig
    from allgood.inference import Inspector, require_at_least
    from allgood.learning import default_cache_root, open_training
    from allgood.progress import say
    from allgood.recipes import configured
    from allgood.runs import PROVENANCE, command_line, finish, is_finished, read_json
    from allgood.training.config import TrainConfig
    from allgood.unfinished import making, refuse_folder

    out = Path(out)
    require_at_least(1, batch_size=batch_size, draws=draws)
    refuse_folder(out, overwrite)
    config = configured(FilterConfig, {}, settings)
    train_config = configured(TrainConfig, TRAIN, train)
    synthesis_config = configured(SynthesisConfig, {}, synthesis)
    inspector = Inspector(run, device=device)
    if "filter" in inspector.config:
        raise InputError(f"run '{run}' has a filter already: give the run behind it")
    if inspector.transform.keep_aspect:
        raise InputError(
            f"run '{run}' reads pictures of many sizes, and a filter learns one: fit it with "
            "--keep-aspect False"
        )
    known = set(read_json(inspector.run / PROVENANCE)["fitted_on"])
    learned, fresh, digest = _good_pictures(inspector, data, layout, known)
    templates, taught = _kept_templates(learned, config, seed)
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
    drawing = _Drawing(taught, draws, inspector, synthesis_config, seed)
    channels, grid = _shape_of_match(inspector, taught)
    model = FilteredDetector(config, inspector.detector, channels, grid, seed)
    if templates:
        model.keep_templates(_template_features(inspector, templates, config.num_templates))
    wanted = {
        "settings": asdict(config),
        "channels": list(channels),
        "grid": list(grid),
        "seed": seed,
        "synthesis": asdict(synthesis_config) | {"foreground": drawing.foreground},
        "draws": draws,
        "train": asdict(train_config),
        "pictures": len(taught),
    }
    key = {
        "host": _digest(inspector.run),
        "pictures": fingerprint(taught, digest),
        "synthesis": wanted["synthesis"],
        "draws": draws,
        "seed": seed,
        "encoding": model.encoding,
        "mask": MASK_SIDE,
    }
    request = {"filter": wanted, "key": key, "max_false_alarm": max_false_alarm}
    with making(out, request, overwrite) as state:
        new = state / "run"
        if not is_finished(new):
            failures = _train(model, drawing, training, state / "training", key, batch_size, seed)
            facts = {
                "command": command_line(filter, arguments),
                "host": str(run),
                "data_fingerprint": fingerprint([*learned, *fresh], digest),
                "fitted_on": sorted(known),
                "device": str(training.fabric.device),
                "unreadable": [[str(f.path), f.reason] for f in failures],
                "seconds": round(time.monotonic() - started, 1),
            }
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            _write_run(new, model, inspector, wanted, facts, state / "training")
            _calibrate(new, fresh, max_false_alarm, device)
            finish(new)
    say(f"a filter behind {run}, from {len(taught)} good pictures, in {out}")
    return out


class _Drawing:
    """Good pictures, each in so many drawings: some as they are, some with painted anomalies."""

    def __init__(
        self,
        samples: Sequence[Sample],
        draws: int,
        inspector: Inspector,
        config: SynthesisConfig,
        seed: int,
    ) -> None:
        from allgood.data.foreground import choose_foreground
        from allgood.data.synthesis import Synthesizer

        self.samples, self.draws, self.inspector = samples, draws, inspector
        self.foreground = {
            name: choose_foreground(_some_pictures(samples, name)) for name in inspector.categories
        }
        self.synthesizer = Synthesizer(config, seed=seed, foreground=self.foreground)

    def __len__(self) -> int:
        return self.draws * len(self.samples)

    def category(self) -> Tensor:
        """(draws * samples,) int64; drawing by drawing, all pictures of one after each other."""
        import torch

        index = [self.inspector.index_of(sample.category) for sample in self.samples]
        return torch.tensor(index).repeat(self.draws)

    def read(self, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], list[int], list[Failure]]:
        """Drawings -> what `FilteredDetector.encode` takes; see `OnlineFeatures`."""
        import torch

        from allgood.ignored import hide, to_inputs
        from allgood.layers.patch_store import image_number
        from allgood.types import Failure

        images, masks, numbers, readable = [], [], [], []
        failures: list[Failure] = []
        sizes, names = [], []
        for index in indices:
            draw, place = divmod(index, len(self.samples))
            sample = self.samples[place]
            try:
                picture, size = self._read_resized(sample)
            except InputError as error:
                failures.append(Failure(sample.path, str(error)))
                continue
            drawn = self.synthesizer.draw(
                picture, category=sample.category, picture=sample.id, index=draw
            )
            images.append(torch.from_numpy(drawn.image).permute(2, 0, 1))
            masks.append(torch.from_numpy(drawn.mask))
            numbers.append(image_number(sample.id))
            names.append(sample.category)
            sizes.append(size)
            readable.append(index)
        if not readable:
            return (), [], failures
        image = torch.stack(images).float() / 255
        mask = torch.stack(masks)[:, None]
        if self.inspector.ignore:
            ignore = to_inputs(self.inspector.ignore, names, sizes, self.inspector.transform)
            image, mask = hide(image, ignore), mask & ~ignore
        category = torch.tensor([self.inspector.index_of(name) for name in names])
        return (image, _shrunk(mask), category, torch.tensor(numbers)), readable, failures

    def _read_resized(self, sample: Sample) -> tuple[np.ndarray, tuple[int, int]]:
        import numpy as np

        from allgood.data.images import read_image

        picture = read_image(sample.path)
        resized = self.inspector.transform.resize(picture).permute(1, 2, 0).numpy()
        return np.ascontiguousarray(resized), (picture.shape[0], picture.shape[1])


def _shrunk(mask: Tensor) -> Tensor:
    """(B, 1, H, W) bool -> (B, 1, MASK_SIDE, MASK_SIDE): pixels of which a third is painted, so
    that thin lines stay."""
    import torch.nn.functional as F

    return F.interpolate(mask.float(), (MASK_SIDE, MASK_SIDE), mode="area") > 0.3


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


def _template_features(inspector: Inspector, samples: Sequence[Sample], count: int) -> list[Tensor]:
    """L x (K, N, C, h, w): the query features of the pictures kept as templates."""
    import torch

    drawing = [inspector.transform(_picture(sample)) for sample in samples]
    category = torch.tensor([inspector.index_of(sample.category) for sample in samples])
    device = inspector.device
    with torch.inference_mode():
        match = inspector.detector.match(torch.stack(drawing).to(device), category.to(device))
    return [level.unflatten(0, (-1, count)) for level in match.query]


def _picture(sample: Sample) -> np.ndarray:
    from allgood.data.images import read_image

    return read_image(sample.path)


def _shape_of_match(
    inspector: Inspector, samples: Sequence[Sample]
) -> tuple[list[int], tuple[int, int]]:
    """Channels of each level of the host's matches, and the grid of the first."""
    import torch

    height, width = inspector.transform.input_size(*_picture(samples[0]).shape[:2])
    image = torch.zeros(1, 3, height, width, device=inspector.device)
    category = torch.zeros(1, dtype=torch.int64, device=inspector.device)
    with torch.inference_mode():
        query = inspector.detector.match(image, category).query
    return [level.shape[1] for level in query], (query[0].shape[-2], query[0].shape[-1])


def _train(
    model: FilteredDetector,
    drawing: _Drawing,
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
    online = OnlineFeatures(drawing.read, model.encode, drawing.category(), fabric.device)
    source = cached(online, training, key, batch_size) or online
    train(model, source, training.config, fabric=fabric, folder=folder, seed=seed)
    return list({failure.path: failure for failure in source.failures.values()}.values())


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
