"""Scores of every pixel of every image, and how they make up each patient's probability."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import VIEWS
from lymphfeat.explanation.wording import Wording
from lymphfeat.heads.aggregators.ranking import Ranking, effective_k, selected_mask
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.registry import RankingAggregator, find_aggregator
from lymphfeat.model.model import Model
from lymphfeat.model.scoring import CohortScorer
from lymphfeat.runtime.arrays import Float32s
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import HeadSettings, PredictSettings


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """How patients' probabilities are computed.

    A patient's total is its logit for the weighted family, its probability for the ranking family;
    the contributions of its images and `rest` add up to it exactly. `rest` is what belongs to no
    image: 0 except for `lse`, where it is the smoothing term.
    """

    additive: str  # "logit" or "probability": what contributions add up to
    probability: Float32s  # (P,)
    total: Float32s  # (P,)
    rest: Float32s  # (P,)
    weight: Float32s  # (N,) adding up to 1 over a patient
    contribution: Float32s  # (N,) signed
    mark: NDArray[np.int8]  # (N,) 1 counted as a highest, -1 as a lowest, 0 neither
    without_top: Float32s  # (P,) probability without the highest-scored image; NaN with one image


def score_maps(
    model: Model, cohort: Cohort, settings: PredictSettings, *, progress: Progress = silent
) -> Float32s:
    """Return the logit of every pixel of every image's feature map, unflipped: (N, h, w).

    An image's logit is the mean of its pixels'; pixels keep their positions in the centre crop.
    """
    with cpu_threads(settings.threads), whole_float32():
        scorer = CohortScorer(
            model.backbone, model.head, model.recipe, settings, views=VIEWS[:1], unit="pixel"
        )
        logits = scorer.score(cohort, progress)[0, :, :, 0]  # (N, h · w)
    side = math.isqrt(logits.shape[1])  # crops are square, so are the maps
    return logits.reshape(len(logits), side, side).numpy()


def score_image(model: Model, path: Path, settings: PredictSettings) -> Float32s:
    """Return the logits of one image's pixels: (h, w)."""
    table = pd.DataFrame({"label": [-1], "split": ["test"]}, index=pd.Index([path.name], name="id"))
    alone = Cohort(root=path.parent, table=table, images=((path,),))
    grid: Float32s = score_maps(model, alone, settings)[0]
    return grid


def decide(model: Model, maps: Float32s, sizes: NDArray[np.int64]) -> Decisions:
    """Read out patients of `sizes` (P,) images from the images' maps (N, h, w)."""
    settings, images = model.head_settings, Bags.of(sizes)
    logits = _instances(maps, settings.unit)  # (N, U)
    read = model.head.read_out(logits[:, :, None], images)
    return Decisions(
        additive=Wording.of(settings).additive,
        probability=read.probability.numpy(),
        total=read.total.numpy(),
        rest=(read.total - images.sum(read.contribution[:, None])[:, 0]).numpy(),
        weight=read.weight.numpy(),
        contribution=read.contribution.numpy(),
        mark=_marks(settings, images, logits).numpy(),
        without_top=_without_top(model, maps, sizes),
    )


def probability_without(
    model: Model, maps: Float32s, sizes: NDArray[np.int64], left_out: NDArray[np.bool_]
) -> Float32s:
    """Return the patients' probabilities without some images (N,); NaN where none is left: (P,)."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    left = np.bincount(patient[~left_out], minlength=len(sizes))
    result = np.full(len(sizes), np.nan, np.float32)
    if (left > 0).any():
        logits = _instances(maps[~left_out], model.head_settings.unit)[:, :, None]
        read = model.head.read_out(logits, Bags.of(left[left > 0]))
        result[left > 0] = read.probability.numpy()
    return result


def ranks(logit: Float32s, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each image's rank within its patient, 0 for the highest, ties in order: (N,)."""
    patient = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-logit, patient))  # stable
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.empty(len(logit), np.int64)
    places[order] = np.arange(len(logit)) - starts
    return places


def _instances(maps: Float32s, unit: str) -> Tensor:
    pixels = torch.from_numpy(maps).flatten(1)  # (N, h · w)
    return pixels if unit == "pixel" else pixels.mean(1, keepdim=True)


def _marks(settings: HeadSettings, images: Bags, logits: Tensor) -> Tensor:
    """Mark images with an instance among the k highest that count 1, else among the lowest -1."""
    aggregator = find_aggregator(settings)
    if not isinstance(aggregator, RankingAggregator):
        return torch.zeros(len(logits), dtype=torch.int8)
    bags = images.times(logits.shape[1])
    flat = logits.reshape(-1, 1)
    k = effective_k(bags.sizes, settings.k_agg, settings.k_percent, settings.k_min)
    highest = selected_mask(Ranking.of(flat, bags), k).reshape(logits.shape).any(1)
    mark = highest.to(torch.int8)
    if aggregator.bottom:
        lowest = selected_mask(Ranking.of(flat, bags), k, bottom=True).reshape(logits.shape).any(1)
        mark[lowest & ~highest] = -1
    return mark


def _without_top(model: Model, maps: Float32s, sizes: NDArray[np.int64]) -> Float32s:
    return probability_without(model, maps, sizes, ranks(maps.mean((1, 2)), sizes) == 0)
