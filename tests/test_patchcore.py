"""PatchCore's equations against plain computations."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CATEGORIES, fitted, good_batches, picture, with_defect
from torch import Tensor

from allgood.detectors.patchcore import PatchCore, PatchCoreConfig, official_embedding
from allgood.encoders.frozen import FrozenEncoder
from allgood.layers.patch_store import PatchStore
from allgood.scoring import gaussian_smooth
from allgood.types import InputError


def levels_of(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.fixture(scope="module")
def fitted_on_wood(tiny_encoder: FrozenEncoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings -> a PatchCore of one category."""

    def build(**settings: Any) -> PatchCore:
        settings = {"coreset_ratio": 0.2, **settings}
        folder = tmp_path_factory.mktemp("store")
        return fitted("patchcore", tiny_encoder, folder, categories=("wood",), **settings)

    return build


def test_balanced_embedding_is_the_plain_loop(tiny_encoder: FrozenEncoder) -> None:
    """3 x 3 mean (zeros outside count), unit length, then on the first level's grid."""
    fine, coarse = levels_of((1, 3, 6, 4), (1, 5, 3, 2))
    pooled = []
    for level in (fine, coarse):
        _, channels, height, width = level.shape
        result = torch.zeros(channels, height, width, dtype=torch.float64)
        for row in range(height):
            for column in range(width):
                for i in range(max(0, row - 1), min(height, row + 2)):
                    for j in range(max(0, column - 1), min(width, column + 2)):
                        result[:, row, column] += level[0, :, i, j] / 9
        pooled.append(result)
    # Twice the size, half-pixel centres: weights 3/4 and 1/4, edges repeated.
    up = torch.zeros(5, 6, 4, dtype=torch.float64)
    for row in range(6):
        for column in range(4):
            for di, wi in ((0, 0.75), (1 if row % 2 else -1, 0.25)):
                for dj, wj in ((0, 0.75), (1 if column % 2 else -1, 0.25)):
                    i = min(max(row // 2 + di, 0), 2)
                    j = min(max(column // 2 + dj, 0), 1)
                    up[:, row, column] += wi * wj * pooled[1][:, i, j]
    expected = torch.cat([p / p.norm(dim=0) for p in (pooled[0], up)])
    found = PatchCore(PatchCoreConfig(), tiny_encoder, ("wood",)).embed([fine, coarse])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shapes, pretrain, target",
    [
        ([(2, 4, 6, 8), (2, 6, 3, 4)], 12, 9),
        ([(1, 5, 7, 7), (1, 7, 4, 4)], 16, 30),  # wider than C * 9, as adaptive pooling allows
        ([(2, 6, 5, 9)], 10, 10),
        ([(1, 4, 8, 8), (1, 4, 4, 4), (1, 8, 2, 2)], 8, 11),
    ],
)
def test_official_embedding_in_the_papers_order(
    shapes: list[tuple[int, ...]], pretrain: int, target: int
) -> None:
    """Unfold, bring the neighbourhoods to the first grid, pool each, stack, pool: as it is told."""
    levels = levels_of(*shapes)
    batch, _, height, width = levels[0].shape
    per_level = []
    for level in levels:
        neighbourhood = F.unfold(level, 3, padding=1)  # (B, C * 9, N)
        neighbourhood = neighbourhood.unflatten(2, level.shape[-2:])
        resized = F.interpolate(neighbourhood, (height, width), mode="bilinear")
        rows = resized.flatten(2).transpose(1, 2).flatten(0, 1)  # (B * N, C * 9)
        per_level.append(F.adaptive_avg_pool1d(rows[:, None], pretrain)[:, 0])
    stacked = torch.stack(per_level, dim=1).flatten(1)[:, None]
    expected = F.adaptive_avg_pool1d(stacked, target).view(batch, height, width, target)
    found = official_embedding(levels, pretrain, target).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_distances_scores_and_map_by_definition(fitted_on_wood: Any) -> None:
    """k = 3: mean of three squared distances; the map is bilinear, then smoothed."""
    image = with_defect(picture("wood", 50), 20, 30)[None]
    for score_of in ("map_max", "patch_max"):
        detector = fitted_on_wood(num_neighbors=3, image_score=score_of, sigma=2.0)
        prediction = detector.predict(image)
        query = detector.embed(detector.encoder(image))[0].flatten(1).T.double()
        between = (query[:, None] - detector.bank.patches.double()[None]).square().sum(dim=2)
        patches = between.sort(dim=1).values[:, :3].mean(dim=1).view(1, 1, 12, 12)
        raw = F.interpolate(patches, (96, 96), mode="bilinear")
        expected = gaussian_smooth(raw, 2.0)
        torch.testing.assert_close(prediction.anomaly_map.double(), expected, rtol=1e-4, atol=1e-6)
        maximum = expected.max() if score_of == "map_max" else patches.max()
        assert float(prediction.image_score) == pytest.approx(float(maximum), rel=1e-4)


@pytest.mark.parametrize("bank", ["shared", "per_category"])
@pytest.mark.parametrize("b", [1, 3, 9, 10_000])
@torch.inference_mode()
def test_reweighting_is_equations_6_and_7(
    b: int, bank: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    detector = fitted(
        "patchcore",
        tiny_encoder,
        tmp_path,
        coreset_ratio=0.1,
        bank=bank,
        image_score="patch_max",
        reweight=b,
    )
    images = torch.stack([with_defect(picture(name, 60), 20, 30) for name in CATEGORIES])
    category = torch.tensor([0, 1])
    found = detector.predict(images, category).image_score
    embedded = detector.embed(detector.encoder(images)).flatten(2).double()
    for i in range(2):
        rows = detector.bank.patches.double()
        if bank == "per_category":
            rows = rows[detector.bank.category == i]
        distance = (embedded[i].T[:, None] - rows[None]).norm(dim=2)  # (N, M)
        worst = int(distance.amin(dim=1).argmax())
        nearest = int(distance[worst].argmin())  # m*
        around = (rows - rows[nearest]).norm(dim=1).argsort()[:b]  # N_b(m*), m* first
        exponentials = distance[worst][around].exp()
        weight = 1 - distance[worst, nearest].exp() / exponentials.sum()
        score = distance[worst, nearest] * (weight if b > 1 else 1)
        assert float(found[i]) == pytest.approx(float(score), rel=1e-4)


@pytest.mark.parametrize("start", ["first", "approximate", "exact"])
@torch.inference_mode()
def test_the_bank_is_the_coreset_of_all_patches(
    start: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    """The same patches as a plain farthest-point loop over every patch of the good images."""
    detector = fitted("patchcore", tiny_encoder, tmp_path, coreset_ratio=0.05, coreset_start=start)
    images = torch.cat([batch.image for batch in good_batches()])
    patches = detector.embed(tiny_encoder(images)).flatten(2).transpose(1, 2).flatten(0, 1)
    between = torch.cdist(patches.double(), patches.double())
    match start:
        case "first":
            nearest = torch.full((len(patches),), torch.inf, dtype=torch.float64)
        case "approximate":
            anchors = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:10]
            nearest = between[:, anchors].mean(dim=1)
        case "exact":
            nearest = between.norm(dim=1)
    picks = []
    for _ in range(int(0.05 * len(patches))):
        picks.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, between[picks[-1]])
    # Two rounds through the network differ in the last digits.
    torch.testing.assert_close(
        detector.bank.patches[:30], patches[picks[:30]], rtol=1e-4, atol=1e-5
    )
    assert len(detector.bank.patches) == len(picks)


@torch.inference_mode()
def test_official_settings_run_end_to_end(fitted_on_wood: Any) -> None:
    detector = fitted_on_wood(
        embedding="official",
        pretrain_dim=32,
        target_dim=24,
        image_score="patch_max",
        reweight=9,
        num_neighbors=2,
    )
    good = picture("wood", 70)
    scores = detector.predict(torch.stack([good, with_defect(good, 30, 40)])).image_score
    assert detector.bank.patches.shape[1] == 24 and scores[1] > 1.5 * scores[0]


@torch.inference_mode()
def test_at_least_one_row_and_all_rows(fitted_on_wood: Any) -> None:
    assert len(fitted_on_wood(coreset_ratio=1e-6).bank.patches) == 1
    assert len(fitted_on_wood(coreset_ratio=1.0).bank.patches) == 4 * 144


@torch.inference_mode()
def test_too_small_a_bank_for_k(fitted_on_wood: Any) -> None:
    detector = fitted_on_wood(coreset_ratio=1e-6, num_neighbors=2)
    with pytest.raises(ValueError, match="holds 1 rows, too few for 2 neighbours"):
        detector.predict(picture("wood", 0)[None])


@torch.inference_mode()
def test_seed_moves_the_first_pick_only(tiny_encoder: FrozenEncoder, tmp_path: Path) -> None:
    batches = good_batches()
    banks = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(banks))
        model = PatchCore(PatchCoreConfig(coreset_ratio=0.05), tiny_encoder, CATEGORIES, seed)
        model.fit(batches, PatchStore(folder, num_images=8))
        banks.append(model.bank.patches)
    assert torch.equal(banks[0], banks[1])
    assert banks[0].shape == banks[2].shape


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"coreset_ratio": 0.0}, r"coreset_ratio must be in \(0, 1\], got 0.0"),
        ({"coreset_ratio": 1.5}, "got 1.5"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"reweight": 9}, "reweight needs image_score=patch_max"),
        ({"reweight": -1, "image_score": "patch_max"}, "must not be negative"),
        ({"sigma": -1.0}, "must not be negative"),
        ({"target_dim": 0}, "pretrain_dim and target_dim must be at least 1"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PatchCoreConfig(**settings)
