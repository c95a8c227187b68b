"""`lymphfeat explain` as a user runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lymphfeat_cli.main import cli
from tests.folders import contents
from tests.test_model import make_model
from tests.tiny import SIDE, write_red_cohort


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model("topk").save("models/endtoend")
    return write_red_cohort(tmp_path / "red", "01010??", truth=True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["explain", "--threads", "1", "--device", "cpu", *arguments])


@pytest.mark.seconds
def test_page_and_figures(root: Path) -> None:
    truth = str(root / "truth.csv")
    result = run("--cohort", str(root), "--truth", truth, "--plates", "1")
    assert result.exit_code == 0, result.output
    assert "Deleting a patient's highest-scored cells" in result.stdout
    assert "Witness images: AUC" in result.stdout
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    figures = {path.name.split("-")[0] for path in Path("report-figures").iterdir()}
    assert figures == {
        *("cohort.png", "extremes.png", "grids.png", "deletion.png", "subgroups.png"),
        *("plate", "weights"),
    }
    again = run("--cohort", str(root))
    assert (again.exit_code, "report.html exists" in again.stderr) == (2, True)


def test_json(root: Path) -> None:
    result = run("--cohort", str(root), "--json", "--figures", "none", "--out", "r.html")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["patients"], told["files"]) == (7, ["r.html", "r-subgroups.csv"])
    assert told["subgroups"]["patients"] == "new"  # too few of any kind
    assert told["subgroups"]["groups"][0]["auc"] is None
    assert told["deletion"]["k"] == [1]
    assert not Path("r-figures").exists()


@pytest.mark.seconds
def test_page_and_figures_are_of_one_day(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["--cohort", str(root), "--out", "out/r.html", "--json"]
    Path("out").mkdir()
    first = run(*line, "--plates", "2")
    assert first.exit_code == 0, first.output
    before = contents(Path("out"))
    assert {f"out/{name}" for name in before} == set(json.loads(first.stdout)["files"])

    def crash(*arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lymphfeat.explanation.report.draw_weights", crash)
        assert run(*line, "--plates", "1", "--force").exit_code == 1
    assert contents(Path("out")) == before

    (Path("out") / "r-figures" / "notes.txt").write_text("keep")
    mixed = run(*line, "--force")
    assert (mixed.exit_code, "it holds notes.txt" in mixed.stderr) == (2, True)
    (Path("out") / "r-figures" / "notes.txt").unlink()
    for options in (["--plates", "1"], ["--figures", "none"]):
        again = run(*line, *options, "--force")
        assert again.exit_code == 0, again.output
        told = set(json.loads(again.stdout)["files"])
        assert told == {f"out/{name}" for name in contents(Path("out"))}


def test_figures_of_another_page_are_not_overwritten(root: Path) -> None:
    Path("report-figures").mkdir()
    (Path("report-figures") / "cohort.png").write_text("keep")
    refused = run("--cohort", str(root))
    assert (refused.exit_code, "report-figures" in refused.stderr) == (2, True)
    assert contents(Path("report-figures")) == {"cohort.png": b"keep"}
    assert not Path("report.html").exists()


@pytest.mark.seconds
def test_one_image_in_a_precision(auto_precision: str, root: Path) -> None:
    def logit(*arguments: str) -> float:
        result = run("--image", str(root / "P1" / "0.png"), "--json", "--force", *arguments)
        assert result.exit_code == 0, result.output
        return float(json.loads(result.stdout)["logit"])

    exact, rough = (logit("--precision", name) for name in ("float32", "bfloat16"))
    assert exact != rough
    assert logit() == exact
    assert logit("--precision", "auto") == (exact if auto_precision == "float32" else rough)


def test_a_page_in_a_precision(root: Path) -> None:
    for name in ("float32", "bfloat16"):
        line = ("--cohort", str(root), "--figures", "none", "--precision", name)
        result = run(*line, "--out", f"{name}.html")
        assert result.exit_code == 0, result.output
    assert run("--cohort", str(root), "--figures", "none").exit_code == 0
    assert Path("report.html").read_text() == Path("float32.html").read_text()
    assert Path("report.html").read_text() != Path("bfloat16.html").read_text()


def test_one_image(root: Path) -> None:
    image = str(root / "P1" / "0.png")
    result = run("--image", image, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert 0 < told["probability"] < 1
    assert Path("cell.png").stat().st_size > 1000
    wrong = run("--image", image, "--out", "cell.doc")
    assert (wrong.exit_code, "must end in one of .png" in wrong.stderr) == (2, True)


@pytest.mark.seconds
def test_a_head_on_how_cells_differ_from_training_to_page(root: Path) -> None:
    trained = CliRunner().invoke(
        cli,
        [
            *("endtoend", "--agg", "mean+std", "--cohort", str(root), "--out", "m"),
            *("--backbone", "test_efficientnet", "--crop", str(SIDE), "--epochs", "1"),
            *("--batch-size", "4", "--precision", "float32", "--threads", "1", "--device", "cpu"),
        ],
    )
    assert trained.exit_code == 0, trained.output
    result = run("--model", "m", "--cohort", str(root), "--plates", "5")
    assert result.exit_code == 0, result.output
    assert "The head looks at the average appearance of the cells and how much" in result.stdout
    assert list(Path("report-figures").glob("differences-*.png"))
    page = Path("report.html").read_text(encoding="utf-8")
    assert "differ from their average is evidence for" in page
    assert "NaN" not in page.split("<script>")[0]
    one = run("--model", "m", "--image", str(root / "P1" / "0.png"))
    assert (one.exit_code, "must score single cells to explain one image" in one.stderr) == (
        2,
        True,
    )
