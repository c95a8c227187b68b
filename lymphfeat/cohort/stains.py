"""Stain normalisation: pictures given the levels of one reference, by optical density.

By Beer and Lambert's law a dye of amount d lets the share exp(-k d) of the light through. So each
colour channel is mapped by a power law, with which its background becomes the reference's, and so
does the density of its darkest structures: x → W (x / w) ** (D / d), where w is the background and
d the optical density of the picture, or of all of a patient's, and W and D those of the reference.
It is Reinhard's and Macenko's purpose without their assumption of two dyes on tissue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.image_statistics import Pixels
from lymphfeat.cohort.images import Normalise, decode_crop
from lymphfeat.settings import StainNormalization

# Background and density of red, green and blue: the medians over the lymphocytes of pbc-cells.
_REFERENCE_WHITE = (255.0, 231.0, 209.0)
_REFERENCE_DENSITY = (1.29, 2.10, 0.55)
_WHITE, _DARK = 0.98, 0.05  # quantiles of a channel's levels
_LEAST_DENSITY = 0.05
_STRONGEST = 3.0  # exponent, and its inverse the weakest
_MEASURED_IMAGES = 100  # of a patient, evenly spaced


@dataclass(frozen=True, kw_only=True)
class Stain:
    """Background levels (3,) and optical densities (3,) of red, green and blue."""

    white: NDArray[np.float64]
    density: NDArray[np.float64]

    @classmethod
    def measure(cls, images: Sequence[Pixels]) -> "Stain":
        """Measure images (3, H, W) uint8 together."""
        counts = sum(_count_levels(pixels) for pixels in images)  # (3, 256)
        shares = np.cumsum(counts, axis=1) / np.sum(counts, axis=1, keepdims=True)
        white, dark = ((shares < quantile).sum(1) for quantile in (_WHITE, _DARK))
        white = np.maximum(white, 1.0)
        density = np.log(white / np.maximum(dark, 1.0))
        return cls(white=white, density=np.maximum(density, _LEAST_DENSITY))

    def normalise(self, pixels: Pixels) -> Pixels:
        """Give an image (3, H, W) uint8 the levels of the reference."""
        power = np.clip(_REFERENCE_DENSITY / self.density, 1 / _STRONGEST, _STRONGEST)
        light = np.arange(256) / self.white[:, None]  # (3, 256)
        levels = np.multiply(light ** power[:, None], np.reshape(_REFERENCE_WHITE, (3, 1)))
        table = np.clip(np.round(levels), 0, 255).astype(np.uint8)
        return np.stack([row[channel] for row, channel in zip(table, pixels, strict=True)])


def _count_levels(pixels: Pixels) -> NDArray[np.int64]:
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])


def stain_normaliser(
    how: StainNormalization, patients: Sequence[Sequence[Path]], crop: int
) -> Normalise | None:
    """Return what normalises an image of these patients; None if nothing is to be done.

    `image` measures each image by itself, `patient` at most 100 images of each patient when the
    first of them is normalised. It may be called by several threads.
    """
    if how == "none":
        return None
    if how == "image":
        return lambda path, pixels: Stain.measure([pixels]).normalise(pixels)
    return _PatientStains(patients, crop)


class _PatientStains:
    """The stain of each patient, measured when it is first needed."""

    def __init__(self, patients: Sequence[Sequence[Path]], crop: int) -> None:
        self._images = {path: images for images in patients for path in images}
        self._stains: dict[Path, Stain] = {}  # by a patient's first image
        self._crop, self._lock = crop, Lock()

    def __call__(self, path: Path, pixels: Pixels) -> Pixels:
        images = self._images[path]
        with self._lock:
            if images[0] not in self._stains:
                self._stains[images[0]] = self._measure(images)
        return self._stains[images[0]].normalise(pixels)

    def _measure(self, images: Sequence[Path]) -> Stain:
        places = np.linspace(0, len(images) - 1, min(len(images), _MEASURED_IMAGES)).round()
        chosen = [images[int(place)] for place in places]
        return Stain.measure([decode_crop(each, self._crop).pixels for each in chosen])
