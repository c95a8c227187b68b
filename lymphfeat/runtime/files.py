"""Files and results that are written completely or not at all.

A result is a folder, or a file with its companions. It is written to `<name>.partial/new`, on
the same file system, and then swapped in:

1. `<name>.partial/swap.json` is written, in one rename. From here on the new result is valid.
2. The old result is moved to `<name>.partial/old` and the new one into its place.
3. `<name>.partial` is removed.

A process that ends before step 1 leaves the old result as it was. Step 2 takes two renames, between
which neither result is in its place; both are in `<name>.partial`, and `recover`, which the next
writer or reader calls, continues from there. Checkpoints of an unfinished training, and the kept
parts of an unfinished run, are in `<name>.partial`.
"""

import io
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import BinaryIO, NoReturn

from filelock import FileLock, Timeout

from lymphfeat.errors import SettingsError
from lymphfeat.runtime.disks import writing
from lymphfeat.runtime.strict_json import json_text, parse_json

_NEW, _OLD, _SWAP, _LOCK = "new", "old", "swap.json", "lock"
_CHECKPOINT_SUFFIX = ".pt"
KEPT_FOLDER = "kept"  # of the finished parts of an unfinished result
_LITTER = (".DS_Store", "Thumbs.db")  # left by file managers


@dataclass(frozen=True, kw_only=True)
class ResultKind:
    """What a result folder contains.

    files: patterns of the paths in it, matched part by part with `fnmatch`; nothing else is ever
        removed.
    marks: files of which every result of this kind has at least one.
    """

    name: str
    marks: tuple[str, ...]
    files: tuple[str, ...]

    def has(self, path: PurePath) -> bool:
        """Return whether a path in a folder is part of the result."""
        return any(
            len(path.parts) == len(parts) and all(map(fnmatchcase, path.parts, parts))
            for parts in (PurePath(pattern).parts for pattern in self.files)
        )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it: it appears complete or not at all.

    Its permissions follow the umask, even if `write` makes it private, as safetensors does. Raises
    OutputError where the disk is full or closed.
    """
    replace_files({path: write})


def replace_files(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files as `replace_file` does, and rename them when all are complete."""
    unfinished = {path: path.with_name(path.name + ".partial") for path in writes}
    try:
        for path, write in writes.items():
            with writing(path):
                _write_anew(unfinished[path], write)
    except BaseException:
        for path in unfinished.values():  # a full disk gets its room back
            with suppress(OSError):
                path.unlink()
        raise
    for path, complete in unfinished.items():
        with writing(path):
            complete.replace(path)


