"""Scores of every pixel of every image, and how they make up each patient's probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import VIEWS
from lymphfeat.explanation.maps import map_patient
from lymphfeat.explanation.subjects import Reader, Subject
from lymphfeat.features.store import FeatureStore
from lymphfeat.heads.aggregators.ranking import Ranking, effective_k, selected_mask
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.registry import RankingAggregator, find_aggregator
from lymphfeat.model.familiarity import Judgement
from lymphfeat.model.scoring import CohortScorer, Show
from lymphfeat.model.stored_maps import StoredMaps
from lymphfeat.runtime.arrays import Float32s, Floats
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.settings import HeadSettings, PredictSettings


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """How patients' probabilities are computed.

    A patient's total is its logit, or its probability for the ranking family; the contributions of
    its images, the shares of its attributes and `rest` add up to it exactly. `rest` is what belongs
    to no image: the smoothing term of `lse`, of the family `distribution` the intercept and the
    standardising constants, of networks what images do to each other, of a final model what is the
    same for every patient; otherwise 0. The total of members is the mean of theirs, before their
    calibration.
    """

    additive: str  # "logit" or "probability": what contributions add up to
    probability: Floats  # (P,)
    total: Floats  # (P,)
    rest: Floats  # (P,)
    score: Floats  # (N,) the images' logits
    weight: Floats  # (N,) adding up to 1 over a patient
    contribution: Floats  # (N,) signed
    shares: Floats  # (P, A) what each clinical attribute adds
    mark: NDArray[np.int8]  # (N,) 1 counted as a highest, -1 as a lowest, 0 neither
    without_top: Floats  # (P,) probability without the highest-scored image; NaN with one image
    # (P,) from the images, and from the attributes, alone; None where only images count
    without_attributes: Floats | None = None
    without_images: Floats | None = None
    # (P,) standard deviation, and (M, P) calibrated logits, of several members
    spread: Floats | None = None
    members: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model makes of the images of a cohort, unflipped."""

    maps: Float32s  # (N, h, w) logits of the pixels, at their positions in the centre crop
    kept: tuple[Tensor, ...]  # what each head keeps of each image, (N, U, D)
    unlike: Judgement | None = None  # how unlike training images and patients are, if known


class _Everything(Head):
    """Keeps the pixels as they are."""

    settings = (HeadSettings(agg="mean", solver="exact"),)

    def keep(self, instances: Tensor) -> Tensor:
        return instances


@dataclass(kw_only=True)
class _Reading:
    """What a head has kept of the patients so far, by source, and their maps."""

    reader: Reader
    kept: dict[int, list[Tensor]] = field(default_factory=dict)
    maps: list[Tensor] = field(default_factory=list)

    def add(self, source: int, pixels: Tensor) -> None:
        """Take the pixels (n, U, C) of one patient's images."""
        head, pooled = self.reader.head, pixels.mean(1, keepdim=True)
        if len(self.reader.sources) == 1:
            kept = head.keep(pixels if self.reader.settings.unit == "pixel" else pooled)
        else:
            kept = pooled
        self.kept.setdefault(source, []).append(kept)
        if self.reader.sees_fields:
            self.maps.append(_map(head, pixels).float())

    def all_kept(self) -> Tensor:
        """Return what the head keeps of all images, of several sources side by side: (N, U, D)."""
        return torch.cat([torch.cat(self.kept[own]) for own in self.reader.sources], dim=-1)

    def grids(self) -> Tensor | None:
        """Return the maps of all images, (N, h, w), or None."""
        if not self.maps:
            return None
        scores = torch.cat(self.maps)  # (N, h · w)
        side = math.isqrt(scores.shape[1])  # crops are square, so are the maps
        return scores.view(-1, side, side)


