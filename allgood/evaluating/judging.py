"""Behind `evaluate`: which test pictures, and what the run says of them."""

from collections.abc import Sequence
from pathlib import Path

from allgood.data.fingerprint import source_digests, unseen
from allgood.data.readers import Dataset, read_data
from allgood.evaluation.judged import Judged, row_of
from allgood.inference import Inspector
from allgood.progress import bar, say
from allgood.runs import PROVENANCE, read_json
from allgood.types import InputError, Sample


def learned_data(
    inspector: Inspector, roots: Sequence[str | Path], layout: str | None
) -> tuple[Dataset, list[str]]:
    """The data of categories that the run has learned, and the names of the others."""
    dataset = read_data(
        roots,
        layout=layout,
        train_share=inspector.config["data"]["train_share"],
        seed=inspector.config["seed"],
    )
    unlearned = [name for name in dataset.categories if name not in inspector.categories]
    learned = [name for name in dataset.categories if name in inspector.categories]
    if not learned:
        inspector.index_of(unlearned[0])  # says what the run knows
    if unlearned:
        say(f"categories not judged, as the run has not learned them: {', '.join(unlearned)}")
    return dataset.only(learned), unlearned


def test_samples(
    inspector: Inspector, dataset: Dataset, roots: Sequence[str | Path]
) -> tuple[list[Sample], int]:
    """The test pictures that the run has not seen, and the number of those that it has."""
    seen = set(read_json(inspector.run / PROVENANCE)["fitted_on"])
    if inspector.calibration is not None:
        seen.update(*(own.pictures for own in inspector.calibration.categories.values()))
    samples = unseen(dataset.test, roots, seen)
    num_seen = len(dataset.test) - len(samples)
    if not samples:
        why = f"; all {num_seen} were seen in fitting or calibration" if num_seen else ""
        if num_seen and source_digests(roots):
            why += ", or drawn into pictures that were: synthesize first, then fit on its output"
        raise InputError(f"{', '.join(map(str, roots))}: no test pictures{why}")
    return samples, num_seen


def judge(
    inspector: Inspector,
    samples: Sequence[Sample],
    *,
    pixel_size: int,
    infer_category: bool,
    exact: bool,
    batch_size: int,
) -> Judged:
    samples = sorted(samples, key=row_of)
    parts = "filter" in inspector.config
    judged = Judged(samples, exact, pixel_size, num_maps=3 if parts else 1)
    with bar("judging pictures never seen", len(samples)) as progress:
        for batch, prediction in inspector.predict(
            samples,
            failures=judged.failures,
            batch_size=batch_size if pixel_size else 1,
            mask_size=(pixel_size, pixel_size) if pixel_size else "own",
            known_category=not infer_category,
            parts=parts,
        ):
            judged.add(batch, prediction, inspector.categories)
            progress.at(len(judged.samples) + len(judged.failures))
    judged.finish_row()
    if not judged.samples:
        raise InputError(
            f"none of the {len(samples)} test pictures could be read; {judged.failures[0].reason}"
        )
    name_of = {str(sample.path): row_of(sample) for sample in samples}
    for failure in judged.failures:
        name = name_of[str(failure.path)]
        judged.unreadable[name] = judged.unreadable.get(name, 0) + 1
    return judged
