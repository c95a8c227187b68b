"""What a disk refuses is one line, whichever library met it."""

import errno
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from lymphfeat.errors import LymphfeatError, OutputError, StoreError
from lymphfeat.runtime.disks import disk_error, require_room, writing

FULL = Path("/dev/full")


def test_each_library_says_it_in_its_own_way(tmp_path: Path) -> None:
    if not FULL.exists():
        pytest.skip("there is no /dev/full")
    full = r"^a: cannot be written \(No space left on device\);"
    with pytest.raises(OutputError, match=full), writing(Path("a")):
        FULL.write_text("text")
    hdf5 = RuntimeError("Problems closing file (file write failed: time = x, errno = 28, buf = 0)")
    rust = RuntimeError("I/O error: No space left on device (os error 28)")
    for error in (hdf5, rust):
        assert "make room, then run the same line again" in str(disk_error(error, Path("a")))


def test_safetensors_and_hdf5_name_a_closed_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "x"
    for write in (lambda: save_file({"a": np.zeros(1)}, below), lambda: h5py.File(below, "w")):
        closed = r"file.* \(Not a directory\); choose another --out"
        with pytest.raises(OutputError, match=closed), writing(below):
            write()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("errno"),
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
        PermissionError(errno.EACCES, "Permission denied", "elsewhere/image.png"),
        RuntimeError("CUDA error 28"),
    ],
)
def test_other_errors_are_none_of_its_business(error: Exception) -> None:
    assert disk_error(error, Path("out/a")) is None
    with pytest.raises(type(error)) as caught, writing(Path("out/a")):
        raise error
    assert caught.value is error


def test_a_message_is_not_replaced_by_another(tmp_path: Path) -> None:
    mistake = StoreError("a.h5: is damaged (Errno 28)")
    with pytest.raises(LymphfeatError) as caught, writing(tmp_path):
        raise mistake
    assert caught.value is mistake


@pytest.mark.parametrize("file", ["out/a.csv", "out/a.csv.partial", "out", "."])
def test_what_is_next_to_a_result_or_above_it(file: str) -> None:
    refused = disk_error(PermissionError(errno.EACCES, "denied", file), Path("out/a.csv"))
    assert str(refused) == (
        f"{file}: cannot be written (Permission denied); choose another --out, or make its folder "
        "writable."
    )


def test_room_is_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 2_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    require_room(tmp_path / "s.h5", 2_000_000)
    with pytest.raises(OutputError, match=r"it takes 3\.0 MB, of which 2\.0 are free\); make room"):
        require_room(tmp_path / "s.h5", 3_000_000)
