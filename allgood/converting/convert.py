"""Door: an official checkpoint -> a run's folder.

authors' file (tensors only) -> every name and shape understood, or refused -> encoder.safetensors
and weights.safetensors -> published as a run that every command takes
"""

from pathlib import Path
from typing import Literal

from allgood.types import InputError


def convert(
    method: Literal["costfilter", "dinomaly", "hvqtrans", "minimaxad", "rd4ad", "uniad", "unias"],
    official: Path,
    *,
    out: Path = Path("run"),
    host: Path | None = None,
    preset: str | None = None,
    good: tuple[Path, ...] = (),
    categories: tuple[str, ...] | None = None,
    layout: str | None = None,
    weights: Path | None = None,
    image_size: int | None = None,
    crop: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Make a run of a checkpoint that a paper's authors published.

    Where the file holds the encoder too, it becomes a part of the run. Where it does not, the
    encoder has the published weights that the authors began with, from the hub or from a file.
    The checkpoint does not say which categories it was trained on: name them, or give their good
    pictures, from which the run then learns to tell the categories apart.

    Args:
        method: whose checkpoint it is.
        official: the authors' file, .pth or .safetensors; only tensors are read from it.
        out: folder of the run.
        host: of a costfilter: the run behind which it stands. It is fitted or converted before,
            and says which categories there are.
        preset: of a costfilter whose file fits several: which of `allgood list presets` it is.
        good: good pictures of the categories, best those that the checkpoint was trained on; of a
            costfilter for AnomalDF or GLAD those that it compares with.
        categories: their names, where no pictures are given; more than one must then be said at
            every inspection. However they are given, their order is the alphabet's, which is the
            authors'.
        layout: how the pictures lie on disk, where it is not recognised.
        weights: file with the encoder's published weights, for a checkpoint without them; left
            out: the hub's. The file must stay where it is.
        image_size: side to which pictures are brought; left out: the authors'.
        crop: side of the square that is then cut from the middle; left out: the authors'.
        batch_size: pictures that pass the network together.
        device: auto, cpu or cuda.
        overwrite: replace a run that stands in the folder.

    Returns:
        the run's folder, still without thresholds: `allgood calibrate` sets them.

    Raises:
        InputError: a file that is not, to the last name and shape, what this method's authors
            write; a picture size that the detector does not take; a category none of whose good
            pictures can be read.
    """
    arguments = dict(locals())
    from allgood.converting.job import convert_detector, convert_filter
    from allgood.options import require_at_least
    from allgood.runs import command_line
    from allgood.unfinished import refuse_folder

    out, path = Path(out), Path(official)
    require_at_least(1, batch_size=batch_size, image_size=image_size, crop=crop)
    refuse_folder(out, overwrite)
    command = command_line(convert, arguments)
    if method == "costfilter":
        if categories or weights or image_size or crop:
            raise InputError(
                "a costfilter takes its categories and encoder from its host: leave out "
                "--categories, --weights, --image-size and --crop"
            )
        if host is None:
            raise InputError("name the run behind which the filter stands, with --host")
        return convert_filter(
            path,
            host,
            out=out,
            preset=preset,
            good=good,
            layout=layout,
            device=device,
            command=command,
        )
    if host is not None or preset is not None:
        raise InputError(f"{method} stands behind no other detector: leave out --host and --preset")
    return convert_detector(
        method,
        path,
        out=out,
        good=good,
        categories=categories,
        layout=layout,
        weights=weights,
        image_size=image_size,
        crop=crop,
        batch_size=batch_size,
        device=device,
        command=command,
    )
