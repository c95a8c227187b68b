"""Progress in a log file: what the lines say, and when they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lymphfeat_cli import progress_lines
from lymphfeat_cli.progress_lines import ProgressLine
from tests.test_extract import write_cells

ROOT = Path(__file__).parents[1]

WORK = """
import os, sys, time
from lymphfeat_cli import progress_lines
from lymphfeat_cli.options import progress_bar
progress_lines.FIRST_SECONDS = progress_lines.EVERY_SECONDS = 0.05
with progress_bar("extracting", quiet=sys.argv[1] == "-q") as progress:
    time.sleep(0.2)  # nothing is reported yet
    progress(0, 4, "decoding")
    for done in range(1, 4):
        time.sleep(0.2)
        progress(done, 4, "84 images/s")
    time.sleep(0.2)
time.sleep(0.2)  # after the end
"""

COMMAND = """
import sys
from lymphfeat_cli import progress_lines
from lymphfeat_cli.main import main
progress_lines.FIRST_SECONDS = 0.0
sys.argv[0] = "lymphfeat"
main()
"""


def log_of(script: str, log: Path, *arguments: str, rank: int = 0) -> list[str]:
    """Run a script with stderr in a file; return its lines."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}", "RANK": str(rank)}
    with log.open("w") as stderr:
        line = [sys.executable, "-c", script, *arguments]
        subprocess.run(line, env=environment, stderr=stderr, check=True, timeout=120)
    return log.read_text().splitlines()


def test_what_a_line_says() -> None:
    now = 0.0
    line = ProgressLine("extracting", clock=lambda: now)
    assert str(line) == "extracting: started"
    now = 100.0  # weights are loaded: not the pace of the work
    line(0, 13453)
    assert str(line) == "extracting: 0 of 13453 (0 %)"
    now += 12
    line(1200, 13453, "100 images/s")
    assert str(line) == "extracting: 1200 of 13453 (8 %), 100 images/s, about 2 min left"
    now += 100
    line(12000, 13453, "107 images/s")
    assert str(line) == "extracting: 12000 of 13453 (89 %), 107 images/s, about 14 s left"
    line(13453, 13453, "107 images/s")
    assert str(line) == "extracting: 13453 of 13453 (100 %), 107 images/s"


def test_resumed_and_later_work_has_its_own_pace() -> None:
    now = 0.0
    line = ProgressLine("training", clock=lambda: now)
    line(900, 1000)  # 900 were there before
    now = 60.0
    line(910, 1000)
    assert str(line) == "training: 910 of 1000 (91 %), about 9 min left"
    line(0, 50, "epoch 1/2")
    assert str(line) == "training: 0 of 50 (0 %), epoch 1/2"
    now += 600
    line(1, 50, "epoch 1/2")
    assert str(line) == "training: 1 of 50 (2 %), epoch 1/2, about 8.2 h left"


def test_long_work_says_at_once_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_lines, "FIRST_SECONDS", 5.0)
    now = 0.0
    line = ProgressLine("training", clock=lambda: now)
    for done in range(30):  # decoding takes 15 s
        line(done, 30, "decoding")
        now += 0.5
    assert capsys.readouterr().err == ""
    line(0, 100, "epoch 1/10")
    now += 2  # too early to tell
    line(1, 100, "epoch 1/10")
    assert capsys.readouterr().err == ""
    for done in (2, 3, 4, 5):
        now += 2
        line(done, 100, "epoch 1/10")
    said = "training: 3 of 100 (3 %), epoch 1/10, about 3 min left\n"
    assert capsys.readouterr().err == said  # once


@pytest.mark.seconds
def test_a_log_gets_lines_until_the_end(tmp_path: Path) -> None:
    lines = log_of(WORK, tmp_path / "log", "")
    assert lines[0] == "extracting: started"
    assert any(line == "extracting: 0 of 4 (0 %), decoding" for line in lines)
    last = r"extracting: 3 of 4 \(75 %\), 84 images/s, about \d s left"
    assert re.fullmatch(last, lines[-1])
    assert 4 <= len(lines) <= 60


@pytest.mark.seconds
def test_none_when_quiet_and_none_of_the_other_processes(tmp_path: Path) -> None:
    assert log_of(WORK, tmp_path / "log", "-q") == []
    assert log_of(WORK, tmp_path / "log", "", rank=1) == []


@pytest.mark.seconds
def test_a_command_says_where_it_is(tmp_path: Path) -> None:
    cohort = write_cells(tmp_path / "cells")
    tiny = ("--backbone", "test_resnet", "--crop", "48", "--device", "cpu")
    arguments = ("extract", "--cohort", str(cohort), *tiny, "--precision", "float32")
    out = ("--out", str(tmp_path / "s.h5"))
    assert log_of(COMMAND, tmp_path / "log", *arguments, *out)[0].startswith("extracting: ")
    assert log_of(COMMAND, tmp_path / "log", *arguments, *out, "--force", "-q") == []
