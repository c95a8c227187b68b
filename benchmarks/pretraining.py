"""What backbone weights are worth on frozen features; prints the model card's tables.

    python benchmarks/pretraining.py --shared ../shared --work cache/pretraining \\
        --own 20 [--lite0] [--only bloodcells]

Real cells only: the patients of pbc-mil (label: 8-30 % immature granulocytes) and the cells of
pbc-cells. Nothing here is lymphocytosis. Measured for each candidate:

- every head of `fit-head --agg all` under the honest protocol;
- mean-pooled features + logistic regression over patients, 5 x 5-fold AUC, and the same when the
  test patients' images have another hue or brightness;
- cells by k-NN with 10 labels a class, and band against segmented neutrophils (100 labels each) by
  logistic regression: kinds within one class, which no weights here were taught.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_folders import Cells
from lymphfeat.cohort.images import decode_crops, find_normalization
from lymphfeat.features.augmentation import centre_views
from lymphfeat.features.backbones import build_backbone
from lymphfeat.features.map_encoder import MapEncoder

CROP = 112
# pbc-cells show a cell in about 65 of 144 pixels, the crops of pbc-mil in about 100 of 112.
CELLS_ZOOM = 1.4
SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "hue +.04": lambda pixels: colour.adjust_hue(pixels, 0.04),
    "hue -.04": lambda pixels: colour.adjust_hue(pixels, -0.04),
    "brightness x1.15": lambda pixels: colour.adjust_brightness(pixels, 1.15),
    "brightness x.85": lambda pixels: colour.adjust_brightness(pixels, 0.85),
}
Features = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights to be measured."""

    name: str
    backbone: str
    weights: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="holds data/ and weights/")
    parser.add_argument("--work", type=Path, default=Path("cache/pretraining"))
    parser.add_argument("--lite0", action="store_true", help="also; of the extra offline-weights")
    parser.add_argument("--own", type=float, help="minutes of `pretrain` on pbc-mil's own images")
    parser.add_argument("--only", action="append", help="measure these candidates alone")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--skip-heads", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = args.shared / "data"
    candidates = find_candidates(args.shared, args.work, args.lite0, args.own)
    chosen = [c for c in candidates if not args.only or c.name in args.only]
    cells, cohort = LabelledCells(data), Patients(data)
    for candidate in chosen:
        print(f"## {candidate.name}", flush=True)
        encode = Encoder(candidate)
        rows = cohort.measure(encode) | cells.measure(encode)
        print("| " + " | ".join(rows) + " |")
        print("| " + " | ".join(f"{value:.3f}" for value in rows.values()) + " |", flush=True)
        if not args.skip_heads:
            print(fit_heads(candidate, data, args.work, args.seeds), flush=True)


def find_candidates(shared: Path, work: Path, lite0: bool, own: float | None) -> list[Candidate]:
    resnet = [
        ("random", "none"),
        ("first attempt", str(shared / "weights" / "resnet18-pbc.safetensors")),
        ("bloodcells", "bloodcells-v1"),
    ]
    found = [Candidate(name=name, backbone="resnet18", weights=w) for name, w in resnet]
    if lite0:
        lite = "tf_efficientnet_lite0"
        found.append(Candidate(name="ImageNet lite0", backbone=lite, weights="imagenet"))
    if own is not None:
        weights = work / "own.safetensors"
        if not weights.exists():
            source = shared / "data" / "pbc-mil"
            lymphfeat("pretrain", source, "--minutes", own, "--out", weights)
        found.append(Candidate(name="own", backbone="resnet18", weights=str(weights)))
    return found


