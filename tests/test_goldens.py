"""What earlier versions wrote stays readable, and means the same."""

import json
from pathlib import Path

import pandas as pd
import pytest
from scipy.special import expit

from tests.goldens import BACKBONE, DATA, MACHINE, VERSIONS, run, write_goldens

each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.mark.slow
def test_what_is_written_now_is_kept(tmp_path: Path) -> None:
    """Another format, or a file less, needs a folder of its own: see tests/goldens.py."""
    write_goldens(tmp_path / "now")
    now, then = formats(tmp_path / "now"), formats(DATA / VERSIONS[-1])
    assert then.items() <= now.items()
    assert now.keys() - then.keys() == {"model/training.json", "members/training.json"}


def formats(folder: Path) -> dict[str, list[str]]:
    """Return the files under a folder, and those lines of the JSON files that name a format."""
    return {
        path.relative_to(folder).as_posix(): [
            line.strip()
            for line in (path.read_text("utf-8").splitlines() if path.suffix == ".json" else ())
            if line.strip().startswith('"format')
        ]
        for path in folder.rglob("*")
        if path.is_file()
    }


@each_version
@pytest.mark.parametrize("name", ["model", "members", "final"])
def test_models_predict_the_same(version: str, name: str, tmp_path: Path) -> None:
    model, cohort = DATA / version / name, DATA / version / "cohort"
    out = {"predictions.csv": tmp_path / "p.csv", "images.csv": tmp_path / "i.csv"}
    files = ["--out", str(out["predictions.csv"]), "--images-out", str(out["images.csv"])]
    run("predict", "--model", str(model), "--cohort", str(cohort), *files, *MACHINE)
    for golden, written in out.items():
        expected, found = pd.read_csv(model / golden), pd.read_csv(written)
        if "logit" in expected:  # v0.1.0 wrote the mean of the members' probabilities
            expected["probability"] = expit(expected["logit"])
        # All but what only a training knows: which patients it measures, and out of fold.
        other = ("split", "out_of_fold")
        columns = [name for name in map(str, expected) if not name.startswith(other)]
        assert {"probability"} < set(columns)
        pd.testing.assert_frame_equal(found[columns], expected[columns], rtol=1e-3, atol=1e-4)


@each_version
def test_runs_are_compared(version: str, tmp_path: Path) -> None:
    """Against plain means of the differences in the run's own table."""
    folder = DATA / version / "run"
    reference = ["--against", "bag size", "--out", str(tmp_path / "comparison.png")]
    result = run("compare --metric auc --json", *reference, str(folder))
    pairs = json.loads(result.stdout)["pairs"]
    table = pd.read_csv(folder / "runs.csv").pivot(index="split", columns="head", values="auc")
    expected = table.drop(columns="bag size").sub(table["bag size"], axis=0).mean()
    assert {pair["name"]: pair["difference"] for pair in pairs} == pytest.approx(expected.to_dict())


@each_version
@pytest.mark.parametrize("name", ["model", "members", "run", "final", "weights.safetensors"])
def test_results_are_described(version: str, name: str) -> None:
    found = json.loads(run("info --json", str(DATA / version / name)).stdout)
    assert found["whole"] is True


@each_version
def test_a_training_starts_from_weights_and_heads(version: str, tmp_path: Path) -> None:
    folder = DATA / version
    start = ["--weights", str(folder / "weights.safetensors"), "--init-head", str(folder / "run")]
    place = ["--cohort", str(folder / "cohort"), "--out", str(tmp_path / "model")]
    run("endtoend --epochs 1", *start, *place, *BACKBONE, *MACHINE)
