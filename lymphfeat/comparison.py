"""compare: rows of several runs, paired by split (METHOD §4)."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from lymphfeat.cohort.provenance import is_same_patient, refuse_seen
from lymphfeat.cohort.splits import Plan, Split, read_splits
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.comparison import Comparison
from lymphfeat.evaluation.intervals import estimate, estimate_metric, holm
from lymphfeat.evaluation.metrics import METRICS, metric_bounds
from lymphfeat.evaluation.run_provenance import SPLITS_FILE, RunProvenance, no_run, read_config
from lymphfeat.runtime.files import recover
from lymphfeat.settings import ProtocolName


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """The content of a run folder."""

    folder: Path
    protocol: ProtocolName
    splits: tuple[Split, ...]
    runs: pd.DataFrame  # head, kind, split, metrics
    labels: dict[str, int]  # by the patient's id
    provenance: RunProvenance

    @classmethod
    def read(cls, folder: Path) -> "SavedRun":
        """Read a run folder; raises SettingsError for anything else."""
        recover(folder)
        try:
            protocol = read_config(folder)["settings"]["protocol"]
            if protocol not in get_args(ProtocolName):
                raise ValueError(f"the protocol {protocol!r}")
            predictions = pd.read_csv(
                folder / "predictions.csv", dtype={"patient": str}, keep_default_na=False
            )
            runs = pd.read_csv(folder / "runs.csv")
            _ = runs["head"], runs["split"]
            return cls(
                folder=folder,
                protocol=protocol,
                splits=tuple(read_splits(folder / SPLITS_FILE)),
                runs=runs,
                labels=dict(zip(predictions["patient"], predictions["label"], strict=True)),
                provenance=RunProvenance.read(folder),
            )
        except SettingsError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise no_run(folder, error) from None

    @property
    def sides(self) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
        """Return the training and validation patients of each split."""
        return {
            split.id: (frozenset(split.train), frozenset(split.validation)) for split in self.splits
        }


def compare(
    folders: Sequence[str | os.PathLike[str]],
    *,
    metric: str = "ba",
    heads: Sequence[str] = (),
    against: str | None = None,
    all_pairs: bool = False,
) -> Comparison:
    """Compare the rows of run folders, paired by split (Nadeau–Bengio intervals, Holm's p).

    `heads` are the rows to take (default: all of every run). Each is compared with one reference,
    `against` (default: the first row of the first run, in the order in which it was asked for, so
    that it isn't chosen by its result), or with `all_pairs` with every other. Raises SettingsError
    for runs of different protocols, splits or patients, and where nothing is left to compare, and
    LeakageError for a run measured on patients whose labels its features come from.

    >>> run = lf.fit_heads("cache/features.h5", agg=["std", "gini"], out="runs/spread")
    >>> lf.compare([run.folder], metric="auc").pairs
    """
    if isinstance(folders, str | os.PathLike):
        raise SettingsError(
            f"folders (={folders}) must be a list of run folders, such as [{str(folders)!r}]."
        )
    if metric not in METRICS:
        raise SettingsError(f"metric (={metric}) must be one of {', '.join(METRICS)}.")
    saved = [SavedRun.read(folder) for folder in dict.fromkeys(map(Path, folders))]
    for run in saved:
        _refuse_seen(run)
        _check_same(saved[0], run)
    rows = _choose_rows(saved, heads)
    pairs = _choose_pairs(rows["name"].tolist(), against, all_pairs=all_pairs)
    values = _values(saved, rows, metric)
    ratio = Plan.flat(saved[0].splits).test_to_train
    rarer = min(Counter(saved[0].labels.values()).values())
    means = _estimates(values, ratio, metric, rarer)
    return Comparison(
        metric=metric,
        protocol=saved[0].protocol,
        rows=rows.drop(columns="baseline").join(means, on="name"),
        pairs=_differences(_alike(saved, rows, pairs, metric, values), ratio, metric),
        values=values,
    )


def _choose_pairs(
    names: Sequence[str], against: str | None, *, all_pairs: bool
) -> list[tuple[str, str]]:
    """List the pairs (row, reference) to compare."""
    if len(names) < 2:
        raise SettingsError(f"rows to compare (={len(names)}) must be at least 2; add a run.")
    reference = _find(names, against) if against else names[0]
    if all_pairs:
        return [(b, a) for a, b in combinations(names, 2)]
    return [(name, reference) for name in names if name != reference]


def _refuse_seen(run: SavedRun) -> None:
    refuse_seen(
        run.provenance.seen(run.splits),
        f"{run.folder}: the backbone of its features",
        "Fit the run on features from weights not trained on them.",
    )


def _check_same(first: SavedRun, other: SavedRun) -> None:
    """Raise SettingsError for runs with another protocol, other splits, patients or labels."""
    if first.protocol != other.protocol:
        raise SettingsError(
            f"runs must use the same protocol; {first.folder} uses {first.protocol}, "
            f"{other.folder} {other.protocol}. Compare runs of one protocol."
        )
    differing = sorted({id for id, _ in first.sides.items() ^ other.sides.items()})
    if differing:
        raise SettingsError(
            f"runs must use the same splits; {first.folder} and {other.folder} differ "
            f"in {len(differing)}, the first {differing[0]}. Fit {other.folder} again with "
            f"--splits {first.folder / 'splits.json'}."
        )
    _check_same_patients(first, other)


def _check_same_patients(first: SavedRun, other: SavedRun) -> None:
    strangers = [
        id
        for id in first.labels
        if not is_same_patient(first.provenance.key(id), other.provenance.key(id))
    ]
    if strangers:
        raise SettingsError(
            f"runs must have the same patients; {first.folder} and {other.folder} have different "
            f"images of {', '.join(strangers[:5])}. Are they from different cohorts?"
        )
    changed = [id for id, label in first.labels.items() if other.labels.get(id, label) != label]
    if changed:
        raise SettingsError(
            f"runs must agree on the labels; {first.folder} and {other.folder} differ on "
            f"{', '.join(changed[:5])}. Fit one of them again on a store with the right labels."
        )


def _choose_rows(saved: Sequence[SavedRun], heads: Sequence[str]) -> pd.DataFrame:
    """List the rows to compare: name (after its run's, if not unique), run, head, baseline."""
    found = [(run, head) for run in saved for head in run.runs["head"].drop_duplicates()]
    # Baselines on the same splits are the same in every run: the first run's are enough.
    kept: list[tuple[SavedRun, str]] = []
    for run, head in found:
        if not (_is_baseline(run, head) and any(head == other for _, other in kept)):
            kept.append((run, head))
    count = pd.Series([head for _, head in kept]).value_counts()
    names = [head if count[head] == 1 else f"{run.folder.name}: {head}" for run, head in kept]
    if len(set(names)) < len(names):
        names = [head if count[head] == 1 else f"{run.folder}: {head}" for run, head in kept]
    rows = pd.DataFrame(
        {
            "name": names,
            "run": [str(run.folder) for run, _ in kept],
            "head": [head for _, head in kept],
            "baseline": [_is_baseline(run, head) for run, head in kept],
        }
    )
    if not heads:
        return rows
    wanted = [name for head in heads for name in _matching(rows, head)]
    return rows.set_index("name").loc[list(dict.fromkeys(wanted))].reset_index()


def _is_baseline(run: SavedRun, head: str) -> bool:
    if "kind" not in run.runs:
        return False
    return bool((run.runs.loc[run.runs["head"] == head, "kind"] == "baseline").all())


def _matching(rows: pd.DataFrame, head: str) -> list[str]:
    wanted = rows[(rows["name"] == head) | (rows["head"] == head)]["name"].tolist()
    return wanted or [_find(rows["name"].tolist(), head)]


def _find(names: Sequence[str], wanted: str) -> str:
    if wanted in names:
        return wanted
    raise SettingsError(f"head (={wanted}) must be a row of the runs: {', '.join(names)}.")


def _values(saved: Sequence[SavedRun], rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column of the runs' tables as (splits, rows)."""
    for run in saved:
        if column not in run.runs:
            raise SettingsError(
                f"run (={run.folder}) must hold {column} in runs.csv; an older version wrote the "
                "run. Fit it again with --force."
            )
    of = {str(run.folder): run.runs.set_index(["head", "split"])[column] for run in saved}
    return pd.DataFrame(
        {
            name: of[run][head]
            for name, run, head in zip(rows["name"], rows["run"], rows["head"], strict=True)
        }
    )


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two rows and their differences in each split."""

    name: str
    reference: str
    differences: pd.Series  # (splits,)
    last_epoch: bool


def _alike(
    saved: Sequence[SavedRun],
    rows: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    metric: str,
    values: pd.DataFrame,
) -> list[_Pair]:
    """Pair rows so that both are means of the ten best epochs, or both are at the last epoch."""
    baselines = set(rows.loc[rows["baseline"], "name"])
    report = saved[0].protocol == "report"
    mixed = [report and (one in baselines) != (other in baselines) for one, other in pairs]
    last = _values(saved, rows, f"{metric}_last") if any(mixed) else values
    return [
        _Pair(
            name=name,
            reference=reference,
            differences=own[name] - own[reference],
            last_epoch=at_last,
        )
        for (name, reference), at_last in zip(pairs, mixed, strict=True)
        for own in (last if at_last else values,)
    ]


def _estimates(values: pd.DataFrame, ratio: float, metric: str, rarer: int) -> pd.DataFrame:
    bounds = metric_bounds(metric)
    found = {
        name: estimate_metric(column.to_numpy(float), ratio, bounds, rarer)
        for name, column in values.items()
    }
    return pd.DataFrame(
        {name: {"mean": e.mean, "low": e.low, "high": e.high} for name, e in found.items()}
    ).T


def _differences(pairs: Sequence[_Pair], ratio: float, metric: str) -> pd.DataFrame:
    level = 1 - 0.05 / len(pairs)
    _, largest = metric_bounds(metric)
    found = [
        estimate(pair.differences.to_numpy(float), ratio, level, (-largest, largest))
        for pair in pairs
    ]
    p = np.array([e.p for e in found])
    return pd.DataFrame(
        {
            "name": [pair.name for pair in pairs],
            "reference": [pair.reference for pair in pairs],
            "difference": [e.mean for e in found],
            "low": [e.low for e in found],
            "high": [e.high for e in found],
            "p": p,
            "p_adjusted": holm(p),
            "last_epoch": [pair.last_epoch for pair in pairs],
        }
    )
