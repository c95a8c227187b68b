"""Hashes of files, kept in the user's cache folder, and differences between recipes. No torch.

A file's hash is that of its contents, kept with the file's path, size and modification time,
so that a large cohort is read only once. The cache is a convenience: commands also work where
it cannot be read or written.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path

from lymphfeat.errors import CohortError
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.runtime.threads import map_in_order

_HASH_BYTES = 16
_THREADS = 4  # reading waits for the disk
# A file changed more recently than this may change again within one tick of its file system's
# clock, which is 2 s on FAT; its hash is not cached.
_SETTLED_NS = 3 * 10**9
_TABLE = """CREATE TABLE IF NOT EXISTS hashes (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, hash TEXT) WITHOUT ROWID"""


def differing_fields(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """List the fields in which two recipes differ, with both values."""
    lines = []
    for key in sorted(set(ours) | set(theirs)):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{key}.")
        elif json_text(a) != json_text(b):  # a tuple comes back from a file as a list
            lines.append(f"{prefix}{key} is {_shown(b)} there, {_shown(a)} now")
    return lines


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def file_hashes(paths: Sequence[Path]) -> tuple[str, ...]:
    """Hash the contents of files (BLAKE2b), 32 hex digits each.

    A file that was hashed before is not read again unless its size or modification time differs.
    Raises CohortError, naming the file, when one cannot be read.
    """
    stamps = [_stamp(path) for path in paths]
    known = _recall(stamps)
    new = [stamp for stamp in dict.fromkeys(stamps) if stamp not in known]
    hashes = map_in_order(_hash_file, new, threads=_THREADS, name="hash")
    found = dict(zip(new, hashes, strict=True))
    _remember(found)
    known |= found
    return tuple(known[stamp] for stamp in stamps)


class _Stamp(NamedTuple):
    """The state of a file."""

    path: bytes  # absolute; names need not be valid UTF-8
    size: int
    mtime_ns: int


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return _Stamp(os.fsencode(path.absolute()), status.st_size, status.st_mtime_ns)


def _hash_file(stamp: _Stamp) -> str:
    path = Path(os.fsdecode(stamp.path))
    try:
        return _hash(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> CohortError:
    return CohortError(f"{path}: cannot be read ({error.strerror}); restore or remove it.")


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).hexdigest()


def _recall(stamps: Iterable[_Stamp]) -> dict[_Stamp, str]:
    known: dict[_Stamp, str] = {}
    with suppress(OSError, sqlite3.Error), closing(_open_cache()) as cache:
        for stamp in stamps:
            row = cache.execute(
                "SELECT hash FROM hashes WHERE path = ? AND size = ? AND mtime_ns = ?", stamp
            ).fetchone()
            if row:
                known[stamp] = row[0]
    return known


def _remember(found: Mapping[_Stamp, str]) -> None:
    settled = time.time_ns() - _SETTLED_NS
    rows = [(*stamp, hash) for stamp, hash in found.items() if stamp.mtime_ns < settled]
    if not rows:
        return
    with suppress(OSError, sqlite3.Error), closing(_open_cache()) as cache, cache:
        cache.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?)", rows)


def _open_cache() -> sqlite3.Connection:
    folder = user_cache_path("lymphfeat", appauthor=False)
    if not folder.is_absolute():  # a user without a home folder
        raise FileNotFoundError(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cache = sqlite3.connect(folder / "hashes-1.sqlite")
    try:
        cache.execute(_TABLE)
    except sqlite3.Error:
        cache.close()
        raise
    return cache
