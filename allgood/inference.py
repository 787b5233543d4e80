"""Door: a run's folder and pictures -> judgements. The command line, the server and Python users
all send their pictures this way.

read (threads) -> transform -> detector.predict -> calibration -> scores, and boxes in the
picture's own pixels
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from allgood.calibration import Calibration
from allgood.data.batches import MaskSize, load_batches
from allgood.data.files import pictures_below
from allgood.data.images import read_image
from allgood.data.transforms import Transform
from allgood.exported import ExportedDetector
from allgood.ignored import hide, read_masks, to_inputs
from allgood.inspection import Inspection, Region, find_regions
from allgood.options import choose_device, require_at_least
from allgood.own_state import load_own_state
from allgood.runs import (
    CALIBRATION,
    CONFIG,
    ENCODER,
    MODEL,
    WEIGHTS,
    read_config,
    read_json,
    read_weights,
)
from allgood.types import GOOD, Batch, Failure, InputError, Prediction, Sample
from allgood.wording import shown, unknown


class Inspector:
    """A fitted run, ready to judge pictures.

    Attributes:
        categories: what it learned.
        calibration: thresholds, or None before calibration.
        is_exported: whether a graph judges, see `allgood.export`.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        device: str = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Load a run.

        Args:
            run: folder written by `allgood.fit`.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
            precision: of the network's matrix products. bf16 is faster where the processor knows
                it, and moves scores a little; distances and thresholds stay fp32.

        Raises:
            InputError: no such run, unfinished, damaged, or of another version.
        """
        self.run = Path(run)
        self.config = read_config(self.run)
        self.is_exported = "exported" in self.config
        if self.is_exported and (device not in ("auto", "cpu") or precision != "fp32"):
            raise InputError(
                f"run '{self.run}' is exported, so it judges on the CPU in fp32: leave out "
                "--device and --precision"
            )
        self.device = choose_device("cpu" if self.is_exported else device)
        self.precision = precision
        try:
            self._build()
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.run / CONFIG} is damaged ({type(error).__name__}: {error}): "
                "fit the run again"
            ) from error
        if not self.is_exported:
            load_weights(self.detector, self.run / WEIGHTS)
            self.detector.to(self.device).eval()
            if precision == "bf16":
                round_weights(self.detector)
        self.ignore = read_masks(self.run, self.categories)
        masks = list(self.ignore.values())
        self._same_ignore = len(masks) == len(self.categories) and all(
            np.array_equal(mask, masks[0]) for mask in masks
        )
        self.calibration = _read_calibration(self.run / CALIBRATION)

    def _build(self) -> None:
        """Encoder, transform and detector as config.json says, still without weights."""
        config = self.config
        self.categories: tuple[str, ...] = tuple(config["categories"])
        self.transform = Transform.from_json(config["transform"])
        self.detector: Any
        if self.is_exported:
            self.detector = ExportedDetector(
                self.run / MODEL, infers_category=config["exported"]["infers_category"]
            )
            return
        # Only here: an exported run starts without timm.
        from allgood.costfilter.config import FilterConfig
        from allgood.costfilter.filtered import FilteredDetector
        from allgood.detectors import detector_classes
        from allgood.encoders.frozen import EncoderConfig, FrozenEncoder
        from allgood.encoders.tiled import tiled

        encoder_config = EncoderConfig.from_json(config["encoder"]["settings"])
        if encoder_config.weights == ENCODER:  # a converted run brings its encoder along
            encoder_config = replace(encoder_config, weights=str(self.run / ENCODER))
        encoder = FrozenEncoder(encoder_config)
        if encoder.digest != config["encoder"]["digest"]:
            raise InputError(
                f"run '{self.run}' was fitted with other weights of '{encoder.config.name}' than "
                "are installed here: install the same weights, or fit it again"
            )
        config_class, detector_class = detector_classes(config["detector"]["name"])
        self.detector = detector_class(
            config_class(**config["detector"]["settings"]),
            tiled(encoder, config["tile"]),
            self.categories,
            seed=config["seed"],
        )
        if "filter" in config:
            behind = config["filter"]
            self.detector = FilteredDetector(
                FilterConfig(**behind["settings"]),
                self.detector,
                behind["channels"],
                tuple(behind["grid"]),
                behind["seed"],
            )

    def inspect(
        self,
        pictures: Iterable[str | Path] | str | Path,
        *,
        category: str | None = None,
        batch_size: int = 8,
    ) -> Iterator[Inspection]:
        """Judge pictures, reading ahead while the network works.

        Args:
            pictures: files, and folders that stand for all pictures below them.
            category: what they show; None: inferred per picture.
            batch_size: pictures of equal size that pass the network together.

        Yields:
            one Inspection per picture, in order; those that could not be read come last, with
            `error`.

        Raises:
            InputError: the category was never learned, a folder holds no picture.
        """
        require_at_least(1, batch_size=batch_size)
        if category is not None:
            self.index_of(category)
        samples = [
            Sample(Path(path), category or "", "test", GOOD, id=f"{i:09d}")
            for i, path in enumerate(picture_files(pictures))
        ]
        failures: list[Failure] = []
        for batch, prediction in self.predict(
            samples, failures=failures, batch_size=batch_size, known_category=category is not None
        ):
            for i in range(len(batch.sample)):
                yield self._judge(batch, prediction, i, inferred=category is None)
        for failure in failures:
            yield Inspection(path=failure.path, error=failure.reason)

    def predict(
        self,
        samples: Sequence[Sample],
        *,
        failures: list[Failure],
        batch_size: int = 8,
        mask_size: MaskSize | None = None,
        known_category: bool = True,
        parts: bool = False,
    ) -> Iterator[tuple[Batch, Prediction]]:
        """The detector's word on each batch of samples, on the CPU.

        Args:
            failures: one entry is appended per picture that could not be read.
            mask_size: of the masks in the batches, see `load_batches`; with `own` or a size, maps
                come in that size and over the whole picture too, see `map_beside_mask`.
            known_category: judge each sample as its own category; otherwise infer it.
            parts: of a run with a CostFilter, what it is made of too, see `predict_parts` there.
        """
        batches = load_batches(
            samples, self.transform, failures=failures, batch_size=batch_size, mask_size=mask_size
        )
        for batch in batches:
            category = (
                torch.tensor([self.index_of(sample.category) for sample in batch.sample])
                if known_category
                else None
            )
            own_size = batch.original_size[0] if mask_size == "own" else None
            # A detector's map shows what the crop left, so it cannot have the picture's own size.
            map_size = own_size if self.transform.center_crop is None else None
            prediction = self.predict_batch(batch, category, map_size, parts=parts)
            size = own_size or mask_size
            if isinstance(size, tuple):
                maps = [
                    self.transform.map_beside_mask(one, original_size, size)
                    for one, original_size in zip(
                        prediction.anomaly_map, batch.original_size, strict=True
                    )
                ]
                prediction = replace(prediction, anomaly_map=torch.stack(maps))
            yield batch, prediction

    @torch.inference_mode()
    def predict_batch(
        self,
        batch: Batch,
        category: Tensor | None,
        map_size: tuple[int, int] | None = None,
        *,
        parts: bool = False,
    ) -> Prediction:
        """As `Detector.predict`, on our device and with the run's ignored regions.

        The answer is on the CPU.

        Raises:
            InputError: the scores or the map of a picture are not finite.
        """
        image = batch.image.to(self.device)
        ignore = None
        if self.ignore:
            ignored_as = category
            if ignored_as is None and self._same_ignore:
                ignored_as = torch.zeros(len(image), dtype=torch.int64)
            elif ignored_as is None:  # the regions depend on the category: infer it first
                nothing = torch.zeros_like(image[:, :1], dtype=torch.bool)  # a graph asks for it
                ignored_as = category = self.detector.predict(image, ignore=nothing).category
            names = [self.categories[index] for index in ignored_as.tolist()]
            masks = to_inputs(self.ignore, names, batch.original_size, self.transform)
            ignore = masks.to(self.device)
            image = hide(image, ignore)
        bf16 = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )
        predict = self.detector.predict_parts if parts else self.detector.predict
        with bf16:
            prediction = predict(
                image,
                None if category is None else category.to(self.device),
                ignore=ignore,
                map_size=map_size,
            )
        prediction = Prediction(
            prediction.anomaly_map.float().cpu(),
            prediction.image_score.float().cpu(),
            prediction.category.cpu(),
        )
        for numbers in (prediction.image_score, prediction.anomaly_map):
            finite = numbers.reshape(len(numbers), -1).isfinite().all(dim=1)
            if not finite.all():
                path = batch.sample[int(finite.int().argmin())].path
                raise InputError(
                    f"run '{self.run}' gives picture {shown(path)} a score that is not a finite "
                    "number: its weights are damaged, fit it again"
                )
        return prediction

    def require_fitted(self, command: str) -> None:
        """Raises InputError for an exported run, which cannot learn, nor be made anything of."""
        if self.is_exported:
            raise InputError(
                f"run '{self.run}' is exported: give `{command}` the run that it was made of"
            )

    def index_of(self, category: str) -> int:
        """Raises InputError where the category was never learned."""
        if category not in self.categories:
            problem = f"category '{category}' was never learned by run '{self.run}'"
            known = ", ".join(self.categories)
            raise unknown(problem, category, self.categories, f"it knows: {known}")
        return self.categories.index(category)

    @torch.inference_mode()
    def query_features(
        self, samples: Sequence[Sample], *, batch_size: int = 8
    ) -> Iterator[list[Tensor]]:
        """What the detector compares of pictures whose category is known.

        Yields:
            L levels (B, C, h, w) of each batch, in order.

        Raises:
            InputError: a picture that cannot be read.
        """
        for begin in range(0, len(samples), batch_size):
            batch = samples[begin : begin + batch_size]
            image = torch.stack([self.transform(read_image(sample.path)) for sample in batch])
            category = torch.tensor([self.index_of(sample.category) for sample in batch])
            yield self.detector.match(image.to(self.device), category.to(self.device)).query

    def _judge(self, batch: Batch, prediction: Prediction, i: int, *, inferred: bool) -> Inspection:
        category = self.categories[int(prediction.category[i])]
        score = float(prediction.image_score[i])
        input_map = prediction.anomaly_map[i, 0]
        size = batch.original_size[i]
        p_value = map_threshold = is_anomalous = None
        regions: tuple[Region, ...] = ()
        if self.calibration is not None and self.calibration.knows(category):
            p_value = self.calibration.p_value(category, score)
            is_anomalous = self.calibration.is_anomalous(category, score)
            map_threshold = self.calibration.map_threshold(category)
            if is_anomalous:
                regions = find_regions(input_map, map_threshold, self.transform, size)
        return Inspection(
            path=batch.sample[i].path,
            category=category,
            category_inferred=inferred and len(self.categories) > 1,
            image_score=score,
            p_value=p_value,
            is_anomalous=is_anomalous,
            regions=regions,
            input_map=input_map,
            map_threshold=map_threshold,
            original_size=size,
            transform=self.transform,
        )


def picture_files(paths: Iterable[str | Path] | str | Path) -> Iterator[Path]:
    """Files as they are, folders as the pictures below them.

    A path that names neither is passed on, and so becomes a picture that cannot be read.

    Raises:
        InputError: a folder holds no picture.
    """
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if not path.is_dir():
            yield path
            continue
        found = pictures_below(path)
        if not found:
            raise InputError(f"{shown(path)}: holds no picture; name another folder")
        yield from found


def load_weights(detector: torch.nn.Module, path: Path) -> None:
    """Fill a detector's own parameters and buffers.

    Raises:
        InputError: the file is missing, torn, or holds the weights of another detector.
    """
    state = read_weights(path)
    try:
        load_own_state(detector, state)
    except ValueError as error:
        raise InputError(
            f"{path} holds the weights of another detector ({error}): fit the run again"
        ) from error


def round_weights(detector: torch.nn.Module) -> None:
    """Linear layers to bf16, once, as autocast would round their weights for every batch."""
    for module in detector.modules():
        if isinstance(module, torch.nn.Linear):
            module.bfloat16()


def _read_calibration(path: Path) -> Calibration | None:
    if not path.is_file():
        return None
    remedy = "remove it and run `allgood calibrate`"
    data = read_json(path, remedy=remedy)
    try:
        return Calibration.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {remedy}") from error
