"""Good pictures -> those that are fitted on, and those kept from it for the thresholds."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from allgood.calibration import pictures_needed, require_rate
from allgood.data.fingerprint import digests
from allgood.progress import say
from allgood.types import InputError, Sample


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


def _order(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"calibration:{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
