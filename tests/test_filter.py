"""The door `filter`: a CostFilter behind a fitted detector, trained on synthetic anomalies."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doors import Command, content, mask
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from test_contract import LEARNERS
from tiny import CATEGORIES, good_batches, picture, random_encoder, trained, with_defect
from tiny import fitted as fitted_bank
from torch import Tensor

import allgood as library
from allgood.costfilter import filtered
from allgood.costfilter.config import FilterConfig
from allgood.costfilter.filtered import FilteredDetector, volume_grid
from allgood.costfilter.validation import best_fusion, mean_over, validate
from allgood.costfilter.volume import compare, cost_volume, resize_aligned
from allgood.data.images import read_image
from allgood.filtering import _held_out
from allgood.own_state import load_own_state, own_state
from allgood.scoring import resize_map, top_fraction_mean
from allgood.types import InputError, Sample, TrainingBatch

pytest_plugins = ["doors_fixtures"]

FILTER = ["--train", "steps=3", "batch_size=4", "--draws", "1", "--max-false-alarm", "0.1"]
SETTINGS = ["--settings", "mask_side=32"]
HOSTS = ("patchcore", "anomalydino", *LEARNERS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `small` filter becomes a tiny one."""
    monkeypatch.setattr(filtered, "small", lambda c: replace(c, width=8, side=16, stem=16))


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made(request.param, tmp_path_factory.mktemp("store"))


def made(name: str, folder: Path) -> Any:
    """A host that has learned next to nothing."""
    if name in LEARNERS:
        encoder_name, levels, settings = LEARNERS[name]
        return trained(name, random_encoder(encoder_name, levels), **{**settings, "steps": 5})
    encoder = (
        random_encoder("test_vit", (1,), norm=True)
        if name == "anomalydino"
        else random_encoder("test_efficientnet", (1, 2))
    )
    return fitted_bank(name, encoder, folder, coreset_ratio=0.5)


def behind(host: Any, **settings: Any) -> FilteredDetector:
    config = FilterConfig(**settings)
    channels, grid = filtered.shape_of_match(host, (96, 96), torch.device("cpu"))
    return FilteredDetector(config, host, channels, volume_grid(config, grid))


def drawings() -> tuple[Tensor, Tensor, Tensor]:
    """Good pictures of both categories, every second one with a defect; masks; categories."""
    images, masks, category = [], [], []
    for index, name in enumerate(CATEGORIES):
        for seed in range(2):
            image, mask = picture(name, seed), torch.zeros(1, 96, 96)
            if seed % 2:
                top, left = 26 + 32 * index, 30 + 20 * index
                image, mask[:, top : top + 24, left : left + 24] = with_defect(image, top, left), 1
            images.append(image)
            masks.append(mask)
            category.append(index)
    return torch.stack(images), torch.stack(masks), torch.tensor(category)


def drawn(model: FilteredDetector, *, whole: bool = False) -> TrainingBatch:
    images, masks, category = drawings()
    with torch.no_grad():
        features = model.encode(images, masks, category, torch.zeros(4).long(), whole=whole)
    return TrainingBatch(features, category, torch.arange(4))


@pytest.mark.usefixtures("tiny_network")
def test_a_filter_learns_behind_every_host(host: Any) -> None:
    assert_a_filter_learns(host, "match")


@pytest.mark.parametrize("name", ["patchcore", "rd4ad"])
@pytest.mark.usefixtures("tiny_network")
def test_a_filter_learns_from_good_pictures_kept_for_it(name: str, tmp_path: Path) -> None:
    assert_a_filter_learns(made(name, tmp_path), "good")


