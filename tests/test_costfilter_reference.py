"""What the authors ran, put together: presets against the official code, and their checkpoints.

The official numbers are those of test_costfilter_golden, here by the way that a user takes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_costfilter_golden as golden
import torch
from doors import Command, content, draw_tree
from torch import Tensor, nn

import allgood as library
import allgood.official.costfilter as official
from allgood.costfilter import filtered
from allgood.costfilter.config import FilterConfig
from allgood.costfilter.filtered import FilteredDetector
from allgood.data.images import read_image
from allgood.data.synthesis import reference_config
from allgood.official.costfilter import UNUSED, official_name, read_filter, renamed
from allgood.recipes import configured
from allgood.recipes.costfilter import FILTERS, FilterRecipe, find_filter
from allgood.training.config import TrainConfig
from allgood.types import InputError, Match

pytest_plugins = ["doors_fixtures"]


class Host(nn.Module):
    """Answers with a match that was made before."""

    categories = ("bottle", "cable")

    def __init__(self, match: Match) -> None:
        super().__init__()
        self.answer = match

    def match(self, image: Tensor, category: Any = None, *, image_number: Any = None) -> Match:
        return self.answer


def behind(match: Match, preset: str, **settings: Any) -> FilteredDetector:
    """A preset's filter with a small network behind a host that gives this match."""
    config = FilterConfig(**{**FILTERS[preset].settings, "size": "small", "stem": None, **settings})
    query = match.query
    grid = (query[0].shape[-2], query[0].shape[-1])
    return FilteredDetector(config, Host(match), [q.shape[1] for q in query], grid)


def dinomaly_match() -> Match:
    shape = (2, 32, 28, 28)
    query = [golden.given("volume", f"dinomaly:encoder{i}", shape, 1) for i in range(2)]
    template = [
        (golden.given("volume", f"dinomaly:decoder{i}", shape, 1) + 0.5 * q).unsqueeze(1)
        for i, q in enumerate(query)
    ]
    distance = torch.stack(
        [
            1 - torch.nn.functional.cosine_similarity(q, t[:, 0], dim=1)
            for q, t in zip(query, template, strict=True)
        ]
    ).mean(dim=0)
    return Match(query, template, distance[:, None], torch.zeros(2, dtype=torch.int64))


def hvq_match(*, transport: bool) -> Match:
    query = golden.given("volume", "hvq:org", (2, 272, 14, 14), 1)
    template = golden.given("volume", "hvq:rec", (2, 272, 14, 14), 1) + 0.5 * query
    distance = (template - query).norm(dim=1, keepdim=True)
    if transport:
        cost = golden.given("volume", "hvq:ot", (2, 196), 0.5, 1).view(2, 1, 14, 14)
        distance = distance + 80 * cost
    return Match([query], [template.unsqueeze(1)], distance, torch.zeros(2, dtype=torch.int64))


def maps_of(model: FilteredDetector, match: Match, image_size: tuple[int, int]) -> filtered.Maps:
    return model.maps(match, model.probability(match, image_size), image_size)


def seen_by_network(model: FilteredDetector, match: Match, image_size: Any) -> dict[str, Tensor]:
    """What a preset hands to the network."""
    seen: dict[str, Tensor] = {}

    class Spy:
        def __call__(self, volume: Any, sg: Any, mg: Tensor, **_: Any) -> Any:
            seen["volume"] = filtered_volume(volume)
            seen["guidance3"] = sg[3].flatten(2).transpose(1, 2)
            seen["guidance0"] = sg[0].flatten(2).transpose(1, 2)
            seen["matching"] = golden.resize_aligned(mg, (64, 64))
            return torch.zeros(len(mg), 2, 64, 64), None

    model._logits(match, Spy(), image_size=image_size)  # type: ignore[arg-type]
    return seen


def filtered_volume(comparison: Any) -> Tensor:
    return golden.resize_aligned(golden.cost_volume(comparison), (64, 64))