@torch.no_grad()
def score_cohort(
    subject: Subject,
    cohort: Cohort,
    settings: PredictSettings,
    *,
    stores: Sequence[FeatureStore] = (),
    show: Show | None = None,
    progress: Progress = silent,
) -> Scored:
    """Score the pixels of a cohort's images; the mean of an image's pixels is its logit.

    Patient by patient, so that only one patient's pixels are in memory. With `stores` the pixels
    are those of their maps, one store for each of the subject's sources. `show` is given the images
    as the subject's `crop` cuts them, in order.
    """
    readings = [_Reading(reader=reader) for reader in subject.readers]
    known, means, statistics = subject.familiarity, [], None
    with cpu_threads(settings.threads), whole_float32():
        for number, source in enumerate(subject.sources):
            scorer = _scorer(subject, number, settings, stores, show)
            pooled: list[Tensor] = []  # (n, C) of each patient
            own = part_of(progress, number, len(subject.sources), "")
            for (pixels,) in scorer.score_patients(cohort, own):  # (n, h · w, C)
                for reading in readings:
                    if number in reading.reader.sources:
                        reading.add(number, pixels)
                if known is not None:
                    pooled.append(pixels.mean(1))
            source.backbone.to("cpu")
            if known is not None:
                means.append(torch.cat(pooled).double().numpy())
                statistics = scorer.statistics if number == 0 else statistics
        kept = tuple(reading.all_kept() for reading in readings)
        read = subject.read(kept, Bags.of(cohort.n_images))
    grids = [reading.grids() for reading in readings]
    shares = [reader.share for reader in subject.readers]
    return Scored(
        maps=mean_map(grids, [own.score for own in read], shares).numpy(),
        kept=kept,
        unlike=None if known is None else known.judge(means, statistics, cohort.n_images.tolist()),
    )


def _scorer(
    subject: Subject,
    number: int,
    settings: PredictSettings,
    stores: Sequence[FeatureStore],
    show: Show | None,
) -> CohortScorer | StoredMaps:
    """Return what gives the pixels of images by one of a subject's sources, the first with show."""
    source, shown = subject.sources[number], show if number == 0 else None
    if stores:
        return StoredMaps(stores[number], source.recipe.crop, show=shown)
    return CohortScorer(
        *(source.backbone, _Everything(), source.recipe, settings),
        views=VIEWS[:1],
        unit="pixel",
        measured=subject.familiarity is not None and number == 0,
        show=shown,
    )


def _map(head: Head, pixels: Tensor) -> Tensor:
    """Return the scores of the pixels (n, U, C) of one patient's images: (n, U)."""
    if isinstance(head, DistributionHead):
        return map_patient(head.exact, pixels)
    return head.keep(pixels)[:, :, 0]


def mean_map(
    grids: Sequence[Tensor | None], scores: Sequence[Tensor], shares: Sequence[float]
) -> Tensor:
    """Average maps (N, h, w) of several heads by their shares, on the first one's fields.

    The score (N,) of a head without a map is spread evenly over the fields. The mean of an image's
    map is thereby the mean of its scores. Without any map there is one field.
    """
    side = next((len(grid[0]) for grid in grids if grid is not None), 1)
    total = torch.zeros(len(scores[0]), side, side)
    for grid, score, share in zip(grids, scores, shares, strict=True):
        even = score.float()[:, None, None]  # (N, 1, 1)
        total += share * (even if grid is None else _on_fields(grid, side))
    return total


def _on_fields(grid: Tensor, side: int) -> Tensor:
    """Interpolate maps (N, h, w) to other fields, (N, side, side), keeping their means."""
    if len(grid[0]) == side:
        return grid
    moved = interpolate(grid[:, None], (side, side), mode="bilinear", antialias=True)[:, 0]
    shift: Tensor = grid.mean((1, 2)) - moved.mean((1, 2))  # (N,)
    return moved + shift[:, None, None]


