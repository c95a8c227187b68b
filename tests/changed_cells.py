"""Real cells that were made to look otherwise, and made-up patients of them.

benchmarks/familiarity.py tells at length what is noticed of them; docs/familiarity.md shows it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lymphfeat.cohort.image_statistics import NAMES, measure_image
from lymphfeat.cohort.images import find_normalization
from lymphfeat.features.backbones import build_from_settings
from lymphfeat.features.map_encoder import MapEncoder
from lymphfeat.model.familiarity import Familiarity, Judgement
from lymphfeat.runtime.arrays import Floats
from lymphfeat.settings import BackboneSettings

TRAINING = 72  # patients; the others are held out
BATCH = 64
Look = Callable[[Image.Image], Image.Image]
Texts = NDArray[np.str_]


def turned(shift: float) -> Look:
    def look(image: Image.Image) -> Image.Image:
        values = np.array(image.convert("HSV"))
        values[..., 0] += np.uint8(round(shift * 256) % 256)  # around the circle
        return Image.fromarray(values, "HSV").convert("RGB")

    return look


def scaled(factor: float) -> Look:
    def look(image: Image.Image) -> Image.Image:
        side = round(image.width * factor)
        return image.resize((side, side), Image.Resampling.BICUBIC)

    return look


def blurred(radius: float) -> Look:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


LOOKS: dict[str, Look] = {
    "as it is": lambda image: image,
    "hue + .06": turned(0.06),
    "hue − .06": turned(-0.06),
    "hue + .02": turned(0.02),
    "hue − .02": turned(-0.02),
    "blurred, σ 1 px": blurred(1),
    "blurred, σ .5 px": blurred(0.5),
    "magnified 1.25 times": scaled(1.25),
    "magnified .8 times": scaled(0.8),
    "magnified 1.1 times": scaled(1.1),
}


class Measured:
    """Features and statistics of images that were made to look otherwise."""

    def __init__(self, cache: Path | None) -> None:
        settings = BackboneSettings(weights="bloodcells-v1")  # those of docs/familiarity.md
        self._crop, self._cache = settings.crop, cache
        backbone, _ = build_from_settings(settings)
        self._encoder = MapEncoder(
            backbone,
            normalization=find_normalization(settings.normalization),
            views=("identity",),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def get(
        self, name: str, paths: Sequence[Path], look: Look, stains: Floats | None = None
    ) -> tuple[Floats, pd.DataFrame]:
        """Return pooled features (N, C) and statistics; `stains` (N, 3) factors on densities."""
        file = self._cache / f"{name}.npz" if self._cache else None
        if file and file.exists():
            kept = np.load(file)
            return kept["pooled"].astype(float), pd.DataFrame(kept["statistics"], columns=NAMES)
        crops = [
            self._crop_of(look(_stained(path, None if stains is None else stains[row])))
            for row, path in enumerate(paths)
        ]
        pooled = np.concatenate(
            [
                self._encoder.encode(np.stack(crops[at : at + BATCH])).mean((3, 4))[:, 0]
                for at in range(0, len(crops), BATCH)
            ]
        )
        statistics = np.stack([measure_image(crop) for crop in crops])
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, pooled=pooled, statistics=statistics)
        return pooled.astype(float), pd.DataFrame(statistics, columns=list(NAMES))

    def _crop_of(self, image: Image.Image) -> NDArray[np.uint8]:
        left, top = ((side - self._crop) // 2 for side in image.size)
        box = (left, top, left + self._crop, top + self._crop)
        return np.ascontiguousarray(np.asarray(image.crop(box)).transpose(2, 0, 1))


def _stained(path: Path, factors: Floats | None) -> Image.Image:
    with Image.open(path) as image:
        colours = image.convert("RGB")
    if factors is None:
        return colours
    levels = 255 * (np.asarray(colours) / 255.0) ** factors
    return Image.fromarray(np.round(levels).astype(np.uint8))


class Pool:
    """The images of made-up patients, and what is measured of them."""

    def __init__(self, owner: Texts, cells: Texts) -> None:
        self.cells = cells
        self.rows = {id: np.flatnonzero(owner == id) for id in dict.fromkeys(owner.tolist())}

    def split(self, seed: int) -> tuple[list[str], list[str]]:
        ids = np.random.default_rng(seed).permutation(list(self.rows)).tolist()
        return ids[:TRAINING], ids[TRAINING:]

    def without(self, ids: Sequence[str], cell: str) -> list[NDArray[np.int64]]:
        """Return the rows of patients' images that are not of one kind of cell."""
        kept = [self.rows[id][self.cells[self.rows[id]] != cell] for id in ids]
        return [rows for rows in kept if len(rows)]


Found = tuple[Floats, pd.DataFrame]


def learn(found: Found, bags: Sequence[NDArray[np.int64]], only: bool = False) -> Familiarity:
    """Learn from bags of rows; from features only if asked."""
    return Familiarity.learn(*_taken(found, bags, only))


def judge(model: Familiarity, found: Found, bags: Sequence[NDArray[np.int64]]) -> Judgement:
    return model.judge(*_taken(found, bags, not model.statistics))


def _taken(
    found: Found, bags: Sequence[NDArray[np.int64]], only: bool
) -> tuple[list[Floats], pd.DataFrame | None, list[int]]:
    rows = np.concatenate(bags)
    statistics = None if only else found[1].iloc[rows]
    return [found[0][rows]], statistics, [len(bag) for bag in bags]
