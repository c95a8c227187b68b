"""A model is fitted to another laboratory: its ranking stays, its probabilities become right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import kfold_splits
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.evaluation.calibration import Calibration, fit_calibrations
from lymphfeat.evaluation.decision import Decision
from lymphfeat.extraction import extract
from lymphfeat.features.store import FeatureStore
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import AnyModel, load_model
from lymphfeat.recalibration import recalibrate
from lymphfeat.settings import ExtractSettings, FitSettings, PredictSettings, RecalibrateSettings
from lymphfeat.training import train
from lymphfeat_cli.main import cli
from tests.tiny import BACKBONE, tiny_settings, write_red_cohort

ON_CPU = PredictSettings(device="cpu", precision="float32", threads=1)
KINDS = ("one", "members", "final", "final members")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two laboratories' cohorts, and a model of each kind of the first's."""
    root = tmp_path_factory.mktemp("recalibration")
    for name, seed, labels in (("here", 0, "0101010101??"), ("there", 7, "0001" * 10 + "?")):
        write_red_cohort(root / name, labels, seed=seed, prefix=name[0].upper())
        table = pd.read_csv(root / name / "cohort.csv", dtype=str)
        table["age"] = np.random.default_rng(seed).integers(30, 90, len(table))
        table.to_csv(root / name / "cohort.csv", index=False)
    here = Cohort.load(root / "here")
    train(here, root / "one", tiny_settings())
    train(here, root / "members", tiny_settings(), folds=2)
    recipe = ExtractSettings(backbone=BACKBONE, precision="float32", device="cpu", threads=1)
    for name in ("here", "there"):
        extract(Cohort.load(root / name), root / f"{name}.h5", recipe)
    fit = FitSettings(seeds=1, folds=3, fusions=("late",), threads=1)
    fit_heads(root / "here.h5", agg="mean+std", settings=fit, out=root / "run")
    row = "mean+std + clinical (late)"
    finalize(root / "run", root / "final", row=row)
    finalize(root / "run", root / "final members", row=row, members=True)
    return root


@pytest.fixture(scope="module")
def there(home: Path) -> Cohort:
    return Cohort.load(home / "there")


def calibrated_by(model: AnyModel, cohort: Cohort) -> pd.DataFrame:
    patients = model.predict(cohort, ON_CPU).patients.set_index("id")
    return patients.assign(q=model.decision.calibrate(patients["probability"].to_numpy(float)))


@pytest.mark.seconds
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_a_calibration_on_top(
    kind: str, home: Path, there: Cohort, tmp_path: Path
) -> None:
    found = recalibrate(home / kind, there, tmp_path / "new", scoring=ON_CPU)
    before = calibrated_by(load_model(home / kind), there)
    after = calibrated_by(load_model(tmp_path / "new"), there)
    known = before["label"].notna()
    labels = before.loc[known, "label"].to_numpy(np.int64)
    q = before.loc[known, "probability"].to_numpy(float)
    (expected,) = fit_calibrations(q[None], labels)
    np.testing.assert_allclose(after.loc[known, "q"], expected.apply(q), atol=1e-5)
    threshold = Decision.learn(q, labels).threshold
    assert (after["predicted"] == (before["probability"] > threshold)).all()
    assert found.prevalence == pytest.approx(labels.mean())
    assert (after.loc[known, "seen"] == "label").all()
    assert (after.loc[~known, "seen"] == "no").all()


@pytest.mark.seconds
def test_each_fold_is_measured_as_the_others_decide(
    home: Path, there: Cohort, tmp_path: Path
) -> None:
    found = recalibrate(home / "final", there, tmp_path / "new", scoring=ON_CPU)
    judged = calibrated_by(load_model(home / "final"), there.labelled())
    labels, q = judged["label"].to_numpy(np.int64), judged["q"].to_numpy(float)
    calibrated, predicted = np.empty(len(q)), np.empty(len(q), int)
    (repeat,) = kfold_splits(list(judged.index), labels, folds=5, seeds=1, seed=0)
    for split in repeat.outer:
        own = judged.index.isin(list(split.validation))
        decision = Decision.learn(q[~own], labels[~own])
        calibrated[own] = decision.calibrate(q[own])
        predicted[own] = q[own] > decision.threshold
    sensitivity = predicted[labels == 1].mean()
    assert found.after["sensitivity"] == pytest.approx(sensitivity)
    log_loss = -np.mean(np.where(labels == 1, np.log(calibrated), np.log1p(-calibrated)))
    assert found.after["log_loss"] == pytest.approx(log_loss)
    assert found.before["sensitivity"] == judged.loc[labels == 1, "predicted"].mean()
    model = load_model(tmp_path / "new")
    assert isinstance(model, FinalModel)
    assert model.held_out["row"].rates[""].sensitivity == pytest.approx(sensitivity)
    assert model.held_out["row"].scheme == "recalibrated"
    assert "Split conformal".lower() in model.guarantee
    saved = json.loads((tmp_path / "new" / "recalibration.json").read_text())
    assert saved["after"] == found.after


