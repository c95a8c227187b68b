"""One CSV file -> its rows, every cell still text, and the location of mistakes for messages.

Rows are numbered as a spreadsheet counts them: the header is row 1, and a blank row counts too.
"""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lymphfeat.errors import CohortError

KNOWN_COLUMNS = ("id", "label", "split", "gender", "dob", "age", "lymph_count")
SHOWN_MISTAKES = 8
_SEP_LINE = re.compile(
    r"\s*sep=([^\w\s\"]|\t)\s*$", re.IGNORECASE
)  # a spreadsheet's hint at the delimiter
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
_ROW_NUMBERS = re.compile(r"(unnamed: \d+)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One patient's row in one file: column -> text, without surrounding spaces."""

    path: Path
    number: int  # as a spreadsheet counts: the header is row 1; 0 where there is no table
    cells: dict[str, str]

    @property
    def where(self) -> str:
        """Return file and row, for messages."""
        return f"{self.path} row {self.number}" if self.number else str(self.path)

    @property
    def id(self) -> str:
        """Return the patient's id."""
        return self.cells["id"]


def peek_columns(path: Path) -> set[str]:
    """Read the columns of a header; none if the file is not a CSV."""
    with path.open("rb") as stream:
        start = stream.read(65_536)
    try:
        lines = _decode(start, errors="ignore").splitlines()
        header = next((line for line in lines if line.strip() and not _SEP_LINE.match(line)), "")
        return set(_column_names(next(csv.reader([header], delimiter=_delimiter(lines)), [])))
    except (UnicodeError, csv.Error):
        return set()


def read_rows(path: Path, notes: list[str]) -> list[Row]:
    """Read a CSV file (comma, semicolon or tab; UTF-8 or UTF-16), note irregularities in `notes`.

    Raises CohortError for a file that is not a CSV table, has no column `id` or repeats a column.
    """
    records, delimiter = read_records(path)
    if not records:
        raise CohortError(f"{path} is empty; it must have a header and one row per patient.")
    header = _column_names(records[0][1])
    _check_header(path, header)
    if any(not name for name in header):
        notes.append(
            f"{path.name}: the column without a name holds row numbers or nothing, not read"
        )
    if delimiter == ";":
        notes.append(
            f"{path.name}: separated by semicolons, so a comma in a number is a decimal comma"
        )
    if any(cell != cell.strip() for _, cells in records for cell in cells):
        notes.append(f"{path.name}: spaces around values removed")
    _check_widths(path, len(header), records[1:])
    _check_nameless(path, header, records[1:])
    rows = [Row(path=path, number=n, cells=_cells(header, c, delimiter)) for n, c in records[1:]]
    if not rows:
        raise CohortError(
            f"{path} has a header but no patients; one row per patient must follow it."
        )
    return rows


def read_records(path: Path) -> tuple[list[tuple[int, list[str]]], str]:
    """Return (row number, cells) for every row that is not blank, and the delimiter."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CohortError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = _decode(data)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CohortError(
            f"{path} line {line} is not UTF-8 text; save it as `CSV UTF-8`."
        ) from None
    delimiter = _delimiter(text.splitlines())
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    try:
        numbered = list(enumerate(reader, start=1))
    except csv.Error as error:
        raise CohortError(
            f"{path} line {reader.line_num} is not CSV ({error}); look for a quote left open."
        ) from None
    if numbered and _SEP_LINE.match(delimiter.join(numbered[0][1])):
        numbered = numbered[1:]
    return [(n, cells) for n, cells in numbered if any(cell.strip() for cell in cells)], delimiter


def _decode(data: bytes, errors: str = "strict") -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig", errors)


def _delimiter(lines: Iterable[str]) -> str:
    header = next((line for line in lines if line.strip()), "")
    hint = _SEP_LINE.match(header)
    return hint[1] if hint else max(",;\t", key=header.count)


def _column_names(cells: Iterable[str]) -> list[str]:
    """Lower-case known columns only; columns left unnamed by a spreadsheet or pandas become ''."""
    names = [cell.strip() for cell in cells]
    names = ["" if _ROW_NUMBERS.fullmatch(name) else name for name in names]
    return [name.lower() if name.lower() in KNOWN_COLUMNS else name for name in names]


def _check_header(path: Path, header: Sequence[str]) -> None:
    if "id" not in header:
        found = name_some([name or "(no name)" for name in header])
        raise CohortError(f"{path} row 1 must name a column `id`; got {found}.")
    twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if twice:
        complain(f"{path} row 1 names columns twice", twice, "Keep one of each.")


def _check_widths(path: Path, width: int, records: Sequence[tuple[int, list[str]]]) -> None:
    wrong = [
        f"row {number} has {len(cells)}"
        for number, cells in records
        if len(cells) < width or any(cell.strip() for cell in cells[width:])
    ]
    if wrong:
        complain(
            f"{path}: the header has {width} cells, some rows have more or fewer",
            wrong,
            "Quote values that contain a comma, and write every cell.",
        )


def _check_nameless(
    path: Path, header: Sequence[str], records: Sequence[tuple[int, list[str]]]
) -> None:
    """Allow a column without a name only for row numbers: other values would be lost."""
    lost = [
        f"row {number} {cell!r}"
        for number, cells in records
        for name, cell in zip(header, cells, strict=False)
        if not name and not re.fullmatch(r"\s*[0-9]*\s*", cell)
    ]
    if lost:
        complain(f"{path} row 1 has a column with values but no name", lost, "Name it.")


def _cells(header: Sequence[str], cells: Sequence[str], delimiter: str) -> dict[str, str]:
    named = {n: c.strip() for n, c in zip(header, cells, strict=False) if n}
    named["id"] = normal_id(named["id"])
    if delimiter == ";":
        return {n: _decimal_point(c) if n != "id" else c for n, c in named.items()}
    return named


def normal_id(name: str) -> str:
    """Return an id, or a name that may be one, as ids are compared: with composed accents.

    Some file systems decompose them.
    """
    return unicodedata.normalize("NFC", name)


def plain_cell(cell: str) -> str:
    """Return a cell, which may hold an id, without surrounding spaces."""
    return normal_id(cell.strip())


def _decimal_point(text: str) -> str:
    return text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text


def complain(what: str, mistakes: Sequence[str], remedy: str) -> NoReturn:
    """Raise one CohortError for all mistakes of a kind."""
    raise CohortError(f"{what}: {name_some(mistakes, '; ')}. {remedy}")


def name_some(items: Sequence[str], separator: str = ", ", shown: int = SHOWN_MISTAKES) -> str:
    """Join the first items, and count the rest."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(items[:shown]) + more
