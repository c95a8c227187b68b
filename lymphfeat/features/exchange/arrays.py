"""One file of another tool -> the feature maps of a bag. Nothing in a file is ever executed."""

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lymphfeat.errors import StoreError, first_line
from lymphfeat.features.hdf5 import arrays_in, dataset, member, numbers, open_hdf5, unpacked
from lymphfeat.runtime.arrays import FLOAT16_MAX, beyond_float16
from lymphfeat.runtime.saved_tensors import UnfitTensorError, read_saved

META_SUFFIX = ".meta.json"  # beside a grid of slide2vec
_NAMES = ("features", "feats", "X")  # of the features among other arrays of a file


def read_maps(path: Path, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    """Read a bag's feature maps (n, C, h, w) from a .h5, .pt, .npy or .npz file.

    Of a .h5ad file of AnnData, which holds many bags, the bag's `rows` are read.

    Vectors, (n, C) or (1, n, C), become maps of one pixel; of a grid (C, h, w) of slide2vec every
    place is an instance. Raises StoreError, naming the file, for a file that cannot be read or
    holds no instances, or values that are not finite or beyond the range of float16.
    """
    try:
        if rows is None:
            values = np.asarray(READERS[path.suffix.lower()](path))
        else:
            values = _read_rows(path, rows)
    except StoreError:
        raise
    except Exception as error:  # damaged files fail in as many ways as there are libraries
        raise StoreError(f"{path}: cannot be read ({first_line(error)}); write it again.") from None
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        maps = _as_maps(path, values).astype(np.float32)
    _check_values(path, maps)
    return maps


def _as_maps(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "iuf":
        raise StoreError(f"{path}: features must be numbers; got {values.dtype}.")
    grid = path.with_name(path.stem + META_SUFFIX).exists()
    if values.ndim == 3 and grid:
        values = values.reshape(len(values), -1).T  # (h · w, C)
    elif values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[:, :, None, None]
    if values.ndim != 4:
        raise StoreError(
            f"{path}: features must have the shape (n, C), (1, n, C) or (n, C, h, w); got "
            f"{values.shape}."
        )
    if not values.size:
        raise StoreError(
            f"{path}: must hold at least one instance; got {values.shape}. Remove the file, and "
            "the patient's row from the table."
        )
    return values


def _check_values(path: Path, maps: NDArray[np.float32]) -> None:
    if bad := beyond_float16(maps):
        row, largest = bad
        raise StoreError(
            f"{path}: row {row}: magnitude (={largest}) must be at most "
            f"{FLOAT16_MAX:.0f} because a store holds float16. Make these features again, or scale "
            "them all."
        )


def _read_hdf5(path: Path) -> NDArray[Any]:
    with open_hdf5(path) as file:
        names = {name: name for name in arrays_in(file)}
        return np.asarray(numbers(file, _choose(path, names))[()])


def _read_rows(path: Path, rows: NDArray[np.int64]) -> NDArray[Any]:
    with open_hdf5(path) as file:
        if not isinstance(member(file, "X"), h5py.Dataset):
            raise StoreError(f"{path}: X must be a dense array; write it again with .toarray().")
        x = numbers(file, "X")
        first, last = int(rows[0]), int(rows[-1])
        if not x.ndim or last >= len(x):
            raise StoreError(f"{path}: X must have a row for each of obs; write it again.")
        if last - first + 1 == len(rows):  # picking single rows is slow
            return np.asarray(x[first : last + 1])
        return np.asarray(x[rows])


def read_patients(path: Path, column: str) -> Mapping[str, NDArray[np.int64]]:
    """Return the rows of each patient in a .h5ad file, by a column of its obs.

    Raises StoreError for a file that cannot be read or lacks the column.
    """
    try:
        with open_hdf5(path) as file:
            names = pd.Series(_read_column(file, f"obs/{column}"))
    except Exception as error:  # damaged files fail in as many ways as h5py has
        raise StoreError(
            f"{path}: must be a file of AnnData whose obs has a column {column} ({error})."
        ) from None
    if names.isna().any():
        raise StoreError(
            f"{path}: column {column} of obs must name the patient of every row; row "
            f"{int(names.isna().argmax())} has none. Leave such rows out."
        )
    rows = names.groupby(names, sort=False).indices
    return {str(name): np.asarray(own, np.int64) for name, own in rows.items()}


def _read_column(file: h5py.File, place: str) -> NDArray[np.object_]:
    """Return a column written as texts, with a mask, or as categories; None where missing."""
    found = member(file, place)
    if isinstance(found, h5py.Dataset) or "categories" not in found:
        return _read_masked(file, place)
    codes = numbers(file, f"{place}/codes")[:]
    texts = np.asarray(_read_masked(file, f"{place}/categories")[codes], object)
    texts[codes < 0] = None
    return texts


def _read_masked(file: h5py.File, place: str) -> NDArray[np.object_]:
    found = member(file, place)
    if isinstance(found, h5py.Dataset):
        return _read_texts(file, place)
    texts = _read_texts(file, f"{place}/values")
    if "mask" in found:
        texts[numbers(file, f"{place}/mask")[:].astype(bool)] = None
    return texts


def _read_texts(file: h5py.File, place: str) -> NDArray[np.object_]:
    found = dataset(file, place)
    if found.ndim != 1:
        raise ValueError(f"{place} must be a row of texts")
    if found.dtype.kind in "iu":  # ids may be numbers
        return np.asarray(found[:].astype(str), object)
    return np.asarray(found.asstr()[:], object)


def _read_tensor(path: Path) -> NDArray[Any]:
    try:
        content = read_saved(path)
    except UnfitTensorError:
        raise
    except Exception:  # of pickle, zip and torch, with advice to trust the file
        raise StoreError(
            f"{path}: must hold a tensor and nothing that would have to be executed; save it again "
            "with torch.save(tensor, path)."
        ) from None
    if isinstance(content, Mapping):
        tensors = {key: own for key, own in content.items() if isinstance(own, torch.Tensor)}
        content = _choose(path, {key: own for key, own in tensors.items() if isinstance(key, str)})
    if not isinstance(content, torch.Tensor):
        raise StoreError(f"{path}: must hold a tensor; got {type(content).__name__}.")
    return np.asarray(content.detach().float().numpy())


def _read_numpy(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _read_zipped(path: Path) -> NDArray[Any]:
    _check_entries(path)
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays[_choose(path, {name: name for name in arrays.files})])


def _check_entries(path: Path) -> None:
    """Raise ValueError for arrays that declare more than the file holds: it would be allocated."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.file_size > unpacked(min(entry.compress_size, size)):
                raise ValueError(f"{entry.filename} becomes {entry.file_size} bytes when unpacked")
            with file.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                read = {1: np.lib.format.read_array_header_1_0}.get(
                    version[0], np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(stream)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} declares {shape}, more than the file holds")


def _choose(path: Path, arrays: Mapping[str, Any]) -> Any:
    """Return the array of features: by name, or the only one but places on a slide."""
    arrays = {name: own for name, own in arrays.items() if not name.startswith("coord")}
    for name in _NAMES:
        if name in arrays:
            return arrays[name]
    if len(arrays) != 1:
        raise StoreError(
            f"{path}: must have an array named features or feats; got "
            f"{', '.join(arrays) or 'none'}."
        )
    return next(iter(arrays.values()))


READERS: Mapping[str, Callable[[Path], NDArray[Any]]] = {  # the first is preferred
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".npz": _read_zipped,
    ".npy": _read_numpy,
    ".pt": _read_tensor,
    ".pth": _read_tensor,
}
