"""Heads as one writes them first, and the matrix products that no way of writing them avoids."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.bench.measure import seconds_of
from lymphfeat.cohort.splits import Plan, Split
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.registry import AGGREGATORS, RankingAggregator
from lymphfeat.settings import HeadSettings

BATCH = 16
WIDTH = 128  # of networks
# Every layer of the four networks: from, to, and whether what is below it learns, too. Not counted
# is what the images of a patient give each other in the transformer, less than a tenth.
_LAYERS = {
    "attention": ((512, WIDTH, False), (512, 1, False)),
    "gated attention": ((512, 2 * WIDTH, False), (512, 1, False)),
    "transformer": (
        (512, WIDTH, False),
        (WIDTH, 3 * WIDTH, True),
        (WIDTH, WIDTH, True),
        (WIDTH, 2 * WIDTH, True),
        (2 * WIDTH, WIDTH, True),
    ),
    "lstm": ((512, 8 * WIDTH, False), (WIDTH, 8 * WIDTH, True)),
}


class PlainLoop:
    """One head on one split: a loop over bags, a bag at a time, torch's own layers."""

    def __init__(self, features: Features, head: HeadSettings, split: Split) -> None:
        instances = features.of_unit(head.unit if head.agg != "mean" else "image")
        self.bags = [instances.of_patient(p).float() for p in range(len(features.row))]
        self.labels = features.labels.float()
        self.train = features.rows_of(split.train)
        self.head, self.aggregator = head, AGGREGATORS[head.agg]
        self.scorer = nn.Linear(features.channels, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        parameters = [*self.scorer.parameters(), self.gamma, self.beta]
        self.optimizer = torch.optim.Adam(parameters, lr=head.lr)

    def train_epoch(self) -> None:
        """Learn from every training patient once."""
        if isinstance(self.aggregator, RankingAggregator):
            with torch.no_grad():
                tops = [self.bags[p][self.scorer(self.bags[p])[:, 0].argmax()] for p in self.train]
            for chosen in batches(len(self.train)):
                logits = torch.cat([self.scorer(tops[i]) for i in chosen])
                self._step(logits, self.train[chosen])
        else:
            for chosen in batches(len(self.train)):
                scores = [self.scorer(self.bags[p])[:, 0] for p in self.train[chosen]]
                every = torch.cat(scores).detach()
                moments = every.mean(), (every.var(correction=0) + 1e-5).sqrt()
                logits = torch.stack([self._patient_logit(score, *moments) for score in scores])
                self._step(logits, self.train[chosen])

    @torch.no_grad()
    def evaluate(self, patients: Sequence[int]) -> list[float]:
        """Return the probabilities of some patients."""
        return [self._probability(self.scorer(self.bags[patient])[:, 0]) for patient in patients]

    def _patient_logit(self, score: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self.head.agg == "mean":
            return score.mean()
        if self.head.agg == "max":
            return score.max()
        normalized = (score.detach() - mean) / std
        weights = torch.sigmoid(self.beta + self.gamma * normalized)
        return (weights * score).sum() / weights.sum()

    def _step(self, logits: Tensor, patients: NDArray[np.int64]) -> None:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self.labels[patients])
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def _probability(self, score: Tensor) -> float:
        if not isinstance(self.aggregator, RankingAggregator):
            return float(self._patient_logit(score, score.mean(), score.std()).sigmoid())
        k = min(self.head.k_agg, len(score))
        chosen = score.topk(k).values
        if self.aggregator.bottom:
            chosen = torch.cat([chosen, score.topk(k, largest=False).values])
        return float(chosen.sigmoid().mean())


def batches(n: int) -> list[NDArray[np.int64]]:
    """Draw an order of n patients, and cut it into batches; an incomplete last one is left out."""
    steps = max(1, n // BATCH)
    return np.array_split(torch.randperm(n).numpy()[: steps * BATCH], steps)


def bare_networks(features: Features, plan: Plan, epochs: int) -> float:
    """Return how many seconds the products of all layers of all networks take.

    Measured of an epoch of one outer and of one inner fit, and multiplied. Outer fits have curves,
    of the patients that they hold out.
    """
    sizes, total = np.diff(features.offsets), 0.0
    for own in (plan.outer, plan.inner_once):
        learnt, shown = (
            int(sizes[features.rows_of(part)].sum())
            for part in (own[0].train, own[0].validation if own is plan.outer else ())
        )
        m = round(learnt * BATCH / len(own[0].train))  # images of a batch
        seconds = sum(
            _layer_seconds(layer, m, learnt / m, shown)
            for layers in _LAYERS.values()
            for layer in layers
        )
        total += len(own) * epochs * seconds
    return total


def _layer_seconds(layer: tuple[int, int, bool], m: int, steps: float, shown: int) -> float:
    """Return how long an epoch's products of a layer take: steps on m images, and some shown."""
    before, after, deeper = layer
    images, gradient = torch.randn(m, before), torch.randn(m, after)
    weight, others = torch.randn(before, after), torch.randn(shown, before)

    def step() -> None:
        images @ weight
        images.mT @ gradient
        if deeper:
            gradient @ weight.mT

    step()
    repeats = max(1, round(steps))
    seconds = sum(seconds_of(step) for _ in range(repeats))
    return seconds * steps / repeats + seconds_of(lambda: others @ weight)


def bare_ranking(features: Features, plan: Plan, epochs: int) -> None:
    """Score images (N, C) by the scorers of all fits, before each epoch.

    Outer fits have curves, so they score the images of all patients, and once more in the end;
    inner ones need those that they train on.
    """
    images, sizes = features.images, np.diff(features.offsets)
    outer, inner = (
        torch.randn(len(splits), images.shape[1]) for splits in (plan.outer, plan.inner_once)
    )
    trained = [int(sizes[features.rows_of(split.train)].sum()) for split in plan.inner_once]
    some = images[: sum(trained) // len(trained)]  # as many products as each with its own images
    for _ in range(epochs):
        images @ outer.mT  # (N, outer)
        some @ inner.mT  # (n, inner)
    images @ outer.mT
