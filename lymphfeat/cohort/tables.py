"""CSV files -> one row per patient: find the tables, read their cells, compare repeated rows.

* Cells are text until a parser of `clinical` reads them: a type-guessing reader would swap day and
  month, and turn the id 007 into 7.
* All files are read into one list of rows before any column is parsed, so that a column means the
  same in every file.
* A message names file, row (as a spreadsheet counts: the header is row 1) and column; all mistakes
  of a kind are raised at once.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import pandas as pd

from lymphfeat.cohort import cell_values
from lymphfeat.cohort.csv_rows import Row, complain, name_some, peek_columns, read_rows
from lymphfeat.errors import CohortError

_SHOWN_ID = 40  # characters
_SHOWN_TABLES = 4
Value = float | int | str | None

MAIN_TABLE = "clinical_annotation.csv"
TABLE_SPLITS = {
    "trainset_true.csv": "train",
    "trainset_data.csv": "train",
    "train_data.csv": "train",
    "testset_data.csv": "test",
    "test_data.csv": "test",
}


@dataclass(frozen=True, kw_only=True)
class ClinicalTable:
    """The contents of a cohort's CSV files."""

    frame: pd.DataFrame  # index "id" in file order; "label" int64, "split" str or None, covariates
    submission_ids: tuple[str, ...]  # the label -1 ids, in the order of the test file
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """The parsed columns of all rows, one value per row."""

    values: dict[str, list[Value]] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)  # names of the categorical columns
    notes: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)  # of all columns: raised together


def read_tables(paths: Sequence[Path], reference_date: date) -> ClinicalTable:
    """Read CSV files that together, or each of them, hold one row per patient (METHOD §6)."""
    notes: list[str] = []
    rows = [row for path in paths for row in read_rows(path, notes)]
    for row in rows:
        if split := TABLE_SPLITS.get(row.path.name.lower()):
            row.cells.setdefault("split", split)
    return _tabulate(rows, notes, reference_date)


def read_patient(id: str, cells: Mapping[str, str], reference_date: date) -> ClinicalTable:
    """Read the attributes of one unlabelled patient, column -> text, as a row of a table."""
    row = Row(path=Path("attributes"), number=0, cells={**cells, "id": id})
    return _tabulate([row], [], reference_date)


def read_labels(labels: Mapping[str, str], source: Path) -> ClinicalTable:
    """Make a table of labels alone, id -> text as in a table, found at `source`."""
    rows = [
        Row(path=source, number=number, cells={"id": id, "label": label})
        for number, (id, label) in enumerate(labels.items(), 1)
    ]
    return _tabulate(rows, [], date.min)


def _tabulate(rows: Sequence[Row], notes: Sequence[str], reference_date: date) -> ClinicalTable:
    _check_ids(rows)
    columns = _parse_columns(rows, reference_date)
    frame = _join(rows, columns)
    if all("label" not in row.cells for row in rows):
        notes = [*notes, "labels: no column `label`, so every patient is unlabelled (-1)"]
    return ClinicalTable(
        frame=frame,
        submission_ids=_submission_order(rows, frame),
        notes=(*notes, *columns.notes, *_repeat_notes(rows)),
    )


# --- which files are tables -------------------------------------------------------------------


