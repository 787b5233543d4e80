"""How a run was measured, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from allgood.evaluation.judged import Judged


def protocol(
    config: Mapping[str, Any],
    judged: Judged,
    *,
    num_calibration: int | None,
    pixel_size: int,
    infer_category: bool,
    num_seen: int,
    unlearned: Sequence[str],
) -> list[str]:
    """How it was measured, in sentences for the report and metrics.json.

    Args:
        config: of the run.
        num_calibration: pictures behind its thresholds; None: it has none.
        pixel_size: side of the maps compared; 0: each picture's own.
        infer_category: whether the run had to tell the categories itself.
        num_seen: test pictures left out because the run knows them.
        unlearned: categories of the data left out because the run does not know them.
    """
    num_categories = len(config["categories"])
    sentences = [
        f"One model over {num_categories} categories, fitted on "
        f"{config['data']['fitted_pictures']} good pictures; no defective picture and no test "
        "picture was used in fitting or in setting thresholds."
        if "official" not in config
        else f"One model over {num_categories} categories, converted from "
        f"{config['official']}; which pictures it was trained on is not recorded."
    ]
    if "filter" in config:
        sentences.append(_filter_sentence(config["filter"]))
    if num_calibration is not None:
        sentences.append(
            f"Alarm thresholds come from {num_calibration} good pictures that the model was not "
            "fitted on (split-conformal, per category); the pooled row has one threshold for all."
        )
    else:
        sentences.append("The run is not calibrated: no alarms, ranking metrics only.")
    if infer_category:
        right = sum(
            sample.category == name
            for sample, name in zip(judged.samples, judged.judged_as, strict=True)
        )
        sentences.append(
            f"The category was inferred from each picture, rightly for {right} of "
            f"{len(judged.samples)}."
        )
    else:
        sentences.append("The category of each picture was known.")
    size = f"{pixel_size} x {pixel_size}" if pixel_size else "each picture's own size"
    sentences.append(
        f"Pixel metrics at {size}, over all test pictures whose mask is known, good ones included; "
        "masks binarised at their own size and resized with nearest; AUPRO is the exact area up to "
        "a false-positive rate of 0.3 over 8-connected regions, divided by 0.3; DSC at the "
        "threshold where precision + recall is largest (UniAS)."
    )
    if config["transform"].get("center_crop") is not None:
        sentences.append(
            "The network sees the middle of each picture only, but the masks cover all of it: a "
            "defect that lies outside counts as missed."
        )
    sentences.append("Category numbers are averaged without weights.")
    parted = sorted({s.category for s in judged.samples if "domain" in s.meta})
    if parted:
        sentences.append(
            f"Test pictures of {', '.join(parted)} are measured in each domain by itself, and the "
            "category counts as the mean of its domains; AUPRO per image is that of each "
            "defective picture alone, at 200 thresholds, as some papers report it."
        )
    if num_seen:
        sentences.append(
            f"{num_seen} test pictures were left out: the run was fitted or calibrated on them."
        )
    if unlearned:
        names = ", ".join(unlearned)
        sentences.append(f"Categories not judged, as the run has not learned them: {names}.")
    for root, layout in config["data"]["layouts"].items():
        if layout == "elpv":
            sentences.append(
                f"{root}: good is defect probability 0, defective is 1; cells between are left "
                "out. Cells that stand together in the list stay on one side of the split."
            )
    return sentences


def _filter_sentence(behind: Mapping[str, Any]) -> str:
    share = f"{behind['settings']['fusion']:g} of the map is the filter's"
    if "official" in behind:
        return (
            f"Behind the detector stands a CostFilter converted from {behind['official']}; "
            f"{share}, as its authors chose on their test pictures."
        )
    how = (
        "chosen on other synthetic pictures"
        if behind.get("fusion") == "auto"
        else "fixed beforehand"
    )
    return (
        f"Behind the detector stands a CostFilter that has learned synthetic anomalies in "
        f"{behind['pictures']} of the same good pictures; {share}, {how}."
    )
