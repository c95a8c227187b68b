"""Groups of patients (a laboratory, a scanner, a person) that a split must not divide."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.csv_rows import name_some
from lymphfeat.cohort.splits import Split, check_classes
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.settings import GroupFolds, require

MOST_HELD_OUT = 30  # groups, one at a time: their inner splits leave out every pair
Groups = NDArray[np.str_]


def read_groups(table: pd.DataFrame, column: str) -> Groups:
    """Return the group of every patient, (P,), empty where an unlabelled one has none.

    Raises SettingsError for a column that the table lacks, CohortError for labelled patients
    without a group.
    """
    columns = [name for name in table.columns if name not in ("label", "split")]
    require(
        column in columns,
        f"groups (={column}) must be a column of the cohort's table: "
        f"{', '.join(columns) or 'it has none'}.",
    )
    values = table[column]
    missing = values.isna() | (values.astype(str) == "")
    nameless = table.index[missing & (table["label"] >= 0)].tolist()
    if nameless:
        raise CohortError(
            f"groups (={column}) must be known of every labelled patient; missing for "
            f"{name_some(nameless)}. Fill them in, and make the store again."
        )
    if pd.api.types.is_numeric_dtype(values):
        texts = [f"{value:.15g}" for value in values.to_numpy(float)]
    else:
        texts = values.astype(str).tolist()
    return np.where(missing, "", np.array(texts))


def group_splits(
    ids: Sequence[str],
    labels: NDArray[np.int64],
    groups: Groups,
    *,
    how: GroupFolds,
    folds: int,
    seeds: int,
    seed: int = 0,
) -> list[Split]:
    """Make splits that divide no group; ids, labels and groups are (P,), -1 is unknown.

    `each` holds every group out once. `whole` makes `seeds` repeats of `folds` stratified folds of
    whole groups. Raises SettingsError where a side of a split would lack a class.
    """
    known = np.flatnonzero(labels >= 0)
    names, groups = np.array(ids)[known], groups[known]
    truth = labels[known]
    if how == "each":
        return _each(names, truth, groups, seed)
    return _whole(names, truth, groups, folds, range(seed, seed + seeds))


def _whole(
    names: Groups, truth: NDArray[np.int64], groups: Groups, folds: int, seeds: range
) -> list[Split]:
    from sklearn.model_selection import StratifiedGroupKFold  # slow: only these splits wait

    check_classes(truth, folds)
    count = len(set(groups.tolist()))
    require(count >= folds, f"folds (={folds}) must be at most the number of groups, {count}.")
    return [
        _split(f"groups{folds}-r{repeat}-f{fold}", names, part, seed, repeat)
        for repeat, seed in enumerate(seeds)
        for fold, (_, part) in enumerate(
            StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(names, truth, groups)
        )
    ]


def _each(names: Groups, truth: NDArray[np.int64], groups: Groups, seed: int) -> list[Split]:
    found = sorted(set(groups.tolist()))
    whole = "Use --group-folds whole, which puts several groups into a fold."
    require(
        2 <= len(found) <= MOST_HELD_OUT,
        f"groups must be 2 to {MOST_HELD_OUT} to be held out in turn; got {len(found)}. {whole}",
    )
    parts = {name: np.flatnonzero(groups == name) for name in found}
    alike = [name for name, part in parts.items() if len(set(truth[part].tolist())) < 2]
    if alike:
        raise SettingsError(
            "every group must have reactive and tumoral patients to be held out; "
            f"got only one class in {name_some(alike)}. {whole}"
        )
    return [
        _split(f"group{number}-{_plain(name)}".rstrip("-"), names, part, seed, 0)
        for number, (name, part) in enumerate(parts.items())
    ]


def _plain(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "-", name)


def _split(id: str, names: Groups, part: NDArray[np.int64], seed: int, repeat: int) -> Split:
    inside = np.setdiff1d(np.arange(len(names)), part)
    return Split(
        id=id,
        seed=seed,
        repeat=repeat,
        train=tuple(names[inside].tolist()),
        validation=tuple(names[np.sort(part)].tolist()),
    )
