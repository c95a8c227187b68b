"""Attributes of new patients become the numbers of training, and what is unusual is said."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lymphfeat.cohort.attributes import AttributeRecipe, attribute_matrix
from lymphfeat.errors import CohortError
from lymphfeat.runtime.strict_json import json_text

NAMES = ("age", "gender", "lymph_count")


def table(rows: list[tuple[float | None, str | None, float | None]]) -> pd.DataFrame:
    ages, genders, counts = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            "age": np.array(ages, float),
            "gender": pd.Categorical(genders),
            "lymph_count": np.array(counts, float),
        },
        index=[f"P{i}" for i in range(len(rows))],
    )


TRAINING = table([(40, "F", 3.0), (80, "M", 90.0), (None, "M", 10.0), (61, None, 4.0)])
RECIPE = AttributeRecipe.of(TRAINING, NAMES)


def test_the_training_patients_get_the_same_numbers() -> None:
    np.testing.assert_array_equal(RECIPE.matrix(TRAINING), attribute_matrix(TRAINING, NAMES))


row = st.tuples(
    st.none() | st.floats(1, 120), st.none() | st.sampled_from("FMX"), st.none() | st.floats(1, 300)
)


@given(st.lists(row, min_size=1, max_size=5))
def test_a_patient_gets_the_same_numbers_alone_and_after_a_round_trip(
    rows: list[tuple[float | None, str | None, float | None]],
) -> None:
    patients = table(rows)
    together = RECIPE.matrix(patients)
    read = AttributeRecipe.from_json(json.loads(json_text(RECIPE.to_json())))
    assert read == RECIPE
    alone = [read.matrix(patients.iloc[[i]]) for i in range(len(rows))]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    unknown = patients["gender"].isna() | (patients["gender"].astype(object) == "X")
    np.testing.assert_array_equal(np.isnan(together[:, 1:3]).all(1), unknown)


def test_what_training_had_nothing_like_is_said_of_each_patient() -> None:
    patients = table([(50, "F", 8.0), (97, "X", 8.0), (None, "M", 2.0)])
    stands_in = "the mean of the training patients stands in"
    assert RECIPE.notes(patients) == {
        "P1": [
            "age 97 is above the training patients' 40 to 80",
            f"gender X is not one of F, M; {stands_in}",
        ],
        "P2": [
            f"age is missing; {stands_in}",
            "lymph_count 2 is below the training patients' 3 to 90",
        ],
    }


def test_a_missing_column_is_named() -> None:
    message = "must have the columns age, gender, lymph_count.* got none named gender.*--without-at"
    with pytest.raises(CohortError, match=message):
        RECIPE.matrix(TRAINING.drop(columns="gender"))


def test_a_text_in_place_of_a_number_is_named() -> None:
    wrong = TRAINING.assign(
        age=pd.Series(["40", "old", None, "61"], index=TRAINING.index, dtype=object)
    )
    with pytest.raises(CohortError, match="attribute age must be a number; got 'old' for P1"):
        RECIPE.matrix(wrong)


def test_the_columns_of_each_attribute_are_known() -> None:
    assert RECIPE.groups == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert RECIPE.matrix(TRAINING).shape[1] == 4


def test_an_attribute_without_any_value_in_training_says_so() -> None:
    empty = AttributeRecipe.of(TRAINING.assign(age=np.nan), ("age",))
    (age,) = empty.attributes
    read = AttributeRecipe.from_json(json.loads(json_text(empty.to_json())))
    assert np.isnan(age.low)
    assert replace(read.attributes[0], low=0, high=0) == replace(age, low=0, high=0)
    assert empty.notes(TRAINING)["P0"] == ["age is not used: no training patient had one"]
