"""`lymphfeat predict` as a user runs it."""

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

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
    assert list(patients.columns) == ["id", "label", "n_images", "probability", "predicted"]
    assert list(patients["id"]) == [f"P{n}" for n in range(7)]
    images = pd.read_csv("i.csv")
    assert list(images.columns) == ["patient", "image", "logit", "probability", "weight"]
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
    assert "trained on (fit, not skill)" in shown.stdout


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
        (["--truth", "twice.csv"], "twice.csv row 3: image 0.png of P1 must stand there once"),
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
