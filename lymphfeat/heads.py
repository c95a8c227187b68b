"""Heads: a linear scorer and an aggregator, many of them side by side, or a network (METHOD §2).

Adding an aggregator is one function in `aggregators/` and one row in `AGGREGATORS`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lymphfeat.aggregators import ranking, weighted
from lymphfeat.aggregators.attention import Attention, gated_attention
from lymphfeat.aggregators.lstm import LSTM
from lymphfeat.aggregators.ranking import Ranking, effective_k
from lymphfeat.aggregators.transformer import Transformer
from lymphfeat.bags import Bags
from lymphfeat.errors import SettingsError
from lymphfeat.settings import HeadGrid, HeadSettings

DEFAULT_K = (5, 10)  # of `--agg all`


@dataclass(frozen=True)
class Aggregator:
    """A row of the name table."""

    # "ranking": trained on instances; "weighted": trained on patients; "network": trained on
    # patients, and not a mean of linear scores
    family: str
    unit: str  # the unit counted by default; of networks none, they read images
    about: str
    reads: tuple[str, ...] = ("unit",)  # settings that matter, beside those of the optimiser
    bottom: bool = False  # ranking family: do the lowest instances count too
    # Weighted family: (state, logits (M, H), bags) -> patient logits (B, H), while training.
    patient_logit: "Callable[[AggregatorState, Tensor, Bags], Tensor] | None" = None
    # Weighted family: (state, logits (M, H), bags) -> weights (M, H), each bag's adding up to 1.
    weights: "Callable[[AggregatorState, Tensor, Bags], Tensor] | None" = None
    # Network: (channels, settings) -> a module: images (m, C), bags -> patient logits (B,).
    network: "Callable[[int, HeadSettings], nn.Module] | None" = None


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
        if first.reduce == "max":
            return weighted.max_weights(logits, bags)
        k = effective_k(bags.sizes, first.k_agg, first.k_percent, first.k_min)
        mask = ranking.selected_mask(Ranking.of(logits, bags), k, bottom=self.aggregator.bottom)
        return mask / bags.spread(bags.sum(mask.to(logits.dtype)))

    def probability(self, logits: Tensor, bags: Bags) -> Tensor:
        """Return patient probabilities (B, H) from instance logits (M, H)."""
        if self.aggregator.family == "weighted":
            return self.patient_logit(logits, bags).sigmoid()
        return read_out(self.settings[0], Ranking.of(logits, bags))


class NetworkHead(nn.Module):
    """A network on raw pooled images: it standardises them as it was trained."""

    mean: Tensor
    scale: Tensor

    def __init__(self, settings: HeadSettings, network: nn.Module, mean: Tensor, scale: Tensor):
        """Take the mean and 1 / standard deviation (C,) of training images."""
        super().__init__()
        self.settings, self.network = settings, network
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def initial(
        cls, settings: HeadSettings, mean: Tensor, scale: Tensor, generator: torch.Generator
    ) -> "NetworkHead":
        """Initialise a network as a generator says, on the device of `mean`."""
        make = AGGREGATORS[settings.agg].network
        assert make is not None
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # modules draw from the global generator
            torch.manual_seed(seed)
            network = make(len(mean), settings)
        return cls(settings, network.to(mean.device), mean, scale)

    def forward(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits: images (m, C) -> (B,)."""
        logits: Tensor = self.network((images - self.mean) * self.scale, bags)
        return logits

    @torch.no_grad()
    def image_logits(self, images: Tensor) -> Tensor:
        """Score images (m, C) as patients who have nothing else: (m,)."""
        logits: Tensor = self(images, Bags.of([1] * len(images), images.device))
        return logits


def read_out(settings: HeadSettings, ranked: Ranking) -> Tensor:
    """Return patient probabilities (B, H) of a ranking-family head from ranked instances."""
    k = effective_k(ranked.bags.sizes, settings.k_agg, settings.k_percent, settings.k_min)
    bottom = AGGREGATORS[settings.agg].bottom
    return ranking.selected_probability(ranked, k, bottom=bottom, reduce=settings.reduce)


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


_COUNTED_K, _PERCENT_K = ("k_train", "k_agg"), ("k_percent", "k_min")  # one pair or the other
_K = (*_COUNTED_K, *_PERCENT_K)

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
        "of the k highest and the k lowest (report §3.3)",
        reads=("unit", *_K, "loss"),
        bottom=True,
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
        "a recurrent network reads the images in their order",
        reads=("width", "layers"),
        network=LSTM,
    ),
}
_OPTIMISER = ("class_weights", "lr", "weight_decay")  # what every head reads
_DEFAULTS = HeadSettings()


# --- which heads are meant ------------------------------------------------------------------------


def resolve(settings: HeadSettings) -> HeadSettings:
    """Fill in what the aggregator's name decides, and put what it does not read to its default.

    Heads that do the same are so equal. Raises SettingsError for an unknown aggregator.
    """
    if settings.agg not in AGGREGATORS:
        raise SettingsError(
            f"agg (={settings.agg}) must be one of {', '.join(AGGREGATORS)}, or all, ranking, "
            "weighted or network."
        )
    if (settings.agg, settings.k_train, settings.k_agg, settings.k_percent) == ("topk", 1, 1, None):
        settings = replace(settings, agg="top1")
    aggregator = AGGREGATORS[settings.agg]
    read = {"agg", *_read(settings), *_OPTIMISER}
    unread = {
        field.name: getattr(_DEFAULTS, field.name)
        for field in fields(settings)
        if field.name not in read
    }
    resolved = replace(settings, **unread)
    if "unit" in aggregator.reads:
        resolved = replace(resolved, unit=settings.unit or aggregator.unit)
    return replace(resolved, k_agg=1) if settings.agg == "top1" else resolved


