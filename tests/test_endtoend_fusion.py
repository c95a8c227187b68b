"""Members of a k-fold fused with the clinical attributes: what is learnt from whom, and kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.calibration import logit
from lymphfeat.evaluation.decision import Decision
from lymphfeat.evaluation.fusion import FUSIONS, cross_fit_fusion
from lymphfeat.explanation.explanation import explain
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import load_model
from lymphfeat.runtime.arrays import Floats
from lymphfeat.settings import EndToEndSettings, ExplainSettings, HeadSettings, PredictSettings
from lymphfeat.training import train
from lymphfeat_cli.endtoend import warn_of_attributes
from lymphfeat_cli.main import cli
from tests.folders import contents
from tests.tiny import SIDE, tiny_settings, write_red_cohort

FOLDS = 3
SETTINGS = tiny_settings(epochs=2, fusion="late")
ON_CPU = PredictSettings(device="cpu", precision="float32", threads=1)


def write_cohort(root: Path) -> Path:
    """Write the red cohort with an age, which tells something, and a gender, which does not."""
    write_red_cohort(root, "010101010101??")
    table = pd.read_csv(root / "cohort.csv", dtype={"label": "Int64"})
    rng = np.random.default_rng(5)
    table["age"] = rng.normal(55, 9, len(table)).round() + 9 * table["label"].fillna(0).astype(int)
    table["gender"] = np.where(rng.random(len(table)) < 0.5, "M", "F")
    table.loc[3, "age"] = np.nan
    table.to_csv(root / "cohort.csv", index=False)
    return root


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_cohort(tmp_path_factory.mktemp("red")))


@pytest.fixture(scope="module")
def trained(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fused") / "m"
    train(cohort, out, SETTINGS, folds=FOLDS)
    return out


@pytest.fixture(scope="module")
def alone(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same members, not fused."""
    out = tmp_path_factory.mktemp("alone") / "m"
    train(cohort, out, replace(SETTINGS, fusion=None), folds=FOLDS)
    return out


def final(folder: Path) -> FinalModel:
    model = load_model(folder)
    assert isinstance(model, FinalModel)
    return model


def written_by(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "predictions.csv").set_index("id")


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.seconds
def test_the_folder_is_a_final_model_that_predicts_what_was_written(
    trained: Path, cohort: Cohort
) -> None:
    assert set(contents(trained)) == {
        *("final.json", "final.safetensors", "predictions.csv", "images.csv", "submission.csv"),
        *("curves.csv", "curves.png", "training.json"),
        *(f"fold-{fold}/curves.csv" for fold in range(FOLDS)),
    }
    model = final(trained)
    assert model.row == "bnsigmoid + clinical (late)"
    assert model.attributes.names == ("age", "gender")
    assert [member.sources for member in model.members] == [(0,), (1,), (2,)]
    found, written = model.predict(cohort, ON_CPU), written_by(trained)
    again = found.patients.set_index("id")
    for name in ("probability", "calibrated", "spread", "from_images", "from_age", "rest"):
        np.testing.assert_allclose(again[name], written[name], rtol=1e-5, atol=1e-6)
    assert (again["predicted"] == written["predicted"]).all()
    assert "age is missing" in str(written.loc["P3", "notes"])
    images = pd.read_csv(trained / "images.csv")
    np.testing.assert_allclose(found.images["contribution"], images["contribution"], atol=1e-5)
    submission = pd.read_csv(trained / "submission.csv").set_index("Id")["Predicted"]
    assert (submission == written.loc[submission.index, "predicted"]).all()
    assert (written["seen"] == ["label"] * 12 + ["no"] * 2).all()


@pytest.mark.seconds
def test_it_keeps_what_it_said_of_patients_held_out(trained: Path) -> None:
    kept, written = final(trained).held_out["row"], written_by(trained).dropna(subset="label")
    assert kept.scheme == "members"
    called = written["out_of_fold_predicted"]
    assert kept.rates[""].sensitivity == pytest.approx(called[written["label"] == 1].mean())
    assert kept.rates[""].specificity == pytest.approx(1 - called[written["label"] == 0].mean())
    decision = final(trained).members[0].decision
    expected = decision.logits(written["out_of_fold"].to_numpy(np.float64))
    np.testing.assert_allclose(np.sort(kept.logits), np.sort(expected), rtol=1e-4)
    assert np.bincount(kept.member).tolist() == [4, 4, 4]


