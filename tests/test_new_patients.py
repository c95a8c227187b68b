"""A finished model meets other people's tables: each mistake is named, each oddity noted."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from lymphfeat_cli.main import cli
from tests.goldens import BACKBONE, DATA, MACHINE, VERSIONS

GOLDEN = DATA / VERSIONS[-1]
Edit = Callable[[pd.DataFrame], pd.DataFrame]


def put(column: str, value: str) -> Edit:
    """Put a value into the row of P3, the fifth of the file."""

    def edit(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["id"] == "P3", column] = value
        return table

    return edit


def put_all(column: str, value: str) -> Edit:
    return lambda table: table.assign(**{column: value})


def drop(column: str) -> Edit:
    return lambda table: table.drop(columns=column)


def predict(folder: Path, *more: str) -> tuple[int, str, pd.DataFrame | None]:
    out = folder / "out.csv"
    line = ["predict", "--model", str(GOLDEN / "final"), "--cohort", str(folder / "cohort")]
    found = CliRunner().invoke(cli, [*line, "--out", str(out), *MACHINE, *more])
    table = pd.read_csv(out, keep_default_na=False).set_index("id") if out.exists() else None
    return found.exit_code, found.output.replace("\n", " "), table


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "cohort", tmp_path / "cohort")
    return tmp_path


def edit_table(place: Path, edit: Edit) -> None:
    path = place / "cohort" / "patients.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    edit(table).to_csv(path, index=False)


REFUSED: dict[str, tuple[Edit, str]] = {
    "no age": (
        drop("age"),
        "must have the columns gender, age, lymph_count, which this model reads",
    ),
    "age in words": (put("age", "old"), "row 5 (P3), column age: must be a number"),
    "age as a date": (
        put_all("age", "1950-01-01"),
        "column age: must be in years; got '1950-01-01'; name a column of dates of birth `dob`",
    ),
    "an unknown gender": (put("gender", "woman"), "row 5 (P3), column gender: must be"),
    "a count in words": (put("lymph_count", "high"), "row 5 (P3), column lymph_count: must be"),
    "a count of nothing": (put("lymph_count", "0"), "(P3), column lymph_count: must be"),
    "no id": (put("id", ""), "without an id"),
    "an id twice": (put("id", "P2"), "P2"),
    "an id without images": (put("id", "P99"), "P99"),
    "a label of another kind": (put("label", "2"), "row 5 (P3), column label"),
}
NOTED: dict[str, tuple[Edit, str]] = {
    "no value": (put("age", ""), "age is missing; the mean of the training patients stands in"),
    "not available": (put("gender", "NA"), "gender is missing; the mean of the"),
    "too old": (put("age", "119"), "age 119 is above the training patients' "),
    "too few": (put("lymph_count", "0.01"), "lymph_count 0.01 is below the training patients' "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_named(case: str, place: Path) -> None:
    edit, message = REFUSED[case]
    edit_table(place, edit)
    code, said, table = predict(place)
    assert code == 2, said
    assert message in said
    assert said.count("Error") == 1
    assert table is None


@pytest.mark.parametrize("case", NOTED)
def test_an_oddity_is_noted(case: str, place: Path) -> None:
    edit, message = NOTED[case]
    edit_table(place, edit)
    code, said, table = predict(place)
    assert code == 0, said
    assert table is not None
    noted = table.index[table["notes"].str.contains(message, regex=False)]
    assert list(noted) == ["P3"]


def test_a_column_too_many_and_another_order_change_nothing(place: Path) -> None:
    code, said, before = predict(place)
    assert code == 0, said
    assert before is not None
    edit_table(
        place, lambda table: table.assign(height="170")[[*reversed(table.columns), "height"]]
    )
    code, said, after = predict(place, "--force")
    assert code == 0, said
    assert after is not None
    pd.testing.assert_frame_equal(before, after)


def test_a_missing_column_may_be_left_out_by_saying_so(place: Path) -> None:
    edit_table(place, drop("lymph_count"))
    code, said, table = predict(place, "--allow-missing-attributes")
    assert code == 0, said
    assert table is not None
    assert table["notes"].str.contains("lymph_count is missing; the mean").all()
    code, said, alone = predict(place, "--without-attributes", "--force")
    assert code == 0, said
    assert alone is not None
    assert "from_age" not in alone


def test_it_needs_no_network_and_nothing_but_its_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a network was asked for")

    shutil.copytree(GOLDEN / "final", place / "elsewhere")
    monkeypatch.chdir(place)
    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    line = ["predict", "--model", "elsewhere", "--cohort", "cohort", *MACHINE]
    found = CliRunner().invoke(cli, line)
    assert found.exit_code == 0, found.output
    expected = pd.read_csv(GOLDEN / "final" / "predictions.csv")
    written = pd.read_csv("predictions.csv")
    pd.testing.assert_series_equal(written["probability"], expected["probability"], rtol=1e-3)
    assert BACKBONE  # registered by importing it
