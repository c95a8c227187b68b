"""One file of another tool -> the feature maps of a bag. Nothing in a file is ever executed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lymphfeat.errors import StoreError

FLOAT16_MAX = float(np.finfo(np.float16).max)
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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{path}: cannot be read ({reason}); write it again.") from None
    maps = _as_maps(path, values).astype(np.float32)
    _check_values(path, maps)
    return maps


def _as_maps(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    if not np.issubdtype(values.dtype, np.number) or np.issubdtype(
        values.dtype, np.complexfloating
    ):
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
    largest = np.abs(maps).max(axis=(1, 2, 3))  # (n,)
    bad = np.flatnonzero(~(largest <= FLOAT16_MAX))  # catches NaN too
    if len(bad):
        raise StoreError(
            f"{path}: row {bad[0]}: magnitude (={largest[bad[0]]}) must be at most "
            f"{FLOAT16_MAX:.0f} because a store holds float16. Make these features again, or scale "
            "them all."
        )


def _read_hdf5(path: Path) -> NDArray[Any]:
    with h5py.File(path, "r") as file:
        arrays = {name: own for name, own in file.items() if isinstance(own, h5py.Dataset)}
        return np.asarray(_choose(path, arrays)[()])


def _read_rows(path: Path, rows: NDArray[np.int64]) -> NDArray[Any]:
    with h5py.File(path, "r") as file:
        if not isinstance(file["X"], h5py.Dataset):
            raise StoreError(f"{path}: X must be a dense array; write it again with .toarray().")
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):  # picking single rows is slow
            return np.asarray(file["X"][first : last + 1])
        return np.asarray(file["X"][rows])


def read_patients(path: Path, column: str) -> Mapping[str, NDArray[np.int64]]:
    """Return the rows of each patient in a .h5ad file, by a column of its obs.

    Raises StoreError for a file that cannot be read or lacks the column.
    """
    try:
        with h5py.File(path, "r") as file:
            names = pd.Series(_texts(file["obs"][column]))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
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


def _texts(found: h5py.Group | h5py.Dataset) -> NDArray[np.object_]:
    """Return a column written as texts, with a mask, or as categories; None where missing."""
    if isinstance(found, h5py.Dataset):
        return np.asarray(found.asstr()[:], object)
    if "categories" in found:
        codes = found["codes"][:]
        texts, missing = _texts(found["categories"])[codes], codes < 0
    else:
        texts = _texts(found["values"])
        missing = found["mask"][:] if "mask" in found else np.zeros(len(texts), bool)
    texts[missing] = None
    return np.asarray(texts, object)


def _read_tensor(path: Path) -> NDArray[Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of pickle, zip and torch, with advice to trust the file
        raise StoreError(
            f"{path}: must hold a tensor and nothing that would have to be executed; save it again "
            "with torch.save(tensor, path)."
        ) from None
    if isinstance(content, Mapping):
        tensors = {str(key): own for key, own in content.items() if isinstance(own, torch.Tensor)}
        content = _choose(path, tensors)
    if not isinstance(content, torch.Tensor):
        raise StoreError(f"{path}: must hold a tensor; got {type(content).__name__}.")
    return np.asarray(content.detach().to_dense().float().numpy())


def _read_numpy(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _read_zipped(path: Path) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays[_choose(path, {name: name for name in arrays.files})])


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
