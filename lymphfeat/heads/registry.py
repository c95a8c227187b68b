"""The families of aggregators, one class each, and the name table.

Adding an aggregator is one function in `aggregators/` and one row in `AGGREGATORS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lymphfeat.errors import SettingsError
from lymphfeat.heads.aggregators import closed_forms, ranking, weighted
from lymphfeat.heads.aggregators.closed_forms import Aggregated
from lymphfeat.heads.aggregators.networks import LSTM, Attention, Transformer, gated_attention
from lymphfeat.heads.aggregators.ranking import Ranking, effective_k
from lymphfeat.heads.aggregators.weighted import AggregatorState
from lymphfeat.heads.bags import Bags
from lymphfeat.settings import HeadSettings, Unit, require

COUNTED_K, PERCENT_K = ("k_train", "k_agg"), ("k_percent", "k_min")  # one pair or the other
_K = (*COUNTED_K, *PERCENT_K)


@dataclass(frozen=True)
class Aggregator:
    """How a head turns the images of a patient into a probability; a row of the name table."""

    family: ClassVar[str]
    fitted_by: ClassVar[tuple[str, ...]] = ("class_weights", "lr", "weight_decay")  # settings
    about: str
    _: KW_ONLY
    reads: tuple[str, ...] = ()  # settings it uses, besides those that it is fitted by
    unit: Unit = ""  # the default unit of those that read `unit`


@dataclass(frozen=True)
class LinearAggregator(Aggregator):
    """Aggregates the scores that a linear scorer gives to instances."""

    _: KW_ONLY
    reads: tuple[str, ...] = ("unit",)
    learns: tuple[str, ...] = ()  # of an `AggregatorState`, besides the scorer

    def probability(
        self, settings: HeadSettings, state: AggregatorState, logits: Tensor, bags: Bags
    ) -> Tensor:
        """Return patient probabilities (B, H) from instance logits (M, H)."""
        raise NotImplementedError

    def weights(
        self, settings: HeadSettings, state: AggregatorState, logits: Tensor, bags: Bags
    ) -> Tensor:
        """Return the weight of each instance for its patient: (M, H), adding up to 1 per bag."""
        raise NotImplementedError


@dataclass(frozen=True)
class RankingAggregator(LinearAggregator):
    """Reads a patient's highest instances; trained on the highest instances."""

    family: ClassVar[str] = "ranking"
    _: KW_ONLY
    unit: Unit = "image"
    bottom: bool = False  # whether the lowest instances count too

    def probability(
        self, settings: HeadSettings, state: AggregatorState, logits: Tensor, bags: Bags
    ) -> Tensor:
        return self.of_ranked(settings, Ranking.of(logits, bags))

    def of_ranked(self, settings: HeadSettings, ranked: Ranking) -> Tensor:
        """Return patient probabilities (B, H) from ranked instances."""
        k = _k_of(settings, ranked.bags)
        return ranking.selected_probability(ranked, k, bottom=self.bottom, reduce=settings.reduce)

    def weights(
        self, settings: HeadSettings, state: AggregatorState, logits: Tensor, bags: Bags
    ) -> Tensor:
        if settings.reduce == "max":
            return torch.zeros_like(logits).scatter_(0, bags.argmax(logits), 1.0)
        k = _k_of(settings, bags)
        mask = ranking.selected_mask(Ranking.of(logits, bags), k, bottom=self.bottom)  # (M, H)
        return mask / bags.spread(bags.sum(mask.to(logits.dtype)))


def _k_of(settings: HeadSettings, bags: Bags) -> Tensor:
    return effective_k(bags.sizes, settings.k_agg, settings.k_percent, settings.k_min)


@dataclass(frozen=True)
class WeightedAggregator(LinearAggregator):
    """Averages the logits of all instances; trained on patients."""

    family: ClassVar[str] = "weighted"
    # (state, logits (M, H), bags) -> patient logits (B, H)
    patient_logit: Callable[[AggregatorState, Tensor, Bags], Tensor]
    _: KW_ONLY
    # the same for logits (H, B, m), with derivatives; without it they are derived, which is slower
    closed_form: Callable[[AggregatorState, Tensor], Aggregated] | None = None
    unit: Unit = "pixel"
    uniform: bool = False  # all weights are equal, so the mean of instances serves as well as they

    def aggregate(self, state: AggregatorState, logits: Tensor) -> Aggregated:
        """Return the patient logits of bags of one size, logits (H, B, m), and their derivatives.

        Logits are normalised by the running statistics, also in training.
        """
        if self.closed_form is None:
            return closed_forms.derived(self.patient_logit, state, logits)
        return self.closed_form(state, logits)

    def probability(
        self, settings: HeadSettings, state: AggregatorState, logits: Tensor, bags: Bags
    ) -> Tensor:
        return self.patient_logit(state, logits, bags).sigmoid()

    def weights(
        self, settings: HeadSettings, state: AggregatorState, logits: Tensor, bags: Bags
    ) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()  # a clone leaves inference mode
            total = self.patient_logit(state, leaf, bags).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return gradient


@dataclass(frozen=True)
class NetworkAggregator(Aggregator):
    """A network on pooled images; trained on patients."""

    family: ClassVar[str] = "network"
    # (channels, settings) -> a module: images (m, C), bags -> patient logits (B,)
    make: Callable[[int, HeadSettings], nn.Module]


