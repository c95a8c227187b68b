"""Writing a feature store so that it survives `kill -9`.

- All HDF5 metadata is written first, into a temporary sibling, which is closed; rows then go to
  their places in the file, so no HDF5 structure is ever half written.
- A journal next to it lists the finished blocks of rows with their checksums. At the end every
  block is read back and compared, the store is marked complete and renamed.
- A lock that dies with its process keeps a second writer out.
"""

import math
import os
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TextIO

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import StoreError
from lymphfeat.features.hdf5 import open_hdf5
from lymphfeat.features.store import (
    FORMAT,
    FORMAT_VERSION,
    SLASH,
    STATISTICS,
    FeatureSet,
    MapShape,
    Recipe,
    canonical,
    encode_text,
    map_rows,
    recipe_sha256,
)
from lymphfeat.runtime.arrays import FLOAT16_MAX, beyond_float16
from lymphfeat.runtime.disks import require_room, writing
from lymphfeat.runtime.files import flush_file, lock_file, replace_file
from lymphfeat.runtime.identity import differing_fields
from lymphfeat.runtime.part_reader import PartReader
from lymphfeat.runtime.strict_json import json_text, parse_json

_OF_IMAGES = ("cohort", "left_out")  # fields of the recipe that say which images there are
_NAMES, _METADATA = 100, 16_384  # bytes: of an image's name, hash and checksum; of all else


