"""Bags of features in the formats that other tools read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lymphfeat.errors import StoreError
from lymphfeat.features.store import FeatureStore
from lymphfeat.runtime.files import write_buffered

TABLE_FILE = "patients.csv"
Bags = Iterator[tuple[str, int, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: the files it has, and what writes them to a folder."""

    files: tuple[str, ...]  # patterns
    write: Callable[[FeatureStore, str, Path], None]  # (store, set of features, folder)
    copies: int = 1  # of every feature


def write_table(store: FeatureStore, folder: Path) -> None:
    """Write labels, splits and attributes as a table of a cohort."""
    store.table.to_csv(folder / TABLE_FILE, index_label="id")


def _bags(store: FeatureStore, features: str) -> Bags:
    """Yield each patient's id, label and average-pooled features (n, C) of the identity view."""
    pooled = store.pooled(features)  # (N, V, C)
    for id, label, start, stop in zip(
        store.ids, store.labels.tolist(), store.offsets[:-1], store.offsets[1:], strict=True
    ):
        if id.startswith(".") or any(char in id for char in "/\\:\0"):  # also on Windows
            raise StoreError(
                f"{store.path}: patient {id} must have an id that can name a file. Rename the "
                "patient in the cohort, and make the store again."
            )
        yield id, label, np.array(pooled[start:stop, 0])


def _write_clam(store: FeatureStore, features: str, folder: Path) -> None:
    """Write h5_files, pt_files and the table of labels that CLAM trains from.

    Images have no place on a slide: coords are (number of the image, 0).
    """
    for name in ("h5_files", "pt_files"):
        (folder / name).mkdir()
    for id, _, own in _bags(store, features):
        with h5py.File(folder / "h5_files" / f"{id}.h5", "w") as file:
            file["features"] = own
            file["coords"] = np.stack([np.arange(len(own)), np.zeros(len(own))], 1).astype(np.int64)
        tensor = torch.from_numpy(own)
        write_buffered(folder / "pt_files" / f"{id}.pt", partial(torch.save, tensor))
    labelled = store.table[store.labels >= 0]
    rows = {"case_id": labelled.index, "slide_id": labelled.index, "label": labelled["label"]}
    pd.DataFrame(rows).to_csv(folder / "dataset.csv", index=False)


def _write_torchmil(store: FeatureStore, features: str, folder: Path) -> None:
    for name in ("features", "labels"):
        (folder / name).mkdir()
    for id, label, own in _bags(store, features):
        for name, values in (("features", own), ("labels", np.array(label))):
            write_buffered(folder / name / f"{id}.npy", partial(np.save, arr=values))


def _write_zipped(store: FeatureStore, features: str, folder: Path) -> None:
    for id, label, own in _bags(store, features):
        np.savez(folder / f"{id}.npz", features=own, label=np.array(label))


# --- AnnData -------------------------------------------------------------------------------------


def _write_anndata(store: FeatureStore, features: str, folder: Path) -> None:
    """Write features.h5ad: an observation per image, with all that is known of its patient."""
    patients = store.table.rename(columns={"patient": "patient_"})
    patient = np.repeat(np.arange(len(patients)), store.n_images)  # (N,)
    obs = patients.iloc[patient]
    with h5py.File(folder / "features.h5ad", "w") as file:
        _encode(file, "anndata", "0.1.0")
        # Written patient by patient: the features of a large store do not fit into memory.
        x = file.create_dataset("X", (len(patient), store.shape.channels), np.float32)
        _encode(x, "array", "0.2.0")
        for (_, _, own), start in zip(_bags(store, features), store.offsets, strict=False):
            x[start : start + len(own)] = own
        columns = {"patient": obs.index.to_numpy(), "image": list(store.image_names)}
        columns |= {str(name): obs[name] for name in obs}
        names = [
            f"{id}/{number}"
            for id, n in zip(store.ids, store.n_images, strict=True)
            for number in range(n)
        ]
        _write_frame(file, "obs", names, columns)
        _write_frame(file, "var", [str(number) for number in range(store.shape.channels)], {})
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            _encode(file.create_group(name), "dict", "0.1.0")


def _write_frame(file: h5py.Group, name: str, index: list[str], columns: Mapping[str, Any]) -> None:
    frame = file.create_group(name)
    _encode(frame, "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    safe = {column.replace("/", "_"): values for column, values in columns.items()}
    frame.attrs.create("column-order", list(safe), dtype=h5py.string_dtype())
    _write_texts(frame, "_index", index)
    for column, values in safe.items():
        if pd.api.types.is_numeric_dtype(values):
            _encode(frame.create_dataset(column, data=np.asarray(values)), "array", "0.2.0")
        else:
            _write_categories(frame, column, values)


def _write_categories(frame: h5py.Group, name: str, values: Any) -> None:
    known = pd.Categorical(values)
    group = frame.create_group(name)
    _encode(group, "categorical", "0.2.0")
    group.attrs["ordered"] = False
    _encode(group.create_dataset("codes", data=known.codes), "array", "0.2.0")
    _write_texts(group, "categories", known.categories.astype(str).tolist())


def _write_texts(group: h5py.Group, name: str, values: list[str]) -> None:
    encoded = [value.encode("utf-8", "replace") for value in values]
    dataset = group.create_dataset(name, data=encoded, dtype=h5py.string_dtype())
    _encode(dataset, "string-array", "0.2.0")


def _encode(item: Any, kind: str, version: str) -> None:
    """Say how AnnData is to read a part of its file."""
    item.attrs["encoding-type"], item.attrs["encoding-version"] = kind, version


FORMATS: Mapping[str, Format] = {
    "clam": Format(
        files=("h5_files/*.h5", "pt_files/*.pt", "dataset.csv"), write=_write_clam, copies=2
    ),
    "torchmil": Format(files=("features/*.npy", "labels/*.npy"), write=_write_torchmil),
    "anndata": Format(files=("features.h5ad",), write=_write_anndata),
    "npz": Format(files=("*.npz",), write=_write_zipped),
}
