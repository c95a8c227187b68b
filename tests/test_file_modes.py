"""Every file is readable by those whom the umask allows, whatever wrote it."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lymphfeat.cohort.provenance import NOBODY
from lymphfeat.features.backbones import build_backbone, write_weights
from lymphfeat.fitting import fit_heads
from lymphfeat.runtime.checkpoint import Checkpoint
from lymphfeat.runtime.files import replace_file
from lymphfeat.settings import FitSettings, HeadSettings
from tests.stores import made_up_cohort, write_store
from tests.test_model import make_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="files have no modes there")


@pytest.fixture(params=[0o022, 0o007])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set a umask; give the mode of files by it."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


def test_weights(tmp_path: Path, mode: int) -> None:
    backbone, _ = build_backbone("test_efficientnet", weights="none", image_size=64)
    write_weights(backbone, tmp_path / "w.safetensors", {})
    assert modes(tmp_path) == {"w.safetensors": mode}


def test_model_and_checkpoint(tmp_path: Path, mode: int) -> None:
    make_model().save(tmp_path)
    Checkpoint(tmp_path / "checkpoint.pt", {}, NOBODY.to_json()).write({"epoch": 1}, last=True)
    names = ("model.safetensors", "model.json", "checkpoint.pt")
    assert modes(tmp_path) == dict.fromkeys(names, mode)


@pytest.mark.seconds
def test_store_and_heads(tmp_path: Path, mode: int) -> None:
    store = write_store(tmp_path / "s.h5", made_up_cohort((2,) * 24))
    settings = FitSettings(protocol="report", seeds=1, epochs=1, threads=1, device="cpu")
    run = fit_heads(store, [HeadSettings(agg="mean")], settings, tmp_path / "run", save=True)
    assert tmp_path / "run" / "heads.safetensors" in run.files
    assert set(modes(tmp_path).values()) == {mode}, modes(tmp_path)


def test_what_a_killed_process_left_does_not_decide(tmp_path: Path, mode: int) -> None:
    unfinished = tmp_path / "f.partial"
    unfinished.touch(0o600)
    replace_file(tmp_path / "f", lambda path: path.write_text("whole"))
    assert modes(tmp_path) == {"f": mode}
