"""Finding unlabelled cells: what folders mean, and that no table is read."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lymphfeat.cohort.image_folders import Cells
from lymphfeat.errors import CohortError, SettingsError


def put_images(folder: Path, n: int, side: int = 64, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(n):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def test_folders_beside_a_table_are_patients_and_the_table_is_not_read(tmp_path: Path) -> None:
    put_images(tmp_path / "trainset" / "P2", 2)
    put_images(tmp_path / "testset" / "P10", 1)
    (tmp_path / "table.csv").write_bytes(b"\xff\x00 no table at all")
    cells = Cells.find(tmp_path)
    assert cells.grouping == "patients"
    assert cells.names == ("P10", "P2")
    assert [(key.id, len(key.images)) for key in cells.provenance().images] == [
        ("P10", 1),
        ("P2", 2),
    ]
    assert cells.groups.tolist() == [0, 1, 1]
    assert [path.parent.name for path in cells.paths] == ["P10", "P2", "P2"]


@pytest.mark.parametrize(
    ("folders", "patients"),
    [
        (("P1/cells", "P2/cells"), ("P1", "P2")),
        (
            ("images/P1/a/x", "images/P1/b", "images/P2/a/x", "images/P2/b"),
            ("P1", "P1", "P2", "P2"),
        ),
        (("train/P1/cells", "train/P1", "test/P2/cells"), ("P1", "P1", "P2")),
        (("one laboratory/P1", "another/P2"), ("P1", "P2")),
        (("train/P1", "test/P1"), ("train/P1", "test/P1")),  # no cohort, but nobody is merged
    ],
)
def test_images_in_folders_below_a_patients_are_the_patients(
    tmp_path: Path, folders: tuple[str, ...], patients: tuple[str, ...]
) -> None:
    for seed, folder in enumerate(folders):
        put_images(tmp_path / folder, 1, seed=seed)
    (tmp_path / "table.csv").touch()
    cells = Cells.find(tmp_path)
    found = {
        path.parent.relative_to(tmp_path).as_posix(): cells.names[group]
        for path, group in zip(cells.paths, cells.groups, strict=True)
    }
    assert found == dict(zip(folders, patients, strict=True))
    assert sorted(key.id for key in cells.provenance().images) == sorted(set(patients))


def test_without_a_table_folders_of_one_name_are_patients_of_their_own(tmp_path: Path) -> None:
    for place in ("one/1", "one/2", "another/1", "another/3"):
        put_images(tmp_path / place, 1)
    assert Cells.find(tmp_path, "patients").names == ("2", "3", "another/1", "one/1")


def test_classes_of_one_name_are_one(tmp_path: Path) -> None:
    put_images(tmp_path / "train" / "monocyte", 1)
    put_images(tmp_path / "test" / "monocyte", 1)
    assert Cells.find(tmp_path, "classes").names == ("monocyte",)


def test_folders_without_a_table_are_classes(tmp_path: Path) -> None:
    put_images(tmp_path / "monocyte", 1)
    put_images(tmp_path / "basophil", 2)
    cells = Cells.find(tmp_path)
    assert (cells.grouping, cells.names) == ("classes", ("basophil", "monocyte"))
    assert [key.id for key in cells.provenance().images] == ["", "", ""]


def test_one_folder_is_no_class(tmp_path: Path) -> None:
    put_images(tmp_path, 2)
    assert Cells.find(tmp_path).grouping == "none"


def test_said_grouping_wins(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 1)
    put_images(tmp_path / "b", 1)
    assert Cells.find(tmp_path, "patients").grouping == "patients"
    assert Cells.find(tmp_path, "none").names == ("",)


def test_fingerprint_knows_names_groups_and_contents(tmp_path: Path) -> None:
    prints = set()
    for grouping in ("patients", "none"):
        put_images(tmp_path / "a", 2)
        prints.add(Cells.find(tmp_path, grouping).fingerprint())
    (tmp_path / "a" / "0.png").write_bytes(b"other")
    prints.add(Cells.find(tmp_path, "none").fingerprint())
    (tmp_path / "a" / "0.png").write_bytes(b"OTHER")  # of the same size
    prints.add(Cells.find(tmp_path, "none").fingerprint())
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "x.png")
    prints.add(Cells.find(tmp_path, "none").fingerprint())
    assert len(prints) == 5


def test_what_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    with pytest.raises(CohortError, match="must hold images"):
        Cells.find(tmp_path)
    with pytest.raises(CohortError, match=re.escape("nowhere) must be a folder of images")):
        Cells.find(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match=re.escape("groups (=cats)")):
        Cells.find(tmp_path, "cats")
