"""Heads: a linear scorer and an aggregator, many of them side by side (METHOD §2).

Adding an aggregator is one function in `aggregators/` and one row in `AGGREGATORS`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from lymphfeat.aggregators import ranking, weighted
from lymphfeat.aggregators.ranking import Ranking, effective_k
from lymphfeat.bags import Bags
from lymphfeat.errors import SettingsError
from lymphfeat.settings import HeadSettings

DEFAULT_K = (5, 10)  # of `--agg all`


@dataclass(frozen=True)
class Aggregator:
    """A row of the name table."""

    family: str  # "ranking": trained on instances; "weighted": trained on patients
    unit: str  # the unit counted by default
    about: str
    bottom: bool = False  # ranking family: do the lowest instances count too
    # Weighted family: (state, logits (M, H), bags) -> patient logits (B, H), while training.
    patient_logit: "Callable[[AggregatorState, Tensor, Bags], Tensor] | None" = None
    # Weighted family: (state, logits (M, H), bags) -> weights (M, H), each bag's adding up to 1.
    weights: "Callable[[AggregatorState, Tensor, Bags], Tensor] | None" = None


@dataclass(frozen=True)
class AggregatorState:
    """What the aggregators of H heads know beside the logits; every tensor is (H,)."""

    gamma: Tensor  # bnsigmoid, trained
    beta: Tensor  # bnsigmoid, trained
    running_mean: Tensor  # bnsigmoid, followed
    running_var: Tensor  # bnsigmoid, followed
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
        """Take some heads; a slice shares memory, so that running statistics stay followed."""
        tensors = {
            field.name: getattr(self, field.name)[columns]
            for field in fields(self)
            if field.name != "training"
        }
        return replace(self, **tensors)


class HeadStack(nn.Module):
    """H heads of one aggregator side by side: scorers (H, C) and what their aggregators learn."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, settings: Sequence[HeadSettings], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.settings = tuple(settings)
        self.aggregator = AGGREGATORS[settings[0].agg]
        self.weight = nn.Parameter(weight)  # (H, C)
        self.bias = nn.Parameter(bias)  # (H,)
        state = AggregatorState.fresh(settings, weight.device)
        self.gamma = nn.Parameter(state.gamma)
        self.beta = nn.Parameter(state.beta)
        self.register_buffer("running_mean", state.running_mean)
        self.register_buffer("running_var", state.running_var)

    @property
    def state(self) -> AggregatorState:
        return replace(
            AggregatorState.fresh(self.settings, self.weight.device),
            gamma=self.gamma,
            beta=self.beta,
            running_mean=self.running_mean,
            running_var=self.running_var,
            training=self.training,
        )

    def logits(self, features: Tensor) -> Tensor:
        """Score instances: features (M, C) -> logits (M, H)."""
        return nn.functional.linear(features, self.weight, self.bias)

    def patient_logit(self, logits: Tensor, bags: Bags) -> Tensor:
        """Aggregate instance logits (M, H) to patient logits (B, H); the weighted family only."""
        assert self.aggregator.patient_logit is not None
        return self.aggregator.patient_logit(self.state, logits, bags)

    def instance_weights(self, logits: Tensor, bags: Bags) -> Tensor:
        """Return how much each instance counts for its patient: (M, H), bags adding up to 1."""
        if self.aggregator.weights is not None:
            return self.aggregator.weights(self.state, logits, bags)
        first = self.settings[0]
        k = effective_k(bags.sizes, first.k_agg, first.k_percent, first.k_min)
        mask = ranking.selected_mask(Ranking.of(logits, bags), k, bottom=self.aggregator.bottom)
        return mask / bags.spread(bags.sum(mask.to(logits.dtype)))

    def probability(self, logits: Tensor, bags: Bags) -> Tensor:
        """Return patient probabilities (B, H) from instance logits (M, H)."""
        if self.aggregator.family == "weighted":
            return self.patient_logit(logits, bags).sigmoid()
        return read_out(self.settings[0], Ranking.of(logits, bags))


def read_out(settings: HeadSettings, ranked: Ranking) -> Tensor:
    """Return patient probabilities (B, H) of a ranking-family head from ranked instances."""
    k = effective_k(ranked.bags.sizes, settings.k_agg, settings.k_percent, settings.k_min)
    bottom = AGGREGATORS[settings.agg].bottom
    return ranking.selected_probability(ranked, k, bottom=bottom, reduce=settings.reduce)


