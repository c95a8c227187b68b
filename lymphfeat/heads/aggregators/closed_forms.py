"""The weighted family with its derivatives written out, on bags of one size.

Each function maps logits (H, B, m) of H heads on B bags of m instances to patient logits (H, B) and
what they change by. Training uses these: on a CPU, recording many small operations to derive them
takes longer than the operations do. `weighted` has the same aggregators on ragged bags.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lymphfeat.heads.aggregators.weighted import EPSILON, AggregatorState
from lymphfeat.heads.bags import Bags


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """Patient logits, and their derivatives by what heads learn."""

    total: Tensor  # (H, B)
    weights: Tensor | None = None  # (H, B, m) by the instances' logits; None: 1 for `chosen`
    chosen: Tensor | None = None  # (H, B) the only instance that counts
    gamma: Tensor | None = None  # (H, B)
    beta: Tensor | None = None  # (H, B)


def mean(state: AggregatorState, logits: Tensor) -> Aggregated:
    weights = torch.full_like(logits, 1 / logits.shape[2])
    return Aggregated(total=logits.mean(2), weights=weights)


def highest(state: AggregatorState, logits: Tensor) -> Aggregated:
    total, chosen = logits.max(2)  # the first of equals
    return Aggregated(total=total, chosen=chosen)


def lse(state: AggregatorState, logits: Tensor) -> Aggregated:
    scaled = state.temperature[:, None, None] * logits
    weights = scaled.softmax(2)
    # The highest has the weight exp(0) / Σ exp(scaled − highest).
    log_mean = scaled.amax(2) - weights.amax(2).log() - math.log(logits.shape[2])
    return Aggregated(total=log_mean / state.temperature[:, None], weights=weights)


def bnsigmoid(state: AggregatorState, logits: Tensor) -> Aggregated:
    """Logits are normalised by the state's running mean and variance, which get no gradient."""
    scale = (state.running_var + EPSILON).rsqrt()
    normalized = (logits - state.running_mean[:, None, None]) * scale[:, None, None]
    argument = state.beta[:, None, None] + state.gamma[:, None, None] * normalized
    weights = torch.nn.functional.logsigmoid(argument).softmax(2)
    total = (weights * logits).sum(2)
    # A weight's logarithm grows by 1 − σ with its argument.
    by_argument = weights * (logits - total[..., None]) * (-argument).sigmoid()
    return Aggregated(
        total=total,
        weights=weights,
        gamma=(by_argument * normalized).sum(2),
        beta=by_argument.sum(2),
    )


def derived(
    patient_logit: Callable[[AggregatorState, Tensor, Bags], Tensor],
    state: AggregatorState,
    logits: Tensor,
) -> Aggregated:
    """Return the same for any function of `weighted`, by automatic differentiation."""
    heads, bags, size = logits.shape
    # As H · B heads with a bag each: the sum of their totals has every derivative apart.
    own = state.columns(torch.arange(heads, device=logits.device).repeat_interleave(bags))
    leaves = [logits.reshape(-1, size).T.contiguous(), own.gamma, own.beta]
    with torch.enable_grad():
        columns, gamma, beta = (leaf.detach().requires_grad_() for leaf in leaves)
        state = replace(own, gamma=gamma, beta=beta, training=False)
        total = patient_logit(state, columns, Bags.of([size], logits.device))  # (1, H · B)
        by_logit, by_gamma, by_beta = torch.autograd.grad(
            total.sum(), (columns, gamma, beta), allow_unused=True, materialize_grads=True
        )
    return Aggregated(
        total=total.detach().view(heads, bags),
        weights=by_logit.T.reshape(logits.shape),
        gamma=by_gamma.view(heads, bags),
        beta=by_beta.view(heads, bags),
    )
