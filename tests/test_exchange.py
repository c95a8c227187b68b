"""Bags of other tools become a store, and a store becomes their bags; nothing is lost."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from lymphfeat.cohort.provenance import PatientKey, Provenance
from lymphfeat.errors import CohortError, LymphfeatError, SettingsError, StoreError
from lymphfeat.exporting import export_bags
from lymphfeat.features.store import FeatureSet, FeatureStore
from lymphfeat.importing import import_bags
from lymphfeat.settings import ExportFormat
from tests.cohorts import write_text
from tests.hostile import Harmful
from tests.stores import made_up_cohort, made_up_maps, open_writer

Array = NDArray[np.float32]
SIZES = {"P10": 3, "P2": 1, "P1": 4}  # not in the order of a store
TABLE = ("id,label,age,laboratory", "P1,1,60,A", "P2,0,,B", "P10,,41,A")


def bags(channels: int = 5, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {id: rng.normal(size=(n, channels)).astype(np.float32) for id, n in SIZES.items()}


def write_hdf5(path: Path, own: Array, name: str = "features") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name] = own
        file["coords"] = np.zeros((own.shape[-2], 2), np.int64)


def write_numpy(path: Path, own: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, own)


def write_layout(root: Path, layout: str, found: dict[str, Array]) -> Path:
    """Write bags as a tool does."""
    for number, (id, own) in enumerate(found.items()):
        if layout == "clam":
            write_hdf5(root / "h5_files" / f"{id}.h5", own)
            (root / "pt_files").mkdir(exist_ok=True)
            torch.save(torch.from_numpy(own), root / "pt_files" / f"{id}.pt")
        elif layout == "trident":
            write_hdf5(root / f"{id}.h5", own[None])
        elif layout == "stamp":
            write_hdf5(root / f"{id}.h5", own.astype(np.float16), "feats")
        elif layout == "tensors":
            root.mkdir(exist_ok=True)
            torch.save({"features": torch.from_numpy(own)}, root / f"{id}.pt")
        elif layout == "slide2vec":
            root.mkdir(exist_ok=True)
            torch.save(torch.from_numpy(own.T[:, :, None].copy()), root / f"{id}.pt")  # (C, n, 1)
            write_text(root / f"{id}.meta.json", "{}")
        elif layout == "npz":
            root.mkdir(exist_ok=True)
            np.savez(root / f"{id}.npz", features=own, names=np.arange(len(own)))
        elif layout == "npy":
            write_numpy(root / f"{id}.npy", own)
        elif layout == "torchmil":
            write_numpy(root / "features" / f"{id}.npy", own)
            write_numpy(root / "labels" / f"{id}.npy", np.array(number % 2))
            write_numpy(root / "coords" / f"{id}.npy", np.zeros((len(own), 2)))
        else:
            half = len(own) // 2
            parts = {"a": own[:half], "b": own[half:]} if half else {"a": own}
            for name, part in parts.items():
                place = root / "data" / ("AML" if number == 1 else "healthy") / id
                write_numpy(place / f"{name}.npy", part)
    return root


LAYOUTS = ("clam", "trident", "stamp", "tensors", "slide2vec", "npz", "npy", "torchmil", "scemila")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_store(layout: str, tmp_path: Path) -> None:
    found = bags()
    root = write_layout(tmp_path / "bags", layout, found)
    table = write_text(tmp_path / "table.csv", *TABLE)
    store = import_bags(root, tmp_path / "store.h5", table=table)
    store.verify()
    assert store.ids == ("P1", "P2", "P10")
    assert store.labels.tolist() == [1, 0, -1]
    assert list(store.table["split"]) == ["train", "train", "test"]
    assert list(store.table["laboratory"]) == ["A", "B", "A"]
    assert store.shape.rows(8) == (8, 1, 5, 1, 1)
    expected = np.concatenate([found[id] for id in store.ids])
    np.testing.assert_array_equal(store.features()[:, 0, :, 0, 0], expected.astype(np.float16))
    assert store.is_imported


def test_maps_stay_maps(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype(np.float32)
    write_numpy(tmp_path / "bags" / "data" / "AML" / "P1" / "maps.npy", maps)
    store = import_bags(tmp_path / "bags", tmp_path / "store.h5", tumoral=["AML"])
    np.testing.assert_array_equal(store.features()[:, 0], maps.astype(np.float16))


def test_labels_come_from_the_layout_where_there_is_no_table(tmp_path: Path) -> None:
    torchmil = write_layout(tmp_path / "torchmil", "torchmil", bags())
    scemila = write_layout(tmp_path / "scemila", "scemila", bags())
    assert import_bags(torchmil, tmp_path / "a.h5").table["label"].to_dict() == {
        "P1": 0,
        "P2": 1,
        "P10": 0,
    }
    with pytest.raises(SettingsError, match="count as tumoral, out of AML, healthy"):
        import_bags(scemila, tmp_path / "b.h5")
    store = import_bags(scemila, tmp_path / "b.h5", tumoral=["AML"])
    assert store.table["label"].to_dict() == {"P1": 0, "P2": 1, "P10": 0}


def test_a_table_in_the_folder_is_found_and_none_is_said(tmp_path: Path) -> None:
    root = write_layout(tmp_path / "bags", "npy", bags())
    alone = import_bags(root, tmp_path / "a.h5")
    assert set(alone.labels) == {-1}
    assert any("every patient is unlabelled" in line for line in alone.notes)
    write_text(root / "process_list_autogen.csv", "slide_id,status", "P1,done")
    write_text(root / "patients.csv", *TABLE)
    assert import_bags(root, tmp_path / "b.h5").labels.tolist() == [1, 0, -1]


def test_files_and_rows_must_match_unless_missing_ones_are_left_out(tmp_path: Path) -> None:
    root = write_layout(tmp_path / "bags", "npy", bags())
    table = write_text(tmp_path / "table.csv", "id,label", "P1,1", "P2,0", "P3,0")
    with pytest.raises(CohortError, match=r"1 patient\(s\) without images: P3; 1 bag\(s\) .* P10"):
        import_bags(root, tmp_path / "store.h5", table=table)
    store = import_bags(root, tmp_path / "store.h5", table=table, allow_missing=True)
    assert store.ids == ("P1", "P2")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (np.zeros((0, 5)), "at least one instance"),
        (np.full((2, 5), np.nan), r"row 0: magnitude \(=nan\)"),
        (np.array([[0.0] * 5, [1e6] * 5]), r"row 1: magnitude \(=1000000.0\)"),
        (np.zeros((2, 6)), "must have the shape 5 of .*P1.npy; got 6"),
        (np.zeros(5), r"shape \(n, C\), .*; got \(5,\)"),
        (np.zeros((2, 3, 5)), r"got \(2, 3, 5\)"),
        (np.array(["a"]), "must be numbers; got <U1"),
        (np.array([{}], object), "cannot be read"),
    ],
)
def test_a_bag_that_cannot_be_used_is_named(
    own: NDArray[Any], message: str, tmp_path: Path
) -> None:
    root = write_layout(tmp_path / "bags", "npy", bags())
    np.save(root / "P2.npy", own, allow_pickle=True)
    with pytest.raises(StoreError, match=rf"P2\.npy: .*{message}"):
        import_bags(root, tmp_path / "store.h5")
    assert not (tmp_path / "store.h5").exists()


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    (tmp_path / "bags").mkdir()
    torch.save(Harmful(tmp_path / "executed"), tmp_path / "bags" / "P1.pt")
    with pytest.raises(StoreError, match=r"P1\.pt: must hold a tensor and nothing") as caught:
        import_bags(tmp_path / "bags", tmp_path / "store.h5")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_of_anndata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bags").mkdir()
    with h5py.File(tmp_path / "bags" / "a.h5ad", "w") as file:
        file.create_group("obs")
    with pytest.raises(StoreError, match=r"a\.h5ad: must be a file of AnnData .* column patient"):
        import_bags(tmp_path / "bags", tmp_path / "store.h5")


@pytest.mark.parametrize("kind", ["texts", "masked texts", "masked categories"])
def test_rows_of_an_anndata_file_may_be_in_any_order(kind: str, tmp_path: Path) -> None:
    """And its texts in any of the forms that AnnData writes."""
    (tmp_path / "bags").mkdir()
    with h5py.File(tmp_path / "bags" / "a.h5ad", "w") as file:
        file["X"] = np.arange(8, dtype=np.float32).reshape(4, 2)
        if kind == "masked categories":
            file["obs/patient/categories/values"] = ["P1", "P2"]
            file["obs/patient/codes"] = [1, 0, 1, 0]
        else:
            name = "obs/patient" if kind == "texts" else "obs/patient/values"
            file[name] = ["P2", "P1", "P2", "P1"]
    store = import_bags(tmp_path / "bags", tmp_path / "store.h5")
    assert store.ids == ("P1", "P2")
    np.testing.assert_array_equal(store.pooled()[:, 0], [[2, 3], [6, 7], [0, 1], [4, 5]])


@pytest.mark.parametrize("kind", ["masked texts", "categories"])
def test_rows_of_nobody_are_refused(kind: str, tmp_path: Path) -> None:
    """They must not become those of another patient."""
    (tmp_path / "bags").mkdir()
    with h5py.File(tmp_path / "bags" / "a.h5ad", "w") as file:
        file["X"] = np.zeros((3, 2), np.float32)
        if kind == "categories":
            file["obs/patient/categories"] = ["P1", "P2"]
            file["obs/patient/codes"] = np.array([1, 0, -1], np.int8)
        else:
            file["obs/patient/values"] = ["P2", "P1", "P1"]
            file["obs/patient/mask"] = [False, False, True]
    with pytest.raises(StoreError, match=r"a\.h5ad: column patient of obs .*; row 2 has none"):
        import_bags(tmp_path / "bags", tmp_path / "store.h5")


def test_places_on_a_slide_are_no_features(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "bags" / "P1_patches.h5", np.ones((3, 2), np.float32), "coords_level")
    with pytest.raises(StoreError, match=r"P1_patches\.h5: must have an array .*; got none"):
        import_bags(tmp_path / "bags", tmp_path / "store.h5")


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".npy", ".npz"])
def test_a_damaged_file_is_an_error_in_one_line(suffix: str, tmp_path: Path) -> None:
    write_text(tmp_path / "bags" / f"P1{suffix}", "not what it says")
    with pytest.raises(StoreError, match=rf"P1\{suffix}: ") as caught:
        import_bags(tmp_path / "bags", tmp_path / "store.h5")
    assert "\n" not in str(caught.value)


def test_what_is_found_twice_is_refused_and_what_is_not_there(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_numpy(tmp_path / "bags" / place / "P1.npy", np.ones((1, 5)))
    with pytest.raises(StoreError, match=r"P1 must have one file; got a/P1\.npy and b/P1\.npy"):
        import_bags(tmp_path / "bags", tmp_path / "store.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="must hold bags of features"):
        import_bags(tmp_path / "empty", tmp_path / "store.h5")
    with pytest.raises(StoreError, match="must be a folder"):
        import_bags(tmp_path / "nowhere", tmp_path / "store.h5")


def test_an_interrupted_import_is_continued_and_a_finished_one_reused(tmp_path: Path) -> None:
    root = write_layout(tmp_path / "bags", "npy", bags())
    whole = import_bags(root, tmp_path / "whole.h5")

    def interrupt(done: int, total: int, text: str = "") -> None:
        if done == 5:  # three bags read, two written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_bags(root, tmp_path / "store.h5", progress=interrupt)
    journal = (tmp_path / "store.h5.journal").read_text()
    assert len(journal.splitlines()) == 1 + 2
    import_bags(root, tmp_path / "store.h5")
    assert (tmp_path / "store.h5").read_bytes() == whole.path.read_bytes()
    before = whole.path.stat().st_mtime_ns
    import_bags(root, whole.path)
    assert whole.path.stat().st_mtime_ns == before
    np.save(root / "P2.npy", np.ones((1, 5)))
    with pytest.raises(StoreError, match=r"different recipe: cohort\.sha256"):
        import_bags(root, whole.path)
    assert import_bags(root, whole.path, force=True).pooled().max() >= 1


# --- exporting -----------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Return a store of maps in two views, whose backbone has seen a label and an image."""
    cohort = made_up_cohort((2, 1, 4), age=[60.0, np.nan, 30.5], ward=["a/b", "c", "a/b"])
    hashes = [f"{row:016x}" * 2 for row in range(7)]
    seen = Provenance(
        labels=(PatientKey.of("elsewhere", hashes[:2]),), images=(PatientKey.of("P2", hashes[3:]),)
    )
    frozen = FeatureSet(name="frozen", backbone="tiny", weights_sha256="f" * 64, provenance=seen)
    maps = made_up_maps(7)
    with open_writer(
        tmp_path / "store.h5", cohort, feature_sets=[frozen], image_hashes=hashes
    ) as writer:
        writer.write(0, {"frozen": maps}, np.arange(7, dtype=np.uint32))
        writer.finish()
    return FeatureStore.open(tmp_path / "store.h5")


