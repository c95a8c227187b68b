"""`lymphfeat endtoend` as a user runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lymphfeat_cli.main import cli
from tests.folders import contents
from tests.tiny import SIDE, write_red_cohort

TINY = ["--backbone", "test_efficientnet", "--crop", str(SIDE), "--batch-size", "4"]
TINY += ["--threads", "1", "--device", "cpu", "--epochs", "2", "--lr", "0.003"]
TINY += ["--precision", "float32"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_red_cohort(tmp_path / "red", truth=True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["endtoend", *TINY, *arguments])


@pytest.mark.seconds
def test_trains_and_names_its_files(root: Path) -> None:
    result = run("--cohort", str(root), "--submission-header", "ID,LABEL")
    assert result.exit_code == 0, result.output
    assert "training patients (not a performance estimate)" in result.stdout
    assert "(the mean probability of the 10 training patients, as the model fits them)" in (
        result.stdout
    )
    for name in ("model.json", "model.safetensors", "predictions.csv", "images.csv", "curves.png"):
        assert f"wrote models/endtoend/{name}" in result.stdout
        assert Path("models/endtoend", name).stat().st_size > 0
    submission = Path("models/endtoend/submission.csv").read_text().splitlines()
    assert submission[0] == "ID,LABEL"
    assert [line.split(",")[0] for line in submission[1:]] == ["P10", "P11"]

    again = run("--cohort", str(root))
    assert again.exit_code == 2
    assert again.stderr.startswith("Error: models/endtoend already holds a model; choose another")
    assert run("--cohort", str(root), "--force").exit_code == 0


@pytest.mark.seconds
def test_the_built_in_cohort_is_soon_done_and_scored(root: Path) -> None:
    Path("cache").mkdir()
    root.rename("cache/synthetic")  # in place of the one that would be rendered
    Path("lymphfeat.toml").write_text("[endtoend]\nepochs = 2\n")  # the user's choice counts
    own = ["--backbone", "test_efficientnet", "--crop", str(SIDE)]
    machine = ["--threads", "1", "--device", "cpu", "--precision", "float32"]
    result = CliRunner().invoke(cli, ["endtoend", *own, *machine, "--json"])
    assert result.exit_code == 0, result.output
    told = "Trained briefly: --epochs 2 --images-per-patient 12 --batch-size 8 --lr 0.0003."
    assert told in result.stderr
    assert "hidden_auc" in json.loads(result.stdout)["truth"]
    made = json.loads(Path("models/endtoend/model.json").read_text())["training"]["settings"]
    assert (made["epochs"], made["images_per_patient"], made["head"]["lr"]) == (2, 12, 3e-4)


def test_json_and_truth(root: Path) -> None:
    truth = ["--truth", str(root / "truth.csv")]
    result = run(
        "--cohort", str(root), "--agg", "topk", "--k-train", "2", "--validation", "0.4",
        "--unit", "image", "--tta", "--out", "m", "--json", *truth,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["model"] == "m"
    baselines = ["baseline: majority", "baseline: bag size"]
    assert list(told["metrics"]) == ["train", "validation", *baselines]
    assert {"m/model.json", "m/submission.csv"} <= set(told["files"])
    assert set(told["files"]) == {f"m/{name}" for name in contents(Path("m"))}
    assert 0 <= told["truth"]["witness_auc"] <= 1
    assert told["truth"]["hidden_patients"] == 2
    facts = json.loads(Path("m/model.json").read_text())
    assert (facts["head"]["k_train"], facts["head"]["unit"], facts["tta"]) == (2, "image", True)


def test_says_when_there_is_nobody_to_submit(tmp_path: Path) -> None:
    root = write_red_cohort(tmp_path / "red", "0101")
    result = run("--cohort", str(root), "--out", str(tmp_path / "m"))
    assert result.exit_code == 0, result.output
    assert "No submission written: the cohort has no unlabelled patients." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agg", "nose"], "agg (=nose) must be one of top1"),
        (["--backbone", "nose"], "backbone (=nose) must be a timm model"),
        (["--crop", "99"], "must be at least the crop (=99)"),
        (["--weights", "nose.pth"], "got no such file"),
        (["--k-percent", "0"], "k_percent (=0.0) must lie in (0, 100]"),
        (["--lr", "0"], "lr (=0.0) must be above 0"),
        (["--validation", "0.01"], "validation (=0.01) must leave patients of both classes"),
        (["--threshold", "best-ba"], "threshold (=best-ba) must be chosen on out-of-fold"),
        (["--threshold", "0.4"], "Invalid value for '--threshold'"),
        (["--validation", "1"], "Invalid value for '--validation'"),
        (["--truth", "nothing.csv"], "columns must hold ID, FILE, IS_WITNESS or ID, LABEL; got ID"),
        (["--cohort", "nowhere"], "cohort folder nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, root: Path) -> None:
    Path("nothing.csv").write_text("ID\nP1\n")
    result = run("--cohort", str(root), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_grid_is_refused(root: Path) -> None:
    result = run("--cohort", str(root), "--agg", "topk", "--k-agg", "5,10")
    assert result.exit_code == 2
    assert "this command trains one head; got 2: top5" in result.output
    assert not Path("models").exists()


@pytest.mark.seconds
@pytest.mark.parametrize(("given", "temperature"), [([], 1.0), (["--temperature", "3"], 3.0)])
def test_lse_has_one_temperature(root: Path, given: list[str], temperature: float) -> None:
    result = run("--cohort", str(root), "--agg", "lse", *given)
    assert result.exit_code == 0, result.output
    facts = json.loads(Path("models/endtoend/model.json").read_text())
    assert facts["head"]["temperature"] == temperature
