"""Scores of every pixel of every image, and how they make up each patient's probability."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import VIEWS
from lymphfeat.explanation.maps import map_patient
from lymphfeat.heads.aggregators.ranking import Ranking, effective_k, selected_mask
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.registry import RankingAggregator, find_aggregator
from lymphfeat.heads.stack import HeadStack
from lymphfeat.model.model import Model
from lymphfeat.model.scoring import CohortScorer
from lymphfeat.runtime.arrays import Float32s
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import HeadSettings, PredictSettings


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """How patients' probabilities are computed.

    A patient's total is its logit, or its probability for the ranking family; the contributions of
    its images and `rest` add up to it exactly. `rest` is what belongs to no image: the smoothing
    term of `lse`, of the family `distribution` the intercept and the standardising constants, of
    networks what images do to each other; otherwise 0.
    """

    additive: str  # "logit" or "probability": what contributions add up to
    probability: Float32s  # (P,)
    total: Float32s  # (P,)
    rest: Float32s  # (P,)
    score: Float32s  # (N,) the images' logits
    weight: Float32s  # (N,) adding up to 1 over a patient
    contribution: Float32s  # (N,) signed
    mark: NDArray[np.int8]  # (N,) 1 counted as a highest, -1 as a lowest, 0 neither
    without_top: Float32s  # (P,) probability without the highest-scored image; NaN with one image


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model makes of the images of a cohort, unflipped."""

    maps: Float32s  # (N, h, w) logits of the pixels, at their positions in the centre crop
    kept: Tensor  # (N, U, D) what the head keeps of each image


@torch.no_grad()
def score_cohort(
    model: Model, cohort: Cohort, settings: PredictSettings, *, progress: Progress = silent
) -> Scored:
    """Score the pixels of a cohort's images; the mean of an image's pixels is its logit.

    Patient by patient, so that only one patient's pixels are in memory.
    """
    mapped = _mapping(model)
    maps, kept = [], []
    with cpu_threads(settings.threads), whole_float32():
        scorer = CohortScorer(
            model.backbone, model.head, model.recipe, settings, views=VIEWS[:1], unit="pixel"
        )
        for (pixels,) in scorer.score_patients(cohort, progress):  # (n, h · w, D)
            maps.append(mapped(pixels).float())
            pooled = model.head_settings.unit != "pixel"
            kept.append(pixels.mean(1, keepdim=True) if pooled else pixels)
    scores = torch.cat(maps)  # (N, h · w)
    side = math.isqrt(scores.shape[1])  # crops are square, so are the maps
    return Scored(maps=scores.view(-1, side, side).numpy(), kept=torch.cat(kept))


def _mapping(model: Model) -> Callable[[Tensor], Tensor]:
    """Return what makes maps of what the head keeps of a patient's pixels: (n, U, D) -> (n, U).

    A network keeps whole images (n, 1, D); its maps have a single field.
    """
    head = model.head
    if isinstance(head, HeadStack):
        return lambda pixels: pixels[:, :, 0]
    if isinstance(head, DistributionHead):
        exact = head.exact
        return lambda pixels: map_patient(exact, pixels)
    return lambda images: head.read_out(images, Bags.of([len(images)])).score[:, None]


def score_image(model: Model, path: Path, settings: PredictSettings) -> Float32s:
    """Return the logits of one image's pixels: (h, w)."""
    table = pd.DataFrame({"label": [-1], "split": ["test"]}, index=pd.Index([path.name], name="id"))
    alone = Cohort(root=path.parent, table=table, images=((path,),))
    grid: Float32s = score_cohort(model, alone, settings).maps[0]
    return grid


def decide(model: Model, kept: Tensor, sizes: NDArray[np.int64]) -> Decisions:
    """Read out patients of `sizes` (P,) images from what the head keeps of the images (N, U, D)."""
    settings, images = model.head_settings, Bags.of(sizes)
    read = model.head.read_out(kept, images)
    highest = ranks(read.score.numpy(), sizes) == 0
    return Decisions(
        additive="logit" if model.head.of_logits else "probability",
        probability=read.probability.numpy(),
        total=read.total.numpy(),
        rest=(read.total - images.sum(read.contribution[:, None])[:, 0]).numpy(),
        score=read.score.numpy(),
        weight=read.weight.numpy(),
        contribution=read.contribution.numpy(),
        mark=_marks(settings, images, kept).numpy(),
        without_top=probability_without(model, kept, sizes, highest),
    )


def probability_without(
    model: Model, kept: Tensor, sizes: NDArray[np.int64], left_out: NDArray[np.bool_]
) -> Float32s:
    """Return the patients' probabilities without some images (N,); NaN where none is left: (P,)."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    left = np.bincount(patient[~left_out], minlength=len(sizes))
    result = np.full(len(sizes), np.nan, np.float32)
    if (left > 0).any():
        others = kept[torch.from_numpy(~left_out)]
        found = model.head.patient_probability(others, Bags.of(left[left > 0]))
        result[left > 0] = found.numpy()
    return result


def ranks(logit: Float32s | NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each image's rank within its patient, 0 for the highest, ties in order: (N,)."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-logit, patient))  # stable
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.empty(len(logit), np.int64)
    places[order] = np.arange(len(logit)) - starts
    return places


def _marks(settings: HeadSettings, images: Bags, kept: Tensor) -> Tensor:
    """Mark images with an instance among the k highest that count 1, else among the lowest -1."""
    aggregator = find_aggregator(settings)
    if not isinstance(aggregator, RankingAggregator):
        return torch.zeros(len(kept), dtype=torch.int8)
    bags = images.times(kept.shape[1])
    flat = kept.flatten(0, 1)  # (N · U, 1)
    k = effective_k(bags.sizes, settings.k_agg, settings.k_percent, settings.k_min)
    highest = selected_mask(Ranking.of(flat, bags), k).view(len(kept), -1).any(1)
    mark = highest.to(torch.int8)
    if aggregator.bottom:
        lowest = selected_mask(Ranking.of(flat, bags), k, bottom=True).view(len(kept), -1).any(1)
        mark[lowest & ~highest] = -1
    return mark
