"""Whether damaged and hostile files are refused in one line, at once, and without much memory.

python benchmarks/fuzz.py [TARGET …] [--executions 100000] [--start 0] [--seed 0] [--keep FOLDER]

Each execution spoils a valid file (`tests/hostile.py`) and reads it, in a process of its own that
may crash or hang. A failure is any exception but LymphfeatError, a message of several lines, a
crash, more than 5 s of the processor, or more than 64 MiB of new memory: the peak of the execution
beyond what the process held before (on Linux). Failing inputs are written to FOLDER.

A target that is stopped (Ctrl-C, SIGTERM) prints the line of what was done. An execution is known
by its number, so --start goes on behind those.
"""

import argparse
import hashlib
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from tests.hostile import TARGETS, Target, refusal, spoil
from tests.memory import peak, reset_peak

SECONDS = 5.0  # of the processor, in an execution
GROWTH = 64  # MiB of new memory in an execution
ADDRESSES = 8 * 2**30  # bytes of address space beside what is loaded: spares the machine
_STATE = struct.Struct("<qqqdddd")  # index, refused, accepted, slowest, cpu, growth, started
_KEPT = 3  # inputs of a kind of failure
_INPUT, _FAILURES = "input", "failures"


class TooSlow(BaseException):
    """An execution took too long; nothing may catch it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(
        "target     executions  refused  accepted  failures  slowest s   new MiB   CPU s",
        flush=True,
    )
    for name in options.targets or TARGETS:
        run = Run(TARGETS[name], options.start, options.seed, options.keep / name)
        with suppress(KeyboardInterrupt):
            run.run(options.executions)
        print(run.line(), flush=True)
        for kind, count in run.failures.most_common():
            print(f"    {count:6d} × {kind}", flush=True)


class Run:
    """The executions of a target."""

    def __init__(self, target: Target, start: int, seed: int, keep: Path) -> None:
        self.target, self.start, self.seed, self.keep = target, start, seed, keep
        self.valid = list(target.valid())
        self.failures: Counter[str] = Counter()
        self._shared = mmap.mmap(-1, _STATE.size)
        self._put(start, 0, 0, 0.0, 0.0, 0.0, 0.0)

    def _put(self, *state: float) -> None:
        _STATE.pack_into(self._shared, 0, *state)

    def _get(self) -> tuple[int, int, int, float, float, float, float]:
        found: tuple[int, int, int, float, float, float, float] = _STATE.unpack_from(self._shared)
        return found

    def line(self) -> str:
        index, refused, accepted, slowest, cpu, growth, _ = self._get()
        failures, done = sum(self.failures.values()), index - self.start
        return (
            f"{self.target.name:10} {done:10d} {refused:8d} {accepted:9d} {failures:9d} "
            f"{slowest:10.2f} {growth:9.1f} {cpu:6.0f}"
        )

    def run(self, executions: int) -> None:
        """Execute in processes, a new one after each that ended early."""
        with tempfile.TemporaryDirectory(dir=_fast()) as folder:
            try:
                self._execute(self.start + executions, Path(folder))
            finally:
                failures = Path(folder, _FAILURES)
                if failures.exists():
                    self.failures.update(failures.read_text(encoding="utf-8").splitlines())

    def _execute(self, end: int, folder: Path) -> None:
        while self._get()[0] < end:
            child = os.fork()
            if child == 0:
                self._work(end, folder)
            try:
                why = self._watch(child)
            except KeyboardInterrupt:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise
            if why:
                self.failures[why] += 1
                self._fail((folder / _INPUT).read_bytes(), why)
                index, *state, _ = self._get()
                self._put(index + 1, *state, 0.0)

    def _watch(self, child: int) -> str:
        """Wait for a process; return why it ended early, if it did."""
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "" if status == 0 else f"ended by signal or code {status}"
            started = self._get()[-1]
            if started and _cpu_of(child) - started > 3 * SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"hung for {3 * SECONDS:.0f} s in a library"
            time.sleep(0.05)

    def _work(self, end: int, folder: Path) -> None:
        """Execute until all are done, in this process, and end it."""
        _prepare()
        (folder / "work").mkdir(exist_ok=True)
        while (state := self._get())[0] < end:
            self._step(folder, *state[:-1])
        os._exit(0)

    def _step(
        self,
        folder: Path,
        index: int,
        refused: int,
        accepted: int,
        slowest: float,
        cpu: float,
        growth: float,
    ) -> None:
        clock = time.process_time()
        rng = random.Random(f"{self.target.name} {self.seed} {index}")
        data = spoil(self.target, self.valid, rng)
        (folder / _INPUT).write_bytes(data)  # known, should this process end
        begun, before = time.process_time(), reset_peak()
        self._put(index, refused, accepted, slowest, cpu, growth, begun)
        why = execute(self.target, data, folder / "work")
        took, new = time.process_time() - begun, peak() - before
        if new > GROWTH and why in ("", "refused"):
            why = f"more than {GROWTH} MiB of new memory"
        if why not in ("", "refused"):
            self._fail(data, why)
            with (folder / _FAILURES).open("a", encoding="utf-8") as file:
                file.write(f"{why}\n")
        refused, accepted = refused + (why == "refused"), accepted + (why == "")
        cpu += time.process_time() - clock
        self._put(index + 1, refused, accepted, max(slowest, took), cpu, max(growth, new), 0)

    def _fail(self, data: bytes, why: str) -> None:
        """Keep an input that failed, unless there are enough of its kind."""
        kind = hashlib.sha256(why.encode()).hexdigest()[:8]
        self.keep.mkdir(parents=True, exist_ok=True)
        if len(list(self.keep.glob(f"{kind}-*.bin"))) < _KEPT:
            name = f"{kind}-{hashlib.sha256(data).hexdigest()[:8]}"
            (self.keep / f"{name}.bin").write_bytes(data)
            (self.keep / f"{name}.txt").write_text(why, encoding="utf-8")


def execute(target: Target, data: bytes, folder: Path) -> str:
    """Read an input; return nothing if it was accepted, `refused`, or what went wrong."""
    try:
        with _limited():
            text = refusal(target, data, folder)
    except TooSlow as error:
        return f"slow {_where(error)}"
    except Exception as error:
        return f"{type(error).__name__} {_where(error)}"
    finally:
        _empty(folder)
    lines = 0 if text is None else len(text.splitlines())
    return ("", "refused")[lines] if lines < 2 else "several lines"


def _where(error: BaseException) -> str:
    """Return the last lines of the library that an error came through."""
    frames = [
        f"{Path(frame.filename).name}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "lymphfeat" in Path(frame.filename).parts or "lymphfeat_cli" in frame.filename
    ]
    return " > ".join(frames[-2:])


@contextmanager
def _limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _prepare() -> None:
    def alarm(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process sees to it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _cpu_of(process: int) -> float:
    """Return the seconds of the processor that another process has used."""
    parts = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def _fast() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
