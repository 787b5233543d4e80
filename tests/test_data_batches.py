"""Batches: order, partition, masks, failures, and threads that end."""

import threading
import time
from pathlib import Path

import data_trees
import numpy as np
import pytest
import torch
from data_trees import picture, save, spot

from allgood.data import batches as batches_module
from allgood.data.batches import Failure, load_batches
from allgood.data.images import read_image
from allgood.data.readers import read_data
from allgood.data.transforms import Transform
from allgood.types import InputError, Sample


def readers_alive() -> int:
    return sum(thread.name.startswith("allgood-read") for thread in threading.enumerate())


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """20 good pictures."""
    made = []
    for i in range(20):
        path = save(picture(i), tmp_path / f"{i:02}.png")
        made.append(Sample(path, "c", "train", "good", path.name))
    return made


def load(samples: list[Sample], transform: Transform = Transform(32), **options) -> tuple:  # noqa: B008
    failures: list[Failure] = []
    return list(load_batches(samples, transform, failures=failures, **options)), failures


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_order_and_sizes(samples: list[Sample], workers: int, prefetch: int) -> None:
    made, failures = load(samples, batch_size=8, workers=workers, prefetch=prefetch)
    assert [len(batch.sample) for batch in made] == [8, 8, 4] and failures == []
    assert [s for batch in made for s in batch.sample] == samples
    images = torch.cat([batch.image for batch in made])
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32
    expected = [Transform(32)(read_image(s.path)) for s in samples]
    assert torch.equal(images, torch.stack(expected))
    assert made[0].mask is None and not made[0].has_mask.any() and not made[0].label.any()
    assert made[0].original_size == [(24, 24)] * 8
    assert readers_alive() == 0


def test_a_batch_ends_where_the_size_changes(tmp_path: Path) -> None:
    sizes = [(32, 32), (32, 32), (32, 64), (32, 64), (32, 64), (32, 32)]
    samples = []
    for i, size in enumerate(sizes):
        path = save(picture(i, size), tmp_path / f"{i}.png")
        samples.append(Sample(path, "c", "train", "good", path.name))
    made, _ = load(samples, Transform(32, keep_aspect=True), batch_size=2)
    assert [tuple(b.image.shape) for b in made] == [
        (2, 3, 32, 32),
        (2, 3, 32, 64),
        (1, 3, 32, 64),
        (1, 3, 32, 32),
    ]


def test_a_bad_picture_costs_that_picture(samples: list[Sample]) -> None:
    samples[3].path.write_bytes(b"")
    samples[7].path.unlink()
    samples[19].path.write_bytes(samples[19].path.read_bytes()[:-100])
    made, failures = load(samples, batch_size=6)
    assert [len(batch.sample) for batch in made] == [6, 6, 5]
    assert [f.path.name for f in failures] == ["03.png", "07.png", "19.png"]
    assert "empty (0 bytes)" in failures[0].reason
    assert load([samples[3]])[0] == []
    assert load([])[0] == []


def test_masks(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path)
    empty = save(spot(value=0), root / "ground_truth" / "crack" / "002.png")
    made, failures = load(list(read_data([root]).test), Transform(24), mask_size="input")
    (batch,) = made
    assert failures == [] and empty.is_file()
    assert [s.id[5:] for s in batch.sample] == [
        "crack/000.png",
        "crack/001.png",
        "crack/002.png",
        "good/000.jpg",
        "good/001.jpg",
    ]
    assert batch.label.tolist() == [True, True, True, False, False]
    assert batch.has_mask.tolist() == [True, True, False, True, True]  # the third is empty
    assert batch.mask is not None and batch.mask.shape == (5, 1, 24, 24)
    assert batch.mask.dtype == torch.bool
    drawn = torch.from_numpy(np.asarray(spot()) > 0)
    assert torch.equal(batch.mask[:2, 0], drawn.expand(2, -1, -1))
    assert not batch.mask[2:].any()


def test_soft_masks_of_mtd(tmp_path: Path) -> None:
    data = read_data([data_trees.mtd(tmp_path / "tile")])
    made, _ = load([s for s in data.test if not s.is_good], Transform(24), mask_size="input")
    assert made[0].has_mask.tolist() == [True, True, False]
    assert made[0].mask[0].sum() == 24  # without the speck below 128


def test_a_missing_or_wrong_mask(tmp_path: Path) -> None:
    root = data_trees.mvtec(tmp_path)
    save(spot((10, 30)), root / "ground_truth" / "crack" / "000_mask.png")
    made, failures = load(list(read_data([root]).test), mask_size="input")
    assert made[0].has_mask.tolist() == [True, False, True, True]
    assert [f.path.name for f in failures] == ["000.png"]
    assert "the mask is 30x10 pixels but its picture is 24x24" in failures[0].reason


def test_the_mask_turns_with_its_picture(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    save(spot((20, 40)).convert("RGB"), tmp_path / "x.png", exif=exif)
    mask = save(spot((20, 40)), tmp_path / "m.png")
    sample = Sample(tmp_path / "x.png", "c", "test", "bad", "x.png", (mask,))
    (batch,), _ = load([sample], Transform((40, 20)), mask_size="input")
    assert torch.equal(batch.mask[0, 0], batch.image[0, 0] > 0.5)


def test_leaving_early_stops_the_threads(samples: list[Sample], monkeypatch) -> None:
    read = []
    original = batches_module.read_oriented_image

    def slow(path: Path) -> tuple:
        read.append(path)
        time.sleep(0.005)
        return original(path)

    monkeypatch.setattr(batches_module, "read_oriented_image", slow)
    made = load_batches(samples, Transform(32), failures=[], batch_size=2, prefetch=2)
    assert readers_alive() == 0  # nothing starts before the first batch is asked for
    next(made)
    assert readers_alive() > 0
    made.close()
    assert readers_alive() == 0
    assert len(read) <= 2 + 2 * 2 + 2  # the look-ahead is bounded


def test_an_error_of_ours_is_not_swallowed(samples: list[Sample], monkeypatch) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(batches_module, "read_oriented_image", broken)
    with pytest.raises(ZeroDivisionError):
        load(samples)
    assert readers_alive() == 0


@pytest.mark.parametrize("name", ["batch_size", "workers", "prefetch"])
def test_numbers_must_be_positive(samples: list[Sample], name: str) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        load_batches(samples, Transform(32), failures=[], **{name: 0})
