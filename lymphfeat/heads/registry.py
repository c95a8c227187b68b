"""The name table of aggregators.

Adding an aggregator is one function in `aggregators/` and one row in `AGGREGATORS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from lymphfeat.heads.aggregators import weighted
from lymphfeat.heads.aggregators.networks import LSTM, Attention, Transformer, gated_attention
from lymphfeat.heads.bags import Bags
from lymphfeat.settings import HeadSettings


@dataclass(frozen=True)
class Aggregator:
    """A row of the name table."""

    # "ranking": trained on instances; "weighted": trained on patients; "network": trained on
    # patients, and not a mean of linear scores
    family: str
    unit: str  # the default unit; networks have none, they read images
    about: str
    reads: tuple[str, ...] = ("unit",)  # settings it uses, besides those of the optimiser
    bottom: bool = False  # ranking family: whether the lowest instances count too
    # Weighted family: (state, logits (M, H), bags) -> patient logits (B, H), while training.
    patient_logit: "Callable[[AggregatorState, Tensor, Bags], Tensor] | None" = None
    # Weighted family: (state, logits (M, H), bags) -> weights (M, H), each bag's adding up to 1.
    weights: "Callable[[AggregatorState, Tensor, Bags], Tensor] | None" = None
    # Network: (channels, settings) -> a module: images (m, C), bags -> patient logits (B,).
    network: "Callable[[int, HeadSettings], nn.Module] | None" = None


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

    def columns(self, columns: "slice | Tensor") -> "AggregatorState":
        """Select some heads; a slice shares memory, so that running statistics keep updating."""
        tensors = {
            field.name: getattr(self, field.name)[columns]
            for field in fields(self)
            if field.name != "training"
        }
        return replace(self, **tensors)


def _mean_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return bags.mean(logits)


def _mean_weights(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return weighted.mean_weights(logits, bags)


def _max_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return logits.gather(0, bags.argmax(logits))


def _max_weights(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return weighted.max_weights(logits, bags)


def _lse_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return weighted.lse_logit(logits, bags, state.temperature)


def _lse_weights(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return weighted.lse_weights(logits, bags, state.temperature)


def _bnsigmoid_logit(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    return weighted.weighted_logit(logits, _bnsigmoid_weights(state, logits, bags), bags)


def _bnsigmoid_weights(state: AggregatorState, logits: Tensor, bags: Bags) -> Tensor:
    if state.training:
        statistics = weighted.moments(logits)
        update_running(state, statistics)
    else:
        statistics = weighted.Moments(state.running_mean, state.running_var)
    return weighted.bnsigmoid_weights(
        logits, bags, gamma=state.gamma, beta=state.beta, statistics=statistics
    )


@torch.no_grad()
def update_running(state: AggregatorState, statistics: weighted.Moments) -> None:
    """Move the running statistics towards a batch's by each head's momentum, in place."""
    state.running_mean.lerp_(statistics.mean, state.momentum)
    state.running_var.lerp_(statistics.variance, state.momentum)


COUNTED_K, PERCENT_K = ("k_train", "k_agg"), ("k_percent", "k_min")  # one pair or the other
_K = (*COUNTED_K, *PERCENT_K)
AGGREGATORS: dict[str, Aggregator] = {
    "top1": Aggregator("ranking", "image", "the highest instance decides (report §3.1)"),
    "topk": Aggregator(
        "ranking",
        "image",
        "mean probability of the k highest (report §3.2)",
        reads=("unit", *_K, "reduce", "loss"),
    ),
    "topbottomk": Aggregator(
        "ranking",
        "image",
        "mean probability of the k highest and the k lowest (report §3.3)",
        reads=("unit", *_K, "loss"),
        bottom=True,
    ),
    "mean": Aggregator(
        "weighted",
        "pixel",
        "every instance has the same weight",
        patient_logit=_mean_logit,
        weights=_mean_weights,
    ),
    "max": Aggregator(
        "weighted",
        "pixel",
        "the highest logit, trained on whole patients",
        patient_logit=_max_logit,
        weights=_max_weights,
    ),
    "lse": Aggregator(
        "weighted",
        "pixel",
        "log-mean-exp, between mean and max",
        reads=("unit", "temperature"),
        patient_logit=_lse_logit,
        weights=_lse_weights,
    ),
    "bnsigmoid": Aggregator(
        "weighted",
        "pixel",
        "weights by batch-normalised sigmoid (report §3.4)",
        reads=("unit", "momentum"),
        patient_logit=_bnsigmoid_logit,
        weights=_bnsigmoid_weights,
    ),
    "attention": Aggregator(
        "network",
        "",
        "weights by attention (Ilse et al. 2018)",
        reads=("width",),
        network=Attention,
    ),
    "gated-attention": Aggregator(
        "network",
        "",
        "weights by gated attention (Ilse et al. 2018)",
        reads=("width",),
        network=gated_attention,
    ),
    "transformer": Aggregator(
        "network",
        "",
        "images attend to each other",
        reads=("width", "layers"),
        network=Transformer,
    ),
    "lstm": Aggregator(
        "network",
        "",
        "a recurrent network reads the images in order",
        reads=("width", "layers"),
        network=LSTM,
    ),
}
