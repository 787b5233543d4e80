"""What the data were: a short hash of the pictures' contents, for provenance and for caches."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from allgood.types import InputError, Sample
from allgood.wording import shown

SYNTHESIS_RECORD = "synthesis.json"
"""What `allgood synthesize` writes beside its pictures."""

_UNREADABLE = "unreadable"


def content_digest(path: Path | str) -> str:
    """16 hex digits of the file's bytes (BLAKE2b, 8 bytes).

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    except OSError as error:
        raise InputError(
            f"{shown(path)}: cannot be read ({error.strerror}); check the path and its rights"
        ) from None


def fingerprint(samples: Iterable[Sample], known: Mapping[Path, str] | None = None) -> str:
    """16 hex digits over every sample's category, id, split, defect and the bytes of its files.

    Order does not matter, nor where the data's root lies. A file that cannot be read counts as
    unreadable: one bad picture does not stop a run.

    Args:
        known: what `digests` gave for these or more pictures, so that they are not read again.
    """
    ordered = sorted(samples, key=lambda sample: (sample.category, sample.id))
    whole = hashlib.blake2b(digest_size=8)
    with ThreadPoolExecutor(4) as pool:  # hashing and reading both release the interpreter's lock
        for line in pool.map(partial(_line, known), ordered):
            whole.update(line.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def digests(samples: Iterable[Sample]) -> dict[Path, str]:
    """Picture -> `content_digest`; those that cannot be read are left out."""
    paths = [sample.path for sample in samples]
    with ThreadPoolExecutor(4) as pool:
        found = zip(paths, pool.map(_digest_or_mark, paths), strict=True)
        return {path: digest for path, digest in found if digest != _UNREADABLE}


def source_digests(roots: Iterable[Path | str]) -> dict[str, str]:
    """Absolute path -> `content_digest` of the picture it was made from, of those that
    `allgood synthesize` wrote to these roots or to the folders they lie in.

    Raises:
        InputError: a record that is damaged.
    """
    sources: dict[str, str] = {}
    for root in map(os.path.abspath, roots):
        for folder in (root, os.path.dirname(root)):
            path = os.path.join(folder, SYNTHESIS_RECORD)
            if not os.path.isfile(path):
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    made_from = json.load(file).get("made_from", {}).items()
            except (OSError, ValueError, AttributeError):
                raise InputError(
                    f"{shown(path)}: is no record of allgood synthesize; copy it again or "
                    "move it away"
                ) from None
            sources |= {os.path.join(folder, name): digest for name, digest in made_from}
    return sources


def unseen(
    samples: Iterable[Sample], roots: Iterable[Path | str], seen: Collection[str]
) -> list[Sample]:
    """Those whose file has none of the digests in `seen`, nor has the picture that `allgood
    synthesize` made it from.

    Args:
        roots: where the samples lie.

    Raises:
        InputError: a damaged record of a synthesis.
    """
    samples = list(samples)
    digest, source = digests(samples), source_digests(roots)
    return [
        sample
        for sample in samples
        if digest.get(sample.path) not in seen
        and source.get(os.path.abspath(sample.path)) not in seen
    ]


def _line(known: Mapping[Path, str] | None, sample: Sample) -> str:
    picture = _digest_or_mark(sample.path) if known is None else known.get(sample.path, _UNREADABLE)
    digests = [picture, *(_digest_or_mark(path) for path in sample.mask_paths)]
    return "\0".join([sample.category, sample.id, sample.split, sample.defect, *digests]) + "\n"


def _digest_or_mark(path: Path) -> str:
    try:
        return content_digest(path)
    except InputError:
        return _UNREADABLE
