"""K-fold members: their average, what is chosen out of fold, and heads to begin with."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.splits import kfold_splits
from lymphfeat.errors import LeakageError, ModelError, SettingsError
from lymphfeat.evaluation.calibration import logit
from lymphfeat.evaluation.decision import Decision, combine
from lymphfeat.explanation.explanation import explain
from lymphfeat.extraction import extract
from lymphfeat.finetuning.initial_head import read_initial_head
from lymphfeat.finetuning.job import prepare
from lymphfeat.fitting import fit_heads
from lymphfeat.heads.grid import resolve
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.loading import load_model
from lymphfeat.model.model import Model
from lymphfeat.settings import (
    ExplainSettings,
    ExtractSettings,
    FitSettings,
    HeadSettings,
    PredictSettings,
    ThresholdRule,
)
from lymphfeat.training import train
from lymphfeat_cli.endtoend import warn_of_bag_size
from lymphfeat_cli.main import cli
from tests.folders import contents
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_cohort_with_a_copy, write_red_cohort

FOLDS = 2
SETTINGS = tiny_settings(epochs=2, tta=True)
ON_CPU = PredictSettings(device="cpu")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path_factory.mktemp("red")))


@pytest.fixture(scope="module")
def trained(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("members") / "m"
    train(cohort, out, SETTINGS, folds=FOLDS)
    return out


def test_members_never_saw_their_fold(trained: Path, cohort: Cohort) -> None:
    members = Ensemble.load(trained).models
    assert json.loads((trained / "members.json").read_text())["members"] == ["fold-0", "fold-1"]
    labelled = cohort.labelled()
    for member in members:
        facts = member.facts
        held_out = {key.id for key in facts.validated_on}
        assert not set(facts.trained_on) & held_out
        assert {*facts.trained_on, *held_out} == set(labelled.ids)
        assert set(facts.provenance.label_ids) == set(facts.trained_on)
    held_out_ids = [key.id for member in members for key in member.facts.validated_on]
    assert sorted(held_out_ids) == sorted(labelled.ids)


def predict_each(trained: Path, cohort: Cohort) -> tuple[list[Model], list[pd.DataFrame]]:
    members = list(Ensemble.load(trained).models)
    return members, [m.predict(cohort, ON_CPU).patients.set_index("id") for m in members]


def held_out_by(member: Model) -> list[str]:
    return [key.id for key in member.facts.validated_on]


def test_calibrated_logits_are_averaged_and_decided_where_thresholds_were_found(
    trained: Path, cohort: Cohort
) -> None:
    members, each = predict_each(trained, cohort)
    written = pd.read_csv(trained / "predictions.csv").set_index("id")
    mean = np.mean([logit(table["calibrated"].to_numpy()) for table in each], axis=0)
    np.testing.assert_allclose(written["probability"], expit(mean), rtol=1e-5)
    np.testing.assert_allclose(written["calibrated"], written["probability"])
    told = json.loads((trained / "members.json").read_text())
    decision = members[0].decision
    assert decision.calibration is not None
    single = decision.calibration.apply(np.array([decision.threshold]))[0]
    assert told["threshold"] == pytest.approx(single)
    assert (written["predicted"] == (written["probability"] > told["threshold"])).all()
    assert "on out-of-fold probabilities of the 10 training patients (2 folds)" in (
        members[0].threshold_from
    )
    submission = pd.read_csv(trained / "submission.csv").set_index("Id")["Predicted"]
    assert (submission == written.loc[submission.index, "predicted"]).all()
    again = load_model(trained).predict(cohort, ON_CPU).patients
    np.testing.assert_allclose(again["probability"], written["probability"], rtol=1e-6)


def test_a_members_folder_is_loaded_as_one_model_and_saved_again(
    trained: Path, tmp_path: Path
) -> None:
    ensemble = load_model(str(trained))
    assert isinstance(ensemble, Ensemble)
    ensemble.save(tmp_path / "copy")
    kept = {
        name: content for name, content in contents(trained).items() if "model" in Path(name).stem
    }
    saved = contents(tmp_path / "copy")
    assert saved == {**kept, "members.json": (trained / "members.json").read_bytes()}
    assert isinstance(load_model(trained / "fold-0"), Model)


def test_members_of_several_folders_are_averaged_alike(trained: Path, cohort: Cohort) -> None:
    ensemble = load_model(trained, trained / "fold-1")
    assert isinstance(ensemble, Ensemble)
    _, each = predict_each(trained, cohort)
    logits = [logit(table["calibrated"].to_numpy()) for table in each]
    mean = np.average(logits, axis=0, weights=[1 / 3, 2 / 3])
    found = ensemble.predict(cohort, ON_CPU).patients["probability"]
    np.testing.assert_allclose(found, expit(mean), rtol=1e-5)


def test_members_decide_at_a_sensitivity(trained: Path) -> None:
    ensemble = load_model(trained)
    assert isinstance(ensemble, Ensemble)
    sensitive = ensemble.at_sensitivity(0.9)
    at = [model.decision.operating_points["0.9"] for model in ensemble.models]
    assert [model.threshold for model in sensitive.models] == at
    assert sensitive.threshold == pytest.approx(ensemble.decision.operating_points["0.9"])
    with pytest.raises(SettingsError, match=r"sensitivity \(=0.7\) must be an operating point"):
        ensemble.at_sensitivity(0.7)


def test_members_are_explained_together(trained: Path, cohort: Cohort) -> None:
    model = load_model(trained)
    expected = model.predict(cohort, ON_CPU).patients["probability"]
    found = explain(model, cohort, ExplainSettings(device="cpu"))
    np.testing.assert_allclose(found.patients["probability"], expected, atol=1e-5)
    images = model.predict(cohort, replace(ON_CPU, tta=False)).images
    for name in ("logit", "probability", "weight", "contribution"):
        np.testing.assert_allclose(images[name], found.images[name], rtol=1e-4, atol=1e-6)


def test_an_images_probability_is_the_logistic_of_the_members_mean(
    trained: Path, cohort: Cohort
) -> None:
    ensemble = Ensemble.load(trained)
    each = ensemble.predict_each(cohort, ON_CPU)
    for place, member in enumerate(each):  # as members do that have learnt more than these
        apart = member.images["logit"] * 30 + 3 * place
        images = member.images.assign(logit=apart, probability=expit(apart))
        each[place] = replace(member, images=images)
    found = ensemble.average(each).images
    np.testing.assert_allclose(found["logit"], np.mean([m.images["logit"] for m in each], axis=0))
    np.testing.assert_allclose(found["probability"], expit(found["logit"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "members.json: is damaged"),
        ("[]", "members.json: is damaged"),
        ('{"members": []}', "members.json: is damaged .*names no members"),
        ('{"members": ["fold-9"]}', r"model \(=.*fold-9\) must be a folder with model.json"),
    ],
)
def test_a_damaged_members_folder_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "members.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_each_fold_is_measured_at_the_other_folds_threshold(trained: Path, cohort: Cohort) -> None:
    members, each = predict_each(trained, cohort)
    written = pd.read_csv(trained / "predictions.csv").set_index("id")
    labels = written["label"]
    for fold, other in ((0, 1), (1, 0)):
        held_out, inside = held_out_by(members[fold]), held_out_by(members[other])
        decision = Decision.learn(
            each[other].loc[inside, "probability"].to_numpy(np.float64),
            labels[inside].to_numpy(np.int64),
        )
        raw = each[fold].loc[held_out, "probability"].to_numpy(np.float64)
        found = written.loc[held_out]
        np.testing.assert_allclose(found["out_of_fold"], raw, rtol=1e-5)
        calibrated = decision.calibrate(raw)
        np.testing.assert_allclose(found["out_of_fold_calibrated"], calibrated, rtol=1e-3)
        assert (found["out_of_fold_predicted"] == (raw > decision.threshold)).all()
    assert written["out_of_fold"].isna().sum() == 2  # the unlabelled
    told = json.loads((trained / "members.json").read_text())["metrics"]["out of fold"]
    called = written["out_of_fold_predicted"]
    assert told["sensitivity"] == pytest.approx(called[labels == 1].mean())
    assert told["specificity"] == pytest.approx(1 - called[labels == 0].mean())
    # Of the calibrated ones: the other fold's calibration may be steep enough to tie some at 1.
    aucs = [
        roc_auc_score(labels[ids], written.loc[ids, "out_of_fold"])
        for ids in map(held_out_by, members)
    ]
    assert told["auc"] == pytest.approx(np.mean(aucs))  # folds of equally many pairs
    known = labels.notna()
    pooled = roc_auc_score(labels[known], written.loc[known, "out_of_fold"])
    assert told["auc_pooled"] == pytest.approx(pooled)
    calibrated = np.clip(written.loc[known, "out_of_fold_calibrated"], 1e-7, 1 - 1e-7)
    loss = log_loss(labels[known], calibrated)
    assert told["log_loss_calibrated"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.seconds
@pytest.mark.parametrize("rule", ["best-ba", "0.5"])
def test_members_decide_by_the_rule_asked_for(
    rule: ThresholdRule, cohort: Cohort, tmp_path: Path
) -> None:
    members = train(cohort, tmp_path, replace(SETTINGS, threshold=rule), folds=FOLDS)
    assert isinstance(members, Ensemble)
    single = members.models[0].decision
    assert single.threshold_from.startswith("fixed" if rule == "0.5" else "best balanced accuracy")
    assert rule != "0.5" or single.threshold == 0.5
    assert members.threshold == combine([single, single]).threshold


def test_members_written_before_calibrated_means_are_read(
    trained: Path, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old folders: thresholds in members.json are on single members' scale, calibration absent."""
    shutil.copytree(trained, tmp_path / "old")
    for path in [tmp_path / "old" / "members.json", *(tmp_path / "old").glob("fold-*/model.json")]:
        content = json.loads(path.read_text())
        content |= {"threshold": 0.4, "threshold_from": "best balanced accuracy"}
        del content["calibration"], content["operating_points"]
        path.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    line = ["predict", "--model", "old", "--cohort", str(cohort.root), "--json"]
    result = CliRunner().invoke(cli, [*line, "--threads", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["threshold"] == pytest.approx(0.4)
    _, each = predict_each(tmp_path / "old", cohort)
    mean = np.mean([logit(table["probability"].to_numpy(np.float64)) for table in each], axis=0)
    table = pd.read_csv("predictions.csv")
    np.testing.assert_allclose(table["probability"], expit(mean), rtol=1e-5)


class Stop(Exception):
    pass


def test_interrupted_in_a_later_fold_ends_with_the_same_bits(
    trained: Path, cohort: Cohort, tmp_path: Path
) -> None:
    def stopping(done: int, total: int, text: str = "") -> None:
        if text.startswith("fold-1 (2/2) epoch 2/2"):
            raise Stop

    out = tmp_path / "m"
    with pytest.raises(Stop):
        train(cohort, out, SETTINGS, folds=FOLDS, progress=stopping)
    seen: list[str] = []
    train(
        cohort,
        out,
        SETTINGS,
        folds=FOLDS,
        progress=lambda done, total, text="": seen.append(text),
    )
    assert not any(text.startswith(("fold-0", "fold-1 (2/2) epoch 1/")) for text in seen)
    for name in ("fold-0", "fold-1"):
        torch.testing.assert_close(
            load_file(out / name / "model.safetensors"),
            load_file(trained / name / "model.safetensors"),
            rtol=0,
            atol=0,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(SettingsError, match="already holds a model"):
        train(cohort, out, SETTINGS, folds=FOLDS)


@pytest.mark.seconds
def test_one_model_in_place_of_members_keeps_nothing_of_them(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(endtoend(cohort, "--folds", "2"))
    refused = run_line(cohort)
    assert refused.exit_code == 2
    assert "Error: m already holds a model; choose another --out or use --force" in refused.stderr
    assert contents(Path("m")) == before
    after = contents(endtoend(cohort, "--seed", "1", "--force"))
    assert set(after) == {
        *("model.json", "model.safetensors", "predictions.csv", "images.csv", "submission.csv"),
        *("curves.csv", "curves.png", "training.json"),
    }
    predict = ["predict", "--model", "m", "--cohort", str(cohort.root), *ONE_CPU, "--json"]
    predicted = CliRunner().invoke(cli, predict)
    assert predicted.exit_code == 0, predicted.output
    written, again = (
        pd.read_csv(path).set_index("id") for path in ("m/predictions.csv", "predictions.csv")
    )
    assert "spread" not in again  # one model, not the members of yesterday
    np.testing.assert_allclose(again["probability"], written["probability"], rtol=1e-5)


@pytest.mark.seconds
def test_members_in_place_of_one_model_keep_nothing_of_it(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    endtoend(cohort)
    assert "already holds a model" in run_line(cohort, "--folds", "2").stderr
    after = contents(endtoend(cohort, "--folds", "3", "--force"))
    assert "model.json" not in after
    fewer = contents(endtoend(cohort, "--folds", "2", "--force"))
    assert set(fewer) == {name for name in after if not name.startswith("fold-2/")}
    assert {name.split("/")[0] for name in fewer} >= {"fold-0", "fold-1", "members.json"}


@pytest.mark.seconds
def test_an_unfinished_training_of_another_kind_is_kept(cohort: Cohort, tmp_path: Path) -> None:
    def stopping(done: int, total: int, text: str = "") -> None:
        if "epoch 2/2" in text:
            raise Stop

    out = tmp_path / "m"
    with pytest.raises(Stop):
        train(cohort, out, SETTINGS, folds=FOLDS, progress=stopping)
    kept = contents(tmp_path)
    assert list(kept) == ["m.partial/fold-0.pt"]
    message = r"fold-0.pt belongs to an unfinished training of another kind"
    with pytest.raises(SettingsError, match=message):
        train(cohort, out, SETTINGS)
    assert contents(tmp_path) == kept
    train(cohort, out, SETTINGS, force=True)
    assert not list(tmp_path.rglob("fold-*"))


ONE_CPU = ["--threads", "1", "--device", "cpu"]


def run_line(cohort: Cohort, *arguments: str) -> Result:
    tiny = ["--backbone", BACKBONE.backbone, "--crop", str(SIDE), "--epochs", "1", "--out", "m"]
    tiny += ["--precision", "float32"]
    line = ["endtoend", "--cohort", str(cohort.root), *ONE_CPU, *tiny, "--json", *arguments]
    return CliRunner().invoke(cli, line)


def endtoend(cohort: Cohort, *arguments: str) -> Path:
    """Train into m; what the command says it wrote is what is there."""
    result = run_line(cohort, *arguments)
    assert result.exit_code == 0, result.output
    files = json.loads(result.stdout)["files"]
    assert sorted(files) == sorted(f"m/{name}" for name in contents(Path("m")))
    assert [path.name for path in Path().iterdir() if path.name.startswith("m.")] == []
    return Path("m")


@pytest.mark.seconds
def test_from_the_command_line(
    auto_precision: str, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["--cohort", str(cohort.root), *ONE_CPU]
    tiny = ["--backbone", BACKBONE.backbone, "--crop", str(SIDE), "--epochs", "1", "--folds", "2"]
    result = CliRunner().invoke(cli, ["endtoend", *line, *tiny])
    assert result.exit_code == 0, result.output
    assert "training patients, out of fold" in result.stdout
    assert "from the other folds (whose members were trained on it)" in result.stdout
    assert "wrote models/endtoend/members.json" in result.stdout
    predicted = CliRunner().invoke(cli, ["predict", *line])
    assert predicted.exit_code == 0, predicted.output
    # Whichever precision trained them, `predict` says what the folder says.
    member = Model.load("models/endtoend/fold-0")
    assert member.facts.settings["precision"] == auto_precision
    columns = ["id", "probability", "calibrated", "predicted", "spread"]
    written, again = (
        pd.read_csv(Path(folder, "predictions.csv"))[columns] for folder in ("models/endtoend", ".")
    )
    pd.testing.assert_frame_equal(again, written, check_exact=True)
    assert (
        "training patients (not a performance estimate) │       10 │" in predicted.stdout
    )  # by one member or another
    assert "validation" not in predicted.stdout
    with pytest.raises(
        ModelError, match=r"holds several models: choose one of them, such as .*fold-0"
    ):
        Model.load(Path("models/endtoend"))
    told = CliRunner().invoke(cli, ["info", "models/endtoend"])
    assert told.exit_code == 0, told.output
    assert "kind: k-fold members" in told.stdout


# --- heads to begin with -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = ExtractSettings(backbone=BACKBONE, device="cpu", threads=1, precision="float32")
    store = extract(cohort, folder / "s.h5", settings)
    heads = [resolve(HeadSettings(agg="bnsigmoid", lr=0.05))]
    fit = FitSettings(seeds=1, folds=3, epochs=4, batch_size=4, device="cpu", threads=1)
    fit_heads(store, heads, fit, folder / "run", save=True)
    return folder / "run"


def test_training_begins_with_the_mean_head_of_the_splits(run: Path, cohort: Cohort) -> None:
    settings = tiny_settings("mean", init_head=str(run))
    labelled = cohort.labelled()
    (repeat,) = kfold_splits(labelled.ids, labelled.labels, folds=3, seeds=1)
    tensors = load_file(run / "heads.safetensors")
    by_split = [
        next(v for k, v in tensors.items() if k.endswith(f"{split.id}/weight"))
        for split in repeat.outer
    ]
    split = repeat.outer[1]
    everyone = replace(split, train=(*split.train, *split.validation), validation=())
    job = prepare(cohort, everyone, settings)
    torch.testing.assert_close(
        job.model.head.get_parameter("weight")[0], torch.stack(by_split).mean(0)
    )
    assert job.model.head_settings.agg == "bnsigmoid"
    assert job.settings.head.lr == settings.head.lr
    # With patients held out only the split that did not train on them counts.
    job = prepare(cohort, split, settings)
    torch.testing.assert_close(job.model.head.get_parameter("weight")[0], by_split[1])
    weight = prepare(cohort, split, tiny_settings()).model.facts.initial_weights_sha256
    assert read_initial_head(run, (), weight).name == "bnsigmoid lr=0.05"
    with pytest.raises(LeakageError, match="all of its splits did"):
        read_initial_head(run, patient_keys(labelled), weight)


def test_training_from_a_head_runs(run: Path, cohort: Cohort, tmp_path: Path) -> None:
    settings = tiny_settings("mean", epochs=1, init_head=str(run))
    model = train(cohort, tmp_path, settings)
    assert model.head_settings.agg == "bnsigmoid"


def test_a_head_of_other_features_is_refused(run: Path, cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must be fitted on features of the same weights"):
        read_initial_head(run, (), "0" * 64)
    settings = tiny_settings(init_head=str(tmp_path))
    with pytest.raises(SettingsError, match="must be a run of `lymphfeat fit-head --save`"):
        train(cohort, tmp_path / "m", settings)


# --- baselines -----------------------------------------------------------------------------------


def test_baselines_stand_beside_the_members(trained: Path, cohort: Cohort) -> None:
    metrics = json.loads((trained / "members.json").read_text())["metrics"]
    assert list(metrics) == ["out of fold", "baseline: majority", "baseline: bag size"]
    labelled = cohort.labelled()
    (repeat,) = kfold_splits(labelled.ids, labelled.labels, folds=FOLDS, seeds=1, seed=0)
    sizes = dict(zip(labelled.ids, np.log(labelled.n_images), strict=True))
    labels = dict(zip(labelled.ids, labelled.labels, strict=True))
    told, aucs = {}, []
    for split in repeat.outer:
        x = np.array([sizes[id] for id in split.train])
        centre, spread = x.mean(), x.std()
        model = LogisticRegression().fit(
            ((x - centre) / spread)[:, None], [labels[id] for id in split.train]
        )
        for id in split.validation:
            told[id] = model.predict_proba([[(sizes[id] - centre) / spread]])[0, 1]
        held_out = split.validation
        aucs.append(roc_auc_score([labels[i] for i in held_out], [told[i] for i in held_out]))
    y = [labels[id] for id in told]
    bag_size = metrics["baseline: bag size"]
    assert bag_size["auc"] == pytest.approx(np.mean(aucs))
    assert bag_size["auc_pooled"] == pytest.approx(roc_auc_score(y, list(told.values())))
    assert metrics["baseline: majority"]["auc"] == 0.5
    assert bag_size["log_loss"] == pytest.approx(log_loss(y, list(told.values())), rel=1e-3)
    gain = metrics["out of fold"]["auc"] - bag_size["auc"]
    assert bag_size["auc_gain"] == pytest.approx(gain)
    assert bag_size["auc_gain_low"] <= gain <= bag_size["auc_gain_high"]


def line_of(cohort: Path, out: Path, *arguments: str) -> list[str]:
    backbone = ["--backbone", BACKBONE.backbone, "--crop", str(SIDE), "--device", "cpu"]
    line = ["endtoend", "--cohort", str(cohort), "--out", str(out), "--epochs", "1", *backbone]
    return [*line, "--batch-size", "4", "--precision", "float32", *arguments]


@pytest.mark.seconds
@pytest.mark.parametrize("held_out", [("--folds", "5"), ("--validation", "0.4")])
def test_an_image_on_both_sides_is_refused(tmp_path: Path, held_out: tuple[str, str]) -> None:
    root = write_cohort_with_a_copy(tmp_path / "c")
    line = line_of(root, tmp_path / "m", *held_out)
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 2, result.output
    assert re.search(r"got 1.png of P1 = 0.png of P8, on both sides of split", result.stderr)
    assert not (tmp_path / "m" / "model.json").exists()
    allowed = CliRunner().invoke(cli, [*line, "--allow-shared-images"])
    assert allowed.exit_code == 0, allowed.output
    assert "baseline: bag size" in allowed.stdout


def test_without_held_out_patients_nothing_is_refused(tmp_path: Path) -> None:
    root = write_cohort_with_a_copy(tmp_path / "c")
    result = CliRunner().invoke(cli, line_of(root, tmp_path / "m"))
    assert result.exit_code == 0, result.output
    assert "baseline" not in result.stdout


@pytest.mark.parametrize("low", [-0.1, 0.0, 0.1])
def test_a_model_that_does_not_beat_bag_size_is_told(
    low: float, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_bag_size({"baseline: bag size": {"auc": 0.8, "auc_gain_low": low}})
    told = "does not beat bag size alone (AUC 0.80)" in capsys.readouterr().err
    assert told == (low <= 0)
