"""Whether patients unlike those of training are noticed, on real cells; and how many like them.

    python benchmarks/familiarity.py ../shared/data [--splits 20] [--cache FOLDER]

`pbc-mil` (made-up patients of real cells, by folder) as it is, with a hue moved by .06, blurred, at
another magnification, or with its lymphocytes replaced by cells of a kind that training lacked.
The patients are drawn at random from one pool, so they are more alike than patients are: in a
second table the stain differs from patient to patient. The limits are those of the final model.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parent.parent))

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
        settings = BackboneSettings()
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


def tell_looks(pool: Pool, found: dict[str, Found], splits: int) -> None:
    """Tell how many held-out patients are unlike training, by how they were made to look."""
    print("| images | patients unlike | by features only | images unlike |\n|---|---|---|---|")
    shares: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    held_out = 0
    for seed in range(splits):
        training, others = pool.split(seed)
        held_out += len(others)
        bags = [pool.rows[id] for id in training]
        models = [learn(found["as it is"], bags, only) for only in (False, True)]
        for name, look in found.items():
            both, features = (
                judge(model, look, [pool.rows[id] for id in others]) for model in models
            )
            shares[name].append(
                (
                    both.patients["unlike"].mean(),
                    features.patients["unlike"].mean(),
                    both.images["unlike"].mean(),
                )
            )
    for name, rows in shares.items():
        print(f"| {name} | " + " | ".join(f"{value:.1%}" for value in np.mean(rows, axis=0)) + " |")
    print(f"{splits} splits, {held_out} held-out patients ({len(pool.rows)} different ones)")


def tell_cells(pool: Pool, found: Found, replaced: str, kinds: Sequence[str], splits: int) -> None:
    """Tell how many patients are unlike training whose cells of a kind are others, new to it."""
    print(f"| {replaced}s replaced by | images replaced | patients unlike | untouched | new |")
    print("|---|---|---|---|---|")
    for kind in kinds:
        rows = []
        for seed in range(splits):
            rng = np.random.default_rng(seed)
            training, others = pool.split(seed)
            model = learn(found, pool.without(training, kind))
            bags = pool.without(others, kind)
            there = np.flatnonzero(pool.cells == kind)
            changed = [
                np.where(pool.cells[bag] == replaced, rng.choice(there, len(bag)), bag)
                for bag in bags
            ]
            exchanged = np.concatenate(changed) != np.concatenate(bags)
            judged = judge(model, found, changed)
            rows.append(
                (
                    exchanged.mean(),
                    judged.patients["unlike"].mean(),
                    judge(model, found, bags).patients["unlike"].mean(),
                    judged.images["unlike"].to_numpy()[exchanged].mean(),
                )
            )
        print(f"| {kind} | " + " | ".join(f"{value:.1%}" for value in np.mean(rows, axis=0)) + " |")


def tell_pbc_mil(data: Path, measured: Measured, splits: int) -> None:
    facts = pd.read_csv(data / "pbc-mil-truth" / "instances.csv", dtype=str)
    paths = [
        data / "pbc-mil" / str(row.SPLIT) / str(row.ID) / str(row.FILE)
        for row in facts.itertuples()
    ]
    owner = facts["ID"].to_numpy(str)
    pool = Pool(owner, facts["CELL_CLASS"].to_numpy(str))
    rng = np.random.default_rng(0)
    stains = {id: rng.normal(1, 0.08) * rng.normal(1, 0.045, 3) for id in pool.rows}
    each = np.stack([stains[id] for id in owner.tolist()])
    for title, name, factors in (
        ("pbc-mil", "plain", None),
        ("pbc-mil, every patient stained otherwise", "stained", each),
    ):
        print(f"\n{title}, {TRAINING} training patients")
        looks = {
            look: measured.get(f"{name}-{number}", paths, change, factors)
            for number, (look, change) in enumerate(LOOKS.items())
        }
        tell_looks(pool, looks, splits)
        if factors is None:
            print()
            tell_cells(
                pool, looks["as it is"], "lymphocyte", ("eosinophil", "basophil", "ig"), splits
            )


def tell_pbc_cells(data: Path, measured: Measured, splits: int) -> None:
    """Draw patients of 16 to 40 lymphocytes, monocytes and neutrophils."""
    kinds = ("lymphocyte", "monocyte", "neutrophil", "eosinophil", "basophil", "platelet")
    folders = {kind: sorted((data / "pbc-cells" / kind).glob("*.jpg")) for kind in kinds}
    folders |= {kind: folders[kind][:500] for kind in kinds[3:]}
    paths = [path for kind in kinds for path in folders[kind]]
    cells = np.repeat(kinds, [len(folders[kind]) for kind in kinds])
    rng = np.random.default_rng(0)
    owner = np.full(len(cells), "", dtype="<U8")
    common = rng.permutation(np.flatnonzero(np.isin(cells, kinds[:3])))
    sizes = rng.integers(16, 41, 200)
    numbers = np.repeat(np.arange(200), sizes)[: len(common)]
    owner[common] = [f"P{number}" for number in numbers]
    pool = Pool(owner, cells)
    del pool.rows[""]
    print(f"\npbc-cells, {len(pool.rows)} patients drawn at random, {TRAINING} of them training")
    found = measured.get("cells", paths, LOOKS["as it is"])
    tell_cells(pool, found, "lymphocyte", kinds[3:], splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = Measured(arguments.cache)
    tell_pbc_mil(arguments.data, measured, arguments.splits)
    tell_pbc_cells(arguments.data, measured, arguments.splits)