def test_reference_dinomaly_is_the_official_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = golden.dinomaly_volume_answers()
    match = dinomaly_match()
    model = behind(match, "reference-dinomaly").eval()
    seen = seen_by_network(model, match, (392, 392))
    for name in ("volume", "matching", "guidance0"):
        torch.testing.assert_close(seen[name], expected[f"dinomaly:{name}"], atol=2e-6, rtol=1e-5)
    trained = seen_by_network(model, match, None)["matching"]
    wanted = expected["dinomaly:matching_training"].expand(-1, 2, -1, -1)
    torch.testing.assert_close(trained, wanted)
    logits = golden.given("volume", "dinomaly:logits", (2, 2, 64, 64), 3)
    monkeypatch.setattr(model, "_logits", lambda *_, **__: (logits, None))
    prediction = model.predict(torch.zeros(2, 3, 392, 392))
    torch.testing.assert_close(prediction.anomaly_map[:, 0], expected["dinomaly:fused_map"])
    torch.testing.assert_close(prediction.image_score, expected["dinomaly:score"])


@pytest.mark.parametrize("transport", [True, False])
def test_reference_hvq_is_the_official_pipeline(transport: bool) -> None:
    expected = golden.hvq_volume_answers()
    match = hvq_match(transport=transport)
    model = behind(match, "reference-hvq", matching="hvq_ot" if transport else "hvq").eval()
    assert model.network.config.guidance == golden.HVQ_CHANNELS
    name = "hvq_ot" if transport else "hvq_no_ot"
    seen = seen_by_network(model, match, None)
    torch.testing.assert_close(seen["matching"], expected[f"{name}:training:matching"])
    tested = seen_by_network(model, match, (224, 224))["matching"][:1]
    torch.testing.assert_close(tested, expected[f"{name}:test:matching"])
    if transport:
        torch.testing.assert_close(seen["volume"], expected["hvq_ot:training:volume"])
        torch.testing.assert_close(seen["guidance3"], expected["hvq_ot:training:guidance3"])
    maps = maps_of(model, match, (224, 224))
    torch.testing.assert_close(maps.host[:1], expected[f"{name}:test:pred_224"])
    # P + 0.02 H ranks as the mean that it is here.
    torch.testing.assert_close(maps.fused * 1.02, maps.filter + 0.02 * maps.host, rtol=1e-3, atol=0)