@pytest.mark.seconds
def test_a_prevalence_moves_probabilities_but_no_decision(
    home: Path, there: Cohort, tmp_path: Path
) -> None:
    plain = recalibrate(home / "final", there, tmp_path / "plain", scoring=ON_CPU)
    rare = RecalibrateSettings(prevalence=0.05)
    moved = recalibrate(home / "final", there, tmp_path / "rare", rare, scoring=ON_CPU)
    a, b = (calibrated_by(each.model, there) for each in (plain, moved))
    np.testing.assert_allclose(
        logit(b["q"]) - logit(a["q"]), logit(0.05) - logit(plain.prevalence), atol=1e-5
    )
    assert (a["predicted"] == b["predicted"]).all()
    with pytest.raises(SettingsError, match=r"prevalence \(=1\.0\) must lie in"):
        RecalibrateSettings(prevalence=1.0)


@pytest.mark.seconds
def test_shares_still_add_up_and_a_store_gives_the_same(
    home: Path, there: Cohort, tmp_path: Path
) -> None:
    by_images = recalibrate(home / "final members", there, tmp_path / "images", scoring=ON_CPU)
    store = FeatureStore.open(home / "there.h5")
    by_store = recalibrate(home / "final members", store, tmp_path / "store", scoring=ON_CPU)
    patients = by_images.model.predict(there, ON_CPU).patients
    parts = patients.filter(like="from_").sum(axis=1) + patients["rest"]
    np.testing.assert_allclose(expit(parts), patients["probability"], atol=1e-6)
    assert by_store.model.threshold == pytest.approx(by_images.model.threshold, abs=0.02)
    alone = by_images.model
    assert isinstance(alone, FinalModel)
    without = alone.without_attributes().predict(there, ON_CPU).patients
    np.testing.assert_allclose(without["probability"], patients["without_attributes"], atol=1e-9)


@pytest.mark.seconds
def test_what_cannot_be_recalibrated_is_refused(home: Path, there: Cohort, tmp_path: Path) -> None:
    def refused(kind: Any, message: str, model: str, cohort: Any) -> None:
        with pytest.raises(kind, match=message):
            recalibrate(home / model, cohort, tmp_path / "no", scoring=ON_CPU)
        assert not (tmp_path / "no").exists()

    here = Cohort.load(home / "here")
    refused(CohortError, "it was on H0, H1, H2, H3, H4 and others. Leave them out", "final", here)
    few = there.select(there.ids[:12])
    refused(CohortError, "at least 5 .* of each class .*; got 9 reactive and 3 tum", "one", few)
    store = FeatureStore.open(home / "there.h5")
    refused(SettingsError, "must go with a model of `lymphfeat finalize`", "members", store)


@pytest.mark.seconds
def test_from_the_command_line(home: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> str:
        found = CliRunner().invoke(cli, [str(each) for each in arguments])
        assert found.exit_code == 0, found.output
        return found.output

    common = ("--model", home / "final", "--precision", "float32", "--device", "cpu")
    out = tmp_path / "new"
    said = run("recalibrate", *common, "--cohort", home / "there", "--out", out)
    assert "after, by the other folds" in said
    assert "on 40 patients that it was recalibrated on" in said
    again = run("recalibrate", *common, "--store", home / "there.h5", "--out", out, "--force")
    assert "40 patients" in again
    sure = ("--store", home / "there.h5", "--abstain", "--alpha", "0.2")
    said = run("predict", "--model", out, *common[2:], *sure, "--out", tmp_path / "p.csv")
    assert "They are split conformal" in said.replace("\n", " ")


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["members", "final"])
def test_again_is_as_if_for_the_first_time(
    kind: str, home: Path, there: Cohort, tmp_path: Path
) -> None:
    first, second = (there.select(ids) for ids in _halves(there))
    once = recalibrate(home / kind, first, tmp_path / "once", scoring=ON_CPU)
    with pytest.raises(CohortError, match="Leave them out"):
        recalibrate(tmp_path / "once", there, tmp_path / "no", scoring=ON_CPU)
    twice = recalibrate(tmp_path / "once", second, tmp_path / "twice", scoring=ON_CPU)
    fresh = recalibrate(home / kind, second, tmp_path / "fresh", scoring=ON_CPU)
    assert twice.after == fresh.after
    assert twice.before != fresh.before
    found, expected = (calibrated_by(each.model, there) for each in (twice, fresh))
    np.testing.assert_allclose(found["q"], expected["q"])
    assert (found["seen"] == "label").sum() == 40
    assert (expected["seen"] == "label").sum() == 20
    for sensitivity in (0.8, 0.99):
        a, b = (each.model.at_sensitivity(sensitivity).threshold for each in (twice, fresh))
        assert a == b
    assert once.prevalence == 0.25


def _halves(cohort: Cohort) -> tuple[list[str], list[str]]:
    """Return the ids of two halves of the labelled patients with as many tumoral ones."""
    known = [id for id, label in zip(cohort.ids, cohort.labels, strict=True) if label >= 0]
    return known[:20], known[20:]


@given(st.floats(0.1, 5), st.floats(-3, 3), st.floats(0.01, 0.99))
def test_a_decision_about_what_it_calibrated(
    slope: float, intercept: float, threshold: float
) -> None:
    decision = Decision(
        threshold=threshold,
        calibration=Calibration(slope=slope, intercept=intercept),
        operating_points={"0.9": 1.0, "0.8": -1e-9},
    )
    about = decision.about_calibrated()
    p = expit(np.linspace(-3, 3, 41))
    clear = np.abs(p - threshold) > 1e-6
    found = decision.calibrate(p) > about.threshold
    np.testing.assert_array_equal(found[clear], (p > threshold)[clear])
    np.testing.assert_allclose(about.calibrate(p), p)
    assert about.operating_points == {"0.9": 1.0, "0.8": -1e-9}  # nobody, everybody