def require_linear(settings: HeadSettings) -> None:
    """Raise SettingsError for what only heads on cached maps know: networks, class weights."""
    if AGGREGATORS[settings.agg].network is not None:
        linear = [name for name, row in AGGREGATORS.items() if row.network is None]
        raise SettingsError(
            f"agg (={settings.agg}) must be one of {', '.join(linear)} here; attention, "
            "transformer and lstm are trained on cached maps, by fit-head."
        )
    if settings.class_weights != "none":
        raise SettingsError(
            f"class_weights (={settings.class_weights}) must be none here; heads on cached maps "
            "know it, by fit-head."
        )


def _read(settings: HeadSettings) -> set[str]:
    """Name the settings that matter to a head: k in percent takes the place of k as a number."""
    unread = _PERCENT_K[1:] if settings.k_percent is None else _COUNTED_K
    return set(AGGREGATORS[settings.agg].reads) - set(unread)


def expand(grid: HeadGrid) -> list[HeadSettings]:
    """List the heads of a grid, each once.

    "all" is every aggregator and a family's name all of that family; both take topk… at 5 and 10.

    Raises SettingsError for an unknown aggregator, and for a value that no head reads.
    """
    heads: list[HeadSettings] = []
    for agg in grid.agg:
        names = _names(agg)
        counted = grid.k_agg or grid.k_percent or names == (agg,)
        own = grid if counted else replace(grid, k_agg=DEFAULT_K)
        for name in names:
            heads += [resolve(HeadSettings(agg=name, **values)) for values in _combinations(own)]
    heads = list(dict.fromkeys(heads))
    _refuse_unread(grid, heads)
    return heads


def _names(agg: str) -> tuple[str, ...]:
    of_family = [name for name, row in AGGREGATORS.items() if agg in ("all", row.family)]
    return tuple(of_family) or (agg,)


def _combinations(grid: HeadGrid) -> Iterator[dict[str, Any]]:
    """Yield every combination of a grid's values, once with k as a number, once in percent."""
    values: dict[str, tuple[Any, ...]] = {
        field.name: getattr(grid, field.name)
        for field in fields(grid)
        if field.name != "agg" and getattr(grid, field.name)
    }
    in_percent = {name: values.pop(name) for name in _PERCENT_K if name in values}
    counted = {name: values.pop(name) for name in _COUNTED_K if name in values}
    by_k = [counted] if grid.k_agg or not grid.k_percent else []
    for ks in [*by_k, in_percent] if grid.k_percent else by_k:
        axes = ks | values
        for combination in product(*axes.values()):
            yield dict(zip(axes, combination, strict=True))


def _refuse_unread(grid: HeadGrid, heads: Sequence[HeadSettings]) -> None:
    for field in fields(grid)[1:]:  # all but agg
        known = {getattr(head, field.name) for head in heads}
        unread = [value for value in getattr(grid, field.name) if value not in known]
        readers = [name for name, row in AGGREGATORS.items() if field.name in row.reads]
        if unread:
            raise SettingsError(
                f"{field.name} (={unread[0]}) must be read by one of the heads; got "
                f"{', '.join(dict.fromkeys(head.agg for head in heads))}. "
                f"{', '.join(readers)} may read it"
                + (", with k_percent." if field.name == "k_min" else ".")
            )


def head_name(settings: HeadSettings) -> str:
    """Name a head as tables and figures do: its aggregator, k, and what departs from defaults."""
    default = resolve(HeadSettings(agg=settings.agg))
    name = settings.agg
    if name in ("topk", "topbottomk"):
        percent = settings.k_percent
        k = settings.k_agg if percent is None else f"{_shown(percent)}%"
        name = f"{name.removesuffix('k')}{k}"
    hidden = {"agg", "k_agg", "k_percent"}
    shown = sorted({field.name for field in fields(settings)} - hidden - set(_OPTIMISER))
    parts = [
        f"{key}={_shown(getattr(settings, key))}"
        for key in (*shown, *_OPTIMISER)
        if getattr(settings, key) != getattr(default, key)
    ]
    return " ".join([name, *parts])


def _shown(value: object) -> str:
    return str(value).removesuffix(".0")


def initial_scorer(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a scorer's weight (C,) and bias () as a 1×1 convolution is initialised."""
    bound = 1 / math.sqrt(channels)
    values = torch.empty(channels + 1).uniform_(-bound, bound, generator=generator)
    return values[:-1], values[-1]


def class_weights(settings: HeadSettings, labels: Tensor) -> Tensor:
    """Return how much the loss of a reactive and of a tumoral patient counts: (2,).

    "balanced" gives n / (2 · n of the class) among the training `labels` (P,), so that both classes
    count alike and the mean weight is 1.
    """
    if settings.class_weights == "none":
        return torch.ones(2, device=labels.device)
    counts = torch.stack([(labels == label).sum() for label in (0, 1)])
    return len(labels) / (2 * counts.clamp(min=1).float())
