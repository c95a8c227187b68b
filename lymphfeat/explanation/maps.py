"""Score maps of heads that score statistics of a patient's cells (METHOD §2 C)."""

import torch
from torch import Tensor

from lymphfeat.heads.aggregators.distribution import (
    Deviation,
    LogDeviation,
    Mean,
    OrderStatistic,
    PrototypeMeans,
    Statistic,
)
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.exact_head import ExactHead

# Statistics that say which fields of a picture matter. The others' contributions are spread evenly:
# * shares of prototypes: a step function, a cell belongs to a kind or not, so the gradient is 0;
# * kernel means: their gradient holds within the kernel's bandwidth, but a field lies farther from
#   its picture's mean than that (by 1.7 bandwidths, the median of a synthetic cohort's fields).
# Means of prototypes are linear as long as the cell stays of its kind.
_SMOOTH = (Mean, Deviation, LogDeviation, OrderStatistic, PrototypeMeans)


def has_map(statistic: Statistic) -> bool:
    """Return whether a statistic's score can be attributed to fields of a picture."""
    return isinstance(statistic, _SMOOTH)


def map_patient(head: ExactHead, pixels: Tensor) -> Tensor:
    """Score the pixels (n, U, C) of one patient's n images: (n, U), float64.

    The mean of an image's pixels is its score, exactly. Their differences are first-order: how much
    the patient's logit changes as the picture's mean feature moves towards a pixel's.
    """
    n, bags = len(pixels), Bags.of([len(pixels)])
    if head.settings.unit == "pixel":
        return _scores(head, pixels.flatten(0, 1), bags.times(pixels.shape[1])).view(n, -1)
    pooled = pixels.mean(1)  # (n, C)
    away = pixels - pooled[:, None]  # (n, U, C)
    slope = _gradient(head, pooled, bags).to(away.dtype)  # (n, C)
    change = torch.einsum("nuc,nc->nu", away, slope).double() * n
    return _scores(head, pooled, bags)[:, None] + change - change.mean(1, keepdim=True)


def _scores(head: ExactHead, instances: Tensor, bags: Bags) -> Tensor:
    """Score the instances (n, C) of one patient, so that their mean is the patient's logit: (n,).

    What belongs to no instance is thereby the same for each.
    """
    own = head.shares([(instances, bags)]) * len(instances)
    return own + (head.patient_logits([(instances, bags)]) - own.mean())


def _gradient(head: ExactHead, pooled: Tensor, bags: Bags) -> Tensor:
    """Differentiate a patient's logit by its images (n, C), as far as maps show it: (n, C)."""
    blocks = [block for block in head.blocks if has_map(block.statistic.statistic)]
    if not blocks:
        return torch.zeros_like(pooled)
    with torch.enable_grad():
        leaf = pooled.detach().double().requires_grad_()
        parts = [block.statistic.score(leaf, bags, block.weight) for block in blocks]
        (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), leaf)
    return gradient
