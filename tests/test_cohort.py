"""Cohorts are read right, or refused in one line that names file, row and remedy."""

import math
import os
import re
import unicodedata
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lymphfeat.cohort import cell_values
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import CohortError
from tests.cohorts import HEADER, write_bags, write_challenge, write_image, write_own, write_text

PBC_MIL = Path(__file__).parents[2] / "shared" / "data" / "pbc-mil"


# --- the challenge's layout -------------------------------------------------------------------


def test_challenge_layout_with_every_quirk(tmp_path: Path) -> None:
    cohort = Cohort.load(write_challenge(tmp_path))
    assert cohort.ids == ("P1", "P2", "P3", "P9", "P10", "P11", "P100")
    assert cohort.labels.tolist() == [0, 0, -1, 1, 1, -1, -1]
    assert cohort.labels.dtype == np.int64
    assert cohort.table.index.name == "id"
    splits = ["train", "train", "test", "train", "train", "test", "test"]
    assert cohort.table["split"].tolist() == splits
    assert cohort.n_images.tolist() == [1, 3, 2, 2, 2, 1, 4]
    assert cohort.offsets.tolist() == [0, 1, 4, 6, 8, 10, 11, 15]
    assert cohort.submission_ids == ("P100", "P3", "P11")  # the test file's order
    assert set(cohort.covariates) == {"age", "gender", "lymph_count"}


def test_challenge_covariates_are_values_not_spellings(tmp_path: Path) -> None:
    table = Cohort.load(write_challenge(tmp_path), reference_date=date(2000, 1, 1)).table
    days = {id: round(age * 365.25) for id, age in table["age"].dropna().items()}
    assert days["P2"] == (date(2000, 1, 1) - date(1950, 3, 5)).days  # 05-03-1950: day first
    assert days["P3"] == (date(2000, 1, 1) - date(1990, 1, 2)).days  # 1/2/1990: month first
    assert days["P11"] == (date(2000, 1, 1) - date(1940, 12, 25)).days
    assert table["gender"].astype(object).where(table["gender"].notna(), None).tolist() == [
        None, "F", "F", "F", "M", "M", "F",
    ]  # fmt: skip
    assert table["gender"].cat.categories.tolist() == ["F", "M"]
    assert table.loc["P1", ["age", "lymph_count"]].isna().all()
    assert table.loc["P9", "lymph_count"] == 295.0
    assert table.loc["P2", "lymph_count"] == 2.28  # below 4, and kept


def test_challenge_notes_tell_how_each_quirk_was_resolved(tmp_path: Path) -> None:
    notes = "\n".join(Cohort.load(write_challenge(tmp_path)).notes)
    assert "without a name" in notes
    assert "dob: read 4 as M/D/YYYY, 2 as DD-MM-YYYY (1 would be misread by guessing)" in notes
    assert "1 cell(s) 'f' read as F" in notes
    assert "trainset_true.csv: 4 patients, 4 of them repeat an earlier table and agree" in notes
    assert "sample_submission.csv: not the cohort's table" in notes
    assert "hidden" in notes
    assert "__MACOSX" in notes


def test_tables_only_inside_the_image_folders_are_joined(tmp_path: Path) -> None:
    write_text(
        tmp_path / "train" / "train_data.csv",
        "id,label,gender,dob,lymph_count",
        "P10,1,M,8/16/1969,35.5",
        "P9,0,F,8/16/1969,35.5",
    )
    write_text(tmp_path / "test" / "test_data.csv", "id,gender,dob", "P3,F,1/2/1990", "P2,M,")
    write_bags(tmp_path, {"train/P10": 1, "train/P9": 1, "test/P2": 1, "test/test/P3": 2})
    cohort = Cohort.load(tmp_path)
    assert cohort.ids == ("P2", "P3", "P9", "P10")
    assert cohort.labels.tolist() == [-1, -1, 0, 1]
    assert cohort.table["split"].tolist() == ["test", "test", "train", "train"]
    assert cohort.submission_ids == ("P3", "P2")
    assert math.isnan(cohort.table.loc["P3", "lymph_count"])  # type: ignore[arg-type]