@pytest.mark.parametrize("format", ["clam", "torchmil", "anndata", "npz"])
def test_a_store_comes_back_from_an_export(
    format: ExportFormat, store: FeatureStore, tmp_path: Path
) -> None:
    export_bags(store, tmp_path / "bags", format)
    back = import_bags(tmp_path / "bags", tmp_path / "back.h5")
    pd.testing.assert_frame_equal(back.table, store.table)
    assert back.image_names == store.image_names
    assert back.image_hashes == store.image_hashes
    assert back.label_seen() == store.label_seen() == ("P0",)
    assert back.images_seen() == ("P2",)
    assert back.recipe["backbone"] == "tiny"
    assert back.recipe["weights_sha256"] == "f" * 64
    np.testing.assert_array_equal(
        back.pooled()[:, 0], store.pooled()[:, 0].astype(np.float16).astype(np.float32)
    )


def test_clam_reads_its_bags_and_labels(store: FeatureStore, tmp_path: Path) -> None:
    export_bags(store, tmp_path / "bags", "clam")
    with h5py.File(tmp_path / "bags" / "h5_files" / "P2.h5") as file:
        features, coords = file["features"][:], file["coords"][:]
    np.testing.assert_array_equal(features, store.pooled()[3:, 0])
    np.testing.assert_array_equal(coords, [[0, 0], [1, 0], [2, 0], [3, 0]])
    tensor = torch.load(tmp_path / "bags" / "pt_files" / "P2.pt", weights_only=True)
    np.testing.assert_array_equal(tensor.numpy(), features)
    lines = (tmp_path / "bags" / "dataset.csv").read_text().splitlines()
    assert lines == ["case_id,slide_id,label", "P0,P0,0", "P1,P1,1"]


