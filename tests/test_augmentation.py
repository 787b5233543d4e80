"""Flips and quarter turns: the views, how often each is seen, and how pictures come in them."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_trees import save
from PIL import Image
from torch import Tensor

from allgood.data.augmentation import Augmentation, View, asked_of, augmentation, augmentations
from allgood.data.batches import load_batches
from allgood.data.transforms import Transform
from allgood.learning import online_features
from allgood.pictures import Pictures
from allgood.recipes import RECIPES
from allgood.types import GOOD, InputError, Sample

EIGHT = [View(mirrored, turns) for mirrored in (False, True) for turns in range(4)]


def turned(image: np.ndarray, *, horizontal: bool, vertical: bool, turns: int) -> np.ndarray:
    """(H, W, 3): numpy's own flips and turns, one after the other."""
    if horizontal:
        image = np.fliplr(image)
    if vertical:
        image = np.flipud(image)
    return np.rot90(image, turns)


# -- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", EIGHT)
def test_a_view_is_numpys(view: View) -> None:
    image = np.random.default_rng(EIGHT.index(view)).random((5, 5, 3))
    expected = turned(image, horizontal=view.mirrored, vertical=False, turns=view.turns)
    found = view.of(torch.from_numpy(image).permute(2, 0, 1))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_the_eight_views_differ() -> None:
    image = torch.arange(16.0).view(1, 4, 4)
    assert len({tuple(view.of(image).flatten().tolist()) for view in EIGHT}) == 8


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("flips", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, 0.3), (0.2, 0.6)])
def test_shares_are_those_of_flips_and_turns_in_a_row(
    flips: tuple[float, float], rotate: bool
) -> None:
    """Each outcome of the three choices is made by numpy and found again among the views."""
    image = np.arange(16.0).reshape(4, 4, 1)
    expected: Counter[bytes] = Counter()
    for horizontal in (False, True):
        for vertical in (False, True):
            for turns in range(4 if rotate else 1):
                share = (flips[0] if horizontal else 1 - flips[0]) * (
                    flips[1] if vertical else 1 - flips[1]
                )
                result = turned(image, horizontal=horizontal, vertical=vertical, turns=turns)
                expected[result.tobytes()] += share / (4 if rotate else 1)  # type: ignore[assignment]
    shares = Augmentation(*flips, rotate).shares()
    assert next(iter(shares)) == View()
    assert sum(shares.values()) == pytest.approx(1)
    found = {
        view.of(torch.from_numpy(image[None, ..., 0])).numpy().tobytes(): share
        for view, share in shares.items()
    }
    assert found == {image: pytest.approx(share) for image, share in expected.items() if share}


def test_unias_shares() -> None:
    """0.3 and 0.3: a mirrored picture in 0.42 of all cases, by either flip alone."""
    assert augmentation("flip").shares() == {
        View(): pytest.approx(0.49),
        View(True, 2): pytest.approx(0.21),
        View(True): pytest.approx(0.21),
        View(False, 2): pytest.approx(0.09),
    }
    both = augmentation("flip,rotate").shares()
    assert both == {view: pytest.approx(0.105 if view.mirrored else 0.145) for view in EIGHT}


def test_only_a_square_can_be_turned() -> None:
    image = torch.rand(3, 4, 6)
    assert torch.equal(View(True, 2).of(image), image.flip(-2))
    with pytest.raises(InputError, match=r"rotate needs a square input, got 4 x 6: leave rotate"):
        View(False, 1).of(image)


# -- words ---------------------------------------------------------------------------------------


def test_words() -> None:
    assert augmentation("flip") == Augmentation(0.3, 0.3)
    assert augmentation("flip_vertical,rotate") == Augmentation(0.0, 0.3, True)
    assert augmentation("flip_horizontal") == Augmentation(0.3)
    assert augmentation("none") == Augmentation()
    with pytest.raises(InputError, match=r"unknown .* 'rotte'; did you mean 'rotate'\?"):
        augmentation("flip,rotte")
    with pytest.raises(InputError, match=r"flip_vertical must be in \[0, 1\), got 1.0"):
        Augmentation(flip_vertical=1.0)


