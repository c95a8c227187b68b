"""`lymphfeat info`: what lies at a path, and whether it is whole."""

import json
import re
from pathlib import Path

import h5py
import pytest
from click.testing import CliRunner, Result

from lymphfeat.evaluation.run_provenance import RUN_FILES
from lymphfeat_cli.main import cli
from tests.folders import interrupt_swap, names_in, write
from tests.stores import made_up_cohort, open_writer, write_store
from tests.test_model import make_model


def info(path: Path | str, *options: str) -> Result:
    return CliRunner().invoke(cli, ["info", str(path), *options])


def refusal(path: Path | str, *options: str) -> str:
    result = info(path, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# --- stores --------------------------------------------------------------------------------------


def test_a_store(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5")
    told = json.loads(info(tmp_path / "s.h5", "--json").stdout)
    assert (told["kind"], told["whole"], told["verified"]) == ("feature store", True, False)
    assert (told["patients"], told["labelled"], told["images"]) == (3, 2, 7)
    assert told["features"] == ["frozen"]
    assert told["bytes"] == (tmp_path / "s.h5").stat().st_size
    lines = info(tmp_path / "s.h5").stdout.splitlines()
    assert "kind: feature store" in lines
    assert "  versions:" in lines
    assert "    torch: 2.0" in lines


def test_what_was_not_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_store(path)
    with h5py.File(path, "r+") as file:
        file["features/frozen"][2, 1] += 1
    assert "--verify also reads every feature map" in info(path).stderr
    assert info(path, "-q").stderr == ""
    wrong = f"{path}: /features/frozen, image 000.png of P1: map and pooled"
    assert wrong in refusal(path, "--verify")


def test_a_whole_store_is_verified(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5")
    result = info(tmp_path / "s.h5", "--verify", "--json")
    assert json.loads(result.stdout)["verified"] is True
    assert result.stderr == ""


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_store(path)
    path.write_bytes(path.read_bytes()[:4000])
    assert f"{path}: " in refusal(path)


def test_an_unfinished_store(tmp_path: Path) -> None:
    with open_writer(tmp_path / "s.h5", made_up_cohort()):
        pass
    assert "an unfinished one is beside it" in refusal(tmp_path / "s.h5")
    assert "is not complete; run the same" in refusal(tmp_path / "s.h5.partial")


# --- models and runs -----------------------------------------------------------------------------


def test_a_model(tmp_path: Path) -> None:
    make_model("topk").save(tmp_path / "model")
    told = json.loads(info(tmp_path / "model", "--json").stdout)
    assert (told["kind"], told["whole"]) == ("model", True)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert str(tmp_path / "model") in refusal(tmp_path / "model")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write(folder, "", *RUN_FILES)
    config = {"settings": {"seeds": 2}, "store": {"path": "s.h5"}}
    (folder / "config.json").write_text(json.dumps(config))
    summary = [
        {"head": "top1", "ba": 0.75, "ba_half_width": 0.3, "ba_low": 0.45, "ba_high": 1.0},
        {"head": "one split", "ba": 0.6, "ba_half_width": None, "ba_low": None, "ba_high": None},
        {"head": "old honest", "ba": 0.95, "ba_half_width": 0.1},
        {"head": "old report", "ba": 0.6, "ba_half_width": 0.1, "ba_half_width_corrected": 0.2},
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run(run: Path) -> None:
    told = json.loads(info(run, "--json").stdout)
    assert (told["kind"], told["whole"], told["store"]) == ("run", True, "s.h5")
    assert told["balanced accuracy"] == {
        "top1": "0.750 (0.450 to 1.000)",
        "one split": "0.600",
        "old honest": "0.950 (0.850 to 1.000)",
        "old report": "0.600 (0.400 to 0.800)",
    }
    (run / "epochs.csv").unlink()
    told = json.loads(info(run, "--json").stdout)
    assert (told["whole"], told["missing"]) == (False, ["epochs.csv"])


def test_a_run_whose_writer_was_killed_between_the_renames(run: Path) -> None:
    interrupt_swap(run)
    assert json.loads(info(run, "--json").stdout)["whole"]
    assert names_in(run.parent) == {"run"}


def test_an_unfinished_result(tmp_path: Path) -> None:
    write(tmp_path / "m.partial", "", "checkpoint.pt")
    assert "found an unfinished one, m.partial" in refusal(tmp_path / "m")
    told = json.loads(info(tmp_path / "m.partial", "--json").stdout)
    assert (told["kind"], told["whole"]) == ("unfinished result", False)
    assert (told["of"], told["checkpoints"]) == (str(tmp_path / "m"), ["checkpoint.pt"])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {}, "store": "s.h5"}'])
def test_a_damaged_run(run: Path, content: str) -> None:
    (run / "config.json").write_text(content)
    assert f"{run} is a damaged run (" in refusal(run)


# --- what it cannot name -------------------------------------------------------------------------


def test_nothing_of_ours(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "must be a feature store, a run or a model folder" in refusal(tmp_path / "gone")
    assert re.search(r"gone\.h5\) must be an existing file; make it", refusal(tmp_path / "gone.h5"))
    assert "notes.txt: is not a readable HDF5 file" in refusal(tmp_path / "notes.txt")
    assert "must hold model.json (a model) or config.json (a run); got nei" in refusal(tmp_path)


# --- weights -------------------------------------------------------------------------------------


def test_shipped_weights() -> None:
    told = json.loads(info("bloodcells", "--json").stdout)
    assert (told["kind"], told["whole"], told["trained_on"]) == ("weights", True, 0)
    assert told["recipe"]["backbone"] == "resnet18"


def test_weights_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"no")
    assert "cannot be read as weights" in refusal(tmp_path / "w.safetensors")
    assert "must be bloodcells, none, imagenet or an existing file" in refusal(
        tmp_path / "x.safetensors"
    )
