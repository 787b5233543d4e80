"""Sources: the order of the pictures, reading ahead, and the feature cache on disk."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_toy import COUNT, Toy, source

from allgood.training import feature_cache
from allgood.training.feature_cache import CachedFeatures, cache_bytes, room_for
from allgood.training.sources import Views, batch_order, read_ahead
from allgood.types import Failure, InputError, TrainingBatch

KEY = {"data": "toy", "levels": (1, 2)}


class Counting:
    """The toy's encoder, scaled; counts its pictures and may stop."""

    def __init__(self, scale: float = 1, stop_after: int | None = None) -> None:
        self.encode = Toy().encode
        self.scale = scale
        self.stop_after = stop_after
        self.pictures = 0

    def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.stop_after is not None and self.pictures >= self.stop_after:
            raise KeyboardInterrupt
        self.pictures += len(image)
        return tuple(feature * self.scale for feature in self.encode(image))


def opened(root: Path, encode: Callable[[Tensor], Any] | None = None, **kwargs: Any) -> Any:
    """A cache in blocks of 4 pictures, made 2 at a time."""
    return CachedFeatures(root, KEY, source(encode, **kwargs), block=4, batch_size=2)


def files(root: Path) -> dict[str, bytes]:
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batch(of: Any, indices: Iterable[int]) -> TrainingBatch:
    (found,) = of.batches([list(indices)])
    return found


# -- order ---------------------------------------------------------------------------------------


def take(number: int, *args: Any, **kwargs: Any) -> list[list[int]]:
    order = batch_order(*args, **kwargs)
    return [next(order) for _ in range(number)]


def flat(lists: list[list[int]]) -> list[int]:
    return [i for part in lists for i in part]


def test_an_epoch_shows_every_picture_once() -> None:
    epoch = take(5, 20, 4, seed=0)
    assert sorted(flat(epoch)) == list(range(20))
    assert sorted(flat(take(10, 20, 4, seed=0)[5:])) == list(range(20))
    assert epoch != take(10, 20, 4, seed=0)[5:]
    assert epoch != take(5, 20, 4, seed=1)
    short = flat(take(4, 19, 4, seed=0))
    assert len(set(short)) == 16  # the last three pictures of this epoch are dropped


