"""Test whether scores and maps show what a decision depends on: deletion, and known cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.evaluation.hidden_truth import Truth
from lymphfeat.evaluation.metrics import roc_auc
from lymphfeat.explanation.scores import probability_without, ranks
from lymphfeat.explanation.subjects import Subject
from lymphfeat.heads.bags import Bags
from lymphfeat.runtime.arrays import Float32s
from lymphfeat.synthetic.cohort import cell_extents, is_synthetic_cohort

MOST_DELETED = 10
_COVERED = 0.5  # a map pixel belongs to the cell if the cell covers at least this share of it


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """How much probabilities change when images are deleted; means over patients.

    Only patients with more images than the largest k are measured, the same ones at every k.
    """

    k: NDArray[np.int64]  # (K,) 1, 2, …
    highest: Float32s  # (K,) mean |change| when the k highest-scored images are deleted
    random: Float32s  # (K,) when k images drawn at random are, mean of the draws
    random_low: Float32s  # (K,) the lowest draw's mean
    random_high: Float32s  # (K,) the highest draw's
    patients: int
    draws: int

    @property
    def area(self) -> float:
        """Return the area between the curves: the mean over k of highest − random."""
        return float((self.highest - self.random).mean())

    def to_json(self) -> dict[str, Any]:
        """Return the curves and their area as plain values."""
        curves = ("k", "highest", "random", "random_low", "random_high")
        values = {name: getattr(self, name).tolist() for name in curves}
        return values | {"area": self.area, "patients": self.patients, "draws": self.draws}

    @property
    def surely(self) -> bool:
        """Return whether, at every k, the highest-scored change more than any random draw."""
        return bool((self.highest > self.random_high).all())


def delete_images(
    subject: Subject,
    kept: Sequence[Tensor],
    sizes: NDArray[np.int64],
    *,
    draws: int = 20,
    seed: int = 0,
) -> Deletion | None:
    """Delete the k highest-scored, or k random, images of every patient and read out the rest.

    kept (N, U, D) is what each head keeps of the images of patients of `sizes` (P,) images.
    Clinical attributes stay. k goes up to 10, or half the median number of images. None where no
    patient has two images.
    """
    most = int(min(MOST_DELETED, np.median(sizes) // 2))
    enough = sizes > most
    if most < 1 or not enough.any():
        return None
    (patients,) = np.nonzero(enough)
    kept = [own[torch.from_numpy(np.repeat(enough, sizes))] for own in kept]
    sizes = sizes[enough]
    images = Bags.of(sizes)
    whole = subject.judge(subject.read(kept, images), images, patients)
    rng = np.random.default_rng(seed)
    orders = [ranks(whole.score, sizes)]
    orders += [ranks(rng.random(len(whole.score), np.float32), sizes) for _ in range(draws)]

    def moved_by(left_out: NDArray[np.bool_]) -> float:
        without = probability_without(subject, kept, sizes, left_out, patients)
        return float(np.abs(without - whole.probability).mean())

    moved = np.array(
        [[moved_by(order < k) for k in range(1, most + 1)] for order in orders], np.float32
    )  # (1 + draws, K)
    return Deletion(
        k=np.arange(1, most + 1),
        highest=moved[0],
        random=moved[1:].mean(0),
        random_low=moved[1:].min(0),
        random_high=moved[1:].max(0),
        patients=len(sizes),
        draws=draws,
    )


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How well the score maps of atypical (witness) cells match the rendered cells.

    auc: probability that a map pixel on the cell outranks one outside it, mean over images.
    pointing: share of images whose highest pixel is on the cell; by chance, `cell_share`.
    """

    auc: float
    pointing: float
    cell_share: float  # share of the map that is on the cell
    images: int


def measure_overlap(
    cohort: Cohort, maps: Float32s, crop: int, truth: Truth | None
) -> Overlap | None:
    """Measure maps (N, h, w) against rendered cells; None unless synthetic, with image truth."""
    if truth is None or truth.images is None or not is_synthetic_cohort(cohort.root):
        return None
    paths = [path for paths in cohort.images for path in paths]
    known = truth.images[truth.images["witness"]]
    witnesses = set(zip(known["patient"], known["image"], strict=True))
    rows = [row for row, path in enumerate(paths) if (path.parent.name, path.name) in witnesses]
    if not rows:
        return None
    return overlap_with_cells(maps[rows], _extents(cohort.root, [paths[r] for r in rows], crop))


def _extents(root: Path, paths: Sequence[Path], crop: int) -> Float32s:
    """Return where the cells are in the images' centre crops: (n, crop, crop)."""
    extents = cell_extents(root, paths)  # (n, side, side)
    begin = (extents.shape[1] - crop) // 2
    cut: Float32s = extents[:, begin : begin + crop, begin : begin + crop]
    return cut


def overlap_with_cells(maps: Float32s, extents: Float32s) -> Overlap | None:
    """Measure maps (n, h, w) against the cells' extents (n, side, side), 1 inside the cell.

    Images without a pixel on the cell, or without one outside it, are left out.
    """
    inside = np.stack([_coverage(extent, maps.shape[1]) >= _COVERED for extent in extents])
    labels = inside.reshape(len(maps), -1).astype(np.int64)
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    both = (labels.any(1)) & (labels == 0).any(1)
    if not both.any():
        return None
    labels, flat = labels[both], flat[both]
    aucs = [float(roc_auc(scores, own)) for scores, own in zip(flat, labels, strict=True)]
    highest = labels[np.arange(len(flat)), flat.argmax(1)]
    return Overlap(
        auc=float(np.mean(aucs)),
        pointing=float(highest.mean()),
        cell_share=float(labels.mean()),
        images=len(flat),
    )


def _coverage(extent: Float32s, side: int) -> Float32s:
    """Average (crop, crop) over the fields of a (side, side) grid."""
    edges = np.linspace(0, len(extent), side + 1).round().astype(int)
    rows = np.add.reduceat(extent, edges[:-1], axis=0)
    cells = np.add.reduceat(rows, edges[:-1], axis=1)
    area = np.diff(edges)[:, None] * np.diff(edges)[None]
    coverage: Float32s = (cells / area).astype(np.float32)
    return coverage