@pytest.mark.seconds
def test_without_attributes_it_is_the_members_alone(
    trained: Path, alone: Path, cohort: Cohort
) -> None:
    members, fused = load_model(alone), final(trained)
    assert isinstance(members, Ensemble)
    expected = members.predict(cohort, ON_CPU)
    found = fused.without_attributes().predict(cohort, ON_CPU)
    for name in ("probability", "spread"):
        # A steep calibration enlarges the rounding of the members' probabilities.
        np.testing.assert_allclose(found.patients[name], expected.patients[name], rtol=2e-3)
    np.testing.assert_allclose(found.images["logit"], expected.images["logit"], atol=1e-5)
    assert (found.patients["predicted"] == expected.patients["predicted"]).all()
    shown = fused.metrics["out of fold, images alone"]
    measured = members.metrics["out of fold"]
    assert {name: shown[name] for name in measured} == pytest.approx(measured, rel=1e-4)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("agg", "fusion"),
    [("topk", "sum"), ("mean+std", "experts"), ("attention", "late"), ("bnsigmoid", "experts")],
)
def test_what_speaks_for_a_patient_adds_up(
    agg: str, fusion: Any, cohort: Cohort, tmp_path: Path
) -> None:
    head = HeadSettings(agg=agg, lr=3e-3, width=8)
    settings = tiny_settings(head=head, epochs=1, fusion=fusion, attributes=("age",), tta=True)
    train(cohort, tmp_path, settings, folds=2)
    model, written = final(tmp_path), written_by(tmp_path)
    assert model.attributes.names == ("age",)
    found = model.predict(cohort, ON_CPU)
    patients = found.patients.set_index("id")
    np.testing.assert_allclose(patients["probability"], written["probability"], rtol=1e-5)
    parts = patients[["from_images", "from_age", "rest"]].sum(axis=1)
    np.testing.assert_allclose(parts, logit(patients["probability"].to_numpy()), atol=1e-5)
    added = found.images.groupby("patient", sort=False)["contribution"].sum()
    np.testing.assert_allclose(added, patients["from_images"], atol=1e-5)
    once = model.predict(cohort, replace(ON_CPU, tta=False)).patients
    assert not np.array_equal(once["probability"], found.patients["probability"])


def test_a_folder_of_an_earlier_version_is_read(
    trained: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = final(trained)
    (first, *_), (source, *_) = model.members, model.sources
    one = replace(model, members=(replace(first, sources=()),), sources=(source,), held_out={})
    one.save(tmp_path)
    content = json.loads((tmp_path / "final.json").read_text())
    del content["tta"], content["members"][0]["sources"]
    (tmp_path / "final.json").write_text(json.dumps(content))
    expected, found = (each.predict(cohort, ON_CPU).patients for each in (one, final(tmp_path)))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.seconds
def test_interrupted_it_ends_with_the_same_bits(
    trained: Path, cohort: Cohort, tmp_path: Path
) -> None:
    def stopping(done: int, total: int, text: str = "") -> None:
        if text.startswith("fold-1 (2/3) epoch 2/2"):
            raise KeyboardInterrupt

    out = tmp_path / "m"
    with pytest.raises(KeyboardInterrupt):
        # Training does not depend on what is fused afterwards.
        train(cohort, out, replace(SETTINGS, fusion="sum"), folds=FOLDS, progress=stopping)
    seen: list[str] = []
    told = lambda done, total, text="": seen.append(text)  # noqa: E731
    train(cohort, out, SETTINGS, folds=FOLDS, progress=told)
    assert not any(text.startswith(("fold-0", "fold-1 (2/3) epoch 1/")) for text in seen)
    names = ("final.safetensors", "predictions.csv", "images.csv")
    assert all(contents(out)[name] == contents(trained)[name] for name in names)
    with pytest.raises(SettingsError, match="already holds a model"):
        train(cohort, out, SETTINGS, folds=FOLDS)
    train(cohort, out, tiny_settings(epochs=1), force=True)
    assert not [name for name in contents(out) if "final" in name or "fold" in name]


# --- what is learnt from whom --------------------------------------------------------------------


def numbers(column: "pd.Series[Any]") -> Floats:
    return np.asarray(column, np.float64)


def inputs_of(alone: Path, cohort: Cohort) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of the labelled patients, and image logit, age and genders of each."""
    table = written_by(alone)
    table = table[table["label"].notna()]
    told = cohort.table.loc[table.index]
    columns = {"image": logit(table["out_of_fold"].to_numpy()), "age": told["age"]}
    columns |= {value: (told["gender"] == value).astype(float) for value in ("F", "M")}
    return table, pd.DataFrame(columns, index=table.index)


def fitted(inputs: pd.DataFrame, labels: "pd.Series[int]", others: pd.DataFrame) -> Any:
    """Fit scikit-learn's logistic regression on standardised inputs; the mean where missing."""
    mean, spread = inputs.mean(), inputs.std(ddof=0)
    scaled = [((each - mean) / spread).fillna(0) for each in (inputs, others)]
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled[0], labels)
    return model.predict_proba(scaled[1])[:, 1]


