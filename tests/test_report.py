"""The report's page, its table and its sentences, on made-up results of every shape."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from allgood.evaluation import charts, words
from allgood.evaluation.content import (
    Alarms,
    CategoryResult,
    Curve,
    Curves,
    GalleryItem,
    Parts,
    ReportContent,
    UnreadablePicture,
)
from allgood.evaluation.metric_rows import metric_table, parts_table
from allgood.evaluation.report import embedded_picture, render_report
from allgood.evaluation.table import table
from allgood.metrics import Metric, image_curves, image_metrics, mad, mean_over_categories

NO_MASKS = Metric.undefined("no defective pixels")
PIXEL_METRICS = (
    *("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_ioumax", "aupro"),
    *("dsc", "dsc_defective", "dsc_pooled"),
)
HOSTILE = "<script>alert(\"1\")</script> & 'x'"
FIFTEEN = tuple(f"category {i}" for i in range(15))
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


def category(
    name: str, *, seed: int = 0, masks: bool = True, alarms: bool = True
) -> CategoryResult:
    """Random scores with metrics computed from them; pixel metrics are made up."""
    rng = np.random.default_rng(seed)
    good, bad, calibration = rng.gamma(9, 0.1, 40), rng.gamma(20, 0.1, 60), rng.gamma(9, 0.1, 59)
    scores, labels = np.append(good, bad), np.repeat([0, 1], [len(good), len(bad)])
    metrics = image_metrics(scores, labels)
    for name_of_metric in PIXEL_METRICS:
        metrics[name_of_metric] = Metric(0.5, 0.4988, 0.5004) if masks else NO_MASKS
    metrics["mad"] = mad(metrics)
    threshold = float(np.sort(calibration)[-3])
    fpr = np.linspace(0, 0.3, 50)
    pixel = {"pro_fpr": fpr, "pro": np.sqrt(fpr)} if masks else {}
    return CategoryResult(
        name=name,
        good_scores=good,
        defective_scores=bad,
        metrics=metrics,
        calibration_scores=calibration,
        alarms=Alarms(threshold, 0.05, int((bad > threshold).sum()), int((good > threshold).sum()))
        if alarms
        else None,
        curves=Curves.of(image_curves(scores, labels), pixel),
        num_with_masks=60 if masks else 0,
    )


def picture(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def gallery(names: Sequence[str], count: int) -> list[GalleryItem]:
    kinds = ("found", "missed", "false alarm")
    return [
        GalleryItem(
            kind=kinds[i % 3],  # type: ignore[arg-type]
            category=names[i % len(names)],
            name=f"{names[i % len(names)]}/test/{i}.png",
            defect="good" if i % 3 == 2 else "scratch",
            image_score=1 + i / 7,
            picture=picture(i),
            overlay=picture(i + 100),
            outline=picture(i + 200) if i % 3 < 2 else None,
            p_value=0.02 if i % 2 else None,
        )
        for i in range(count)
    ]


def report(
    names: Sequence[str] = ("bottle", "cable"),
    *,
    masks: bool = True,
    alarms: bool = True,
    pictures: int = 4,
    filtered: bool = False,
) -> ReportContent:
    """With `filtered`, the run has a CostFilter; its host and filter are other random results."""
    results = [category(n, seed=i, masks=masks, alarms=alarms) for i, n in enumerate(names)]
    return ReportContent(
        title=f"Test of {names[0]}",
        detector="PatchCore",
        encoder="EfficientNet-Lite0",
        created_at=datetime(2031, 5, 4, 12, 30, tzinfo=UTC),
        num_training=1234,
        categories=results,
        mean=mean_over_categories({c.name: c.metrics for c in results}),
        pooled=category("Pooled", seed=99, masks=masks, alarms=alarms),
        protocol=["One model for all categories.", "Pixel metrics at 256 × 256."],
        gallery=gallery(names, pictures),
        unreadable=[UnreadablePicture("bottle/test/7.png", "truncated file")],
        commands=["allgood evaluate run --data 'my data'"],
        wall_seconds=245.0,
        versions={"allgood": "0.1.0"},
        facts={"Device": "CPU"},
        parts=Parts(
            *(
                [category(n, seed=s + i, masks=masks, alarms=False) for i, n in enumerate(names)]
                for s in (1000, 2000)
            ),
            fusion=0.25,
        )
        if filtered
        else None,
    )


class Page(HTMLParser):
    """Checks that tags nest, and gathers what a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


