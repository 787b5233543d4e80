"""Reading pictures and masks: every kind of file is read right, or refused in one sentence."""

import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_trees import encoded, picture, save, spot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from allgood.data.images import read_image, read_mask, read_oriented_image
from allgood.types import InputError


def refused(path: Path, **options: int) -> str:
    """The one sentence with which a file is refused; it names the file."""
    with pytest.raises(InputError) as caught:
        read_image(path, **options)
    text = str(caught.value)
    assert path.name.encode("utf-8", "replace").decode() in text and "\n" not in text
    return text


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_plain_picture(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(picture(size=(5, 7)), tmp_path / f"Prüf teil ü.{suffix}", **options)
    image = read_image(path)
    assert image.shape == (5, 7, 3) and image.dtype == np.uint8
    assert image.flags.writeable and image.flags.c_contiguous
    assert np.array_equal(image, np.asarray(picture(size=(5, 7))))


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    path = save(picture(), tmp_path / "x.png", "JPEG")
    assert read_image(path).shape == (24, 24, 3)
    assert read_image(save(picture(), tmp_path / "noname", "BMP")).shape == (24, 24, 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_divided_by_257(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [65535, 65407, 65406, 4095]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / f"x.{suffix}")
    assert np.array_equal(read_image(path)[:, :, 1], [[0, 0, 1, 1], [255, 255, 254, 16]])


def test_32_bit_integers_within_16_bits(tmp_path: Path) -> None:
    good = save(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)), tmp_path / "good.tif")
    assert np.array_equal(read_image(good)[0, :, 0], [0, 255])
    bad = save(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)), tmp_path / "bad.tif")
    assert "0 to 65535" in refused(bad)


def test_float_is_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(np.zeros((3, 3), dtype=np.float32)), tmp_path / "x.tif")
    assert "8 or 16 bits" in refused(path)


