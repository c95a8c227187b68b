"""A result beside its repeat: which files differ, by how much, and what was computed otherwise."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lymphfeat.runtime.differences import FileDifference, compare_files
from lymphfeat.runtime.files import ResultKind, files_in
from lymphfeat.runtime.identity import differing_fields

_FIGURE = ".png"


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """A result and its repeat.

    files: the files of a folder, or the parts of a store, each compared with that of the same name.
    figures: what is drawn of them; another version of matplotlib draws other bytes.
    changed: how the repeat was computed otherwise: device, processor, threads, versions.
    """

    result: Path
    out: Path
    files: tuple[FileDifference, ...]
    figures: tuple[FileDifference, ...] = ()
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether everything is the same, but for where and with what it was computed."""
        return not self.different

    @property
    def different(self) -> tuple[FileDifference, ...]:
        """Return what differs."""
        return tuple(each for each in self.files if not each.same)


def compare_folders(
    result: Path,
    out: Path,
    kind: ResultKind,
    *,
    but: str,
    incidental: Collection[str] = (),
    changed: Collection[str],
) -> Repetition:
    """Compare all files of two results but the one called `but`, which says how they were made.

    `incidental` fields of JSON files may differ.
    """
    own = [path.relative_to(result) for path in files_in(result)]
    new = [path.relative_to(out) for path in files_in(out)]
    names = sorted({path for path in (*filter(kind.has, own), *new) if path.name != but})
    found = [
        compare_files(result / name, out / name, name.as_posix(), incidental=incidental)
        for name in names
    ]
    return Repetition(
        result=result,
        out=out,
        files=tuple(each for each in found if not each.name.endswith(_FIGURE)),
        figures=tuple(each for each in found if each.name.endswith(_FIGURE)),
        changed=tuple(changed),
    )


def check_circumstances(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return where something was computed; ValueError or TypeError for what no result says."""
    found = {**content, "versions": dict(content["versions"])}
    device, threads = found.get("device", ""), found.get("threads")
    if not isinstance(device, str) or not isinstance(threads, int | None):
        raise ValueError(f"{device!r:.40} with {threads!r:.40} threads is no device")
    return found


def list_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List how something was computed otherwise, of what was recorded then."""
    # Earlier results name torch's build, too (2.9.0+cpu).
    before = {name: str(each).partition("+")[0] for name, each in then["versions"].items()}
    versions = {name: now["versions"].get(name) for name in before}
    own = {name: now[name] for name in then if name in now}
    return differing_fields({**own, "versions": versions}, {**then, "versions": before})
