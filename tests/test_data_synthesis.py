"""Made-up anomalies: each operator and the noise against a plain computation, what every draw
promises, and that nothing but its arguments decides it."""

import colorsys
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_trees import save
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

from allgood.data.anomalies import (
    SOURCES,
    perlin_mask,
    perlin_noise,
    procedural_texture,
    shuffle_tiles,
)
from allgood.data.foreground import choose_foreground, foreground_mask, otsu, parse_foreground
from allgood.data.operators import BRIGHTNESS_SPACES, OPERATORS, augment, with_lightness
from allgood.data.synthesis import (
    SynthesisConfig,
    Synthesizer,
    Synthetic,
    reference_config,
    seeded,
)
from allgood.types import InputError

ALWAYS = SynthesisConfig(clean_probability=0)


def photo(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Noise over a coloured gradient: (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(40, 190, width)[None, :, None] * np.array([1.0, 0.8, 0.6])
    return (ramp + generator.integers(0, 20, (height, width, 3))).astype(np.uint8)


def only(source: str, **options: Any) -> SynthesisConfig:
    weights = dict.fromkeys(SOURCES, 0.0) | {source: 1.0}
    return replace(ALWAYS, **weights, **options)


def draw(config: SynthesisConfig, image: np.ndarray, index: int = 0, **options: Any) -> Synthetic:
    synthesizer = Synthesizer(config, **options)
    return synthesizer.draw(image, category="part", picture="a.png", index=index)


# -- Perlin noise --------------------------------------------------------------------------------


def perlin_by_loops(size: int, cells: tuple[int, int], generator: Generator) -> np.ndarray:
    """The definition, pixel by pixel and corner by corner."""
    angle = generator.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    noise = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * cells[0] / size, column * cells[1] / size
            for corner_y in (math.floor(y), math.floor(y) + 1):
                for corner_x in (math.floor(x), math.floor(x) + 1):
                    dy, dx = y - corner_y, x - corner_x
                    gradient = angle[corner_y, corner_x]
                    dot = math.sin(gradient) * dy + math.cos(gradient) * dx
                    fade = [1 - (6 * t**5 - 15 * t**4 + 10 * t**3) for t in (abs(dy), abs(dx))]
                    noise[row, column] += fade[0] * fade[1] * dot
    return noise * math.sqrt(2)


@pytest.mark.parametrize("size, cells", [(16, (4, 4)), (24, (1, 8)), (37, (16, 2)), (20, (32, 1))])
def test_perlin_noise_by_its_definition(size: int, cells: tuple[int, int]) -> None:
    got = perlin_noise(size, cells, np.random.default_rng(3))
    expected = perlin_by_loops(size, cells, np.random.default_rng(3))
    assert got.dtype == np.float32 and got.shape == (size, size)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("size", [(64, 64), (50, 91), (128, 33), (16, 17)])
def test_perlin_masks_cover_a_part_of_any_size(size: tuple[int, int]) -> None:
    shares = [perlin_mask(size, 0.3, seeded(i)).mean() for i in range(60)]
    assert perlin_mask(size, 0.3, seeded(0)).shape == size
    assert 0.03 < np.mean(shares) < 0.3
    assert max(shares) < 0.7


# -- operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("picture", [photo(), photo(19, 31), np.zeros((16, 16, 3), np.uint8)])
def test_operators_keep_size_and_mode_and_rest_on_the_seed(name: str, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    for seed in range(8):
        got = OPERATORS[name](image, seeded(seed))
        assert got.mode == "RGB" and got.size == image.size
        assert got.tobytes() == OPERATORS[name](image, seeded(seed)).tobytes()
    assert np.array_equal(image, picture)


def test_there_are_ten() -> None:
    assert len(OPERATORS) == 10
    got = augment(photo(), 10, seeded(0))
    assert got.shape == (64, 64, 3) and got.dtype == np.uint8
    assert len({augment(photo(), 3, seeded(i)).tobytes() for i in range(20)}) == 20


def applied(name: str, seed: int) -> tuple[np.ndarray, np.ndarray, Generator]:
    """Before, after, and a generator that draws what the operator drew."""
    before = photo()
    after = OPERATORS[name](Image.fromarray(before), seeded(seed))
    return before.astype(np.float64), np.asarray(after).astype(np.float64), seeded(seed)


@pytest.mark.parametrize("seed", range(4))
def test_gamma(seed: int) -> None:
    before, after, generator = applied("gamma_per_channel", seed)
    exponent = np.array([generator.uniform(0.5, 2) for _ in range(3)])
    assert np.abs(after - 255 * (before / 255) ** exponent).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_solarize(seed: int) -> None:
    before, after, generator = applied("solarize", seed)
    if generator.random() >= 0.5:
        threshold = generator.uniform(32, 128)
        before = np.where(before >= threshold, 255 - before, before)
    assert np.array_equal(after, before)


@pytest.mark.parametrize("seed", range(4))
def test_posterize_and_invert(seed: int) -> None:
    before, after, generator = applied("posterize", seed)
    step = 2 ** (8 - int(generator.integers(1, 9)))
    assert np.array_equal(after, before // step * step)
    before, after, _ = applied("invert", seed)
    assert np.array_equal(after, 255 - before)


@pytest.mark.parametrize("seed", range(4))
def test_hue_and_saturation(seed: int) -> None:
    before, after, generator = applied("hue_and_saturation", seed)
    hue, saturation = generator.integers(-50, 51, 2)
    for row, column in ((0, 0), (5, 40), (60, 63)):
        h, s, v = colorsys.rgb_to_hsv(*before[row, column] / 255)
        h, s = (h + hue / 256) % 1, min(max(s + saturation / 255, 0), 1)
        expected = 255 * np.array(colorsys.hsv_to_rgb(h, s, v))
        assert np.abs(after[row, column] - expected).max() < 6  # Pillow's HSV has 8 bits


def test_hue_wraps_around() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    hues = {
        tuple(np.asarray(OPERATORS["hue_and_saturation"](red, seeded(i)))[0, 0]) for i in range(40)
    }
    assert any(g > 100 > b for _, g, b in hues) and any(b > 100 > g for _, g, b in hues)


def test_those_that_are_pillows() -> None:
    image = Image.fromarray(photo())
    generator = seeded(1)
    expected = ImageEnhance.Sharpness(image).enhance(generator.uniform(0, 2))
    assert OPERATORS["sharpness"](image, seeded(1)) == expected
    generator = seeded(1)
    expected = ImageOps.autocontrast(image, cutoff=generator.uniform(0, 20))
    assert OPERATORS["autocontrast"](image, seeded(1)) == expected
    assert OPERATORS["equalize"](image, seeded(1)) == ImageOps.equalize(image)


def test_rotate_turns_about_the_middle_and_is_black_outside() -> None:
    white = Image.new("RGB", (65, 65), "white")
    for seed in range(6):
        turned = np.asarray(OPERATORS["rotate"](white, seeded(seed)))
        angle = math.radians(abs(seeded(seed).uniform(-45, 45)))
        assert (turned[20:45, 20:45] == 255).all()
        cut = 1 - min(1.0, 2 / (1 + math.tan(angle / 2))) if angle else 0
        assert (turned[0, 0] == 0).all() or angle < 0.05
        assert (turned == 0).mean() >= cut - 0.05


@pytest.mark.parametrize("space", BRIGHTNESS_SPACES)
def test_lightness_as_it_is_leaves_the_picture(space: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    image[0, 0], image[0, 1] = 0, 255
    same = with_lightness(image, space, 1.0, 0.0).astype(int)
    assert np.abs(same - image).max() <= 1


@pytest.mark.parametrize("space", BRIGHTNESS_SPACES)
@pytest.mark.parametrize("times, plus", [(0.8, 0), (1.2, 0), (1, 30), (0.9, -25)])
def test_lightness_of_grey_stays_grey(space: str, times: float, plus: float) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    changed = with_lightness(ramp, space, times, plus).astype(int)
    assert np.abs(changed - changed[..., :1]).max() <= 1
    assert (np.diff(changed[0, :, 0]) >= 0).all()
    if space not in ("Lab", "Luv"):  # where lightness of grey is the grey level
        expected = (np.arange(256) * times + plus).clip(0, 255)
        assert np.abs(changed[0, :, 0] - expected).max() <= 0.51


def test_lightness_in_hls_and_hsv_by_colorsys() -> None:
    image = np.random.default_rng(1).integers(20, 200, (12, 12, 3), np.uint8)
    hls, hsv = with_lightness(image, "HLS", 1.1, 10), with_lightness(image, "HSV", 1.1, 10)
    for row, column in np.ndindex(12, 12):
        pixel = image[row, column] / 255
        h, light, s = colorsys.rgb_to_hls(*pixel)
        expected = 255 * np.array(colorsys.hls_to_rgb(h, min(light * 1.1 + 10 / 255, 1), s))
        assert np.abs(hls[row, column] - expected).max() <= 0.6
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected = 255 * np.array(colorsys.hsv_to_rgb(h, s, min(v * 1.1 + 10 / 255, 1)))
        assert np.abs(hsv[row, column] - expected).max() <= 0.6


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 of one pixel -> L*, a*, b*, X, Y, Z, straight from the standard."""
    v = rgb / 255
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ linear
    f = [np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x / 0.9505, y, z / 1.089)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2]), x, y, z])


@pytest.mark.parametrize("colour", [(120, 90, 60), (60, 100, 110), (90, 140, 90)])
def test_lightness_in_lab_and_luv_moves_nothing_else(colour: tuple[int, int, int]) -> None:
    image = np.full((1, 1, 3), colour, np.uint8)
    before = lab(image[0, 0])
    target = before[0] * 1.1 + 8 * 100 / 255
    after = lab(with_lightness(image, "Lab", 1.1, 8)[0, 0])
    np.testing.assert_allclose(after[:3], [target, before[1], before[2]], atol=1.2)

    def uv(values: np.ndarray) -> np.ndarray:
        x, y, z = values[3:]
        white = 0.9505 + 15 + 3 * 1.089
        u, v = 4 * x / (x + 15 * y + 3 * z), 9 * y / (x + 15 * y + 3 * z)
        return 13 * values[0] * np.array([u - 4 * 0.9505 / white, v - 9 / white])

    after = lab(with_lightness(image, "Luv", 1.1, 8)[0, 0])
    assert after[0] == pytest.approx(target, abs=0.6)
    np.testing.assert_allclose(uv(after), uv(before), atol=1.5)


# -- tiles and textures --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (67, 45)])
def test_shuffled_tiles_are_the_same_tiles(size: tuple[int, int]) -> None:
    image = photo(*size)
    shuffled = shuffle_tiles(image, 8, seeded(0))
    h, w = size[0] // 8, size[1] // 8

    def cut(picture: np.ndarray) -> list[bytes]:
        return [
            picture[r * h : (r + 1) * h, c * w : (c + 1) * w].tobytes()
            for r in range(8)
            for c in range(8)
        ]

    assert sorted(cut(shuffled)) == sorted(cut(image))
    assert cut(shuffled) != cut(image)
    assert np.array_equal(shuffled[8 * h :], image[8 * h :])
    assert np.array_equal(shuffled[:, 8 * w :], image[:, 8 * w :])


def test_procedural_textures_differ() -> None:
    textures = [procedural_texture((40, 70), seeded(i)) for i in range(20)]
    assert all(t.shape == (40, 70, 3) and t.dtype == np.uint8 for t in textures)
    assert len({t.tobytes() for t in textures}) == 20


def test_texture_folder(tmp_path: Path) -> None:
    """Also below sub-folders; a broken file is passed over and named."""
    save(Image.new("RGB", (300, 200), (250, 10, 10)), tmp_path / "red" / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"torn")
    config = only("texture", max_blend=0)
    image = np.full((64, 64, 3), 90, np.uint8)
    image[0, 0] = (90, 91, 90)  # not quite grey, so that colour may come
    plain = Synthesizer(config)
    foreign = Synthesizer(config, textures=tmp_path)
    for i in range(12):
        drawn = foreign.draw(image, category="c", picture="p", index=i)
        assert drawn.source in ("texture", "fallback")
        other = plain.draw(image, category="c", picture="p", index=i)
        assert not np.array_equal(drawn.image, other.image)
        if drawn.source == "texture":  # one colour comes as one colour, save where it was turned
            assert len(np.unique(drawn.image[drawn.mask], axis=0)) < 40
    assert list(foreign.unreadable) == [tmp_path / "b.jpg"]
    assert "b.jpg" in foreign.unreadable[tmp_path / "b.jpg"]


def test_texture_folder_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: no such folder of textures; check the path"):
        Synthesizer(ALWAYS, textures=tmp_path / "gone")
    with pytest.raises(InputError, match="holds no picture; name another folder of textures"):
        Synthesizer(ALWAYS, textures=tmp_path)
    (tmp_path / "b.jpg").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"none of the 1 textures could be read; the first: .*b.j"):
        draw(only("texture"), photo(), textures=tmp_path)


# -- foreground ----------------------------------------------------------------------------------


def disc(*, inside: int, outside: int, size: tuple[int, int] = (96, 80)) -> np.ndarray:
    generator = np.random.default_rng(0)
    row, column = np.mgrid[: size[0], : size[1]]
    hit = (row - 48) ** 2 + (column - 40) ** 2 < 28**2
    grey = np.where(hit, inside, outside)[..., None] + generator.normal(0, 6, (*size, 3))
    return grey.clip(0, 255).astype(np.uint8)


def test_foreground_of_drawn_objects() -> None:
    bright, dark = disc(inside=180, outside=40), disc(inside=60, outside=220)
    assert choose_foreground([bright] * 3) == "bright"
    assert choose_foreground([dark] * 3) == "dark"
    assert choose_foreground([photo()] * 3) == "off"  # a ramp over the whole picture
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert choose_foreground([noise] * 3) == "off"
    flat = np.full((64, 64, 3), 99, np.uint8)
    assert choose_foreground([flat]) == "off"
    half = flat.copy()
    half[:, 30:] = 200  # a part that leaves the picture
    assert choose_foreground([half]) == "off"
    assert choose_foreground([]) == "off"
    assert choose_foreground([bright, bright, dark]) == "bright"
    assert choose_foreground([bright, dark]) == "off"  # no more than half


@pytest.mark.parametrize("mode", ["dark", "bright"])
def test_anomalies_stay_on_the_object(mode: Any) -> None:
    image = disc(inside=180, outside=40) if mode == "bright" else disc(inside=50, outside=200)
    allowed = foreground_mask(image, mode)
    row, column = np.mgrid[:96, :80]
    truth = (row - 48) ** 2 + (column - 40) ** 2 < 28**2
    assert (allowed != truth).mean() < 0.03
    synthesizer = Synthesizer(ALWAYS, foreground={"part": mode})
    for i in range(40):
        drawn = synthesizer.draw(image, category="part", picture="p", index=i)
        assert drawn.mask.any() and not (drawn.mask & ~allowed).any()
    elsewhere = [
        synthesizer.draw(image, category="other", picture="p", index=i).mask for i in range(40)
    ]
    assert np.any([mask & ~allowed for mask in elsewhere])


def test_a_picture_without_foreground_is_all_foreground() -> None:
    flat = np.full((64, 64, 3), 77, np.uint8)
    assert draw(ALWAYS, flat, foreground={"part": "bright"}).mask.any()


def test_otsu_by_trying_all_thresholds() -> None:
    grey = np.random.default_rng(2).choice([20, 30, 140, 150, 160], 500).astype(np.uint8)

    def within(t: int) -> float:
        parts = [grey[grey <= t], grey[grey > t]]
        return sum(len(part) * part.var() for part in parts if len(part))

    threshold, separation = otsu(grey)
    best = min(range(256), key=within)
    assert within(threshold) == pytest.approx(within(best))
    assert separation == pytest.approx(1 - within(best) / (len(grey) * grey.var()))
    assert otsu(np.full((4, 4), 9, np.uint8))[1] == 0


def test_parse_foreground() -> None:
    known = ["screw", "a=b"]
    assert parse_foreground(["screw=dark", "a=b=off"], known) == {"screw": "dark", "a=b": "off"}
    with pytest.raises(InputError, match="'scrw=dark' names no category; did you mean 'screw'"):
        parse_foreground(["scrw=dark"], known)
    with pytest.raises(InputError, match="foreground of 'screw' must be off, dark or bright, got"):
        parse_foreground(["screw=dull"], known)


# -- what every draw promises --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(16, 150),
    width=st.integers(16, 150),
    kind=st.sampled_from(["photo", "black", "white", "noise", "grey"]),
    source=st.sampled_from([*SOURCES, None]),
    index=st.integers(0, 10_000),
)
def test_draws(height: int, width: int, kind: str, source: str | None, index: int) -> None:
    image = {
        "photo": photo(height, width),
        "black": np.zeros((height, width, 3), np.uint8),
        "white": np.full((height, width, 3), 255, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8),
        "grey": np.repeat(photo(height, width)[..., :1], 3, axis=2),
    }[kind]
    before = image.copy()
    config = ALWAYS if source is None else only(source)
    drawn = draw(config, image, index)
    assert np.array_equal(image, before)
    assert drawn.image.shape == image.shape and drawn.image.dtype == np.uint8
    assert drawn.mask.shape == image.shape[:2] and drawn.mask.dtype == bool
    assert drawn.mask.any() and drawn.mask.mean() <= config.max_area
    assert np.array_equal(drawn.image[~drawn.mask], image[~drawn.mask])
    change = np.abs(drawn.image.astype(int) - image)[drawn.mask].max(axis=1)
    assert change.mean() >= config.min_change  # each region's mean is, so that of all
    assert drawn.source in (*([source] if source else SOURCES), "fallback")
    if kind in ("black", "white", "grey"):
        assert (drawn.image == drawn.image[..., :1]).all()


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_works_on_an_ordinary_picture(source: str) -> None:
    drawn = [draw(only(source), photo(128, 128), i) for i in range(20)]
    assert sum(each.source == source for each in drawn) >= 18
    assert len({each.mask.tobytes() for each in drawn}) == 20
    assert len({each.image.tobytes() for each in drawn}) == 20


def test_weights_decide_how_often() -> None:
    config = replace(ALWAYS, scratch=6.0, texture=0.0)
    drawn = [draw(config, photo(), i).source for i in range(300)]
    assert "texture" not in drawn
    assert 0.5 < drawn.count("scratch") / 300 < 0.7  # 6 of 10


def test_clean_draws_are_the_picture() -> None:
    drawn = [draw(SynthesisConfig(), photo(), i) for i in range(200)]
    clean = [each for each in drawn if not each.source]
    assert 70 < len(clean) < 130
    assert all(not each.mask.any() and np.array_equal(each.image, photo()) for each in clean)
    assert all(each.mask.any() for each in drawn if each.source)


def test_invisible_regions_are_put_back() -> None:
    """Self-augment under a heavy blend often changes next to nothing; such a draw is repeated."""
    config = only("self_augment", max_blend=0.99)

    def drawn(least: float) -> list[Synthetic]:
        return [draw(replace(config, min_change=least), photo(), i) for i in range(30)]

    def faintest(draws: list[Synthetic]) -> float:
        return min(np.abs(d.image.astype(int) - photo())[d.mask].mean() for d in draws)

    assert {each.source for each in drawn(0)} == {"self_augment"}
    assert faintest(drawn(0)) < 2
    assert faintest([each for each in drawn(12) if each.source == "self_augment"]) > 4
    assert "fallback" in {each.source for each in drawn(120)}


def test_few_regions() -> None:
    from scipy import ndimage

    def regions(config: SynthesisConfig) -> list[int]:
        masks = [draw(config, photo(128, 128), i).mask for i in range(30)]
        return [ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks]

    assert max(regions(only("texture", few_regions=1))) <= 3
    assert max(regions(only("texture", few_regions=0))) > 3


def test_colour_comes_to_grey_pictures_only_if_allowed() -> None:
    grey = np.repeat(photo()[..., :1], 3, axis=2)
    config = replace(ALWAYS, keep_grey=False)
    assert any((d := draw(config, grey, i).image).max(2).sum() != d.min(2).sum() for i in range(20))


def test_reference_config() -> None:
    config = replace(reference_config(), clean_probability=0)
    assert {draw(config, photo(), i).source for i in range(40)} <= {
        *("self_augment", "tile_shuffle", "fallback")
    }


def test_too_small_a_picture() -> None:
    with pytest.raises(InputError, match="a picture of 40x15 pixels is too small for an anomaly"):
        draw(ALWAYS, photo(15, 40))


# -- a pure function of its arguments ------------------------------------------------------------


def test_threads_and_order_change_nothing() -> None:
    synthesizer = Synthesizer(SynthesisConfig(), seed=5)
    keys = [(picture, index) for picture in ("a", "b") for index in range(20)]

    def one(key: tuple[str, int]) -> tuple[bytes, bytes, str]:
        image = photo(70, 50, seed=ord(key[0]))
        drawn = synthesizer.draw(image, category="c", picture=key[0], index=key[1])
        return drawn.image.tobytes(), drawn.mask.tobytes(), drawn.source

    in_order = {key: one(key) for key in keys}
    shuffled = random.Random(0).sample(keys, len(keys))
    with ThreadPoolExecutor(4) as pool:
        threaded = dict(zip(shuffled, pool.map(one, shuffled), strict=True))
    assert threaded == in_order
    assert len({value[0] for value in in_order.values() if value[2]}) > 15


def test_each_part_of_the_key_counts() -> None:
    def drawn(seed: int, category: str, picture: str, index: int) -> bytes:
        synthesizer = Synthesizer(ALWAYS, seed=seed)
        return synthesizer.draw(
            photo(), category=category, picture=picture, index=index
        ).image.tobytes()

    keys = [
        (0, "c", "p", 0),
        (1, "c", "p", 0),
        (0, "d", "p", 0),
        (0, "c", "q", 0),
        (0, "c", "p", 1),
    ]
    assert len({drawn(*key) for key in keys}) == 5
    assert drawn(*keys[0]) == drawn(*keys[0])
    odd = "\udcff.png"  # a file name that is no UTF-8
    assert drawn(0, "c", odd, 0) == drawn(0, "c", odd, 0)


def test_numbers_of_numpy_are_numbers() -> None:
    index: Any = np.int64(3)
    assert np.array_equal(draw(ALWAYS, photo(), index).image, draw(ALWAYS, photo(), 3).image)


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"clean_probability": 1.5}, "clean_probability must lie between 0 and 1, got 1.5"),
        ({"few_regions": -1}, "few_regions must lie between 0 and 1, got -1"),
        ({"max_blend": math.nan}, "max_blend must lie between 0 and 1, got nan"),
        ({"min_area": 2}, "min_area must lie between 0 and 1, got 2"),
        ({"max_area": 0}, "max_area must lie between min_area and 1, got 0"),
        ({"scratch": -1}, "scratch must be at least 0, got -1"),
        ({"stain": math.inf}, "stain must be at least 0, got inf"),
        ({"min_change": -3}, "min_change must be at least 0, got -3"),
        (dict.fromkeys(SOURCES, 0), "all sources have weight 0: raise one of self_augment, "),
        ({"noise_threshold": 1}, "noise_threshold must lie between -1 and 1, got 1"),
        ({"operators": 0}, "operators must lie between 1 and 10, got 0"),
        ({"operators": 11}, "operators must lie between 1 and 10, got 11"),
        ({"tiles": 1}, "tiles must lie between 2 and 16, got 1"),
    ],
)
def test_settings_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        SynthesisConfig(**options)
    assert str(refused.value).startswith(said)


def test_every_source_has_a_weight() -> None:
    assert set(SOURCES) <= {field.name for field in fields(SynthesisConfig)}