def assert_a_filter_learns(host: Any, templates: Any) -> None:
    model = behind(host, templates=templates, num_templates=2).train()
    if templates == "good":
        with torch.no_grad():
            levels = [
                host.match(batch.image[:2], torch.full((2,), i)).query
                for i, batch in enumerate(good_batches())
            ]
        model.keep_templates([torch.cat(level) for level in zip(*levels, strict=True)])
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    batch = drawn(model)
    model.prepare([batch])
    assert (model.good_range[:, 1] > model.good_range[:, 0]).all()
    optimizer = torch.optim.Adam(model.network.parameters(), lr=4e-3)
    losses = []
    for step in range(15):
        optimizer.zero_grad()
        loss = model.training_loss(batch, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.eval()
    with torch.inference_mode():
        image = torch.stack([picture("wood", 1), with_defect(picture("wood", 1), 58, 50)])
        category = torch.ones(2, dtype=torch.int64)
        prediction = model.predict(image, category)
        assert prediction.anomaly_map.shape == (2, 1, 96, 96)
        assert prediction.image_score[1] > prediction.image_score[0]
        assert prediction.category.tolist() == [1, 1]
        # Folded or not, in parts or together: the same maps.
        match = model.match(image, category)
        maps = model.maps(match, model.probability(match, (96, 96)), (96, 96))
        torch.testing.assert_close(maps.fused, (maps.filter + maps.host) / 2)
        torch.testing.assert_close(maps.fused, prediction.anomaly_map)
        assert maps.filter.min() >= 0 and maps.filter.max() <= 1 and maps.host.min() >= 0
        again = behind(host, templates=templates, num_templates=2)
        load_own_state(again, {k: v.clone() for k, v in own_state(model).items()})
        other = again.eval().predict(image, category)
        torch.testing.assert_close(other.anomaly_map, prediction.anomaly_map)
        model._folded = []
        torch.testing.assert_close(
            model.predict(image, category).anomaly_map, prediction.anomaly_map, atol=1e-4, rtol=1e-3
        )
        ignore = torch.zeros(2, 1, 96, 96, dtype=torch.bool)
        ignore[..., 40:, :] = True
        hidden = model.predict(image, category, ignore=ignore, map_size=(48, 50))
        assert hidden.anomaly_map.shape == (2, 1, 48, 50)
        assert (hidden.anomaly_map[..., 21:, :] == 0).all()


def test_the_hosts_scale() -> None:
    """Good pixels' median is 0, their 99.5th percentile 0.5, per category."""
    host = trained("dinomaly", random_encoder("test_vit", (1, 2)), steps=0, decoder_depth=2)
    model = behind(host)
    generator = torch.Generator().manual_seed(0)
    host_map = torch.rand((400, 1, 6, 6), generator=generator) * 3 + 1
    category = torch.arange(400) % 2
    host_map[category == 1] *= 10
    mask = torch.zeros(400, 1, 8, 8)
    mask[:2] = 1  # painted: no good pixels
    host_map[:2] = 1000
    host_map *= 2e-9  # less than float16 holds, as a cache would have it
    parts = [part.half().float() for part in filtered._parted(host_map)]
    model.prepare([TrainingBatch((*parts, mask), category, torch.arange(400))])
    for index, scale in ((0, 1), (1, 10)):
        good = host_map[2:][category[2:] == index].flatten()
        expected = torch.tensor([good.median(), good.quantile(0.995)])
        torch.testing.assert_close(model.good_range[index], expected, rtol=1e-3, atol=1e-3 * scale)
    scaled = model._on_scale(host_map[2:], category[2:])
    assert scaled.min() == 0
    assert scaled.flatten().quantile(0.995) == pytest.approx(0.5, abs=1e-2)


@torch.no_grad()
def test_what_a_filter_learns_of_the_hosts_map(host: Any) -> None:
    """No more than its grid, and through a cache in float16 all but the rounding."""
    model = behind(host)
    batch, whole = drawn(model), drawn(model, whole=True)
    expected, _ = model.match_of(whole)
    images, _, category = drawings()
    assert torch.equal(expected.host_map, host.match(images, category).host_map)
    rounded = [feature.half().float() for feature in batch.features]
    found, _ = model.match_of(TrainingBatch(tuple(rounded), batch.category, batch.index))
    grid = model.volume.grid
    assert found.host_map.numel() <= max(4 * grid[0] * grid[1], expected.host_map.numel() // 4)
    largest = expected.host_map.amax(dim=(1, 2, 3), keepdim=True)
    wanted = resize_aligned(expected.host_map, (found.host_map.shape[-2], found.host_map.shape[-1]))
    torch.testing.assert_close(found.host_map / largest, wanted / largest, rtol=1e-3, atol=1e-6)
    # What guides the network is the same in training as for an image that is judged.
    model.prepare([batch])
    found, _ = model.match_of(batch)
    comparison = compare(expected.query, expected.template, model.volume)
    torch.testing.assert_close(
        model._guidance(comparison, found, None), model._guidance(comparison, expected, (96, 96))
    )


@pytest.mark.parametrize(
    ("size", "grid", "expected"),
    [
        ("small", (20, 28), (20, 28)),
        ("small", (112, 40), (32, 32)),
        ("full", (112, 40), (64, 40)),
    ],
)
def test_features_are_compared_on_no_finer_grid_than_the_networks(
    size: Any, grid: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert volume_grid(FilterConfig(size=size), grid) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fusion": 1.5}, "fusion must be in"),
        ({"num_templates": 0}, "num_templates must be at least 1"),
        ({"top_fraction": 0.0}, "top_fraction must be in"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        FilterConfig(**settings)


@pytest.mark.usefixtures("tiny_network")
def test_every_command_takes_a_filtered_run(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "filtered"
    answer = allgood("filter", run, tree, "--out", out, *FILTER, *SETTINGS)
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(out)
    files = {"config.json", "weights.safetensors", "calibration.json", "provenance.json"}
    assert set(content(out)) == {*files, "training.jsonl"}
    config = json.loads((out / "config.json").read_text())
    assert config["filter"]["settings"]["fusion"] == 0.5
    table = json.loads((out / "provenance.json").read_text())["synthetic_validation"]
    assert set(table["categories"]) == set(CATEGORIES) and not table["chosen"]
    assert "pixel AP on" in answer.err and f"initial map {table['mean']['initial_map']:.3f}" in (
        answer.err
    )
    answer = allgood("evaluate", out, tree)
    assert answer.code == 0
    assert_parts_are_shown(out, tree, answer.out)
    bad = tree / "wood" / "test" / "hole" / "000.png"
    (record,) = allgood("inspect", out, bad, "--overlays", tmp_path / "heat").records
    assert record["category"] == "wood" and record["p_value"] is not None
    host, filtered = library.Inspector(run), library.Inspector(out)
    assert torch.equal(host.detector.bank, filtered.detector.host.bank)
    # The same training gives the same filter, and the fusion is chosen after it.
    chosen = tmp_path / "chosen"
    words = [*FILTER, *SETTINGS, "--fusion", "auto"]
    assert allgood("filter", run, tree, "--out", chosen, *words).code == 0
    assert content(chosen)["weights.safetensors"] == content(out)["weights.safetensors"]
    found = json.loads((chosen / "provenance.json").read_text())["synthetic_validation"]
    assert found["chosen"] and found["categories"] == table["categories"]
    settled = json.loads((chosen / "config.json").read_text())["filter"]["settings"]["fusion"]
    assert found["mean"]["fusion"][f"{settled:g}"] == max(found["mean"]["fusion"].values())
    assert library.Inspector(chosen).detector.config.fusion == settled
    words = [*FILTER, *SETTINGS, "templates=good", "num_templates=2", "--no-cache"]
    assert allgood("filter", run, tree, "--out", tmp_path / "good", *words).code == 0
    assert library.Inspector(tmp_path / "good").detector.template_0.abs().sum() > 0


def assert_parts_are_shown(out: Path, tree: Path, table: str) -> None:
    """Detector, filter and both of a run, against a plain computation on every test picture."""
    numbers = json.loads((out / "metrics.json").read_text())
    inspector = library.Inspector(out)
    for name in CATEGORIES:
        index = torch.tensor([inspector.index_of(name)])
        found: dict[str, list[Any]] = {part: [] for part in ("host", "filter", "fused", "mask")}
        score: dict[str, list[float]] = {part: [] for part in ("host", "filter", "fused")}
        bad = []
        for path in sorted((tree / name / "test").rglob("*.png")):
            picture = inspector.transform(read_image(path))[None]
            with torch.inference_mode():
                match = inspector.detector.match(picture, index)
                probability = inspector.detector.probability(match, (64, 64))
                maps = inspector.detector.maps(match, probability, (64, 64))
            is_bad = path.parent.name != "good"
            bad.append(is_bad)
            for part, scores in score.items():
                values = getattr(maps, part)
                scores.append(float(top_fraction_mean(values, 0.0038)))
                found[part].append(resize_map(values, (256, 256)).flatten())
            drawn = np.zeros((256, 256), bool)
            if is_bad:
                drawn = np.asarray(mask().resize((256, 256), Image.Resampling.NEAREST)) > 0
            found["mask"].append(torch.from_numpy(drawn).flatten())
        positive = torch.cat(found["mask"]).numpy()
        for part, where in (
            ("fused", numbers["categories"]),
            ("host", numbers["parts"]["host"]["categories"]),
            ("filter", numbers["parts"]["filter"]["categories"]),
        ):
            pixel_ap = average_precision_score(positive, torch.cat(found[part]).numpy())
            assert where[name]["pixel_ap"]["value"] == pytest.approx(pixel_ap, abs=2e-3), part
            image_auroc = roc_auc_score(bad, score[part])
            assert where[name]["image_auroc"]["value"] == pytest.approx(image_auroc), part
    assert numbers["parts"]["fusion"] == 0.5
    assert "with and without the filter" in table
    page = (out / "report.html").read_text()
    assert 'id="filter"' in page and page.count("detector alone") == len(CATEGORIES)
    assert "Behind the detector stands a CostFilter that has learned synthetic" in page


def test_pictures_to_measure_on_are_kept_from_training() -> None:
    samples = [
        Sample(Path(f"{name}/{i}"), name, "train", "good", f"{name}/{i}")
        for name, count in (("wood", 40), ("cloth", 400), ("one", 1))
        for i in range(count)
    ]
    taught, held = _held_out(samples, seed=3)
    counts = Counter(sample.category for sample in held)
    assert counts == {"wood": 4, "cloth": 16}
    assert sorted([*taught, *held], key=samples.index) == samples
    assert _held_out(samples, seed=3)[1] == held != _held_out(samples, seed=4)[1]


@pytest.mark.usefixtures("tiny_network")
def test_what_is_measured_on_synthetic_pictures(host: Any) -> None:
    model = behind(host, fusion=0.25)
    model.prepare([drawn(model)])
    batch = drawn(model, whole=True)
    model.eval()
    table = validate(model, [batch], (96, 96))
    assert table is not None
    with torch.inference_mode():
        match, mask = model.match_of(batch)
        maps = model.maps(match, model.probability(match, (96, 96)), (96, 96))
        costs = cost_volume(compare(match.query, match.template, model.volume))
        least = resize_aligned(costs.amin(dim=1).mean(dim=1, keepdim=True), (96, 96))
    positive = mask.flatten().numpy() > 0.5
    for name, values in (("initial_map", least), ("host", maps.host), ("filter", maps.filter)):
        expected = average_precision_score(positive, values.flatten().numpy())
        assert table[name] == pytest.approx(expected, abs=1e-4), name
    assert table["fusion"]["0"] == table["host"] and table["fusion"]["1"] == table["filter"]
    expected = average_precision_score(positive, maps.fused.flatten().numpy())
    assert table["fusion"]["0.25"] == pytest.approx(expected, abs=1e-4)
    clean = TrainingBatch((*batch.features[:-1], mask * 0), batch.category, batch.index)
    assert validate(model, [clean], (96, 96)) is None
    assert validate(model, [], (96, 96)) is None


def test_the_best_fusion() -> None:
    def table(*values: float) -> dict[str, Any]:
        return {
            **dict.fromkeys(("initial_map", "host", "filter"), values[0]),
            "fusion": dict(zip(("0", "0.5", "1"), values, strict=True)),
        }

    mean = mean_over({"a": table(0.2, 0.6, 0.1), "b": table(0.4, 0.2, 0.7)})
    assert mean["host"] == pytest.approx(0.3)
    assert mean["fusion"] == pytest.approx({"0": 0.3, "0.5": 0.4, "1": 0.4})
    assert best_fusion(mean) == 0.5  # of equal ones the smaller
    assert best_fusion(table(0.9, 0.1, 0.2)) == 0


def test_what_a_filter_refuses(allgood: Command, run: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["filter", run, tree, "--out", out]
    assert allgood.refused(*words, "--train", "steps=0").startswith("steps must be at least 1")
    assert allgood.refused(*words, "--settings", "fusion=2").startswith("fusion must be in")
    assert allgood.refused(*words, "--synthesis", "spott=1").startswith("unknown setting 'spott'")
    assert "trained in fp32" in allgood.refused(*words, "--train", "precision=bf16")
    assert allgood.refused(*words, "--draws", "0").startswith("draws must be at least 1")
    said = allgood.refused("filter", run, tree / "wood" / "test" / "good", "--out", out)
    assert "was fitted on" in said or "category" in said
    assert not out.exists()


@pytest.mark.usefixtures("tiny_network")
def test_the_network_runs_once_whatever_size_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = behind(made("patchcore", tmp_path)).eval()
    image, category = picture("wood", 1)[None], torch.ones(1, dtype=torch.int64)
    calls: list[None] = []
    once = model._logits
    monkeypatch.setattr(model, "_logits", lambda *a, **k: calls.append(None) or once(*a, **k))
    with torch.inference_mode():
        small, large = (
            model.predict(image, category),
            model.predict(image, category, map_size=(50, 70)),
        )
    assert len(calls) == 2 and large.anomaly_map.shape == (1, 1, 50, 70)
    torch.testing.assert_close(small.image_score, large.image_score)
