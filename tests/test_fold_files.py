"""Folds that others have published become splits."""

from pathlib import Path

import numpy as np
import pytest

from lymphfeat.cohort.splits import Plan, Split, find_splits, read_splits
from lymphfeat.errors import SettingsError
from tests.cohorts import write_text


def sides(split: Split) -> tuple[set[str], set[str]]:
    return set(split.train), set(split.validation)


@pytest.mark.parametrize("column", ["id", "bag_name", "slide_id", "ID"])
def test_every_fold_of_a_table_is_held_out_once(column: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "f.csv", f"{column},fold", "a,1", "b,2", "c,10", "d,2", "e,")
    splits = read_splits(path)
    assert [split.id for split in splits] == ["fold-1", "fold-2", "fold-10"]
    assert [sides(split) for split in splits] == [
        ({"b", "c", "d"}, {"a"}),
        ({"a", "c"}, {"b", "d"}),
        ({"a", "b", "d"}, {"c"}),
    ]
    assert {split.repeat for split in splits} == {0}


def test_val_trains_where_there_is_a_test(tmp_path: Path) -> None:
    lines = ("bag_name,split", "a,train", "b,val", "c,test", "d,train")
    (split,) = read_splits(write_text(tmp_path / "splits.csv", *lines))
    assert sides(split) == ({"a", "b", "d"}, {"c"})
    (split,) = read_splits(write_text(tmp_path / "splits.csv", *lines[:3]))
    assert sides(split) == ({"a"}, {"b"})


def test_clam_has_a_column_for_each_side(tmp_path: Path) -> None:
    write_text(tmp_path / "splits_0.csv", ",train,val,test", "0,a,b,c", "1,d,,e", "2,f,,")
    write_text(tmp_path / "splits_0_bool.csv", ",train,val,test", "a,True,False,False")
    write_text(tmp_path / "splits_0_descriptor.csv", ",train,val,test", "tumor,2,1,1")
    write_text(tmp_path / "splits_10.csv", ",train,val,test", "0,c,e,a")
    write_text(tmp_path / "splits_2.csv", ",train,val,test", "0,a,e,f")
    splits = read_splits(tmp_path)
    assert [split.id for split in splits] == ["splits_0", "splits_2", "splits_10"]
    assert sides(splits[0]) == ({"a", "b", "d", "f"}, {"c", "e"})
    assert {split.repeat for split in splits} == {0}  # nobody is held out twice
    (alone,) = read_splits(tmp_path / "splits_0.csv")
    assert sides(alone) == sides(splits[0])


def test_splits_that_overlap_are_repeats(tmp_path: Path) -> None:
    for number in range(3):
        write_text(tmp_path / f"splits_{number}.csv", ",train,val,test", "0,a,b,c", "1,d,,e")
    assert [split.repeat for split in read_splits(tmp_path)] == [0, 1, 2]


def test_it_is_read_as_the_table_of_a_cohort(tmp_path: Path) -> None:
    decomposed = "A\u0308"  # Ä in two characters, as some systems write it
    rows = (f"{decomposed};1", "b;1", "", "c;2", "d;2")
    plain = ("\u00c4,1", "b,1", "c,2", "d,2")
    found = read_splits(write_text(tmp_path / "f.csv", "id;fold", *rows))
    assert found == read_splits(write_text(tmp_path / "f.csv", "id,fold", *plain))


def test_folds_have_inner_folds_like_the_protocols_own(tmp_path: Path) -> None:
    ids = [f"P{number}" for number in range(16)]
    labels = np.arange(16) % 2
    lines = [f"{id},{number // 4}" for number, id in enumerate(ids)]
    path = write_text(tmp_path / "f.csv", "id,fold", *lines)
    splits = find_splits(str(path), ids, labels)
    plan = Plan.nested(splits, dict(zip(ids, labels.tolist(), strict=True)))
    assert all(len(inner) == 3 for inner in plan.inner)
    assert len(plan.inner_once) == 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "must have the columns id and fold.*; got nothing"),
        (("a,b", "1,2"), "; got a, b"),
        (("id,fold",), "has a header but no patients"),
        (("id,split", "a,train", "b,tets"), r"f.csv row 3 \(b\), column split: .*; got 'tets'"),
        (("id,fold", "a,1", ",2"), "f.csv row 3, column id: must name a patient"),
        (
            ("id,split", "a,train", "a,test"),
            r"f.csv rows 2 and 3: each patient must have one row; got a twice",
        ),
        (("id,fold", "a,1", "a,1", "b,2"), r"f.csv rows 2 and 3: .* got a twice"),
    ],
)
def test_anything_else_is_refused(lines: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        read_splits(write_text(tmp_path / "f.csv", *lines))


def test_a_folder_without_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must hold splits_0\.csv"):
        read_splits(tmp_path)
    (tmp_path / "f.csv").write_bytes(b"id,fold\n\xff\xfe,1\n")
    with pytest.raises(
        SettingsError, match=r"f\.csv line 2 is not UTF-8 text; save it as `CSV UTF-8`\.$"
    ):
        read_splits(tmp_path / "f.csv")
