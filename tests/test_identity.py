"""Hashes of contents: edited images are seen, renamed ones known; the cache stops nothing."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import cohort_fingerprint, image_hashes, patient_keys
from lymphfeat.errors import CohortError
from lymphfeat.runtime.identity import differing_fields, file_hashes
from tests.cohorts import write_image, write_own


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache folder of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def settle(path: Path) -> Path:
    """Make a file an hour old: what changed just now is not remembered."""
    before = time.time_ns() - 3600 * 10**9
    os.utime(path, ns=(before, before))
    return path


def reference(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_recipes_compare_by_value() -> None:
    assert differing_fields({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1}) == []
    assert differing_fields({"a": (0.5, 1)}, {"a": [0.5, 1]}) == []
    assert differing_fields({"a": 1}, {"b": "x" * 30}) == [
        "a is None there, 1 now",
        "b is xxxxxxxxxxxx… there, None now",
    ]


def test_files_are_hashed_in_order(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / "c" / f"{seed}.png", seed) for seed in range(40)]
    paths += [paths[3], write_image(tmp_path / "c" / "same.png", 5)]
    assert list(file_hashes(paths)) == [reference(path) for path in paths]
    assert file_hashes([]) == ()


def test_fingerprint_tells_cohorts_apart(tmp_path: Path) -> None:
    root = write_own(tmp_path / "c", "id,label,age", "P1,0,70", "P2,1,60", bags={"P1": 3, "P2": 1})
    (root / "P2" / "000000.png").rename(root / "P2" / "000009.png")

    def fingerprint() -> str:
        facts = cohort_fingerprint(Cohort.load(root))
        assert (facts["patients"], facts["images"]) == (2, 4)
        return str(facts["sha256"])

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (root / "P1" / "000002.png").rename(root / "P2" / "000002.png")  # another patient's now
    seen.append(fingerprint())
    (root / "P1" / "000001.png").rename(root / "P1" / "000003.png")
    seen.append(fingerprint())
    with (root / "P1" / "000000.png").open("ab") as file:
        file.write(b"x")
    seen.append(fingerprint())
    (root / "cohort.csv").write_text("id,label,age\nP1,1,70\nP2,1,60\n")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("suffix", [".bmp", ".tiff"])
def test_an_edited_image_of_the_same_size_is_another(tmp_path: Path, suffix: str) -> None:
    bags = {"P1": 2, "P2": 1}
    root = write_own(tmp_path / "c", "id,label", "P1,0", "P2,1", bags=bags, suffix=suffix)
    cohort = Cohort.load(root)
    image = settle(cohort.images[0][1])
    before, patients, size = (
        cohort_fingerprint(cohort),
        patient_keys(cohort),
        image.stat().st_size,
    )
    write_image(image, seed=77)
    assert image.stat().st_size == size
    assert cohort_fingerprint(cohort) != before
    assert patient_keys(cohort)[0] != patients[0]
    assert patient_keys(cohort)[1] == patients[1]


def test_a_patient_is_its_images_whatever_they_are_called(tmp_path: Path) -> None:
    root = write_own(tmp_path / "a", "id,label", "P1,0", "P2,1", bags={"P1": 3, "P2": 2})
    cohort = Cohort.load(root)
    p1, p2 = patient_keys(cohort)
    assert p1.images != p2.images
    assert [len(hashes) for hashes in image_hashes(cohort)] == [3, 2]
    assert image_hashes(cohort)[1] == tuple(reference(path) for path in cohort.images[1])

    other = write_own(tmp_path / "b", "id,label", "X,1", "P1,0", bags={"X": 3, "P1": 4})
    for name, path in zip(("c", "a", "b"), cohort.images[0], strict=True):
        path.rename(other / "X" / f"{name}.png")
    for name in ("000000", "000001", "000002"):
        (other / "X" / f"{name}.png").unlink()
    for index, path in enumerate(sorted((other / "P1").iterdir())):
        write_image(path, seed=900 + index)
    renamed = dict(zip(("P1", "X"), patient_keys(Cohort.load(other)), strict=True))
    assert renamed["X"].images == p1.images
    assert not {*renamed["P1"].images} & {*p1.images, *p2.images}  # the same id, other images


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    image = write_image(tmp_path / "1.png", 1)
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(CohortError, match=r"gone\.png: cannot be read \(No such file"):
        file_hashes([image, tmp_path / "gone.png"])
    with pytest.raises(CohortError, match=r"folder\.png: cannot be read \("):
        file_hashes([image, folder])


# --- the cache -----------------------------------------------------------------------------------


def test_a_file_known_by_path_size_and_time_is_not_read_again(tmp_path: Path) -> None:
    image = settle(write_image(tmp_path / "1.bmp", 1))
    before = file_hashes([image])
    write_image(image, 2)  # same size
    settle_like = time.time_ns() - 10 * 10**9
    os.utime(image, ns=(settle_like, settle_like))
    after = file_hashes([image])
    assert after == (reference(image),) != before
    write_image(image, 3)
    os.utime(image, ns=(settle_like, settle_like))
    assert file_hashes([image]) == after  # what the cache knows: nobody has read the file


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    """A clock with coarse ticks gives two writes one time."""
    image = write_image(tmp_path / "1.bmp", 1)
    now = image.stat().st_mtime_ns
    before = file_hashes([image])
    write_image(image, 2)
    os.utime(image, ns=(now, now))
    assert file_hashes([image]) == (reference(image),) != before


def test_a_name_outside_utf8_is_remembered(tmp_path: Path, cache: Path) -> None:
    image = settle(write_image(tmp_path / os.fsdecode(b"\xff.png"), 1))
    assert file_hashes([image]) == file_hashes([image]) == (reference(image),)
    assert list(cache.rglob("*.sqlite"))


@pytest.mark.parametrize("kind", ["a file instead of the folder", "damaged", "a folder"])
def test_a_cache_out_of_order_stops_nothing(tmp_path: Path, cache: Path, kind: str) -> None:
    image = settle(write_image(tmp_path / "1.png", 1))
    file_hashes([image])
    (path,) = cache.rglob("*.sqlite")
    if kind == "damaged":
        path.write_bytes(b"no database" * 1000)
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()
        path.parent.rmdir()
        path.parent.touch()
    assert file_hashes([image]) == (reference(image),)


def test_processes_share_the_cache(tmp_path: Path, cache: Path) -> None:
    paths = [settle(write_image(tmp_path / "c" / f"{seed}.png", seed)) for seed in range(60)]
    script = (
        "import sys; from pathlib import Path; from lymphfeat.runtime.identity import file_hashes\n"
        "print(*file_hashes([Path(name) for name in sys.argv[1:]]))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, paths[begin:])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for begin in (0, 20, 40)
    ]
    told = [process.communicate()[0].split() for process in processes]
    hashes = [reference(path) for path in paths]
    assert told == [hashes, hashes[20:], hashes[40:]]
    for path in paths:
        settled = path.stat().st_mtime_ns
        path.write_bytes(b"x" * path.stat().st_size)
        os.utime(path, ns=(settled, settled))
    assert list(file_hashes(paths)) == hashes  # all of them were remembered