@dataclass(frozen=True)
class DistributionAggregator(Aggregator):
    """A linear score of statistics of a patient's instances; solved exactly (METHOD §2 C)."""

    family: ClassVar[str] = "distribution"
    fitted_by: ClassVar[tuple[str, ...]] = ("class_weights", "penalty", "block_weights")
    statistics: tuple[str, ...]  # each of every store, or with @N of the N-th, counted from 1
    _: KW_ONLY
    reads: tuple[str, ...] = ("unit",)
    unit: Unit = "image"


AGGREGATORS: dict[str, Aggregator] = {
    "top1": RankingAggregator("the highest instance decides (report §3.1)"),
    "topk": RankingAggregator(
        "mean probability of the k highest (report §3.2)", reads=("unit", *_K, "reduce", "loss")
    ),
    "topbottomk": RankingAggregator(
        "mean probability of the k highest and the k lowest (report §3.3)",
        reads=("unit", *_K, "loss"),
        bottom=True,
    ),
    "mean": WeightedAggregator(
        "every instance has the same weight",
        weighted.mean_logit,
        closed_form=closed_forms.mean,
        reads=("unit", "solver"),
        uniform=True,
    ),
    "max": WeightedAggregator(
        "the highest logit, trained on whole patients",
        weighted.max_logit,
        closed_form=closed_forms.highest,
    ),
    "lse": WeightedAggregator(
        "log-mean-exp, between mean and max",
        weighted.lse_logit,
        closed_form=closed_forms.lse,
        reads=("unit", "temperature"),
    ),
    "bnsigmoid": WeightedAggregator(
        "weights by batch-normalised sigmoid (report §3.4)",
        weighted.bnsigmoid_logit,
        closed_form=closed_forms.bnsigmoid,
        reads=("unit", "momentum"),
        learns=("gamma", "beta", "running_mean", "running_var"),
    ),
    "std": DistributionAggregator("how much each feature differs between cells", ("std",)),
    "logstd": DistributionAggregator("logarithm of how much each feature differs", ("logstd",)),
    "gini": DistributionAggregator("mean difference of two cells in each feature", ("gini",)),
    "quantiles": DistributionAggregator(
        "distance of two quantiles of each feature", ("quantiles",), reads=("unit", "quantiles")
    ),
    "kernel-mean": DistributionAggregator(
        "the whole distribution of the cells, by a Gaussian kernel", ("kernel-mean",)
    ),
    "prototypes": DistributionAggregator(
        "share and mean of each kind of cell", ("prototypes",), reads=("unit", "prototypes")
    ),
    "mean+std": DistributionAggregator(
        "mean of each feature and how much it differs", ("mean", "std")
    ),
    "attention": NetworkAggregator(
        "weights by attention (Ilse et al. 2018)", Attention, reads=("width",)
    ),
    "gated-attention": NetworkAggregator(
        "weights by gated attention (Ilse et al. 2018)", gated_attention, reads=("width",)
    ),
    "transformer": NetworkAggregator(
        "images attend to each other", Transformer, reads=("width", "layers")
    ),
    "lstm": NetworkAggregator(
        "a recurrent network reads the images in order", LSTM, reads=("width", "layers")
    ),
}

_EXACT_MEAN = DistributionAggregator("mean of each feature", ("mean",), reads=("solver",))
_STATISTICS = {"mean": replace(_EXACT_MEAN, reads=())} | {
    name: row
    for name, row in AGGREGATORS.items()
    if isinstance(row, DistributionAggregator) and row.statistics == (name,)
}
_Family = TypeVar("_Family", bound=Aggregator)


def find_aggregator(settings: HeadSettings) -> Aggregator:
    """Return a head's aggregator. Statistics joined by + are one: their blocks weigh alike.

    A statistic may name the one store that it reads, by number: mean@2. Raises SettingsError for an
    unknown name.
    """
    if settings.agg == "mean" and settings.solver == "exact":
        return _EXACT_MEAN
    if settings.agg in AGGREGATORS:
        return AGGREGATORS[settings.agg]
    names = settings.agg.split("+")
    parts = [_statistic_of(name.partition("@")[0], settings.agg) for name in names]
    require(len(set(names)) == len(names), f"agg (={settings.agg}) must name each statistic once.")
    return DistributionAggregator(
        ", ".join(part.about for part in parts),
        tuple(names),
        reads=("unit", *(name for part in parts for name in part.reads if name != "unit")),
    )


def places_of(name: str, stores: int) -> Sequence[int]:
    """Return which stores a statistic of a composition reads: all, or the one after @.

    Raises SettingsError for a store that does not exist.
    """
    _, marked, number = name.partition("@")
    if not marked:
        return range(stores)
    require(
        number.isdecimal() and 1 <= int(number) <= stores,
        f"agg (={name}) must name one of the {stores} stores after @, counted from 1; got "
        f"{number or 'none'}.",
    )
    return [int(number) - 1]


def _statistic_of(name: str, agg: str) -> DistributionAggregator:
    aggregator = _STATISTICS.get(name)
    if aggregator is None:
        raise SettingsError(
            f"agg (={agg}) must be one of {', '.join(AGGREGATORS)}; a family (ranking, weighted, "
            f"distribution, network); all; or names out of {', '.join(_STATISTICS)} joined by +."
        )
    return aggregator


def aggregator_of(settings: HeadSettings, family: type[_Family]) -> _Family:
    """Return a head's aggregator. Raises SettingsError unless it is of the family."""
    aggregator = find_aggregator(settings)
    if isinstance(aggregator, family):
        return aggregator
    names = ", ".join(name for name, row in AGGREGATORS.items() if isinstance(row, family))
    raise SettingsError(
        f"agg (={settings.agg}) must be one of {names} here; the others are fitted on cached maps "
        "by fit-head."
    )
