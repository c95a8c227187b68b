"""Simulated probabilities of known truth, decided by the code that decides users' patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from lymphfeat.cohort.splits import Plan, Split, kfold_splits
from lymphfeat.evaluation.baselines import folds_of
from lymphfeat.evaluation.calibration import logit
from lymphfeat.evaluation.decision import (
    PREVALENCE,
    RULES,
    Decision,
    average,
    combine,
    cross_fit_decisions,
)
from lymphfeat.evaluation.metrics import balanced_accuracy, fold_auc, roc_auc
from lymphfeat.evaluation.regression import learn_logistic
from lymphfeat.evaluation.scores import PlannedPatients, Scores, measure
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.settings import HeadSettings

Values = dict[str, float]
SHARE = 2 / 3  # of tumoral patients


def make_labels(rng: np.random.Generator, n: int) -> Labels:
    """Return two thirds tumoral patients in any order: (n,)."""
    return rng.permutation((np.arange(n) < round(SHARE * n)).astype(np.int64))


def collect(study: Callable[[int], Values], studies: int) -> dict[str, Floats]:
    """Run studies and return each value's array (studies,)."""
    found = [study(seed) for seed in range(studies)]
    return {name: np.array([values[name] for values in found]) for name in found[0]}


def mean_and_error(values: Floats) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


# --- without any signal --------------------------------------------------------------------------


def decide_noise(seed: int, n: int, *, learnt: bool = False) -> Values:
    """Measure members' out-of-fold probabilities that know nothing of the labels.

    They are drawn, or `learnt`: logistic regressions on four columns of noise, each trained without
    a fold; these have seen the labels of the other folds, as members have. Values by the rule:
    cross-fitted, and `naive`, as if chosen and measured on the same patients; both kinds of AUC.
    """
    rng = np.random.default_rng(seed)
    labels, ids = make_labels(rng, n), [f"P{i}" for i in range(n)]
    (repeat,) = kfold_splits(ids, labels, folds=5, seeds=1, seed=seed)
    folds = folds_of(ids, repeat.outer)
    probabilities = expit(rng.normal(0.7, 1, n))
    if learnt:
        inputs = rng.normal(size=(n, 4))
        for fold in range(5):
            predict = learn_logistic(inputs[folds != fold], labels[folds != fold])
            probabilities[folds == fold] = predict(inputs[folds == fold])
    found = {
        "AUC within folds": float(fold_auc(probabilities, labels, folds)),
        "AUC pooled": float(roc_auc(probabilities, labels)),
    }
    for rule in RULES:
        decided = cross_fit_decisions(probabilities, labels, folds, rule=rule)
        found[rule] = float(balanced_accuracy(probabilities, labels, decided.threshold))
        kept = Decision.learn(probabilities, labels, rule=rule, sensitivities=())
        found[f"{rule}, naive"] = float(balanced_accuracy(probabilities, labels, kept.threshold))
    return found


def measure_noise(seed: int, n: int) -> Values:
    """Measure rows of `fit-head` that know nothing of the labels: by the rule."""
    rng = np.random.default_rng(seed)
    labels, ids = make_labels(rng, n), [f"P{i}" for i in range(n)]
    (repeat,) = kfold_splits(ids, labels, folds=5, seeds=1, seed=seed)
    patients = PlannedPatients(
        ids, labels, Plan.nested(repeat.outer, dict(zip(ids, labels, strict=True)))
    )
    outer, inner = patients.empty(), patients.empty()
    for place, (train, validation) in enumerate(
        zip(patients.train, patients.validation, strict=True)
    ):
        outer[place, validation] = expit(rng.normal(0.7, 1, len(validation)))
        inner[place, train] = expit(rng.normal(0.7, 1, len(train)))
    scores = Scores(name="noise", kind="head", outer=outer, inner=inner, fitted=inner)
    return {
        rule: float(measure(patients, scores, threshold=rule).runs["ba"].mean()) for rule in RULES
    }