def bag_loss_selection(settings: HeadSettings, logits: Tensor, bags: Bags) -> Tensor:
    """Return the mean of each bag's top k_train logits (B, H), for loss="bag"."""
    k = effective_k(bags.sizes, settings.k_train, settings.k_percent, settings.k_min)
    mask = ranking.selected_mask(Ranking.of(logits, bags), k)  # (M, H)
    return bags.sum(torch.where(mask, logits, 0)) / k[:, None]


# --- the weighted family on a state ---------------------------------------------------------------


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


AGGREGATORS: dict[str, Aggregator] = {
    "top1": Aggregator("ranking", "image", "the highest instance decides (report §3.1)"),
    "topk": Aggregator("ranking", "image", "mean probability of the k highest (report §3.2)"),
    "topbottomk": Aggregator(
        "ranking", "image", "of the k highest and the k lowest (report §3.3)", bottom=True
    ),
    "mean": Aggregator(
        "weighted",
        "pixel",
        "every instance counts alike",
        patient_logit=_mean_logit,
        weights=_mean_weights,
    ),
    "max": Aggregator(
        "weighted",
        "pixel",
        "the highest logit, trained on patients",
        patient_logit=_max_logit,
        weights=_max_weights,
    ),
    "lse": Aggregator(
        "weighted",
        "pixel",
        "log-mean-exp, between mean and max",
        patient_logit=_lse_logit,
        weights=_lse_weights,
    ),
    "bnsigmoid": Aggregator(
        "weighted",
        "pixel",
        "weights by batch-normalised sigmoid (report §3.4)",
        patient_logit=_bnsigmoid_logit,
        weights=_bnsigmoid_weights,
    ),
}


def resolve(settings: HeadSettings) -> HeadSettings:
    """Fill in what the aggregator's name decides: the unit, and top1's k.

    Raises SettingsError for an unknown aggregator.
    """
    if settings.agg not in AGGREGATORS:
        raise SettingsError(
            f"agg (={settings.agg}) must be one of {', '.join(AGGREGATORS)}, or all."
        )
    resolved = replace(settings, unit=settings.unit or AGGREGATORS[settings.agg].unit)
    return replace(resolved, k_agg=1, k_percent=None) if settings.agg == "top1" else resolved


def expand(
    aggs: Sequence[str], base: HeadSettings, k_agg: Sequence[int] = ()
) -> list[HeadSettings]:
    """List the heads meant by names; "all" is every aggregator, topk and topbottomk at 5 and 10.

    A name that counts k is taken once for each `k_agg`; without any, at the base's own.
    """
    heads: list[HeadSettings] = []
    for agg in aggs:
        names = list(AGGREGATORS) if agg == "all" else [agg]
        for name in names:
            ks = k_agg or (DEFAULT_K if agg == "all" else (base.k_agg,))
            counts = ks if name in ("topk", "topbottomk") else (base.k_agg,)
            heads += [resolve(replace(base, agg=name, k_agg=k)) for k in counts]
    return list(dict.fromkeys(heads))


def head_name(settings: HeadSettings) -> str:
    """Name a head as tables and figures do: its aggregator, k, and what departs from defaults."""
    default = resolve(HeadSettings(agg=settings.agg))
    name = settings.agg
    if name in ("topk", "topbottomk"):
        percent = settings.k_percent
        name = f"{name.removesuffix('k')}{settings.k_agg if percent is None else f'{percent:g}%'}"
    shown = {"unit", "k_train", "k_min", "reduce", "loss", "temperature", "momentum"}
    parts = [
        f"{key}={getattr(settings, key)}"
        for key in (*sorted(shown), "lr", "weight_decay")
        if getattr(settings, key) != getattr(default, key)
    ]
    return " ".join([name, *parts])


def initial_scorer(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a scorer's weight (C,) and bias () as a 1×1 convolution is initialised."""
    bound = 1 / math.sqrt(channels)
    values = torch.empty(channels + 1).uniform_(-bound, bound, generator=generator)
    return values[:-1], values[-1]
