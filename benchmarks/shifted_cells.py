"""What frozen backbone weights are worth when every patient's pictures look otherwise.

    python benchmarks/shifted_cells.py --data ../shared/data --work cache/shifted \\
        random=resnet18:none v1=resnet18:bloodcells-v1 v2=resnet18:v2.safetensors \\
        lite0=tf_efficientnet_lite0:imagenet:160:inception [--draws 20] [--against v2]

Real cells: the 104 made-up patients of pbc-mil (label: 8-30 % immature granulocytes), each with a
stain, a focus and a magnification of its own, drawn at random; `--draws` times, and once as they
are. Nothing here is lymphocytosis. For each weights and draw: pooled features become a store, and
`fit-head` fits `mean` and `std` exactly under the honest protocol. Shown are the mean AUC over
draws, what the shift costs, and the paired difference to `--against` with its interval, over
patients (bootstrap) with draws and seeds averaged.

Weights are judged fairly only if none of these cells was seen in their training: leave out those
of pbc-mil with `--unseen FOLDER`, which writes the folder of the other cells of pbc-cells, without
two of its classes, and ends. `--moved FOLDER` writes the patients' own pictures as they look in the
first draw, a folder each, for `pretrain`, and ends. `--moving zoom` changes magnification alone,
`no-zoom` all but magnification.
"""

import argparse
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

import lymphfeat as lf
from lymphfeat.cohort.images import decode_crops, find_normalization
from lymphfeat.cohort.stains import Stain
from lymphfeat.features.augmentation import sample
from lymphfeat.features.backbones import build_from_settings
from lymphfeat.features.map_encoder import MapEncoder
from lymphfeat.settings import BackboneSettings, FitSettings, HeadSettings, StainNormalization

