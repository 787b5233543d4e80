"""Geometry: the way in agrees with Pillow, the way back with what the pixels show."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from allgood.data.transforms import Transform
from allgood.types import InputError

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise over a gradient: fine and coarse structure together, (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, height)[:, None, None] * np.linspace(0, 1, width)[None, :, None]
    return (ramp + generator.integers(0, 56, (height, width, 3))).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(300, 300), (460, 1130), (40, 33), (256, 256), (1, 1), (7, 900)])
def test_resize_agrees_with_pillow(shape: tuple[int, int], interpolation: str) -> None:
    image = photo(*shape)
    got = Transform(size=(256, 200), interpolation=interpolation)(image)
    expected = Image.fromarray(image).resize((200, 256), PILLOW[interpolation])
    difference = got.permute(1, 2, 0).numpy() * 255 - np.asarray(expected, dtype=np.float32)
    assert got.shape == (3, 256, 200) and got.dtype == torch.float32 and got.is_contiguous()
    assert np.abs(difference).max() <= (1.01 if interpolation == "bilinear" else 2.01)
    assert got.min() >= 0 and got.max() <= 1


def test_views_and_read_only_arrays_are_taken() -> None:
    image = photo(20, 30)
    image.flags.writeable = False
    flipped = Transform(size=(20, 30))(image[:, ::-1])
    assert torch.equal(flipped, Transform(size=(20, 30))(image).flip(-1))


@pytest.mark.parametrize(
    "transform, picture, expected",
    [
        (Transform(256), (300, 500), (256, 256)),
        (Transform((128, 320)), (300, 500), (128, 320)),
        (Transform(448, keep_aspect=True, multiple=14), (448, 600), (448, 588)),
        (Transform(450, keep_aspect=True, multiple=14), (450, 450), (448, 448)),
        (Transform(448, keep_aspect=True, multiple=14), (1000, 750), (588, 448)),
        (Transform(256, keep_aspect=True), (10, 30_000), (256, 1024)),
        (Transform(256, keep_aspect=True, multiple=32), (30_000, 10), (1024, 256)),
        (Transform(256, keep_aspect=True), (1, 1), (256, 256)),
        (Transform(256, center_crop=224), (99, 10), (224, 224)),
        (Transform(256, keep_aspect=True, center_crop=224), (99, 10), (224, 224)),
    ],
)
def test_input_size(transform: Transform, picture: tuple, expected: tuple) -> None:
    assert transform.input_size(*picture) == expected
    if max(picture) < 2000:
        assert transform(photo(*picture)).shape == (3, *expected)
        assert transform.mask_to_input(np.ones(picture, bool)).shape == expected
    back = transform.map_to_original(torch.ones(expected), picture)
    assert back.shape == picture and torch.allclose(back, torch.ones(1))


def test_center_crop_takes_the_middle() -> None:
    image = photo(64, 64)
    got = Transform(64, center_crop=40)(image)
    assert torch.equal(got, Transform(64)(image)[:, 12:52, 12:52])


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"size": 250, "multiple": 14}, "size must be a multiple of 14, got 250; use 238 or 252"),
        ({"size": 10, "multiple": 14}, "got 10; use 14"),
        ({"size": 256, "center_crop": 300}, "center_crop must be between 1 and size 256, got 300"),
        ({"size": 256, "center_crop": 225, "multiple": 16}, "center_crop must be a multiple"),
        ({"size": (256, 128), "keep_aspect": True}, "size is the shorter side"),
        ({"size": 10, "keep_aspect": True, "multiple": 14}, "size 10 is below multiple 14"),
        ({"size": 0}, "must be positive"),
        ({"interpolation": "nearest"}, "bilinear or bicubic, got 'nearest'"),
    ],
)
def test_wrong_settings(settings: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        Transform(**settings)


@pytest.mark.parametrize(
    "transform", [Transform(), Transform((64, 96)), Transform(448, True, 14, None, "bicubic")]
)
def test_json_round_trip(transform: Transform) -> None:
    assert Transform.from_json(json.loads(json.dumps(transform.to_json()))) == transform
    with pytest.raises(InputError, match=r"unknown transform setting 'sise'; known: size"):
        Transform.from_json({"sise": 3})


# -- the way back --------------------------------------------------------------------------------

TRANSFORMS = [
    Transform(64),
    Transform((48, 80)),
    Transform(64, keep_aspect=True, multiple=8),
    Transform(64, center_crop=48),
    Transform(64, keep_aspect=True, center_crop=48),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (50, 50)])
def test_a_spot_comes_back_where_it_was(transform: Transform, size: tuple[int, int]) -> None:
    mask = np.zeros(size, bool)
    top, left = size[0] // 2 - 6, size[1] // 2 - 10
    mask[top : top + 14, left : left + 18] = True
    back = transform.map_to_original(transform.mask_to_input(mask), size) > 0.5
    rows, columns = np.nonzero(back.numpy())
    # Within the shift that stretching over the cropped border makes, plus a pixel of rounding.
    tolerance = 4
    assert abs(rows.mean() - (top + 6.5)) <= tolerance
    assert abs(columns.mean() - (left + 8.5)) <= tolerance
    assert back.sum() == pytest.approx(14 * 18, rel=0.35)


def test_outside_the_crop_the_nearest_value_stands() -> None:
    transform = Transform(8, center_crop=4)
    back = transform.map_to_original(torch.arange(16.0).reshape(1, 1, 4, 4), (8, 8))[0, 0]
    assert back[0, 0] == 0 and back[7, 7] == 15 and back[0, 7] == 3
    assert torch.equal(back[2:6, 2:6], torch.arange(16.0).reshape(4, 4))


def test_coarse_maps_and_leading_sides() -> None:
    transform = Transform(448, center_crop=392, multiple=14)
    back = transform.map_to_original(torch.rand(2, 1, 28, 28), (70, 90))
    assert back.shape == (2, 1, 70, 90)
    assert transform.map_to_original(torch.rand(28, 28) > 0.5, (70, 90)).dtype == torch.float32


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_boxes_are_clipped_cover_and_are_never_empty(
    transform: Transform, data: st.DataObject
) -> None:
    size = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    box = tuple(data.draw(st.integers(-20, 120)) for _ in range(4))
    left, top, right, bottom = transform.box_to_original(box, size)
    assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_boxes_follow_the_map(transform: Transform) -> None:
    size = (200, 150)
    h, w = transform.input_size(*size)
    box = (w // 4, h // 3, w // 4 + 9, h // 3 + 12)
    heat = torch.zeros(h, w)
    heat[box[1] : box[3], box[0] : box[2]] = 1
    rows, columns = torch.nonzero(transform.map_to_original(heat, size) > 0.5, as_tuple=True)
    seen = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    for got, expected in zip(transform.box_to_original(box, size), seen, strict=True):
        assert abs(got - expected) <= 2
    assert Transform(64).box_to_original((0, 0, 64, 64), (99, 77)) == (0, 0, 77, 99)
