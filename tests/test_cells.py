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
