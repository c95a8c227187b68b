"""`lymphfeat explain` as a user runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lymphfeat_cli.main import cli
from tests.test_model import make_model
from tests.tiny import one_thread as one_thread
from tests.tiny import write_red_cohort

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model("topk").save("models/endtoend")
    return write_red_cohort(tmp_path / "red", "01010??", truth=True)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["explain", "--threads", "1", "--device", "cpu", *arguments])


def test_page_and_figures(root: Path) -> None:
    truth = str(root / "truth.csv")
    result = run("--cohort", str(root), "--truth", truth, "--plates", "1")
    assert result.exit_code == 0, result.output
    assert "Deleting a patient's highest-scored cells" in result.stdout
    assert "Witness images: AUC" in result.stdout
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    figures = {path.name.split("-")[0] for path in Path("report-figures").iterdir()}
    assert figures == {
        *("cohort.png", "extremes.png", "grids.png", "deletion.png", "plate", "weights"),
    }
    again = run("--cohort", str(root))
    assert (again.exit_code, "report.html exists" in again.stderr) == (2, True)


def test_json(root: Path) -> None:
    result = run("--cohort", str(root), "--json", "--figures", "none", "--out", "r.html")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["patients"], told["files"]) == (7, ["r.html"])
    assert told["deletion"]["k"] == [1]
    assert not Path("r-figures").exists()


def test_one_image(root: Path) -> None:
    image = str(root / "P1" / "0.png")
    result = run("--image", image, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert 0 < told["probability"] < 1
    assert Path("cell.png").stat().st_size > 1000
    wrong = run("--image", image, "--out", "cell.doc")
    assert (wrong.exit_code, "must end in one of .png" in wrong.stderr) == (2, True)
