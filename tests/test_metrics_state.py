"""PixelState: guaranteed bounds, merging, and what it refuses."""

import errno
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from allgood.metrics import PixelState, map_store
from allgood.metrics.histogram import PagedHistogram, key_scores, score_keys
from allgood.types import InputError

SETTINGS = {"exact_pixels": 40, "max_bins": 64}
float32 = st.floats(width=32, allow_nan=False)


def noisy(num_images: int, seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Good images first, then some with squares; scores from 1e-3 to about 2."""
    random = np.random.default_rng(seed)
    maps = random.gamma(2.0, 0.1, (num_images, size, size)) + 1e-3
    masks = np.zeros(maps.shape, bool)
    for i in range(num_images // 3, num_images):
        row, column = random.integers(0, size - 6, 2)
        masks[i, row : row + 5, column : column + 6] = True
        maps[i] += masks[i] * random.uniform(0.1, 0.8)
    return maps.astype(np.float32), masks


def names(count: int) -> list[str]:
    return [f"image {i:03d}" for i in range(count)]


@given(arrays(np.float32, st.integers(1, 40), elements=float32))
def test_keys_order_like_scores(scores: np.ndarray) -> None:
    keys = score_keys(scores)
    np.testing.assert_array_equal(keys[:, None] < keys[None, :], scores[:, None] < scores[None, :])
    np.testing.assert_array_equal(key_scores(keys), scores)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 20, 300, 5000]),
    st.sampled_from([0, 1, 30, 400]),
    st.sampled_from(["gamma", "ties", "signed", "wide", "constant"]),
)
def test_bounds_hold_the_exact_value(
    seed: int, max_bins: int, exact_pixels: int, kind: str
) -> None:
    random = np.random.default_rng(seed)
    shape = (4, 9, 9)
    masks = random.random(shape) < random.choice([0.02, 0.3, 0.9])
    masks[0] = False
    maps = random.gamma(1.0, size=shape) + masks * random.random()
    if kind == "ties":
        maps = np.round(maps, 1)
    elif kind == "signed":
        maps = maps - 1
    elif kind == "wide":
        maps = np.exp(20 * (maps - 1)) * random.choice([-1, 1, 0], shape)
    elif kind == "constant":
        maps[:] = 2.5
    state = PixelState(max_bins=max_bins, exact_pixels=exact_pixels)
    exact = PixelState(exact=True)
    state.update(maps, masks)
    exact.update(maps, masks)
    for limit in (0.3, 1.0):
        found, true = state.result(limit), exact.result(limit)
        for name, metric in found.items():
            value = true[name].value
            if not true[name].is_defined:
                assert metric.reason == true[name].reason
                continue
            assert true[name].bound == 0
            assert metric.lower - 1e-9 <= value <= metric.upper + 1e-9, name
            assert metric.lower <= metric.value <= metric.upper, name
            if name.startswith("dsc"):
                assert metric == true[name], name
    assert state.normal_pixels == exact.normal_pixels


@pytest.mark.parametrize("spoilt", [False, True])
def test_areas_clipped_to_0_and_1_are_ties(spoilt: bool, tmp_path: Path) -> None:
    maps, masks = noisy(12, 3)
    maps = np.clip(4 * maps - 2, 0, 1).astype(np.float32)
    assert ((maps == 0) & masks).any() and ((maps == 1) & masks).any()
    if spoilt:
        maps[3, 0, :2] = 1e-42, 1.0001
    exact, streamed = PixelState(exact=True), PixelState(exact_pixels=0, max_bins=8)
    exact.update(maps, masks, names(12))
    other = PixelState(exact_pixels=0, max_bins=8)
    streamed.update(maps[:3], masks[:3], names(3))
    other.update(maps[3:], masks[3:], names(12)[3:])
    streamed.merge(other)
    streamed.save(tmp_path / "state")
    true = exact.result()
    for found in (streamed.result(), PixelState.load(tmp_path / "state").result()):
        for name, metric in found.items():
            assert metric.lower - 1e-9 <= true[name].value <= metric.upper + 1e-9
    tied = PixelState.load(tmp_path / "state").groups()
    assert bool(tied.tied[tied.threshold == 0]) is not spoilt
    assert bool(tied.tied[tied.threshold == 1]) is not spoilt


def test_a_full_disk_costs_dsc_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class FullDisk(io.BytesIO):
        def write(self, part: memoryview) -> int:
            if self.tell() > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(part[:1000])

    maps, masks = noisy(6, 0)
    expected = PixelState()
    expected.update(maps, masks, names(6))
    monkeypatch.setattr(map_store.tempfile, "TemporaryFile", lambda **_: FullDisk())
    state = PixelState()
    state.update(maps, masks, names(6))
    state.save(tmp_path / "state")
    for found in (state.result(), PixelState.load(tmp_path / "state").result()):
        for name, metric in expected.result().items():
            if name.startswith("dsc"):
                assert "No space left on device" in found[name].reason
            else:
                assert found[name] == metric


def test_without_dsc_no_map_is_kept() -> None:
    maps, masks = noisy(6, 0)
    state, full = PixelState(with_dsc=False), PixelState()
    for one in (state, full):
        one.update(maps, masks)
    expected = {k: v for k, v in full.result().items() if not k.startswith("dsc")}
    assert state.result() == expected
    other = PixelState()
    other.update(maps, masks, names(6))
    with pytest.raises(InputError, match="with_dsc=True and with_dsc=False"):
        other.merge(state)
    state.merge(other)
    assert state.num_images == 12 and "dsc" not in state.result()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_any_partition_and_order_gives_the_same_state(
    seed: int, exact: bool, tmp_path: Path
) -> None:
    random = np.random.default_rng(seed)
    # The largest size fills the top store several times over.
    maps, masks = noisy(12, seed, size=(20, 32, 160)[seed])
    maps[3] *= 1e-9  # another range in one batch
    maps[7, 0, 0] = 0.0
    ids = names(12)
    whole = PixelState(exact=exact, **SETTINGS)
    whole.update(maps, masks, ids)
    whole.save(tmp_path / "whole")
    for attempt in range(4):
        shards = [PixelState(exact=exact, **SETTINGS) for _ in range(3)]
        for i in random.permutation(12):
            shards[random.integers(3)].update(maps[i], masks[i], [ids[i]])
        first, second, third = (shards[j] for j in random.permutation(3))
        if attempt % 2:
            second.merge(third)
            first.merge(second)
        else:
            first.merge(second)
            first.result()  # looking must not change anything
            first.merge(third)
        assert first == whole
        assert first.result() == whole.result()
        first.save(tmp_path / "merged")
        assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    other = PixelState(exact=exact, **SETTINGS)
    other.update(maps + np.float32(1), masks, ids)
    assert other != whole


@pytest.mark.parametrize("exact", [True, False])
def test_save_and_load(exact: bool, tmp_path: Path) -> None:
    maps, masks = noisy(9, 0)
    state = PixelState(exact=exact, **SETTINGS)
    state.update(maps[:5], masks[:5], names(9)[:5])
    state.save(tmp_path / "state.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    loaded = PixelState.load(tmp_path / "state.safetensors")
    assert loaded == state
    assert loaded.result() == state.result()
    for one in (state, loaded):
        one.update(maps[5:], masks[5:], names(9)[5:])
    assert loaded == state


def test_load_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"no safetensors at all, but long enough to have a header")
    with pytest.raises(InputError, match="is not a saved PixelState"):
        PixelState.load(path)
    with pytest.raises(FileNotFoundError):
        PixelState.load(tmp_path / "missing")


def test_images_are_counted_once() -> None:
    maps, masks = noisy(4, 0)
    state, other = PixelState(**SETTINGS), PixelState(**SETTINGS)
    state.update(maps, masks, names(4))
    other.update(maps[3:], masks[3:], names(4)[3:])
    before = state.result()
    with pytest.raises(InputError, match="'image 003' was already added"):
        state.merge(other)
    with pytest.raises(InputError, match="'image 000' was already added"):
        state.update(maps[:1], masks[:1], ["image 000"])
    with pytest.raises(InputError, match="twice"):
        state.update(maps[:2], masks[:2], ["a", "a"])
    with pytest.raises(InputError, match="cannot be merged"):
        state.merge(PixelState())
    assert state.result() == before
    assert state.num_images == 4


def test_wrong_shapes_say_what_came() -> None:
    state = PixelState()
    with pytest.raises(InputError, match=r"\(2, 4, 4\) but masks \(2, 5, 4\)"):
        state.update(np.zeros((2, 4, 4)), np.zeros((2, 5, 4)))
    with pytest.raises(InputError, match=r"got shape \(2, 1, 4, 4\)"):
        state.update(np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 4, 4)))
    with pytest.raises(InputError, match="1 maps came with 2 image_ids"):
        state.update(np.zeros((4, 4)), np.zeros((4, 4)), ["a", "b"])
    with pytest.raises(ValueError, match="fpr_limit must be in"):
        state.result(fpr_limit=30)
    with pytest.raises(ValueError, match="max_bins"):
        PixelState(max_bins=0)
    with pytest.raises(ValueError, match="exact_pixels"):
        PixelState(exact_pixels=-1)


MONOTONE = {
    "doubled": lambda s: 2 * s,
    "raw 25 to 57": lambda s: 25 + 16 * s,
    "eighth power": lambda s: s**8,
    "exponential": lambda s: np.exp(5 * s),
    "tiny": lambda s: 1e-12 * s,
    "negative": lambda s: -1 / s,
    "far away": lambda s: s + 1000,
}


@pytest.mark.parametrize("kind", MONOTONE)
def test_numbers_do_not_change_under_monotone_maps(kind: str) -> None:
    maps, masks = noisy(30, 4, size=64)
    maps = maps.astype(np.float64) + 0.5 * masks  # strong enough for a DSC threshold near the top
    maps = np.round(maps * 2**10) / 2**10 + 2**-10  # ties that no map splits
    changed = MONOTONE[kind](maps)
    assert len(np.unique(changed.astype(np.float32))) == len(np.unique(maps))
    exact, state = PixelState(exact=True), PixelState(exact_pixels=20_000)
    exact.update(maps, masks)
    state.update(changed, masks)
    true, found = exact.result(), state.result()
    for name, metric in found.items():
        assert metric.lower - 1e-12 <= true[name].value <= metric.upper + 1e-12, name
        assert metric.bound <= 1e-4, name


def test_threshold_reaches_f1max() -> None:
    maps, masks = noisy(12, 5)
    for state in (PixelState(), PixelState(exact=True), PixelState(exact_pixels=0, max_bins=100)):
        state.update(maps, masks)
        predicted = maps >= np.float32(state.f1max_threshold())
        f1 = 2 * (predicted & masks).sum() / (predicted.sum() + masks.sum())
        assert f1 == pytest.approx(state.result()["pixel_f1max"].value, abs=1e-12)


def test_one_zero_does_not_cost_resolution() -> None:
    maps, _ = noisy(6, 6)
    clean, dirty = PagedHistogram(), PagedHistogram()
    clean.add_pixels(score_keys(maps.ravel()))
    maps[0, 0, 0] = 0.0
    dirty.add_pixels(score_keys(maps.ravel()))
    assert dirty.shift - clean.shift <= 1


def test_half_precision_and_non_contiguous_input() -> None:
    maps, masks = noisy(4, 7)
    maps = maps.astype(np.float16)
    expected, strided = PixelState(), PixelState()
    expected.update(maps.astype(np.float32), masks)
    strided.update(np.moveaxis(np.moveaxis(maps, 0, -1).copy(), -1, 0), masks.astype(np.uint8))
    assert strided == expected
    whole_numbers = PixelState()
    whole_numbers.update(np.arange(32).reshape(2, 4, 4), np.arange(32).reshape(2, 4, 4) > 20)
    whole_numbers.update(np.zeros((0, 4, 4)), np.zeros((0, 4, 4)))
    assert whole_numbers.result()["pixel_auroc"].value == 1


def test_histogram_counts_beyond_float32_and_keeps_within_budget() -> None:
    histogram = PagedHistogram(max_bins=4096)
    keys = score_keys(np.ones(1 << 20, np.float32))
    for _ in range(20):
        histogram.add_pixels(keys)
    assert histogram.bins().pixels.tolist() == [20 << 20]  # 20 M ones; float32 sums stop at 16.8 M
    everywhere = np.arange(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    histogram.add_pixels(everywhere)
    assert len(histogram.bins().key) == 4096
    assert histogram.bins().pixels.sum() == (20 << 20) + len(everywhere)