def test_alpha_is_composited_over_black(tmp_path: Path) -> None:
    pixels = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]], np.uint8)
    image = read_image(save(Image.fromarray(pixels), tmp_path / "x.png"))
    assert np.array_equal(image[0, :2], [[200, 100, 50], [0, 0, 0]])
    assert np.abs(image[0, 2].astype(int) - [100, 50, 25]).max() <= 1
    grey = read_image(save(Image.fromarray(pixels[:, :, [0, 3]].copy(), "LA"), tmp_path / "la.png"))
    assert np.array_equal(grey[0, :2, 0], [200, 0])


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    indexed.putpalette([9, 9, 9, 250, 0, 0, 0, 0, 250])
    plain = read_image(save(indexed, tmp_path / "plain.png"))
    assert np.array_equal(plain[0], [[9, 9, 9], [250, 0, 0], [0, 0, 250]])
    clear = read_image(save(indexed, tmp_path / "clear.png", transparency=b"\xff\x00\xff"))
    assert np.array_equal(clear[0], [[9, 9, 9], [0, 0, 0], [0, 0, 250]])


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("CMYK", "jpg"), ("CMYK", "tif")])
def test_other_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    assert read_image(save(image, tmp_path / f"x.{suffix}")).min() == 255


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    # Quadrants of flat grey survive JPEG.
    stored = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 16, 0), 32, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(stored), tmp_path / f"x.{suffix}", exif=exif)
    image, applied = read_oriented_image(path)
    # EXIF 2.3: where the stored first row and first column lie when displayed.
    displayed = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }[orientation]
    assert applied == orientation
    assert image.shape[:2] == displayed.shape
    assert np.abs(image[:, :, 0].astype(int) - displayed).max() <= 6


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0broken", b"Exif\0\0II*\0" + b"\xff" * 60_000, b"\0" * 9]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_corrupt_or_huge_exif_does_no_harm(tmp_path: Path, exif: bytes, suffix: str) -> None:
    assert read_image(save(picture(), tmp_path / f"x.{suffix}", exif=exif)).shape == (24, 24, 3)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_out_of_range_is_none(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert read_oriented_image(save(picture(), tmp_path / "x.jpg", exif=exif))[1] == 1


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_first_frame_of_many(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("white", "black", "black")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_image(path).min() > 250


@pytest.mark.parametrize("size", [(1, 1), (10, 30_000), (30_000, 10)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    assert read_image(save(picture(size=size), tmp_path / "x.png")).shape == (*size, 3)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
def test_truncated_files(tmp_path: Path, format: str) -> None:
    whole = encoded(format)
    for share in (0.02, 0.3, 0.6, 0.9):
        path = tmp_path / f"cut{share}.png"
        path.write_bytes(whole[: max(1, int(len(whole) * share))])
        assert "copy it again" in (text := refused(path)) or "not a picture" in text


def test_empty_and_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert "empty (0 bytes)" in refused(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no picture at all, but long enough for a header")
    assert "not a picture" in refused(tmp_path / "text.png")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "not a picture" in refused(tmp_path / "eps.png")  # Pillow would start Ghostscript


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait forever
    assert "folder" in refused(tmp_path / "folder.png")
    assert "link leads nowhere" in refused(tmp_path / "link.png")
    assert "cannot be opened" in refused(tmp_path / "loop.png")
    assert "regular file" in refused(tmp_path / "pipe.png")
    assert "no such file" in refused(tmp_path / "gone.png")
    assert "cannot be opened" in refused(tmp_path / ("x" * 300 + ".png"))
    with pytest.raises(InputError, match="cannot be opened"):
        read_image("nul\0.png")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(picture(), tmp_path / "x.png")

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    assert "not permitted" in refused(path)


def test_names_that_are_no_utf8_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.touch()
    refused(path).encode("utf-8")
    assert read_image(save(picture(), path)).shape == (24, 24, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and delivers almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_001, 12_000, 20_000, 2_000_000])
def test_bombs_are_refused_from_the_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    assert "make it smaller" in refused(path)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    path = save(picture(size=(10, 10)), tmp_path / "x.png")
    assert "10x10 pixels are more than the limit of 99" in refused(path, max_pixels=99)
    assert read_image(path, max_pixels=100).shape == (10, 10, 3)
    # Between Pillow's limit and twice it, Pillow warns; ours decides.
    (tmp_path / "wide.png").write_bytes(png_header(12_000, 12_000))
    assert "cut off or damaged" in refused(tmp_path / "wide.png", max_pixels=150_000_000)


def test_limits_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    path, before = save(picture(), tmp_path / "x.png"), Image.MAX_IMAGE_PIXELS

    def read(i: int) -> bool:
        try:
            read_image(path, max_pixels=10 if i % 2 else 1000)
            return True
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(400))) == [i % 2 == 0 for i in range(400)]
    assert before == Image.MAX_IMAGE_PIXELS


def test_nothing_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(12_000, 12_000))  # Pillow would warn
    (tmp_path / "cut.tif").write_bytes(encoded("TIFF")[:-30])
    exif = Image.Exif()
    exif[0x0112] = 6
    broken = exif.tobytes()[:-9] + b"\xff" * 9
    save(picture(), tmp_path / "exif.jpg", exif=broken)
    code = (
        "import sys\nfrom pathlib import Path\nfrom allgood.data.images import read_image\n"
        "from allgood.types import InputError\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: read_image(path)\n"
        "    except InputError: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_warning_filters_are_left_as_they_were(tmp_path: Path) -> None:
    path, before = save(picture(), tmp_path / "x.png"), list(warnings.filters)
    start = threading.Barrier(4)

    def read() -> None:
        start.wait()
        for _ in range(20):
            read_image(path)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


HEADERS = [encoded(format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_only_input_errors_come_out(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(HEADERS)))
    for _ in range(data.draw(st.integers(1, 8))):
        # Headers are where plugins trip, so most damage lands there.
        end = data.draw(st.sampled_from([40, 200, len(content)]))
        content[data.draw(st.integers(0, min(end, len(content)) - 1))] = data.draw(
            st.integers(0, 255)
        )
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path / "fuzz.png"
    path.write_bytes(content + data.draw(st.binary(max_size=20)))
    try:
        image = read_image(path, max_pixels=1_000_000)
    except InputError as error:
        assert "fuzz.png" in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


# -- masks ---------------------------------------------------------------------------------------

SPOT = np.asarray(spot()) > 0
SIZE = SPOT.shape


@pytest.mark.parametrize("value", [1, 2, 255])
def test_small_label_values_count(tmp_path: Path, value: int) -> None:
    path = save(spot(value=value), tmp_path / "m.png")
    assert np.array_equal(read_mask([path], size=SIZE), SPOT)


def test_threshold_is_inclusive(tmp_path: Path) -> None:
    path = save(spot(value=128), tmp_path / "m.png")
    assert read_mask([path], size=SIZE, threshold=128).any()
    assert not read_mask([path], size=SIZE, threshold=129).any()
    for threshold in (0, 256):
        with pytest.raises(InputError, match="between 1 and 255"):
            read_mask([path], size=SIZE, threshold=threshold)


def test_union_and_none(tmp_path: Path) -> None:
    turned = Image.fromarray(np.asarray(spot())[::-1])
    paths = [save(spot(), tmp_path / "a.png"), save(turned, tmp_path / "b.bmp")]
    assert np.array_equal(read_mask(paths, size=SIZE), SPOT | SPOT[::-1])
    assert not read_mask([], size=SIZE).any()


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "CMYK"])
def test_mask_modes(tmp_path: Path, mode: str) -> None:
    image = spot().convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(0)  # alpha says nothing about the part
    suffix = "tif" if mode == "CMYK" else "png"
    assert np.array_equal(read_mask([save(image, tmp_path / f"m.{suffix}")], size=SIZE), SPOT)


def test_faint_blue_counts(tmp_path: Path) -> None:
    blue = np.zeros((*SIZE, 3), np.uint8)
    blue[SPOT, 2] = 1  # as grey it would round to 0
    path = save(Image.fromarray(blue), tmp_path / "m.png")
    assert np.array_equal(read_mask([path], size=SIZE), SPOT)


@pytest.mark.parametrize(
    "palette",
    [
        [0, 0, 0, 128, 0, 0],  # VOC
        [200, 200, 0, 0, 0, 0],
        [200, 200, 200, 90, 90, 90],
        [0, 0, 0, 0, 0, 0],  # never set
    ],
)
def test_palette_masks_go_by_index(tmp_path: Path, palette: list[int]) -> None:
    indexed = Image.fromarray(SPOT.astype(np.uint8), "P")
    indexed.putpalette(palette)
    path = save(indexed, tmp_path / "m.png")
    assert np.array_equal(read_mask([path], size=SIZE), SPOT)


def test_palette_masks_in_black_and_white_go_by_colour(tmp_path: Path) -> None:
    """A conversion may put white first: the index would give the mask inverted."""
    indexed = Image.fromarray((~SPOT).astype(np.uint8), "P")
    indexed.putpalette([255, 255, 255, 0, 0, 0])
    colour = spot().convert("RGB")
    for path in (
        save(indexed, tmp_path / "m.png"),
        save(indexed.convert("PA"), tmp_path / "m.tif"),
        save(colour.quantize(2), tmp_path / "q.png"),
        save(colour.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path / "a.png"),
        save(colour, tmp_path / "m.gif"),
    ):
        assert np.array_equal(read_mask([path], size=SIZE), SPOT), path
    black = save(spot(value=0).convert("RGB").quantize(2), tmp_path / "black.png")
    assert not read_mask([black], size=SIZE).any()
    assert not read_mask(
        [save(spot(value=90).convert("P"), tmp_path / "l.png")], size=SIZE, threshold=128
    ).any()


def test_16_bit_masks(tmp_path: Path) -> None:
    path = save(Image.fromarray(SPOT.astype(np.uint16)), tmp_path / "m.png")
    assert np.array_equal(read_mask([path], size=SIZE), SPOT)
    assert not read_mask([path], size=SIZE, threshold=128).any()
    full = save(Image.fromarray(SPOT.astype(np.uint16) * 65535), tmp_path / "f.png")
    assert np.array_equal(read_mask([full], size=SIZE, threshold=128), SPOT)


def test_float_masks_are_nonzero_or_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(SPOT.astype(np.float32)), tmp_path / "m.tif")
    assert np.array_equal(read_mask([path], size=SIZE), SPOT)
    with pytest.raises(InputError, match="cannot be cut at 128"):
        read_mask([path], size=SIZE, threshold=128)


