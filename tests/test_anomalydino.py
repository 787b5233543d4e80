"""AnomalyDINO's rules: distances, background mask, scores, few shots, templates, zero shot."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doors import draw_tree
from scipy import ndimage
from tiny import CATEGORIES, batch_of, fitted, picture, with_defect
from torch import Tensor

from allgood.data.readers import Dataset, read_data
from allgood.data.transforms import Transform
from allgood.detectors import anomalydino
from allgood.detectors.anomalydino import (
    AnomalyDINO,
    AnomalyDINOConfig,
    batched_zero_shot,
    foreground_mask,
)
from allgood.encoders.frozen import FrozenEncoder
from allgood.fitting.banking import fill_bank
from allgood.fitting.setup import few_shots
from allgood.layers import nearest
from allgood.pictures import Pictures
from allgood.types import InputError, Sample


def dino(encoder: FrozenEncoder, folder: Path, **settings: Any) -> Any:
    return fitted("anomalydino", encoder, folder, **settings)


@pytest.mark.parametrize("k", [1, 3])
@torch.inference_mode()
def test_distance_is_one_minus_cosine(k: int, tiny_vit: FrozenEncoder, tmp_path: Path) -> None:
    detector = dino(tiny_vit, tmp_path, bank="shared", num_neighbors=k)
    image = with_defect(picture("wood", 30, (96, 128)), 40, 50)[None]
    match = detector.match(image)
    tokens = tiny_vit(image)[0][0].flatten(1).T.double()
    cosine = F.cosine_similarity(tokens[:, None], detector.bank.patches.double()[None], dim=2)
    expected = (1 - cosine).sort(dim=1).values[:, :k].mean(dim=1)
    found = match.host_map.flatten().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if k == 1:
        assert torch.equal(
            match.template[0][0, 0].flatten(1).T, detector.bank.patches[cosine.argmax(dim=1)]
        )


@torch.inference_mode()
def test_a_reference_image_is_at_distance_zero(tiny_vit: FrozenEncoder, tmp_path: Path) -> None:
    detector = dino(tiny_vit, tmp_path)
    assert detector.bank.patches.norm(dim=1).sub(1).abs().max() < 1e-5
    assert detector.match(picture("wood", 2)[None], torch.tensor([1])).host_map.max() <= 1e-6


@torch.inference_mode()
def test_search_in_blocks_changes_nothing(
    tiny_vit: FrozenEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = dino(tiny_vit, tmp_path, num_neighbors=3)
    image = picture("wood", 31)[None]
    whole = detector.predict(image)
    monkeypatch.setattr(nearest, "_faiss", lambda: None)
    monkeypatch.setattr(nearest, "_QUERY_BLOCK", 5)
    monkeypatch.setattr(nearest, "_BANK_BLOCK", 7)
    blocks = detector.predict(image)
    torch.testing.assert_close(blocks.anomaly_map, whole.anomaly_map, rtol=1e-5, atol=1e-7)


@torch.inference_mode()
def test_score_is_the_mean_of_the_top_patches_and_the_map_follows_the_papers_order(
    tiny_vit: FrozenEncoder, tmp_path: Path
) -> None:
    detector = dino(tiny_vit, tmp_path, top_fraction=0.1, sigma=3.0)
    image = with_defect(picture("wood", 32, (96, 128)), 40, 50)[None]
    category = torch.tensor([1])
    host = detector.match(image, category).host_map
    prediction = detector.predict(image, category, map_size=(150, 203))
    top = host.flatten().sort(descending=True).values[: int(0.1 * 48)]
    assert float(prediction.image_score) == pytest.approx(float(top.mean()), rel=1e-5)
    grown = F.interpolate(host, (150, 203), mode="bilinear")[0, 0].numpy()
    expected = ndimage.gaussian_filter(grown.astype(np.float64), 3.0)  # at the map's own size
    np.testing.assert_allclose(prediction.anomaly_map[0, 0], expected, rtol=1e-4, atol=1e-6)
    few = dino(tiny_vit, tmp_path / "few")  # 1 % of 48 patches is none: the maximum
    assert float(few.predict(image, category).image_score) == pytest.approx(float(host.max()))


def test_a_constant_grid_is_a_constant_map(
    tiny_vit: FrozenEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = dino(tiny_vit, tmp_path)
    constant = torch.full((1, 1, 6, 6), 0.5)
    monkeypatch.setattr(
        detector.bank, "search", lambda *a, **k: (constant, torch.zeros(1, 6, 6, 1).long())
    )
    prediction = detector.predict(picture("wood", 0)[None], map_size=(70, 33))
    torch.testing.assert_close(prediction.anomaly_map, torch.full((1, 1, 70, 33), 0.25))


# Background mask


def two_clusters(foreground: np.ndarray, *, sign: int = 1, gap: float = 40.0) -> Tensor:
    """Tokens (C, h, w) around two points `gap` apart; `sign` turns the axis between them."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.tensor([3.0, -1.0, 0.5, 0.2, 1.0, -0.3])
    axis = sign * axis / axis.norm()
    side = torch.from_numpy(np.where(foreground, 0.5, -0.5)).float() * gap
    tokens = torch.randn(6, *foreground.shape, generator=generator)
    return 5 + tokens + axis[:, None, None] * side