def choose_tables(root: Path, candidates: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Choose the CSV files under `root` that hold the patients, and note the others."""
    headers = {path: peek_columns(path) for path in candidates if not _is_beside(path)}
    known = [path for path in headers if _rank(path) < len(_ORDER)]
    labelled = [path for path, header in headers.items() if {"id", "label"} <= header]
    others = [path for path in labelled if path not in known]
    if not known and not others:
        others = [path for path, header in headers.items() if "id" in header]
    chosen = sorted(known, key=lambda path: (_rank(path), path)) + others
    if not chosen:
        raise CohortError(
            f"{root} has no table: it must hold a CSV with the columns `id` and `label` (and "
            f"optionally `split` and covariates), or {MAIN_TABLE}; "
            f"{_found(root, candidates)}rename its columns, or name a table elsewhere with --table."
        )
    if others and len(chosen) > 1:
        complain(
            f"{root} has several tables",
            [str(path.relative_to(root)) for path in chosen],
            "Choose the one that holds the cohort with --table, or move the others away.",
        )
    ignored = [str(path.relative_to(root)) for path in candidates if path not in chosen]
    return chosen, [f"{name}: not the cohort's table, not read" for name in ignored]


_ORDER = (MAIN_TABLE, *TABLE_SPLITS)


def _rank(path: Path) -> int:
    name = path.name.lower()
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _is_beside(path: Path) -> bool:
    """Return whether a file is a submission or holds the truth: these are not tables."""
    return "submission" in path.name.lower() or path.name.lower() == "truth.csv"


def _found(root: Path, candidates: Sequence[Path]) -> str:
    names = [f"{path.relative_to(root)} ({_some_columns(path)})" for path in candidates]
    return f"found only {name_some(names, shown=_SHOWN_TABLES)}; " if names else ""


def _some_columns(path: Path) -> str:
    return name_some(sorted(peek_columns(path)), shown=_SHOWN_TABLES) or "not a CSV table"


# --- rows -> parsed columns -------------------------------------------------------------------


def _check_ids(rows: Sequence[Row]) -> None:
    nameless = [row.where for row in rows if not row.id]
    if nameless:
        complain("patients without an id", nameless, "Write the id, or delete the row.")
    wrong = [
        f"{row.where}: {row.id[:_SHOWN_ID]!r} {why}"
        for row in rows
        if (why := cell_values.wrong_id(row.id))
    ]
    if wrong:
        complain("ids must be the names of image folders", wrong, "Rename the patients.")
    first: dict[tuple[Path, str], Row] = {}
    repeats = [
        f"{row.id} in {row.where} and row {first[row.path, row.id].number}"
        for row in rows
        if first.setdefault((row.path, row.id), row) is not row
    ]
    if repeats:
        complain("ids occur twice", repeats, "A table must have one row per patient; keep one.")


def _parse_columns(rows: Sequence[Row], reference_date: date) -> _Columns:
    columns = _Columns()
    names = dict.fromkeys(name for row in rows for name in row.cells)
    if {"age", "dob"} <= set(names):
        raise CohortError(
            f"{rows[0].path} has columns `dob` and `age`; keep one, because both give the age."
        )
    _parse(rows, "label", cell_values.parse_label, columns, missing=cell_values.UNKNOWN)
    _parse(rows, "split", cell_values.parse_split, columns, missing=None)
    for name in names:
        if name not in ("id", "label", "split"):
            _parse_covariate(rows, name, reference_date, columns)
    if columns.mistakes:
        complain("values that cannot be read", columns.mistakes, "Fix them.")
    return columns


def _parse_covariate(
    rows: Sequence[Row], name: str, reference_date: date, columns: _Columns
) -> None:
    given = [row for row in rows if not cell_values.is_missing(row.cells.get(name, ""))]
    texts = [row.cells[name] for row in given]
    first = {row.id: row.cells[name] for row in reversed(given)}  # for notes: each patient once
    if name == "dob":
        parse_age = partial(cell_values.parse_age, reference_date=reference_date)
        _parse(rows, name, parse_age, columns)
        columns.notes.append(_date_note(first.values(), reference_date))
    elif name == "gender":
        _parse(rows, name, cell_values.parse_gender, columns, missing=None)
        columns.texts.add(name)
        columns.notes.extend(_gender_notes(first.values()))
    elif name == "age":
        _parse(rows, name, cell_values.parse_years, columns)
    elif name == "lymph_count":
        _parse(rows, name, cell_values.parse_count, columns)
    elif not texts:
        columns.notes.append(f"column {name}: empty, left out")
    elif any(map(cell_values.looks_like_date, texts)):
        columns.notes.append(f"column {name}: holds dates, left out (only dob is read as a date)")
    elif _is_numeric(texts):
        _parse(rows, name, cell_values.parse_number, columns)
    else:
        _parse(rows, name, str, columns, missing=None)
        columns.texts.add(name)


def _parse(
    rows: Sequence[Row],
    name: str,
    parse: Callable[[str], Value],
    columns: _Columns,
    missing: Value = math.nan,
) -> None:
    """Add one column's values, and what is wrong with any, to `columns`."""
    values = columns.values.setdefault(name, [])
    for row in rows:
        text = row.cells.get(name, "")
        try:
            values.append(missing if cell_values.is_missing(text) else parse(text))
        except ValueError as error:
            columns.mistakes.append(f"{row.where} ({row.id}), column {name}: {error}")


def _is_numeric(texts: Sequence[str]) -> bool:
    """Return whether most cells are numbers: the others are then mistakes, not categories."""
    return 2 * sum(map(_is_number, texts)) > len(texts)


def _is_number(text: str) -> bool:
    if cell_values.is_number_with_comma(text):
        return True  # and a mistake
    try:
        cell_values.parse_number(text)
    except ValueError:
        return False
    return True


def _date_note(texts: Collection[str], reference_date: date) -> str:
    forms = Counter(cell_values.date_form(text) for text in texts)
    counts = ", ".join(f"{count} as {form}" for form, count in forms.most_common()) or "none given"
    swapped = sum(map(cell_values.is_ambiguous_date, texts))
    guess = f" ({swapped} would be misread by guessing)" if swapped else ""
    return f"dob: read {counts}{guess}; becomes the age in years on {reference_date}"


def _gender_notes(texts: Collection[str]) -> list[str]:
    odd = Counter(text for text in texts if text not in ("F", "M"))
    meaning = {text: cell_values.GENDERS.get(text.lower()) for text in odd}
    return [f"gender: {odd[text]} cell(s) {text!r} read as {meaning[text]}" for text in odd]


# --- rows that repeat a patient ---------------------------------------------------------------


def _join(rows: Sequence[Row], columns: _Columns) -> pd.DataFrame:
    """Merge each patient's rows; a column missing in one file comes from the next that has it."""
    groups = _group(rows)
    _check_agreement(rows, groups, columns)
    frame = pd.DataFrame(index=pd.Index(list(groups), name="id", dtype="str"))
    for name, values in columns.values.items():
        merged = [_merge(rows, group, name, values) for group in groups.values()]
        frame["age" if name == "dob" else name] = _series(name, merged, frame.index, columns)
    return frame


def _series(
    name: str, values: list[Value], index: "pd.Index[str]", columns: _Columns
) -> "pd.Series[float]":
    if name == "gender":
        return pd.Series(pd.Categorical(values, categories=["F", "M"]), index=index)
    if name in columns.texts:
        return pd.Series(pd.Categorical(values), index=index)
    dtype = {"label": "int64", "split": "object"}.get(name, "float64")
    return pd.Series(values, index=index, dtype=dtype)


def _group(rows: Sequence[Row]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.id, []).append(index)
    return groups


def _merge(rows: Sequence[Row], group: Sequence[int], name: str, values: list[Value]) -> Value:
    has = [index for index in group if name in rows[index].cells]
    return values[(has or group)[0]]


def _check_agreement(rows: Sequence[Row], groups: dict[str, list[int]], columns: _Columns) -> None:
    conflicts = []
    for group in groups.values():
        for name, values in columns.values.items():
            has = [index for index in group if name in rows[index].cells]
            for other in has[1:]:
                if not _same(values[has[0]], values[other]):
                    conflicts.append(_conflict(rows[has[0]], rows[other], name))
    if conflicts:
        complain("tables disagree", conflicts, "Fix one, or choose one with --table.")


def _same(a: Value, b: Value) -> bool:
    return a == b or (a != a and b != b)  # a missing number is not equal to itself


def _conflict(a: Row, b: Row, name: str) -> str:
    return f"{a.id}, column {name}: {a.cells[name]!r} in {a.where}, {b.cells[name]!r} in {b.where}"


def _repeat_notes(rows: Sequence[Row]) -> list[str]:
    paths = list(dict.fromkeys(row.path for row in rows))
    seen: set[str] = set()
    notes = []
    for path in paths:
        ids = {row.id for row in rows if row.path == path}
        count = len(ids & seen)
        if len(paths) > 1:
            repeats = f", {count} of them repeat an earlier table and agree" if count else ""
            notes.append(f"{path.name}: {len(ids)} patients{repeats}")
        seen |= ids
    return notes


def _submission_order(rows: Sequence[Row], frame: pd.DataFrame) -> tuple[str, ...]:
    unknown = set(frame.index[frame["label"] == cell_values.UNKNOWN])
    first = [row.id for row in rows if TABLE_SPLITS.get(row.path.name.lower()) == "test"]
    return tuple(dict.fromkeys(id for id in [*first, *frame.index] if id in unknown))