class StoreWriter:
    """Writes a store block by block; reopened with an equal recipe, it continues where it was.

    A block is a range of rows [start, stop); blocks may be written in any order, each once.
    `force` drops an unfinished store of another recipe, which is an error otherwise. An existing
    store at `path` stays as it is until this one is finished. OutputError where the disk is full or
    closed: what was written before is kept.
    """

    def __init__(
        self,
        path: Path,
        *,
        recipe: Recipe,
        cohort: Cohort,
        shape: MapShape,
        feature_sets: Sequence[FeatureSet],
        image_hashes: Sequence[str] = (),
        statistics: Sequence[str] = (),
        origin: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> None:
        """Take the (N,) content hashes of the cohort's image files; none where they are unknown.

        `statistics` are the names of the image statistics that will be written. `origin` says what
        else a repeat needs to know, and where the maps were computed; a store that is continued
        keeps that of its beginning.
        """
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal_path = path.with_name(path.name + ".journal")
        self._earlier = path.with_name(path.name + ".partial.earlier")
        with writing(path), ExitStack() as opened:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not opened.enter_context(lock_file(path.with_name(path.name + ".lock"))):
                raise StoreError(
                    f"{path}: another process is writing this store; wait for it or choose another "
                    "--out."
                )
            self._journal = _Journal(
                opened.enter_context(self.journal_path.open("a+", encoding="utf-8"))
            )
            blocks = self._blocks_to_copy(recipe, image_hashes, statistics)
            if blocks or not self._continues(recipe, force):
                content = (recipe, cohort, shape, feature_sets, image_hashes, statistics, origin)
                size = _size(cohort, shape, feature_sets, statistics)
                self._begin(recipe, blocks, size, lambda new: _create(new, *content))
            names = _row_names(self.partial)
            self._maps = {name: PartReader(map_rows(self.partial, name, "r+")) for name in names}
            self._file = opened.enter_context(self.partial.open("r+b"))
            self._opened = opened.pop_all()

    def _begin(
        self,
        recipe: Recipe,
        blocks: Mapping[tuple[int, int], dict[str, int]],
        size: int,
        create: Callable[[Path], None],
    ) -> None:
        """Begin a store of a size in bytes; only `blocks` of an earlier try are taken over."""
        if not blocks:
            self._journal.clear()
            self.partial.unlink(missing_ok=True)
        require_room(self.path, size)
        if blocks:
            self.partial.replace(self._earlier)
            self._journal.clear()
        replace_file(self.partial, create)
        _copy_rows(self._earlier, self.partial, blocks)
        flush_file(self.partial)
        self._earlier.unlink(missing_ok=True)
        self._journal.start(recipe)
        for (start, stop), checksums in blocks.items():
            self._journal.add(start, stop, checksums)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with writing(self.path):
            self._opened.close()

    def _continues(self, recipe: Recipe, force: bool) -> bool:
        """Return whether an earlier try with an equal recipe is to be continued."""
        if not self._journal.recipe or not self.partial.exists():
            return False
        if not self._journal.blocks:  # nothing would be lost
            return False
        differences = differing_fields(recipe, self._journal.recipe)
        if differences and not force:
            raise StoreError(
                f"{self.partial} is an unfinished store of another recipe: "
                f"{'; '.join(differences)}. Finish it with its own options, choose another "
                "--out, or start over with --force."
            )
        return not differences

    def _blocks_to_copy(
        self, recipe: Recipe, image_hashes: Sequence[str], statistics: Sequence[str]
    ) -> dict[tuple[int, int], dict[str, int]]:
        """Return the finished blocks of an earlier try whose recipe differs in its images alone.

        That is so when a damaged image was restored or left out. No block is returned unless all of
        them hold the images that belong into their rows now; nor where the stain of an image is
        measured on the patient's other images, too.
        """
        if not self._journal.recipe or not self.partial.exists():
            return {}
        before, now = (
            {key: each[key] for key in each if key not in _OF_IMAGES}
            for each in (self._journal.recipe, recipe)
        )
        same = not differing_fields(recipe, self._journal.recipe)
        if same or differing_fields(now, before) or now.get("stain_normalization") == "patient":
            return {}
        with h5py.File(self.partial, "r") as file:
            if "images/hash" not in file or (STATISTICS in file) != bool(statistics):
                return {}  # of an earlier version
            known = [hash.decode() for hash in file["images/hash"][:]]
        blocks = self._journal.blocks
        kept = all(known[slice(*block)] == list(image_hashes[slice(*block)]) for block in blocks)
        return blocks if kept else {}

    def finished(self, start: int, stop: int) -> bool:
        """Return whether an earlier try has written this block."""
        return (start, stop) in self._journal.blocks

    def write(
        self,
        start: int,
        features: Mapping[str, NDArray[np.float32]],
        crc32: NDArray[np.uint32],
        statistics: NDArray[np.float32] | None = None,
    ) -> None:
        """Write the rows from `start` on of every feature set, and the image files' checksums.

        `features` maps a set's name to (n, V, C, h, w); `crc32` is (n,), `statistics` (n, S).
        Raises StoreError when float16 cannot hold a value.
        """
        stop = start + len(crc32)
        rows: dict[str, NDArray[Any]] = {"images/crc32": crc32}
        # An unfinished store of an earlier version has no place for statistics, and needs none.
        if statistics is not None and STATISTICS in self._maps:
            rows[STATISTICS] = statistics
        for name, maps in features.items():
            rows[f"features/{name}"] = _to_float16(maps, name, start)
            rows[f"pooled/{name}"] = rows[f"features/{name}"].mean((3, 4), dtype=np.float32)
        with writing(self.path):
            for name, values in rows.items():
                _put_rows(self._file, self._maps[name].array, start, values)
            self._file.flush()
            os.fsync(self._file.fileno())  # rows are on disk before the journal lists them
            self._journal.add(
                start, stop, {name: self._checksum(name, start, stop) for name in rows}
            )

    def _checksum(self, name: str, start: int, stop: int) -> int:
        return zlib.crc32(self._maps[name].read(slice(start, stop)).data)

    def finish(self) -> None:
        """Verify every block against the journal, mark the store complete and publish it."""
        self._check_whole()
        self._maps.clear()
        with writing(self.path):
            self._file.close()  # Windows renames no open file
            with h5py.File(self.partial, "r+") as file:
                file.attrs.modify("complete", np.uint8(1))
            flush_file(self.partial)
            self.partial.replace(self.path)
            _fsync_folder(self.path.parent)
            self._journal.close()  # nor removes one
            self.journal_path.unlink()

    def _check_whole(self) -> None:
        expected, n = 0, len(self._maps["images/crc32"].array)
        for (start, stop), checksums in sorted(self._journal.blocks.items()):
            if start != expected:
                break
            expected = stop
            for name, crc32 in checksums.items():
                if self._checksum(name, start, stop) != crc32:
                    self._journal.clear()  # so that the next try starts over
                    raise StoreError(
                        f"{self.partial}: rows {start}:{stop} of /{name} read back differently "
                        "than they were written; check the disk, then run the same line again."
                    )
        if expected != n:
            raise StoreError(f"{self.partial}: rows {expected}:{n} were never written.")


def _copy_rows(source: Path, target: Path, blocks: Collection[tuple[int, int]]) -> None:
    names = _row_names(source) if blocks else []
    with target.open("r+b") as file:
        for name in names:
            rows, copies = map_rows(source, name, "r"), map_rows(target, name, "r+")
            for start, stop in blocks:
                _put_rows(file, copies, start, rows[start:stop])


def _put_rows(file: BinaryIO, mapped: NDArray[Any], start: int, values: NDArray[Any]) -> None:
    """Write rows to their place in a file, at which they are mapped.

    Not through the map: where the disk is full that would kill the process (SIGBUS).
    """
    assert isinstance(mapped, np.memmap)
    file.seek(mapped.offset + start * mapped.strides[0])
    file.write(np.ascontiguousarray(values, mapped.dtype).data)


def clear_leavings(path: Path) -> None:
    """Remove what a process left that was killed just after its store was complete."""
    lock, journal = (path.with_name(path.name + suffix) for suffix in (".lock", ".journal"))
    if lock.exists() or journal.exists():
        with suppress(OSError), lock_file(lock) as alone:
            if alone and not path.with_name(path.name + ".partial").exists():
                journal.unlink(missing_ok=True)


class _Journal:
    """The finished blocks of an unfinished store: a line with its recipe, then a line per block.

    recipe: None before `start`, and when a process was killed while writing the first line.
    blocks: [start, stop) -> checksums of its rows, by dataset.
    """

    def __init__(self, file: TextIO) -> None:
        """Read what an earlier try has left in a file that was opened with mode "a+"."""
        file.seek(0)
        text = file.read()
        entries = [_parse_line(line) for line in text.splitlines()]
        self._file = file
        self.recipe: Recipe | None = entries[0]["recipe"] if entries and entries[0] else None
        self.blocks: dict[tuple[int, int], dict[str, int]] = {
            (entry["start"], entry["stop"]): entry["crc32"]
            for entry in entries[1:]
            if entry  # a torn last line is a block not finished
        }
        if text and not text.endswith("\n"):
            file.write("\n")  # the next entry must not continue a torn line

    def clear(self) -> None:
        self._file.truncate(0)
        self.recipe, self.blocks = None, {}

    def start(self, recipe: Recipe) -> None:
        self._append({"recipe": recipe})
        self.recipe = recipe

    def add(self, start: int, stop: int, checksums: dict[str, int]) -> None:
        self._append({"start": start, "stop": stop, "crc32": checksums})
        self.blocks[start, stop] = checksums

    def close(self) -> None:
        self._file.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json_text(entry) + "\n")  # at the end, in this mode
        self._file.flush()
        os.fsync(self._file.fileno())


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = parse_json(line)
    except ValueError:
        return None
    return entry


