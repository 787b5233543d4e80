"""Door: the whole way in one command, on real pictures that a package brings along."""

from __future__ import annotations

import time
from pathlib import Path


def demo(*, out: Path = Path("allgood-demo"), seed: int = 0) -> None:
    """Learn two kinds of solar cells from good pictures only, and judge cells never seen.

    The 2,624 electroluminescence pictures of the package elpv-dataset, monocrystalline and
    polycrystalline cells as two categories in one model. Good is defect probability 0, defective is
    1; the 401 cells between, on which the experts were unsure, are left out.

    Args:
        out: folder of the run; an earlier demo there is replaced.
        seed: of the split and of all random choices.
    """
    from allgood.evaluating.evaluate import evaluate
    from allgood.fitting.fit import fit

    started = time.monotonic()
    print(
        "Solar cells, two categories in one model. Good: defect probability 0; defective: 1; "
        "what lies between is left out.",
        flush=True,
    )
    run = fit([Path("elpv")], out=out, seed=seed, max_false_alarm=0.05, overwrite=True)
    evaluation = evaluate(run, [Path("elpv")])
    print(f"\n{evaluation}")
    print(f"run      {run}")
    print(f"time     {time.monotonic() - started:.0f} s")
    print(f"\nnext: allgood inspect {run} PICTURE --overlays heat-maps")