CONTENTS = {
    "two categories": report(),
    "one category": report(("bottle",)),
    "fifteen categories": report(FIFTEEN, pictures=30),
    "no masks": report(masks=False),
    "no alarms": report(alarms=False),
    "empty gallery": report(pictures=0),
    "hostile names": report((HOSTILE, "a\x1b[31mb", "\udce9\u202egnp")),
    "filtered": report(filtered=True),
    "filtered, hostile names, no masks": report((HOSTILE, "a"), masks=False, filtered=True),
    "unicode": report(("Flüssigkeit ≥ 5 µm", "漢字部品", "🔩")),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_page_is_complete_and_asks_for_nothing(content: ReportContent) -> None:
    html = render_report(content)
    page = Page(html)
    assert not re.search(r"\b(nan|inf|None)\b", page.text, re.IGNORECASE)
    assert "http:" not in html and "https:" not in html
    for tag, name, value in page.attributes:
        assert "nan" not in value.split(), f"{tag} {name}={value}"
        if name in ("src", "href"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), f"{tag} {name}={value}"
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert links <= targets
    assert page.tags["script"] == bool(content.gallery)
    for result in content.categories:
        assert result.name in "".join(page.texts)


def test_page_with_thirty_noisy_items_is_small() -> None:
    noisy = [
        dataclasses.replace(
            item,
            picture=picture(1, 500, 600),
            overlay=picture(2, 500, 600),
            outline=picture(3, 500, 600),
        )
        for item in gallery(("bottle",), 30)
    ]
    content = dataclasses.replace(CONTENTS["fifteen categories"], gallery=noisy)
    assert len(render_report(content)) < 3_000_000


def test_smallest_and_widest_pictures_are_embedded() -> None:
    for shape in ((1, 1), (1, 9000), (3000, 4000)):
        grey = np.full((*shape, 3), 128, np.uint8)
        assert embedded_picture(grey, 20_000).startswith("data:image/jpeg;base64,")


def test_first_screen_in_words() -> None:
    alarms = Alarms(0.5, 0.05, num_found=291, num_false_alarms=9)
    result = dataclasses.replace(
        category("bottle"),
        good_scores=np.zeros(302),
        defective_scores=np.ones(313),
        alarms=alarms,
    )
    content = dataclasses.replace(report(("bottle",)), categories=[result], pooled=None)
    assert words.headline(content) == (
        "291 of 313 defective parts found, 9 false alarms among 302 good parts "
        "(3.0 %; promised at most 5 %)"
    )
    text = Page(render_report(content)).text
    for phrase in ("291 of 313 found", "22 missed", "9 false alarms among 302", "3.0 % measured"):
        assert phrase in text
    assert "The promised false-alarm rate was kept." in text


def test_metric_without_a_group_is_left_out_by_its_own_name() -> None:
    content = report(["bottle"])
    metrics = {**content.categories[0].metrics, "mad": Metric.undefined("no good images")}
    bottle = dataclasses.replace(content.categories[0], metrics=metrics)
    shown = metric_table(dataclasses.replace(content, categories=[bottle]))
    assert shown.left_out == ["mAD is not defined in any category: no good images."]


def test_undefined_pixel_metrics_become_one_sentence() -> None:
    content = CONTENTS["no masks"]
    text = Page(render_report(content)).text
    sentence = (
        "Pixel metrics, and mAD with them, are not defined in any category: no defective pixels."
    )
    assert text.count(sentence) == 1
    assert "AUPRO" not in text.replace(sentence, "")
    assert table(content).count(sentence) == 1


def test_one_undefined_category_is_noted_and_never_zero() -> None:
    results = [category("with", seed=1), category("without", seed=2, masks=False)]
    content = dataclasses.replace(
        report(("with", "without")),
        categories=results,
        mean=mean_over_categories({c.name: c.metrics for c in results}),
    )
    rows = {row.name: row for row in metric_table(content).rows}
    columns = [column.full for column in metric_table(content).columns]
    cell = rows["without"].cells[columns.index("Pixel AUROC")]
    assert (cell.text, cell.bound) == ("not defined", "")
    assert metric_table(content).notes[cell.note - 1] == "no defective pixels"
    mean = rows["Mean of categories"].cells[columns.index("Pixel AUROC")]
    assert mean.text == "50.0"
    assert (
        "1 of 2 categories" in mean.hint or "1 of 2" in metric_table(content).notes[mean.note - 1]
    )
    line = next(line for line in table(content).splitlines() if line.startswith("without"))
    assert " 0.0" not in line.split("%")[-1]
    assert "nan" not in table(content)


@pytest.mark.parametrize(
    ("lower", "value", "upper", "text"),
    [
        (0.5, 0.5, 0.5, "exact"),
        (0.5, 0.5, 0.50031, "±0.04"),
        (0.4988, 0.5, 0.5004, "±0.2"),
        (0.4995, 0.5, 0.5, "±0.05"),
        (0.2, 0.5, 0.6, "±30"),
        (0.5, 0.5 + 1e-14, 0.5, "exact"),
    ],
)
def test_bound_is_rounded_up(lower: float, value: float, upper: float, text: str) -> None:
    assert words.bound(Metric(value, lower, upper)) == text


def test_table_shows_bounds_that_matter() -> None:
    content = report(("bottle",))
    metrics = dict(content.categories[0].metrics)
    metrics["aupro"] = Metric(0.9123, 0.9118, 0.9127)  # 0.05 points
    metrics["dsc"] = Metric(0.8123, 0.8121, 0.8125)  # 0.02 points
    result = dataclasses.replace(content.categories[0], metrics=metrics)
    line = table(dataclasses.replace(content, categories=[result])).splitlines()[-1]
    assert "91.2±0.1" in line
    assert re.search(r"81\.2(?!±)", line)


def test_table_lines_up_for_wide_characters_and_shows_no_escapes() -> None:
    text = table(report(("漢字部品", "ab", "a\x1b[31mb")))
    assert "\x1b" not in text and "a?[31mb" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["Mean", "Pooled"]
    wide, narrow = (line for line in text.splitlines() if line.startswith(("漢", "ab")))
    assert len(wide) + 4 == len(narrow)


def test_chance_is_that_of_shuffled_ranks() -> None:
    """Good test and calibration scores are exchangeable: shuffle 3 + 12 ranks and count alarms."""
    n, m, alpha, seen = 12, 3, 0.2, 2
    rng = np.random.default_rng(0)
    scores = rng.random((40_000, n + m))
    calibration, test = scores[:, :n], scores[:, n:]
    p_values = (1 + (calibration[:, None] >= test[:, :, None]).sum(axis=2)) / (n + 1)
    by_count = ((p_values <= alpha).sum(axis=1) >= seen).mean()
    result = dataclasses.replace(
        category("bottle"),
        good_scores=np.zeros(m),
        calibration_scores=np.zeros(n),
        alarms=Alarms(0.5, alpha, 0, seen),
    )
    assert words.chance_of_as_many(result) == pytest.approx(by_count, abs=0.01)


def test_broken_promise_is_said() -> None:
    kept = category("kept", seed=3)
    kept = dataclasses.replace(kept, alarms=Alarms(1.0, 0.05, 3, 0))
    many = dataclasses.replace(category("many"), alarms=Alarms(1.0, 0.05, 3, 30))
    few = dataclasses.replace(category("few"), alarms=Alarms(1.0, 0.05, 3, 3))
    assert words.promise_sentences([kept]) == ["The promised false-alarm rate was kept."]
    assert "chance alone can explain" in words.promise_sentences([kept, few])[0]
    first, second = words.promise_sentences([kept, few, many])
    assert first.startswith("More false alarms than promised in 2 of 3 categories: many (30 of 40")
    assert second.startswith("Chance does not explain many (chance brings as many in less than")


def test_parts_of_a_filtered_run_stand_side_by_side() -> None:
    content = report(FIFTEEN[:3], filtered=True)
    parts = parts_table(content)
    assert parts is not None and content.parts is not None
    assert [column.full for column in parts.columns] == ["Image AUROC", "Pixel AP", "Pixel AUPRO"]
    assert [row.name for row in parts.rows] == [*FIFTEEN[:3], "Mean of categories"]
    for i, row in enumerate(parts.rows[:3]):
        three = (content.parts.host[i], content.parts.filter[i], content.categories[i])
        expected = [f"{100 * c.metrics['image_auroc'].value:.1f}" for c in three]
        assert [cell.text for cell in row.cells[:3]] == expected
    html = render_report(content)
    page = Page(html)
    assert "0.25 of the map is the filter's" in page.text
    assert page.text.count("detector alone") == page.text.count("with the filter") == 3
    section = html[html.index('<h2 id="filter">') : html.index('<h2 id="curves">')]
    assert section.count("<svg") == 6
    assert "with and without the filter" in table(content)
    for plain in (render_report(report()), table(report())):
        assert "with and without the filter" not in plain.lower()
    assert parts_table(report()) is None
    no_masks = parts_table(report(masks=False, filtered=True))
    assert no_masks is not None
    assert [column.full for column in no_masks.columns] == ["Image AUROC"]


def test_rates_never_round_to_all_or_nothing() -> None:
    assert words.rate(0, 9) == "0.0 %"
    assert words.rate(1, 100_000) == "< 0.1 %"
    assert words.rate(99_999, 100_000) == "> 99.9 %"
    assert words.rate(9, 9) == "100.0 %"
    assert words.rate(0, 0) == "–"


def test_histogram_counts_every_part_once() -> None:
    result = dataclasses.replace(
        category("bottle"),
        good_scores=np.array([-math.inf, 0.0, 0.2, 0.5, 0.7]),
        defective_scores=np.array([0.3, 0.6, 1.0, math.inf]),
        alarms=Alarms(0.5, 0.05, 3, 1),
    )
    axis, _ = charts.score_ranges([result])
    svg = charts.histogram(result, axis[0])
    counts = {
        kind: sum(int(n) for n in re.findall(rf'class="{kind}".*?<title>(\d+) ', svg))
        for kind in ("good", "good wrong", "bad", "bad wrong")
    }
    assert counts == {"good": 4, "good wrong": 1, "bad": 3, "bad wrong": 1}
    assert "nan" not in svg


@pytest.mark.parametrize("scores", [[], [3.0], [3.0, 3.0], [math.inf]])
def test_axis_of_degenerate_scores(scores: list[float]) -> None:
    result = CategoryResult("x", np.array(scores), np.zeros(0), {})
    [(low, high)], shared = charts.score_ranges([result])
    assert math.isfinite(low) and math.isfinite(high) and low < high and shared
    Page(charts.histogram(result, (low, high)))


def test_very_different_scores_get_their_own_axis() -> None:
    small, large = category("small"), category("large", seed=1)
    large = dataclasses.replace(
        large,
        good_scores=large.good_scores * 100,
        defective_scores=large.defective_scores * 100,
        alarms=Alarms(150.0, 0.05, 3, 1),
    )
    assert charts.score_ranges([small, small])[1]
    assert not charts.score_ranges([small, large])[1]


def test_curve_goes_where_its_points_say() -> None:
    svg = charts.curve_chart("PRO", Curve(np.array([0.0, 0.15, 0.3]), np.array([0.0, 0.8, 1.0])))
    assert 'points="0.0,100.0 50.0,20.0 100.0,0.0"' in svg
    assert ">0.3<" in svg
    assert "not defined" in charts.curve_chart("PR", None)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="61 found of 60"):
        dataclasses.replace(category("bottle"), alarms=Alarms(1.0, 0.05, 61, 0))
    with pytest.raises(ValueError, match="at least one category"):
        dataclasses.replace(report(), categories=[])