def score_image(subject: Subject, path: Path, settings: PredictSettings) -> Float32s:
    """Return the logits of one image's pixels: (h, w)."""
    table = pd.DataFrame({"label": [-1], "split": ["test"]}, index=pd.Index([path.name], name="id"))
    alone = Cohort(root=path.parent, table=table, images=((path,),))
    grid: Float32s = score_cohort(subject, alone, settings).maps[0]
    return grid


def decide(subject: Subject, kept: Sequence[Tensor], sizes: NDArray[np.int64]) -> Decisions:
    """Read out patients of `sizes` (P,) images from what each head keeps of them (N, U, D)."""
    images, patients = Bags.of(sizes), np.arange(len(sizes))
    found = subject.judge(subject.read(kept, images), images, patients)
    highest = ranks(found.score, sizes) == 0
    sums = np.bincount(images.index.numpy(), found.contribution, minlength=len(sizes))
    return Decisions(
        additive="logit" if subject.of_logits else "probability",
        probability=found.probability,
        total=found.total,
        rest=found.total - sums - found.shares.sum(1),
        score=found.score,
        weight=found.weight,
        contribution=found.contribution,
        shares=found.shares,
        mark=_marks(subject, images, kept),
        without_top=probability_without(subject, kept, sizes, highest),
        without_attributes=found.without_attributes,
        without_images=found.without_images,
        spread=found.spread,
        members=found.members,
    )


def probability_without(
    subject: Subject,
    kept: Sequence[Tensor],
    sizes: NDArray[np.int64],
    left_out: NDArray[np.bool_],
    patients: NDArray[np.int64] | None = None,
) -> Floats:
    """Return the patients' probabilities without some images (N,); NaN where none is left: (P,).

    `patients` (P,) are their rows in the subject's table; all, if not given.
    """
    rows = np.arange(len(sizes)) if patients is None else patients
    owner = np.repeat(np.arange(len(sizes)), sizes)
    left = np.bincount(owner[~left_out], minlength=len(sizes))
    result = np.full(len(sizes), np.nan)
    if (left > 0).any():
        others = [own[torch.from_numpy(~left_out)] for own in kept]
        found = subject.probability(others, Bags.of(left[left > 0]), rows[left > 0])
        result[left > 0] = found
    return result


def ranks(logit: Float32s | NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each image's rank within its patient, 0 for the highest, ties in order: (N,)."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-logit, patient))  # stable
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.empty(len(logit), np.int64)
    places[order] = np.arange(len(logit)) - starts
    return places


def _marks(subject: Subject, images: Bags, kept: Sequence[Tensor]) -> NDArray[np.int8]:
    """Mark images that most heads count as a highest 1, as a lowest -1; 0 unless all rank."""
    marks = [
        _marks_of(reader.settings, images, own)
        for reader, own in zip(subject.readers, kept, strict=True)
    ]
    found = np.zeros(images.n_instances, np.int8)
    if all(own is not None for own in marks):
        stacked = np.stack([own for own in marks if own is not None])  # (heads, N)
        for mark in (1, -1):
            found[(stacked == mark).mean(0) > 0.5] = mark
    return found


def _marks_of(settings: HeadSettings, images: Bags, kept: Tensor) -> NDArray[np.int8] | None:
    """Mark images with an instance among the k highest that count 1, else among the lowest -1."""
    aggregator = find_aggregator(settings)
    if not isinstance(aggregator, RankingAggregator):
        return None
    bags = images.times(kept.shape[1])
    flat = kept.flatten(0, 1)  # (N · U, 1)
    k = effective_k(bags.sizes, settings.k_agg, settings.k_percent, settings.k_min)
    highest = selected_mask(Ranking.of(flat, bags), k).view(len(kept), -1).any(1)
    mark = highest.to(torch.int8)
    if aggregator.bottom:
        lowest = selected_mask(Ranking.of(flat, bags), k, bottom=True).view(len(kept), -1).any(1)
        mark[lowest & ~highest] = -1
    return mark.numpy()
