"""Patient-level splits: disjoint, covering, written and read back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold, train_test_split

from lymphfeat.cohort.splits import (
    Plan,
    Split,
    check_splits,
    kfold_splits,
    read_splits,
    report_splits,
    with_guessed_parents,
    write_splits,
)
from lymphfeat.errors import SettingsError

IDS = [f"P{i}" for i in range(40)]
LABELS = np.array([0, 1, 1, 0] * 10)


def test_report_splits_are_the_published_halves() -> None:
    splits = report_splits(IDS, LABELS, seeds=3, seed=7)
    assert [split.seed for split in splits] == [7, 8, 9]
    train, validation = train_test_split(IDS, test_size=0.5, random_state=8)
    assert splits[1].train == tuple(train)
    assert splits[1].validation == tuple(validation)


@given(st.integers(4, 40), st.integers(0, 2**32 - 1))
def test_halves_are_those_of_scikit_learn(patients: int, seed: int) -> None:
    labels = LABELS[:patients]
    (split,) = report_splits(IDS[:patients], labels, seeds=1, seed=seed)
    halves = train_test_split(IDS[:patients], test_size=0.5, random_state=split.seed)
    assert [list(split.train), list(split.validation)] == halves


@given(
    st.lists(st.integers(0, 1), min_size=5, max_size=40).map(np.array),
    st.integers(2, 6),
    st.integers(0, 2**32 - 1),
)
def test_folds_are_those_of_scikit_learn(labels: np.ndarray, folds: int, seed: int) -> None:
    assume(np.bincount(labels, minlength=2).min() >= folds)
    ids = np.array(IDS[: len(labels)])
    (repeat,) = kfold_splits(ids.tolist(), labels, folds=folds, seeds=1, seed=seed)
    theirs = StratifiedKFold(folds, shuffle=True, random_state=seed).split(ids, labels)
    assert [(split.train, split.validation) for split in repeat.outer] == [
        (tuple(ids[inside]), tuple(ids[outside])) for inside, outside in theirs
    ]


@given(st.integers(3, 8), st.integers(1, 3), st.integers(0, 99))
def test_every_patient_is_validated_once_a_repeat(folds: int, seeds: int, seed: int) -> None:
    repeats = kfold_splits(IDS, LABELS, folds=folds, seeds=seeds, seed=seed)
    assert len(repeats) == seeds
    for repeat in repeats:
        validated = [patient for split in repeat.outer for patient in split.validation]
        assert sorted(validated) == sorted(IDS)
        assert all(set(s.train) | set(s.validation) == set(IDS) for s in repeat.outer)


def test_inner_splits_cover_the_training_patients_and_never_train_on_the_fold() -> None:
    (repeat,) = kfold_splits(IDS, LABELS, folds=5, seeds=1)
    for fold, outer in enumerate(repeat.outer):
        inner = repeat.inner(fold)
        assert len(inner) == 4
        assert not any(set(split.train) & set(outer.validation) for split in inner)
        covered = [p for split in inner for p in split.validation if p in outer.train]
        assert sorted(covered) == sorted(outer.train)
    assert len(repeat.pairs) == 10


def test_folds_are_stratified() -> None:
    (repeat,) = kfold_splits(IDS, LABELS, folds=5, seeds=1)
    label = dict(zip(IDS, LABELS, strict=True))
    assert {sum(label[p] for p in split.validation) for split in repeat.outer} == {4}


def test_written_splits_read_back(tmp_path: Path) -> None:
    splits = report_splits(IDS, LABELS, seeds=2)
    write_splits(splits, tmp_path / "splits.json")
    assert read_splits(tmp_path / "splits.json") == splits


def test_foreign_split_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text('{"a": {"train": ["P1"]}}')
    with pytest.raises(SettingsError, match=r"splits\.json: must be a JSON file of splits"):
        read_splits(path)


def test_a_patient_on_both_sides_is_refused() -> None:
    with pytest.raises(SettingsError, match="must not share patients; got P1 in both"):
        Split(id="x", seed=0, repeat=0, train=("P1", "P2"), validation=("P1",))


def test_too_few_patients_for_the_folds() -> None:
    with pytest.raises(SettingsError, match=r"reactive patients \(=1\) must be at least 5"):
        kfold_splits(IDS[:9], np.array([0] + [1] * 8), folds=5, seeds=1)


LABEL_OF = dict(zip(IDS, LABELS.tolist(), strict=True))


def _check_inner(plan: Plan) -> None:
    for outer, inner in zip(plan.outer, plan.inner, strict=True):
        assert not any(set(split.train) & set(outer.validation) for split in inner)
        covered = [p for split in inner for p in split.validation if p in set(outer.train)]
        assert sorted(covered) == sorted(outer.train)


def test_folds_from_a_file_are_nested_as_when_they_were_made(tmp_path: Path) -> None:
    made = kfold_splits(IDS, LABELS, folds=5, seeds=2)
    write_splits([split for repeat in made for split in repeat.outer], tmp_path / "splits.json")
    plan = Plan.nested(read_splits(tmp_path / "splits.json"), LABEL_OF)
    assert plan.inner_once == [split for repeat in made for split in repeat.pairs.values()]
    _check_inner(plan)


@pytest.mark.parametrize("seeds", [1, 3])
def test_splits_that_are_no_folds_are_nested_inside_their_training_patients(seeds: int) -> None:
    plan = Plan.nested(report_splits(IDS, LABELS, seeds=seeds), LABEL_OF, folds=3)
    assert [len(inner) for inner in plan.inner] == [3] * seeds
    assert len(plan.inner_once) == 3 * seeds
    _check_inner(plan)
    for outer, inner in zip(plan.outer, plan.inner, strict=True):
        assert all(set(s.train) | set(s.validation) == set(outer.train) for s in inner)


def test_flat_plan_has_no_inner_splits_and_knows_the_ratio() -> None:
    plan = Plan.flat(report_splits(IDS, LABELS, seeds=2))
    assert plan.inner == ((), ())
    assert plan.test_to_train == 1


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (("P1", "P0", "P99"), ("P2", "P3"), "must name patients of this cohort; got P99"),
        (("P1", "P0", "P5"), ("P2", "P3"), "must name labelled patients; got P5"),
        (("P1", "P2"), ("P3", "P6"), "training patients of split x must include both classes"),
    ],
)
def test_foreign_splits_are_refused(
    train: tuple[str, ...], validation: tuple[str, ...], message: str
) -> None:
    split = Split(id="x", seed=0, repeat=0, train=train, validation=validation)
    with pytest.raises(SettingsError, match=message):
        check_splits([split], {**LABEL_OF, "P5": -1}, "splits.json")


def test_images_in_place_of_patients_are_refused() -> None:
    with pytest.raises(SettingsError, match="name each patient once; splits are of patients"):
        Split(id="x", seed=0, repeat=0, train=("P1", "P1", "P2"), validation=("P3",))


# --- which split serves which --------------------------------------------------------------------

DOTTED = [
    Split(id="a", seed=0, repeat=0, train=tuple(IDS[:20]), validation=tuple(IDS[20:])),
    Split(id="a.1", seed=1, repeat=1, train=tuple(IDS[20:]), validation=tuple(IDS[:20])),
]


def test_inner_splits_say_whom_they_serve(tmp_path: Path) -> None:
    for splits in (
        report_splits(IDS, LABELS, seeds=2),
        kfold_splits(IDS, LABELS, folds=3, seeds=1)[0].outer,
    ):
        plan = Plan.nested(splits, LABEL_OF, folds=3)
        every = [*plan.outer, *plan.inner_once]
        assert Plan.recorded(every) == plan
        write_splits(every, tmp_path / "splits.json")
        assert Plan.recorded(read_splits(tmp_path / "splits.json")) == plan


def test_a_split_of_ones_own_is_measured_whatever_its_name() -> None:
    assert Plan.recorded(DOTTED).outer == tuple(DOTTED)


def test_no_inner_split_takes_the_name_of_a_measured_one() -> None:
    plan = Plan.nested(DOTTED, LABEL_OF, folds=3)
    every = [*plan.outer, *plan.inner_once]
    assert len({split.id for split in every}) == len(every) == 2 + 6
    _check_inner(plan)
    assert Plan.recorded(every) == plan


def test_inner_splits_that_do_not_cover_are_no_use() -> None:
    plan = Plan.nested(report_splits(IDS, LABELS, seeds=2), LABEL_OF, folds=3)
    assert Plan.recorded([*plan.outer, *plan.inner_once[1:]]) == Plan.flat(plan.outer)


def test_old_files_without_parents_are_read_and_those_of_old_stores_guessed(tmp_path: Path) -> None:
    for splits in (
        report_splits(IDS, LABELS, seeds=2),
        kfold_splits(IDS, LABELS, folds=3, seeds=2)[1].outer,
    ):
        plan = Plan.nested(splits, LABEL_OF, folds=3)
        every = [*plan.outer, *plan.inner_once]
        write_splits(every, tmp_path / "splits.json")
        content = json.loads((tmp_path / "splits.json").read_text())
        for entry in content.values():
            del entry["parents"]
        (tmp_path / "splits.json").write_text(json.dumps(content))
        read = read_splits(tmp_path / "splits.json")
        assert not any(split.parents for split in read)
        assert with_guessed_parents(read) == every
    assert with_guessed_parents(DOTTED) == DOTTED  # a name alone proves nothing


@pytest.mark.parametrize("seeds", [1, 12])
def test_halves_hold_both_classes(seeds: int) -> None:
    """Of the first seeds several leave a half without a reactive patient."""
    labels = np.array([0, 0] + [1] * 10)
    splits = report_splits(IDS[:12], labels, seeds=seeds)
    check_splits(splits, dict(zip(IDS, labels.tolist(), strict=False)), "halves")
    usable = []
    for seed in range(40):
        halves = train_test_split(labels, test_size=0.5, random_state=seed)
        if all(set(half.tolist()) == {0, 1} for half in halves):
            usable.append(seed)
    assert usable[:12] != list(range(12))
    assert [split.seed for split in splits] == usable[:seeds]
    assert [split.repeat for split in splits] == list(range(seeds))
    assert splits[-1].id == f"report-s{usable[seeds - 1]}"


def test_a_word_in_place_of_a_list_of_patients_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text('{"a": {"seed": 0, "repeat": 0, "train": "P1", "validation": ["P2"]}}')
    with pytest.raises(SettingsError, match="'P1' in place of a list of ids"):
        read_splits(path)
