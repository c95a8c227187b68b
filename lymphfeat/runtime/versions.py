"""Versions of file formats: a file of a newer one than this program knows is refused by number."""

from pathlib import Path

from lymphfeat.errors import LymphfeatError


def refuse_newer(path: Path, found: object, known: int, error: type[LymphfeatError]) -> None:
    """Raise `error` unless a file's `format_version` is a whole number up to the newest known."""
    if not isinstance(found, int) or not 1 <= found <= known:
        raise error(
            f"{path}: format_version (={found!r}) must be at most {known}; update lymphfeat to "
            "read it: pip install -U lymphfeat."
        )
