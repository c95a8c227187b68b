"""The weighted family (METHOD §2 B; report §3.4): a patient's logit as a weighted mean of logits.

Each `…_logit` maps logits (M, H) on ragged bags to patient logits (B, H). How much an instance
counts is the gradient by its logit; these weights are at least 0 and add up to 1 over every bag.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lymphfeat.heads.bags import Bags
from lymphfeat.settings import HeadSettings

EPSILON = 1e-5


@dataclass(frozen=True)
class AggregatorState:
    """What the aggregators of H heads use besides the logits; every tensor is (H,)."""

    gamma: Tensor  # bnsigmoid, trained
    beta: Tensor  # bnsigmoid, trained
    running_mean: Tensor  # bnsigmoid, updated in training
    running_var: Tensor  # bnsigmoid, updated in training
    temperature: Tensor  # lse
    momentum: Tensor  # of the running statistics
    training: bool = False

    @classmethod
    def fresh(cls, settings: Sequence[HeadSettings], device: torch.device) -> "AggregatorState":
        n = len(settings)
        return cls(
            gamma=torch.ones(n, device=device),
            beta=torch.zeros(n, device=device),
            running_mean=torch.zeros(n, device=device),
            running_var=torch.ones(n, device=device),
            temperature=torch.tensor([s.temperature for s in settings], device=device),
            momentum=torch.tensor([s.momentum for s in settings], device=device),
        )

    def columns(self, columns: Tensor) -> "AggregatorState":
        """Select some heads."""
        tensors = {
            name: values.index_select(0, columns)
            for name, values in vars(self).items()
            if name != "training"
        }
        return replace(self, **tensors)


def mean_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    """Return the mean logit of every bag."""
    return bags.mean(logits)


def max_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    """Return the highest logit of every bag; of equals the first gets the gradient."""
    return logits.gather(0, bags.argmax(logits))


def lse_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    """Return the log-mean-exp at temperature r: (1/r) log mean exp(r ℓ).

    As r goes to 0 it tends to the mean, as r goes to infinity to the maximum.
    """
    scaled = state.temperature * logits
    largest = bags.max(scaled.detach())  # (B, H)
    means = bags.mean((scaled - bags.spread(largest)).exp())  # (B, H)
    return (means.log() + largest) / state.temperature


def bnsigmoid_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    """Return Σ α ℓ; α is σ(β + γ (sg(ℓ) − μ) / sqrt(V + ε)), divided by its sum over the bag.

    γ and β get gradients, the logits within α do not. μ and V are the batch's while training and
    the running ones afterwards, so that a patient's score depends on no other patient.
    """
    mean, variance = _moments(state, logits)
    normalized = (logits.detach() - mean) / (variance + EPSILON).sqrt()
    # In the log domain the shares exist even where every sigmoid of a bag underflows.
    log_weights = torch.nn.functional.logsigmoid(state.beta + state.gamma * normalized)  # (M, H)
    return bags.sum(bags.softmax(log_weights) * logits)


@torch.no_grad()
def _moments(state: AggregatorState, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance (H,) that logits are normalised by.

    While training the running ones move towards the batch's, in place.
    """
    if not state.training:
        return state.running_mean, state.running_var
    mean, variance = logits.mean(0), logits.var(0, unbiased=False)
    state.running_mean.lerp_(mean, state.momentum)
    state.running_var.lerp_(variance, state.momentum)
    return mean, variance
