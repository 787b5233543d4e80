"""Door: a run and good pictures -> thresholds with a promised false-alarm rate."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from allgood.types import Failure, InputError, Sample

if TYPE_CHECKING:
    from allgood.calibration import Calibration
    from allgood.data.readers import Dataset
    from allgood.inference import Inspector


def calibrate(
    run: Path,
    good: list[Path],
    *,
    max_false_alarm: float | None = None,
    category: str | None = None,
    layout: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> Calibration:
    """Set the alarm thresholds of a run from good pictures that it has not been fitted on.

    Args:
        run: folder of a fitted run.
        good: folders or manifests; every good picture in them counts, of every split, but copies
            of one file once. Pictures the run was fitted on are left out: they would make the
            thresholds too low.
        max_false_alarm: share of good pictures that may raise an alarm, of every category of the
            run; 1 / (n + 1) is the least that n pictures can promise. Default: the run's own so
            far, or 0.01.
        category: what the pictures show, where the folder's name does not say. Data of several
            categories say it themselves; those never learned are left out.
        layout: how the pictures lie on disk, where it is not recognised.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.

    Returns:
        the calibration, which also stands in the run's folder from then on. Categories that `good`
        does not show keep their pictures.

    Raises:
        InputError: too few pictures for the rate, no category that was learned, no good pictures,
            the run was replaced by another meanwhile.
    """
    from allgood.data.readers import read_data
    from allgood.inference import Inspector
    from allgood.options import require_at_least
    from allgood.progress import say
    from allgood.runs import CALIBRATION, METRICS, REPORT, require_writable, write_json

    require_at_least(1, batch_size=batch_size)
    if max_false_alarm is not None:
        require_rate(max_false_alarm)
    digest = _digest(run)
    inspector = Inspector(run, device=device)
    old = inspector.calibration
    rate = max_false_alarm or (old.max_false_alarm if old is not None else 0.01)
    roots = [good] if isinstance(good, str | Path) else list(good)
    samples = _learned(read_data(roots, layout=layout), roots, category, inspector)
    _require_enough_kept(old, {sample.category for sample in samples}, rate)
    require_writable(inspector.run, [CALIBRATION])
    scores = _score(inspector, _unseen(samples, inspector, roots), batch_size)
    for failure in scores.failures:
        say(f"left out: {failure.reason}")
    if not scores.image:
        raise InputError(f"none of the good pictures could be read; {scores.failures[0].reason}")
    calibration = _kept(old, scores, rate)
    if _digest(run) != digest:
        raise InputError(f"run '{run}' was replaced by another meanwhile: calibrate it again")
    write_json(inspector.run / CALIBRATION, calibration.to_json())
    if (inspector.run / REPORT).exists():
        say(
            f"{METRICS} and {REPORT} of run '{run}' do not know these thresholds: "
            "`allgood evaluate` writes both anew"
        )
    return calibration


def calibrate_on(
    run: Path, samples: Sequence[Sample], max_false_alarm: float, *, device: str
) -> list[Failure]:
    """Calibrate right after fitting, on pictures kept from it.

    Where too few of a category's pictures could be read, it stays uncalibrated and is named on
    stderr: a long fit does not fail for the sake of a broken picture.

    Returns:
        the pictures that could not be read.
    """
    from allgood.calibration import Calibration, pictures_needed
    from allgood.inference import Inspector
    from allgood.progress import say
    from allgood.runs import CALIBRATION, write_json

    inspector = Inspector(run, device=device)
    scores = _score(inspector, samples, inspector.config["batch_size"])
    needed = pictures_needed(max_false_alarm)
    enough = [name for name, own in scores.image.items() if len(own) >= needed]
    for category in sorted({sample.category for sample in samples}.difference(enough)):
        say(
            f"category '{category}' stays uncalibrated: a false-alarm rate of {max_false_alarm:g} "
            f"needs {needed} good pictures, and {len(scores.image.get(category, []))} of those "
            "kept for it could be read; see `allgood calibrate`"
        )
    if enough:
        calibration = Calibration(
            max_false_alarm,
            {name: scores.image[name] for name in enough},
            {name: scores.map_maximum[name] for name in enough},
            {name: scores.picture[name] for name in enough},
        )
        write_json(run / CALIBRATION, calibration.to_json())
    return scores.failures


def _require_enough_kept(old: Calibration | None, shown: Collection[str], rate: float) -> None:
    """A rate holds for the whole run, so also for categories that are not shown this time."""
    from allgood.calibration import pictures_needed

    needed = pictures_needed(rate)
    for name, scores in old.image_scores.items() if old is not None else ():
        if name not in shown and len(scores) < needed:
            raise InputError(
                f"category '{name}' has {len(scores)} good calibration pictures from before, but a "
                f"false-alarm rate of {rate:g} needs {needed}: give good pictures of it too, or "
                "promise a larger rate with --max-false-alarm"
            )


def _kept(old: Calibration | None, new: _Scores, max_false_alarm: float) -> Calibration:
    """The new scores, and the old ones of categories that were not shown this time."""
    from allgood.calibration import Calibration

    if old is None:
        return Calibration(max_false_alarm, new.image, new.map_maximum, new.picture)
    kept = [name for name in old.image_scores if name not in new.image]
    return Calibration(
        max_false_alarm,
        {**new.image, **{name: old.image_scores[name] for name in kept}},
        {**new.map_maximum, **{name: old.map_maxima[name] for name in kept}},
        {**new.picture, **{name: old.pictures[name] for name in kept}},
    )


@dataclass
class _Scores:
    """Of good pictures, by category."""

    image: dict[str, list[float]] = field(default_factory=dict)
    map_maximum: dict[str, list[float]] = field(default_factory=dict)
    picture: dict[str, list[str]] = field(default_factory=dict)
    """Digests of the files."""
    failures: list[Failure] = field(default_factory=list)


def _score(inspector: Inspector, samples: Sequence[Sample], batch_size: int) -> _Scores:
    from allgood.data.fingerprint import digests
    from allgood.progress import bar

    digest = digests(samples)
    # A copy tells nothing new: counted twice, few pictures would seem to promise a small rate.
    different = {(s.category, digest.get(s.path, s.path)): s for s in samples}
    samples = list(different.values())
    scores = _Scores()
    done = 0
    with bar("calibrating on good pictures", len(samples)) as progress:
        for batch, prediction in inspector.predict(
            samples, failures=scores.failures, batch_size=batch_size
        ):
            highest = prediction.anomaly_map.flatten(1).amax(dim=1)
            for i, sample in enumerate(batch.sample):
                name = sample.category
                scores.image.setdefault(name, []).append(float(prediction.image_score[i]))
                scores.map_maximum.setdefault(name, []).append(float(highest[i]))
                scores.picture.setdefault(name, []).append(digest[sample.path])
            done += len(batch.sample)
            progress.at(done + len(scores.failures))
    return scores


def _unseen(
    samples: Sequence[Sample], inspector: Inspector, roots: Sequence[str | Path]
) -> list[Sample]:
    """Those that the run was not fitted on."""
    from allgood.data.fingerprint import unseen
    from allgood.progress import say
    from allgood.runs import PROVENANCE, read_json

    fresh = unseen(samples, roots, set(read_json(inspector.run / PROVENANCE)["fitted_on"]))
    if not fresh:
        raise InputError(
            f"{', '.join(map(str, roots))}: the run was fitted on all of these pictures; "
            "calibration needs good pictures that it has not seen"
        )
    if len(fresh) < len(samples):
        say(f"{len(samples) - len(fresh)} pictures left out: the run was fitted on them")
    return fresh


def split_for_calibration(
    samples: Sequence[Sample],
    share: float,
    max_false_alarm: float,
    seed: int,
    *,
    strict: bool,
    known: Mapping[Path, str] | None = None,
) -> tuple[list[Sample], list[Sample]]:
    """Good pictures for fitting, and those kept from it for the thresholds.

    Per category the first of a seeded order of groups (or pictures), until `share` of the pictures
    and enough for the promised rate are held out. Identical files stand on one side and count once.
    A category that would give up more than half of its pictures keeps them all, stays uncalibrated,
    and is named on stderr.

    Args:
        known: what `digests` gave for these or more pictures, so that they are not read again.

    Raises:
        InputError: with `strict`, where a category would stay uncalibrated.
    """
    from allgood.calibration import pictures_needed
    from allgood.data.fingerprint import digests
    from allgood.progress import say

    if not 0 <= share < 1:
        raise InputError(f"calibration_share must be at least 0 and below 1, got {share:g}")
    require_rate(max_false_alarm)
    if share == 0:
        return list(samples), []
    fitting: list[Sample] = []
    held_out: list[Sample] = []
    needed = pictures_needed(max_false_alarm)
    digest = digests(samples) if known is None else known
    num_copies = 0
    for category in sorted({sample.category for sample in samples}):
        own = [sample for sample in samples if sample.category == category]
        groups = _groups(own, digest)
        size = {name: _num_different(members, digest) for name, members in groups.items()}
        num_different = sum(size.values())
        num_copies += len(own) - num_different
        wanted = max(needed, round(share * num_different))
        held: set[str] = set()
        taken = 0
        for group in sorted(groups, key=lambda name: _order(name, seed)):
            if taken >= wanted:
                break
            held.add(group)
            taken += size[group]
        if taken < wanted or taken > num_different / 2:
            reason = (
                f"a false-alarm rate of {max_false_alarm:g} keeps {max(wanted, taken)} good "
                f"pictures of category '{category}' from fitting, more than half of its "
                f"{num_different}: give more pictures, promise a larger rate with "
                "--max-false-alarm, or fit with --calibration-share 0 and see `allgood calibrate`"
            )
            if strict:
                raise InputError(reason)
            say(f"'{category}' stays uncalibrated: {reason}")
            held = set()
        for name, members in groups.items():
            (held_out if name in held else fitting).extend(members)
    if num_copies:
        say(
            f"{num_copies} of the {len(samples)} good pictures are copies of others: none is kept "
            "for the thresholds while its copy is fitted"
        )
    return fitting, held_out


def _groups(samples: Sequence[Sample], digest: Mapping[Path, str]) -> dict[str, list[Sample]]:
    """Name -> pictures that stand on one side: those of a group, and of groups that share a file.

    Groups that are joined go by the first of their names.
    """
    joined: dict[str, str] = {}
    """Group -> a group it is joined with, of a name before its own; or itself."""

    def first(name: str) -> str:
        while joined[name] != name:
            name = joined[name]
        return name

    owner: dict[str, str] = {}
    for sample in samples:
        name = sample.group or sample.id
        joined.setdefault(name, name)
        if sample.path in digest:
            one, other = first(name), first(owner.setdefault(digest[sample.path], name))
            joined[max(one, other)] = min(one, other)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(first(sample.group or sample.id), []).append(sample)
    return groups


def _num_different(samples: Sequence[Sample], digest: Mapping[Path, str]) -> int:
    """How many files there are if copies count once; one that cannot be read is like no other."""
    return len({digest.get(sample.path, sample.path) for sample in samples})


def require_rate(max_false_alarm: float) -> None:
    """InputError where this is no share of pictures."""
    if not 0 < max_false_alarm < 1:
        raise InputError(f"max_false_alarm must lie between 0 and 1, got {max_false_alarm:g}")


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"calibration:{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def _learned(
    dataset: Dataset, roots: Sequence[str | Path], category: str | None, inspector: Inspector
) -> list[Sample]:
    """The good pictures of categories that the run has learned, under their names.

    One folder may be called anything, and a run of one category knows what it shows.
    """
    from allgood.progress import say

    where = ", ".join(map(str, roots))
    good = [sample for sample in dataset.samples if sample.is_good]
    if not good:
        raise InputError(f"{where}: no good pictures to calibrate on")
    learned = inspector.categories
    if category is None and len(learned) == len(dataset.categories) == 1:
        category = learned[0]
    if category is not None:
        inspector.index_of(category)
        # No two roots hold the same category, so one of these holds several.
        if len(dataset.categories) > len(roots):
            raise InputError(
                f"{where}: the data hold several categories ({', '.join(dataset.categories)}): "
                f"leave out --category, or give the pictures of '{category}' alone"
            )
        return [replace(sample, category=category) for sample in good]
    kept = [sample for sample in good if sample.category in learned]
    others = sorted({sample.category for sample in good}.difference(learned))
    if not kept:
        raise InputError(
            f"category '{others[0]}' was never learned by run '{inspector.run}': where all "
            f"pictures show the same, name one of {', '.join(learned)} with --category"
        )
    if others:
        say(f"categories left out, as the run has not learned them: {', '.join(others)}")
    return kept


def _digest(run: Path) -> list[str]:
    """Of what decides a run's scores; without config.json another run is being moved in."""
    from allgood.data.fingerprint import content_digest
    from allgood.runs import CONFIG, MODEL, MODEL_DATA, WEIGHTS

    paths = [Path(run, name) for name in (CONFIG, WEIGHTS, MODEL, MODEL_DATA)]
    return [content_digest(path) for path in paths if path.is_file()]
