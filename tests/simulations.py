"""Simulated cohorts whose truth is known, and studies of them (METHOD §4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.cohort.splits import Split
from lymphfeat.evaluation.decision import HALF, Decision
from lymphfeat.evaluation.intervals import Estimate, estimate, t_half_width
from lymphfeat.evaluation.metrics import balanced_accuracy
from lymphfeat.evaluation.optimism import Calls, mean_accuracy, optimism_interval
from lymphfeat.evaluation.providers import plan_splits
from lymphfeat.evaluation.regression import learn_logistic
from lymphfeat.evaluation.scores import (
    Learner,
    PlannedPatients,
    cross_fit,
    measure,
)
from lymphfeat.heads.engine.instances import Features
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.settings import FitSettings, ProtocolName

_FRESH = 1000  # patients on whom a fitted model's true value is measured


@dataclass(frozen=True, kw_only=True)
class Study:
    """One simulated study: the intervals it reports, and its models' true balanced accuracies."""

    ours: Estimate  # of one model, Nadeau–Bengio
    difference: Estimate  # of two models, paired by split
    naive: tuple[float, float]  # of the same figures, as if the splits were independent
    true: float  # mean over the splits' models, each on thousands of fresh patients
    true_difference: float


def draw_patients(rng: np.random.Generator, n: int) -> tuple[Floats, Labels]:
    """Draw inputs (n, 4), of which the third and fourth say less than the first two; labels."""
    labels = (np.arange(n) % 3 > 0).astype(np.int64)
    strength = np.array([0.9, 0.6, 0.45, 0.0])
    return rng.normal((labels[:, None] - 0.5) * strength, 1), labels


def run_study(
    seed: int,
    *,
    patients: int = 60,
    folds: int = 3,
    repeats: int = 2,
    protocol: ProtocolName = "honest",
) -> Study:
    """Measure two models (inputs 1–2, inputs 3–4) as a protocol does, on one simulated cohort."""
    rng = np.random.default_rng(seed)
    inputs, labels = draw_patients(rng, patients)
    fresh = draw_patients(rng, _FRESH)
    ids = [f"P{i}" for i in range(patients)]
    settings = FitSettings(protocol=protocol, seeds=repeats, folds=folds, seed=seed)
    people = PlannedPatients(ids, labels, plan_splits(ids, labels, settings))
    rule = HALF if protocol == "report" else settings.threshold
    found = [
        _measure(people, inputs[:, part], (fresh[0][:, part], fresh[1]), rule) for part in _PARTS
    ]
    ratio = people.plan.test_to_train
    values, truths = zip(*found, strict=True)
    naive = t_half_width(values[0])
    return Study(
        ours=estimate(values[0], ratio),
        difference=estimate(values[0] - values[1], ratio),
        naive=(values[0].mean() - naive, values[0].mean() + naive),
        true=truths[0],
        true_difference=truths[0] - truths[1],
    )


_PARTS = (slice(0, 2), slice(2, 4))


def _measure(
    people: PlannedPatients, inputs: Floats, fresh: tuple[Floats, Labels], rule: str
) -> tuple[Floats, float]:
    """Return a model's figure in each split, and the true one, mean over the splits' models."""
    scores = cross_fit(people, learn_logistic, lambda _: inputs, name="model", kind="head")
    runs = measure(people, scores, threshold=rule).runs
    true = [
        _true(learn_logistic, inputs[train], people.labels[train], threshold, fresh)
        for train, threshold in zip(people.train, runs["threshold"], strict=True)
    ]
    return runs["ba"].to_numpy(float), float(np.mean(true))


