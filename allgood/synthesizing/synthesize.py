"""Door: good pictures -> pictures with made-up anomalies, their masks, and a sheet to look at.

data read -> foreground chosen -> anomalies drawn beside OUT -> moved to OUT as a whole;
`job` has the parts
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

SHEET = "contact_sheet.png"


def synthesize(
    data: list[Path],
    *,
    out: Path = Path("synthetic"),
    count: int = 1,
    total: int | None = None,
    image_size: int | None = None,
    textures: Path | None = None,
    foreground: Literal["auto", "off", "dark", "bright"] = "auto",
    foreground_of: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    layout: str | None = None,
    categories: tuple[str, ...] | None = None,
    train_share: float = 0.8,
    seed: int = 0,
) -> Path:
    """Draw anomalies into good pictures: a data set with masks where no defects were ever seen.

    OUT has the MVTec layout, so every command reads it: the good training pictures in train/good,
    the good test pictures in test/good and, with anomalies, in test/synthetic; masks in
    ground_truth/synthetic. Where the data have no good test pictures, some of the training ones
    are taken for it. Beside them lie contact_sheet.png, to look at, and synthesis.json, which says
    what was drawn into what. Synthesize first, then fit on OUT: an evaluation leaves out what was
    drawn into pictures that the run has seen.

    Args:
        data: folders or manifests, as for fitting.
        out: a new or empty folder.
        count: anomalies per good test picture.
        total: so many in all instead, spread over the pictures in an order that the seed gives.
        image_size: side of a square to which pictures are squashed; default: their own size.
        textures: folder of pictures whose texture may appear; default: procedural textures.
        foreground: where anomalies may lie: off (anywhere), on the dark or the bright side of the
            picture, or auto: chosen per category, the object where an even background surrounds it.
        foreground_of: of single categories, as CATEGORY=MODE.
        settings: of the synthesis, as name=value, e.g. scratch=2 texture=0 min_change=20.
        layout: how the data lie on disk, where it is not recognised; see `allgood list datasets`.
        categories: only these; default: all that the data hold.
        train_share: share of the good pictures that is for training, where disk does not say.
        seed: of all random choices.

    Returns:
        the folder.

    Raises:
        InputError: anything given that cannot be used, in one sentence.
    """
    arguments = dict(locals())
    from allgood.data.fingerprint import SYNTHESIS_RECORD
    from allgood.data.readers import read_data
    from allgood.data.synthesis import SynthesisConfig, Synthesizer
    from allgood.options import require_at_least
    from allgood.progress import say
    from allgood.recipes import configured
    from allgood.runs import command_line, write_json
    from allgood.synthesizing.job import (
        built_beside,
        contact_sheet,
        draw_all,
        foregrounds,
        plan_draws,
        require_empty,
        save_png,
    )

    require_at_least(1, count=count, total=total, image_size=image_size)
    require_at_least(0, seed=seed)
    # Whatever the settings say: a clean draw would be a good picture among the defective.
    config = replace(configured(SynthesisConfig, {}, settings), clean_probability=0.0)
    out = Path(os.path.abspath(out))
    require_empty(out)
    dataset = read_data(data, layout=layout, train_share=train_share, seed=seed)
    dataset = dataset.only(categories) if categories else dataset
    plan = plan_draws(dataset, count, total, train_share, seed)
    modes = foregrounds(dataset, foreground, foreground_of)
    synthesizer = Synthesizer(config, seed=seed, textures=textures, foreground=modes)
    with built_beside(out) as building:
        done = draw_all(plan, building, synthesizer, image_size)
        save_png(building / SHEET, contact_sheet([pair for item in done for pair in item.shown]))
        entries = [entry for item in done for entry in item.entries]
        record = {
            "command": command_line(synthesize, arguments),
            "seed": seed,
            "settings": asdict(config),
            "foreground": modes,
            "pictures": entries,
            "made_from": {name: item.digest for item in done for name in item.files},
        }
        write_json(building / SYNTHESIS_RECORD, record)
    say(f"drew {len(entries)} anomalies; foreground: {_words(modes)}; look at {out / SHEET}")
    for reason in (
        *(item.failure.reason for item in done if item.failure is not None),
        *synthesizer.unreadable.values(),
    ):
        say(f"left out: {reason}")
    return out


def _words(modes: Mapping[str, str]) -> str:
    """`bottle bright, tile off`; one word where all are alike."""
    alike = set(modes.values())
    if len(alike) == 1:
        return alike.pop()
    return ", ".join(f"{category} {mode}" for category, mode in modes.items())
