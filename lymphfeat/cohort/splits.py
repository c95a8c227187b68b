"""Patient-level splits (training and validation patients, and a seed): make, write, read."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.fold_files import Fold, read_folds
from lymphfeat.errors import SettingsError
from lymphfeat.runtime.strict_json import json_text, parse_json


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and validation patients of one fit."""

    id: str
    seed: int  # also for the heads' initialisation and mini-batch order
    repeat: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    # Ids of the splits inside which this is an inner split: what is chosen for them is chosen on
    # its validation patients. Empty for a split that is itself measured. (A fit without two folds
    # serves both.)
    parents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.id):  # it names files and features
            raise SettingsError(
                f"split id (={self.id}) must consist of letters, digits and . _ + -, and "
                "begin with a letter or digit."
            )
        for name, side in (("training", self.train), ("validation", self.validation)):
            if len(set(side)) < len(side):
                raise SettingsError(
                    f"split {self.id}: {name} must name each patient once; splits are of patients, "
                    "never of images."
                )
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
    """Split into halves, one pair per seed, not stratified (METHOD §4, `report`).

    The seeds are the first `seeds` from `seed` on whose halves both contain both classes. A seed
    that leaves a half with one class is skipped: no AUC could be measured on it.
    """
    check_classes(labels, 2)
    known = np.array(ids)
    return [
        Split(
            id=f"report-s{drawn}",
            seed=drawn,
            repeat=repeat,
            train=tuple(known[train].tolist()),
            validation=tuple(known[validation].tolist()),
        )
        for repeat, (drawn, train, validation) in enumerate(islice(_halves(labels, seed), seeds))
    ]


