"""Simulated cohorts with known truth: what the figures claim is so (METHOD §4)."""

import numpy as np
import pytest

from lymphfeat.evaluation.protocol import Outcome, run_protocol
from lymphfeat.evaluation.providers import SharedFeatures
from lymphfeat.heads.engine.instances import Features
from lymphfeat.settings import FitSettings, HeadSettings, ProtocolName
from tests.simulations import coverage, noise_features, run_optimism_study, run_study

pytestmark = pytest.mark.slow

HEADS = [HeadSettings(agg="top1", unit="image", k_agg=1, lr=0.03)]
LABELS = np.array([0, 1, 1] * 20)


def test_intervals_cover_the_truth() -> None:
    """At least 92 % of 200 studies, of one figure and of a paired difference."""
    found = coverage([run_study(seed) for seed in range(200)])
    assert found.ours >= 0.92
    assert found.difference >= 0.92
    assert found.naive < found.ours  # splits are not independent


def test_the_interval_of_the_optimism_covers_it() -> None:
    """At least 95 % of 200 studies, by an interval that is not needlessly wide."""
    studies = [run_optimism_study(seed) for seed in range(200)]
    true = float(np.mean([study.optimism for study in studies]))
    assert true > 0.01
    assert np.mean([study.low <= true <= study.high for study in studies]) >= 0.95
    widths = [study.high - study.low for study in studies]
    assert np.mean(widths) < 5 * np.std([study.optimism for study in studies])  # 3.9 at best


def run(features: Features, protocol: ProtocolName) -> Outcome:
    settings = FitSettings(protocol=protocol, seeds=4, epochs=30, threads=1)
    provider = SharedFeatures.of(features)
    return run_protocol(provider, provider.plan(settings), HEADS, settings)


def test_without_signal_honest_is_chance_and_report_is_not() -> None:
    features = noise_features(0, np.full(60, 5), LABELS)
    honest = run(features, "honest").summary.iloc[0]
    report = run(features, "report").summary.iloc[0]
    assert abs(honest["ba"] - 0.5) <= honest["ba_half_width"]
    assert report["ba"] > 0.54
    assert report["ba"] > honest["ba"] + 0.03
    assert report["ba_last"] == pytest.approx(0.5, abs=0.06)  # of the same runs


def test_bag_size_as_the_only_signal_is_warned_of() -> None:
    rng = np.random.default_rng(1)
    sizes = np.where(LABELS == 1, 9, 4) + rng.integers(0, 4, len(LABELS))
    outcome = run(noise_features(2, sizes, LABELS), "honest")
    assert outcome.summary.set_index("head")["auc"]["bag size"] > 0.95
    assert outcome.summary.iloc[0]["auc"] > 0.55  # a maximum over more images is higher
    (warning,) = outcome.warnings
    assert warning.startswith("top1 lr=0.03: does not beat bag size alone (AUC ")
