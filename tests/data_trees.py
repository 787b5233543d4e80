"""Tiny data sets on disk, with the traps that real ones hold (wrong suffixes, soft masks, ...)."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24


def picture(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB") -> Image.Image:
    """A picture of (height, width) with values that differ everywhere."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def spot(size: tuple[int, int] = (SIDE, SIDE), value: int = 255) -> Image.Image:
    """A mask: a 4 x 6 block of `value` at row 8, column 5."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[8:12, 5:11] = value
    return Image.fromarray(mask)


def save(image: Image.Image, path: Path, format: str | None = None, **options) -> Path:
    """Write a picture, making its folder; `format` may contradict the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format=format, **options)
    return path


def encoded(format: str, seed: int = 0) -> bytes:
    """The bytes of a small picture in a format."""
    stream = io.BytesIO()
    picture(seed).save(stream, format=format)
    return stream.getvalue()


def junk(folder: Path) -> None:
    """The files that operating systems leave in a folder; none is a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "readme.txt"):
        (folder / name).write_bytes(b"\0junk")
    (folder / "__MACOSX").mkdir(exist_ok=True)
    (folder / "__MACOSX" / "000.png").write_bytes(b"\0junk")


def mvtec(root: Path, category: str = "bottle", *, good: str = "good", bad: str = "crack") -> Path:
    """3 train, 2 good and 3 defective pictures; masks with and without `_mask`, one missing."""
    folder = root / category
    for i in range(3):
        save(picture(i), folder / "train" / good / f"{i:03}.PNG")
    for i in range(2):
        save(picture(10 + i), folder / "test" / good / f"{i:03}.jpg")
    for i in range(3):
        save(picture(20 + i), folder / "test" / bad / f"{i:03}.png", "JPEG")  # by content, not name
    save(spot(), folder / "ground_truth" / bad / "000_mask.png")
    save(spot(value=1), folder / "ground_truth" / bad / "001.bmp")
    for child in (folder / "train" / good, folder / "test" / bad, folder / "ground_truth" / bad):
        junk(child)
    return folder


def goodsad(root: Path, categories: tuple[str, ...] = ("drink_can", "food_box")) -> Path:
    """2 products in training; masks with and without `_mask`, and suffixes that differ."""
    for category in categories:
        folder = root / category
        for i in (1001, 1002, 57003):
            save(picture(i), folder / "train" / "good" / f"{i:06}.jpg")
        save(picture(58001), folder / "test" / "good" / "058001.jpg")
        for i, ending in ((1004, ""), (58002, "_mask")):
            save(picture(i), folder / "test" / "surface_damage" / f"{i:06}.jpg")
            save(spot(), folder / "ground_truth" / "surface_damage" / f"{i:06}{ending}.png")
    return root


def aebad(root: Path) -> Path:
    """AeBAD-S: 2 good and 1 defective picture per domain and kind; equal names in all of them."""
    folder = root / "AeBAD_S"
    kinds, domains = ("good", "ablation", "groove"), ("same", "background", "illumination", "view")
    for number, domain in enumerate(domains[1:]):
        for i in range(2):
            save(
                picture(1000 + 10 * number + i),
                folder / "train" / "good" / domain / f"IMG_{i}.png",
                "JPEG",
            )
        junk(folder / "train" / "good" / domain)
    for number, domain in enumerate(domains):
        for kind in kinds:
            for i in range(2 if kind == "good" else 1):
                seed = 100 * number + 10 * kinds.index(kind) + i
                save(picture(seed), folder / "test" / kind / domain / f"IMG_{i}.png", "JPEG")
            if kind != "good":
                save(spot(value=number + 1), folder / "ground_truth" / kind / domain / "IMG_0.png")
                junk(folder / "ground_truth" / kind / domain)
    return folder


def good_and_bad(root: Path, good: str = "OK", num_good: int = 20) -> Path:
    """`num_good` good pictures, two defect folders, one flat mask."""
    for i in range(num_good):
        save(picture(i), root / good / f"g{i:02}.png")
    save(picture(50), root / "Kratzer groß" / "a b.png")
    save(picture(51), root / "dent" / "c.tif")
    save(spot(), root / "masks" / "a b_label.png")
    return root


def mtd(root: Path) -> Path:
    """10 free tiles, 2 cracked, 1 uneven with an empty mask; masks are soft."""
    for i in range(10):
        save(picture(i, mode="L"), root / "MT_Free" / "Imgs" / f"exp1_num_{i}.jpg")
        save(spot(value=0), root / "MT_Free" / "Imgs" / f"exp1_num_{i}.png")
    for i in range(2):
        save(picture(20 + i, mode="L"), root / "MT_Crack" / "Imgs" / f"exp2_num_{i}.jpg")
        soft = np.asarray(spot()).copy()
        soft[0, 0] = 100  # a speck that > 0 would take for a second region
        save(Image.fromarray(soft), root / "MT_Crack" / "Imgs" / f"exp2_num_{i}.png")
    save(picture(30, mode="L"), root / "MT_Uneven" / "Imgs" / "exp3_num_1.jpg")
    save(spot(value=0), root / "MT_Uneven" / "Imgs" / "exp3_num_1.png")
    return root


def elpv(root: Path, rows: int = 180) -> Path:
    """labels.csv as the package has it, and no pixel read: the pictures are empty files."""
    (root / "images").mkdir(parents=True)
    lines = []
    for i in range(rows):
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[i % 4]
        (root / "images" / f"cell{i:04}.png").touch()
        lines.append(f"images/cell{i:04}.png  {probability:<20} {'mono' if i < 120 else 'poly'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