def test_repeated_tables_that_disagree_are_refused(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    table = tmp_path / "trainset" / "trainset_true.csv"
    table.write_text(table.read_text().replace("P9,1,F", "P9,0,M"))
    with pytest.raises(CohortError, match="tables disagree") as caught:
        Cohort.load(tmp_path)
    message = str(caught.value)
    assert "P9, column label: '1' in" in message
    assert "column gender" in message
    assert "clinical_annotation.csv row 4" in message
    assert "trainset_true.csv row 4" in message
    assert "--table" in message
    assert Cohort.load(tmp_path, table=tmp_path / "clinical_annotation.csv").ids[3] == "P9"


def test_a_patient_in_train_and_test_table_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "train_data.csv", "id,label", "P1,1")
    write_text(tmp_path / "test_data.csv", "id", "P1")
    write_bags(tmp_path, {"P1": 1})
    with pytest.raises(CohortError, match="P1, column split: 'train' in"):
        Cohort.load(tmp_path)


@pytest.mark.skipif(not PBC_MIL.is_dir(), reason="shared data not there")
def test_real_cells_in_the_challenge_layout() -> None:
    cohort = Cohort.load(PBC_MIL)
    assert (len(cohort.labelled().ids), len(cohort.unlabelled().ids)) == (72, 32)
    assert cohort.offsets[-1] == 2788
    assert cohort.ids[:10] == tuple(f"P{k}" for k in range(1, 11))


# --- cells ------------------------------------------------------------------------------------

DAYS = st.dates(date(1901, 1, 1), date(2020, 12, 31))


@given(DAYS)
def test_a_date_is_the_same_in_every_form(day: date) -> None:
    forms = [
        f"{day.month}/{day.day}/{day.year}",
        f"{day.month:02}/{day.day:02}/{day.year}",
        f"{day.day:02}-{day.month:02}-{day.year}",
        day.isoformat(),
    ]
    assert {cell_values.parse_date(form) for form in forms} == {day}


@pytest.mark.parametrize(
    "text",
    ["25/12/1950", "12-25-1950", "30-02-1950", "2/30/1950", "5-3-1950", "1/2/50", "1950/2/1",
     "1.2.1950", "1950-2-1", "5 March 1950", "1950", "١/٢/١٩٥٠", "01-02-1950 10:00", "1950-13-01"],
)  # fmt: skip
def test_dates_that_would_have_to_be_guessed_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="YYYY-MM-DD"):
        cell_values.parse_date(text)


@pytest.mark.parametrize(
    ("text", "ambiguous"),
    [("05-03-1950", True), ("05-05-1950", False), ("25-03-1950", False), ("5/3/1950", False)],
)
def test_which_dates_a_guess_would_misread(text: str, ambiguous: bool) -> None:
    assert cell_values.is_ambiguous_date(text) is ambiguous


def test_the_spelling_of_dates_leaves_no_trace(tmp_path: Path) -> None:
    days = [date(1950, 1, 1) + timedelta(days=37 * k) for k in range(6)]
    spellings: list[Callable[[date], str]] = [
        lambda day: f"{day.month}/{day.day}/{day.year}",
        lambda day: f"{day:%d-%m-%Y}",
    ]
    tables = []
    for number, spell in enumerate(spellings):
        lines = [f"P{k},{k % 2},{spell(day)}" for k, day in enumerate(days)]
        root = write_own(tmp_path / str(number), "id,label,dob", *lines)
        tables.append(Cohort.load(root).table)
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)


