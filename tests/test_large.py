"""Large stores are read in little memory, and a process that works on holds no more and more.

`benchmarks/large.py` does the same at full size.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lymphfeat as lf
from lymphfeat.runtime.devices import give_back_freed_memory
from lymphfeat.runtime.part_reader import PartReader
from tests.long_runs import Held, settled, soak, write_sparse_store
from tests.tiny import write_red_cohort

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MB = 10**6
PEAKS = """
import sys
import lymphfeat as lf
from tests.long_runs import status_of

settings = lf.FitSettings(
    protocol="report", seeds=1, epochs=1, memory=0.1, device="cpu", precision="float32", threads=1
)
for path in sys.argv[1:]:
    lf.fit_heads(path, agg=("mean+std", "bnsigmoid"), settings=settings)
    print(status_of()["VmHWM"])
"""


def test_reading_in_parts_holds_no_file(tmp_path: Path) -> None:
    path, shape = tmp_path / "rows", (1000, 1 << 16)  # 256 MiB of a hole
    with path.open("wb") as file:
        file.truncate(4 * shape[0] * shape[1])
    values = np.memmap(path, np.float32, "r+", shape=shape)
    values[:, 5] = np.arange(1000)
    for mode in ("r", "r+"):
        reader = PartReader(np.memmap(path, np.float32, mode, shape=shape))
        before = Held.now()
        for start in range(0, 1000, 10):
            found = reader.read(slice(start, start + 10), slice(4, 7))
            reader.read(slice(start, start + 10))
            np.testing.assert_array_equal(found[:, 1], np.arange(start, start + 10))
        places = np.array([999, 3, 500])
        np.testing.assert_array_equal(reader.read(places)[:, 5], places)
        after = Held.now()
        assert after.rss - after.anonymous < before.rss - before.anonymous + 100 * MB
    assert (values[:, 5] == np.arange(1000)).all()


def test_a_private_copy_of_a_file_keeps_what_was_written(tmp_path: Path) -> None:
    np.zeros((2000, 1 << 14), np.float32).tofile(tmp_path / "rows")  # 131 MB
    copy = np.memmap(tmp_path / "rows", np.float32, "c", shape=(2000, 1 << 14))
    copy[0] = 1
    reader = PartReader(copy)
    for start in range(0, 2000, 100):
        reader.read(slice(start, start + 100))
    assert (copy[0] == 1).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_between_kept_blocks_is_given_back() -> None:
    blocks = [np.ones(100_000, np.uint8) for _ in range(2000)]
    kept = blocks[::20]
    del blocks
    before = Held.now().anonymous
    give_back_freed_memory()
    assert Held.now().anonymous < before - 150 * MB
    assert all(block.all() for block in kept)


@pytest.mark.seconds
def test_a_large_store_is_fitted_in_little_memory(tmp_path: Path) -> None:
    for name, patients in (("small", 8), ("large", 132)):  # 1.08 GB of maps
        write_sparse_store(tmp_path / f"{name}.h5", [500] * patients, empty=16)
    line = [sys.executable, "-c", PEAKS, "small.h5", "large.h5"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 500 * MB  # the system maps more or less around what is read


@pytest.mark.seconds
def test_going_on_and_on_leaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cohort = lf.Cohort.load(write_red_cohort(tmp_path / "red"))
    found = [settled() for _ in soak(cohort, tmp_path, 4)]
    for name in ("descriptors", "threads", "temporary"):
        assert len({getattr(held, name) for held in found[1:]}) == 1
    assert found[-1].anonymous - found[1].anonymous < 20 * MB
