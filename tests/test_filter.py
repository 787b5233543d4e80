"""The door `filter`: a CostFilter behind a fitted detector, trained on synthetic anomalies."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_trees import save
from doors import TINY, Command, content, draw_tree, mask
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
from allgood.data.readers import read_data
from allgood.data.synthesis import SynthesisConfig, Synthesizer
from allgood.data.transforms import Transform
from allgood.drawing import Drawings, require_others
from allgood.filtering import job as filter_job
from allgood.filtering.setup import draws_in_time, hold_out, keep_templates
from allgood.ignored import hide
from allgood.layers.patch_store import image_number
from allgood.own_state import load_own_state, own_state
from allgood.pictures import Pictures
from allgood.runs import write_json
from allgood.scoring import resize_map, top_fraction_mean
from allgood.training.config import TrainConfig
from allgood.types import InputError, Sample, TrainingBatch

pytest_plugins = ["doors_fixtures"]

FILTER = ["--train", "steps=3", "batch_size=4", "--draws", "1"]
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


def made(name: str, folder: Path, **given: Any) -> Any:
    """A detector that has learned next to nothing."""
    if name in LEARNERS:
        encoder_name, levels, settings = LEARNERS[name]
        return trained(name, random_encoder(encoder_name, levels), **{**settings, "steps": 5})
    encoder = (
        random_encoder("test_vit", (1,), norm=True)
        if name == "anomalydino"
        else random_encoder("test_efficientnet", (1, 2))
    )
    return fitted_bank(name, encoder, folder, coreset_ratio=0.5, **given)


def behind(host: Any, **settings: Any) -> FilteredDetector:
    config = FilterConfig(**settings)
    channels, grid = filtered.shape_of_match(host, (96, 96), torch.device("cpu"))
    return FilteredDetector(config, host, channels, volume_grid(config, grid))


def drawings(*, painted: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Good pictures of both categories, every second one with a defect unless nothing is `painted`;
    masks; categories."""
    images, masks, category = [], [], []
    for index, name in enumerate(CATEGORIES):
        for seed in range(2):
            image, mask = picture(name, seed), torch.zeros(1, 96, 96)
            if painted and seed % 2:
                top, left = 26 + 32 * index, 30 + 20 * index
                image, mask[:, top : top + 24, left : left + 24] = with_defect(image, top, left), 1
            images.append(image)
            masks.append(mask)
            category.append(index)
    return torch.stack(images), torch.stack(masks), torch.tensor(category)


def drawn(
    model: FilteredDetector,
    *,
    painted: bool = True,
    whole: bool = False,
    ignore: Tensor | None = None,
) -> TrainingBatch:
    images, masks, category = drawings(painted=painted)
    if ignore is None:
        ignore = torch.zeros_like(masks).bool()
    images, masks = hide(images, ignore), masks * ~ignore
    numbers = torch.zeros(4).long()
    with torch.no_grad():
        features = model.encode(images, masks, ignore, category, numbers, whole=whole)
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
        model.keep_templates(levels)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    batch = drawn(model)
    model.set_scale([drawn(model, painted=False)])
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
        again = behind(host, templates=templates, num_templates=2).eval()
        again.predict(image, category)  # what is folded follows the weights
        load_own_state(again, {k: v.clone() for k, v in own_state(model).items()})
        other = again.predict(image, category)
        torch.testing.assert_close(other.anomaly_map, prediction.anomaly_map)
        model._folded = lambda network, fold: network
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
    mask = ignore = torch.zeros(400, 1, 8, 8)
    host_map *= 2e-9  # less than float16 holds, as a cache would have it
    parts = [part.half().float() for part in filtered._parted(host_map)]
    model.set_scale([TrainingBatch((*parts, mask, ignore), category, torch.arange(400))])
    for index, scale in ((0, 1), (1, 10)):
        good = host_map[category == index].flatten()
        expected = torch.tensor([good.median(), good.quantile(0.995)])
        torch.testing.assert_close(model.good_range[index], expected, rtol=1e-3, atol=1e-3 * scale)
    scaled = model._on_scale(host_map, category)
    assert scaled.min() == 0
    assert scaled.flatten().quantile(0.995) == pytest.approx(0.5, abs=1e-2)