def test_what_is_asked_comes_before_what_is_given() -> None:
    flip, turn = augmentation("flip"), augmentation("rotate")
    given = {"nut": flip, "pill": turn, "not here": flip}
    categories = ("nut", "pill", "a=b")
    assert augmentations(given, [], categories) == {"nut": flip, "pill": turn}
    assert augmentations(given, ["nut=none", "a=b=flip"], categories) == {
        "pill": turn,
        "a=b": flip,
    }
    assert augmentations(given, ["nut=rotate", "all=flip"], categories) == {
        "nut": turn,
        "pill": flip,
        "a=b": flip,
    }
    assert augmentations(given, ["all=none"], categories) == {}
    asked = ("all=flip", "nut=none", "pill=rotate")
    assert asked_of("nut", asked) == ("all=flip", "nut=none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flip", "--augment 'flip' names no category: write all=flip"),
        ("pil=flip", "--augment: no category 'pil' is learned; did you mean 'pill'? known: "),
        ("pill=", "unknown augmentation ''; known: flip, "),
    ],
)
def test_what_is_asked_in_vain(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        augmentations({}, [text], ("nut", "pill"))
    assert str(caught.value).startswith(said)


def test_the_recipes_of_unias() -> None:
    """Spec 1, but for metal_nut: its mirrored part is a defect."""
    mvtec, visa = RECIPES["unias_mvtec_ad"].augment, RECIPES["unias_visa"].augment
    flip, both = augmentation("flip"), augmentation("flip,rotate")
    assert {name for name, how in mvtec.items() if how == both} == {
        *("bottle", "carpet", "screw", "tile", "wood")
    }
    assert {name for name, how in mvtec.items() if how == flip} == {"grid", "pill", "zipper"}
    assert len(mvtec) == 8
    assert {name for name, how in visa.items() if how.flip_horizontal} == {
        *("candle", "macaroni1", "macaroni2", "capsules", "chewinggum", "fryum", "pipe_fryum")
    }
    assert {name for name, how in visa.items() if how.flip_vertical} == {
        *("macaroni2", "capsules", "chewinggum", "fryum", "pipe_fryum")
    }
    assert {name for name, how in visa.items() if how.rotate} == {"macaroni2", "capsules", "fryum"}
    assert not RECIPES["unias"].augment


# -- pictures ------------------------------------------------------------------------------------

SIDE = 16


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Three pictures of `nut`, the second of them torn, and two of `wood`."""
    generator = np.random.default_rng(0)
    found = []
    for category, name in (("nut", "0"), ("nut", "1"), ("wood", "0"), ("nut", "2"), ("wood", "1")):
        path = tmp_path / category / f"{name}.png"
        save(Image.fromarray(generator.integers(0, 256, (24, 20, 3), np.uint8)), path)
        found.append(Sample(path, category, "train", GOOD, f"{category}/{name}"))
    found[1].path.write_bytes(b"torn")
    return found


def features(pictures: Pictures, encode: Any = lambda image: (image,)) -> Any:
    model = SimpleNamespace(categories=("nut", "wood"), encode=encode)
    return online_features(model, pictures, torch.device("cpu"))


def plain(samples: list[Sample], transform: Transform) -> dict[int, Tensor]:
    """The readable pictures as they are."""
    batches = load_batches(samples, transform, failures=[], batch_size=len(samples))
    images = torch.cat([batch.image for batch in batches])
    return dict(zip((0, 2, 3, 4), images, strict=True))


def test_rows_show_the_pictures_in_their_views(samples: list[Sample]) -> None:
    pictures = Pictures(samples, Transform(SIDE), {}, {"nut": augmentation("flip,rotate")})
    source = features(pictures)
    assert (len(source), source.views.num_pictures) == (5 + 3 * 7, 5)
    assert source.category.tolist() == [0, 0, 1, 0, 1] + [0] * 21
    assert sorted(source.views.shares) == [0, 1, 3]
    images = plain(samples, pictures.transform)
    for picture, image in images.items():
        rows = list(source.views.rows(picture))
        assert rows[0] == picture
        (batch,) = source.batches([rows])
        assert batch.index.tolist() == rows
        views = list(augmentation("flip,rotate").shares()) if picture in (0, 3) else [View()]
        for found, view in zip(batch.features[0], views, strict=True):
            assert torch.equal(found, view.of(image))
    assert not source.failures


def test_rows_come_in_the_order_asked_for(samples: list[Sample]) -> None:
    pictures = Pictures(samples, Transform(SIDE), {}, {"nut": augmentation("flip_horizontal")})
    source = features(pictures)
    images = plain(samples, pictures.transform)
    assert list(source.views.rows(3)) == [3, 7]
    (batch,) = source.batches([[7, 4, 6, 3, 7]])  # 6 is another view of the torn one
    assert batch.index.tolist() == [7, 4, 3, 7]
    for found, expected in zip(
        batch.features[0],
        (images[3].flip(-1), images[4], images[3], images[3].flip(-1)),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert list(source.failures) == [6]
    assert source.failures[6].path == samples[1].path


def test_a_picture_is_read_once_for_all_its_views(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counting(wanted: list[Sample], *args: Any, **kwargs: Any) -> Any:
        read.extend(sample.id for sample in wanted)
        return load_batches(wanted, *args, **kwargs)

    monkeypatch.setattr("allgood.learning.load_batches", counting)
    pictures = Pictures(samples, Transform(SIDE), {}, {"nut": augmentation("flip")})
    source = features(pictures)
    for _ in source.batches([range(5, 8), range(8, 14)]):  # further views of 0; of 1 and 3
        pass
    assert read == ["nut/0", "nut/1", "nut/2"]
    assert sorted(source.failures) == [8, 9, 10]


def test_an_ignored_region_turns_with_its_picture(samples: list[Sample]) -> None:
    ignore = np.zeros((SIDE, SIDE), bool)
    ignore[:4, :6] = True
    how = {"nut": augmentation("rotate")}
    source = features(Pictures(samples, Transform(SIDE), {"nut": ignore}, how))
    (batch,) = source.batches([list(source.views.rows(0))])
    hidden = (batch.features[0] == 0.5).all(dim=1)  # (4, H, W)
    for turns, found in enumerate(hidden.numpy()):
        assert found[np.rot90(ignore, turns)].all()
        assert found.mean() < 0.2


def test_without_augmentation_a_row_is_a_picture(samples: list[Sample]) -> None:
    source = features(Pictures(samples, Transform(SIDE), {}))
    assert len(source) == source.views.num_pictures == 5
    assert not source.views.shares
    assert [source.views.draw(i, seed=0, step=9) for i in range(5)] == list(range(5))