@pytest.mark.parametrize(("count", "size"), [(20, 4), (19, 4), (3, 8), (1, 4)])
def test_order_starts_at_any_step(count: int, size: int) -> None:
    whole = take(30, count, size, seed=5)
    for start in (0, 1, 4, 5, 17, 29):
        rest = take(30 - start, count, size, seed=5, start_step=start)
        assert rest == whole[start:]
        halves = take(2 * (30 - start), count, size, seed=5, start_step=start, accumulate=2)
        assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == rest


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_a_step_is_shared_by_processes_and_micro_batches(world: int, accumulate: int) -> None:
    ranks = [
        take(6 * accumulate, 21, 8, seed=3, rank=rank, world=world, accumulate=accumulate)
        for rank in range(world)
    ]
    for step, whole in enumerate(take(6, 21, 8, seed=3)):
        shares = [
            ranks[rank][step * accumulate + micro]
            for micro in range(accumulate)
            for rank in range(world)
        ]
        assert flat(shares) == whole
        assert {len(share) for share in shares} == {8 // world // accumulate}


def test_few_pictures_fill_a_batch() -> None:
    for step in take(10, 3, 8, seed=0):
        assert len(step) == 8
        assert {step.count(i) for i in range(3)} <= {2, 3}


def test_orders_that_cannot_be() -> None:
    with pytest.raises(InputError, match="no training picture could be read"):
        batch_order(0, 4, seed=0)
    with pytest.raises(InputError, match=r"cannot be shared by 2 processes .* a multiple of 6"):
        batch_order(20, 16, seed=0, world=2, accumulate=3)


# -- views ---------------------------------------------------------------------------------------


def test_views_are_drawn_by_their_shares() -> None:
    shares = {4: {4: 0.5, 10: 0.3, 11: 0.2}, 5: {5: 0.0, 12: 1.0}}
    views = Views(10, shares)
    drawn = [views.draw(4, seed=3, step=step) for step in range(20_000)]
    for row, share in shares[4].items():
        # Four standard deviations of a share of 20,000 independent draws.
        assert drawn.count(row) / 20_000 == pytest.approx(share, abs=4 * 0.5 / 20_000**0.5)
    # Neither the step before nor another picture nor another seed tells anything.
    after_plain = [row for before, row in pairwise(drawn) if before == 4]
    assert after_plain.count(4) / len(after_plain) == pytest.approx(0.5, abs=0.02)
    assert drawn[:100] != [views.draw(4, seed=4, step=step) for step in range(100)]
    twin = Views(10, {6: {6: 0.5, 10: 0.3, 11: 0.2}})
    other = [twin.draw(6, seed=3, step=step) for step in range(100)]
    assert [row == 4 for row in drawn[:100]] != [row == 6 for row in other]
    assert {views.draw(5, seed=3, step=step) for step in range(100)} == {12}
    assert {views.draw(7, seed=3, step=step) for step in range(100)} == {7}
    assert list(views.rows(4)) == [4, 10, 11] and list(views.rows(7)) == [7]


def test_a_cache_holds_all_views(tmp_path: Path) -> None:
    online = source(augmented=True, unreadable=[6])
    cached = opened(tmp_path, augmented=True, unreadable=[6])
    assert cached.views == online.views
    assert len(cached) == COUNT + COUNT // 3 == len(cached.category)
    assert sorted(cached.failures) == [6, COUNT + 2]
    mirrored = batch(cached, range(COUNT, len(cached)))
    plain = batch(source(Toy().encode), range(0, COUNT, 3))
    keep = [i for i in range(7) if i != 2]
    expected = plain.features[0][keep].flip(-1)
    torch.testing.assert_close(mirrored.features[0], expected, atol=1e-3, rtol=1e-3)


# -- reading ahead -------------------------------------------------------------------------------


def test_the_next_item_is_read_while_this_one_is_used() -> None:
    second = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            second.set()
        return item * 10

    reading = read_ahead(read, [0, 1, 2])
    assert next(reading) == 0
    assert second.wait(timeout=10)
    assert list(reading) == [10, 20]
    assert list(read_ahead(read, [])) == []


def test_closing_ends_the_thread() -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    batches = source().batches(batch_order(COUNT, 4, seed=0))
    next(batches)
    assert any(name.startswith("read_ahead") for name in names())
    batches.close()
    assert not any(name.startswith("read_ahead") for name in names())


def test_an_error_of_the_reader_arrives() -> None:
    def read(item: int) -> int:
        raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        list(read_ahead(read, [1, 2]))


def test_online_leaves_unreadable_pictures_out() -> None:
    online = source(unreadable=[1, 4, 5])
    one, two, three = online.batches([[0, 1, 2], [4, 5], [5, 6]])
    assert one.index.tolist() == [0, 2]
    assert one.category.tolist() == [0, 2]
    assert [len(feature) for feature in one.features] == [2, 2]
    assert not one.features[0].requires_grad
    assert two.index.tolist() == []
    assert two.features == ()
    assert three.index.tolist() == [6]
    assert online.failures == {i: Failure(Path(f"{i}.png"), "torn") for i in (1, 4, 5)}


# -- the cache -----------------------------------------------------------------------------------


def test_same_as_online_but_for_rounding(tmp_path: Path, capsys: Any) -> None:
    encode = Counting()
    cached, online = opened(tmp_path, encode, unreadable=[3, 8]), source(unreadable=[3, 8])
    assert encode.pictures == COUNT - 2
    order = [[5, 2, 3, 20], [8], [0, 0, 1], list(range(COUNT))]
    for ours, theirs in zip(cached.batches(order), online.batches(order), strict=True):
        assert ours.index.tolist() == theirs.index.tolist()
        assert ours.category.tolist() == theirs.category.tolist()
        for a, b in zip(ours.features, theirs.features, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=2**-11, atol=1e-6)
    assert cached.failures == online.failures
    said = capsys.readouterr().err
    assert f"building the feature cache {cached.folder}" in said
    assert said.endswith(f"{cached.folder}: {COUNT} pictures, 0.00 GB, built\n")


def test_reused_without_reading_a_picture(tmp_path: Path, capsys: Any) -> None:
    opened(tmp_path)
    before = files(tmp_path)
    capsys.readouterr()
    reads: list[list[int]] = []
    opened(tmp_path, reads=reads)
    assert reads == []
    assert files(tmp_path) == before
    assert capsys.readouterr().err.endswith("GB, reused\n")
    index = json.loads(before["index.json"])
    assert index["key"] == {"data": "toy", "levels": [1, 2]}
    assert index["shapes"] == [[3, 4, 4], [3]]


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    """A read may fail in passing, and the pictures may lie elsewhere by now."""
    opened(tmp_path / "undisturbed")
    cache = tmp_path / "cache"
    opened(cache, unreadable=[3, 5])
    reads: list[list[int]] = []
    encode = Counting()
    moved = source(encode, unreadable=[3, 5], reads=reads, root=Path("elsewhere"))
    still = CachedFeatures(cache, KEY, moved, block=4, batch_size=2)
    assert still.failures == {i: Failure(Path(f"elsewhere/{i}.png"), "torn") for i in (3, 5)}
    assert (reads, encode.pictures) == ([[3, 5]], 0)  # nothing else is read or encoded
    half = opened(cache, encode, unreadable=[3])
    assert (list(half.failures), encode.pictures) == ([3], 4)  # the block of picture 5
    assert opened(cache, unreadable=[]).failures == {}
    assert files(cache) == files(tmp_path / "undisturbed")


def test_quiet_says_nothing(tmp_path: Path, capsys: Any) -> None:
    CachedFeatures(tmp_path, KEY, source(), quiet=True)
    assert capsys.readouterr().err == ""


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    one = opened(tmp_path)
    two = CachedFeatures(tmp_path, KEY | {"levels": [1, 3]}, source(Counting(2)))
    assert one.folder != two.folder
    double = batch(two, [4]).features[1]
    torch.testing.assert_close(double, 2 * batch(one, [4]).features[1], rtol=1e-3, atol=1e-5)


def test_overflow_makes_it_bfloat16(tmp_path: Path, capsys: Any) -> None:
    """Only late pictures overflow, so most of the float16 cache was there already."""

    class Late(Counting):
        def __call__(self, image: Tensor) -> tuple[Tensor, ...]:
            self.scale = 1e6 if self.pictures >= 16 and not overflowed else 1.0
            overflowed.extend([True] * (self.scale > 1))
            return super().__call__(image)

    overflowed: list[bool] = []
    cached = opened(tmp_path, Late(), unreadable=[1])
    assert "the cache is made in bfloat16" in capsys.readouterr().err
    expected = batch(source(), [0, 7, 20]).features[0]
    found = batch(cached, [0, 7, 20]).features[0]
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)
    assert not torch.allclose(found, expected, rtol=2**-11)
    assert cached.failures.keys() == {1}
    large = CachedFeatures(tmp_path, {"other": 1}, source(Counting(1e7)))
    assert batch(large, [0]).features[0].abs().max() > 65504


