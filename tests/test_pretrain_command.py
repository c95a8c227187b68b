"""`lymphfeat pretrain`, and the store of what it made."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lymphfeat.features.store import FeatureStore
from lymphfeat_cli.main import cli
from tests.tiny import SIDE, write_red_cohort

SMALL = [
    *("--backbone", "test_efficientnet", "--view-size", "32", "--field", str(SIDE)),
    *("--epochs", "2", "--batch-size", "4", "--threads", "1", "--device", "cpu"),
    *("--precision", "float32"),
]


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.mark.seconds
def test_a_store_of_pretrained_weights_names_the_patients_seen(tmp_path: Path) -> None:
    cohort = write_red_cohort(tmp_path / "cohort")
    weights = tmp_path / "mine.safetensors"
    result = run("pretrain", cohort, *SMALL, "--patient-pairs", "0.5", "--out", weights)
    assert result.exit_code == 0, result.output
    assert "30 images in 12 folder(s): patients" in result.stderr
    assert "Nearest cell from the same patient: " in result.stdout

    store = tmp_path / "f.h5"
    backbone = ["--backbone", "test_efficientnet", "--crop", SIDE, "--weights", weights]
    backbone += ["--precision", "float32"]
    result = run("extract", "--cohort", cohort, *backbone, "--out", store, "--threads", "1")
    assert result.exit_code == 0, result.output
    assert "12 of the 12 patients" in result.stderr
    opened = FeatureStore.open(store)
    assert sorted(opened.images_seen()) == sorted(opened.ids)
    assert opened.recipe["weights"] == "mine.safetensors"
    described = json.loads(run("info", store, "--json").stdout)
    assert described["pretrained_on"] == {"frozen": 12}


@pytest.mark.seconds
def test_json(tmp_path: Path) -> None:
    cohort = write_red_cohort(tmp_path / "cohort")
    result = run("pretrain", cohort, *SMALL, "--out", tmp_path / "w.safetensors", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [row["epoch"] for row in shown["curve"]] == [0, 1, 2]
    names = {str(tmp_path / f"w.{suffix}") for suffix in ("safetensors", "csv", "png")}
    assert set(shown["files"]) == names
    assert {str(path) for path in tmp_path.iterdir()} == names | {str(cohort)}


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    result = run("pretrain", tmp_path / "nowhere", "--out", tmp_path / "w.safetensors")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "must be a folder of images" in result.stderr
