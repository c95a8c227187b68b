"""Scoring against what was hidden."""

import re
from pathlib import Path

import pandas as pd
import pytest

from lymphfeat.errors import CohortError
from lymphfeat.evaluation.hidden_truth import Truth, witness_auc, witness_auc_all

LINES = """SPLIT,ID,FILE,LABEL,IS_WITNESS
train,P1,a.png,1,1
train,P1,b.png,1,0
train,P2,a.png,0,0
test,P3,a.png,1,1
"""
IMAGES = pd.DataFrame(
    {"patient": ["P1", "P1", "P2", "P3"], "image": ["a.png", "b.png", "a.png", "a.png"]}
).assign(logit=[2.0, 1.0, 3.0, 0.0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "truth.csv"
    path.write_text(LINES)
    return path


def test_witness_auc_by_hand(path: Path) -> None:
    truth = Truth.read([path]).images
    assert truth is not None
    assert list(truth["witness"]) == [True, False, False, True]
    # P1 and P3 have witnesses: 2 beats 1, 0 does not; over all images neither beats 3.
    assert witness_auc(IMAGES, truth) == pytest.approx(1 / 2)
    assert witness_auc_all(IMAGES, truth) == pytest.approx(1 / 4)


def test_where_no_image_is_a_witness_none_are_scored(path: Path) -> None:
    path.write_text(re.sub("[01]$", "0", LINES, flags=re.MULTILINE))
    patients = pd.DataFrame({"id": ["P1"], "label": [1], "probability": [0.5]})
    assert Truth.read([path]).score(IMAGES, patients) == {}


def test_only_hidden_labels_are_scored(path: Path) -> None:
    patients = pd.DataFrame(
        {
            "id": ["P1", "P2", "P3"],
            "label": pd.array([1, 0, None], dtype="Int64"),
            "probability": [0.1, 0.9, 0.8],
        }
    )
    scores = Truth.read([path]).score(IMAGES, patients)
    assert scores["hidden_patients"] == 1
    assert scores["hidden_sensitivity"] == 1
    assert Truth.read([path]).score(IMAGES, patients, 0.85)["hidden_sensitivity"] == 0


def test_labels_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("ID,LABEL\nP1,1\nP2,-1\nP3,0\n")
    truth = Truth.read([path])
    assert truth.labels is not None
    assert truth.labels.to_dict() == {"P1": 1, "P3": 0}
    assert truth.images is None


@pytest.mark.parametrize("files", [("P1,1\nP1,0",), ("P1,1\nP2,0", "P1,0\nP2,0")])
def test_contradicting_labels(tmp_path: Path, files: tuple[str, ...]) -> None:
    paths = [tmp_path / f"{number}.csv" for number in range(len(files))]
    for path, lines in zip(paths, files, strict=True):
        path.write_text(f"ID,LABEL\n{lines}\n")
    with pytest.raises(CohortError, match=r"all rows of a patient: .* says 1 of P1; .* says 0 of"):
        Truth.read(paths)


def test_files_that_agree_on_labels(path: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("ID,LABEL\nP1,1\nP4,0\nP3,-1\n")
    labels = Truth.read([path, tmp_path / "labels.csv"]).labels
    assert labels is not None
    assert labels.to_dict() == {"P1": 1, "P2": 0, "P3": 1, "P4": 0}


def test_an_image_in_two_files(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_text("ID,FILE,IS_WITNESS\nP1,b.png,0\n")
    with pytest.raises(
        CohortError, match=r"once: .*truth\.csv row 3 has b\.png of P1; .*copy\.csv"
    ):
        Truth.read([path, copy])


def test_no_csv(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"none\.csv cannot be read: No such file"):
        Truth.read([tmp_path / "none.csv"])