@pytest.mark.seconds
def test_each_fold_is_fused_calibrated_and_decided_by_the_others(
    trained: Path, alone: Path, cohort: Cohort
) -> None:
    written = written_by(trained)
    table, inputs = inputs_of(alone, cohort)
    labels = table["label"].astype(int)
    members = load_model(alone)
    assert isinstance(members, Ensemble)
    folds = [[key.id for key in model.facts.validated_on] for model in members.models]
    fused = pd.Series(np.nan, index=table.index)
    for held_out in folds:
        others = table.index.difference(held_out)
        fused[held_out] = fitted(inputs.loc[others], labels[others], inputs.loc[held_out])
    np.testing.assert_allclose(written.loc[table.index, "out_of_fold"], fused, rtol=1e-3)
    for held_out in folds:
        others = table.index.difference(held_out)
        decision = Decision.learn(numbers(fused[others]), np.asarray(labels[others], np.int64))
        found = numbers(written.loc[held_out, "out_of_fold_calibrated"])
        expected = decision.calibrate(numbers(fused[held_out]))
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)
    assert written["out_of_fold"].isna().sum() == 2  # the unlabelled


@pytest.mark.seconds
def test_what_is_kept_is_learnt_on_everybody(trained: Path, alone: Path, cohort: Cohort) -> None:
    model, members = final(trained), load_model(alone)
    assert isinstance(members, Ensemble)
    table, inputs = inputs_of(alone, cohort)
    labels = table["label"].astype(int)
    logits = []
    for single in members.models:
        own = inputs.copy()
        patients = single.predict(cohort.labelled(), ON_CPU).patients
        own["image"] = logit(patients["probability"].to_numpy(np.float64))
        logits.append(model.members[0].decision.logits(fitted(inputs, labels, own)))
    expected = expit(np.mean(logits, axis=0))
    np.testing.assert_allclose(written_by(trained).loc[table.index, "probability"], expected, 1e-3)
    out_of_fold = numbers(written_by(trained).loc[table.index, "out_of_fold"])
    learnt = Decision.learn(out_of_fold, np.asarray(labels, np.int64))
    assert model.members[0].decision.threshold == pytest.approx(learnt.threshold, rel=1e-4)
    assert "of the 12 training patients (3 folds)" in model.threshold_from


@pytest.mark.seconds
def test_figures_of_fused_images_and_attributes(trained: Path, alone: Path, cohort: Cohort) -> None:
    model = final(trained)
    rows = ["out of fold", "out of fold, images alone"]
    rows += [f"baseline: {name}" for name in ("majority", "bag size", "clinical")]
    assert sorted(model.metrics) == sorted(rows)
    fused, images, *_ = (model.metrics[row] for row in rows)
    table = written_by(trained)
    table = table[table["label"].notna()]
    pooled = roc_auc_score(table["label"].astype(int), table["out_of_fold"])
    assert fused["auc_pooled"] == pytest.approx(pooled)
    assert fused["patients"] == 12
    for row in rows[1:]:
        gain = (fused["auc"] or 0) - (model.metrics[row]["auc"] or 0)
        assert model.metrics[row]["auc_gain"] == pytest.approx(gain)
    assert {"ba_low", "ba_high", "auc_low", "auc_high", "log_loss_calibrated"} <= set(images)
    assert model.figures["row"] == fused
    assert model.figures["images"] == images
    clinical = load_model(alone).metrics["baseline: clinical"]
    assert clinical["auc"] == model.metrics["baseline: clinical"]["auc"]


