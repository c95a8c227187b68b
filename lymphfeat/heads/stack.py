"""Heads side by side as modules: linear scorers with their aggregators, and networks."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lymphfeat.heads.aggregators.networks import Attention
from lymphfeat.heads.aggregators.weighted import AggregatorState
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.head import Head, ReadOut
from lymphfeat.heads.registry import (
    LinearAggregator,
    NetworkAggregator,
    WeightedAggregator,
    aggregator_of,
)
from lymphfeat.settings import HeadSettings


class HeadStack(Head):
    """H heads of one aggregator side by side: scorers (H, C) and what their aggregators learn."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, settings: Sequence[HeadSettings], weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.settings = tuple(settings)
        self.aggregator = aggregator_of(settings[0], LinearAggregator)
        self.of_logits = isinstance(self.aggregator, WeightedAggregator)
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
        aggregator = aggregator_of(self.settings[0], WeightedAggregator)
        return aggregator.patient_logit(self.state, logits, bags)

    def keep(self, instances: Tensor) -> Tensor:
        """Return the logits (n, U, 1) of instances, of one head."""
        return self.logits(instances)

    def patient_logits(self, kept: Tensor, images: Bags) -> Tensor:
        return self.patient_logit(kept.flatten(0, 1), images.times(kept.shape[1]))[:, 0]

    @torch.no_grad()
    def patient_probability(self, kept: Tensor, images: Bags) -> Tensor:
        state, settings = replace(self.state, training=False), self.settings[0]
        logits, bags = kept.flatten(0, 1), images.times(kept.shape[1])  # (N · U, 1)
        return self.aggregator.probability(settings, state, logits, bags)[:, 0]

    @torch.no_grad()
    def read_out(self, kept: Tensor, images: Bags) -> ReadOut:
        state, settings = replace(self.state, training=False), self.settings[0]
        logits, bags = kept.flatten(0, 1), images.times(kept.shape[1])  # (N · U, 1)
        probability = self.aggregator.probability(settings, state, logits, bags)
        weight = self.aggregator.weights(settings, state, logits, bags)
        total, values = probability, logits.sigmoid()
        if isinstance(self.aggregator, WeightedAggregator):
            total, values = self.aggregator.patient_logit(state, logits, bags), logits
        return ReadOut(
            probability=probability[:, 0],
            total=total[:, 0],
            score=kept.mean((1, 2)),
            weight=weight.view(kept.shape).sum((1, 2)),
            contribution=(weight * values).view(kept.shape).sum((1, 2)),
        )


class NetworkHead(Head):
    """A network on raw pooled images, which it standardises as in training."""

    mean: Tensor
    scale: Tensor
    chosen = ""  # nothing on training patients, but for what `fit-head` chooses

    def __init__(self, settings: HeadSettings, network: nn.Module, mean: Tensor, scale: Tensor):
        """Take the mean and 1 / standard deviation (C,) of training images."""
        super().__init__()
        self.settings, self.network = (settings,), network
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def initial(
        cls, settings: HeadSettings, mean: Tensor, scale: Tensor, generator: torch.Generator
    ) -> "NetworkHead":
        """Initialise a network from a generator, on the device of `mean`."""
        aggregator = aggregator_of(settings, NetworkAggregator)
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # modules draw from the global generator
            torch.manual_seed(seed)
            network = aggregator.make(len(mean), settings)
        return cls(settings, network.to(mean.device), mean, scale)

    @torch.no_grad()
    def standardise(self, images: Tensor) -> None:
        """Learn mean and 1 / standard deviation from the pooled images (m, C) of training."""
        deviation, mean = torch.std_mean(images.double(), dim=0, correction=0)
        self.mean.copy_(mean)
        self.scale.copy_(scale_of(mean, deviation))

    def forward(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits: images (m, C) -> (B,)."""
        logits: Tensor = self.network((images - self.mean) * self.scale, bags)
        return logits

    def keep(self, instances: Tensor) -> Tensor:
        """Return the pooled images (n, 1, C) of instances (n, U, C)."""
        return instances.mean(1, keepdim=True)

    def patient_logits(self, kept: Tensor, images: Bags) -> Tensor:
        logits: Tensor = self(kept[:, 0], images)
        return logits

    @torch.no_grad()
    def patient_probability(self, kept: Tensor, images: Bags) -> Tensor:
        return self.patient_logits(kept, images).sigmoid()

    @torch.no_grad()
    def read_out(self, kept: Tensor, images: Bags) -> ReadOut:
        """Read out patients. Only attention weighs images; the others' weights are equal.

        Then the contributions need not add up to the total, for images act on each other.
        """
        total = self.patient_logits(kept, images)  # (P,)
        score = self.image_logits([kept], images)  # (N,)
        weight = self._weights(kept[:, 0], images)
        return ReadOut(
            probability=total.sigmoid(),
            total=total,
            score=score,
            weight=weight,
            contribution=weight * score,
        )

    def _weights(self, images: Tensor, bags: Bags) -> Tensor:
        if isinstance(self.network, Attention):
            return self.network.weights((images - self.mean) * self.scale, bags)[:, 0]
        return 1 / bags.spread(bags.sizes[:, None].to(images.dtype))[:, 0]

    @torch.no_grad()
    def image_logits(self, sets: Sequence[Tensor], bags: Bags) -> Tensor:
        """Score images (m, U, C) of one set, each as a patient with a single image: (m,)."""
        images = sets[0].mean(1)
        logits: Tensor = self(images, Bags.of([1] * len(images), images.device))
        return logits


def scale_of(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return 1 / deviation; 0 of channels that do not vary, whose rounding errors it would blow up.

    Of any shape.
    """
    varies = deviation > 1e-6 * (1 + mean.abs())
    return torch.where(varies, 1 / deviation.where(varies, 1), 0)


def initial_scorer(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a scorer's weight (C,) and bias () as a 1×1 convolution is initialised."""
    bound = 1 / math.sqrt(channels)
    values = torch.empty(channels + 1).uniform_(-bound, bound, generator=generator)
    return values[:-1], values[-1]


def class_weights(settings: HeadSettings, labels: Tensor) -> Tensor:
    """Return how much the loss of a reactive and of a tumoral patient counts: (2,).

    "balanced" gives n / (2 · n of the class) among the training `labels` (P,), so that both classes
    count equally and the mean weight is 1.
    """
    if settings.class_weights == "none":
        return torch.ones(2, device=labels.device)
    counts = torch.stack([(labels == label).sum() for label in (0, 1)])
    return len(labels) / (2 * counts.clamp(min=1).float())
