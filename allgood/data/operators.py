"""The ten operators that change a source picture, on 8 bits, as imgaug 0.4 defines them.

imgaug itself is unmaintained and does not import with today's NumPy. RGB in, RGB out; a table of
256 values per channel does what rests on the value alone. Letters: H W pixels.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601, as Pillow's "L"


def gamma_per_channel(image: Image.Image, generator: Generator) -> Image.Image:
    """255 (v / 255)^g, g in U(0.5, 2) for each channel."""
    level = np.arange(256) / 255
    tables = [255 * level ** generator.uniform(0.5, 2) for _ in range(3)]
    return image.point(np.concatenate(tables).round().astype(int).tolist())


def brightness(image: Image.Image, generator: Generator) -> Image.Image:
    """Lightness times U(0.8, 1.2) plus U(-30, 30), in either order, in a colour space of six."""
    space = BRIGHTNESS_SPACES[generator.integers(len(BRIGHTNESS_SPACES))]
    times, plus = generator.uniform(0.8, 1.2), generator.uniform(-30, 30)
    if generator.random() < 0.5:
        plus *= times  # first added, then multiplied
    return Image.fromarray(with_lightness(np.asarray(image), space, times, plus))


def sharpness(image: Image.Image, generator: Generator) -> Image.Image:
    """Pillow's, factor U(0, 2): 0 blurs, 1 leaves, 2 sharpens."""
    return ImageEnhance.Sharpness(image).enhance(generator.uniform(0, 2))


def hue_and_saturation(image: Image.Image, generator: Generator) -> Image.Image:
    """Each shifted by an integer in [-50, 50]; hue, 255 for the circle, wraps around."""
    hue, saturation = generator.integers(-50, 51, 2)
    level = np.arange(256)
    tables = [(level + hue) % 256, (level + saturation).clip(0, 255), level]
    return image.convert("HSV").point(np.concatenate(tables).tolist()).convert("RGB")


def solarize(image: Image.Image, generator: Generator) -> Image.Image:
    """With probability 0.5, values at or above a threshold U(32, 128) are inverted."""
    if generator.random() < 0.5:
        return image
    return ImageOps.solarize(image, generator.uniform(32, 128))  # type: ignore[arg-type]


def posterize(image: Image.Image, generator: Generator) -> Image.Image:
    """1 to 8 bits stay."""
    return ImageOps.posterize(image, int(generator.integers(1, 9)))


def invert(image: Image.Image, generator: Generator) -> Image.Image:
    """255 - v."""
    return ImageOps.invert(image)


def autocontrast(image: Image.Image, generator: Generator) -> Image.Image:
    """Pillow's, with one cutoff U(0, 20) percent for all channels."""
    return ImageOps.autocontrast(image, cutoff=generator.uniform(0, 20))


def equalize(image: Image.Image, generator: Generator) -> Image.Image:
    """Pillow's, channel by channel."""
    return ImageOps.equalize(image)


def rotate(image: Image.Image, generator: Generator) -> Image.Image:
    """By U(-45, 45) degrees, black outside."""
    return image.rotate(generator.uniform(-45, 45), Image.Resampling.BILINEAR)


OPERATORS: dict[str, Callable[[Image.Image, Generator], Image.Image]] = {
    operator.__name__: operator
    for operator in (
        *(gamma_per_channel, brightness, sharpness, hue_and_saturation, solarize),
        *(posterize, invert, autocontrast, equalize, rotate),
    )
}

BRIGHTNESS_SPACES = ("YCrCb", "HSV", "HLS", "Lab", "Luv", "YUV")


def augment(image: np.ndarray, count: int, generator: Generator) -> np.ndarray:
    """`count` different operators in random order: (H, W, 3) uint8."""
    names = list(OPERATORS)
    picture = Image.fromarray(image)
    for i in generator.choice(len(names), count, replace=False):
        picture = OPERATORS[names[i]](picture, generator)
    return np.asarray(picture)


