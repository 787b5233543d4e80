"""Overlays against small arrays worked out by hand."""

import time

import numpy as np
import pytest

from allgood.evaluation.overlay import heat_overlay, line_width, mask_outline, shrink, shrink_mask

CYAN = (0x00, 0xE5, 0xFF)


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_picture_shows_unchanged_up_to_low() -> None:
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    scores = np.full((4, 5), 0.5, np.float32)
    scores[1, 2] = 0.9
    painted = heat_overlay(image, scores, low=0.5, high=1.0)
    changed = (painted != image).any(axis=2)
    assert changed[1, 2]
    assert changed.sum() == 1
    assert painted is not image


def test_blend_at_the_top_of_the_scale() -> None:
    """From `high` on: 62 % of #F6D746 over 38 % of the picture."""
    painted = heat_overlay(grey(1, 2), np.array([[1, 9]], np.float32), low=0.0, high=1.0)
    by_definition = 0.62 * np.array((0xF6, 0xD7, 0x46)) + 0.38 * 100
    assert np.abs(painted.astype(float) - by_definition).max() <= 1
    assert (painted[0, 0] == painted[0, 1]).all()


def test_heat_grows_with_the_score() -> None:
    scores = np.linspace(0, 1, 64, dtype=np.float32)[None]
    painted = heat_overlay(grey(1, 64, 0), scores, low=0.0, high=1.0).astype(int)
    lightness = painted @ np.array([299, 587, 114]) // 1000
    assert (np.diff(lightness[0]) >= 0).all()


def test_infinite_scores_are_hottest_and_coldest() -> None:
    scores = np.array([[np.inf, -np.inf]], np.float32)
    painted = heat_overlay(grey(1, 2), scores, low=0.0, high=1.0)
    hottest = heat_overlay(grey(1, 1), np.ones((1, 1), np.float32), low=0.0, high=1.0)
    assert (painted[0, 0] == hottest[0, 0]).all()
    assert (painted[0, 1] == 100).all()


def test_box_is_drawn_around_its_pixels() -> None:
    painted = heat_overlay(
        grey(6, 7), np.zeros((6, 7), np.float32), low=0.0, high=1.0, boxes=[(2, 2, 4, 3)]
    )
    outlined = (painted == CYAN).all(axis=2)
    expected = np.zeros((6, 7), bool)
    expected[1:4, 1:5] = True
    expected[2, 2:4] = False  # the box itself stays visible
    assert (outlined == expected).all()


@pytest.mark.parametrize("box", [(0, 0, 6, 6), (-5, -5, 90, 90), (0, 0, 1, 1)])
def test_box_at_the_edge_stays_visible(box: tuple[int, int, int, int]) -> None:
    painted = heat_overlay(grey(6, 6), np.zeros((6, 6), np.float32), low=0, high=1, boxes=[box])
    assert (painted == CYAN).all(axis=2).any()


def test_box_outside_is_ignored() -> None:
    painted = heat_overlay(
        grey(6, 6), np.zeros((6, 6), np.float32), low=0, high=1, boxes=[(20, 20, 30, 30)]
    )
    assert (painted == 100).all()


def test_smallest_picture() -> None:
    painted = heat_overlay(grey(1, 1), np.ones((1, 1), np.float32), low=0.0, high=1.0)
    assert painted.shape == (1, 1, 3)
    assert mask_outline(grey(1, 1), np.ones((1, 1), bool)).tolist() == [[[100, 100, 100]]]


def test_blocks_join_without_a_seam() -> None:
    """Taller than one block of 2^18 pixels, and not a multiple of it."""
    rng = np.random.default_rng(0)
    scores = rng.random((700, 1000), np.float32)
    image = rng.integers(0, 256, (700, 1000, 3), np.uint8)
    whole = heat_overlay(image, scores, low=0.4, high=0.9)
    for top in (0, 255, 262, 263, 523, 690):
        part = slice(top, top + 5)
        alone = heat_overlay(image[part], scores[part], low=0.4, high=0.9)
        assert (whole[part] == alone).all()


def test_twelve_megapixels_are_quick() -> None:
    image = grey(3000, 4000)
    scores = np.random.default_rng(0).random((3000, 4000), np.float32)
    started = time.perf_counter()
    heat_overlay(image, scores, low=0.5, high=1.0, boxes=[(5, 5, 300, 400)])
    mask_outline(image, scores > 0.99)
    assert time.perf_counter() - started < 10  # about 1 s; room for a busy machine
    assert line_width(image) == 20


def test_mask_outline_is_the_ring_around_the_mask() -> None:
    mask = np.zeros((7, 7), bool)
    mask[3, 3] = True
    outlined = (mask_outline(grey(7, 7), mask) == CYAN).all(axis=2)
    expected = np.zeros((7, 7), bool)
    expected[2:5, 2:5] = True
    expected[3, 3] = False
    assert (outlined == expected).all()
    assert (mask_outline(grey(7, 7), np.zeros((7, 7), bool)) == 100).all()


def test_shrink_keeps_small_pictures() -> None:
    assert shrink(grey(100, 640)).shape == (50, 320, 3)
    assert shrink(grey(1, 1)).shape == (1, 1, 3)
    assert shrink(grey(1, 5000)).shape == (1, 320, 3)


def test_shrunk_mask_keeps_every_defect() -> None:
    mask = np.zeros((3000, 4000), bool)
    mask[1234, 2345] = True
    assert np.argwhere(shrink_mask(mask, (30, 40))).tolist() == [[12, 23]]
    assert (shrink_mask(mask, (3000, 4000)) == mask).all()


def test_wrong_input_says_what_to_do() -> None:
    zeros = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="resize the map"):
        heat_overlay(grey(4, 5), zeros, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="low must be below high"):
        heat_overlay(grey(4, 4), zeros, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="NaN"):
        heat_overlay(grey(4, 4), zeros * np.nan, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="uint8"):
        heat_overlay(zeros[..., None], zeros, low=0.0, high=1.0)
