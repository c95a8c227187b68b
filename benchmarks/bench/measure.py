"""Measuring: contestants in turn, functions by the clock, commands by the clock and by their words.

Threads are fixed: `Bench.threads` for what runs in this process, and by the environment for
processes. GPUs are hidden from both, and processes keep what they cache in the bench's own folder.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OURS, LIMIT = "lymphfeat", "limit"  # contestants; all others are what one would use instead
LYMPHFEAT = (sys.executable, "-m", "lymphfeat_cli")
ROOT = Path(__file__).parents[2]
_LEFT = re.compile(rb"about [\d.]+ (s|min|h) left")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to measure, and where: `folder` holds what is made for it, and is removed at the end."""

    folder: Path
    threads: int = 1
    repeats: int = 5
    patience: float = 300  # seconds of one line after which no further repeat begins
    stop: float = 1800  # seconds after which a command is stopped
    quick: bool = False  # whether sizes are tiny, to try the scripts

    def size(self, full: int, tiny: int) -> int:
        """Return a size, or the tiny one of a trial."""
        return tiny if self.quick else full

    def new(self, name: str) -> Path:
        """Return a path in the folder at which there is nothing yet."""
        stem, suffix = Path(name).stem, Path(name).suffix
        paths = (self.folder / f"{stem}-{number}{suffix}" for number in range(1_000_000))
        return next(path for path in paths if not path.exists())


def in_turn(
    bench: Bench, contestants: Mapping[str, Callable[[], float]], *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Measure every contestant once in every repeat; each returns its own figure.

    Before that each runs once to warm up, and is not counted. Every second repeat goes backwards,
    so that a machine that becomes slower favours nobody.
    """
    if warm_up:
        for measure in contestants.values():
            measure()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for repeat in range(bench.repeats):
        if repeat and time.perf_counter() - begin > bench.patience:
            break
        for name in list(contestants)[:: -1 if repeat % 2 else 1]:
            samples[name].append(contestants[name]())
    return samples


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A process that has ended: its seconds, and those until it first said how many are left."""

    seconds: float
    estimated: float | None = None
    stopped: bool = False


def run(bench: Bench, words: Sequence[object], *, folder: Path | None = None) -> Ran:
    """Run a process to its end, or stop it after `bench.stop` seconds; raises if it fails."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [str(word) for word in words],
        cwd=folder or bench.folder,
        env=environment(bench, folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        listener, stopped = _Listener(process, begin), threading.Event()

        def stop() -> None:
            stopped.set()
            process.kill()

        timer = threading.Timer(bench.stop, stop)
        timer.start()
        process.wait()
        seconds = time.perf_counter() - begin
        timer.cancel()
        listener.join()
    if process.returncode and not stopped.is_set():
        raise RuntimeError(f"{' '.join(map(str, words))} failed:\n{listener.said}")
    return Ran(seconds=seconds, estimated=listener.estimated, stopped=stopped.is_set())


class _Listener(threading.Thread):
    """Reads what a process says, so that it never waits, and when it first says what is left.

    That is, of its last stage that lasts: how long an earlier one takes is not what one asks.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", begin: float) -> None:
        super().__init__(daemon=True)
        self._process, self._begin = process, begin
        self.said, self._stage = "", b""
        self.estimated: float | None = None
        self.start()

    def run(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said += line.decode(errors="replace")
            title = line.split(b":")[0]  # of a stage
            if title != self._stage and _LEFT.search(line):
                self._stage, self.estimated = title, time.perf_counter() - self._begin


def seconds_to_run(bench: Bench, words: Sequence[object]) -> float:
    """Return how long a process takes from its start to its end."""
    return run(bench, words).seconds


def environment(bench: Bench, folder: Path | None = None) -> dict[str, str]:
    """Return the environment of a process: threads fixed, no GPU, no cohort, an empty cache.

    Processes of one folder share a cache.
    """
    kept = {name: value for name, value in os.environ.items() if "LYMPHFEAT" not in name}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(bench.threads))
    paths = [str(ROOT), str(ROOT / "cli"), kept.get("PYTHONPATH", "")]
    return {
        **kept,
        **threads,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUDA_VISIBLE_DEVICES": "",
        "XDG_CACHE_HOME": str(folder / ".cache" if folder else bench.new("hashes")),
    }


@contextmanager
def nothing_hashed(bench: Bench) -> Iterator[None]:
    """Let this process hash images as if for the first time."""
    name, before = "XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME")
    os.environ[name] = str(bench.new("hashes"))
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def peak_megabytes() -> float:
    """Return the most memory this process ever held.

    Linux's VmHWM begins with the process's program, unlike `ru_maxrss`, which is inherited.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
