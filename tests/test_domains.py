"""A category whose test is parted by domain, as AeBAD-S: learned as one, reported in rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_trees import save
from doors import TINY, Command, draw_tree, mask, part
from PIL import ImageEnhance
from sklearn.metrics import roc_auc_score

import allgood as library
from allgood.metrics.reference import aupro_200_maxnorm
from allgood.scoring import resize_map

pytest_plugins = ["doors_fixtures"]

DOMAINS = {"background": 1.3, "illumination": 0.5, "same": 1.0, "view": 0.8}
"""Name -> how bright its pictures are."""
PIXELS = 48


@pytest.fixture(scope="module")
def blades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AeBAD-S drawn: training in two folders, three good and two defective per test domain."""
    folder = tmp_path_factory.mktemp("data") / "AeBAD_S"

    def drawn(seed: int, domain: str, kind: str = "good") -> Any:
        picture = part("cloth", seed, defective=kind != "good")
        return ImageEnhance.Brightness(picture).enhance(DOMAINS[domain])

    for i in range(8):
        domain = ("background", "view")[i % 2]
        save(drawn(i, "same"), folder / "train" / "good" / domain / f"{i}.png", "JPEG")
    for number, domain in enumerate(DOMAINS):
        for i in range(5):
            kind = "good" if i < 3 else ("ablation", "groove")[i - 3]
            picture = drawn(100 + 10 * number + i, domain, kind)
            save(picture, folder / "test" / kind / domain / f"{i}.png", "JPEG")
            if kind != "good":
                save(mask(), folder / "ground_truth" / kind / domain / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def wood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tree(tmp_path_factory.mktemp("tree"), ("wood",), train=8, good=3, bad=2) / "wood"


@pytest.fixture(scope="module")
def run(blades: Path, wood: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unified with another category: an ordinary fit of two roots."""
    return library.fit(
        [blades, wood],
        out=tmp_path_factory.mktemp("runs") / "run",
        encoder="test_efficientnet",
        weights="random",
        image_size=64,
        max_false_alarm=0.5,
    )


def test_one_category_is_learned_and_four_rows_come_out(
    run: Path, blades: Path, tmp_path: Path
) -> None:
    inspector = library.Inspector(run)
    assert inspector.categories == ("AeBAD_S", "wood")
    evaluation = library.evaluate(run, [blades], out=tmp_path, pixel_size=PIXELS)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert list(numbers["categories"]) == [f"AeBAD_S/{domain}" for domain in DOMAINS]
    limits = set()
    for domain in DOMAINS:
        row = numbers["categories"][f"AeBAD_S/{domain}"]
        scores, labels, areas = [], [], []
        for i in range(5):
            kind = "good" if i < 3 else ("ablation", "groove")[i - 3]
            path = blades / "test" / kind / domain / f"{i}.png"
            (found,) = inspector.inspect([path], category="AeBAD_S")
            scores.append(found.image_score)
            labels.append(kind != "good")
            if kind != "good":
                defect = torch.from_numpy(np.asarray(mask(), np.float32))[None, None]
                truth = F.interpolate(defect, (PIXELS, PIXELS), mode="nearest-exact")
                assert found.input_map is not None
                maps = resize_map(found.input_map[None, None], (PIXELS, PIXELS))
                areas.append(aupro_200_maxnorm(maps[0].numpy(), truth[0].numpy()))
        assert row["image_auroc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
        assert row["aupro_per_image"]["value"] == pytest.approx(np.mean(areas))
        alarms = numbers["alarms"][f"AeBAD_S/{domain}"]
        assert (alarms["good"], alarms["defective"]) == (3, 2)
        limits.add(alarms["threshold"])
    assert len(limits) == 1  # of the one category
    for metric in ("image_auroc", "pixel_auroc", "aupro", "aupro_per_image", "mad"):
        values = [row[metric]["value"] for row in numbers["categories"].values()]
        assert numbers["mean"][metric]["value"] == pytest.approx(np.mean(values))
    assert numbers["alarms"]["pooled"]["good"] == 12
    assert any("mean of its domains" in sentence for sentence in numbers["protocol"])
    assert "AeBAD_S/illumination" in str(evaluation) and "AUPRO per image" in str(evaluation)
    assert "AeBAD_S/illumination" in (tmp_path / "report.html").read_text()


def test_in_the_mean_a_category_counts_once(
    run: Path, blades: Path, wood: Path, tmp_path: Path
) -> None:
    library.evaluate(run, [blades, wood], out=tmp_path, pixel_size=PIXELS)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    rows = numbers["categories"]
    assert set(rows) == {"wood", *(f"AeBAD_S/{domain}" for domain in DOMAINS)}
    assert "aupro_per_image" not in rows["wood"]
    for metric in ("image_auroc", "pixel_auroc", "aupro"):
        domains = [row[metric]["value"] for name, row in rows.items() if name != "wood"]
        expected = (np.mean(domains) + rows["wood"][metric]["value"]) / 2
        assert numbers["mean"][metric]["value"] == pytest.approx(expected)


def test_domains_of_a_manifest(allgood: Command, blades: Path, tmp_path: Path) -> None:
    """Any data set may name them, in a column."""
    rows = ["image,label,split,category,domain"]
    for path in sorted(blades.rglob("*.png")):
        side, kind, domain, _ = path.relative_to(blades).parts
        if side != "ground_truth":
            label = "good" if kind == "good" else "bad"
            rows.append(f"{path},{label},{side},blade,{domain if side == 'test' else ''}")
    manifest = tmp_path / "blades.csv"
    manifest.write_text("\n".join(rows) + "\n")
    out = tmp_path / "run"
    fit = ["--max-false-alarm", "0.5", "--out", out]
    assert allgood("fit", manifest, *TINY, *fit).code == 0
    assert allgood("evaluate", out, manifest).code == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert list(numbers["categories"]) == [f"blade/{domain}" for domain in DOMAINS]
