"""What every detector keeps, whatever its method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CATEGORIES,
    batch_of,
    fitted,
    good_batches,
    picture,
    random_encoder,
    trained,
    with_defect,
)

from allgood.costfilter.volume import resize_aligned
from allgood.detectors import DETECTORS, detector_classes
from allgood.encoders.frozen import FrozenEncoder
from allgood.encoders.tiled import TiledEncoder
from allgood.inference import load_weights
from allgood.layers.patch_store import PatchStore, image_number
from allgood.own_state import own_state
from allgood.runs import write_weights
from allgood.types import InputError

DEFECT = (40, 56)
"""top and left of a planted defect of 24 pixels."""
BANKS = ("shared", "per_category")
BANK_DETECTORS = ("patchcore", "anomalydino")
LEARNERS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "dinomaly": ("test_vit", (1, 2), {"decoder_depth": 2}),
    "uniad": (
        "test_efficientnet",
        (0, 1, 2, 3),
        {"grid": 8, "neighbour_mask": 3, "width": 32, "layers": 1, "heads": 2, "steps": 100},
    ),
    "hvqtrans": (
        "test_efficientnet",
        (0, 1, 2, 3),
        {"steps": 50, "grid": 8, "width": 32, "heads": 2, "layers": 2, "codebook_size": 64},
    ),
    "unias": (
        "test_efficientnet",
        (1, 2, 3),
        {"grid": 6, "neighbour_mask": 3, "width": 32, "ffn": 64, "steps": 20},
    ),
    "rd4ad": ("test_efficientnet", (1, 2, 3), {"steps": 60, "learning_rate": 5e-3}),
    "minimaxad": (
        "test_efficientnet",
        (1, 2, 3),
        {"depths": (1, 1, 1), "steps": 25, "learning_rate": 1e-2},
    ),
}
"""Name -> a tiny encoder, its levels, and what is given to `trained`."""


def test_every_detector_is_held_to_the_contract() -> None:
    assert {*BANK_DETECTORS, *LEARNERS} == set(DETECTORS)


def both_kinds(size: tuple[int, int] = (96, 96)) -> torch.Tensor:
    """A good and a defective picture of each category."""
    good = [picture(name, 99, size) for name in CATEGORIES]
    return torch.stack(
        [good[0], with_defect(good[0], *DEFECT), good[1], with_defect(good[1], *DEFECT)]
    )


CATEGORY = torch.tensor([0, 0, 1, 1])


def sides(detector: Any, width: int) -> tuple[int, int]:
    """A size that is not square, but where a detector learned its queries for one size."""
    return (96, getattr(detector, "side", width))


@pytest.fixture(
    scope="module",
    params=[
        *[(name, bank) for name in BANK_DETECTORS for bank in BANKS],
        *[(name, None) for name in LEARNERS],
    ],
    ids=str,
)
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, bank = request.param
    if bank is None:
        encoder_name, levels, settings = LEARNERS[name]
        return trained(name, random_encoder(encoder_name, levels), **settings)
    norm = name == "anomalydino"
    encoder = (
        random_encoder("test_vit", (1,), norm=norm)
        if norm
        else random_encoder("test_efficientnet", (1, 2))
    )
    settings = {} if norm else {"coreset_ratio": 0.2}
    return fitted(name, encoder, tmp_path_factory.mktemp("store"), bank=bank, **settings)


@torch.inference_mode()
def test_prediction(detector: Any) -> None:
    images = both_kinds()
    prediction = detector.predict(images, CATEGORY)
    assert prediction.anomaly_map.shape == (4, 1, 96, 96)
    assert prediction.anomaly_map.dtype == prediction.image_score.dtype == torch.float32
    assert prediction.image_score.shape == (4,)
    assert prediction.anomaly_map.isfinite().all() and prediction.image_score.isfinite().all()
    assert prediction.anomaly_map.min() >= 0
    assert torch.equal(prediction.category, CATEGORY)


@torch.inference_mode()
def test_bf16_is_near_float32(detector: Any) -> None:
    """As `inspect --precision bf16` has it; the distances of the map stay float32."""
    images = both_kinds()
    exact = detector.predict(images)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rounded = detector.predict(images)
    assert torch.equal(rounded.category, exact.category)
    assert rounded.anomaly_map.dtype == rounded.image_score.dtype == torch.float32
    assert not torch.equal(rounded.anomaly_map, rounded.anomaly_map.bfloat16().float())
    difference = (rounded.anomaly_map - exact.anomaly_map).abs().amax(dim=(1, 2, 3))
    assert (difference < 0.05 * exact.anomaly_map.amax(dim=(1, 2, 3))).all()
    torch.testing.assert_close(rounded.image_score, exact.image_score, rtol=0.05, atol=0)


@torch.inference_mode()
def test_a_planted_defect_scores_higher_and_is_found(detector: Any) -> None:
    prediction = detector.predict(both_kinds(), CATEGORY)
    good, bad = prediction.image_score[[0, 2]], prediction.image_score[[1, 3]]
    assert (bad > 1.5 * good).all()
    for i in (1, 3):
        peak = divmod(int(prediction.anomaly_map[i].argmax()), 96)
        for found, begin in zip(peak, DEFECT, strict=True):
            assert begin - 8 <= found < begin + 24 + 8


@torch.inference_mode()
def test_category_is_inferred(detector: Any) -> None:
    images = both_kinds()
    inferred, given = detector.predict(images), detector.predict(images, CATEGORY)
    assert inferred.category.tolist() == CATEGORY.tolist()
    assert torch.equal(inferred.anomaly_map, given.anomaly_map)
    assert torch.equal(inferred.image_score, given.image_score)


@torch.inference_mode()
def test_alone_or_in_a_batch(detector: Any) -> None:
    images = both_kinds()
    together = detector.predict(images, CATEGORY)
    for i in range(4):
        alone = detector.predict(images[i : i + 1], CATEGORY[i : i + 1])
        torch.testing.assert_close(
            alone.anomaly_map[0], together.anomaly_map[i], rtol=1e-3, atol=1e-5
        )


@torch.inference_mode()
def test_images_that_are_not_square_and_maps_of_any_size(detector: Any) -> None:
    size = sides(detector, 160)
    images = both_kinds(size)
    prediction = detector.predict(images, CATEGORY)
    assert prediction.anomaly_map.shape == (4, 1, *size)
    assert detector.predict(images, map_size=(50, 70)).anomaly_map.shape == (4, 1, 50, 70)


@torch.inference_mode()
def test_match(detector: Any) -> None:
    images = both_kinds(sides(detector, 128))
    match = detector.match(images, CATEGORY)
    for query, template in zip(match.query, match.template, strict=True):
        batch, channels, height, width = query.shape
        assert template.shape == (batch, 1, channels, height, width)
    # The host map is a distance between what it shows.
    name = type(detector).__name__
    if name == "UniAS":  # smooths its maps and multiplies them: see test_unias_golden.py
        return
    distances = []
    for query, template in zip(match.query, match.template, strict=True):
        squared = (query - template[:, 0]).square().sum(dim=1, keepdim=True)
        cosine = 1 - torch.cosine_similarity(query, template[:, 0]).unsqueeze(1)
        own = {"PatchCore": squared, "AnomalyDINO": squared / 2}
        own |= dict.fromkeys(("UniAD", "HVQTrans"), squared.sqrt())
        distances.append(resize_aligned(own.get(name, cosine), match.host_map.shape[-2:]))
    distance = torch.stack(distances).sum(dim=0)
    added = name in ("PatchCore", "RD4AD")  # the others take the mean of their levels
    distance = distance if added else distance / len(distances)
    torch.testing.assert_close(match.host_map, distance, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_an_image_is_not_matched_with_itself(
    name: str, bank: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    """As if the bank had been made without it."""
    detector = fitted(name, tiny_encoder, tmp_path / "all", bank=bank, coreset_ratio=1.0)
    batch = good_batches()[1]  # wood
    number = torch.tensor([image_number(sample.id) for sample in batch.sample])
    category = torch.ones(len(number), dtype=torch.int64)
    assert detector.match(batch.image, category).host_map.max() < 1e-5
    match = detector.match(batch.image, category, image_number=number)
    for i in range(len(number)):
        others = [j for j in range(len(number)) if j != i]
        rest = batch_of(
            [batch.image[j] for j in others], ["wood"] * 3, ids=[batch.sample[j].id for j in others]
        )
        without = fitted(
            name,
            tiny_encoder,
            tmp_path / str(i),
            bank=bank,
            coreset_ratio=1.0,
            batches=[good_batches()[0], rest],
        )
        alone = without.match(batch.image[i : i + 1], category[:1])
        torch.testing.assert_close(match.host_map[i], alone.host_map[0], rtol=1e-3, atol=1e-5)
        for ours, theirs in zip(match.template, alone.template, strict=True):
            torch.testing.assert_close(ours[i], theirs[0], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_the_map_follows_from_the_match(detector: Any) -> None:
    image_size = sides(detector, 128)
    images = both_kinds(image_size)
    ignore = torch.zeros(4, 1, *image_size, dtype=torch.bool)
    ignore[..., :50, 20:70] = True
    host_map = detector.match(images, CATEGORY).host_map
    for size in (None, (50, 70), (256, 256)):
        prediction = detector.predict(images, CATEGORY, ignore=ignore, map_size=size)
        ours = detector.anomaly_map(host_map, image_size, ignore=ignore, map_size=size)
        torch.testing.assert_close(ours, prediction.anomaly_map)


@torch.inference_mode()
def test_ignored_regions_are_zero_and_do_not_count(detector: Any) -> None:
    images = both_kinds()
    top, left = DEFECT
    ignore = torch.zeros(4, 1, 96, 96, dtype=torch.bool)
    ignore[..., top - 24 : top + 48, left - 24 :] = True
    prediction = detector.predict(images, CATEGORY, ignore=ignore)
    assert (prediction.anomaly_map[ignore] == 0).all()
    assert (prediction.anomaly_map[~ignore] > 0).any()
    before = detector.predict(images, CATEGORY)
    assert (prediction.image_score[[1, 3]] < before.image_score[[1, 3]]).all()
    everything = detector.predict(images, CATEGORY, ignore=torch.ones_like(ignore))
    assert (everything.anomaly_map == 0).all() and (everything.image_score == 0).all()
    nothing = detector.predict(images, CATEGORY, ignore=torch.zeros_like(ignore))
    assert torch.equal(nothing.anomaly_map, before.anomaly_map)


@torch.inference_mode()
def test_saved_state_gives_the_same_answer(detector: Any, tmp_path: Path) -> None:
    state = own_state(detector)
    assert state and not any(name.startswith("encoder.") for name in state)
    write_weights(tmp_path / "weights.safetensors", state)
    again = type(detector)(detector.config, detector.encoder, detector.categories, seed=5)
    load_weights(again, tmp_path / "weights.safetensors")
    images = both_kinds()
    ours, theirs = again.eval().predict(images), detector.predict(images)
    for field in ("anomaly_map", "image_score", "category"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_two_fits_agree(name: str, tiny_encoder: FrozenEncoder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = fitted(name, tiny_encoder, tmp_path / "a", coreset_ratio=0.1)
    torch.manual_seed(2)
    second = fitted(name, tiny_encoder, tmp_path / "b", coreset_ratio=0.1)
    for key, tensor in own_state(first).items():
        assert torch.equal(tensor, own_state(second)[key]), key


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_fit_goes_on_with_what_the_store_holds(
    name: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    batches = good_batches()
    whole = fitted(name, tiny_encoder, tmp_path / "whole", batches=batches)
    config_class, detector_class = detector_classes(name)
    first = PatchStore(tmp_path / "killed", num_images=8)

    def killed() -> Any:
        yield batches[0]
        first.commit(4, [])
        raise KeyboardInterrupt

    detector = detector_class(config_class(), tiny_encoder, CATEGORIES)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(killed(), first)
    detector = detector_class(config_class(), tiny_encoder, CATEGORIES)
    detector.fit(batches[1:], PatchStore(tmp_path / "killed", num_images=8))
    for key, tensor in own_state(whole).items():
        assert torch.equal(tensor, own_state(detector)[key]), key


@pytest.mark.parametrize("name", BANK_DETECTORS)
@pytest.mark.parametrize("bank", BANKS)
@torch.inference_mode()
def test_shared_bank_of_one_category_is_its_own(
    name: str, bank: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    detectors = [
        fitted(name, tiny_encoder, tmp_path / bank, categories=("wood",), bank=bank)
        for bank in BANKS
    ]
    images = both_kinds()
    first, second = (detector.predict(images) for detector in detectors)
    assert torch.equal(first.anomaly_map, second.anomaly_map)
    assert torch.equal(first.image_score, second.image_score)


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_per_category_is_as_if_the_others_were_not_there(
    name: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    settings = {"bank": "per_category", "coreset_ratio": 0.3}
    both = fitted(name, tiny_encoder, tmp_path / "both", **settings)
    alone = fitted(name, tiny_encoder, tmp_path / "one", categories=("wood",), **settings)
    images = both_kinds()[2:]
    ours, theirs = both.predict(images, torch.tensor([1, 1])), alone.predict(images)
    torch.testing.assert_close(ours.anomaly_map, theirs.anomaly_map)
    as_cloth = both.predict(images, torch.tensor([0, 0]))
    assert (as_cloth.image_score > 2 * ours.image_score[0]).all()


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_ignored_patches_are_not_learned(
    name: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    """A defect in every good picture, ignored there, is an anomaly elsewhere."""
    images = [with_defect(picture("wood", seed), *DEFECT) for seed in range(4)]
    ignore = torch.zeros(4, 1, 96, 96, dtype=torch.bool)
    ignore[..., 8:, 24:] = True
    scores = []
    for i, where in enumerate((None, ignore)):
        batch = batch_of(images, ["wood"] * 4, ignore=where)
        detector = fitted(
            name,
            tiny_encoder,
            tmp_path / str(i),
            batches=[batch],
            categories=("wood",),
            coreset_ratio=0.5,
        )
        scores.append(float(detector.predict(both_kinds()[3:]).image_score))
    assert scores[1] > 1.5 * scores[0]


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_tiles(name: str, tiny_encoder: FrozenEncoder, tmp_path: Path) -> None:
    detector = fitted(
        name,
        TiledEncoder(tiny_encoder, 96),
        tmp_path,
        coreset_ratio=0.2,
        batches=good_batches(size=(128, 96)),
    )
    prediction = detector.predict(both_kinds((128, 96)), CATEGORY)
    assert prediction.anomaly_map.shape == (4, 1, 128, 96)
    assert (prediction.image_score[[1, 3]] > prediction.image_score[[0, 2]]).all()


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_progress_counts_to_the_end(name: str, tiny_encoder: FrozenEncoder, tmp_path: Path) -> None:
    config_class, detector_class = detector_classes(name)
    config = config_class(bank="per_category", coreset_ratio=0.25)
    detector = detector_class(config, tiny_encoder, CATEGORIES)
    told: list[tuple[int, int]] = []
    detector.fit(
        good_batches(), PatchStore(tmp_path, num_images=8), progress=lambda *x: told.append(x)
    )
    assert told == sorted(told) and len(told) >= 2
    # A quarter of the 12 x 12 patches of four images, for each category
    assert len(detector.bank.patches) == 2 * 144
    assert told[-1] == (2 * 144, 2 * 144) and len({t[1] for t in told}) == 1
    assert detector.bank.category.bincount().tolist() == [144, 144]


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_the_memory_budget_does_not_change_the_banks_share(
    name: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    config_class, detector_class = detector_classes(name)
    detector = detector_class(config_class(coreset_ratio=0.1), tiny_encoder, CATEGORIES)
    row = 4 * sum(tiny_encoder.channels)
    store = PatchStore(tmp_path, num_images=8, budget_bytes=8 * 72 * row)  # half of the patches
    detector.fit(good_batches(), store)
    assert store.seen_rows == 2 * len(store.patches()[0]) == 8 * 144
    assert len(detector.bank.patches) == pytest.approx(0.1 * store.seen_rows, abs=2)


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_a_category_without_a_readable_picture(
    name: str, tiny_encoder: FrozenEncoder, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="category 'wood' left nothing to learn from"):
        fitted(name, tiny_encoder, tmp_path, batches=good_batches(("cloth",)))


@pytest.mark.parametrize("name", BANK_DETECTORS)
@torch.inference_mode()
def test_predict_before_fit_says_what_to_do(name: str, tiny_encoder: FrozenEncoder) -> None:
    config_class, detector_class = detector_classes(name)
    detector = detector_class(config_class(), tiny_encoder, ("wood",))
    with pytest.raises(ValueError, match="fit first"):
        detector.predict(both_kinds())


def test_unknown_detectors() -> None:
    with pytest.raises(
        InputError, match=r"did you mean 'patchcore'.* known: anomalydino, dinomaly, .*patchcore, "
    ):
        detector_classes("pathcore")
    with pytest.raises(InputError, match="unknown detector 'xyz'; known: anomalydino, "):
        detector_classes("xyz")