def _write_anew(path: Path, write: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    write(path)
    path.chmod(mode)


def write_buffered(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Save to memory and write that: NumPy and torch do not say which fault of the disk it was."""
    buffer = io.BytesIO()
    save(buffer)
    path.write_bytes(buffer.getbuffer())


def files_in(folder: Path) -> tuple[Path, ...]:
    """Return all files under a folder, in order."""
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))


def unfinished_folder(out: Path) -> Path:
    """Return the folder next to a result in which it is made."""
    return out.parent / f"{out.name}.partial"


def find_checkpoints(out: Path) -> tuple[Path, ...]:
    """Return the checkpoints of an unfinished training that is to become `out`."""
    return tuple(sorted(unfinished_folder(out).glob(f"*{_CHECKPOINT_SUFFIX}")))


def find_kept(out: Path) -> tuple[Path, ...]:
    """Return the kept parts of an unfinished run that is to become `out`."""
    return tuple(sorted((unfinished_folder(out) / KEPT_FOLDER).glob("*.safetensors")))


# --- locks and disks ------------------------------------------------------------------------------


@contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Yield whether this process got a lock, at once; the lock dies with its process."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        # Removed while it is held: a process that opened the file and then gets the lock of one
        # that no longer exists tries again, in FileLock. On Windows release() removes it.
        with suppress(OSError):
            path.unlink()
        lock.release()


@contextmanager
def claimed(paths: Iterable[Path], *, force: bool) -> Iterator[None]:
    """Keep other processes from writing some files meanwhile.

    Raises SettingsError, at once, for files that may not be written (see `check_file`) or that
    another process has claimed.
    """
    with ExitStack() as locks:
        for path in dict.fromkeys(paths):
            with writing(path):
                alone = locks.enter_context(lock_file(path.with_name(f"{path.name}.lock")))
            if not alone:
                refuse_second(path)
            check_file(path, force=force)
        yield


def refuse_second(out: Path) -> NoReturn:
    """Raise SettingsError: another process is writing `out`."""
    raise SettingsError(
        f"{out}: another process is writing it; wait for it or choose another --out."
    )


def flush_file(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("r+b") as file:  # Windows syncs no file opened for reading
        os.fsync(file.fileno())


# --- what is in the way ---------------------------------------------------------------------------


def check_file(path: Path, *, force: bool) -> None:
    """Raise SettingsError for an existing folder, or an existing file without `force`."""
    if path.is_dir():
        raise SettingsError(f"out (={path}) must be a file; got a folder. Choose another --out.")
    if path.exists() and not force:
        raise SettingsError(f"{path} exists; choose another name, or overwrite it with --force.")


def check_folder(out: Path, kind: ResultKind, *, force: bool) -> None:
    """Raise SettingsError unless a result of this kind may be written to the folder `out`.

    It may if `out` does not exist, is an empty folder or, with `force`, holds a result of the same
    kind and nothing else.
    """
    if out.is_symlink() or os.path.ismount(out) or Path.cwd().is_relative_to(out.resolve()):
        raise SettingsError(
            f"out (={out}) must be a folder that can be renamed; got a link, a mount point or the "
            f"working folder. Name a new folder in it, as {out / kind.name}."
        )
    if out.is_file():
        raise SettingsError(f"out (={out}) must be a folder; got a file. Choose another --out.")
    found = [path.relative_to(out) for path in files_in(out) if path.name not in _LITTER]
    marked = any((out / name).is_file() for name in kind.marks)
    if marked and not force:
        raise SettingsError(
            f"{out} already holds a {kind.name}; choose another --out or use --force."
        )
    strange = [path for path in found if not (marked and kind.has(path))]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise SettingsError(
            f"out (={out}) must be a new folder or a {kind.name}; it holds "
            f"{strange[0].as_posix()}{more}, which is not part of one. Move it away or choose "
            "another --out; --force does not remove it."
        )


def _check_unfinished(folder: Path, resumes: Collection[str], *, force: bool) -> None:
    """Refuse checkpoints that are not resumed, or remove them with `force`; refuse other files."""
    partial = (f"{name}.partial" for name in (_SWAP, *resumes))
    ours = {_NEW, _OLD, _LOCK, *resumes, *partial}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in ours:
            continue
        if not _is_checkpoint(path):
            raise SettingsError(f"{path} is in the way; move it away or choose another --out.")
        if not force:
            raise SettingsError(
                f"{path} belongs to an unfinished training of another kind; choose another --out, "
                "or start over with --force."
            )
        _remove(path)


def _is_checkpoint(path: Path) -> bool:
    return _CHECKPOINT_SUFFIX in path.suffixes or path.name == KEPT_FOLDER


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- writing results ------------------------------------------------------------------------------


@contextmanager
def result_folder(
    out: Path,
    kind: ResultKind,
    *,
    force: bool = False,
    resumes: Collection[str] = (),
    writes: bool = True,
) -> Iterator[Path]:
    """Yield an empty folder to write to, and replace `out` with it at the end.

    An exception inside leaves `out` as it was. `resumes` names the checkpoints, or the folder of
    kept parts, in `unfinished_folder(out)` that are resumed; they are removed at the end. Of
    several processes only the one that `writes` does anything. Raises SettingsError at once if
    `out` may not be overwritten (see `check_folder`).
    """
    kinds = {out.name: kind}
    with _staged(out, kinds, force=force, resumes=resumes, writes=writes) as new:
        if writes:
            (new / out.name).mkdir()
        yield new / out.name


@contextmanager
def result_files(
    out: Path,
    beside: Mapping[str, ResultKind | None],
    *,
    force: bool = False,
    resumes: Collection[str] = (),
) -> Iterator[Path]:
    """Yield an empty folder to write a file and its companions to, under their final names.

    At the end they replace `out` and its companions: `beside` maps their names to None for files
    and to a kind for folders. A companion that is not written is removed, so that nothing next to
    `out` is out of date. Otherwise as `result_folder`.
    """
    kinds = {out.name: None, **beside}
    with _staged(out, kinds, force=force, resumes=resumes, writes=True) as new:
        yield new


@contextmanager
def _staged(
    out: Path,
    kinds: Mapping[str, ResultKind | None],
    *,
    force: bool,
    resumes: Collection[str],
    writes: bool,
) -> Iterator[Path]:
    unfinished = unfinished_folder(out)
    new = unfinished / _NEW
    if not writes:
        yield new
        return
    with writing(out):
        recover(out)
        _check_free(out, kinds, force=force)
        unfinished.mkdir(parents=True, exist_ok=True)
        with _locked(unfinished) as alone:
            if not alone:
                refuse_second(out)
            _go_on(out)
            _check_unfinished(unfinished, resumes, force=force)
            for name in (_NEW, _OLD):
                shutil.rmtree(unfinished / name, ignore_errors=True)
            new.mkdir()
            try:
                yield new
                for name, kind in kinds.items():
                    _check_names(new / name, kind)
                _flush(new)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            _publish(out, kinds, force=force)


def _publish(out: Path, kinds: Mapping[str, ResultKind | None], *, force: bool) -> None:
    unfinished = unfinished_folder(out)
    new = unfinished / _NEW
    try:
        _check_free(out, kinds, force=force)  # a long time has passed
    except SettingsError as error:
        raise SettingsError(f"{error} The new result is in {new}.") from None
    plan = {name: (new / name).exists() for name in kinds}
    replace_file(unfinished / _SWAP, lambda path: _write_flushed(path, json_text(plan)))
    _go_on(out)


@contextmanager
def _locked(unfinished: Path) -> Iterator[bool]:
    """Yield whether this process got the lock of an unfinished result.

    At the end the folder is removed, unless it contains checkpoints.
    """
    try:
        with lock_file(unfinished / _LOCK) as alone:
            yield alone
    finally:
        with suppress(OSError):  # of another process: its lock is in it
            unfinished.rmdir()


def _check_free(out: Path, kinds: Mapping[str, ResultKind | None], *, force: bool) -> None:
    for name, kind in kinds.items():
        path = out.parent / name
        if kind is None:
            check_file(path, force=force)
        else:
            check_folder(path, kind, force=force)


def _check_names(folder: Path, kind: ResultKind | None) -> None:
    """Refuse, as a bug, files that could not be replaced with `force`."""
    strange = [path for path in files_in(folder) if kind and not kind.has(path.relative_to(folder))]
    assert not strange, f"{strange[0]} must be one of the files of a {kind and kind.name}"


def _flush(folder: Path) -> None:
    """Flush all files to disk: a power cut after the old result is gone must not empty them."""
    for path in files_in(folder):
        flush_file(path)


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush_file(path)


def recover(out: Path) -> None:
    """Continue a swap that was interrupted, or remove what is left of one; else do nothing.

    Also do nothing where another process is doing it, or where the user may not write.
    """
    unfinished = unfinished_folder(out)
    try:
        left = {path.name for path in unfinished.iterdir()}
    except OSError:  # there is none
        return
    if not (_SWAP in left or left == {_LOCK}) or not os.access(unfinished, os.W_OK):
        return
    with _locked(unfinished) as alone:
        if alone:
            _go_on(out)


def _go_on(out: Path) -> None:
    """Finish a swap."""
    unfinished = unfinished_folder(out)
    swap = unfinished / _SWAP
    if not swap.exists():
        return
    parts = _read_swap(swap)
    (unfinished / _OLD).mkdir(exist_ok=True)
    for name, written in parts.items():
        place, new = out.parent / name, unfinished / _NEW / name
        if written and not new.exists():
            continue  # it is in its place already
        if place.exists():
            place.rename(unfinished / _OLD / name)
        if written:
            new.rename(place)
    for name in (_NEW, _OLD):
        shutil.rmtree(unfinished / name, ignore_errors=True)
    for path in filter(_is_checkpoint, list(unfinished.iterdir())):
        _remove(path)
    swap.unlink()  # last: checkpoints without it are an unfinished training


def _read_swap(swap: Path) -> dict[str, bool]:
    """Read which parts of a result there are; their names must not lead out of its folder."""
    try:
        parts = dict(parse_json(swap.read_bytes()))
    except (ValueError, TypeError):
        parts = {"": False}
    if any(PurePath(name).name != name or name in ("", "..") or "\0" in name for name in parts):
        raise SettingsError(
            f"{swap} must name the files of a result; it is damaged. Move {swap.parent} away."
        )
    return parts