def _halves(
    labels: NDArray[np.int64], first: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield seeds from `first` on whose halves both contain both classes, with the halves' rows.

    The halves are those of scikit-learn's `train_test_split`, the second one the larger.
    """
    for seed in count(first):
        order = np.random.RandomState(seed).permutation(len(labels))
        middle = (len(labels) + 1) // 2
        halves = order[middle:], order[:middle]
        if all(len(np.unique(labels[half])) == 2 for half in halves):
            yield seed, *halves


@dataclass(frozen=True, kw_only=True)
class Folds:
    """One repeat of k-fold, with the splits that serve out-of-fold choices.

    `outer[f]` validates on fold f. `pairs[f, g]` (f < g) trains without folds f and g: its
    probabilities of g's patients are out of fold for outer split f, and those of f's for g. All
    inner cross-validations of k folds together thus cost k (k - 1) / 2 fits, not k (k - 1).
    """

    outer: tuple[Split, ...]
    pairs: dict[tuple[int, int], Split]

    @classmethod
    def of(cls, outer: Sequence[Split]) -> "Folds":
        """Make the pairs of the folds of one repeat."""
        return cls(
            outer=tuple(outer),
            pairs={
                (f, g): _without_both(outer[f], outer[g], g)
                for f in range(len(outer))
                for g in range(f + 1, len(outer))
            },
        )

    def inner(self, fold: int) -> list[Split]:
        """Return the splits whose validation patients cover the outer split's training patients.

        Their `validation` also holds fold `fold` itself, which must not be used.
        """
        return [split for pair, split in self.pairs.items() if fold in pair]


def _without_both(first: Split, second: Split, name: int) -> Split:
    outside = set(second.validation)
    return Split(
        id=f"{first.id}+{name}",
        seed=first.seed,
        repeat=first.repeat,
        train=tuple(patient for patient in first.train if patient not in outside),
        validation=(*first.validation, *second.validation),
        parents=(first.id, second.id),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The splits that are measured, and for each the inner splits that choices are made on.

    `inner[s]` covers the training patients of `outer[s]` with validation patients, and never trains
    on its validation patients; it is empty where nothing is chosen. Of an inner split's validation
    patients only those who train `outer[s]` may be used.
    """

    outer: tuple[Split, ...]
    inner: tuple[tuple[Split, ...], ...]

    @classmethod
    def flat(cls, outer: Sequence[Split]) -> "Plan":
        """Plan without inner splits."""
        return cls(outer=tuple(outer), inner=((),) * len(outer))

    @classmethod
    def nested(cls, outer: Sequence[Split], labels: Mapping[str, int], *, folds: int = 5) -> "Plan":
        """Plan inner splits: by pairs for folds, by a separate k-fold for any other split.

        An inner split whose id is already taken by an outer one gets another id.
        """
        taken = {split.id for split in outer}
        inner: dict[str, tuple[Split, ...]] = {}
        repeats: dict[int, list[Split]] = {}
        for split in outer:
            repeats.setdefault(split.repeat, []).append(split)
        for members in repeats.values():
            if _are_folds(members):
                repeat = Folds.of(members)
                inner |= {split.id: tuple(repeat.inner(f)) for f, split in enumerate(members)}
            else:
                inner |= {split.id: _inside(split, labels, folds) for split in members}
        return cls(
            outer=tuple(outer),
            inner=tuple(
                tuple(_renamed(serving, taken) for serving in inner[split.id]) for split in outer
            ),
        )

    @classmethod
    def recorded(cls, splits: Iterable[Split]) -> "Plan":
        """Plan splits that record which of them are inner splits of which.

        Those that are inner to none of the others are measured. Inner splits are planned when, for
        every measured split, they cover its training patients, each of them once.
        """
        given = {split.id: split for split in splits}
        outer = [split for split in given.values() if not set(split.parents) & set(given)]
        inner = [
            tuple(serving for serving in given.values() if split.id in serving.parents)
            for split in outer
        ]
        if all(_cover(split, within) for split, within in zip(outer, inner, strict=True)):
            return cls(outer=tuple(outer), inner=tuple(inner))
        return cls.flat(outer)

    @property
    def is_nested(self) -> bool:
        """Return whether choices can be made inside every measured split."""
        return all(self.inner)

    def only(self, ids: Sequence[str]) -> "Plan":
        """Return the plan for some of the measured splits, in the order of `ids`."""
        place = {split.id: number for number, split in enumerate(self.outer)}
        kept = [place[id] for id in ids]
        return Plan(
            outer=tuple(self.outer[number] for number in kept),
            inner=tuple(self.inner[number] for number in kept),
        )

    @property
    def inner_once(self) -> list[Split]:
        """List every inner split once."""
        return list({split.id: split for part in self.inner for split in part}.values())

    @property
    def test_to_train(self) -> float:
        """Return the mean ratio of validation to training patients."""
        return float(np.mean([len(s.validation) / len(s.train) for s in self.outer]))


def _cover(split: Split, inner: Sequence[Split]) -> bool:
    """Return whether each training patient of a split is out of fold in one inner split."""
    outside = set(split.validation)
    if any(outside & set(serving.train) for serving in inner):
        return False
    judged = Counter(patient for serving in inner for patient in serving.validation)
    return all(judged[patient] == 1 for patient in split.train)


def _renamed(split: Split, taken: set[str]) -> Split:
    while split.id in taken:
        split = replace(split, id=f"{split.id}-inner")
    return split


def _are_folds(splits: Sequence[Split]) -> bool:
    """Return whether each split validates on one part of all patients and trains on the rest."""
    everyone = {patient for split in splits for patient in split.validation}
    return (
        len(splits) >= 3
        and sum(len(split.validation) for split in splits) == len(everyone)
        and all(set(split.train) == everyone - set(split.validation) for split in splits)
    )


def _inside(split: Split, labels: Mapping[str, int], folds: int) -> tuple[Split, ...]:
    """Cut a split's training patients into stratified folds."""
    truth = np.array([labels[patient] for patient in split.train])
    check_classes(truth, folds)
    (repeat,) = kfold_splits(split.train, truth, folds=folds, seeds=1, seed=split.seed)
    return tuple(
        replace(inner, id=f"{split.id}.{fold}", repeat=split.repeat, parents=(split.id,))
        for fold, inner in enumerate(repeat.outer)
    )


def kfold_splits(
    ids: Sequence[str], labels: NDArray[np.int64], *, folds: int, seeds: int, seed: int = 0
) -> list[Folds]:
    """Make repeats of stratified k-fold, one per seed (METHOD §4, `honest`)."""
    check_classes(labels, folds)
    return [
        _one_repeat(np.array(ids), labels, folds, seed + repeat, repeat) for repeat in range(seeds)
    ]


def _one_repeat(
    ids: NDArray[np.str_], labels: NDArray[np.int64], folds: int, seed: int, repeat: int
) -> Folds:
    fold_of = _stratified(labels, folds, seed)

    def split(fold: int) -> Split:
        return Split(
            id=f"kfold{folds}-r{repeat}-f{fold}",
            seed=seed,
            repeat=repeat,
            train=tuple(ids[fold_of != fold].tolist()),
            validation=tuple(ids[fold_of == fold].tolist()),
        )

    return Folds.of([split(fold) for fold in range(folds)])


def _stratified(labels: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Return the fold of every patient, (P,), as scikit-learn's `StratifiedKFold` draws it.

    Patients are dealt out in turn, class after class, and each class's folds are then shuffled.
    scikit-learn itself would take longer to import than all else that precedes a fit.
    """
    generator = np.random.RandomState(seed)
    fold_of = np.empty(len(labels), np.int64)
    dealt = 0
    for label in dict.fromkeys(labels.tolist()):  # as they first appear
        (own,) = np.nonzero(labels == label)
        places = np.sort((dealt + np.arange(len(own))) % folds)
        generator.shuffle(places)
        fold_of[own] = places
        dealt += len(own)
    return fold_of


def find_splits(
    text: str, ids: Sequence[str], labels: NDArray[np.int64], *, seed: int = 0
) -> list[Split]:
    """Return the splits that `--splits` names, of the labelled ones among patients.

    `text` is a file or folder that `read_splits` reads, `kfold:K` or `kfold:KxR` (R repeats of
    stratified k-fold), `report:S` (S halves), any of them followed by `+inner` (adds their inner
    splits, see `Plan`, which out-of-fold thresholds need), or `all` (everyone trains). `ids` and
    `labels` (P,) are of all patients; -1 is unknown. Raises SettingsError for anything else, and
    for a file with unknown patients.
    """
    name, inner, rest = text.partition("+inner")
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    known = [id for id in ids if label_of[id] >= 0]
    if name == "all" and not inner:
        return [Split(id="all", seed=seed, repeat=0, train=tuple(known), validation=())]
    splits = _named_splits(text if rest else name, known, labels[labels >= 0], seed)
    check_splits(splits, label_of, name)
    return [*splits, *(Plan.nested(splits, label_of).inner_once if inner else ())]


def _named_splits(
    name: str, ids: Sequence[str], labels: NDArray[np.int64], seed: int
) -> list[Split]:
    plan = re.fullmatch(r"(kfold|report):(\d+)(?:x(\d+))?", name)
    if plan is None:
        return read_splits(Path(name))
    count, repeats = int(plan[2]), int(plan[3] or 1)
    if plan[1] == "report" and plan[3] is None and count >= 1:
        return report_splits(ids, labels, seeds=count, seed=seed)
    if plan[1] == "kfold" and count >= 2 and repeats >= 1:
        repeated = kfold_splits(ids, labels, folds=count, seeds=repeats, seed=seed)
        return [split for repeat in repeated for split in repeat.outer]
    raise SettingsError(
        f"splits (={name}) must be kfold:K, kfold:KxR (K at least 2) or report:S, each also with "
        "+inner; all; or a file of splits."
    )


def splits_to_json(splits: Sequence[Split]) -> dict[str, Any]:
    """Return id -> seed, repeat, training and validation patients, parents."""
    return {
        split.id: {name: value for name, value in asdict(split).items() if name != "id"}
        for split in splits
    }


def write_splits(splits: Sequence[Split], path: Path) -> None:
    """Write splits as JSON, as `splits_to_json` returns them."""
    path.write_text(json_text(splits_to_json(splits), indent=1), encoding="utf-8")


def splits_from_json(content: Mapping[str, Any]) -> list[Split]:
    """Read what `splits_to_json` returned; raises ValueError, KeyError or TypeError otherwise."""
    return [
        Split(
            id=name,
            seed=int(entry["seed"]),
            repeat=int(entry["repeat"]),
            train=_texts(entry["train"]),
            validation=_texts(entry["validation"]),
            parents=_texts(entry.get("parents", [])),  # older files have none
        )
        for name, entry in content.items()
    ]


def read_splits(path: Path) -> list[Split]:
    """Read splits written by `write_splits`, or the folds of a CSV file or folder (`read_folds`).

    Raises SettingsError for anything else.
    """
    if path.is_dir() or path.suffix.lower() == ".csv":
        return _of_folds(read_folds(path))
    try:
        return splits_from_json(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(
            f"{path}: must be a JSON file of splits, id -> seed, repeat, train, validation; "
            f"got {type(error).__name__}: {error}."
        ) from None


def _of_folds(folds: Sequence[Fold]) -> list[Split]:
    """Make splits of folds: one repeat where no patient is held out twice, else one each."""
    counts = Counter(patient for fold in folds for patient in fold.held_out)
    together = all(number == 1 for number in counts.values())
    return [
        Split(
            id=fold.name,
            seed=0 if together else number,
            repeat=0 if together else number,
            train=fold.train,
            validation=fold.held_out,
        )
        for number, fold in enumerate(folds)
    ]


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} in place of a list of ids")
    return tuple(values)


def with_guessed_parents(splits: Sequence[Split]) -> list[Split]:
    """Return the splits of a store that does not record parents, with the parents inferred.

    `a.0` is inside `a` when both its sides together are the training patients of `a`; `a+1` is when
    it trains without the validation patients of `a` and of another split.
    """
    return [replace(split, parents=_guess_parents(split, splits)) for split in splits]


def _guess_parents(split: Split, others: Sequence[Split]) -> tuple[str, ...]:
    train, validation = set(split.train), set(split.validation)
    for other in others:
        outside = set(other.validation)
        if re.fullmatch(rf"{re.escape(other.id)}\.\d+", split.id):
            if train | validation == set(other.train):
                return (other.id,)
        elif re.fullmatch(rf"{re.escape(other.id)}\+\d+", split.id):
            beside = [o.id for o in others if set(o.validation) == validation - outside]
            if outside < validation and train | validation == set(other.train) | outside:
                return (other.id, *beside)
    return ()


def check_splits(splits: Sequence[Split], labels: Mapping[str, int], source: object) -> None:
    """Raise SettingsError unless all patients are labelled and both sides have both classes.

    `labels` maps every patient to its label, -1 where unknown; `source` names the splits in the
    message.
    """
    named = dict.fromkeys(patient for split in splits for patient in split.train + split.validation)
    for wrong, what in (
        ([patient for patient in named if patient not in labels], "patients of this cohort"),
        ([patient for patient in named if labels.get(patient) == -1], "labelled patients"),
    ):
        if wrong:
            raise SettingsError(
                f"{source}: must name {what}; got {', '.join(wrong[:5])}"
                f"{', …' if len(wrong) > 5 else ''}. Was it made for another cohort?"
            )
    for split in splits:
        for name, side in (("training", split.train), ("validation", split.validation)):
            if {labels[patient] for patient in side} != {0, 1}:
                raise SettingsError(
                    f"{source}: the {name} patients of split {split.id} must include both classes."
                )
    if not splits:
        raise SettingsError(f"{source}: must hold at least one split; got none.")