@given(st.integers(0, 10_000), st.sampled_from(sorted(FUSIONS)))
def test_the_labels_of_a_fold_do_not_matter_to_it(seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    labels, folds = np.tile([0, 1], 9), np.repeat([0, 1, 2], 6)
    inputs = rng.normal(size=(18, 3)) + labels[:, None]
    fused = cross_fit_fusion(name, inputs, labels, folds)
    others = np.where(folds == 1, 1 - labels, labels)
    again = cross_fit_fusion(name, inputs, others, folds)
    np.testing.assert_array_equal(again[folds == 1], fused[folds == 1])
    assert not np.allclose(again[folds != 1], fused[folds != 1])


# --- the command line, and mistakes --------------------------------------------------------------


def run(cohort: Cohort, out: Path, *arguments: str) -> Result:
    line = ["endtoend", "--cohort", str(cohort.root), "--out", str(out), "--epochs", "1"]
    line += ["--backbone", "test_efficientnet", "--crop", str(SIDE), "--batch-size", "4"]
    line += ["--threads", "1", "--device", "cpu", "--precision", "float32"]
    return CliRunner().invoke(cli, [*line, *arguments])


@pytest.mark.seconds
def test_on_the_command_line(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "m"
    result = run(cohort, out, "--folds", "2", "--fusion", "late", "--attributes", "age")
    assert result.exit_code == 0, result.output
    for text in ("training patients, out of fold", "the same, images alone", "baseline: clinical"):
        assert text in result.stdout
    assert "The fusion of each fold is learnt on the other folds, too." in result.stdout
    assert f"wrote {out}/final.json" in result.stdout
    predict = ["predict", "--model", str(out), "--cohort", str(cohort.root), "--force"]
    predict += ["--out", str(tmp_path / "p.csv"), "--device", "cpu", "--precision", "float32"]
    for more, column in (([], True), (["--without-attributes"], False)):
        predicted = CliRunner().invoke(cli, [*predict, *more])
        assert predicted.exit_code == 0, predicted.output
        assert ("from_age" in pd.read_csv(tmp_path / "p.csv")) == column
    told = json.loads(CliRunner().invoke(cli, ["info", "--json", str(out)]).stdout)
    assert (told["kind"], told["members"], told["reads"]) == ("final model", 2, ["images", "age"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fusion", "late"], "fusion (=late) must be learnt from out-of-fold image logits"),
        (["--folds", "2", "--fusion", "all"], "Invalid value for '--fusion'"),
        (["--folds", "2", "--validation", "0.2"], "validation (=0.2) must not go with folds (=2)"),
        (["--attributes", "nose"], "attributes (=nose) must be columns of the cohort's table"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, cohort: Cohort, tmp_path: Path
) -> None:
    result = run(cohort, tmp_path / "m", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_to_fuse_with(tmp_path: Path) -> None:
    red = Cohort.load(write_red_cohort(tmp_path / "red"))
    with pytest.raises(SettingsError, match=r"fusion \(=late\) must have clinical attributes"):
        train(red, tmp_path / "m", SETTINGS, folds=2)


@pytest.mark.seconds
def test_members_with_backbones_of_their_own_are_explained(trained: Path, cohort: Cohort) -> None:
    model, settings = final(trained), ExplainSettings(device="cpu", threads=1)
    found, expected = explain(model, cohort, settings), model.predict(cohort, ON_CPU)
    for name in ("probability", "from_images", "from_age", "spread", "rest"):
        np.testing.assert_allclose(found.patients[name], expected.patients[name], atol=1e-5)
    np.testing.assert_allclose(
        found.images["contribution"], expected.images["contribution"], atol=1e-4
    )
    np.testing.assert_allclose(found.maps.mean((1, 2)), found.logit, atol=1e-4)
    assert found.maps.shape[1] > 1


@pytest.mark.parametrize("low", [-0.1, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_does_not_beat_its_attributes_is_told(
    low: float, fused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics: dict[str, dict[str, float | None]] = {
        "baseline: clinical": {"auc": 0.8, "auc_gain_low": low}
    }
    warn_of_attributes(metrics | ({"out of fold, images alone": {}} if fused else {}))
    told = "do not beat the attributes alone (AUC 0.80)" in capsys.readouterr().err
    assert told == (fused and low < 0)


def test_settings_say_how_images_are_fused() -> None:
    with pytest.raises(SettingsError, match=r"fusion \(=all\) must be one of late, sum, experts"):
        EndToEndSettings(fusion="all")  # type: ignore[arg-type]