def test_encoder_that_gives_nan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a feature that is NaN or infinite"):
        opened(tmp_path, Counting(float("nan")))


def test_nothing_readable(tmp_path: Path) -> None:
    cached = opened(tmp_path, unreadable=range(COUNT))
    assert len(cached.failures) == COUNT
    assert batch(cached, [1, 2]).features == ()
    assert cache_bytes(source(unreadable=range(COUNT))) == 0


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_damaged_rows_are_made_again(tmp_path: Path) -> None:
    folder = opened(tmp_path, unreadable=[6]).folder
    good = files(tmp_path)
    row = 2 * 3 * 4 * 4
    flip(folder / "features-0.bin", 9 * row + 5)  # block 8..11
    flip(folder / "features-1.bin", 20 * 6)  # block 20
    encode = Counting()
    opened(tmp_path, encode, unreadable=[6])
    assert encode.pictures == 5
    assert files(tmp_path) == good
    with (folder / "features-0.bin").open("r+b") as file:  # torn: pages that were never written
        file.seek(4 * row)
        file.write(bytes(3 * row))
    encode = Counting()
    opened(tmp_path, encode, unreadable=[6])
    assert encode.pictures == 3
    assert files(tmp_path) == good


def test_a_repaired_block_may_read_what_was_unreadable(tmp_path: Path) -> None:
    folder = opened(tmp_path, unreadable=[6]).folder
    flip(folder / "features-1.bin", 4 * 6)
    cached = opened(tmp_path)
    assert cached.failures == {}
    assert len(batch(cached, [6]).index) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "features-0.bin", 100),
        lambda folder: (folder / "features-1.bin").unlink(),
        lambda folder: (folder / "index.json").write_text('{"key"'),
        lambda folder: (folder / "index.json").write_text("[]"),
        lambda folder: (folder / "index.json").write_text('{"format": 0}'),
        lambda folder: (folder / "index.json").unlink(),
    ],
)
def test_a_cache_beyond_repair_is_made_again(tmp_path: Path, damage: Any) -> None:
    folder = opened(tmp_path).folder
    good = files(tmp_path)
    damage(folder)
    encode = Counting()
    opened(tmp_path, encode)
    assert encode.pictures == COUNT
    assert files(tmp_path) == good


