"""`lymphfeat predict` as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from scipy.special import expit

from lymphfeat.evaluation.calibration import Calibration, logit
from lymphfeat.evaluation.decision import Decision
from lymphfeat_cli.main import cli
from tests.test_model import make_model
from tests.tiny import write_red_cohort


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model("topk").save("models/endtoend")
    return write_red_cohort(tmp_path / "red", "01010??", truth=True)


def run(*arguments: str) -> Result:
    options = ["--threads", "1", "--device", "cpu"]
    return CliRunner().invoke(cli, ["predict", *options, *arguments])


def test_writes_tables_and_submission(root: Path) -> None:
    result = run("--cohort", str(root), "--images-out", "i.csv", "--submission", "s.csv")
    assert result.exit_code == 0, result.output
    assert "7 patients" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("wrote")] == [
        "wrote predictions.csv",
        "wrote i.csv",
        "wrote s.csv",
    ]
    patients = pd.read_csv("predictions.csv")
    assert list(patients.columns) == [
        "id",
        "label",
        "seen",
        "n_images",
        "probability",
        "calibrated",
        "predicted",
    ]
    assert list(patients["id"]) == [f"P{n}" for n in range(7)]
    images = pd.read_csv("i.csv")
    assert list(images.columns) == [
        *("patient", "image", "logit", "probability", "weight", "contribution")
    ]
    assert len(images) == patients["n_images"].sum()
    last = patients["predicted"].tolist()[5:]
    assert Path("s.csv").read_text() == f"Id,Predicted\nP5,{last[0]}\nP6,{last[1]}\n"


def test_a_table_of_ids_is_enough(root: Path) -> None:
    (root / "cohort.csv").write_text("id\n" + "".join(f"P{n}\n" for n in range(7)))
    result = run("--cohort", str(root), "--submission", "s.csv", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["patients"], told["metrics"]) == (7, {})
    assert len(Path("s.csv").read_text().splitlines()) == 8


def test_truth_and_metrics(root: Path) -> None:
    result = run("--cohort", str(root), "--truth", str(root / "truth.csv"), "--json", "--tta")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {group: values["patients"] for group, values in told["metrics"].items()} == {
        "train": 2,
        "validation": 1,
        "new": 2,
    }
    assert told["truth"]["hidden_patients"] == 2
    shown = run("--cohort", str(root), "--truth", str(root / "truth.csv"), "--force")
    assert "Witness images: AUC of image scores" in shown.stdout
    assert "training patients (not a performance estimate)" in shown.stdout


def test_float32_unless_asked_otherwise(auto_precision: str, root: Path) -> None:
    written = {}
    for name in ("float32", "bfloat16", "auto", None):
        precision = ["--precision", name] if name else []
        result = run("--cohort", str(root), "--force", *precision)
        assert result.exit_code == 0, result.output
        written[name] = Path("predictions.csv").read_text()
    assert written[None] == written["float32"] != written["bfloat16"]
    assert written["auto"] == written[auto_precision]


def test_nothing_is_overwritten(root: Path) -> None:
    Path("predictions.csv").write_text("precious")
    result = run("--cohort", str(root))
    assert result.exit_code == 2
    assert "predictions.csv exists" in result.stderr
    assert Path("predictions.csv").read_text() == "precious"
    assert run("--cohort", str(root), "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "model (=nowhere) must be a folder with model.json"),
        (["--out", "no/where.csv"], "folder no does not exist"),
        (["--truth", "other.csv"], "truth must name images of this cohort; got none of them"),
        (["--truth", "wrong.csv"], "wrong.csv row 2, column IS_WITNESS: must be 0 or 1; got 'x'"),
        (["--truth", "twice.csv"], "twice.csv row 3 has 0.png of P1. Keep"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, root: Path) -> None:
    header = "ID,FILE,IS_WITNESS\n"
    Path("other.csv").write_text(header + "Q1,0.png,1\n")
    Path("wrong.csv").write_text(header + "P1,0.png,x\n")
    Path("twice.csv").write_text(header + "P1,0.png,1\nP1,0.png,1\n")
    result = run("--cohort", str(root), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def decided(agg: str, folder: str, threshold: float) -> None:
    """Save a model that was given calibration and operating points."""
    model = make_model(agg)
    model.decision = Decision(
        threshold=threshold,
        threshold_from="out of fold",
        calibration=Calibration(slope=0.5, intercept=0.1),
        operating_points={"0.9": threshold / 2},
    )
    model.save(folder)


def test_calibrated_probabilities_and_operating_points(root: Path) -> None:
    decided("topk", "models/endtoend", 0.4)
    assert run("--cohort", str(root), "--out", "best.csv").exit_code == 0
    table = pd.read_csv("best.csv")
    expected = Calibration(slope=0.5, intercept=0.1).apply(table["probability"].to_numpy())
    assert table["calibrated"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert (table["predicted"] == (table["probability"] > 0.4)).all()
    sensitive = run("--cohort", str(root), "--sensitivity", "0.9", "--json")
    assert json.loads(sensitive.stdout)["threshold"] == 0.2
    refused = run("--cohort", str(root), "--sensitivity", "0.7", "--force")
    assert refused.exit_code == 2
    assert "sensitivity (=0.7) must be an operating point of the model; it has 0.9" in (
        refused.output
    )


def test_several_models_are_averaged_and_their_spread_told(root: Path) -> None:
    decided("topk", "a", 0.3)
    decided("mean", "b", 0.5)
    for name in ("a", "b"):
        assert run("--cohort", str(root), "--model", name, "--out", f"{name}.csv").exit_code == 0
    both = run("--cohort", str(root), "--model", "a", "--model", "b", "--json")
    calibration = Calibration(slope=0.5, intercept=0.1)
    at = calibration.apply(np.array([0.3, 0.5]))
    threshold = expit(logit(at).mean(keepdims=True))[0]
    assert json.loads(both.stdout)["threshold"] == pytest.approx(threshold)
    members = [pd.read_csv(f"{name}.csv")["calibrated"].to_numpy() for name in ("a", "b")]
    table = pd.read_csv("predictions.csv")
    halves = np.abs(members[0] - members[1]) / 2
    assert table["spread"].to_numpy() == pytest.approx(halves, abs=1e-6)
    middle = expit((logit(members[0]) + logit(members[1])) / 2)
    assert table["probability"].to_numpy() == pytest.approx(middle, abs=1e-6)
    assert (table["predicted"] == (table["probability"] > threshold)).all()
    sensitive = run(
        *("--cohort", str(root), "--model", "a", "--model", "b", "--sensitivity", "0.9"),
        *("--force", "--json"),
    )
    at = calibration.apply(np.array([0.15, 0.25]))
    assert json.loads(sensitive.stdout)["threshold"] == pytest.approx(
        expit(logit(at).mean(keepdims=True))[0]
    )
