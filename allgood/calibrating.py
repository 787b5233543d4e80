"""Door: a run and good pictures -> thresholds with a promised false-alarm rate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allgood.types import InputError, Sample

if TYPE_CHECKING:
    from allgood.calibration import Calibration
    from allgood.inference import Inspector


def calibrate(
    run: Path,
    good: list[Path],
    *,
    max_false_alarm: float = 0.01,
    category: str | None = None,
    layout: str | None = None,
    device: str = "auto",
) -> Calibration:
    """Set the alarm thresholds of a run from good pictures that it has not been fitted on.

    Args:
        run: folder of a fitted run.
        good: folders or manifests; every good picture in them counts, of every split. Pictures the
            run
            was fitted on are left out: they would make the thresholds too low.
        max_false_alarm: share of good pictures that may raise an alarm; n pictures allow 1 / (n +
            1). category: what the pictures show, where the folder's name does not say. layout: how
            the pictures lie on disk, where it is not recognised. device: auto, cpu or cuda.

    Returns:
        the calibration, which also stands in the run's folder from then on. Categories that `good`
        does not show keep theirs.

    Raises:
        InputError: too few pictures for the rate, a category never learned, no good pictures.
    """
    from allgood.data.fingerprint import digests
    from allgood.data.readers import read_data
    from allgood.inference import Inspector
    from allgood.progress import say
    from allgood.runs import PROVENANCE, read_json

    inspector = Inspector(run, device=device)
    roots = [good] if isinstance(good, str | Path) else list(good)
    samples = [sample for sample in read_data(roots, layout=layout).samples if sample.is_good]
    if not samples:
        raise InputError(f"{', '.join(map(str, roots))}: no good pictures to calibrate on")
    samples = [_with_category(sample, category, inspector) for sample in samples]
    known = set(read_json(Path(run) / PROVENANCE)["fitted_on"])
    digest = digests(samples)
    fresh = [sample for sample in samples if digest.get(sample.path) not in known]
    if len(fresh) < len(samples):
        say(f"{len(samples) - len(fresh)} pictures left out: the run was fitted on them")
    if not fresh:
        raise InputError(
            f"{', '.join(map(str, roots))}: the run was fitted on all of these pictures; "
            "calibration needs good pictures that it has not seen"
        )
    return _calibrate(inspector, fresh, max_false_alarm)


def calibrate_on(
    run: Path, samples: Sequence[Sample], max_false_alarm: float, *, device: str
) -> Calibration:
    """Calibrate on pictures already known to be good and unseen, right after fitting."""
    from allgood.inference import Inspector

    return _calibrate(Inspector(run, device=device), samples, max_false_alarm)


def _calibrate(
    inspector: Inspector, samples: Sequence[Sample], max_false_alarm: float
) -> Calibration:
    from allgood.calibration import Calibration
    from allgood.progress import bar, say
    from allgood.runs import CALIBRATION, write_json
    from allgood.types import Failure

    failures: list[Failure] = []
    scores: dict[str, list[float]] = {}
    maxima: dict[str, list[float]] = {}
    done = 0
    with bar("calibrating on good pictures", len(samples)) as progress:
        for batch, prediction in inspector.predict(samples, failures=failures):
            highest = prediction.anomaly_map.flatten(1).amax(dim=1)
            for i, sample in enumerate(batch.sample):
                scores.setdefault(sample.category, []).append(float(prediction.image_score[i]))
                maxima.setdefault(sample.category, []).append(float(highest[i]))
            done += len(batch.sample)
            progress.at(done)
    for failure in failures:
        say(f"left out: {failure.reason}")
    old = inspector.calibration
    if old is not None:  # categories that were not shown this time keep their scores
        for category in old.image_scores:
            if category not in scores:
                scores[category] = list(old.image_scores[category])
                maxima[category] = list(old.map_maxima[category])
    calibration = Calibration(max_false_alarm, scores, maxima)
    write_json(inspector.run / CALIBRATION, calibration.to_json())
    return calibration


def split_for_calibration(
    samples: Sequence[Sample], share: float, max_false_alarm: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Good pictures for fitting, and those kept from it for the thresholds.

    Per category the first of a seeded order of groups (or pictures), until `share` of the pictures
    and enough for the promised rate are held out. A category that would give up more than half of
    its pictures keeps them all, stays uncalibrated, and is named on stderr.
    """
    from allgood.calibration import pictures_needed
    from allgood.progress import say

    if not 0 <= share < 1:
        raise InputError(f"calibration_share must be at least 0 and below 1, got {share:g}")
    if not 0 < max_false_alarm < 1:
        raise InputError(f"max_false_alarm must lie between 0 and 1, got {max_false_alarm:g}")
    if share == 0:
        return list(samples), []
    fitting: list[Sample] = []
    held_out: list[Sample] = []
    needed = pictures_needed(max_false_alarm)
    for category in sorted({sample.category for sample in samples}):
        own = [sample for sample in samples if sample.category == category]
        wanted = max(needed, round(share * len(own)))
        groups: dict[str, list[Sample]] = {}
        for sample in own:
            groups.setdefault(sample.group or sample.id, []).append(sample)
        held: set[str] = set()
        taken = 0
        for group in sorted(groups, key=lambda name: _order(name, seed)):
            if taken >= wanted:
                break
            held.add(group)
            taken += len(groups[group])
        if taken < wanted or taken > len(own) / 2:
            say(
                f"category '{category}' stays uncalibrated: a false-alarm rate of "
                f"{max_false_alarm:g} takes {wanted} of its {len(own)} good pictures; "
                "see `allgood calibrate`"
            )
            held = set()
        for name, members in groups.items():
            (held_out if name in held else fitting).extend(members)
    return fitting, held_out


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"calibration:{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _with_category(sample: Sample, category: str | None, inspector: Inspector) -> Sample:
    from dataclasses import replace

    if category is None and len(inspector.categories) == 1:
        category = inspector.categories[0]
    name = category or sample.category
    if name not in inspector.categories and category is None:
        raise InputError(
            f"category '{name}' was never learned by run '{inspector.run}': name one of "
            f"{', '.join(inspector.categories)} with --category"
        )
    inspector.index_of(name)
    return replace(sample, category=name)
