"""The weighted family (METHOD §2 B; report §3.4): a patient's logit as a weighted mean of logits.

Each function maps logits (M, H) on ragged bags to weights (M, H) that add up to 1 over every bag.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lymphfeat.heads.bags import Bags

EPSILON = 1e-5


def mean_weights(logits: Tensor, bags: Bags) -> Tensor:
    """Return 1 / n for every instance of a bag of n."""
    return bags.spread(1 / bags.sizes[:, None].to(logits.dtype)).expand_as(logits)


def max_weights(logits: Tensor, bags: Bags) -> Tensor:
    """Return 1 for each bag's highest instance, the first of equals, and 0 for the others."""
    return torch.zeros_like(logits).scatter_(0, bags.argmax(logits), 1.0)


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of logits over instances, one per head."""

    mean: Tensor  # (H,)
    variance: Tensor  # (H,)


def moments(logits: Tensor) -> Moments:
    """Return the moments over all instances (M, H) of all bags of a batch."""
    logits = logits.detach()
    return Moments(logits.mean(0), logits.var(0, unbiased=False))


def bnsigmoid_weights(
    logits: Tensor, bags: Bags, *, gamma: Tensor, beta: Tensor, statistics: Moments
) -> Tensor:
    """Return σ(β + γ (sg(ℓ) − μ) / sqrt(V + ε)), divided by their sum over the bag.

    γ, β (H,) get gradients, the logits do not. `statistics` are the batch's while training and the
    running ones afterwards, so that a patient's score depends on no other patient.
    """
    normalized = (logits.detach() - statistics.mean) / (statistics.variance + EPSILON).sqrt()
    # In the log domain the shares exist even where every sigmoid of a bag underflows.
    log_weights = torch.nn.functional.logsigmoid(beta + gamma * normalized)  # (M, H)
    return bags.softmax(log_weights)


def weighted_logit(logits: Tensor, weights: Tensor, bags: Bags) -> Tensor:
    """Return each patient's logit Σ α ℓ: (B, H)."""
    return bags.sum(weights * logits)


def lse_logit(logits: Tensor, bags: Bags, temperature: Tensor) -> Tensor:
    """Return the log-mean-exp at temperature r (H,): (1/r) log mean exp(r ℓ): (B, H).

    As r goes to 0 it tends to the mean, as r goes to infinity to the maximum.
    """
    scaled = temperature * logits
    largest = bags.max(scaled.detach())  # (B, H)
    return (bags.mean((scaled - bags.spread(largest)).exp()).log() + largest) / temperature


def lse_weights(logits: Tensor, bags: Bags, temperature: Tensor) -> Tensor:
    """Return the gradient of `lse_logit`: softmax(r ℓ) over each bag, how much an image counts."""
    return bags.softmax(temperature * logits)
