"""The feature store: what is written is read, whatever happens in between."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.provenance import PatientKey, Provenance
from lymphfeat.errors import StoreError
from lymphfeat.features.store import FeatureSet, FeatureStore, MapShape, recipe_sha256
from lymphfeat.features.store_writer import StoreWriter, clear_leavings
from tests.stores import (
    FROZEN,
    RECIPE,
    made_up_cohort,
    made_up_maps,
    open_writer,
    write_rows,
    write_store,
)

GOLDENS = {version: Path(__file__).parent / "data" / f"format-v{version}.h5" for version in (1, 2)}


def siblings(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.iterdir())


# --- round trip ----------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    names = draw(st.lists(words.filter(lambda w: w.strip("./")), max_size=3, unique=True))
    columns: dict[str, Any] = {}
    for name in names:
        if name in ("label", "split") or "\u2215" in name:
            continue
        kind = draw(st.sampled_from([numbers, st.none() | words.filter(bool)]))
        values = draw(st.lists(kind, min_size=len(counts), max_size=len(counts)))
        texts = any(isinstance(value, str) for value in values)
        columns[name] = pd.Categorical(values) if texts else np.array(values, np.float64)
    return made_up_cohort(counts, **columns)


@settings(max_examples=25)
@given(cohort=cohorts(), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_round_trip(cohort: Cohort, block: int, seed: int) -> None:
    n = int(cohort.offsets[-1])
    maps = made_up_maps(n, seed=seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5"
        with open_writer(path, cohort) as writer:
            for start in reversed(range(0, n, block)):
                write_rows(writer, maps, start, min(start + block, n))
            writer.finish()
        store = FeatureStore.open(path)
        store.verify()
        assert np.array_equal(store.features(), maps.astype(np.float16))
        pooled = maps.astype(np.float16).astype(np.float64).mean((3, 4))
        np.testing.assert_allclose(store.pooled(), pooled, rtol=1e-5, atol=1e-3)
        assert np.array_equal(store.crc32, np.arange(n))
        assert siblings(path) == ["features.h5"]
    pd.testing.assert_frame_equal(store.table, cohort.table, check_dtype=False)
    assert store.covariates == cohort.covariates
    assert np.array_equal(store.offsets, cohort.offsets)
    assert np.array_equal(store.labels, cohort.labels)
    assert np.array_equal(store.n_images, cohort.n_images)
    assert store.submission_ids == cohort.submission_ids
    assert store.image_names == tuple(path.name for paths in cohort.images for path in paths)
    assert store.recipe == RECIPE
    assert list(store.feature_sets.values()) == [FROZEN]


def test_strings_of_the_world(tmp_path: Path) -> None:
    cohort = made_up_cohort(
        (1, 1, 1),
        Zentrum=pd.Categorical(["Köln", None, "Łódź"]),
        **{"CD4/CD8": [1.5, np.nan, 2.0], "Äther": [np.nan] * 3},
    )
    cohort = type(cohort)(
        root=cohort.root,
        table=cohort.table.set_axis(pd.Index(["Müller", "P/1", "患者"], name="id")),
        images=((Path("größe.png"),), (Path("b\udce4r.png"),), (Path("x.png"),)),
    )
    store = write_store(tmp_path / "s.h5", cohort)
    assert store.ids == ("Müller", "P/1", "患者")
    assert store.image_names == ("größe.png", "b\udce4r.png", "x.png")
    assert store.covariates == ("Zentrum", "CD4/CD8", "Äther")
    assert store.table["Zentrum"].astype(object).where(lambda c: c.notna(), None).tolist() == [
        "Köln",
        None,
        "Łódź",
    ]
    assert store.table["CD4/CD8"].tolist()[0::2] == [1.5, 2.0]


def test_plain_h5py_reads_what_the_format_says(tmp_path: Path) -> None:
    cohort = made_up_cohort(age=[70.0, np.nan, 30.0], gender=pd.Categorical(["F", None, "M"]))
    tuned = FeatureSet(
        name="kfold5-r0-f3",
        backbone="tiny",
        weights_sha256="1" * 64,
        provenance=Provenance(labels=(PatientKey(id="X7", images=("ab", "cd")),)),
        split="kfold5-r0-f3",
        training=("P0", "P2"),
    )
    maps, n = made_up_maps(7), 7
    with open_writer(tmp_path / "s.h5", cohort, feature_sets=[FROZEN, tuned]) as writer:
        crc32 = np.arange(n, dtype=np.uint32)
        writer.write(0, {"frozen": maps, "kfold5-r0-f3": 2 * maps}, crc32)
        writer.finish()
    names: list[str] = []
    with h5py.File(tmp_path / "s.h5") as file:
        file.visit(names.append)
        assert sorted(names) == sorted(
            [
                *("patients", "patients/id", "patients/label", "patients/offsets"),
                *("patients/split", "patients/covariates"),
                *("patients/covariates/age", "patients/covariates/gender"),
                *("images", "images/name", "images/crc32"),
                *("features", "features/frozen", "features/kfold5-r0-f3"),
                *("pooled", "pooled/frozen", "pooled/kfold5-r0-f3"),
                *("trained_on", "trained_on/frozen", "trained_on/kfold5-r0-f3"),
                *("provenance", "provenance/frozen", "provenance/kfold5-r0-f3"),
                *("training", "training/kfold5-r0-f3"),
                *("validation", "validation/kfold5-r0-f3"),
            ]
        )
        assert file.attrs["format"] == "lymphfeat"
        assert file.attrs["format_version"] == 2
        assert file.attrs["complete"] == 1
        assert json.loads(file.attrs["recipe"]) == RECIPE
        assert file.attrs["recipe_sha256"] == recipe_sha256(RECIPE)
        assert list(file["patients/id"].asstr()) == ["P0", "P1", "P2"]
        assert list(file["patients/label"]) == [0, 1, -1]
        assert list(file["patients/offsets"]) == [0, 2, 3, 7]
        assert list(file["training/kfold5-r0-f3"].asstr()) == ["P0", "P2"]
        assert list(file["trained_on/kfold5-r0-f3"].asstr()) == ["X7"]
        assert json.loads(file["provenance/kfold5-r0-f3"].asstr()[0]) == {
            "labels": [{"id": "X7", "images": "ab cd"}],
            "images": [],
        }
        features, pooled = file["features/kfold5-r0-f3"], file["pooled/kfold5-r0-f3"]
        assert (features.shape, features.dtype) == ((7, 2, 3, 2, 1), np.float16)
        assert (pooled.shape, pooled.dtype) == ((7, 2, 3), np.float32)
        assert features.attrs["backbone"] == "tiny"
        assert features.attrs["weights_sha256"] == "1" * 64
        assert features.attrs["split"] == "kfold5-r0-f3"
        for dataset in (features, pooled, file["features/frozen"]):
            assert dataset.chunks is None
            assert dataset.compression is None
            assert dataset.id.get_offset() is not None
        assert np.array_equal(features[:], (2 * maps).astype(np.float16))
    opened = FeatureStore.open(tmp_path / "s.h5")
    assert opened.feature_sets == {"frozen": FROZEN, "kfold5-r0-f3": tuned}
    with pytest.raises(StoreError, match=re.escape("features (=all) must be one of frozen, kf")):
        opened.features("all")


def test_image_statistics_are_read_as_they_were_written(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(0, 1, (7, 2)).astype(np.float32)
    with open_writer(tmp_path / "s.h5", made_up_cohort(), statistics=["focus", "area"]) as writer:
        for rows in (slice(4, 7), slice(0, 4)):
            crc32 = np.arange(7, dtype=np.uint32)[rows]
            writer.write(rows.start, {"frozen": made_up_maps(7)[rows]}, crc32, numbers[rows])
        writer.finish()
    found = FeatureStore.open(tmp_path / "s.h5").image_statistics
    assert found is not None
    pd.testing.assert_frame_equal(found, pd.DataFrame(numbers, columns=["focus", "area"]))
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["images/statistics"].id.get_offset() is not None
        assert json.loads(file["images/statistics"].attrs["names"]) == ["focus", "area"]


def test_an_unfinished_store_of_an_earlier_version_is_finished_without_statistics(
    tmp_path: Path,
) -> None:
    path, maps, crc32 = tmp_path / "s.h5", made_up_maps(7), np.arange(7, dtype=np.uint32)
    with open_writer(path, made_up_cohort()) as writer:
        write_rows(writer, maps, 0, 4)
    with open_writer(path, made_up_cohort(), statistics=["focus"]) as writer:
        writer.write(4, {"frozen": maps[4:]}, crc32[4:], np.zeros((3, 1), np.float32))
        writer.finish()
    store = FeatureStore.open(path)
    store.verify()
    assert store.image_statistics is None


def test_readers_cannot_write(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5")
    with pytest.raises(ValueError, match="read-only"):
        store.features()[0] = 0


@pytest.mark.seconds
def test_same_recipe_same_bytes(tmp_path: Path) -> None:
    write_store(tmp_path / "0.h5")
    time.sleep(1.1)  # a time stamp would differ: HDF5 counts seconds
    for block in (1, 2, 7):
        write_store(tmp_path / f"{block}.h5", block=block)
        assert (tmp_path / "0.h5").read_bytes() == (tmp_path / f"{block}.h5").read_bytes()


@pytest.mark.seconds
def test_many_patients(tmp_path: Path) -> None:
    # Their ids take more than the 64 kB of a small HDF5 attribute.
    cohort = made_up_cohort([1] * 30_000)
    n, shape = 30_000, MapShape(views=1, channels=1, height=1, width=1)
    seen = Provenance(labels=tuple(PatientKey.of(id, [f"{id:032}"]) for id in cohort.ids))
    trained = FeatureSet(name="all", backbone="b", weights_sha256="", provenance=seen)
    path = tmp_path / "s.h5"
    with open_writer(path, cohort, shape=shape, feature_sets=[trained]) as writer:
        writer.write(0, {"all": made_up_maps(n, shape)}, np.zeros(n, np.uint32))
        writer.finish()
    store = FeatureStore.open(path)
    assert store.feature_sets["all"].provenance == seen
    assert store.submission_ids == cohort.submission_ids


@pytest.mark.parametrize("layout", ["C", "F"])
def test_any_memory_layout_is_whole(tmp_path: Path, layout: Any) -> None:
    shape = MapShape(views=1, channels=64, height=4, width=4)
    maps = np.asarray(made_up_maps(7, shape), order=layout)
    with open_writer(tmp_path / "s.h5", made_up_cohort(), shape=shape) as writer:
        writer.write(0, {"frozen": maps}, np.zeros(7, np.uint32))
        writer.finish()
    FeatureStore.open(tmp_path / "s.h5").verify()


# --- refused values ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65505.0, -7e4])
def test_refuses_what_float16_cannot_hold(tmp_path: Path, value: float) -> None:
    maps = made_up_maps(7)
    maps[4, 1, 2, 0, 0] = value
    message = re.escape(f"features/frozen, row 4: magnitude (={abs(np.float32(value))}) must be")
    with open_writer(tmp_path / "s.h5", made_up_cohort()) as writer:
        write_rows(writer, maps, 0, 3)
        with pytest.raises(StoreError, match=message):
            write_rows(writer, maps, 3, 7)
        assert not writer.finished(3, 7)
        with pytest.raises(StoreError, match="rows 3:7 were never written"):
            writer.finish()
    assert not (tmp_path / "s.h5").exists()


def test_holds_the_largest_float16(tmp_path: Path) -> None:
    maps = made_up_maps(7)
    maps[0] = 65504
    with open_writer(tmp_path / "s.h5", made_up_cohort()) as writer:
        write_rows(writer, maps, 0, 7)
        writer.finish()
    store = FeatureStore.open(tmp_path / "s.h5")
    store.verify()
    assert (store.pooled()[0] == 65504).all()


# --- interruption --------------------------------------------------------------------------------


def begin(path: Path, *blocks: tuple[int, int], **changes: Any) -> None:
    """Write some blocks and stop, as a killed process does."""
    with open_writer(path, made_up_cohort(), **changes) as writer:
        for start, stop in blocks:
            write_rows(writer, made_up_maps(7), start, stop)


def go_on(path: Path, **changes: Any) -> list[tuple[int, int]]:
    """Finish what `begin` began; return the blocks that had to be written."""
    written = []
    with open_writer(path, made_up_cohort(), **changes) as writer:
        for start, stop in ((0, 3), (3, 6), (6, 7)):
            if not writer.finished(start, stop):
                write_rows(writer, made_up_maps(7), start, stop)
                written.append((start, stop))
        writer.finish()
    return written


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    write_store(tmp_path / "whole" / "s.h5")
    return (tmp_path / "whole" / "s.h5").read_bytes()


def test_goes_on_where_it_was(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "new" / "s.h5"
    begin(path, (3, 6))
    assert not path.exists()
    assert go_on(path) == [(0, 3), (6, 7)]
    assert path.read_bytes() == whole
    assert siblings(path) == ["s.h5"]


@pytest.mark.parametrize("keep", range(0, 200, 7))
def test_a_torn_journal_costs_only_the_torn_block(tmp_path: Path, whole: bytes, keep: int) -> None:
    path = tmp_path / "new" / "s.h5"
    begin(path, (0, 3), (3, 6))
    journal = path.with_name("s.h5.journal")
    content = journal.read_bytes()
    kept = content[: max(0, len(content) - keep)]
    journal.write_bytes(kept)
    sound = [line for line in kept.splitlines() if line in content.splitlines()]
    with open_writer(path, made_up_cohort()) as writer:  # goes on, and is killed once more
        blocks = [block for block in ((0, 3), (3, 6)) if writer.finished(*block)]
        assert len(blocks) == max(len(sound) - 1, 0)
        write_rows(writer, made_up_maps(7), 6, 7)
    again = go_on(path)
    assert (6, 7) not in again
    assert len(again) == 2 - len(blocks)
    assert path.read_bytes() == whole


def test_killed_between_completion_and_publication(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "s.h5"

    rename = Path.replace

    def killed(unfinished: Path, target: Path) -> None:
        if target == path:
            raise KeyboardInterrupt
        rename(unfinished, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            go_on(path)
    assert not path.exists()
    assert go_on(path) == []
    assert path.read_bytes() == whole


def test_rows_damaged_on_disk_are_found_before_publication(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "new" / "s.h5"
    begin(path, (0, 3), (3, 6))
    partial = path.with_name("s.h5.partial")
    with h5py.File(partial) as file:
        offset = file["features/frozen"].id.get_offset()
    content = bytearray(partial.read_bytes())
    content[offset + 3 * 24] ^= 1
    partial.write_bytes(content)
    with pytest.raises(StoreError, match="rows 3:6 of /features/frozen read back differently"):
        go_on(path)
    assert not path.exists()
    assert go_on(path) == [(0, 3), (3, 6), (6, 7)]  # as the message says
    assert path.read_bytes() == whole


def test_two_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with open_writer(path, made_up_cohort()):
        for force in (False, True):
            with pytest.raises(StoreError, match="another process is writing this store"):
                open_writer(path, made_up_cohort(), force=force)
    assert go_on(path) == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.seconds
def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    script = (
        "import sys; from pathlib import Path; from tests.stores import made_up_cohort, open_writer"
        "\nwriter = open_writer(Path(sys.argv[1]), made_up_cohort())"
        "\nprint('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"locked"
    with pytest.raises(StoreError, match="another process is writing this store"):
        open_writer(path, made_up_cohort())
    process.kill()
    process.communicate()
    assert "s.h5.lock" in siblings(path)  # stays behind, and is in nobody's way
    assert go_on(path) == [(0, 3), (3, 6), (6, 7)]
    assert siblings(path) == ["s.h5"]


def test_a_lock_removed_while_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "s.h5"

    def finish_elsewhere(*_: object) -> None:
        path.with_name("s.h5.lock").unlink()

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", finish_elsewhere)
        with pytest.raises(StoreError, match="another process is writing this store"):
            open_writer(path, made_up_cohort())
    assert go_on(path) == [(0, 3), (3, 6), (6, 7)]


def test_another_recipe_is_left_alone_or_forced(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    begin(path, (0, 3))
    before = {name: (tmp_path / name).read_bytes() for name in siblings(path)}
    other = {**RECIPE, "crop": 9, "versions": {"torch": "2.1"}}
    message = "crop is 8 there, 9 now; versions.torch is 2.0 there, 2.1 now"
    with pytest.raises(StoreError, match=message):
        open_writer(path, made_up_cohort(), recipe=other)
    assert {name: (tmp_path / name).read_bytes() for name in siblings(path)} == before
    assert go_on(path, recipe=other, force=True) == [(0, 3), (3, 6), (6, 7)]
    assert FeatureStore.open(path).recipe == other


def test_force_goes_on_with_its_own_recipe(tmp_path: Path) -> None:
    begin(tmp_path / "s.h5", (0, 3))
    assert go_on(tmp_path / "s.h5", force=True) == [(3, 6), (6, 7)]


# --- what cannot be opened -----------------------------------------------------------------------


def alter(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def test_unfinished_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with pytest.raises(StoreError, match="make it with `lymphfeat extract`"):
        FeatureStore.open(path)
    begin(path, (0, 3))
    with pytest.raises(StoreError, match="an unfinished one is beside it: run the same"):
        FeatureStore.open(path)
    go_on(path)
    alter(path, lambda file: file.attrs.modify("complete", np.uint8(0)))
    with pytest.raises(StoreError, match=re.escape(f"{path}: is not complete; run the same")):
        FeatureStore.open(path)


def test_refuses_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("id,label")
    with pytest.raises(StoreError, match=re.escape("notes.txt: is not a readable HDF5 file")):
        FeatureStore.open(tmp_path / "notes.txt")
    with pytest.raises(StoreError, match="must be an existing file"):
        FeatureStore.open(tmp_path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="HDF5 file but not a lymphfeat feature store"):
        FeatureStore.open(tmp_path / "other.h5")


def test_refuses_a_newer_format(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5")
    alter(tmp_path / "s.h5", lambda file: file.attrs.modify("format_version", 3))
    with pytest.raises(
        StoreError, match=re.escape("format_version (=3) must be at most 2; update")
    ):
        FeatureStore.open(tmp_path / "s.h5")


@pytest.mark.parametrize(
    "gone", ["patients", "patients/id", "images/crc32", "features", "provenance/frozen"]
)
def test_missing_parts_name_the_file(tmp_path: Path, gone: str) -> None:
    path = tmp_path / "s.h5"
    write_store(path)
    alter(path, lambda file: file.__delitem__(gone))
    with pytest.raises(StoreError, match=re.escape(f"{path}: is damaged (")):
        FeatureStore.open(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_store(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(StoreError, match=re.escape(str(path))):
            FeatureStore.open(path).check()


@pytest.mark.parametrize("row", [0, 6])
def test_check_reads_the_first_and_last_map(tmp_path: Path, row: int) -> None:
    store = write_store(tmp_path / "s.h5")
    store.check()
    alter(tmp_path / "s.h5", lambda file: file["features/frozen"].__setitem__((row, 1), 0))
    with pytest.raises(StoreError, match="map and pooled feature must agree"):
        store.check()


def test_check_compares_sizes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.h5")

    def shorten(file: h5py.File) -> None:
        rows = file["pooled/frozen"][:-1]
        del file["pooled/frozen"]
        file["pooled/frozen"] = rows

    alter(tmp_path / "s.h5", shorten)
    with pytest.raises(StoreError, match=r"/pooled/frozen must be of shape \(7, 2, 3\); got \(6"):
        store.check()


def test_verify_names_the_damaged_image(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_store(path)

    def damage(file: h5py.File) -> None:
        file["features/frozen"][4, 0, 0] = [[np.inf], [-np.inf]]

    alter(path, damage)
    with pytest.raises(StoreError, match=re.escape("/features/frozen, image 001.png of P2: map")):
        FeatureStore.open(path).verify()


def test_verify_holds_the_recipe_to_its_hash(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5")
    alter(tmp_path / "s.h5", lambda file: file.attrs.modify("recipe", '{"crop": 9}'))
    with pytest.raises(StoreError, match="recipe and recipe_sha256 must agree"):
        FeatureStore.open(tmp_path / "s.h5").check()


# --- recipes -------------------------------------------------------------------------------------


def test_recipes_compare_by_value() -> None:
    assert recipe_sha256({"a": 1, "b": {"c": 2}}) == recipe_sha256({"b": {"c": 2}, "a": 1})


# --- files of released formats -------------------------------------------------------------------


def golden_cohort() -> Any:
    return made_up_cohort(
        (2, 1, 3), age=[71.5, np.nan, 33.0], **{"Größe/cm": pd.Categorical(["groß", None, "klein"])}
    )


def write_golden(path: Path) -> None:
    """Write the golden store: once for each format version, never again."""
    tuned = FeatureSet(
        name="kfold5-r0-f3",
        backbone="tiny",
        weights_sha256="1" * 64,
        provenance=Provenance(
            labels=(PatientKey(id="P0", images=("0a", "0b")), PatientKey(id="P1")),
            images=(PatientKey(id="P2", images=("0c",)),),
        ),
        split="kfold5-r0-f3",
        training=("P0", "P1"),
        validation=("P2",),
    )
    shape = MapShape(views=1, channels=2, height=2, width=2)
    with StoreWriter(
        path,
        recipe=RECIPE,
        cohort=golden_cohort(),
        shape=shape,
        feature_sets=[FROZEN, tuned],
        image_hashes=[f"{row:032x}" for row in range(6)],
    ) as writer:
        maps = np.arange(48, dtype=np.float32).reshape(6, 1, 2, 2, 2)
        crc32 = np.arange(6, dtype=np.uint32)
        writer.write(0, {"frozen": maps, "kfold5-r0-f3": -maps}, crc32)
        writer.finish()


@pytest.mark.parametrize("version", [1, 2])
def test_reads_every_format(version: int) -> None:
    store = FeatureStore.open(GOLDENS[version])
    store.verify()
    maps = np.arange(48, dtype=np.float32).reshape(6, 1, 2, 2, 2)
    assert np.array_equal(store.features(), maps)
    assert np.array_equal(store.features("kfold5-r0-f3"), -maps)
    assert np.array_equal(store.pooled(), maps.mean((3, 4)))
    assert store.feature_sets["kfold5-r0-f3"].provenance.label_ids == ("P0", "P1")
    assert store.label_seen("kfold5-r0-f3") == (("P0", "P1") if version == 1 else ("P1",))
    pd.testing.assert_frame_equal(store.table, golden_cohort().table, check_dtype=False)
    assert store.covariates == ("age", "Größe/cm")
    assert store.submission_ids == ("P2",)
    assert store.recipe == RECIPE
    assert store.shape == MapShape(views=1, channels=2, height=2, width=2)
    assert store.image_statistics is None


def test_the_writer_still_writes_the_newest_format(tmp_path: Path) -> None:
    write_golden(tmp_path / "s.h5")
    with h5py.File(GOLDENS[2]) as golden, h5py.File(tmp_path / "s.h5") as now:
        names: list[str] = []
        golden.visit(names.append)
        for name in ["/", *names]:
            assert dict(now[name].attrs) == dict(golden[name].attrs), name
            if isinstance(golden[name], h5py.Dataset):
                assert now[name].dtype == golden[name].dtype
                np.testing.assert_array_equal(now[name][()], golden[name][()])


def test_what_a_process_killed_at_the_very_end_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_store(path)
    for name in ("s.h5.lock", "s.h5.journal"):
        (tmp_path / name).touch()
    clear_leavings(path)
    assert siblings(path) == ["s.h5"]


def test_what_belongs_to_a_store_that_is_being_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    write_store(path)
    with open_writer(path, made_up_cohort(), recipe={**RECIPE, "crop": 9}) as writer:
        write_rows(writer, made_up_maps(7), 0, 3)
        before = siblings(path)
        clear_leavings(path)
        assert siblings(path) == before
    clear_leavings(path)  # nobody is writing it, but it is to be continued
    assert siblings(path) == [name for name in before if name != "s.h5.lock"]