def in_the_middle(height: int, width: int, margin: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[margin:-margin, margin:-margin] = True
    return mask


def closed(mask: np.ndarray) -> np.ndarray:
    """Dilation, then closing, by SciPy; outside is background, but does not erode."""
    ones = np.ones((3, 3))
    mask = ndimage.binary_dilation(ndimage.binary_dilation(mask, ones), ones)
    return ndimage.binary_erosion(mask, ones, border_value=1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_mask_finds_the_object_whatever_the_components_sign(
    size: tuple[int, int], sign: int
) -> None:
    truth = in_the_middle(*size, 4)
    truth[:, 7:10] = False  # a gap: dilation narrows it to one column, closing fills that
    found = foreground_mask(two_clusters(truth, sign=sign), 10.0)
    assert np.array_equal(found.numpy(), closed(truth))


@pytest.mark.parametrize("true_cells, flipped", [(35, True), (36, False)])
def test_the_middle_must_be_more_than_35_percent(true_cells: int, flipped: bool) -> None:
    """17 x 17 patches: the middle is rows and columns 3 to 12, 100 cells."""
    truth = np.zeros((17, 17), dtype=bool)
    truth[:3] = True  # enough outside that both clusters are far from the mean
    middle = np.zeros(100, dtype=bool)
    middle[:true_cells] = True
    truth[3:13, 3:13] = middle.reshape(10, 10)
    # Positive on its largest loading, so that `truth` is the side tried first.
    found = foreground_mask(two_clusters(truth), 10.0)
    assert np.array_equal(found.numpy(), closed(~truth if flipped else truth))


@pytest.mark.parametrize(
    "at, grid, raster",
    [
        ((5, 5), 9, {(5, 4), (5, 5), (5, 6)}),
        ((5, 9), 6, {(5, 8), (5, 9), (6, 0)}),  # at a row's end, along the raster to the next row
        ((0, 0), 4, {(0, 0), (0, 1)}),
    ],
)
def test_a_lone_patch_grows_on_the_grid_or_along_the_raster(
    at: tuple[int, int], grid: int, raster: set[tuple[int, int]]
) -> None:
    truth = np.zeros((10, 10), dtype=bool)
    truth[at] = True
    # Above the threshold on the negative side only: the middle decides against the positive one.
    tokens = two_clusters(truth, sign=-1, gap=400.0)
    on_grid = foreground_mask(tokens, 50.0)
    assert int(on_grid.sum()) == grid
    assert np.array_equal(on_grid.numpy(), closed(truth))
    on_raster = foreground_mask(tokens, 50.0, morphology="raster")
    assert {tuple(cell) for cell in on_raster.nonzero().tolist()} == raster


@torch.inference_mode()
def test_masked_patches_are_zero_and_count_in_the_share(
    tiny_vit: FrozenEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = torch.zeros(6, 6, dtype=torch.bool)
    half[:, 3:] = True
    monkeypatch.setattr(anomalydino, "foreground_mask", lambda *a, **k: half)
    image = with_defect(picture("wood", 33), 30, 10)[None]  # mostly in the masked half
    category = torch.tensor([1])
    off = dino(tiny_vit, tmp_path / "off", mask_background="off", top_fraction=0.6)
    everything = dino(tiny_vit, tmp_path / "all", mask_background="all", top_fraction=0.6)
    host, masked = (d.match(image, category).host_map for d in (off, everything))
    assert torch.equal(masked, host * half)
    score = float(everything.predict(image, category).image_score)
    kept = host[..., half].sort(descending=True).values[0]
    assert score == pytest.approx(float(kept.sum()) / 21, rel=1e-5)  # 18 patches, and three zeros


@torch.inference_mode()
def test_only_listed_categories_are_masked(
    tiny_vit: FrozenEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch_of([picture("wood", i) for i in range(2)], [n] * 2) for n in ("pill", "wood")]
    detector = dino(tiny_vit, tmp_path, batches=batches, categories=("pill", "wood"))
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    monkeypatch.setattr(anomalydino, "foreground_mask", lambda *a, **k: nothing)
    image = torch.stack([picture("cloth", 3)] * 2)
    prediction = detector.predict(image, torch.tensor([0, 1]))
    assert prediction.image_score[0] == 0 and prediction.anomaly_map[0].max() == 0
    assert prediction.image_score[1] > 0


# Few shots, templates


def dataset(counts: dict[str, int]) -> Dataset:
    samples = tuple(
        Sample(Path(f"{name}/{i:03}.png"), name, "train", "good", f"{name}/{i:03}.png")
        for name, count in counts.items()
        for i in range(count)
    )
    return Dataset(samples=samples, layouts={})


@pytest.mark.parametrize("shots, seed", [(1, 0), (2, 0), (2, 2), (4, 1)])
def test_few_shots_are_the_seeds_block_of_each_category(shots: int, seed: int) -> None:
    chosen = few_shots(dataset({"cloth": 9, "wood": 8}), shots, seed)
    expected = [
        f"{name}/{i:03}.png" for name in CATEGORIES for i in range(seed * shots, (seed + 1) * shots)
    ]
    assert [sample.id for sample in chosen] == expected


def test_too_few_files_for_the_shots() -> None:
    with pytest.raises(
        InputError, match="category 'wood' has 8 good pictures, too few for 4 shots"
    ):
        few_shots(dataset({"cloth": 12, "wood": 8}), 4, 2)


@torch.inference_mode()
def test_a_raw_query_changes_nothing_else(tiny_vit: FrozenEncoder, tmp_path: Path) -> None:
    unit = dino(tiny_vit, tmp_path / "unit")
    raw = dino(tiny_vit, tmp_path / "raw", query="raw")
    image = picture("wood", 3)[None]
    ours, theirs = raw.match(image), unit.match(image)
    assert torch.equal(ours.host_map, theirs.host_map)
    assert torch.equal(ours.template[0], theirs.template[0])
    assert torch.equal(ours.query[0], tiny_vit(image)[0])
    torch.testing.assert_close(theirs.query[0], F.normalize(ours.query[0], dim=1))


@torch.inference_mode()
def test_templates_keep_n_random_images_of_each_category(
    tiny_vit: FrozenEncoder, tmp_path: Path
) -> None:
    """With their rotated copies; whatever the order of the images; another seed, others."""
    ids = [f"{i:03}.png" for i in range(8)]
    turned = 100  # a "rotated copy" is another picture with the same id

    def images_of(category: str, order: list[int]) -> list[Any]:
        return [
            batch_of(
                [picture(category, seed + i) for i in order],
                [category] * 8,
                ids=[ids[i] for i in order],
            )
            for seed in (0, turned)
        ]

    def kept(order: list[int], name: str, seed: int = 0) -> dict[str, set[int]]:
        """Which pictures' tokens stand in the bank, all of them or none of them."""
        batches = [b for category in CATEGORIES for b in images_of(category, order)]
        detector = dino(tiny_vit, tmp_path / name, batches=batches, templates=3, seed=seed)
        assert detector.bank.category.bincount().tolist() == [3 * 2 * 36] * 2
        found: dict[str, set[int]] = {}
        for index, category in enumerate(CATEGORIES):
            for shift in (0, turned):
                images = torch.stack([picture(category, shift + i) for i in range(8)])
                host = detector.match(images, torch.full((8,), index)).host_map
                known = (host.flatten(1).amax(dim=1) < 1e-6).nonzero().squeeze(1)
                found[f"{category} {shift}"] = set(known.tolist())
        return found

    first = kept([0, 1, 2, 3, 4, 5, 6, 7], "first")
    assert all(len(images) == 3 for images in first.values()) and len(first) == 4
    for category in CATEGORIES:
        assert first[f"{category} 0"] == first[f"{category} {turned}"]
    assert kept([5, 3, 7, 1, 0, 2, 6, 4], "order") == first
    assert kept([0, 1, 2, 3, 4, 5, 6, 7], "seed", seed=1) != first


def test_templates_are_whole_however_many_pictures_there_are(
    tiny_vit: FrozenEncoder, tmp_path: Path
) -> None:
    """The memory is for those that are remembered."""
    samples = read_data([draw_tree(tmp_path / "data", train=6)]).train
    model = AnomalyDINO(AnomalyDINOConfig(templates=2), tiny_vit, ("cloth", "wood")).eval()
    width = tiny_vit.channels[0]
    fill_bank(
        model,
        Pictures(samples, Transform(96, multiple=tiny_vit.multiple), {}),
        angles=(0,),
        folder=tmp_path / "patches",
        budget_bytes=2 * 2 * 36 * width * 4,
        batch_size=4,
        seed=0,
    )
    assert model.bank.category.bincount().tolist() == [2 * 36] * 2
    assert len(model.references.features) == 12  # of all


@torch.inference_mode()
def test_more_templates_than_images_keep_all(tiny_vit: FrozenEncoder, tmp_path: Path) -> None:
    few = dino(tiny_vit, tmp_path / "a", templates=50)
    assert torch.equal(few.bank.patches, dino(tiny_vit, tmp_path / "b").bank.patches)


# Batched zero shot


def plain_zero_shot(tokens: Tensor, fraction: float) -> Tensor:
    images, patches, _ = tokens.shape
    scores = torch.zeros(images, patches, dtype=torch.float64)
    for i in range(images):
        others = [tokens[j, p].double() for j in range(images) if j != i for p in range(patches)]
        for p in range(patches):
            distance = (
                torch.stack(
                    [1 - F.cosine_similarity(tokens[i, p].double(), o, dim=0) for o in others]
                )
                .sort()
                .values
            )
            limit = distance[int(fraction * len(others)) - 1]  # the q-th smallest
            below = distance[distance < limit]
            scores[i, p] = below.mean()
    return scores


@pytest.mark.parametrize("chunk_size", [3, 7, 4096])
def test_zero_shot_by_definition(chunk_size: int) -> None:
    tokens = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    found = batched_zero_shot(tokens, fraction=0.4, chunk_size=chunk_size)
    torch.testing.assert_close(found.double(), plain_zero_shot(tokens, 0.4), rtol=1e-4, atol=1e-6)


def test_zero_shot_leaves_the_image_itself_out() -> None:
    """An odd image, made of one token many times, must not vouch for itself."""
    tokens = torch.ones(5, 10, 3) + 0.01 * torch.randn(
        5, 10, 3, generator=torch.Generator().manual_seed(1)
    )
    tokens[2] = torch.tensor([1.0, -1.0, 0.0])
    scores = batched_zero_shot(tokens, fraction=0.1)
    assert scores[2].min() > 0.9 and scores[[0, 1, 3, 4]].max() < 0.01


def test_zero_shot_inequality_is_strict() -> None:
    """Distances to the other image: 0, then 1 four times. q = 1, so that only the 0 is below."""
    axes = torch.eye(6)
    tokens = torch.stack([axes[[0, 1, 2, 3, 4]], axes[[0, 5, 5, 5, 5]]])
    scores = batched_zero_shot(tokens, fraction=0.6)  # rank 3
    assert float(scores[0, 0]) == pytest.approx(0, abs=1e-6)
    identical = batched_zero_shot(torch.ones(3, 4, 2), fraction=0.5)  # nothing is below 0
    assert identical.abs().max() == 0 and identical.isfinite().all()


def test_zero_shot_background_scores_zero() -> None:
    tokens = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(2))
    foreground = torch.rand(3, 20, generator=torch.Generator().manual_seed(3)) > 0.5
    scores = batched_zero_shot(tokens, fraction=0.1, foreground=foreground)
    assert (scores[~foreground] == 0).all() and (scores[foreground] > 0).all()


def test_zero_shot_needs_enough_patches() -> None:
    tokens = torch.randn(2, 1999, 2)
    with pytest.raises(
        InputError, match=r"2 images of 1999 patches are too few .* at least 3 images"
    ):
        batched_zero_shot(tokens)
    assert batched_zero_shot(torch.randn(2, 2000, 2)).shape == (2, 2000)


@pytest.mark.parametrize("fraction, patches", [(0.001, 1999), (0.001, 2000), (0.3, 5), (0.01, 64)])
def test_the_number_of_images_asked_for_is_the_least_that_works(
    fraction: float, patches: int
) -> None:
    with pytest.raises(InputError) as error:
        batched_zero_shot(torch.randn(1, patches, 2), fraction=fraction)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    batched_zero_shot(torch.randn(needed, patches, 2), fraction=fraction, chunk_size=100_000)
    if needed > 2:
        with pytest.raises(InputError):
            batched_zero_shot(torch.randn(needed - 1, patches, 2), fraction=fraction)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_fraction": 0.0}, r"top_fraction must be in \(0, 1\], got 0.0"),
        ({"coreset_ratio": 2.0}, "coreset_ratio must be in"),
        ({"num_neighbors": 0}, "num_neighbors and templates must be at least 1"),
        ({"templates": 0}, "num_neighbors and templates must be at least 1"),
        ({"sigma": -4.0}, "sigma must not be negative"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnomalyDINOConfig(**settings)