def lymphfeat(*arguments: object) -> None:
    line = [sys.executable, "-m", "lymphfeat_cli", *(str(argument) for argument in arguments)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def fit_heads(candidate: Candidate, data: Path, work: Path, seeds: int) -> str:
    """Run extract and fit-head on pbc-mil; return the table of its heads."""
    stem = candidate.name.replace(" ", "-")
    store, run = work / f"{stem}.h5", work / stem
    backbone = ("--backbone", candidate.backbone, "--weights", candidate.weights)
    lymphfeat("extract", "--cohort", data / "pbc-mil", *backbone, "--out", store, "--force")
    lymphfeat(
        *("fit-head", "--store", store, "--agg", "all", "--seeds", seeds, "--out", run, "--force")
    )
    summary = pd.DataFrame(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    table = summary[["head", "ba", "ba_half_width", "auc"]]
    return str(table.to_string(index=False, float_format="%.3f"))


class Encoder:
    """Pixels (n, 3, H, W) uint8 -> average-pooled features (n, C)."""

    def __init__(self, candidate: Candidate) -> None:
        backbone, _ = build_backbone(candidate.backbone, weights=candidate.weights)
        self._maps = MapEncoder(
            backbone,
            normalization=find_normalization(
                "inception" if "lite" in candidate.backbone else "imagenet"
            ),
            views=("identity",),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def __call__(self, pixels: Tensor) -> Features:
        parts = [
            self._maps.encode(part.numpy())[:, 0].mean((2, 3)) for part in torch.split(pixels, 64)
        ]
        return np.concatenate(parts)


class Patients:
    """pbc-mil: mean-pooled logistic regression, plain and with the test patients' stain moved."""

    def __init__(self, data: Path) -> None:
        cohort = Cohort.load(data / "pbc-mil")
        paths = [path for images in cohort.images for path in images]
        self._pixels = torch.from_numpy(decode_crops(paths, CROP))
        self._starts = cohort.offsets[:-1]
        self._n_images = cohort.n_images
        truth = pd.read_csv(data / "pbc-mil-truth" / "test_labels.csv").set_index("ID")["LABEL"]
        known = dict(zip(cohort.ids, cohort.labels.tolist(), strict=True))
        self._labels = np.array([truth.get(id, known[id]) for id in cohort.ids])

    def measure(self, encode: Encoder) -> dict[str, float]:
        plain = self._bags(encode(self._pixels))
        scores = {"patients AUC": self._auc(plain, plain)}
        for name, shift in SHIFTS.items():
            scores[f"{name} AUC"] = self._auc(plain, self._bags(encode(shift(self._pixels))))
        return scores

    def _bags(self, features: Features) -> Features:
        sums = np.add.reduceat(features, self._starts)
        return (sums / self._n_images[:, None]).astype(np.float32)

    def _auc(self, train: Features, test: Features) -> float:
        """Return the best of three regularisations' AUC, mean over 5 x 5-fold."""
        folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=5, random_state=0)
        y = self._labels
        aucs = [linear_aucs(train[a], y[a], test[b], y[b]) for a, b in folds.split(train, y)]
        return float(np.mean(aucs, axis=0).max())


class LabelledCells:
    """pbc-cells: classes with ten labels each; band against segmented neutrophils."""

    def __init__(self, data: Path) -> None:
        cells = Cells.find(data / "pbc-cells")
        rng = np.random.default_rng(0)
        self._classes = _balanced(cells.groups, range(len(cells.names)), 110, rng)
        kinds = np.array([path.name.split("_")[0] for path in cells.paths])
        self._kinds = _balanced(kinds, ("BNE", "SNE"), 500, rng)
        self._class_labels, self._kind_labels = cells.groups[self._classes], kinds[self._kinds]
        self._pixels = [_decode(cells, rows) for rows in (self._classes, self._kinds)]

    def measure(self, encode: Encoder) -> dict[str, float]:
        classes, kinds = (encode(pixels) for pixels in self._pixels)
        return {
            "k-NN accuracy, 10 labels": _knn_accuracy(classes, self._class_labels),
            "band / segmented AUC": _kinds_auc(kinds, self._kind_labels == "BNE"),
        }


def _balanced(
    values: NDArray[np.generic], kept: Sequence[object], n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    return np.concatenate(
        [rng.choice(np.flatnonzero(values == value), n, replace=False) for value in kept]
    )


def _decode(cells: Cells, rows: NDArray[np.int64]) -> Tensor:
    fields = torch.from_numpy(decode_crops([cells.paths[row] for row in rows], 144))
    return centre_views(fields, CROP, CELLS_ZOOM).round().to(torch.uint8)


def linear_aucs(
    train: Features, train_labels: NDArray[Any], test: Features, test_labels: NDArray[Any]
) -> list[float]:
    """Return the test AUC of logistic regression at three strengths of regularisation."""
    aucs = []
    for c in (0.001, 0.01, 0.1):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        scores = model.fit(train, train_labels).decision_function(test)
        aucs.append(float(roc_auc_score(test_labels, scores)))
    return aucs


def _knn_accuracy(features: Features, labels: NDArray[np.int64]) -> float:
    scores = []
    scaled = StandardScaler().fit_transform(features)
    for seed in range(10):
        train = _balanced(labels, np.unique(labels).tolist(), 10, np.random.default_rng(seed))
        test = np.setdiff1d(np.arange(len(labels)), train)
        knn = KNeighborsClassifier(5, metric="cosine", weights="distance")
        scores.append(knn.fit(scaled[train], labels[train]).score(scaled[test], labels[test]))
    return float(np.mean(scores))


def _kinds_auc(features: Features, band: NDArray[np.bool_]) -> float:
    aucs = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(band))
        train, test = order[:200], order[200:]
        aucs.append(linear_aucs(features[train], band[train], features[test], band[test]))
    return float(np.mean(aucs, axis=0).max())


if __name__ == "__main__":
    main()
