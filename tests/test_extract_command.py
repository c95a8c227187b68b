"""`lymphfeat extract` as a user runs it, and kills it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lymphfeat.features.store import FeatureStore
from lymphfeat_cli.main import cli
from tests.cohorts import write_bags, write_own
from tests.test_extract import BAGS, SIDE, write_cells
from tests.test_extract import written as written

ROOT = Path(__file__).parent.parent
FAST = ["--backbone", "test_resnet", "--crop", "48", "--device", "cpu", "--threads", "1"]
FAST += ["--precision", "float32"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LYMPHFEAT_COHORT", raising=False)
    monkeypatch.delenv("LYMPHFEAT_CACHE", raising=False)
    return write_cells(tmp_path / "cells")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["extract", *FAST, *arguments])


def test_writes_where_it_says(root: Path) -> None:
    result = run("--cohort", str(root), "--views", "2")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout == (
        "cache/features.h5: 9 images of 3 patients, 2 view(s) of 96×2×2 "
        "(test_resnet, weights none, float32)\n"
    )
    FeatureStore.open("cache/features.h5").verify()


def test_places_from_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYMPHFEAT_COHORT", str(root))
    monkeypatch.setenv("LYMPHFEAT_CACHE", "elsewhere")
    result = run("--json", "--normalization", "challenge", "--seed", "3")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["path"] == "elsewhere/features.h5"
    assert told["shape"] == {"views": 1, "channels": 96, "height": 2, "width": 2}
    assert (told["patients"], told["labelled"], told["images"]) == (3, 2, sum(BAGS.values()))
    assert told["recipe"]["normalization"]["name"] == "challenge"
    assert run("--json", "--out", "zero.h5").exit_code == 0
    zero = FeatureStore.open("zero.h5").recipe
    assert zero["weights_sha256"] != told["recipe"]["weights_sha256"]  # --seed 3 made others


def test_another_recipe_needs_force(root: Path) -> None:
    line = ["--cohort", str(root), "--out", "s.h5"]
    assert run(*line).exit_code == 0
    before = Path("s.h5").read_bytes()
    refused = run(*line, "--output-stride", "8")
    assert refused.exit_code == 2
    assert (
        "Error: s.h5 already holds a store with a different recipe: output_stride is None"
        in refused.stderr
    )
    assert "--force" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert Path("s.h5").read_bytes() == before
    forced = run(*line, "--output-stride", "8", "--force")
    assert forced.exit_code == 0, forced.output
    assert "96×6×6" in forced.stdout


def test_a_store_made_in_other_batches_or_by_other_threads_is_reused(root: Path) -> None:
    line = ["--cohort", str(root), "--out", "s.h5"]
    assert run(*line, "--batch-size", "2", "--threads", "1").exit_code == 0
    before = Path("s.h5").read_bytes()
    reused = run(*line, "--batch-size", "3", "--threads", "2")
    assert reused.exit_code == 0, reused.output
    assert "s.h5 is reused although batch_size is 2 there, 3 now." in reused.stderr
    assert Path("s.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cohort", "nowhere"], "cohort folder nowhere does not exist"),
        (["--backbone", "resnet81"], "backbone (=resnet81) must be a timm model; did you mean"),
        (
            ["--weights", "gone.pth"],
            "weights (=gone.pth) must be bloodcells, none, imagenet or",
        ),
        (["--crop", "100"], "size (=53x53) must be at least the crop (=100)"),
        (["--out", "cells/cohort.csv"], "cells/cohort.csv: is not a readable HDF5 file"),
    ],
)
def test_mistakes_are_one_line(root: Path, arguments: list[str], message: str) -> None:
    table = (root / "cohort.csv").read_bytes()
    result = run("--cohort", str(root), *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert (root / "cohort.csv").read_bytes() == table


def test_a_place_that_cannot_be_written_fails_in_one_line(root: Path) -> None:
    Path("file").touch()
    result = run("--cohort", str(root), "--out", "file/s.h5")
    assert result.exit_code == 2
    assert re.fullmatch(r"Error: file: cannot be written \(.*\); choose .*\n", result.stderr)


@pytest.mark.seconds
def test_survives_kill_9(tmp_path: Path, written: list[int]) -> None:
    total, batch_size = 121, 2
    write_own(tmp_path / "cells", "id,label", "P1,0", "P2,1", "P3,", bags={})
    write_bags(tmp_path / "cells", {"P1": 70, "P2": 1, "P3": total - 71}, side=SIDE)
    line = ["extract", "--cohort", str(tmp_path / "cells"), *FAST, "--backbone", "resnet10t"]
    line += ["--batch-size", str(batch_size), "--out"]
    out, whole = tmp_path / "killed" / "s.h5", tmp_path / "whole.h5"
    journal = out.with_name("s.h5.journal")
    process = subprocess.Popen(
        [sys.executable, "-m", "lymphfeat_cli", *line, str(out)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
    )
    limit = time.monotonic() + 90
    while not journal.exists() or journal.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = journal.read_bytes().count(b"\n") - 1
    assert finished >= 5
    assert not out.exists()
    info = CliRunner().invoke(cli, ["info", str(out)])
    assert info.exit_code == 2
    assert "run the same `lymphfeat extract` again" in info.stderr

    result = CliRunner().invoke(cli, [*line, str(out)])
    assert result.exit_code == 0, result.output
    assert written == list(range(2 * finished, total, 2))
    assert [path.name for path in out.parent.iterdir()] == ["s.h5"]
    assert CliRunner().invoke(cli, [*line, str(whole)]).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
