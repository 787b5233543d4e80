"""The seeded split for data without one: stable, order-free, the same on every machine."""

import hashlib
from typing import Literal

from allgood.types import InputError


def in_holdout(id: str, share: float, seed: int) -> bool:
    """Whether a picture (or its group) is held out.

    u = first 8 bytes of SHA-256("seed:id") / 2^64;  held out if u < share

    Adding files moves no other file, and a larger share only adds pictures to a smaller one.
    """
    # A file name that is no UTF-8 carries surrogates; they hash to the bytes they stand for.
    digest = hashlib.sha256(f"{seed}:{id}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def good_split(id: str, group: str, *, train_share: float, seed: int) -> Literal["train", "test"]:
    """The side of a good picture. Pictures of one group stand together, decided by its name.

    Raises:
        InputError: train_share is not in (0, 1].
    """
    if not 0 < train_share <= 1:
        raise InputError(f"train_share must be above 0 and at most 1, got {train_share}")
    return "test" if in_holdout(group or id, 1 - train_share, seed) else "train"