def test_other_size_with_the_same_aspect(tmp_path: Path) -> None:
    path = save(spot(), tmp_path / "m.png")
    doubled = read_mask([path], size=(48, 48))
    assert np.array_equal(doubled, np.repeat(np.repeat(SPOT, 2, 0), 2, 1))
    odd = save(Image.new("L", (770, 322), 255), tmp_path / "odd.png")  # half of 645, rounded
    assert read_mask([odd], size=(645, 1540)).all()


def test_other_aspect_names_both_sizes(tmp_path: Path) -> None:
    path = save(Image.new("L", (30, 20)), tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png: the mask is 30x20 .* picture is 24x24"):
        read_mask([path], size=SIZE)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_of_turned_pictures(tmp_path: Path, orientation: int) -> None:
    stored = spot((20, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(stored.convert("RGB"), tmp_path / "x.png", exif=exif)
    image, applied = read_oriented_image(tmp_path / "x.png")
    displayed = image[:, :, 0] > 0
    masks = [
        save(stored, tmp_path / "stored.png"),
        save(stored, tmp_path / "tagged.png", exif=exif),
        save(Image.fromarray(displayed), tmp_path / "displayed.png"),
    ]
    for path in masks:
        got = read_mask([path], size=(40, 20), orientation=applied)
        assert np.array_equal(got, displayed), path.name