def test_a_column_of_dates_is_left_out_and_named(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label,taken", "P1,1,01-02-2020", "P2,0,2/1/2020")
    cohort = Cohort.load(tmp_path)
    assert cohort.covariates == ()
    assert "column taken: holds dates, left out (only dob is read as a date)" in cohort.notes


# --- cohorts of one's own ---------------------------------------------------------------------


def test_own_cohort_as_a_european_spreadsheet_writes_it(tmp_path: Path) -> None:
    lines = (
        "sep=;",
        "ID; Label ;Split;CRP;Site;",
        "",
        " 007 ;1;Train;3,5; A;",
        "10;;;;B;",
        "9;0.0;TEST;-4;;",
    )
    text = write_text(tmp_path / "x" / "Tabelle.CSV", *lines, end="\r\n", encoding="utf-8-sig")
    write_bags(tmp_path, {"scans/007": 1, "scans/more/9": 1, "10": 2})
    cohort = Cohort.load(tmp_path)
    assert text.read_bytes().startswith(b"\xef\xbb\xbf")
    assert cohort.ids == ("007", "9", "10")
    assert cohort.labels.tolist() == [1, 0, -1]
    assert cohort.table["split"].tolist() == ["train", "test", "test"]
    assert cohort.covariates == ("CRP", "Site")
    assert cohort.table["CRP"].tolist()[:2] == [3.5, -4.0]
    assert cohort.table["CRP"].dtype == np.float64
    assert cohort.table["Site"].cat.categories.tolist() == ["A", "B"]
    assert cohort.table["Site"].isna().tolist() == [False, True, False]
    assert cohort.submission_ids == ("10",)


def test_utf16_tabs_and_accents_taken_apart(tmp_path: Path) -> None:
    apart = [unicodedata.normalize("NFD", name) for name in ("\u00c9lodie", "Zo\u00eb")]
    write_text(
        tmp_path / "cohort.csv", "id\tlabel", "\u00c9lodie\t1", f"{apart[1]}\t0", encoding="utf-16"
    )
    write_bags(tmp_path, {apart[0]: 1, "Zo\u00eb": 1})
    assert Cohort.load(tmp_path).ids == ("Zo\u00eb", "\u00c9lodie")


def test_every_image_format_is_found_and_sorted_and_other_files_named(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "P1,1", bags={})
    for number, name in enumerate(["c.TIFF", "a.jpg", "b.PNG", "e.bmp", "d/d.tif", "f.JPEG"]):
        write_image(tmp_path / "P1" / name, number)
    write_text(tmp_path / "P1" / "Thumbs.db", "x")
    write_image(tmp_path / "overview.png", 9)
    cohort = Cohort.load(tmp_path)
    names = [path.name for path in cohort.images[0]]
    assert names == ["a.jpg", "b.PNG", "c.TIFF", "d.tif", "e.bmp", "f.JPEG"]
    assert "1 other file(s) or folder(s) not read: Thumbs.db" in cohort.notes
    assert any("outside any patient's folder not read: overview.png" in n for n in cohort.notes)


def test_images_beside_the_patients_folders_are_named_not_refused(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "P1,1", bags={"set/train/P1": 1})
    write_image(tmp_path / "set" / "train" / "overview.png", 9)
    (note,) = Cohort.load(tmp_path).notes
    assert note.endswith(f"not read: {Path('set', 'train', 'overview.png')}")


def test_a_comma_is_decimal_in_numbers_not_in_ids(tmp_path: Path) -> None:
    write_text(tmp_path / "cohort.csv", "id;label;x", "1,5;1;2,5")
    write_bags(tmp_path, {"1,5": 1})
    table = Cohort.load(tmp_path).table
    assert table["x"].to_dict() == {"1,5": 2.5}


def test_a_number_among_texts_is_a_category(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label,ward", "P1,1,A", "P2,1,1", "P3,0,B")
    assert Cohort.load(tmp_path).table["ward"].tolist() == ["A", "1", "B"]


def test_a_column_of_one_table_only_is_taken_from_it(tmp_path: Path) -> None:
    write_challenge(tmp_path)
    lines = ("id,label,crp", "P2,0,7", "P9,1,")
    write_text(tmp_path / "trainset" / "trainset_true.csv", *lines)
    crp = Cohort.load(tmp_path).table["crp"]
    assert crp.dropna().to_dict() == {"P2": 7.0}


def test_the_innermost_folder_tells_the_split(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "P1,-1", bags={"test/trainset/P1": 1})
    assert Cohort.load(tmp_path).table["split"].tolist() == ["train"]


def test_no_image_is_opened(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "P1,1", bags={})
    write_text(tmp_path / "P1" / "a.png", "not an image")
    assert Cohort.load(tmp_path).n_images.tolist() == [1]


def test_a_table_may_lie_elsewhere_and_have_no_label(tmp_path: Path) -> None:
    table = write_text(tmp_path / "tables" / "new.csv", "id,site", "b,1", "a,2")
    write_bags(tmp_path / "images", {"a": 1, "b": 1})
    cohort = Cohort.load(tmp_path / "images", table=table)
    assert cohort.labels.tolist() == [-1, -1]
    assert cohort.submission_ids == ("b", "a")
    assert any("no column `label`" in note for note in cohort.notes)
    assert cohort.table["split"].tolist() == ["test", "test"]


def test_known_columns_in_any_case_and_one_table_beside_others(tmp_path: Path) -> None:
    write_own(tmp_path, "Id,LABEL,Age,GENDER,Lymph_Count", "P1,1,60,female,5", "P2,0,70,m,NaN")
    write_text(tmp_path / "truth.csv", "id,label", "P1,0")
    write_text(tmp_path / "my_submission.csv", "ID,LABEL", "P1,0")
    write_text(tmp_path / "folds.csv", "fold,patient", "1,P1")
    (tmp_path / "binary.csv").write_bytes(b"\xff\x00\x81id,label\n")
    table = Cohort.load(tmp_path).table
    assert list(table.columns) == ["label", "split", "age", "gender", "lymph_count"]
    assert table["gender"].tolist() == ["F", "M"]


def test_the_split_of_the_table_wins_over_the_folder(tmp_path: Path) -> None:
    bags = {"testset/P1": 1, "trainset/P2": 1}
    write_own(tmp_path, "id,label,split", "P1,1,train", "P2,-1,", bags=bags)
    cohort = Cohort.load(tmp_path)
    assert cohort.table["split"].tolist() == ["train", "train"]  # P2: unlabelled, yet in trainset
    assert "split: taken from the table, not the folder, for P1 (train)" in cohort.notes


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_bags(tmp_path / "elsewhere", {"P1": 2})
    write_own(tmp_path / "cohort", "id,label", "P1,1", bags={})
    (tmp_path / "cohort" / "images").symlink_to(tmp_path / "elsewhere")
    assert Cohort.load(tmp_path / "cohort").n_images.tolist() == [2]
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CohortError, match="loop is a link to a folder above itself"):
        Cohort.load(tmp_path / "cohort")


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1))
def test_ids_are_sorted_as_numbers(numbers: list[int]) -> None:
    from lymphfeat.cohort.cohort import _numeric_order

    ids = [f"P{number}b" for number in numbers]
    assert _numeric_order(ids) == [f"P{number}b" for number in sorted(numbers)]