def _true(
    learner: Learner,
    inputs: Floats,
    labels: Labels,
    threshold: float,
    fresh: tuple[Floats, Labels],
) -> float:
    return float(balanced_accuracy(learner(inputs, labels)(fresh[0]), fresh[1], threshold))


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The share of studies whose 95 % interval holds the truth."""

    ours: float
    difference: float
    naive: float


def coverage(studies: list[Study]) -> Coverage:
    """Compare intervals with the truth: the mean true figure over all studies."""
    true = float(np.mean([study.true for study in studies]))
    difference = float(np.mean([study.true_difference for study in studies]))

    def share(intervals: list[tuple[float, float]], truth: float) -> float:
        return float(np.mean([low <= truth <= high for low, high in intervals]))

    return Coverage(
        ours=share([(s.ours.low, s.ours.high) for s in studies], true),
        difference=share([(s.difference.low, s.difference.high) for s in studies], difference),
        naive=share([s.naive for s in studies], true),
    )


@dataclass(frozen=True, kw_only=True)
class OptimismStudy:
    """One simulated study of both protocols: their difference, and its interval."""

    optimism: float
    low: float
    high: float


def run_optimism_study(
    seed: int,
    *,
    patients: int = 60,
    folds: int = 3,
    repeats: int = 2,
    halves: int = 10,
    strength: tuple[float, ...] = (0.9, 0.6, 0.45),
    epochs: int = 20,
) -> OptimismStudy:
    """Learn by stochastic steps, whose epochs differ as heads' do, under both protocols.

    Inputs are those of `strength` and twenty that say nothing.
    """
    rng = np.random.default_rng(seed)
    labels = (np.arange(patients) % 3 > 0).astype(np.int64)
    apart = np.concatenate([strength, np.zeros(20)])
    inputs = rng.normal((labels[:, None] - 0.5) * apart, 1)
    ids = [f"P{i}" for i in range(patients)]
    settings = FitSettings(protocol="report", seeds=halves, seed=1000 * seed)
    report = PlannedPatients(ids, labels, plan_splits(ids, labels, settings))
    settings = FitSettings(seeds=repeats, folds=folds, seed=1000 * seed)
    honest = PlannedPatients(ids, labels, plan_splits(ids, labels, settings))
    by_report = [
        Calls(labels=labels[rows], rows=rows, tumoral=curves[:, None, rows] > 0.5)
        for rows, curves in zip(
            report.validation, _learn(report, report.plan.outer, inputs, epochs), strict=True
        )
    ]
    by_honest = _honest_calls(honest, inputs, epochs)
    once = np.ones((1, patients))
    low, high = optimism_interval(labels, by_report, by_honest, draws=400, seed=seed)
    found = mean_accuracy(by_report, once) - mean_accuracy(by_honest, once)
    return OptimismStudy(optimism=float(found[0]), low=low, high=high)


def _honest_calls(people: PlannedPatients, inputs: Floats, epochs: int) -> list[Calls]:
    last = _learn(people, people.plan.outer, inputs, epochs)[:, -1]  # (S, P)
    once = people.plan.inner_once
    inside = dict(
        zip([split.id for split in once], _learn(people, once, inputs, epochs)[:, -1], strict=True)
    )
    calls = []
    for place, rows in enumerate(people.validation):
        out_of_fold = np.empty(len(people.ids))
        for split, own in people.inner(place):
            out_of_fold[own] = inside[split.id][own]
        train = people.train[place]
        threshold = Decision.learn(out_of_fold[train], people.labels[train]).threshold
        tumoral = last[place, rows][None, None] > threshold
        calls.append(Calls(labels=people.labels[rows], rows=rows, tumoral=tumoral))
    return calls


def _learn(people: PlannedPatients, splits: Sequence[Split], inputs: Floats, epochs: int) -> Floats:
    """Fit logistic regressions by stochastic gradients, all side by side: (splits, epochs, P)."""
    labels = people.labels.astype(float)
    train = [people.rows(split.train) for split in splits]
    rngs = [np.random.default_rng([split.seed, crc32(split.id.encode())]) for split in splits]
    weights = np.zeros((len(splits), inputs.shape[1] + 1))
    x = np.column_stack([inputs, np.ones(len(inputs))])  # (P, D)
    curves = np.empty((len(splits), epochs, len(inputs)))
    for epoch in range(epochs):
        for _ in range(4):
            drawn = np.stack([rng.choice(own, 16) for rng, own in zip(rngs, train, strict=True)])
            slack = expit(np.einsum("sbd,sd->sb", x[drawn], weights)) - labels[drawn]
            weights -= 0.3 * np.einsum("sb,sbd->sd", slack, x[drawn]) / 16
        curves[:, epoch] = expit(weights @ x.T)
    return curves


def noise_features(
    seed: int, sizes: NDArray[np.int64], labels: Labels, channels: int = 24
) -> Features:
    """Make feature maps (1×1) that say nothing of anybody; the bag sizes are as given."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(int(sizes.sum()), channels, 1, 1)).astype(np.float16)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = [f"P{i}" for i in range(len(sizes))]
    return Features(maps, maps[..., 0, 0].astype(np.float32), offsets, ids, labels)
