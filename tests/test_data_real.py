"""The readers on real data, where this machine has them: counts against a listing of the files."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from allgood.data.batches import Failure, load_batches
from allgood.data.readers import read_data
from allgood.data.transforms import Transform

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TILES, SCREW = SHARED / "magnetic_tile", SHARED / "ball_screw"


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


@pytest.mark.shared
@pytest.mark.skipif(not TILES.is_dir(), reason="no magnetic_tile beside the repository")
def test_magnetic_tile() -> None:
    data = read_data([TILES])
    assert list(data.layouts.values()) == ["mtd"] and data.categories == ("magnetic_tile",)
    expected = {kind.name[3:].lower(): count(kind, "Imgs/*.jpg") for kind in TILES.iterdir()}
    expected["good"] = expected.pop("free")
    assert Counter(s.defect for s in data.samples) == expected
    assert len(data.train) == pytest.approx(0.8 * expected["good"], rel=0.05)
    assert all(s.mask_paths for s in data.test if not s.is_good)
    uneven = [s for s in data.test if s.defect == "uneven"]
    failures: list[Failure] = []
    loaded = list(load_batches(uneven, Transform(64), failures=failures, mask_size="input"))
    without = {
        s.path.stem for b in loaded for s, m in zip(b.sample, b.has_mask, strict=True) if not m
    }
    published = {f"exp{n}" for n in ("3_num_45042", "4_num_124690", "4_num_352527", "4_num_45057")}
    assert without == published & {s.path.stem for s in uneven} and not failures


@pytest.mark.shared
@pytest.mark.skipif(not SCREW.is_dir(), reason="no ball_screw beside the repository")
def test_ball_screw() -> None:
    data = read_data([SCREW])
    assert list(data.layouts.values()) == ["mvtec"] and data.categories == ("ball_screw",)
    assert Counter((s.split, s.defect) for s in data.samples) == {
        ("train", "good"): count(SCREW, "train/good/*"),
        ("test", "good"): count(SCREW, "test/good/*"),
        ("test", "pitting"): count(SCREW, "test/pitting/*"),
    }
    bad = [s for s in data.test if not s.is_good]
    assert all(s.mask_paths[0].stem == f"{s.path.stem}_mask" for s in bad)
    failures: list[Failure] = []
    (batch,) = load_batches(bad[:8], Transform(64), failures=failures, mask_size="input")
    assert batch.has_mask.all() and not failures


@pytest.mark.skipif(
    importlib.util.find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed"
)
def test_elpv() -> None:
    data = read_data(["elpv"])
    mono, poly = "monocrystalline", "polycrystalline"
    assert Counter((s.category, s.defect) for s in data.samples) == {
        (mono, "good"): 588,
        (poly, "good"): 920,
        (mono, "defective"): 313,
        (poly, "defective"): 402,
    }
    assert len({s.group for s in data.samples}) == 44  # as many as the set has modules
    sides = {(s.group, s.split) for s in data.samples if s.is_good}
    assert len(sides) == len({group for group, _ in sides})
    # 44 groups are few, so the shares stray far from 0.8; the split of a seed never changes.
    assert Counter(s.category for s in data.train) == {mono: 340, poly: 638}
    failures: list[Failure] = []
    (batch,) = load_batches(data.samples[:8], Transform(64), failures=failures)
    assert batch.original_size == [(300, 300)] * 8 and not failures