def with_lightness(image: np.ndarray, space: str, times: float, plus: float) -> np.ndarray:
    """The lightness channel of a colour space, 0 to 255, becomes clip(times * it + plus, 0, 255);
    the other two channels stay. (H, W, 3) uint8.

    YCrCb, YUV: Y' - Y is added to red, green and blue.
    HSV: the pixel is scaled by V' / V; black has no hue and becomes grey.
    HLS: chroma is S (1 - |2L - 1|), so distances from L scale by the ratio of those brackets.
    Lab: the cube roots of X, Y, Z move together by (L' - L) / 116.
    Luv: u' - u'_n and v' - v'_n scale by L / L'. Both with sRGB's curve and white D65.
    """
    if space in ("Lab", "Luv"):
        changed = _with_cie_lightness(image, space, times, plus)
        return changed.round().clip(0, 255).astype(np.uint8)
    rgb = image.astype(np.float32)
    red, green, blue = np.moveaxis(rgb, 2, 0)  # numpy's max over a last axis of 3 is slow
    high = np.maximum(np.maximum(red, green), blue)
    if space == "HSV":
        target = (high * times + plus).clip(0, 255)
        black = (high == 0)[..., None]
        rgb *= (target / np.maximum(high, 1))[..., None]
        rgb += target[..., None] * black
    elif space == "HLS":
        lightness = (high + np.minimum(np.minimum(red, green), blue)) / 2
        target = (lightness * times + plus).clip(0, 255)
        room = np.maximum(255 - np.abs(2 * lightness - 255), 1)
        ratio = (255 - np.abs(2 * target - 255)) / room
        rgb -= lightness[..., None]
        rgb *= ratio[..., None]
        rgb += target[..., None]
    else:
        lightness = rgb @ LUMA
        rgb += ((lightness * times + plus).clip(0, 255) - lightness)[..., None]
    return (rgb.clip(0, 255) + np.float32(0.5)).astype(np.uint8)


_TO_XYZ = np.array(  # linear sRGB to X/Xn, Y, Z/Zn of D65
    [
        [0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456],
        [0.212671, 0.715160, 0.072169],
        [0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754],
    ],
    np.float32,
)
_FROM_XYZ = np.linalg.inv(_TO_XYZ)
_LEVEL = np.arange(256, dtype=np.float32) / 255
_LINEAR = np.where(_LEVEL <= 0.04045, _LEVEL / 12.92, ((_LEVEL + 0.055) / 1.055) ** 2.4)
_WHITE_XZ = (0.950456, 1.088754)  # Xn and Zn, with Yn = 1


def _with_cie_lightness(image: np.ndarray, space: str, times: float, plus: float) -> np.ndarray:
    """`with_lightness` for Lab and Luv: (H, W, 3) float32, 0 to 255."""
    xyz = _LINEAR[image] @ _TO_XYZ.T
    luminance = xyz[..., 1]
    lightness = 116 * _cie_root(luminance) - 16
    target = (lightness * times + plus * (100 / 255)).clip(0, 100)
    if space == "Lab":
        root = _cie_root(xyz) + ((target - lightness) / 116)[..., None]
        new = np.where(root > 6 / 29, root**3, (root - 4 / 29) * (108 / 841))
    else:
        x, z = xyz[..., 0] * _WHITE_XZ[0], xyz[..., 2] * _WHITE_XZ[1]
        whole = np.maximum(x + 15 * luminance + 3 * z, 1e-6)
        white = _WHITE_XZ[0] + 15 + 3 * _WHITE_XZ[1]
        u_white, v_white = 4 * _WHITE_XZ[0] / white, 9 / white
        shrink = np.where(target > 1e-3, lightness / np.maximum(target, 1e-3), 0)
        shrink = np.where(luminance > 1e-6, shrink, 0)  # black has no colour
        u = u_white + (4 * x / whole - u_white) * shrink
        v = np.maximum(v_white + (9 * luminance / whole - v_white) * shrink, 1e-3)
        root = (target + 16) / 116
        y = np.where(root > 6 / 29, root**3, (root - 4 / 29) * (108 / 841))
        new_x, new_z = y * 9 * u / (4 * v), y * (12 - 3 * u - 20 * v) / (4 * v)
        new = np.stack([new_x / _WHITE_XZ[0], y, new_z / _WHITE_XZ[1]], axis=-1)
    return 255 * _srgb((new @ _FROM_XYZ.T).clip(0, 1))


def _cie_root(t: np.ndarray) -> np.ndarray:
    return np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (841 / 108) + 4 / 29)


def _srgb(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