def test_reference_anomaldf_keeps_the_least_costs_of_its_templates() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 24, 4, 4, generator=generator)
    match = Match([query], [query[:, None]], torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
    model = behind(match, "reference-anomaldf", split=(6, 6, 6, 6), num_templates=2, top_k=16)
    templates = torch.randn(2, 2, 24, 4, 4, generator=generator)
    model.keep_templates([[templates.flatten(0, 1)]])
    match = model.eval().match(torch.zeros(2, 3, 32, 32))
    seen = seen_by_network(model, match, (32, 32))
    parts = torch.nn.functional.normalize(query.double().unflatten(1, (4, 6)), dim=2)
    kept = torch.nn.functional.normalize(templates.double().unflatten(2, (4, 6)), dim=3)
    cost = 1 - torch.einsum("blcij,bnlcpq->blnpqij", parts, kept).flatten(2, 4)  # (B, L, 32, h, w)
    least = cost.amin(dim=2)
    torch.testing.assert_close(
        seen["matching"], golden.resize_aligned(least, (64, 64)).float(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        model.least_cost(match), least.mean(dim=1, keepdim=True).float(), atol=1e-5, rtol=1e-5
    )
    every = cost.sort(dim=2).values[:, :, :16].sum(dim=2).float()
    config = model.volume
    volume = golden.cost_volume(golden.compare(*_sides(model, match), config))
    torch.testing.assert_close(volume.sum(dim=1), every, atol=1e-4, rtol=1e-4)
    assert maps_of(model, match, (32, 32)).host.std() < least.std()  # smoothed


def test_reference_glad_passes_every_template_by_itself() -> None:
    expected = golden.glad_volume_answers()
    tokens = [golden.given("volume", f"glad:layer{i}", (8, 1025, 24), 1) for i in range(4)]
    query, templates = [], []
    for level in tokens:
        level = level[:, 1:].transpose(1, 2).unflatten(2, (32, 32))
        query.append(level[:2])
        templates.append((level[2:].unflatten(0, (3, 2)) + 0.5 * level[:2]).transpose(0, 1))
    together = torch.cat(query, dim=1)
    match = Match([together], [together[:, None]], torch.zeros(2, 1, 32, 32), torch.arange(2))
    model = behind(match, "reference-glad", split=(24,) * 4)
    model.keep_templates([[torch.cat(templates, dim=2).flatten(0, 1)]])  # one set per picture
    match = model.eval().match(torch.zeros(2, 3, 256, 256))
    seen = seen_by_network(model, match, (256, 256))
    least = seen["matching"].unflatten(0, (2, 3))
    volume = seen["volume"].unflatten(0, (2, 3))
    for n in range(3):
        torch.testing.assert_close(least[:, n], expected[f"glad:matching_template{n}"])
    for n in (0, 2):
        torch.testing.assert_close(volume[:, n], expected[f"glad:volume_template{n}"])
    torch.testing.assert_close(seen["guidance3"], expected["glad:guidance3"])
    # One map per picture: that of each template alone, averaged.
    maps = maps_of(model, match, (256, 256))
    alone = []
    for n in range(3):
        config = replace(model.config, num_templates=1)
        single = FilteredDetector(config, Host(match), [96], (32, 32)).eval()
        single.network.load_state_dict(model.network.state_dict())
        single.keep_templates([[torch.cat([t[:, n] for t in templates], dim=1)]])
        alone.append(maps_of(single.eval(), single.match(torch.zeros(2, 3, 8, 8)), (256, 256)))
    mean = torch.stack([one.filter for one in alone]).mean(dim=0)
    torch.testing.assert_close(maps.filter, mean, atol=1e-5, rtol=1e-4)
    raw = torch.stack([one.host for one in alone]).amin(dim=0)  # of the least of all costs
    assert maps.host.shape == raw.shape and (maps.host <= raw + 1e-5).all()


def _sides(model: FilteredDetector, match: Match) -> tuple[list[Tensor], list[Tensor]]:
    return model._split(match.query, 1), model._split(match.template, 2)


@pytest.mark.parametrize("name", FILTERS)
def test_presets_are_whole(name: str) -> None:
    recipe = find_filter(name)
    config = configured(FilterConfig, recipe.settings, ())
    train = configured(TrainConfig, recipe.train, ())
    assert config.size == "full" and config.gamma == "reference"
    # About as many drawings as the published training saw.
    pictures = train.steps * train.batch_size / recipe.draws
    assert pictures == pytest.approx(3629, rel=0.02)
    assert train.learning_rate == train.final_learning_rate
    assert reference_config().texture == 0
    side = config.mask_side
    assert int(config.top_fraction * side * side) in (10, 250, 1536)


TINY_HOSTS = {
    "reference-dinomaly": (
        ["--settings", "decoder_depth=2", "--train", "steps=2", "batch_size=4", "--no-cache"],
        ["top_k=14", "mask_side=64"],
    ),
    "reference-glad": (
        ["--keep-aspect", "False", "--settings", "query=raw"],
        ["split=64,64", "num_templates=2", "stem=32", "mask_side=64"],
    ),
    "reference-anomaldf": (
        ["--keep-aspect", "False", "--settings", "query=raw"],
        ["split=64,64", "top_k=7", "num_templates=2", "stem=32", "mask_side=64"],
    ),
}
"""Preset -> how its host is fitted, and what of the preset is made small."""


@pytest.mark.parametrize("name", TINY_HOSTS)
def test_every_command_takes_a_run_of_a_preset(allgood: Command, tmp_path: Path, name: str) -> None:
    data = draw_tree(tmp_path / "data", train=24, good=2, bad=2)
    host, settings = TINY_HOSTS[name]
    words = ["--detector", FILTERS[name].host, "--encoder", "test_vit", "--weights", "random"]
    words += ["--levels", "1", "2", "--image-size", "64", "--max-false-alarm", "0.2", *host]
    assert allgood("fit", data, "--out", tmp_path / "host", *words).code == 0
    words = ["--preset", name, "--settings", "size=small", *settings, "--draws", "1", "--no-cache"]
    words += ["--train", "steps=2", "batch_size=4", "--max-false-alarm", "0.2"]
    out = tmp_path / "filtered"
    answer = allgood("filter", tmp_path / "host", data, "--out", out, *words)
    assert answer.code == 0, answer.err
    config = json.loads((out / "config.json").read_text())["filter"]
    wanted = {**FILTERS[name].settings, "size": "small"}
    wanted |= {
        word.partition("=")[0]: config["settings"][word.partition("=")[0]] for word in settings
    }
    found = {key: config["settings"][key] for key in wanted}
    assert found == json.loads(json.dumps(wanted))
    assert config["train"]["learning_rate"] == FILTERS[name].train["learning_rate"]
    assert config["synthesis"]["texture"] == config["synthesis"]["scratch"] == 0
    assert allgood("evaluate", out, data).code == 0


def test_presets_that_do_not_fit(allgood: Command, run: Path, tree: Path, tmp_path: Path) -> None:
    words = ["filter", run, tree, "--out", tmp_path / "out"]
    said = allgood.refused(*words, "--preset", "reference-dinomaly")
    assert said.startswith("preset reference-dinomaly is for dinomaly, but run")
    assert "did you mean 'reference-hvq'" in allgood.refused(*words, "--preset", "reference-hqv")
    said = allgood.refused(*words, "--fusion", "auto", "--settings", "fusion=0.3")
    assert said.startswith("--fusion auto chooses the fusion")
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_the_match() -> None:
    match = hvq_match(transport=False)
    with pytest.raises(InputError, match="split cuts one level of 200 channels"):
        behind(match, "reference-hvq", split=(100, 100))
    with pytest.raises(InputError, match="classes must be at least 2"):
        behind(match, "reference-hvq", classes=1)
    with pytest.raises(InputError, match=r"top_k must be in \[1, 196\]"):
        behind(match, "reference-hvq", top_k=768)
    with pytest.raises(InputError, match="spatial=template needs one rebuilt template"):
        FilterConfig(spatial="template", templates="good")


# -- checkpoints ---------------------------------------------------------------------------------


def official_shapes(host: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        network = golden.CostFilterNetwork(golden.NETWORKS[host][0])
        unused = {name: torch.empty(shape) for name, shape in golden.UNUSED.items()}
    return {official_name(name): value for name, value in network.state_dict().items()} | unused


@pytest.mark.parametrize(
    ("host", "title"),
    [("dinomaly", "Dinomaly"), ("hvq", "HVQ-Trans"), ("glad", "GLAD or AnomalDF")],
)
def test_variants_are_known_by_their_shapes(host: str, title: str) -> None:
    state = official_shapes(host)
    for given in (state, {"epoch": 3, "lr": 1e-3, "model_state_dict": state}):
        found = read_filter(given)
        assert (found.variant.title, found.classes) == (title, 15)
    state["decoder_segment.conv1.weight"] = torch.empty(48, 48, 3, 1, 1, device="meta")
    with pytest.raises(InputError, match=r"levels 3, .* is none of the published ones"):
        read_filter(state)
    del state["encoder_segment.dino_proc4.conv3d.weight"]
    with pytest.raises(InputError, match=r"it lacks 'encoder_segment.dino_proc4"):
        read_filter(state)
    with pytest.raises(InputError, match="'surprise' is not what the authors write"):
        read_filter({"model_state_dict": {}, "surprise": torch.ones(1)})


def test_presets_make_the_networks_of_the_checkpoints() -> None:
    """With the hosts' true sizes, to the last name and shape."""
    for variant in official.VARIANTS:
        host = next(h for h, (c, *_) in golden.NETWORKS.items() if c.channels == variant.channels)
        levels = [torch.empty(1, c, variant.grid, variant.grid) for c in variant.match]
        match = Match(levels, levels, levels[0], torch.zeros(1))
        for preset in variant.presets:
            settings = {**FILTERS[preset].settings, "classes": 15}
            with torch.device("meta"):
                model = FilteredDetector(
                    FilterConfig(**settings), Host(match), variant.match, (variant.grid,) * 2
                )
            assert renamed(model.network, official_shapes(host)).keys()


@pytest.fixture
def tiny_variant(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint as the authors would write for the tests' PatchCore; its path."""
    inspector = library.Inspector(run)
    channels, grid = filtered.shape_of_match(inspector.detector, (64, 64), torch.device("cpu"))
    settings = {"host": "raw", "matching": "host", "top_k": 50, "orientation": "reference"}
    preset = FilterRecipe("patchcore", settings, {}, 1)
    monkeypatch.setitem(FILTERS, "tiny", preset)
    config = FilterConfig(**settings, classes=5)
    model = FilteredDetector(config, inspector.detector, channels, grid, seed=7)
    network = model.network.config
    variant = official.Variant(
        host="patchcore",
        presets=("tiny",),
        title="PatchCore",
        image_size=64,
        grid=grid[0],
        match=tuple(channels),
        channels=network.channels,
        levels=network.levels,
        guidance=network.guidance,
        stem=network.stem,
    )
    monkeypatch.setattr(official, "VARIANTS", (*official.VARIANTS, variant))
    state = {official_name(name): value for name, value in model.network.state_dict().items()}
    path = tmp_path / "epoch_7.pth"
    unused = {name: torch.ones(shape) for name, shape in golden.UNUSED.items()}
    torch.save({"epoch": 7, "lr": 1e-3, "model_state_dict": state | unused}, path)
    return path


def test_every_command_takes_a_converted_filter(
    allgood: Command, run: Path, tree: Path, tiny_variant: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    answer = allgood("convert", "costfilter", tiny_variant, "--host", run, "--out", out)
    assert answer.code == 0, answer.err
    assert set(content(out)) == {"config.json", "weights.safetensors", "provenance.json"}
    model = library.Inspector(out).detector
    state = torch.load(tiny_variant, weights_only=True)["model_state_dict"]
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, state[official_name(name)]), name
    assert torch.equal(model.host.bank.patches, library.Inspector(run).detector.bank.patches)
    assert not any(UNUSED.match(official_name(name)) for name in model.network.state_dict())
    assert allgood("calibrate", out, tree, "--max-false-alarm", "0.2").code == 0
    assert allgood("evaluate", out, tree).code == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert any("converted from epoch_7.pth" in sentence for sentence in numbers["protocol"])
    assert set(numbers["parts"]) == {"fusion", "host", "filter"}
    bad = tree / "wood" / "test" / "hole" / "000.png"
    (record,) = allgood("inspect", out, bad).records
    assert record["is_anomalous"] is not None


def test_checkpoints_that_do_not_fit(
    allgood: Command, run: Path, tree: Path, tiny_variant: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["convert", "costfilter", tiny_variant, "--out", out]
    assert allgood.refused(*words).startswith("name the run behind which the filter stands")
    said = allgood.refused(*words, "--host", run, "--categories", "wood")
    assert said.startswith("a costfilter takes its categories and encoder from its host")
    said = allgood.refused(*words, "--host", run, "--good", tree)
    assert "compares with what its host rebuilds, not with good pictures" in said
    said = allgood.refused("convert", "dinomaly", tiny_variant, "--host", run, "--out", out)
    assert said == "dinomaly stands behind no other detector: leave out --host and --preset"
    said = allgood.refused(*words, "--host", run, "--preset", "reference-hvq")
    assert "is a filter for PatchCore: give --preset tiny, or leave it out" in said
    assert "no such file" in allgood.refused(
        "convert", "costfilter", tmp_path / "none.pth", "--host", run, "--out", out
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "dinomaly"}, "is patchcore: give a plain dinomaly run with --host"),
        ({"image_size": 96}, "of 96 x 96 pixels, but run"),
        ({"match": (768, 768)}, "is for levels of [768, 768] channels"),
    ],
)
def test_hosts_that_do_not_fit(
    allgood: Command,
    run: Path,
    tiny_variant: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(official, "VARIANTS", (replace(official.VARIANTS[-1], **change),))
    out = tmp_path / "out"
    words = ["convert", "costfilter", tiny_variant, "--host", run, "--out", out]
    assert said in allgood.refused(*words)
    assert not out.exists()


def anomaldf_host(allgood: Command, data: Path, out: Path, query: str) -> Path:
    """A run as recipe `anomaldf` makes them, on a tiny ViT."""
    words = ["--recipe", "anomaldf", "--encoder", "test_vit", "--weights", "random"]
    words += ["--levels", "1", "2", "--image-size", "64", "--settings", f"query={query}"]
    answer = allgood("fit", data, "--out", out, *words, "templates=3", "--calibration-share", "0")
    assert answer.code == 0, answer.err
    return out


@pytest.fixture
def tiny_anomaldf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint as the authors would write for `anomaldf_host`; its path."""
    settings = {"split": (64, 64), "num_templates": 2, "top_k": 16, "size": "small"}
    settings = {**FILTERS["reference-anomaldf"].settings, **settings, "mask_side": 64}
    monkeypatch.setitem(FILTERS, "tiny-anomaldf", FilterRecipe("anomalydino", settings, {}, 1))
    glad = {**settings, "top_k": None, "merge": "loop_mean"}
    monkeypatch.setitem(FILTERS, "tiny-glad", FilterRecipe("anomalydino", glad, {}, 1))
    grid = (4, 4)
    match = Match([torch.empty(1, 128, *grid)], [], torch.empty(1, 1, *grid), torch.zeros(1))
    config = FilterConfig(**{**settings, "classes": 15})
    network = FilteredDetector(config, Host(match), [128], grid, seed=7).network
    variant = official.Variant(
        host="anomalydino",
        presets=("tiny-anomaldf", "tiny-glad"),
        title="GLAD or AnomalDF",
        image_size=64,
        grid=grid[0],
        match=(128,),
        channels=network.config.channels,
        levels=network.config.levels,
        guidance=network.config.guidance,
        stem=network.config.stem,
    )
    monkeypatch.setattr(official, "VARIANTS", (variant,))
    path = tmp_path / "anomaldf.pth"
    state = {official_name(name): value for name, value in network.state_dict().items()}
    unused = {name: torch.ones(shape) for name, shape in golden.UNUSED.items()}
    torch.save(state | unused, path)
    return path


def test_a_converted_anomaldf_filter_compares_with_good_pictures(
    allgood: Command, tiny_anomaldf: Path, tmp_path: Path
) -> None:
    data = draw_tree(tmp_path / "data", train=4, good=1, bad=1)
    host = anomaldf_host(allgood, data, tmp_path / "host", "raw")
    out = tmp_path / "out"
    words = ["convert", "costfilter", tiny_anomaldf, "--host", host, "--out", out]
    said = allgood.refused(*words)
    assert "compares with 2 good pictures of each category, and there are 0 of" in said
    answer = allgood(*words, "--good", data)
    assert answer.code == 0, answer.err
    inspector = library.Inspector(out)
    encoder = inspector.detector.host.encoder
    assert not encoder.config.norm
    picture = inspector.transform(read_image(data / "wood" / "train" / "good" / "000.png"))
    levels = encoder(picture[None])
    raw = torch.cat(levels, dim=1)[0]
    wood = inspector.categories.index("wood")
    torch.testing.assert_close(inspector.detector.template_0[wood, 0], raw)
    match = inspector.detector.match(picture[None], torch.tensor([wood]))
    torch.testing.assert_close(match.query[0][0], raw)  # not of unit length
    assert allgood("evaluate", out, data).code == 0

    assert inspector.detector.config.top_k == 16 and inspector.detector.volume.passes == 1
    glad = ("--preset", "tiny-glad", "--overwrite")
    answer = allgood(*words, "--good", data, *glad)
    assert answer.code == 0, answer.err
    assert library.Inspector(out).detector.volume.passes == 2
    assert allgood("evaluate", out, data).code == 0

    unit = anomaldf_host(allgood, data, tmp_path / "unit", "unit")
    words[words.index(host)] = unit
    said = allgood.refused(*words, "--good", data, "--overwrite")
    assert "is guided by features as the encoder gives them" in said
    assert library.Inspector(out).detector.template_0.any()  # the run that was there still is