FIELD, CROP, PRETRAINED = 224, 112, 144
HEADS = ("mean", "std")
UNSEEN_CLASSES = ("lymphocyte", "monocyte")
ALL = "all"  # of a look
PLAIN = -1  # the draw in which nothing is moved
BATCH = 64
_FORM = "BACKBONE:WEIGHTS:RESIZE:NORMALIZATION:STAIN_NORMALIZATION"
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Wins = tuple[Floats, Floats]  # won and compared, (tumoral, reactive), summed over splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "weights", nargs="*", help="NAME=BACKBONE:WEIGHTS[:RESIZE[:NORMALIZATION[:STAINS]]]"
    )
    parser.add_argument("--data", type=Path, required=True, help="holds pbc-mil, pbc-cells")
    parser.add_argument("--work", type=Path, default=Path("cache/shifted"))
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--against", help="the weights that the others are compared with")
    parser.add_argument(
        "--unseen", type=Path, help="write a folder of cells pbc-mil lacks, and end"
    )
    parser.add_argument("--moving", choices=(ALL, "zoom", "no-zoom"), default=ALL)
    parser.add_argument("--moved", type=Path, help="write the pictures of the first draw, and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.unseen is not None:
        return link_unseen(args.data, args.unseen)
    patients = Patients(args.data, args.moving)
    if args.moved is not None:
        return patients.write(args.moved, draw=0)
    candidates = [Candidate.parse(text) for text in args.weights]
    print(
        "| weights | head | as they are | moved (draws) | the shift costs |\n|---|---|---|---|---|"
    )
    wins: dict[str, dict[str, list[Wins]]] = {}
    for candidate in candidates:
        cache = Cache(args.work / args.moving / candidate.name, patients, args.seeds, args.threads)
        found = [cache.wins(candidate, draw) for draw in (PLAIN, *range(args.draws))]
        wins[candidate.name] = {head: [draw[head] for draw in found] for head in HEADS}
        tell(candidate.name, wins[candidate.name])
    if args.against:
        compare(wins, args.against)


def link_unseen(data: Path, folder: Path) -> None:
    """Fill `folder` with links to the cells of pbc-cells that are in no bag, by class."""
    used = set(pd.read_csv(data / "pbc-mil-truth" / "instances.csv")["SOURCE_FILE"])
    for source in sorted((data / "pbc-cells").iterdir()):
        if not source.is_dir() or source.name in UNSEEN_CLASSES:
            continue
        (folder / source.name).mkdir(parents=True)
        for path in sorted(source.glob("*.jpg")):
            if path.name not in used:
                (folder / source.name / path.name).symlink_to(path.resolve())


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to be measured."""

    name: str
    settings: BackboneSettings

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        name, _, rest = text.partition("=")
        backbone, weights, resize, normalization, stains = [*rest.split(":"), "", "", ""][:5]
        settings = BackboneSettings(
            backbone=backbone,
            weights=weights,
            crop=CROP,
            resize=int(resize) if resize else None,
            normalization=normalization or "imagenet",  # type: ignore[arg-type]
            stain_normalization=stains or "none",  # type: ignore[arg-type]
        )
        return cls(name=name, settings=settings)

    def encoder(self) -> MapEncoder:
        backbone, _ = build_from_settings(self.settings)
        return MapEncoder(
            backbone,
            normalization=find_normalization(self.settings.normalization),
            views=("identity",),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


class Patients:
    """pbc-mil: pictures and labels, those of its test patients included."""

    def __init__(self, data: Path, moved: str = ALL) -> None:
        self._moved = moved
        facts = pd.read_csv(data / "pbc-mil-truth" / "instances.csv", dtype=str)
        facts = facts.sort_values(["ID", "FILE"], kind="stable")
        owners, names = facts["ID"].tolist(), facts["FILE"].tolist()
        mil = data / "pbc-mil"
        paths = [mil / s / i / f for s, i, f in zip(facts["SPLIT"], owners, names, strict=True)]
        self.fields = torch.from_numpy(decode_crops(paths, FIELD))  # (N, 3, 224, 224) uint8
        self.ids, self.n_images = np.unique(owners, return_counts=True)
        self.labels = (facts.groupby("ID")["CELL_CLASS"].agg(lambda kinds: "ig" in set(kinds))).loc[
            self.ids
        ]

    def write(self, folder: Path, draw: int) -> None:
        """Write each patient's pictures, larger than crops, in the look of a draw."""
        for id, pictures in zip(self.ids, self.crops(draw, size=PRETRAINED), strict=True):
            (folder / id).mkdir(parents=True)
            for number, picture in enumerate(pictures):
                image = Image.fromarray(picture.transpose(1, 2, 0))
                image.save(folder / id / f"{number:03}.png")

    def crops(self, draw: int, size: int = CROP) -> Iterator[Pixels]:
        """Return each patient's crops (n, 3, size, size) in the look of this draw."""
        rng = np.random.default_rng(draw) if draw != PLAIN else None
        for fields in torch.split(self.fields, self.n_images.tolist()):
            look = None if rng is None else Look.draw(rng).only(self._moved)
            yield _centre(fields, 1.0, size) if look is None else look.apply(fields, size)


@dataclass(frozen=True, kw_only=True)
class Look:
    """The stain, focus and magnification of one patient's pictures."""

    hue: float  # turns
    density: tuple[float, float, float]  # factors on the optical density of red, green and blue
    gain: tuple[float, float, float]  # of the light
    saturation: float
    blur: float  # standard deviation in pixels
    zoom: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Look":
        amount, light = rng.normal(0, 0.15), rng.normal(0, 0.06)
        return cls(
            hue=rng.uniform(-0.05, 0.05),
            density=tuple(np.exp(amount + rng.normal(0, 0.06, 3)).tolist()),
            gain=tuple(np.exp(light + rng.normal(0, 0.03, 3)).tolist()),
            saturation=math.exp(rng.normal(0, 0.2)),
            blur=rng.uniform(0, 1.2),
            zoom=math.exp(rng.uniform(-0.2, 0.2)),
        )

    def only(self, moved: str) -> "Look":
        """Return a look that differs in magnification alone, or in all but it."""
        if moved == "zoom":
            still = Look(hue=0, density=(1, 1, 1), gain=(1, 1, 1), saturation=1, blur=0, zoom=1)
            return replace(still, zoom=self.zoom)
        return replace(self, zoom=1.0) if moved == "no-zoom" else self

    def apply(self, fields: Tensor, size: int) -> Pixels:
        """Change pictures (n, 3, 224, 224) uint8, and return their crops (n, 3, size, size)."""
        crops = torch.from_numpy(_centre(fields, self.zoom, size))
        crops = colour.adjust_saturation(colour.adjust_hue(crops, self.hue), self.saturation)
        density, gain = (
            torch.tensor(factors)[:, None, None] for factors in (self.density, self.gain)
        )
        light = (crops / 255.0) ** density * gain
        if self.blur > 0.1:
            light = colour.gaussian_blur(light, [9, 9], [self.blur, self.blur])
        crops = (255 * light).round().clamp(0, 255).to(torch.uint8)
        return crops.numpy()  # type: ignore[no-any-return]


def normalised(crops: Pixels, how: StainNormalization) -> Pixels:
    """Normalise the crops of a patient as `extract` does."""
    if how == "none":
        return crops
    stain = Stain.measure(list(crops))
    stains = [stain if how == "patient" else Stain.measure([crop]) for crop in crops]
    return np.stack([each.normalise(crop) for each, crop in zip(stains, crops, strict=True)])


def _centre(fields: Tensor, zoom: float, size: int) -> Pixels:
    """Return the centre of each picture at one magnification, (n, 3, size, size)."""
    scale = size / FIELD / zoom
    matrix = torch.tensor([[scale, 0.0, 0.0], [0.0, scale, 0.0]]).expand(len(fields), 2, 3)
    crops = sample(fields.float(), matrix, len(fields), size)
    return crops.round().clamp(0, 255).to(torch.uint8).numpy()


class Cache:
    """What was measured of one candidate, kept in a folder."""

    def __init__(self, folder: Path, patients: Patients, seeds: int, threads: int) -> None:
        self._folder, self._patients = folder, patients
        self._settings = FitSettings(seeds=seeds, threads=threads, device="cpu")

    def wins(self, candidate: Candidate, draw: int) -> dict[str, Wins]:
        """Return how often held-out tumoral patients score above reactive ones, by head."""
        files = {head: self._folder / f"{draw}-{head}.npz" for head in HEADS}
        if not all(file.exists() for file in files.values()):
            self._folder.mkdir(parents=True, exist_ok=True)
            store = self._store(candidate, draw)
            for head, file in files.items():
                won, pairs = self._fit(store, head)
                np.savez(file, won=won, pairs=pairs)
            shutil.rmtree(store.parent)
        kept = {head: np.load(file) for head, file in files.items()}
        return {head: (file["won"], file["pairs"]) for head, file in kept.items()}

    def _store(self, candidate: Candidate, draw: int) -> Path:
        encoder, bags = candidate.encoder(), self._folder / f"bags-{draw}"
        shutil.rmtree(bags, ignore_errors=True)
        bags.mkdir()
        for id, moved in zip(self._patients.ids, self._patients.crops(draw), strict=True):
            crops = normalised(moved, candidate.settings.stain_normalization)
            parts = [encoder.encode(crops[at : at + BATCH]) for at in range(0, len(crops), BATCH)]
            np.save(bags / f"{id}.npy", np.concatenate(parts)[:, 0].mean((2, 3)))
        table = bags / "labels.csv"
        labels = self._patients.labels.astype(int).rename_axis("id").rename("label")
        labels.to_csv(table)
        lf.import_bags(bags, bags / "store.h5", table=table)
        return bags / "store.h5"

    def _fit(self, store: Path, head: str) -> Wins:
        run = lf.fit_heads(store, [HeadSettings(agg=head)], self._settings)
        rows = run.outcome.predictions
        rows = rows[rows["kind"] == "head"]
        labels = self._patients.labels
        positive, negative = labels.index[labels], labels.index[~labels]
        won, pairs = np.zeros((2, len(positive), len(negative)))
        for _, split in rows.groupby(["seed", "split"]):
            scores = split.set_index("patient")["probability"]
            high, low = scores.reindex(positive).to_numpy(), scores.reindex(negative).to_numpy()
            margin = high[:, None] - low[None]  # (P, N); NaN unless both are held out
            won += np.where(margin > 0, 1.0, np.where(margin == 0, 0.5, 0.0))
            pairs += ~np.isnan(margin)
        return won, pairs


def auc(wins: Sequence[Wins], weights: tuple[Floats, Floats] | None = None) -> float:
    """Return the AUC within folds of draws together, patients counting by `weights`."""
    won, pairs = (sum(part) for part in zip(*wins, strict=True))
    if weights is None:
        return float(won.sum() / pairs.sum())
    positive, negative = weights
    return float(positive @ won @ negative / (positive @ pairs @ negative))


def tell(name: str, wins: dict[str, list[Wins]]) -> None:
    for head, (plain, *moved) in wins.items():
        each = [auc([draw]) for draw in moved]
        print(
            f"| {name} | {head} | {auc([plain]):.3f} | {auc(moved):.3f} "
            f"({min(each):.3f} to {max(each):.3f}) | {auc([plain]) - auc(moved):.3f} |",
            flush=True,
        )


def compare(wins: dict[str, dict[str, list[Wins]]], against: str, repeats: int = 2000) -> None:
    """Print paired differences on the moved pictures, 95 % bootstrap intervals over patients."""
    print(f"| {against} minus | head | AUC | 95 % interval |\n|---|---|---|---|")
    for name in (name for name in wins if name != against):
        for head in HEADS:
            ours, theirs = (wins[which][head][1:] for which in (against, name))
            rng, n = np.random.default_rng(0), ours[0][0].shape
            differences = []
            for _ in range(repeats):
                drawn = tuple(rng.multinomial(m, np.full(m, 1 / m)).astype(float) for m in n)
                differences.append(auc(ours, drawn) - auc(theirs, drawn))  # type: ignore[arg-type]
            low, high = np.quantile(differences, [0.025, 0.975])
            print(
                f"| {name} | {head} | {auc(ours) - auc(theirs):+.3f} | {low:+.3f} to {high:+.3f} |"
            )


if __name__ == "__main__":
    main()