# --- rules compared ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A study of `n` patients whose out-of-fold logits are those of a model that errs.

    Tumoral and reactive patients' scores are normal, `spread` times as wide for tumoral ones. The
    model's logits are calibrated ones (of equal spreads) times `slope`, plus `shift`.
    """

    n: int
    auc: float
    slope: float = 1
    shift: float = 0
    spread: float = 1

    @property
    def _distance(self) -> float:
        return float(np.sqrt(1 + self.spread**2) * norm.ppf(self.auc))

    @property
    def _steepness(self) -> float:
        return 2 * self._distance / (1 + self.spread**2)

    def draw(self, rng: np.random.Generator) -> tuple[Floats, Labels]:
        """Draw out-of-fold probabilities and labels: (n,), (n,)."""
        labels = make_labels(rng, self.n)
        z = rng.normal(size=self.n) * np.where(labels == 1, self.spread, 1)
        z += self._distance * (labels - 0.5)
        prior = np.log(SHARE / (1 - SHARE))
        return expit(self.slope * (self._steepness * z + prior) + self.shift), labels

    def true_ba(self, threshold: float) -> float:
        """Return the balanced accuracy of a threshold among all patients there could be."""
        at = (logit(np.array([threshold]))[0] - self.shift) / self.slope
        z = (at - np.log(SHARE / (1 - SHARE))) / self._steepness
        half = self._distance / 2
        return float(norm.sf((z - half) / self.spread) + norm.cdf(z + half)) / 2


def compare_rules(seed: int, situation: Situation, methods: Sequence[str]) -> Values:
    """Return the true balanced accuracy of each rule's threshold, learnt in one study.

    `prevalence` once for each calibration; besides the rules the `share` of tumoral patients that
    the calibrated (or raw) probability must exceed, literally.
    """
    probabilities, labels = situation.draw(np.random.default_rng(seed))
    found = {}
    for rule in RULES:
        for method in methods if rule == PREVALENCE else ("none",):
            decision = Decision.learn(
                probabilities, labels, rule=rule, method=method, sensitivities=()
            )
            name = f"{rule}, {method}" if rule == PREVALENCE else rule
            found[name] = situation.true_ba(decision.threshold)
            if rule == PREVALENCE:
                share = labels.mean(keepdims=True)
                calibration = decision.calibration
                at = share if calibration is None else calibration.undo(share)
                found[f"share, {method}"] = situation.true_ba(float(at[0]))
    return found


# --- a single model without folds ----------------------------------------------------------------

FRESH = 600
HEADS = tuple(
    resolve(HeadSettings(agg=agg, unit="image", lr=lr, k_train=k_train))
    for agg, k_train in (("mean", 1), ("top1", 1), ("topk", 1), ("topk", 10), ("bnsigmoid", 1))
    for lr in (0.003, 0.03)
)
EPOCHS = (3, 10, 40)


def make_features(seed: int, n: int, strength: float) -> tuple[Features, Labels]:
    """Make feature maps (1×1) of n patients and FRESH more; tumoral ones have odd images."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([make_labels(rng, n), make_labels(rng, FRESH)])
    sizes = rng.integers(8, 24, len(labels))
    patient = np.repeat(np.arange(len(labels)), sizes)
    maps = rng.normal(size=(len(patient), 24))
    witness = (labels[patient] == 1) & (rng.random(len(patient)) < 0.3)
    maps[:, 0] += strength * witness
    maps += 0.3 * rng.normal(size=(len(labels), 24))[patient]  # what is the patient's own
    pooled = np.maximum(maps + 0.5, 0).astype(np.float16)  # (N, C)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    ids = [f"P{i}" for i in range(len(labels))]
    features = Features(pooled[..., None, None], pooled.astype(np.float32), offsets, ids, labels)
    return features, labels


