"""The optimism of the report's protocol, and its interval."""

from pathlib import Path

import numpy as np
import pytest

from lymphfeat.evaluation.metrics import balanced_accuracy
from lymphfeat.evaluation.optimism import Calls, honest_calls, mean_accuracy, report_calls
from lymphfeat.evaluation.protocol import run_protocol
from lymphfeat.evaluation.providers import SharedFeatures
from lymphfeat.fitting import Run, bootstrap_optimism, set_off
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.settings import FitSettings, HeadSettings
from tests.simulations import noise_features

HEAD = resolve(HeadSettings(agg="mean", lr=0.3))
LABELS = np.array([0, 1, 1] * 12)


def run(features: Features, protocol: str, **changes: int) -> Run:
    settings = FitSettings(protocol=protocol, epochs=15, folds=3, threads=1, **changes)  # type: ignore[arg-type]
    provider = SharedFeatures.of(features)
    outcome = run_protocol(provider, provider.plan(settings), [HEAD], settings)
    return Run(folder=Path(), settings=settings, outcome=outcome)


@pytest.fixture(scope="module")
def both() -> tuple[Run, Run]:
    features = noise_features(0, np.full(len(LABELS), 3), LABELS)
    return run(features, "report", seeds=4), run(features, "honest", seeds=2)


def slow_accuracy(calls: Calls, drawn: list[int]) -> float:
    """Repeat the drawn patients one by one, and choose epochs and thresholds on them."""
    place = {row: i for i, row in enumerate(calls.rows.tolist())}
    own = [place[row] for row in drawn if row in place]
    labels = calls.labels[own]
    if set(labels.tolist()) != {0, 1}:
        return float("nan")
    best = [
        max(float(balanced_accuracy(at[own].astype(float), labels)) for at in epoch)
        for epoch in calls.tumoral
    ]
    return float(np.mean(sorted(best)[-10:]))


def test_mean_accuracy_is_that_of_repeated_patients() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20)
    rows = [np.sort(rng.choice(20, 8, replace=False)) for _ in range(3)]
    calls = [
        Calls(labels=labels[own], rows=own, tumoral=rng.uniform(size=(12, 3, 8)) < 0.5)
        for own in rows
    ]
    counts = rng.multinomial(20, np.full(20, 1 / 20), 40).astype(float)
    splits = rng.multinomial(3, np.full(3, 1 / 3), 40).astype(float)
    found = mean_accuracy(calls, counts, splits)
    lacking = 0
    for draw in range(40):
        drawn = np.repeat(np.arange(20), counts[draw].astype(int)).tolist()
        values = np.array([slow_accuracy(each, drawn) for each in calls])
        values = np.repeat(values, splits[draw].astype(int))
        lacking += np.isnan(values).any()
        expected = np.nanmean(values) if np.isfinite(values).any() else np.nan
        assert found[draw] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert lacking  # the test has seen draws without a class


@pytest.mark.parametrize("oracle", [False, True])
def test_every_patient_once_gives_the_printed_figures(both: tuple[Run, Run], oracle: bool) -> None:
    report, honest = both
    name, once = head_name(HEAD), np.ones((1, len(LABELS)))
    rows = [run.outcome.summary.set_index("head").loc[name] for run in both]
    found = mean_accuracy(
        report_calls(report.outcome, name, every=report.settings.evaluate_every, oracle=oracle),
        once,
    )
    assert found[0] == pytest.approx(rows[0]["ba_oracle" if oracle else "ba"], abs=1e-6)
    assert mean_accuracy(honest_calls(honest.outcome, name), once)[0] == pytest.approx(
        rows[1]["ba"]
    )


def test_the_interval_is_about_the_printed_difference(both: tuple[Run, Run]) -> None:
    name = head_name(HEAD)
    row = set_off(*both).set_index("head").loc[name]
    report, honest = (run.outcome.summary.set_index("head").loc[name] for run in both)
    assert row["optimism"] == pytest.approx(report["ba"] - honest["ba"])
    middle = (row["optimism_low"] + row["optimism_high"]) / 2
    assert middle == pytest.approx(row["optimism"], abs=0.03)
    assert row["by_epochs"] == pytest.approx(report["ba"] - report["ba_last"])


def test_a_protocol_against_itself_differs_by_the_halves_alone(both: tuple[Run, Run]) -> None:
    """The same patients are drawn for both: majority is .5 whoever is drawn."""
    report, honest = both
    assert bootstrap_optimism(report, honest, "majority") == (0, 0)
    name = head_name(HEAD)
    wide = bootstrap_optimism(report, honest, name)
    assert -1 <= wide[0] < wide[1] <= 1
    assert bootstrap_optimism(report, honest, name) == wide  # the draws are those of the seed