def test_the_hosts_scale_is_that_of_visible_pixels(tmp_path: Path) -> None:
    model = behind(made("patchcore", tmp_path))
    ignore = torch.zeros(4, 1, 96, 96, dtype=torch.bool)
    ignore[..., 48:, :] = True
    images, _, category = drawings(painted=False)
    with torch.no_grad():
        host_map = model.host.match(hide(images, ignore), category).host_map
    batch = drawn(model, painted=False, ignore=ignore)
    model.set_scale([batch])
    for index in range(2):
        good = host_map[category == index][..., : host_map.shape[-2] // 2, :].flatten()
        expected = torch.tensor([good.median(), good.quantile(0.995)])
        torch.testing.assert_close(model.good_range[index], expected, rtol=0.1, atol=0)
        assert model.good_range[index, 1] < host_map[category == index].quantile(0.9) / 2  # grey
    assert (model.drawn(batch).match.host_map[..., host_map.shape[-2] // 2 :, :] == 0).all()


def test_ignored_regions_go_with_their_drawing(tree: Path) -> None:
    """As large as the mask, and nothing that is painted is in them."""
    samples = [sample for sample in read_data([tree]).train if sample.category == "wood"][:3]
    masks = {"wood": np.zeros((72, 64), bool)}
    masks["wood"][36:, :32] = True
    synthesizer = Synthesizer(SynthesisConfig(clean_probability=0, min_area=0.2))
    pictures = Pictures(samples, Transform(64), masks)
    (image, mask, ignore, _, _), _, _ = Drawings(pictures, CATEGORIES, 2, synthesizer, 16).read(
        range(6)
    )
    assert (image[..., 32:, :32] == 0.5).all()
    expected = torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    expected[..., 8:, :8] = True
    assert torch.equal(ignore, expected)
    assert mask.any() and not (mask & ignore).any()


@torch.no_grad()
def test_what_a_filter_learns_of_the_hosts_map(host: Any) -> None:
    """No more than its grid, and through a cache in float16 all but the rounding."""
    model = behind(host)
    batch, whole = drawn(model), drawn(model, whole=True)
    expected = model.drawn(whole).match
    images, _, category = drawings()
    assert torch.equal(expected.host_map, host.match(images, category).host_map)
    rounded = [feature.half().float() for feature in batch.features]
    found = model.drawn(TrainingBatch(tuple(rounded), batch.category, batch.index)).match
    grid = model.volume.grid
    assert found.host_map.numel() <= max(4 * grid[0] * grid[1], expected.host_map.numel() // 4)
    largest = expected.host_map.amax(dim=(1, 2, 3), keepdim=True)
    wanted = resize_aligned(expected.host_map, (found.host_map.shape[-2], found.host_map.shape[-1]))
    torch.testing.assert_close(found.host_map / largest, wanted / largest, rtol=1e-3, atol=1e-6)
    # What guides the network is the same in training as for an image that is judged.
    model.set_scale([drawn(model, painted=False)])
    found = model.drawn(batch).match
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
        ({"ssim": -0.1}, "ssim must be at least 0"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        FilterConfig(**settings)


@pytest.mark.usefixtures("tiny_network")
def test_every_command_takes_a_filtered_run(
    allgood: Command, run: Path, tree: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run, tmp_path / "lax"))
    calibration = json.loads((run / "calibration.json").read_text())
    write_json(run / "calibration.json", calibration | {"max_false_alarm": 0.1})
    out = tmp_path / "filtered"
    answer = allgood("filter", run, tree, "--out", out, *FILTER, *SETTINGS)
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(out)
    assert json.loads((out / "calibration.json").read_text())["max_false_alarm"] == 0.1
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
    assert torch.equal(host.detector.bank.patches, filtered.detector.host.bank.patches)
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
    taught, held = hold_out(samples, seed=3)
    counts = Counter(sample.category for sample in held)
    assert counts == {"wood": 4, "cloth": 16}
    assert sorted([*taught, *held], key=samples.index) == samples
    assert hold_out(samples, seed=3)[1] == held != hold_out(samples, seed=4)[1]


@pytest.mark.usefixtures("tiny_network")
def test_what_is_measured_on_synthetic_pictures(host: Any) -> None:
    model = behind(host, fusion=0.25)
    model.set_scale([drawn(model, painted=False)])
    batch = drawn(model, whole=True)
    model.eval()
    table = validate(model, [batch], (96, 96))
    assert table is not None
    with torch.inference_mode():
        match, mask = model.drawn(batch).match, model.drawn(batch).mask
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
    clean = drawn(model, painted=False, whole=True)
    assert validate(model, [clean], (96, 96)) is None
    assert validate(model, [], (96, 96)) is None


@pytest.mark.usefixtures("tiny_network")
def test_ignored_pixels_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = behind(made("patchcore", tmp_path))
    model.set_scale([drawn(model, painted=False)])
    ignore = torch.zeros(4, 1, 96, 96, dtype=torch.bool)
    ignore[..., :56, :] = True
    batch = drawn(model, whole=True, ignore=ignore)
    model.eval()
    table = validate(model, [batch], (96, 96))
    assert table is not None
    images, masks, category = drawings()
    seen = []
    judge = model.probability
    monkeypatch.setattr(model, "probability", lambda *a: seen.append(a[0].host_map) or judge(*a))
    prediction = model.predict_parts(hide(images, ignore), category, ignore=ignore)
    # What guides the network: as it was learned.
    torch.testing.assert_close(seen, [model.drawn(batch).match.host_map])
    positive = masks[~ignore].numpy()
    for column, found in enumerate((table["fusion"]["0.5"], table["host"], table["filter"])):
        values = prediction.anomaly_map[:, column : column + 1][~ignore].detach().numpy()
        assert found == pytest.approx(average_precision_score(positive, values), abs=1e-4)
    assert validate(model, [drawn(model, whole=True, ignore=ignore | True)], (96, 96)) is None


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
    for rate in ("0", "1"):
        said = allgood.refused(*words, "--max-false-alarm", rate)
        assert said.startswith("max_false_alarm must lie between 0 and 1")
    said = allgood.refused(*words, "--max-false-alarm", "0.01")  # before the training, not after it
    assert said.startswith("a false-alarm rate of 0.01 needs 99 good pictures of category 'cloth'")
    said = allgood.refused("filter", run, tree / "wood", tree / "cloth", "--out", out)
    assert said.startswith("the good pictures have other names")
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


def test_a_bank_knows_its_pictures_by_name(tmp_path: Path) -> None:
    host = made("patchcore", tmp_path)
    samples = [sample for batch in good_batches() for sample in batch.sample]
    require_others(host, tmp_path, samples, 0)
    require_others(host, tmp_path, samples[1:], 1)  # the first is not there
    others = [replace(sample, id=f"data/{sample.id}") for sample in samples]
    for given, num_absent in (
        (others, 0),
        (others[1:], 1),
        (others[:4] + samples[4:], 0),
        (others[:1] + samples[1:], 0),
        (others[:3] + others[4:], 100),
    ):
        with pytest.raises(InputError, match="have other names below their folder"):
            require_others(host, tmp_path, given, num_absent)
    learner = made("rd4ad", tmp_path)  # without a bank
    require_others(learner, tmp_path, others, 0)


@pytest.mark.parametrize(
    ("settings", "enough"),
    [
        ({"templates": 1}, False),
        ({"templates": 1, "bank": "shared"}, True),
        ({"templates": 2}, True),
        ({"templates": 2, "num_neighbors": 37}, False),
    ],
)
def test_a_bank_has_others_to_compare_each_picture_with(
    tmp_path: Path, settings: dict[str, Any], enough: bool
) -> None:
    encoder = random_encoder("test_vit", (1,), norm=True)
    host = fitted_bank("anomalydino", encoder, tmp_path, **settings)
    samples = [sample for batch in good_batches() for sample in batch.sample]
    image = torch.stack([picture(sample.category, i % 4) for i, sample in enumerate(samples)])
    category = torch.arange(8) // 4
    number = torch.tensor([image_number(sample.id) for sample in samples])
    with torch.inference_mode():
        if enough:
            require_others(host, tmp_path, samples, 0)
            host.match(image, category, image_number=number)
        else:
            with pytest.raises(InputError, match="too few pictures of category 'cloth'"):
                require_others(host, tmp_path, samples, 0)
            with pytest.raises(ValueError, match="too few for"):
                host.match(image, category, image_number=number)


def test_a_picture_is_drawn_no_more_often_than_it_is_seen() -> None:
    train = TrainConfig(steps=1500, batch_size=8, learning_rate=1e-3)
    assert [draws_in_time(train, count) for count in (10, 2000, 5000, 10_000, 50_000)] == [
        6,
        6,
        3,
        2,
        1,
    ]


def test_unreadable_pictures_are_no_templates(tmp_path: Path) -> None:
    samples = list(read_data([draw_tree(tmp_path, ("wood",), train=5, good=0, bad=0)]).train)
    for broken in samples[:2]:
        broken.path.write_bytes(b"no picture")
    config = FilterConfig(templates="good", num_templates=3)
    for seed in range(3):
        kept, taught = keep_templates(samples, config, seed)
        assert sorted(kept, key=samples.index) == samples[2:] and taught == samples[:2]
    with pytest.raises(InputError, match="too few to keep 4 readable ones"):
        keep_templates(samples, replace(config, num_templates=4), 0)


def test_templates_pass_the_network_in_batches(run: Path, tree: Path) -> None:
    inspector = library.Inspector(run)
    samples = list(read_data([tree]).train[:5])
    (whole,) = inspector.query_features(samples)
    parts = list(inspector.query_features(samples, batch_size=2))
    assert [len(levels[0]) for levels in parts] == [2, 2, 1]
    for level, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces), level)


@pytest.mark.usefixtures("tiny_network")
def test_a_damaged_picture_is_left_out(allgood: Command, tmp_path: Path) -> None:
    """Also where nothing is drawn unpainted, so that no drawing shows what good pictures are."""
    data = draw_tree(tmp_path / "data", train=10, good=0, bad=0)
    damaged = [data / "cloth" / "train" / "good" / f"00{i}.png" for i in range(2)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:300])
    host, out = tmp_path / "host", tmp_path / "out"
    words = ["--settings", "coreset_ratio=0.1", "--calibration-share", "0"]
    assert allgood("fit", data, "--out", host, *TINY, *words).code == 0
    words = [*FILTER, *SETTINGS, "--synthesis", "clean_probability=0"]
    answer = allgood("filter", host, data, "--out", out, *words)
    assert answer.code == 0, answer.err
    facts = json.loads((out / "provenance.json").read_text())
    assert [path for path, _ in facts["unreadable"]] == [str(path) for path in damaged]
    low, high = library.Inspector(out).detector.good_range.T
    assert (low > 0).all() and (low < high).all() and (high < 1).all()


@pytest.mark.usefixtures("tiny_network")
def test_ignored_regions_have_no_part_in_a_filter(allgood: Command, tmp_path: Path) -> None:
    data = draw_tree(tmp_path / "data", train=10, good=0, bad=0)
    half = np.zeros((72, 64), np.uint8)
    half[36:] = 255
    ignore = save(Image.fromarray(half), tmp_path / "ignore.png")
    words = ["--settings", "coreset_ratio=0.1", "--calibration-share", "0", "--ignore", ignore]
    masked = tmp_path / "masked"
    assert allgood("fit", data, "--out", masked, *TINY, *words).code == 0
    bare = Path(shutil.copytree(masked, tmp_path / "bare"))  # the same, but for its masks
    shutil.rmtree(bare / "ignore")
    for host in (masked, bare):
        words = [*FILTER, *SETTINGS, "--cache", tmp_path / "cache"]
        answer = allgood("filter", host, data, "--out", tmp_path / "out" / host.name, *words)
        assert answer.code == 0, answer.err
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 2
    # The bank holds nothing grey, so ignored patches are far from it.
    detector = library.Inspector(tmp_path / "out" / "masked").detector
    grey = torch.full((2, 3, 32, 32), 0.5)
    with torch.inference_mode():
        distance = detector.host.match(grey, torch.arange(2)).host_map
    assert (detector.good_range[:, 1] < 0.5 * distance.amin(dim=(1, 2, 3))).all()


@pytest.mark.usefixtures("tiny_network")
def test_the_hosts_scale_is_measured_once(
    allgood: Command, run: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["filter", run, tree, "--out", tmp_path / "out", *FILTER, *SETTINGS]
    measured: list[Tensor] = []
    plain = FilteredDetector.set_scale

    def measure(self: FilteredDetector, batches: Any) -> None:
        plain(self, batches)
        measured.append(self.good_range)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FilteredDetector, "set_scale", measure)
    with monkeypatch.context() as patch:
        patch.setattr(filter_job, "train", killed)
        assert allgood(*words).code != 0
    assert allgood(*words).code == 0
    (scale,) = measured
    assert torch.equal(library.Inspector(tmp_path / "out").detector.good_range, scale)
