"""How files differ: byte for byte, then by the largest difference of two numbers in them."""

import filecmp
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lymphfeat.runtime.arrays import Floats
from lymphfeat.runtime.strict_json import json_text, parse_json

Values = Mapping[str, NDArray[Any]]
_BYTES = "bytes, not values"


@dataclass(frozen=True, kw_only=True)
class FileDifference:
    """How two files of one name differ.

    same: byte for byte, but for fields that may differ.
    largest: the largest difference of two numbers; None where they differ in more than numbers, or
        hold none.
    where: the column, field or tensor with it, or what else differs.
    """

    name: str
    same: bool
    largest: float | None = None
    where: str = ""


def compare_files(
    first: Path, second: Path, name: str, *, incidental: Collection[str] = ()
) -> FileDifference:
    """Compare two files; one that is not there differs.

    `incidental` are fields of JSON files, such as `training.versions`, that may differ.
    """
    for path in (first, second):
        if not path.is_file():
            return FileDifference(name=name, same=False, where=f"missing: {path}")
    if filecmp.cmp(first, second, shallow=False):
        return FileDifference(name=name, same=True)
    read = _READERS.get(first.suffix)
    if read is None:
        return FileDifference(name=name, same=False, where="bytes")
    try:
        values = [_without(incidental, read(path)) for path in (first, second)]
        largest, where = largest_difference(*values)
    except (ValueError, SafetensorError) as error:  # no longer what its name says
        return FileDifference(name=name, same=False, where=f"cannot be read ({error})")
    if where == _BYTES and first.suffix == ".json" and incidental:
        return FileDifference(name=name, same=True)
    return FileDifference(name=name, same=False, largest=largest, where=where)


def _without(fields: Collection[str], values: Values) -> Values:
    def named(name: str) -> bool:
        return any(name == field or name.startswith((f"{field}.", f"{field}[")) for field in fields)

    return {name: each for name, each in values.items() if not named(name)}


def largest_difference(first: Values, second: Values) -> tuple[float | None, str]:
    """Return the largest difference of two numbers, and the name of the values that have it.

    It is None, with what differs, where names, shapes or texts do.
    """
    for name in [*first, *second]:
        if name not in first or name not in second:
            return None, f"{name}, which only one has"
        if first[name].shape != second[name].shape:
            return None, f"{name}, of shape {first[name].shape} and {second[name].shape}"
    largest, where = 0.0, _BYTES
    for name, values in first.items():
        if not (_is_number(values) and _is_number(second[name])):
            if values.tolist() != second[name].tolist():
                return None, name
        elif (difference := _distance(values, second[name])) > largest:
            largest, where = difference, name
    return largest, where


def _is_number(values: NDArray[Any]) -> bool:
    return values.dtype.kind in "biuf"


def _distance(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return the largest difference; infinite where only one is a number, or finite."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    unlike = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    found: Floats = np.nan_to_num(np.abs(a[unlike] - b[unlike]), nan=np.inf)
    return float(found.max(initial=0.0))


def _read_table(path: Path) -> Values:
    table = pd.read_csv(path)
    return {
        str(name): column.to_numpy()
        if pd.api.types.is_numeric_dtype(column)
        else column.fillna("").astype(str).to_numpy(object)
        for name, column in table.items()
    }


def _read_json(path: Path) -> Values:
    return dict(_leaves(parse_json(path.read_text(encoding="utf-8")), ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the values of nested objects and lists, by the names of their fields."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}[{number}]")
    elif isinstance(value, (bool, int, float)):
        yield name, np.array(value)
    else:  # a text, null, or an empty object or list
        yield name, np.array(json_text(value), object)


_READERS: Mapping[str, Callable[[Path], Values]] = {
    ".csv": _read_table,
    ".json": _read_json,
    ".safetensors": load_file,
}