@pytest.mark.filterwarnings("default")  # of other libraries
def test_torchmil_reads_its_bags(store: FeatureStore, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchmil.datasets")
    export_bags(store, tmp_path / "bags", "torchmil")
    bags = datasets.ProcessedMILDataset(
        features_path=str(tmp_path / "bags" / "features"),
        labels_path=str(tmp_path / "bags" / "labels"),
        bag_names=["P0", "P2"],
        bag_keys=["X", "Y"],
    )
    np.testing.assert_array_equal(bags[1]["X"].numpy(), store.pooled()[3:, 0])
    assert [float(bag["Y"]) for bag in (bags[0], bags[1])] == [0, -1]


def test_labels_of_torchmil_have_no_dimension(store: FeatureStore, tmp_path: Path) -> None:
    export_bags(store, tmp_path / "bags", "torchmil")
    label = np.load(tmp_path / "bags" / "labels" / "P1.npy")
    assert label.shape == ()
    assert label == 1


@pytest.mark.filterwarnings("default")
def test_anndata_reads_its_file(store: FeatureStore, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    export_bags(store, tmp_path / "bags", "anndata")
    found = anndata.read_h5ad(tmp_path / "bags" / "features.h5ad")
    np.testing.assert_array_equal(found.X, store.pooled()[:, 0])
    assert list(found.obs["patient"]) == ["P0"] * 2 + ["P1"] + ["P2"] * 4
    assert list(found.obs["image"]) == list(store.image_names)
    assert list(found.obs["ward"]) == ["a/b"] * 2 + ["c"] + ["a/b"] * 4
    np.testing.assert_array_equal(found.obs["age"], [60, 60, np.nan] + [30.5] * 4)
    assert list(found.obs_names[:3]) == ["P0/0", "P0/1", "P1/0"]


def test_an_h5ad_file_is_laid_out_as_anndata_specifies(store: FeatureStore, tmp_path: Path) -> None:
    export_bags(store, tmp_path / "bags", "anndata")
    with h5py.File(tmp_path / "bags" / "features.h5ad") as file:
        kinds = {name: own.attrs["encoding-type"] for name, own in file.items()}
        assert kinds == {
            "X": "array",
            **dict.fromkeys(("obs", "var"), "dataframe"),
            **dict.fromkeys(("layers", "obsm", "obsp", "uns", "varm", "varp"), "dict"),
        }
        assert list(file["obs"].attrs["column-order"]) == [
            *("patient", "image", "label", "split", "age", "ward")
        ]
        codes, names = file["obs/ward/codes"][:], file["obs/ward/categories"].asstr()[:]
        assert [names[code] for code in codes][:3] == ["a/b", "a/b", "c"]
        assert file["X"].shape == (7, 3)


def test_the_set_of_features_is_named_where_there_are_several(tmp_path: Path) -> None:
    sets = [FeatureSet(name=name, backbone="tiny", weights_sha256=name) for name in "ab"]
    with open_writer(tmp_path / "s.h5", made_up_cohort((2, 1)), feature_sets=sets) as writer:
        maps = {name: made_up_maps(3, seed=seed) for seed, name in enumerate("ab")}
        writer.write(0, maps, np.arange(3, dtype=np.uint32))
        writer.finish()
    with pytest.raises(SettingsError, match=r"one of the sets of .*: a, b"):
        export_bags(tmp_path / "s.h5", tmp_path / "bags", "npz")
    assert export_bags(tmp_path / "s.h5", tmp_path / "bags", "npz", features="b").features == "b"
    content = json.loads((tmp_path / "bags" / "export.json").read_text())
    assert content["weights_sha256"] == "b"


def test_an_export_that_was_changed_is_not_trusted(store: FeatureStore, tmp_path: Path) -> None:
    export_bags(store, tmp_path / "bags", "npz")
    np.savez(tmp_path / "bags" / "P1.npz", features=np.ones((2, 3), np.float32))
    with pytest.raises(StoreError, match=r"images\.csv: must have the 2 rows of the bag of P1"):
        import_bags(tmp_path / "bags", tmp_path / "back.h5")
    write_text(tmp_path / "bags" / "export.json", "{}")
    with pytest.raises(StoreError, match=r"export\.json: is damaged"):
        import_bags(tmp_path / "bags", tmp_path / "back.h5")


def test_an_export_is_replaced_only_with_force(store: FeatureStore, tmp_path: Path) -> None:
    export_bags(store, tmp_path / "bags", "npz")
    with pytest.raises(LymphfeatError, match="already holds a set of bags"):
        export_bags(store, tmp_path / "bags", "clam")
    export_bags(store, tmp_path / "bags", "clam", force=True)
    assert not list((tmp_path / "bags").glob("*.npz"))