@given(st.lists(st.text("aP09.-²é"), unique=True))
def test_any_ids_have_one_order(ids: list[str]) -> None:
    from lymphfeat.cohort.cohort import _numeric_order

    assert _numeric_order(ids) == _numeric_order(reversed(ids))


# --- refused ----------------------------------------------------------------------------------

# Each odd cell, id, date and file alone: test_odd_input.


def test_rows_are_counted_as_a_spreadsheet_does(tmp_path: Path) -> None:
    write_own(
        tmp_path, "id,label,text", 'P1,1,"two', 'lines"', "", "P2,5,", bags={"P1": 1, "P2": 1}
    )
    with pytest.raises(CohortError, match=r"cohort.csv row 4 \(P2\)"):
        Cohort.load(tmp_path)


def test_mistakes_of_all_columns_are_raised_together(tmp_path: Path) -> None:
    header = "id,label,split,gender,dob,lymph_count"
    write_own(tmp_path, header, "P1,7,x,y,25/12/1950,none", bags={"P1": 1})
    with pytest.raises(CohortError) as caught:
        Cohort.load(tmp_path)
    for column in header.split(",")[1:]:
        assert f"column {column}:" in str(caught.value)


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", *(f"P{k},x" for k in range(30)), bags={"P1": 1})
    with pytest.raises(CohortError, match=r"row 2 .*row 9 .* and 22 more"):
        Cohort.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "has no table: it must hold a CSV with the columns `id` and `label`.*--table"),
        ({"a.csv": "x,y"}, "found only a.csv"),
        ({"a.csv": "id,label", "b.csv": "id,label"}, "several tables: a.csv; b.csv.*--table"),
        ({"clinical_annotation.csv": HEADER, "b.csv": "id,label"}, "several tables"),
        ({"clinical_annotation.csv": "PATIENT,LABEL\nP1,1"}, "must name a column `id`; got PAT"),
        ({"clinical_annotation.csv": ""}, "is empty"),
    ],
)  # fmt: skip
def test_no_table_or_several(tmp_path: Path, files: dict[str, str], match: str) -> None:
    write_bags(tmp_path, {"P1": 1})
    for name, text in files.items():
        write_text(tmp_path / name, text)
    with pytest.raises(CohortError, match=match):
        Cohort.load(tmp_path)


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="does not exist; it must hold a table"):
        Cohort.load(tmp_path / "nowhere")
    with pytest.raises(CohortError, match="is a file; unpack it first"):
        Cohort.load(write_text(tmp_path / "data.zip", "x"))
    with pytest.raises(CohortError, match=r"gone.csv cannot be read"):
        Cohort.load(tmp_path, table=tmp_path / "gone.csv")


