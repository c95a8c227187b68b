"""Splits that other tools have published: CSV files of folds, of training and test patients."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from lymphfeat.cohort.csv_rows import name_some, plain_cell, read_records
from lymphfeat.errors import CohortError, SettingsError

_IDS = ("id", "bag_name", "slide_id", "patient", "case_id")  # columns that name a patient
_TRAIN, _VALIDATION, _TEST = "train", ("val", "validation", "valid"), "test"
_CLAM = re.compile(r"splits_(\d+)\.csv")
_HINT = (
    "must have the columns id and fold, id and split (train, val, test), or those of CLAM (train, "
    "val, test)"
)
Rows = Mapping[int, Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Who trains and who is held out."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_folds(path: Path) -> list[Fold]:
    """Read a CSV file, or a folder of CLAM's splits_0.csv, splits_1.csv, …

    - id, fold: every fold is held out once, and the others train.
    - id, split (also torchmil's bag_name, split): `test` is held out, `train` and `val` train;
      without any `test`, `val` is held out.
    - train, val, test (CLAM): the same, a column of ids for each.

    Nothing here is chosen on `val`, so its patients train. Raises SettingsError for anything else.
    """
    if path.is_dir():
        files = sorted(
            (int(match[1]), file)
            for file in path.iterdir()
            if (match := _CLAM.fullmatch(file.name))
        )
        if not files:
            raise SettingsError(f"splits (={path}) must hold splits_0.csv, splits_1.csv, …")
        return [fold for _, file in files for fold in read_folds(file)]
    columns, rows = _read(path)
    ids = next((name for name in _IDS if name in columns), None)
    column = next((name for name in ("fold", "split") if name in columns), None)
    if ids and column:
        _check_rows(path, rows, ids, column)
        pairs = [(row[ids], row[column]) for row in rows.values()]
        if column == "fold":
            return _of_folds(pairs)
        sides = [(side.lower(), id) for id, side in pairs]
    elif _TRAIN in columns:
        sides = [(name, id) for row in rows.values() for name, id in row.items() if id and name]
    else:
        raise SettingsError(f"{path}: {_HINT}; got {name_some(sorted(columns)) or 'nothing'}.")
    return [_of_sides(path, sides)]


def _read(path: Path) -> tuple[list[str], Rows]:
    """Return the columns, and the rows by their number in a spreadsheet."""
    try:
        records, _ = read_records(path)
    except CohortError as error:
        raise SettingsError(*error.args) from None
    (_, header), *lines = records or [(1, [])]
    names = [name.strip().lower() for name in header]
    rows = {number: map(plain_cell, cells[: len(names)]) for number, cells in lines}
    return names, {n: dict(zip_longest(names, row, fillvalue="")) for n, row in rows.items()}


def _check_rows(path: Path, rows: Rows, ids: str, column: str) -> None:
    """Refuse rows without a patient, patients with several rows, and sides of unknown names."""
    if not rows:
        raise SettingsError(f"{path} has a header but no patients; write a row for each.")
    first: dict[str, int] = {}
    for number, row in rows.items():
        id, side = row[ids], row[column]
        if not id:
            raise SettingsError(f"{path} row {number}, column {ids}: must name a patient.")
        if first.setdefault(id, number) != number:
            raise SettingsError(
                f"{path} rows {first[id]} and {number}: each patient must have one row; got {id} "
                "twice. Keep one."
            )
        if column == "split" and side.lower() not in ("", _TRAIN, *_VALIDATION, _TEST):
            raise SettingsError(
                f"{path} row {number} ({id}), column split: must be train, val, test or empty; got "
                f"{side!r}."
            )


def _of_folds(pairs: Sequence[tuple[str, str]]) -> list[Fold]:
    names = sorted({fold for _, fold in pairs if fold}, key=lambda name: (len(name), name))
    return [
        Fold(
            name=f"fold-{re.sub(r'[^0-9A-Za-z]+', '-', name)}",
            train=tuple(id for id, fold in pairs if fold not in (name, "")),
            held_out=tuple(id for id, fold in pairs if fold == name),
        )
        for name in names
    ]


def _of_sides(path: Path, sides: Sequence[tuple[str, str]]) -> Fold:
    def named(*names: str) -> tuple[str, ...]:
        return tuple(id for side, id in sides if side in names)

    test, validation = named(_TEST), named(*_VALIDATION)
    return Fold(
        name=re.sub(r"[^0-9A-Za-z_]+", "-", path.stem),
        train=named(_TRAIN) + (validation if test else ()),
        held_out=test or validation,
    )