def compare_single(seed: int, n: int, strength: float) -> dict[str, Values]:
    """Return the balanced accuracy on fresh patients of heads fitted on n, by head and epoch.

    Thresholds: .5; the share of tumoral patients; `Decision.of_fitted`; the best on the patients
    fitted; and `prevalence` out of fold, which needs five more models.
    """
    features, labels = make_features(seed, n, strength)
    ids = list(features.row)
    whole = Split(id="all", seed=seed, repeat=0, train=tuple(ids[:n]), validation=tuple(ids[n:]))
    (repeat,) = kfold_splits(ids[:n], labels[:n], folds=5, seeds=1, seed=seed)
    folds = folds_of(ids[:n], repeat.outer)
    splits = [whole, *repeat.outer]
    fits = [Fit(head=head, split=split) for head in HEADS for split in splits]
    fitted = fit_stacked(features, fits, epochs=max(EPOCHS), sampling=Sampling(batch_size=16))
    curves = fitted.curves.astype(np.float64).reshape(len(HEADS), len(splits), max(EPOCHS), -1)
    found = {}
    for head, curve in zip(HEADS, curves, strict=True):
        for epoch in EPOCHS:
            seen, fresh = np.split(curve[0, epoch - 1], [n])
            unseen = curve[1:, epoch - 1, :n][folds, np.arange(n)]  # (n,) each by its fold's model
            thresholds = {
                ".5": 0.5,
                "share of tumoral": float(labels[:n].mean()),
                "mean as fitted": Decision.of_fitted(seen).threshold,
                "best-ba as fitted": Decision.learn(seen, labels[:n], rule="best-ba").threshold,
                "prevalence out of fold": Decision.learn(unseen, labels[:n]).threshold,
            }
            found[f"{head_name(head)} epoch {epoch}"] = {
                name: float(balanced_accuracy(fresh, labels[n:], at))
                for name, at in thresholds.items()
            }
    return found


# --- several models ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Five members that agree up to noise, each too sure of itself by `slope`."""

    n: int
    auc: float = 0.9  # of a single member
    slope: float = 2
    noise: float = 0.5  # share of a member's variance within a class that is its own
    shift: float = 0
    models: int = 5

    def draw(self, rng: np.random.Generator, labels: Labels, models: int) -> NDArray[np.float64]:
        """Draw the probabilities that members give the same patients: (models, P)."""
        common = np.sqrt(1 - self.noise) * rng.normal(size=len(labels))
        own = np.sqrt(self.noise) * rng.normal(size=(models, len(labels)))
        distance = np.sqrt(2) * norm.ppf(self.auc)
        logits = distance * (common + own + distance * (labels - 0.5))
        return np.asarray(expit(self.slope * (logits + np.log(SHARE / (1 - SHARE))) + self.shift))


def decide_ensemble(seed: int, ensemble: Ensemble, rule: str, fresh: int = 2000) -> Values:
    """Decide fresh patients by members whose threshold was found on single members' probabilities.

    `new`: the mean of calibrated logits, at the threshold on that scale; `old`: the mean of
    probabilities, at the single members' threshold. Shares of fresh patients called tumoral,
    balanced accuracies, sensitivities at the operating point of .95; and what the mean of
    probabilities is where the mean of logits is at the threshold (`at`), beside that threshold.
    """
    rng = np.random.default_rng(seed)
    labels, new = make_labels(rng, ensemble.n), make_labels(rng, fresh)
    unseen = ensemble.draw(rng, labels, 1)[0]
    decision = Decision.learn(unseen, labels, rule=rule)
    members = ensemble.draw(rng, new, ensemble.models)
    decisions = [decision] * ensemble.models
    found: Values = {}
    mean, averaged = members.mean(0), average(decisions, members)
    for name, at in (("", decision), ("95 ", decision.at_sensitivity(0.95))):
        combined = combine([at] * ensemble.models).threshold
        for kind, values, threshold in (
            ("new", averaged, combined),
            ("old", mean, at.threshold),
        ):
            called = values > threshold
            found[f"{name}ba {kind}"] = float(balanced_accuracy(values, new, threshold))
            found[f"{name}called {kind}"] = float(called.mean())
            found[f"{name}sensitivity {kind}"] = float(called[new == 1].mean())
    near = np.argsort(np.abs(logit(averaged) - logit(np.array([combine(decisions).threshold]))))
    found["threshold"] = decision.threshold
    found["mean probability at it"] = float(mean[near[:20]].mean())
    return found
