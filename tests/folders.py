"""What is in a folder, and made-up results of two days.

Imports little: a test starts a process for every operation on the disk.
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path

from lymphfeat.runtime.files import ResultKind, result_files, result_folder

RUN = ResultKind(name="run", marks=("mark",), files=("mark", "part-*/table", "extra"))
PLOTS = ResultKind(name="set of plots", marks=("one.png",), files=("*.png",))
BESIDE = {"page-plots": PLOTS, "page.csv": None}

RESULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "run": {
        "old": ("run/mark", "run/extra"),
        "new": ("run/mark", "run/part-1/table"),
    },
    "page.html": {
        "old": ("page.html", "page.csv", "page-plots/one.png"),
        "new": ("page.html", "page.csv"),
    },
}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder, by its path in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names_in(folder: Path) -> set[str]:
    """Return the names of what is in a folder."""
    return {path.name for path in folder.iterdir()}


def write(folder: Path, text: str, *names: str) -> None:
    """Write files with the same text, and their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def interrupt_swap(out: Path) -> None:
    """Leave a result as it is when the process is killed between the two renames."""
    unfinished = out.with_name(f"{out.name}.partial")
    (unfinished / "new").mkdir(parents=True)
    (unfinished / "old" / out.name).mkdir(parents=True)
    (unfinished / "swap.json").write_text(json.dumps({out.name: True}))
    out.rename(unfinished / "new" / out.name)


def rewrite(root: Path, name: str, day: str) -> None:
    """Write the result of a day under its name; while it is made it has a checkpoint."""
    with _opened(root / name) as folder:
        write(root / f"{name}.partial", day, "c.pt")
        write(folder, day, *(path.removeprefix("run/") for path in RESULTS[name][day]))


def _opened(out: Path) -> AbstractContextManager[Path]:
    if out.name == "run":
        return result_folder(out, RUN, force=True, resumes=("c.pt",))
    return result_files(out, BESIDE, force=True, resumes=("c.pt",))
