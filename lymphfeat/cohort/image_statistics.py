"""What can be measured of a cell image without a network: stain, brightness, focus, scale.

Colour is measured in optical densities, as light is absorbed. A hue is an angle, so it is given by
its two coordinates, which can be averaged (hue-saturation-density model, van der Laak et al.,
Cytometry 2000).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEVELS = np.arange(256)
_DENSITIES = -np.log((_LEVELS + 1) / 256)  # (256,) optical density of each level; 0 of white
_BRIGHT = 0.9  # of the pixels are at most as bright as the background
_LEAST = 1e-6  # stands in for the density or contrast of a blank image
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Statistic:
    """A number of an image, and how an image is called that has too little or too much of it."""

    name: str
    low: str
    high: str


STATISTICS = (
    # mean optical density of the nucleus
    Statistic("nucleus_density", "paler nuclei", "darker nuclei"),
    # excess of the red light that the nucleus absorbs, and of green over blue light, per density
    Statistic("nucleus_blue", "redder nuclei", "bluer nuclei"),
    Statistic("nucleus_purple", "less purple nuclei", "more purple nuclei"),
    # the same of all that is not nucleus
    Statistic("rest_blue", "redder surroundings", "bluer surroundings"),
    Statistic("rest_purple", "yellower surroundings", "pinker surroundings"),
    # brightness, 0 to 1, that a tenth of the pixels exceed
    Statistic("background", "darker background", "brighter background"),
    # log10 of the mean squared Laplacian of the brightness by its variance
    Statistic("focus", "blurred", "sharper or noisier"),
    # log2 of the nucleus's pixels
    Statistic("nucleus_area", "smaller nuclei", "larger nuclei"),
)
NAMES = tuple(each.name for each in STATISTICS)


def measure_image(pixels: Pixels) -> NDArray[np.float32]:
    """Return the `STATISTICS` of one image (3, H, W), red, green, blue: (S,), always finite.

    The nucleus is what absorbs more red light than Otsu's threshold: red cells absorb little of it.
    """
    nucleus = _dark(pixels[0])  # (H, W)
    brightness = _brightness(pixels)  # (H, W)
    outside, inside = _counts(pixels, nucleus)
    numbers = [
        *_colour(inside),
        *_colour(outside)[1:],
        _quantile(brightness, _BRIGHT) / 255,
        _focus(brightness),
        float(np.log2(1 + np.count_nonzero(nucleus))),
    ]
    return np.array(numbers, np.float32)


def _brightness(pixels: Pixels) -> Pixels:
    red, green, blue = pixels.astype(np.uint16)
    return np.asarray((77 * red + 150 * green + 29 * blue) >> 8, np.uint8)


def _dark(channel: Pixels) -> Mask:
    """Return the pixels (H, W) above Otsu's threshold between densities; none of a blank image."""
    counts = np.bincount(channel.ravel(), minlength=256).astype(np.float64)  # (256,)
    below = np.cumsum(counts)  # pixels at most as bright as a level
    density = np.cumsum(counts * _DENSITIES)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = density / below - (density[-1] - density) / above
        between = np.nan_to_num(below * above * gap**2)
    threshold = int(np.argmax(between)) if between.any() else -1
    return np.asarray(channel <= threshold)


def _counts(pixels: Pixels, nucleus: Mask) -> NDArray[np.int64]:
    """Count the pixels of every level in each channel, outside and inside the nucleus: (2, 3, 256).

    At once, as picking out the pixels of a mask takes longer than counting them.
    """
    levels = pixels + np.uint16(256) * nucleus  # (3, H, W)
    counts = [np.bincount(channel.ravel(), minlength=512) for channel in levels]
    return np.stack(counts).reshape(len(counts), 2, 256).swapaxes(0, 1)


def _colour(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return mean density and both coordinates of the hue of counted pixels (3, 256); 0 of none."""
    red, green, blue = (float(own @ _DENSITIES) / max(int(own.sum()), 1) for own in counts)
    mean = (red + green + blue) / 3
    scale = max(mean, _LEAST)
    return mean, (red - mean) / scale, float((green - blue) / (np.sqrt(3) * scale))


def _quantile(levels: Pixels, share: float) -> int:
    counts = np.cumsum(np.bincount(levels.ravel(), minlength=256))
    return int(np.searchsorted(counts, share * levels.size))


def _focus(brightness: Pixels) -> float:
    grey = brightness.astype(np.int16)
    inner = 4 * grey[1:-1, 1:-1]
    edges = inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    sharpness = float(np.mean(np.square(edges, dtype=np.float32))) if edges.size else 0.0
    variance = float(np.var(brightness, dtype=np.float64))
    return float(np.log10((sharpness + _LEAST) / (variance + _LEAST)))