def _fsync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_float16(maps: NDArray[np.float32], name: str, start: int) -> NDArray[np.float16]:
    if bad := beyond_float16(maps):
        row, largest = bad
        raise StoreError(
            f"features/{name}, row {start + row}: magnitude (={largest}) must be at "
            f"most {FLOAT16_MAX:.0f} because a store holds float16. Check --weights, and use the "
            "--normalization that they were trained with."
        )
    # In C order, for means to be summed in the order in which `verify` sums them.
    return maps.astype(np.float16, order="C")


def _size(
    cohort: Cohort,
    shape: MapShape,
    feature_sets: Sequence[FeatureSet],
    statistics: Sequence[str],
) -> int:
    """Return about how many bytes a store takes."""
    n = int(cohort.offsets[-1])
    maps, pooled = 2 * math.prod(shape.rows(n)), 4 * n * shape.views * shape.channels
    return len(feature_sets) * (maps + pooled) + n * (_NAMES + 4 * len(statistics)) + _METADATA


def _create(
    path: Path,
    recipe: Recipe,
    cohort: Cohort,
    shape: MapShape,
    feature_sets: Sequence[FeatureSet],
    image_hashes: Sequence[str],
    statistics: Sequence[str],
    origin: Mapping[str, Any] | None,
) -> None:
    n = int(cohort.offsets[-1])
    with h5py.File(path, "w", libver=("v108", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["recipe"] = canonical(recipe)
        file.attrs["recipe_sha256"] = recipe_sha256(recipe)
        if origin:
            file.attrs["origin"] = canonical(origin)
        file.attrs["complete"] = np.uint8(0)
        _write_patients(file.create_group("patients"), cohort)
        images = file.create_group("images")
        _write_strings(images, "name", [path.name for paths in cohort.images for path in paths])
        _allocate(images, "crc32", (n,), np.uint32)
        if image_hashes:
            _write_strings(images, "hash", image_hashes)
        if statistics:
            numbers = _allocate(file, STATISTICS, (n, len(statistics)), np.float32)
            numbers.attrs["names"] = json_text(list(statistics))
        for feature_set in feature_sets:
            _create_feature_set(file, feature_set, shape, n)


def _create_feature_set(file: h5py.File, feature_set: FeatureSet, shape: MapShape, n: int) -> None:
    name, provenance = feature_set.name, feature_set.provenance
    features = _allocate(file.require_group("features"), name, shape.rows(n), np.float16)
    features.attrs["backbone"] = feature_set.backbone
    features.attrs["weights_sha256"] = feature_set.weights_sha256
    features.attrs["split"] = feature_set.split
    texts: dict[str, Sequence[str]] = {}  # datasets: an attribute is limited to 64 kB
    if feature_set.split:
        features.attrs["seed"] = feature_set.seed
        features.attrs["repeat"] = feature_set.repeat
        features.attrs["parents"] = json_text(feature_set.parents)
        texts |= {"training": feature_set.training, "validation": feature_set.validation}
    texts |= {
        "trained_on": provenance.label_ids,
        "provenance": [canonical(provenance.to_json())],
    }
    for group, values in texts.items():
        _write_strings(file.require_group(group), name, values)
    pooled = (n, shape.views, shape.channels)
    _allocate(file.require_group("pooled"), name, pooled, np.float32)


def _write_patients(group: h5py.Group, cohort: Cohort) -> None:
    _write_strings(group, "id", cohort.ids)
    group["label"] = cohort.labels.astype(np.int8)
    group["offsets"] = cohort.offsets.astype(np.int64)
    _write_strings(group, "split", cohort.table["split"])
    covariates = group.create_group("covariates", track_order=True)
    for name in cohort.covariates:
        column = cohort.table[name]
        key = name.replace("/", SLASH)
        if pd.api.types.is_numeric_dtype(column):
            covariates[key] = column.to_numpy(np.float64, na_value=np.nan)
        else:
            _write_strings(covariates, key, column.astype(object).fillna(""))
    group.attrs["submission_ids"] = json_text(cohort.submission_ids)


def _write_strings(group: h5py.Group, name: str, values: Sequence[str] | pd.Series) -> None:
    # Fixed length: the heap of variable-length strings depends on the order of writes.
    encoded = np.array([encode_text(str(value)) for value in values] or [b""], dtype="S")
    dtype = h5py.string_dtype("utf-8", max(encoded.dtype.itemsize, 1))
    group.create_dataset(name, data=encoded[: len(values)].astype(dtype))


def _allocate(
    group: h5py.Group, name: str, shape: tuple[int, ...], dtype: type[np.generic]
) -> h5py.Dataset:
    """Reserve a contiguous dataset on disk without writing its values."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # same recipe, same bytes
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, properties))


def _row_names(path: Path) -> list[str]:
    """Return the datasets that have one row per image and are written in place."""
    with open_hdf5(path) as file:
        names = [f"{group}/{name}" for group in ("features", "pooled") for name in file[group]]
        found = [STATISTICS] if STATISTICS in file else []
    return ["images/crc32", *found, *names]
