"""Processes of the command line that start in no time: forks of one that has imported it all.

Each is a process of its own, with its own files and locks, which a signal ends as any other. They
only share the seconds that it takes to import torch.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CANNOT_MOUNT = 77  # the exit code of a process that could not mount anything

# A line of JSON per process to start; answers its id. A process that ends or stops is written to
# the file `state`.
SERVER = """
import ctypes, json, os, resource, select, signal, sys, threading, time
import lightly, sklearn.linear_model, sklearn.model_selection, torch._dynamo
import lymphfeat, lymphfeat.explanation.report, lymphfeat.pretraining.run, lymphfeat.reproduction
import lymphfeat.model.loading, lymphfeat.plots.comparison, lymphfeat.synthetic.cohort
from lymphfeat_cli import main

for name in lymphfeat.__all__:
    getattr(lymphfeat, name)
for name in main.COMMANDS:
    main.cli.get_command(None, name)

def count(asked):
    # Send a signal at the numbered change on the disk under a tree, or some time after it.
    seen, after = [0, False], asked["after"]
    def signal_now():
        time.sleep(asked["delay"])
        os.kill(os.getpid(), asked["signal"])
    def hook(event, arguments):
        changes = event.startswith(("os.", "shutil.")) or event == "open" and arguments[1] != "r"
        paths = [f"/{a}" for a in arguments]
        if not changes or not any(f"/{asked['tree']}" in path for path in paths):
            return
        if seen[1] or not after:
            seen[0] += 1
            if seen[0] == asked["change"]:
                if asked["delay"]:
                    threading.Thread(target=signal_now, daemon=True).start()
                else:
                    os.kill(os.getpid(), asked["signal"])
        seen[1] = seen[1] or any(after in path for path in paths)
    sys.addaudithook(hook)
    return seen

def mount(kind):
    # Over the folder `out`, for this process alone: a read-only view of it, or a full disk.
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts = 0x10000000, 0x00020000
    read_only, remount, bind, recursive, private = 1, 32, 4096, 16384, 1 << 18
    def must(result):
        if result:
            os._exit(77)
    user, group = os.getuid(), os.getgid()
    must(libc.unshare(new_mounts | (new_user if user else 0)))
    if user:  # without a name in the new space nobody can write
        same = "{0} {0} 1".format
        lines = {"setgroups": "deny", "uid_map": same(user), "gid_map": same(group)}
        for place, line in lines.items():
            with open(f"/proc/self/{place}", "w") as file:
                file.write(line)
    must(libc.mount(None, b"/", None, recursive | private, None))
    if kind == "read-only":
        must(libc.mount(b"out", b"out", None, bind, None))
        must(libc.mount(None, b"out", None, bind | remount | read_only, None))
    else:
        must(libc.mount(b"tmpfs", b"out", b"tmpfs", 0, b"size=4k"))
        with open("out/mine", "w") as file:
            file.write(4096 * "x")

def run(asked):
    os.chdir(asked["folder"])
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if asked["mount"]:
        mount(asked["mount"])
    if asked["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_size"],) * 2)
    seen, began = count(asked), time.monotonic()
    sys.argv = ["lymphfeat", *asked["arguments"]]
    try:
        main.main()
        return 0
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.stdout.flush()
        if asked["changes"]:
            with open(asked["changes"], "w") as file:
                file.write(f"{seen[0]} {time.monotonic() - began}")

states = {}

def say(child, state):
    with open(states[child] + ".new", "w") as file:
        file.write(state)
    os.rename(states[child] + ".new", states[child])

while True:
    if select.select([sys.stdin], [], [], 0.005)[0]:
        line = sys.stdin.readline()
        if not line:
            break
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run(asked)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        states[child] = asked["state"]
        print(child, flush=True)
    while states:
        child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if not child:
            break
        if os.WIFSTOPPED(status):
            say(child, "stopped")
        else:
            say(child, str(os.waitstatus_to_exitcode(status)))
            del states[child]
"""


@dataclass(frozen=True)
class Forked:
    """A process: its id, and the folder in which its output and its state are."""

    pid: int
    log: Path

    def state(self) -> str:
        """Return `running`, `stopped` or the exit code, negative for a signal."""
        path = self.log / "state"
        return path.read_text() if path.exists() else "running"

    def wait(self, *, stopped: bool = False, seconds: float = 240) -> int | None:
        """Wait for its end and return its exit code, or, with `stopped`, None once it stops."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            state = self.state()
            if state not in ("running", "stopped"):
                return int(state)
            if stopped and state == "stopped":
                return None
            time.sleep(0.002)
        raise TimeoutError(f"{self.pid} is {self.state()} after {seconds} s")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.state() in ("running", "stopped"):
            os.kill(self.pid, number)

    def go_on(self) -> None:
        """Let a stopped process go on."""
        (self.log / "state").unlink()
        os.kill(self.pid, signal.SIGCONT)

    @property
    def stderr(self) -> str:
        """What it has said on stderr."""
        return (self.log / "stderr").read_text(encoding="utf-8")

    @property
    def changes(self) -> int:
        """How many changes on the disk were counted; known if it was not killed."""
        return int((self.log / "changes").read_text().split()[0])

    @property
    def seconds(self) -> float:
        """How long it took; known if it was not killed."""
        return float((self.log / "changes").read_text().split()[1])


class Forks:
    """Starts processes."""

    def __init__(self, server: subprocess.Popen[str], logs: Path) -> None:
        """Take the process that forks, and a folder for what they say."""
        self._server, self._logs, self._number = server, logs, 0

    def start(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        tree: str = "out",
        sends: signal.Signals = signal.SIGKILL,
        change: int = 0,
        after: str = "",
        delay: float = 0.0,
        file_size: int = 0,
        mount: str = "",
    ) -> Forked:
        """Start a command in a folder.

        It gets a signal, `delay` seconds after the numbered `change` on the disk below `tree` (0:
        none), counted from the first path that contains `after`. `file_size` limits files, in
        bytes. `mount` is "read-only" or "full": what the disk at the folder `out` is.
        """
        self._number += 1
        log = self._logs / str(self._number)
        log.mkdir(parents=True)
        asked = {
            "folder": str(folder),
            "arguments": list(arguments),
            "tree": tree,
            "signal": int(sends),
            "change": change,
            "after": after,
            "delay": delay,
            "file_size": file_size,
            "mount": mount,
            **{name: str(log / name) for name in ("stdout", "stderr", "state", "changes")},
        }
        stdin, stdout = _pipes(self._server)
        stdin.write(json.dumps(asked) + "\n")
        stdin.flush()
        return Forked(int(stdout.readline()), log)


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


@contextmanager
def forking(logs: Path) -> Iterator[Forks]:
    """Start the process that forks, and end it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LYMPHFEAT_")}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Forks(server, logs)
        finally:
            _pipes(server)[0].close()
