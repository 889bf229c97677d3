"""Changes of colour on 8 bits, as mmsegmentation's recipes make them: results are truncated.

Images are uint8 (..., 3), RGB. Hue, saturation and value are OpenCV's of 8 bits: the hue in steps
of two degrees, 0 to 179.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from fastvim.data.dense_data import chance, integer, uniform

_SHIFT = 12  # bits of the fractions in the conversion to hue and saturation
_HUES = 180
# For each sixth of the circle, what red, green and blue lack of the value, as a share of the
# saturation: nothing (0), all (1), what lies behind the hue (2) or before it (3) in the sixth.
_LACKING = np.array([[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2]])


def distort(image: np.ndarray, probability: float) -> np.ndarray:
    """Change colours as in SSD (arXiv 1512.02325); each change is drawn independently.

    Brightness by up to 32 of 255, contrast and saturation by 0.5 to 1.5, hue by up to 36 degrees;
    contrast comes before the two others or after them.

    Args:
        image: RGB, uint8 (h, w, 3).
        probability: of each change.
    """
    if chance(probability):
        image = linear(image, bias=uniform(-32, 32))
    contrast_first = chance(0.5)
    contrast = uniform(0.5, 1.5) if chance(probability) else 1.0
    if contrast_first:
        image = linear(image, contrast)
    if chance(probability):
        image = saturate(image, uniform(0.5, 1.5))
    if chance(probability):
        image = turn_hue(image, integer(35) - 18)
    return image if contrast_first else linear(image, contrast)


def linear(image: np.ndarray, gain: float = 1.0, bias: float = 0.0) -> np.ndarray:
    """`gain` times each value plus `bias`, cut to 0 to 255: contrast, brightness."""
    values = np.arange(256, dtype=np.float32) * np.float32(gain) + np.float32(bias)
    return values.clip(0, 255).astype(np.uint8)[image]


def saturate(image: np.ndarray, gain: float) -> np.ndarray:
    """The saturation of each pixel times `gain`."""
    hue, saturation, value = to_hsv(image)
    return to_rgb(hue, linear(saturation, gain), value)


def turn_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """The hue of each pixel moved by that many steps of two degrees."""
    hue, saturation, value = to_hsv(image)
    return to_rgb((hue + steps) % _HUES, saturation, value)


def to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB to hue, saturation and value, int32 (...) each."""
    red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_SHIFT - 1)
    saturation = (spread * _shares(255 << _SHIFT)[value] + half) >> _SHIFT
    sixths = np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sixths = np.where(value == red, green - blue, sixths)
    hue = (sixths * _shares((_HUES << _SHIFT) / 6)[spread] + half) >> _SHIFT
    return hue + _HUES * (hue < 0), saturation, value


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Hue, saturation and value, integers (...) each, to RGB."""
    rest = _rest().reshape(-1, 3).take(hue * 256 + saturation, axis=0)
    rest *= (value.astype(np.float32) * np.float32(1 / 255))[..., None]
    rest *= np.float32(255)
    return rest.astype(np.uint8)


@cache
def _rest() -> np.ndarray:
    """What red, green and blue have of the value, float32 (180 hues, 256 saturations, 3)."""
    hue = np.arange(_HUES, dtype=np.float32) * np.float32(6 / _HUES)
    sixth = np.floor(hue)
    behind = hue - sixth
    lacking = np.stack([0 * behind, 0 * behind + 1, behind, 1 - behind], axis=1)
    lacking = np.take_along_axis(lacking, _LACKING[sixth.astype(np.int64)], axis=1)
    saturation = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    # Rounded once, as by one fused instruction.
    exact = 1 - lacking.astype(np.float64)[:, None] * saturation[:, None]
    return exact.astype(np.float32)


@cache
def _shares(whole: float) -> np.ndarray:
    """`whole` divided by each of 0 to 255, rounded; 0 for 0."""
    numbers = np.arange(256)
    return np.rint(np.divide(whole, numbers, out=np.zeros(256), where=numbers > 0)).astype(np.int32)
