"""Rows of several runs side by side, paired by split (METHOD §4)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lymphfeat.errors import SettingsError
from lymphfeat.files import recover
from lymphfeat.intervals import estimate, holm
from lymphfeat.metrics import METRICS
from lymphfeat.provenance import is_same_patient, refuse_seen
from lymphfeat.run_provenance import RunProvenance
from lymphfeat.splits import Plan, Split, read_splits

SMALLER_IS_BETTER = ("log_loss", "brier")


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run folder read back."""

    folder: Path
    config: dict[str, Any]
    splits: tuple[Split, ...]
    runs: pd.DataFrame  # head, split, metrics
    labels: dict[str, int]
    provenance: RunProvenance

    @classmethod
    def read(cls, folder: Path) -> "SavedRun":
        """Read a run folder; raises SettingsError, naming what to do, for anything else."""
        recover(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            predictions = pd.read_csv(
                folder / "predictions.csv", dtype={"patient": str}, keep_default_na=False
            )
            return cls(
                folder=folder,
                config=config,
                splits=tuple(read_splits(folder / "splits.json")),
                runs=pd.read_csv(folder / "runs.csv"),
                labels=dict(zip(predictions["patient"], predictions["label"], strict=True)),
                provenance=RunProvenance.read(folder),
            )
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(
                f"run (={folder}) must be a run folder of `lymphfeat fit-head`; got "
                f"{str(error).splitlines()[0]}. Fit it, or fit it again with --force."
            ) from None

    @property
    def protocol(self) -> str:
        return str(self.config["settings"]["protocol"])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare_runs` found.

    rows: name, run, head, mean, low, high: each row's figure with its own corrected 95 % interval.
    pairs: name, reference, difference (name − reference), low, high: simultaneous over all pairs
        (Bonferroni), p, and p_adjusted (Holm).
    values: (splits, rows) the figures themselves.
    """

    metric: str
    protocol: str
    rows: pd.DataFrame
    pairs: pd.DataFrame
    values: pd.DataFrame

    @property
    def sentences(self) -> tuple[str, ...]:
        """Say of each pair which is better, or that it cannot be told."""
        return tuple(self._sentence(pair) for pair in self.pairs.to_dict("records"))

    def _sentence(self, pair: dict[Any, Any]) -> str:
        name, reference = pair["name"], pair["reference"]
        if not pair["p_adjusted"] < 0.05:
            return f"{name} and {reference} cannot be told apart (p {pair['p_adjusted']:.2g})."
        better = (pair["difference"] > 0) != (self.metric in SMALLER_IS_BETTER)
        size = abs(pair["difference"])
        return (
            f"{name} is {'better' if better else 'worse'} than {reference} by {size:.3f} "
            f"(p {pair['p_adjusted']:.2g})."
        )


def compare_runs(
    folders: Sequence[Path],
    *,
    metric: str = "ba",
    heads: Sequence[str] = (),
    against: str | None = None,
    all_pairs: bool = False,
) -> Comparison:
    """Compare the rows of runs, paired by split, with Nadeau–Bengio intervals and Holm's p.

    `heads` are the rows to take (default: all of every run). Each is set against one reference,
    `against` (default: the first row of the first run, in the order in which it was asked for, so
    that it isn't chosen by its result), or with `all_pairs` against every other. Raises
    SettingsError for runs of different protocols or splits, and where nothing is left to compare.
    """
    if metric not in METRICS:
        raise SettingsError(f"metric (={metric}) must be one of {', '.join(METRICS)}.")
    saved = [SavedRun.read(folder) for folder in dict.fromkeys(folders)]
    for run in saved:
        _refuse_seen(run)
    for other in saved[1:]:
        _check_same(saved[0], other)
    rows = _choose_rows(saved, heads)
    values = _values(saved, rows, metric)
    names = rows["name"].tolist()
    if len(names) < 2:
        raise SettingsError(f"rows to compare (={len(names)}) must be at least 2; add another run.")
    reference = _find(names, against) if against else names[0]
    pairs = (
        [(b, a) for a, b in combinations(names, 2)]
        if all_pairs
        else [(name, reference) for name in names if name != reference]
    )
    ratio = Plan.flat(saved[0].splits).test_to_train
    return Comparison(
        metric=metric,
        protocol=saved[0].protocol,
        rows=rows.join(_estimates(values, ratio), on="name"),
        pairs=_differences(values, pairs, ratio),
        values=values,
    )


def _refuse_seen(run: SavedRun) -> None:
    refuse_seen(
        {id for split in run.splits for id in run.provenance.seen(split)},
        f"{run.folder}: the backbone of its features",
        "Fit the run on features of weights that have not seen them.",
    )


def _check_same(first: SavedRun, other: SavedRun) -> None:
    """Refuse runs that were not measured alike."""
    if first.protocol != other.protocol:
        raise SettingsError(
            f"runs must be of one protocol; {first.folder} is {first.protocol}, "
            f"{other.folder} {other.protocol}."
        )
    sides = [
        {split.id: (set(split.train), set(split.validation)) for split in run.splits}
        for run in (first, other)
    ]
    if sides[0] != sides[1]:
        differing = sorted(id for id in {**sides[0], **sides[1]} if _differ(id, *sides))
        raise SettingsError(
            f"runs must be measured on the same splits; {first.folder} and {other.folder} differ "
            f"in {len(differing)}, the first {differing[0]}. Fit {other.folder} again with "
            f"--splits {first.folder / 'splits.json'}."
        )
    strangers = [
        id
        for id in first.labels
        if not is_same_patient(first.provenance.key(id), other.provenance.key(id))
    ]
    if strangers:
        raise SettingsError(
            f"runs must be of the same patients; {first.folder} and {other.folder} have different "
            f"images of {', '.join(strangers[:5])}. Are they of two cohorts?"
        )
    changed = [id for id, label in first.labels.items() if other.labels.get(id, label) != label]
    if changed:
        raise SettingsError(
            f"runs must agree on the labels; {first.folder} and {other.folder} differ on "
            f"{', '.join(changed[:5])}."
        )


def _differ(id: str, first: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(first.get(id) != other.get(id))


def _choose_rows(saved: Sequence[SavedRun], heads: Sequence[str]) -> pd.DataFrame:
    """List the rows to compare: name (with its run where two runs have the same), run, head."""
    found = [(run, head) for run in saved for head in run.runs["head"].drop_duplicates()]
    # Baselines on the same splits are the same in every run: the first run's stand for all.
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
    raise SettingsError(f"head (={wanted}) must be one of the runs' rows: {', '.join(names)}.")


def _values(saved: Sequence[SavedRun], rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    of = {str(run.folder): run.runs.set_index(["head", "split"])[metric] for run in saved}
    return pd.DataFrame(
        {
            name: of[run][head]
            for name, run, head in zip(rows["name"], rows["run"], rows["head"], strict=True)
        }
    )


def _estimates(values: pd.DataFrame, ratio: float) -> pd.DataFrame:
    found = {name: estimate(column.to_numpy(float), ratio) for name, column in values.items()}
    return pd.DataFrame(
        {name: {"mean": e.mean, "low": e.low, "high": e.high} for name, e in found.items()}
    ).T


def _differences(
    values: pd.DataFrame, pairs: Sequence[tuple[str, str]], ratio: float
) -> pd.DataFrame:
    level = 1 - 0.05 / len(pairs)
    found = [
        estimate((values[name] - values[reference]).to_numpy(float), ratio, level)
        for name, reference in pairs
    ]
    p = np.array([e.p for e in found])
    return pd.DataFrame(
        {
            "name": [name for name, _ in pairs],
            "reference": [reference for _, reference in pairs],
            "difference": [e.mean for e in found],
            "low": [e.low for e in found],
            "high": [e.high for e in found],
            "p": p,
            "p_adjusted": holm(p),
        }
    )
