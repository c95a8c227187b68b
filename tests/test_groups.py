"""Groups of patients are never divided, and what they do to a result is said."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lymphfeat.cohort.groups import group_splits, read_groups
from lymphfeat.cohort.splits import Plan, Split, kfold_splits
from lymphfeat.errors import CohortError, LeakageError, SettingsError
from lymphfeat.evaluation.groups import check_groups, measure_by_group, warn_of_groups
from lymphfeat.evaluation.metrics import roc_auc
from lymphfeat.features.store import FeatureStore
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_both, fit_heads
from lymphfeat.importing import import_bags
from lymphfeat.settings import FitSettings, GroupFolds, HeadGrid
from lymphfeat_cli.main import cli
from tests.cohorts import write_text

SETTINGS = FitSettings(
    seeds=2, folds=3, groups="laboratory", precision="float32", device="cpu", threads=1
)
LABORATORIES = ("A", "B/1", "B 1", "C")  # of which two have the same plain name


def splits_of(labels: list[int], groups: list[str], how: GroupFolds, **other: int) -> list[Split]:
    ids = [f"P{number}" for number in range(len(labels))]
    arguments = {"folds": 3, "seeds": 2, **other}
    return group_splits(ids, np.array(labels), np.array(groups), how=how, **arguments)


@given(st.data())
def test_no_group_is_ever_divided(data: st.DataObject) -> None:
    count = data.draw(st.integers(6, 12))
    groups = [f"g{k}" for k in range(count) for _ in range(data.draw(st.integers(2, 5)))]
    known_ones = {groups.index(group) + k for group in groups for k in (0, 1)}  # of both classes
    labels = [
        number % 2 if number in known_ones or data.draw(st.booleans()) else -1
        for number in range(len(groups))
    ]
    found = splits_of(labels, groups, data.draw(st.sampled_from(["each", "whole"])))
    group_of = {f"P{number}": group for number, group in enumerate(groups)}
    known = {f"P{number}" for number, label in enumerate(labels) if label >= 0}
    for repeat in {split.repeat for split in found}:
        own = [split for split in found if split.repeat == repeat]
        held_out = [id for split in own for id in split.validation]
        assert sorted(held_out) == sorted(known)  # everyone, once
        for split in own:
            assert {*split.train, *split.validation} == known
            sides = [{group_of[id] for id in side} for side in (split.train, split.validation)]
            assert not sides[0] & sides[1]


def test_inner_splits_divide_no_group_either() -> None:
    labels, groups = [0, 1] * 12, [name for name in "ABCD" for _ in range(6)]
    splits = splits_of(labels, groups, "each")
    plan = Plan.nested(splits, {f"P{n}": label for n, label in enumerate(labels)})
    group_of = {f"P{n}": group for n, group in enumerate(groups)}
    assert len(plan.inner_once) == len(list(combinations("ABCD", 2)))
    for split in plan.inner_once:
        trained = {group_of[id] for id in split.train}
        assert not trained & {group_of[id] for id in split.validation}


@pytest.mark.parametrize(
    ("labels", "groups", "how", "message"),
    [
        ([0, 1, 0, 1], ["A"] * 4, "each", "must be 2 to 30 to be held out in turn; got 1"),
        ([0, 1] * 31, [f"g{k // 2}" for k in range(62)], "each", "got 31. Use --group-folds whole"),
        ([0, 1, 0, 0], ["A", "A", "B", "B"], "each", "got only one class in B"),
        ([0, 1] * 4, ["A", "B"] * 4, "whole", r"folds \(=3\) must be at most the number of groups"),
        ([0, 0, 0, 1], ["A", "B", "C", "D"], "whole", r"tumoral patients \(=1\) must be at least"),
    ],
)
def test_groups_that_cannot_be_held_out_are_refused(
    labels: list[int], groups: list[str], how: GroupFolds, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        splits_of(labels, groups, how)


def test_groups_are_read_from_a_column() -> None:
    table = pd.DataFrame(
        {"label": [1, 0, -1], "split": "train", "lab": ["x", "y", None], "ward": [1.0, 2.5, 3.0]},
        index=["P1", "P2", "P3"],
    )
    assert read_groups(table, "lab").tolist() == ["x", "y", ""]
    assert read_groups(table, "ward").tolist() == ["1", "2.5", "3"]
    persons = table.assign(person=[12345671.0, 12345672.0, 12345671.0])
    assert read_groups(persons, "person").tolist() == ["12345671", "12345672", "12345671"]
    with pytest.raises(SettingsError, match="column of the cohort's table: lab, ward"):
        read_groups(table, "label")
    with pytest.raises(CohortError, match="missing for P3"):
        read_groups(table.assign(label=[1, 0, 0]), "lab")


def test_splits_that_divide_a_group_are_a_leak() -> None:
    ids, labels = [f"P{n}" for n in range(12)], np.arange(12) % 2
    groups = np.array(list("ABCDEF") * 2)
    (folds,) = kfold_splits(ids, labels, folds=3, seeds=1)
    with pytest.raises(LeakageError, match="must not share a group; both have C, E"):
        check_groups(Plan.flat(folds.outer), ids, labels, groups)


def test_inner_splits_without_a_class_are_refused() -> None:
    labels = [0, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    groups = list("AABBCCCCDD")
    ids = [f"P{n}" for n in range(10)]
    splits = [
        Split(
            id=name,
            seed=0,
            repeat=0,
            train=tuple(id for id, group in zip(ids, groups, strict=True) if group != name),
            validation=tuple(id for id, group in zip(ids, groups, strict=True) if group == name),
        )
        for name in "ABCD"
    ]
    plan = Plan.nested(splits, dict(zip(ids, labels, strict=True)))
    check_groups(Plan.flat(splits), ids, np.array(labels), np.array(groups))
    labels[0] = labels[2] = 1  # all but C and D are tumoral now
    with pytest.raises(SettingsError, match=r"are left out; split C\+3 has only one"):
        check_groups(plan, ids, np.array(labels), np.array(groups))


@pytest.mark.parametrize("size", [1, 2, 10])
def test_groups_without_a_say_are_rarely_warned_of(size: int) -> None:
    """At a level of .05, whatever the size of the groups."""
    warned = 0
    for seed in range(60):
        labels = np.random.default_rng(seed).permutation(np.arange(60) % 2)
        groups = np.array([f"g{k // size}" for k in range(60)])
        warned += bool(warn_of_groups(labels, groups, "laboratory"))
    assert warned <= 8  # of 60; more by chance once in a hundred times


def test_groups_that_predict_the_label_are_named() -> None:
    labels = np.array([1] * 9 + [0] + [0] * 9 + [1] + [-1] * 5)
    groups = np.array(["A"] * 10 + ["B"] * 10 + ["C"] * 5)
    (told,) = warn_of_groups(labels, groups, "laboratory")
    assert "10% of the patients of B are tumoral, 90% of A" in told


def write_bags(root: Path) -> Path:
    """Write bags of four laboratories, each with an offset; tumoral cells vary more."""
    root.mkdir()
    lines = ["id,label,age,laboratory,scanner"]
    for number in range(48):
        laboratory = number // 2 % 4
        label = number % 2
        rng = np.random.default_rng(number)
        own = rng.normal(3 * laboratory, 1 + label, (6 + number % 3, 4))
        np.save(root / f"P{number}.npy", own)
        scanner = ("old", "new")[label if number % 12 > 1 else 1 - label]
        lines.append(f"P{number},{label},{40 + number % 9},{LABORATORIES[laboratory]},{scanner}")
    write_text(root / "patients.csv", *lines)
    return root


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    root = tmp_path_factory.mktemp("groups")
    return import_bags(write_bags(root / "bags"), root / "store.h5")


@pytest.mark.seconds
@pytest.mark.parametrize("how", ["each", "whole"])
def test_a_run_by_group(how: GroupFolds, store: FeatureStore, tmp_path: Path) -> None:
    settings = FitSettings(
        **vars(SETTINGS) | {"group_folds": how, "fusions": ("late",), "folds": 4}
    )
    run = fit_heads(store, HeadGrid(agg=("mean", "std")), settings, tmp_path / "run")
    outcome = run.outcome
    assert len(outcome.splits) == (4 if how == "each" else 8)
    group_of = store.table["laboratory"].to_dict()
    for split in outcome.splits:
        assert not {group_of[id] for id in split.train} & {group_of[id] for id in split.validation}
    assert run.by_group is not None
    written = pd.read_csv(tmp_path / "run" / "groups.csv")
    assert list(written["group"].unique()) == sorted(LABORATORIES)
    assert list(written["head"].unique()) == run.summary["head"].tolist()
    own = outcome.predictions[outcome.predictions["head"] == "std"]
    own = own[own["split"].isin([split.id for split in outcome.splits if split.repeat == 0])]
    own = own[own["patient"].map(group_of) == "C"]
    row = written[(written["head"] == "std") & (written["group"] == "C")].iloc[0]
    labels = own["label"].to_numpy()
    assert (row["reactive"], row["tumoral"]) == ((labels == 0).sum(), (labels == 1).sum())
    assert row["auc"] == pytest.approx(float(roc_auc(own["probability"].to_numpy(), labels)))
    assert row["sensitivity"] == pytest.approx(own.loc[labels == 1, "predicted"].mean())
    model = finalize(tmp_path / "run", tmp_path / "model", row="std + clinical (late)")
    assert model.attributes.names == ("age", "scanner")  # not the laboratory


@pytest.mark.seconds
def test_a_grouping_that_predicts_the_label_is_warned_of(store: FeatureStore) -> None:
    for column, warned in (("laboratory", False), ("scanner", True)):
        settings = FitSettings(**vars(SETTINGS) | {"groups": column})
        run = fit_heads(store, HeadGrid(agg=("std",)), settings)
        told = [line for line in run.outcome.warnings if f"{column} predicts the label" in line]
        assert bool(told) == warned


@pytest.mark.seconds
def test_groups_go_with_the_honest_protocol(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must go with --protocol honest"):
        FitSettings(protocol="report", groups="laboratory")
    with pytest.raises(SettingsError, match="must go with --protocol honest"):
        fit_both(store, HeadGrid(agg=("std",)), SETTINGS, tmp_path / "both")
    assert not list(tmp_path.iterdir())
    (folds,) = kfold_splits(store.ids, store.labels, folds=3, seeds=1)
    with pytest.raises(LeakageError, match="must not share a group"):
        fit_heads(store, HeadGrid(agg=("std",)), SETTINGS, splits=folds.outer)


@pytest.mark.seconds
def test_the_command_shows_every_group(store: FeatureStore, tmp_path: Path) -> None:
    line = ["fit-head", "--store", str(store.path), "--agg", "std", "--groups", "laboratory"]
    line += ["--precision", "float32", "--threads", "1", "--device", "cpu"]
    result = CliRunner().invoke(cli, [*line, "--out", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert "in each laboratory, held out whole" in result.stdout
    result = CliRunner().invoke(cli, [*line, "--out", str(tmp_path / "b"), "--json"])
    groups = json.loads(result.stdout)["groups"]
    assert {row["group"] for row in groups} == set(LABORATORIES)


def test_figures_by_group_are_in_the_order_of_the_summary() -> None:
    predictions = pd.DataFrame(
        {
            "head": ["b"] * 4 + ["a"] * 4,
            "kind": "head",
            "patient": ["1", "2", "3", "4"] * 2,
            "probability": [0.2, 0.8, 0.4, 0.6] * 2,
            "threshold": 0.5,
            "label": [0, 1] * 4,
        }
    )
    group_of = {"1": "y", "2": "y", "3": "x", "4": "x"}
    table = measure_by_group(predictions, group_of, ["a", "b"])
    assert list(zip(table["head"], table["group"], strict=True)) == [
        *(("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"))
    ]
    assert table["auc"].isna().all()  # of fewer than five patients
