"""Commands that are killed at some moments, and what is then on the disk."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Literal

from tests.commands import Command
from tests.folders import contents
from tests.forks import Forked, Forks

Contents = dict[str, bytes]
When = Literal["before", "during", "end"]


@dataclass(frozen=True)
class Undisturbed:
    """What a command writes when nothing happens, and its other result."""

    whole: Contents
    old: Contents
    changes: int  # on the disk, of which some are only openings of a file
    seconds: float


@dataclass(frozen=True)
class Kill:
    """When a process is killed: at a change on the disk and some time after it, or by the clock."""

    change: int = 0  # 0: by the clock
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """What became of a command that was killed."""

    moments: tuple[When, ...]  # of the kills that came before it was done
    unfinished: tuple[str, ...]  # files under their final names that are neither old nor new
    refused: bool  # by a lock, when it was run again
    differs: tuple[str, ...]  # in the end: files with other bytes, or too many, or too few
    said: str  # by the last run, if it failed

    @property
    def same(self) -> bool:
        """Whether the result is the undisturbed one, byte for byte, and nothing else is left."""
        return not self.differs and not self.said


def is_final(path: str) -> bool:
    """Return whether a path in `out` is one that others read."""
    names = path.split("/")
    beside = (".partial", ".journal", ".lock", ".part")
    return not any(name.endswith(beside) for name in names)


def final(folder: Path) -> Contents:
    """Return what is in `out` under its final name."""
    return {path: text for path, text in contents(folder / "out").items() if is_final(path)}


def kill_and_finish(
    forks: Forks,
    folder: Path,
    command: Command,
    undisturbed: Undisturbed,
    kills: Sequence[Kill],
    *,
    over_old: bool = False,
) -> Trial:
    """Kill a command once for each of `kills`, in new processes, then let it finish.

    With `over_old` its other result is there and is overwritten by --force.
    """
    (folder / "out").mkdir(parents=True)
    for path, text in undisturbed.old.items() if over_old else ():
        (folder / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "out" / path).write_bytes(text)
    arguments = (*command.arguments, *(["--force"] if over_old else []))
    moments: list[When] = []
    unfinished: list[str] = []
    for kill in kills:
        process = _start(forks, folder, arguments, kill)
        code = process.wait()
        assert code in (0, 2, -SIGKILL), process.stderr
        if code == -SIGKILL:
            moments.append(_moment(folder, kill, undisturbed))
        for path, text in final(folder).items():
            if text not in (undisturbed.whole.get(path), over_old and undisturbed.old.get(path)):
                unfinished.append(path)
    last = forks.start(folder, arguments)
    code, said = last.wait(), last.stderr
    done = code == 0 or (code == 2 and ("already holds" in said or "exists; choose" in said))
    found, whole = contents(folder / "out"), undisturbed.whole
    differs = sorted(path for path in found | whole if found.get(path) != whole.get(path))
    shutil.rmtree(folder)
    return Trial(
        moments=tuple(moments),
        unfinished=tuple(unfinished),
        refused="another process" in said,
        differs=tuple(differs),
        said="" if done else said,
    )


def _start(forks: Forks, folder: Path, arguments: Sequence[str], kill: Kill) -> Forked:
    if kill.change:
        return forks.start(folder, arguments, change=kill.change, delay=kill.seconds)
    process = forks.start(folder, arguments)
    try:
        process.wait(seconds=kill.seconds)
    except TimeoutError:
        process.send(SIGKILL)
    return process


def _moment(folder: Path, kill: Kill, undisturbed: Undisturbed) -> When:
    there = [path.name for path in (folder / "out").rglob("*")]
    late = kill.change > 0.9 * undisturbed.changes
    late = late or (not kill.change and kill.seconds > 0.9 * undisturbed.seconds)
    if late or "swap.json" in there:
        return "end"
    worked = any(name.endswith((".partial", ".journal", ".lock")) for name in there)
    return "during" if worked else "before"


def undisturbed(
    forks: Forks, folder: Path, command: Command, *, with_old: bool = True
) -> Undisturbed:
    """Run a command to its end, and, `with_old`, its other one."""
    whole, process = _run(forks, folder / "whole", command.arguments)
    old: Contents = {}
    if with_old:
        old, _ = _run(forks, folder / "old", (*command.arguments, *command.other))
    return Undisturbed(whole, old, process.changes, process.seconds)


def _run(forks: Forks, folder: Path, arguments: Sequence[str]) -> tuple[Contents, Forked]:
    (folder / "out").mkdir(parents=True)
    process = forks.start(folder, arguments)
    assert process.wait() == 0, process.stderr
    found = contents(folder / "out")
    shutil.rmtree(folder)
    return found, process