def test_missing_images_and_rows_are_named_or_left_out(tmp_path: Path) -> None:
    bags = {"train/P1": 1, "train/X7": 3, "P3": 1}
    write_own(tmp_path, "id,label", "P1,1", "P2,0", "P3,-1", "P4,-1", bags=bags)
    with pytest.raises(CohortError, match="--allow-missing") as caught:
        Cohort.load(tmp_path)
    message = str(caught.value)
    assert "2 patient(s) without images: P2, P4" in message
    assert f"without table row: train{os.sep}X7 (3 images)" in message
    cohort = Cohort.load(tmp_path, allow_missing=True)
    assert cohort.ids == ("P1", "P3")
    assert cohort.submission_ids == ("P3",)
    assert "left out 2 patient(s) without images: P2, P4" in cohort.notes
    assert (
        f"left out 1 image folder(s) without table row: train{os.sep}X7 (3 images)" in cohort.notes
    )


def test_a_cohort_without_any_match_is_refused_even_when_missing_is_allowed(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "P1,1", bags={"p1": 1})
    with pytest.raises(
        CohortError, match=r"no patient of the table has images.*whose name is exactly"
    ):
        Cohort.load(tmp_path, allow_missing=True)


def test_an_id_in_two_places_is_refused(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "P1,1", bags={"trainset/P1": 1, "testset/P1": 1})
    places = f"P1: testset{os.sep}P1 and trainset{os.sep}P1"
    with pytest.raises(CohortError, match=re.escape(places)):
        Cohort.load(tmp_path)


def test_a_patient_inside_another_is_refused(tmp_path: Path) -> None:
    write_own(tmp_path, "id,label", "5,1", "1,0", bags={"5/1": 1, "1": 1})
    with pytest.raises(CohortError, match="is inside the folders of several patients: 1; 5"):
        Cohort.load(tmp_path)


# --- the object -------------------------------------------------------------------------------


def test_select_keeps_everything_in_step(tmp_path: Path) -> None:
    cohort = Cohort.load(write_challenge(tmp_path))
    part = cohort.select(["P10", "P3", "P2"])
    assert part.ids == ("P2", "P3", "P10")
    assert [paths[0].parent.name for paths in part.images] == ["P2", "P3", "P10"]
    assert part.submission_ids == ("P3",)
    assert part.labels.tolist() == [0, -1, 1]
    assert cohort.labelled().ids == ("P1", "P2", "P9", "P10")
    assert cohort.unlabelled().ids == ("P3", "P11", "P100")
    assert cohort.unlabelled().submission_ids == ("P100", "P3", "P11")
    empty = cohort.select([])
    assert (empty.ids, empty.offsets.tolist()) == ((), [0])


def test_select_refuses_strangers_and_repeats(tmp_path: Path) -> None:
    cohort = Cohort.load(write_challenge(tmp_path))
    with pytest.raises(CohortError, match="P7; P1"):
        cohort.select(["P7", "P1", "P1"])


def test_images_and_table_must_be_in_step(tmp_path: Path) -> None:
    cohort = Cohort.load(write_challenge(tmp_path))
    with pytest.raises(CohortError, match="at least one path"):
        Cohort(root=tmp_path, table=cohort.table, images=cohort.images[1:])
