"""Patient-level splits (training and validation patients, and a seed): made, written, read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, train_test_split

from lymphfeat.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and validation patients of one fit."""

    id: str
    seed: int  # also of the heads' initialisation and mini-batch order
    repeat: int
    train: tuple[str, ...]
    validation: tuple[str, ...]

    def __post_init__(self) -> None:
        shared = sorted(set(self.train) & set(self.validation))
        if shared:
            raise SettingsError(
                f"split {self.id}: training and validation must not share patients; "
                f"got {', '.join(shared)} in both."
            )


def check_classes(labels: NDArray[np.int64], least: int) -> None:
    """Raise SettingsError unless both classes have at least `least` patients."""
    for label, name in ((0, "reactive"), (1, "tumoral")):
        count = int((labels == label).sum())
        if count < least:
            raise SettingsError(
                f"labelled {name} patients (={count}) must be at least {least} for these splits; "
                "add patients or choose fewer --folds."
            )


def report_splits(
    ids: Sequence[str], labels: NDArray[np.int64], *, seeds: int, seed: int = 0
) -> list[Split]:
    """Split in halves once a seed, not stratified (METHOD §4, `report`)."""
    check_classes(labels, 2)
    splits = []
    for repeat in range(seeds):
        train, validation = train_test_split(
            np.array(ids), test_size=0.5, random_state=seed + repeat
        )
        splits.append(
            Split(
                id=f"report-s{seed + repeat}",
                seed=seed + repeat,
                repeat=repeat,
                train=tuple(train.tolist()),
                validation=tuple(validation.tolist()),
            )
        )
    return splits


@dataclass(frozen=True, kw_only=True)
class Folds:
    """One repeat of stratified k-fold, with the splits that serve out-of-fold thresholds.

    `outer[f]` validates on fold f. `pairs[f, g]` (f < g) trains without folds f and g: its
    probabilities of g's patients are out of fold for outer split f, and those of f's for g. So all
    inner cross-validations of k folds together cost k (k - 1) / 2 fits, not k (k - 1).
    """

    outer: tuple[Split, ...]
    pairs: dict[tuple[int, int], Split]

    def inner(self, fold: int) -> list[Split]:
        """Return the splits whose validation patients cover the outer split's training patients.

        Their `validation` also holds fold `fold` itself, which is not to be looked at.
        """
        return [split for pair, split in self.pairs.items() if fold in pair]


def kfold_splits(
    ids: Sequence[str], labels: NDArray[np.int64], *, folds: int, seeds: int, seed: int = 0
) -> list[Folds]:
    """Make repeats of stratified k-fold, one a seed (METHOD §4, `honest`)."""
    check_classes(labels, folds)
    return [
        _one_repeat(np.array(ids), labels, folds, seed + repeat, repeat) for repeat in range(seeds)
    ]


def _one_repeat(
    ids: NDArray[np.str_], labels: NDArray[np.int64], folds: int, seed: int, repeat: int
) -> Folds:
    parts = [
        part
        for _, part in StratifiedKFold(folds, shuffle=True, random_state=seed).split(ids, labels)
    ]

    def split(name: str, left_out: tuple[int, ...]) -> Split:
        outside = np.sort(np.concatenate([parts[fold] for fold in left_out]))
        inside = np.setdiff1d(np.arange(len(ids)), outside)
        return Split(
            id=name,
            seed=seed,
            repeat=repeat,
            train=tuple(ids[inside].tolist()),
            validation=tuple(ids[outside].tolist()),
        )

    return Folds(
        outer=tuple(split(f"kfold{folds}-r{repeat}-f{f}", (f,)) for f in range(folds)),
        pairs={
            (f, g): split(f"kfold{folds}-r{repeat}-f{f}+{g}", (f, g))
            for f in range(folds)
            for g in range(f + 1, folds)
        },
    )


def write_splits(splits: Sequence[Split], path: Path) -> None:
    """Write splits as JSON: id -> training and validation patients."""
    content = {split.id: {k: v for k, v in asdict(split).items() if k != "id"} for split in splits}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_splits(path: Path) -> list[Split]:
    """Read splits written by `write_splits`; raises SettingsError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [
            Split(
                id=name,
                seed=int(entry["seed"]),
                repeat=int(entry["repeat"]),
                train=tuple(entry["train"]),
                validation=tuple(entry["validation"]),
            )
            for name, entry in content.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(
            f"{path}: must be a JSON file of splits, id -> seed, repeat, train, validation; "
            f"got {type(error).__name__}: {error}."
        ) from None
