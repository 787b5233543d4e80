"""Door: a run and good pictures -> thresholds with a promised false-alarm rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from allgood.types import InputError

if TYPE_CHECKING:
    from allgood.calibration import Calibration


def calibrate(
    run: Path,
    good: list[Path],
    *,
    max_false_alarm: float | None = None,
    category: str | None = None,
    layout: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> Calibration:
    """Set the alarm thresholds of a run from good pictures that it has not been fitted on.

    Args:
        run: folder of a fitted run.
        good: folders or manifests; every good picture in them counts, of every split, but copies
            of one file once. Pictures the run was fitted on are left out: they would make the
            thresholds too low.
        max_false_alarm: share of good pictures that may raise an alarm, of every category of the
            run; 1 / (n + 1) is the least that n pictures can promise. Default: the run's own so
            far, or 0.01.
        category: what the pictures show, where the folder's name does not say. Data of several
            categories say it themselves; those never learned are left out.
        layout: how the pictures lie on disk, where it is not recognised.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.

    Returns:
        the calibration, which also stands in the run's folder from then on. Categories that `good`
        does not show keep their pictures.

    Raises:
        InputError: too few pictures for the rate, no category that was learned, no good pictures,
            the run was replaced by another meanwhile.
    """
    from allgood.calibrating.job import (
        learned_good,
        require_enough_kept,
        run_digest,
        score_good,
        unseen_by,
    )
    from allgood.calibration import Calibration, require_rate
    from allgood.data.readers import read_data
    from allgood.inference import Inspector
    from allgood.options import require_at_least
    from allgood.progress import say
    from allgood.runs import CALIBRATION, METRICS, REPORT, require_writable, write_json

    require_at_least(1, batch_size=batch_size)
    if max_false_alarm is not None:
        require_rate(max_false_alarm)
    digest = run_digest(run)
    inspector = Inspector(run, device=device)
    old = inspector.calibration
    rate = max_false_alarm or (old.max_false_alarm if old is not None else 0.01)
    roots = [good] if isinstance(good, str | Path) else list(good)
    samples = learned_good(read_data(roots, layout=layout), roots, category, inspector)
    require_enough_kept(old, {sample.category for sample in samples}, rate)
    require_writable(inspector.run, [CALIBRATION])
    scores, failures = score_good(inspector, unseen_by(samples, inspector, roots), batch_size)
    for failure in failures:
        say(f"left out: {failure.reason}")
    if not scores:
        raise InputError(f"none of the good pictures could be read; {failures[0].reason}")
    calibration = Calibration(rate, {**(old.categories if old else {}), **scores})
    if run_digest(run) != digest:
        raise InputError(f"run '{run}' was replaced by another meanwhile: calibrate it again")
    write_json(inspector.run / CALIBRATION, calibration.to_json())
    if (inspector.run / REPORT).exists():
        say(
            f"{METRICS} and {REPORT} of run '{run}' do not know these thresholds: "
            "`allgood evaluate` writes both anew"
        )
    return calibration
