"""Figures of groups of patients against counting by hand, and what is not said of a few."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lymphfeat.evaluation.intervals import wilson
from lymphfeat.evaluation.subgroups import ALL, FEWEST, groups_of, measure_subgroups


def drawn(seed: int, n: int = 60) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "gender": [("F", "M", None)[k] for k in rng.choice(3, n, p=[0.45, 0.45, 0.1])],
            "age": np.where(rng.random(n) < 0.1, np.nan, rng.normal(60, 10, n).round()),
            "images": rng.integers(5, 100, n),
        }
    )
    labels = rng.integers(0, 2, n)
    return table, np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), labels


@given(seed=st.integers(0, 500))
def test_every_figure_is_that_of_its_group_alone(seed: int) -> None:
    table, p, labels = drawn(seed, 30)
    found = measure_subgroups(table, p, labels, 0.45)
    middle = table["age"].median()
    own = {
        (ALL, ""): np.ones(30, bool),
        ("gender", "F"): (table["gender"] == "F").to_numpy(),
        ("gender", "M"): (table["gender"] == "M").to_numpy(),
        ("gender", "missing"): table["gender"].isna().to_numpy(),
        ("age", f"below {middle:.3g}"): (table["age"] < middle).to_numpy(),
        ("age", f"{middle:.3g} or more"): (table["age"] >= middle).to_numpy(),
        ("age", "missing"): table["age"].isna().to_numpy(),
    }
    rows = [row for row in found.to_dict("records") if row["by"] != "images"]
    assert [(row["by"], row["group"]) for row in rows] == [
        k for k, rows in own.items() if any(rows)
    ]
    for row in rows:
        check(row, p[own[row["by"], row["group"]]], labels[own[row["by"], row["group"]]])


def check(row: dict[Any, Any], p: np.ndarray, labels: np.ndarray) -> None:
    right = {1: [q > 0.45 for q in p[labels == 1]], 0: [q <= 0.45 for q in p[labels == 0]]}
    assert (row["reactive"], row["tumoral"]) == (len(right[0]), len(right[1]))
    for name, label in (("sensitivity", 1), ("specificity", 0)):
        if len(right[label]) < FEWEST:
            assert math.isnan(row[name])
            assert math.isnan(row[f"{name}_low"])
            continue
        share = sum(right[label]) / len(right[label])
        assert row[name] == pytest.approx(share)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == wilson(share, len(right[label]))
    if min(map(len, right.values())) < FEWEST:
        assert math.isnan(row["auc"])
    else:
        assert row["auc"] == pytest.approx(roc_auc_score(labels, p))
        assert row["auc_low"] <= row["auc"] <= row["auc_high"]


def test_each_patient_has_its_own_threshold_and_fold() -> None:
    table, p, labels = drawn(0)
    folds = np.arange(60) % 2
    shifted = np.where(folds == 1, p / 2, p)  # another scale in one fold
    found = measure_subgroups(table, shifted, labels, np.where(folds == 1, 0.225, 0.45), folds)
    plain = measure_subgroups(table, p, labels, 0.45, folds)
    pd.testing.assert_frame_equal(found, plain)
    assert found["auc"][0] != measure_subgroups(table, shifted, labels)["auc"][0]


def test_columns_that_do_not_divide_are_left_out() -> None:
    table = pd.DataFrame({"one": ["x"] * 8, "few": [1.0, 2.0] * 4, "many": list("abcdefgh")})
    found = {(by, group): own.tolist() for by, group, own in groups_of(table)}
    assert not any(by == "one" for by, _ in found)
    assert found["few", "1"] == [True, False] * 4
    assert sum(by == "many" for by, _ in found) == 6


def test_no_group_is_empty_and_any_column_will_do() -> None:
    table = pd.DataFrame(
        {
            "count": [0] * 12 + list(range(1, 9)),  # half and more are the least
            "ward": pd.array(["a", "b", None, "a"] * 5, dtype="string"),
            "year": np.arange(1980.0, 2000),
            "weight": pd.array([None, *range(60, 79)], dtype="Float64"),
        }
    )
    found: dict[str, dict[str, int]] = {}
    for by, group, own in groups_of(table):
        found.setdefault(by, {})[group] = int(own.sum())
    assert "count" not in found  # one group alone
    assert found["ward"] == {"a": 10, "b": 5, "missing": 5}
    assert found["year"] == {"below 1990": 10, "1990 or more": 10}
    assert found["weight"] == {"below 69": 9, "69 or more": 10, "missing": 1}


@given(st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=30))
def test_a_group_of_numbers_holds_whom_its_name_says(values: list[float]) -> None:
    for by, group, own in groups_of(pd.DataFrame({"value": values})):
        if by == ALL or len(set(values)) <= 3:
            continue
        below = group.startswith("below ")
        cut = float(group.removeprefix("below ").removesuffix(" or more"))
        np.testing.assert_array_equal(own, (np.array(values) < cut) == below)


def test_a_class_that_shares_no_fold_has_no_auc() -> None:
    labels = np.repeat([0, 1], 10)
    found = measure_subgroups(
        pd.DataFrame(index=range(20)), np.linspace(0, 1, 20), labels, 0.5, labels
    )
    assert math.isnan(found["auc"][0])
    assert found["sensitivity"][0] == 1