def test_a_stopped_build_goes_on(tmp_path: Path) -> None:
    """Bit by bit the same, whatever stops it, and no finished block is made twice."""
    opened(tmp_path / "undisturbed", unreadable=[5])
    cache = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        opened(cache, Counting(stop_after=9), unreadable=[5])  # blocks 0..3, 4..7, half of 8..11
    with pytest.raises(KeyboardInterrupt):
        opened(cache, Counting(stop_after=6), unreadable=[5])
    reads: list[list[int]] = []
    opened(cache, reads=reads, unreadable=[5])
    assert reads[:2] == [[5], [12, 13]]
    assert files(cache) == files(tmp_path / "undisturbed")


def test_features_of_another_shape(tmp_path: Path) -> None:
    folder = opened(tmp_path).folder
    flip(folder / "features-0.bin", 0)
    with pytest.raises(InputError, match="do not belong into the cache"):
        opened(tmp_path, lambda image: (image[:, :1], image.mean(dim=(2, 3))))


def test_concurrent_runs_build_one_cache(tmp_path: Path) -> None:
    encoders = [Counting() for _ in range(3)]
    caches: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda encode=encode: caches.append(
                CachedFeatures(tmp_path, KEY, source(encode), block=4, batch_size=2, quiet=True)
            )
        )
        for encode in encoders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encode.pictures for encode in encoders) == [0, 0, COUNT]
    expected = batch(source(), range(COUNT)).features[0]
    for cache in caches:
        found = batch(cache, range(COUNT)).features[0]
        torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-6)


def test_full_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """The n-th commit finds no room: an error that names the file, and then it goes on."""
    sync, count = os.fsync, 0

    def no_room(file: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(OSError, match="No space left") as caught:
            opened(tmp_path)
    assert str(caught.value.filename).endswith("features-1.bin")
    encode = Counting()
    opened(tmp_path, encode)
    assert encode.pictures == COUNT - 4


def test_room_on_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=10 * 10**9)
    )
    root = tmp_path / "not" / "yet"
    assert room_for(root, KEY, 8 * 10**9)
    assert not room_for(root, KEY, 9_500_000_000)  # 1 GB stays free
    needed = cache_bytes(source(unreadable=[0]))
    assert needed == COUNT * 2 * (3 * 4 * 4 + 3)
    opened(root)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert room_for(root, KEY, needed)  # it is all there
    assert not room_for(root, {"other": 1}, needed)
