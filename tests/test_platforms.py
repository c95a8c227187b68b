"""What Windows and macOS lack is not needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Other packages look after themselves; only ours must do without.
WITHOUT = """
import importlib, math, os, pkgutil, sys
from pathlib import Path
import filelock, h5py, numpy, pandas, PIL.Image, platformdirs
if sys.argv[1] == "all":
    import click, jinja2, lightly, matplotlib.pyplot, rich.console, safetensors.torch, scipy.stats
    import sklearn.model_selection, timm, torch

for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("posix_fallocate", "sysconf", "getuid", "sched_getaffinity", "fork", "mkfifo"):
    delattr(os, name)
"""


def run(script: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT + script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.seconds
def test_every_module_works_without_what_only_posix_has() -> None:
    script = """
import lymphfeat, lymphfeat_cli

names = [
    found.name
    for package in (lymphfeat, lymphfeat_cli)
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not found.name.endswith("__main__")
]
assert len(names) > 60, names
for name in names:
    importlib.import_module(name)

from lymphfeat.runtime import devices
from lymphfeat.finetuning import pixels
from lymphfeat.errors import OutputError

device = torch.device("cpu")
assert devices.available_memory(device) > 0
assert math.isnan(devices.peak_memory(device))
devices.Path = lambda *_: Path("nowhere")  # no /proc
assert devices.available_memory(device, groups=Path("nowhere")) == 4 << 30

pixels.available_memory = lambda device: 0
mapped = pixels._make_room((4, 3, 8, 8))
assert isinstance(mapped, numpy.memmap) and mapped.shape == (4, 3, 8, 8)
mapped[:] = 7
try:
    pixels._make_room((2**40, 3, 112, 112))
except OutputError as error:
    assert "fit neither in memory nor in the temporary folder" in str(error)
else:
    raise AssertionError("an exabyte")
"""
    run(script, "all")


@pytest.mark.seconds
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_store_is_written_as_windows_wants_it(tmp_path: Path) -> None:
    """It opens no folder, syncs no file opened for reading, and moves or removes no open file."""
    script = """
from tests.stores import write_store

def open_files(path, *rest, how=os.open):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return how(path, *rest)

def sync(descriptor):
    os.write(descriptor, b"")  # fails if opened for reading

def refuse(how):
    def act(path, *rest, **more):
        if sys._getframe(1).f_globals["__name__"].startswith("filelock"):
            return how(path, *rest, **more)  # it has a way of its own on Windows
        numbers = os.listdir("/proc/self/fd")
        opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in numbers]
        if str(path) in opened or str(path) in Path("/proc/self/maps").read_text():
            raise PermissionError(13, "Permission denied", str(path))
        return how(path, *rest, **more)
    return act

os.open, os.fsync = open_files, sync
Path.replace, Path.unlink = refuse(Path.replace), refuse(Path.unlink)
write_store(Path(sys.argv[2]) / "s.h5").verify()
left = set(os.listdir(sys.argv[2]))
assert left == {"s.h5", "s.h5.lock"}, left  # there FileLock itself removes the lock
"""
    run(script, "store", str(tmp_path))
