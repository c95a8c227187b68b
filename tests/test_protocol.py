"""Protocols: what is measured on whom, checked against direct computation on the curves."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lymphfeat.cohort.splits import Plan, Split, kfold_splits
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.evaluation.decision import RULES, Decision
from lymphfeat.evaluation.intervals import estimate, t_half_width
from lymphfeat.evaluation.metrics import METRICS, balanced_accuracy, log_loss
from lymphfeat.evaluation.protocol import Outcome, run_protocol, witness_aucs
from lymphfeat.evaluation.providers import (
    FeatureProvider,
    JoinedFeatures,
    SharedFeatures,
    SplitFeatures,
)
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.settings import FitSettings, HeadSettings, ProtocolName, ThresholdRule

PATIENTS = 30
HEADS = [
    resolve(HeadSettings(agg="mean", lr=0.1)),
    resolve(HeadSettings(agg="topk", k_agg=2, lr=0.1)),
]


@pytest.fixture(scope="module")
def features() -> Features:
    """Tumoral patients carry an image with a high first channel; the last three have no label."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 6, PATIENTS)
    labels = np.array([0, 1] * (PATIENTS // 2), np.int64)
    maps = rng.normal(size=(sizes.sum(), 4, 1, 1))
    offsets = np.concatenate([[0], sizes.cumsum()])
    maps[offsets[:-1][labels == 1], 0] += 5
    labels[-3:] = -1
    return Features(
        maps.astype(np.float16),
        maps[..., 0, 0].astype(np.float16).astype(np.float32),
        offsets,
        [f"P{i}" for i in range(PATIENTS)],
        labels,
    )


def run(features: Features, protocol: ProtocolName, **changes: Any) -> Outcome:
    provider = SharedFeatures.of(features)
    changes = {"folds": 3, "epochs": 12, **changes}
    settings = FitSettings(protocol=protocol, batch_size=4, **changes)
    return run_protocol(provider, provider.plan(settings), HEADS, settings)


def test_report_protocol_averages_the_ten_best_epochs_of_each_run(features: Features) -> None:
    outcome = run(features, "report", seeds=3)
    labels = features.labels.numpy()
    for head, row in enumerate(("mean", "top2")):
        figures = []
        for i, split in enumerate(outcome.splits):
            rows = features.rows_of(split.validation)
            curves = outcome.fitted.curves[head * 3 + i][:, rows].astype(float)
            scores = [float(balanced_accuracy(curve, labels[rows])) for curve in curves]
            figures.append(np.mean(sorted(scores)[-10:]))
        found = outcome.summary.set_index("head").loc[_name(outcome, row)]
        assert found["ba"] == pytest.approx(np.mean(figures))
        assert found["ba_oracle"] >= found["ba"] - 1e-9
        own = outcome.runs[outcome.runs["head"] == _name(outcome, row)]
        ratio = Plan.flat(outcome.splits).test_to_train
        corrected = estimate(own["ba"].to_numpy(float), ratio, bounds=(0, 1))
        assert found["ba_half_width"] == pytest.approx(corrected.half_width)
        assert (found["ba_low"], found["ba_high"]) == (corrected.low, corrected.high)
        assert found["ba_half_width_published"] < found["ba_half_width_uncorrected"]
        assert found["ba_half_width_uncorrected"] == pytest.approx(
            t_half_width(own["ba"].to_numpy(float))
        )
        assert found["ba_half_width"] > 1.9 * found["ba_half_width_uncorrected"]
        oracle = estimate(own["ba_oracle"].to_numpy(float), ratio, bounds=(0, 1))
        assert found["ba_oracle_low"] == oracle.low
        last = outcome.epochs[outcome.epochs["epoch"] == 12]
        assert found["auc_last"] == pytest.approx(
            last.loc[last["head"] == found.name, "auc"].mean()
        )


def _name(outcome: Outcome, start: str) -> str:
    return next(str(name) for name in outcome.summary["head"] if str(name).startswith(start))


@pytest.mark.seconds
@pytest.mark.parametrize("rule", RULES)
def test_honest_thresholds_come_from_training_patients_alone(
    features: Features, rule: ThresholdRule
) -> None:
    outcome = run(features, "honest", seeds=2, folds=3, threshold=rule)
    labels = features.labels.numpy()
    ids = [patient for patient, label in zip(features.row, labels, strict=True) if label >= 0]
    repeats = kfold_splits(ids, labels[labels >= 0], folds=3, seeds=2)
    repeat, fold = repeats[1], 2
    outer = repeat.outer[fold]
    probabilities, truth = [], []
    for split in repeat.inner(fold):
        fit = fit_stacked(
            features, [Fit(head=HEADS[0], split=split)], epochs=12, sampling=Sampling(batch_size=4)
        )
        rows = [features.row[p] for p in split.validation if p not in outer.validation]
        probabilities += fit.curves[0, -1, rows].tolist()
        truth += labels[rows].tolist()
    expected = Decision.learn(np.array(probabilities), np.array(truth), rule=rule).threshold
    runs = outcome.runs.set_index(["head", "split"])
    found = runs.loc[(_name(outcome, "mean"), outer.id), "threshold"]
    assert found == pytest.approx(expected, abs=1e-4)


def test_predictions_hold_every_labelled_patient_once_a_repeat(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
    heads = outcome.predictions[outcome.predictions["kind"] == "head"]
    counts = heads.groupby(["head", "patient"]).size()
    assert (counts == 2).all()
    assert len(counts) == 2 * (PATIENTS - 3)
    assert not set(outcome.predictions["patient"]) & {"P27", "P28", "P29"}


def test_every_epoch_of_every_fit_is_kept(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
    assert len(outcome.epochs) == 2 * 6 * 12
    assert outcome.epochs[["ba", "auc", "loss"]].notna().all().all()


def test_easy_cohort_is_learnt_and_witnesses_found(features: Features) -> None:
    outcome = run(features, "honest", seeds=2, folds=3)
    assert outcome.summary["auc"].max() > 0.9
    witness = np.zeros(features.offsets[-1], bool)
    starts = features.offsets[:-1][features.labels.numpy() == 1]
    witness[starts] = True
    aucs = witness_aucs(outcome, SharedFeatures.of(features), witness)
    assert set(aucs) == {_name(outcome, "mean"), _name(outcome, "top2")}
    assert max(aucs.values()) > 0.95
    assert min(aucs.values()) > 0.8


def test_witnesses_are_found_by_heads_of_several_stores(features: Features) -> None:
    heads = [
        resolve(HeadSettings(agg=agg, unit=unit))
        for agg in ("std", "mean@2+std@1")
        for unit in ("image", "pixel")
    ]
    provider = JoinedFeatures.of([SharedFeatures.of(features)] * 2)
    settings = FitSettings(protocol="honest", batch_size=4, seeds=1, folds=3)
    outcome = run_protocol(provider, provider.plan(settings), heads, settings)
    witness = np.zeros(features.offsets[-1], bool)
    witness[features.offsets[:-1][features.labels.numpy() == 1]] = True
    aucs = witness_aucs(outcome, provider, witness)
    std, std_of_pixels, both, both_of_pixels = (aucs[head_name(head)] for head in heads)
    assert both > 0.9
    assert (std, both) == (std_of_pixels, both_of_pixels)  # images have one pixel here


def test_nested_epoch_is_the_best_inside_the_training_patients(features: Features) -> None:
    outcome = run(features, "honest", seeds=1, epochs=6, epoch="nested")
    labels = features.labels.numpy()
    ids = [patient for patient, label in zip(features.row, labels, strict=True) if label >= 0]
    (repeat,) = kfold_splits(ids, labels[labels >= 0], folds=3, seeds=1)
    inner = [Fit(head=HEADS[0], split=split) for split in repeat.inner(1)]
    fitted = fit_stacked(features, inner, epochs=6, sampling=Sampling(batch_size=4))
    probabilities, truth = [], []
    for i, split in enumerate(repeat.inner(1)):
        rows = features.rows_of([p for p in split.validation if p in repeat.outer[1].train])
        probabilities.append(fitted.curves[i][:, rows].astype(float))
        truth.append(labels[rows])
    losses = log_loss(np.concatenate(probabilities, axis=1), np.concatenate(truth))
    runs = outcome.runs.set_index(["head", "split"])
    assert (
        runs.loc[(_name(outcome, "mean"), "kfold3-r0-f1"), "chosen"]
        == f"epoch {losses.argmin() + 1}"
    )


# --- splits of one's own -------------------------------------------------------------------------

KNOWN = [f"P{i}" for i in range(PATIENTS - 3)]
DOTTED = [
    Split(id="a", seed=0, repeat=0, train=tuple(KNOWN[:15]), validation=tuple(KNOWN[15:])),
    Split(id="a.1", seed=1, repeat=1, train=tuple(KNOWN[15:]), validation=tuple(KNOWN[:15])),
]


def run_on(features: FeatureProvider, splits: list[Split] | None, **changes: Any) -> Outcome:
    settings = FitSettings(epochs=12, batch_size=4, folds=3, **changes)
    return run_protocol(features, features.plan(settings, splits), HEADS[:1], settings)


def split_features(features: Features, splits: list[Split]) -> SplitFeatures:
    """Give each split the same features, as if they were its own."""
    shared = SharedFeatures.of(features)
    return SplitFeatures(
        ids=shared.ids,
        labels=shared.labels,
        n_images=shared.n_images,
        splits=splits,
        read=lambda _: features,
    )


def test_every_split_of_a_file_is_measured_whatever_its_name(features: Features) -> None:
    shared = SharedFeatures.of(features)
    both = run_on(shared, DOTTED)
    for split in DOTTED:
        alone = run_on(shared, [split]).runs
        found = both.runs[both.runs["split"] == split.id].set_index("head")
        assert len(found) == len(alone)
        for name in METRICS:
            expected = alone.set_index("head")[name]
            np.testing.assert_allclose(found[name], expected.loc[found.index], atol=1e-5)


def test_every_split_with_features_of_its_own_is_measured(features: Features) -> None:
    own = split_features(features, DOTTED)
    outcome = run_on(own, DOTTED[1:])
    assert [split.id for split in outcome.splits] == ["a.1"]
    assert own.plan(FitSettings()) == Plan.flat(DOTTED)


def test_each_split_reads_its_own_features(features: Features) -> None:
    """The second split's are without signal: only its heads are no better than chance."""
    read: list[str] = []
    mixed = Features(
        np.zeros((*features.images.shape, 1, 1), np.float16),
        np.zeros(features.images.shape, np.float32),
        features.offsets,
        list(features.row),
        features.labels.numpy(),
    )

    def read_own(name: str) -> Features:
        read.append(name)
        return {"a": features, "a.1": mixed}[name]

    own = replace(split_features(features, DOTTED), read=read_own)
    outcome = run_on(own, None)
    assert read == ["a", "a.1"]
    auc = outcome.runs[outcome.runs["kind"] == "head"].set_index("split")["auc"]
    assert auc["a"] > 0.8
    assert auc["a.1"] == 0.5
    same = run_on(SharedFeatures.of(features), DOTTED).runs
    expected = same[(same["kind"] == "head") & (same["split"] == "a")]["auc"].item()
    assert auc["a"] == pytest.approx(expected)


def test_what_cannot_be_learnt_is_refused_before_anything_is_fitted(features: Features) -> None:
    def read(name: str) -> Features:
        raise AssertionError(f"{name} was read")

    own = replace(split_features(features, DOTTED), read=read)
    for changes, message in (
        ({"epoch": "nested"}, "epoch .*nested. must be chosen on out-of-fold"),
        ({"threshold": "best-ba"}, "threshold .*best-ba. must be chosen on out-of-fold"),
        ({"fusions": ("late",)}, "fusion requires clinical attributes"),
    ):
        with pytest.raises(SettingsError, match=message):
            run_on(own, None, **changes)


def test_without_backbones_inside_a_training_set_nothing_is_chosen_and_that_is_said(
    features: Features,
) -> None:
    shared = SharedFeatures.of(features)
    own = split_features(features, DOTTED)
    outcome = run_on(own, DOTTED)
    assert outcome.thresholds == "prevalence, from training patients as fitted"
    assert outcome.warnings[0].startswith("thresholds do not come from out-of-fold probabilities")
    with pytest.raises(
        SettingsError, match=r"epoch \(=nested\) must be chosen on out-of-fold .*inner"
    ):
        run_on(own, DOTTED, epoch="nested")
    inner = Plan.nested(DOTTED, dict(zip(shared.ids, shared.labels.tolist(), strict=True)), folds=3)
    nested = run_on(split_features(features, [*DOTTED, *inner.inner_once]), DOTTED, epoch="nested")
    assert nested.thresholds == "prevalence, from training patients out of fold"
    assert not nested.warnings or "thresholds" not in nested.warnings[0]
    same = run_on(shared, DOTTED, epoch="nested")
    heads = [each.runs.loc[each.runs["kind"] == "head"] for each in (nested, same)]
    assert heads[0]["chosen"].tolist() == heads[1]["chosen"].tolist()
    np.testing.assert_allclose(heads[0]["threshold"], heads[1]["threshold"], atol=1e-5)


def test_one_class_splits_are_refused_wherever_they_come_from(features: Features) -> None:
    odd = Split(id="odd", seed=0, repeat=0, train=tuple(KNOWN[:20]), validation=("P21", "P23"))
    for given in (SharedFeatures.of(features), split_features(features, [odd])):
        with pytest.raises(
            SettingsError, match="validation patients of split odd must include both"
        ):
            run_on(given, [odd])


def test_splits_without_backbones_of_their_own_are_refused(features: Features) -> None:
    own = split_features(features, DOTTED[:1])
    with pytest.raises(LeakageError, match=r"split a.1: no backbone .* backbones for a\."):
        run_on(own, DOTTED)
    everyone = Split(id="all", seed=0, repeat=0, train=tuple(KNOWN), validation=())
    with pytest.raises(LeakageError, match="fine-tuned on all labelled patients"):
        run_on(split_features(features, [everyone]), None)


def test_halves_of_a_rare_class_are_measured_without_nan(features: Features) -> None:
    """Two reactive patients: half of all seeds would leave one side without any."""
    labels = np.ones(PATIENTS, np.int64)
    labels[[3, 11]] = 0
    rare = replace(SharedFeatures.of(features), labels=labels)
    outcome = run_on(rare, None, protocol="report", seeds=6)
    assert outcome.runs[list(METRICS)].notna().all(axis=None)
    assert [split.seed for split in outcome.splits] != list(range(6))


def test_epochs_that_are_never_looked_at_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"evaluate_every \(=3\) must be at most epochs \(=2\)"):
        FitSettings(epochs=2, evaluate_every=3)
