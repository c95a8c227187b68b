"""The feature store: one HDF5 file with a spatial feature map per image (DESIGN §4). No torch.

- Readers map the file (`numpy.memmap` at the dataset's offset), so processes share one page cache
  and a store larger than memory streams; hence features are contiguous and uncompressed.
- Writing survives kill -9. All HDF5 metadata is written first, into a temporary sibling, which is
  closed; rows then go in place through memmaps, so no HDF5 structure is ever half written. A
  journal beside it names the finished blocks of rows with their checksums. At the end every block
  is read back and compared, the store is marked complete and renamed.
- A lock file beside it is held while a process writes. The system drops the lock when the process
  ends, however it ends.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lymphfeat.cohort import Cohort
from lymphfeat.errors import StoreError
from lymphfeat.identity import differing_fields
from lymphfeat.provenance import NOBODY, PatientKey, Provenance
from lymphfeat.splits import Split, with_guessed_parents
from lymphfeat.strict_json import json_text

FORMAT = "lymphfeat"
FORMAT_VERSION = 2
FLOAT16_MAX = float(np.finfo(np.float16).max)
_SLASH = "\u2215"  # stands for the / of a covariate's name (CD4/CD8), which HDF5 takes for a path

Recipe = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """What is known of the feature maps under one name of a store."""

    name: str  # "frozen", or the split's id for weights fine-tuned on that split
    backbone: str
    weights_sha256: str
    provenance: Provenance = NOBODY  # whose labels and images the weights have seen
    split: str = ""  # id of the split that the weights were fine-tuned on
    training: tuple[str, ...] = ()  # the split's training patients
    validation: tuple[str, ...] = ()  # the split's other patients
    seed: int = 0  # the split's
    repeat: int = 0  # the split's
    parents: tuple[str, ...] | None = ()  # the split's; None in stores that do not record them

    @classmethod
    def of_split(
        cls,
        split: Split,
        *,
        backbone: str,
        weights_sha256: str,
        provenance: Provenance,
    ) -> "FeatureSet":
        """Describe the maps of a backbone fine-tuned on a split's training patients."""
        return cls(
            name=split.id,
            backbone=backbone,
            weights_sha256=weights_sha256,
            provenance=provenance,
            split=split.id,
            training=split.train,
            validation=split.validation,
            seed=split.seed,
            repeat=split.repeat,
            parents=split.parents,
        )


@dataclass(frozen=True, kw_only=True)
class MapShape:
    """Size of one image's entry: views, channels, height, width."""

    views: int
    channels: int
    height: int
    width: int

    def rows(self, n: int) -> tuple[int, int, int, int, int]:
        return n, self.views, self.channels, self.height, self.width


def recipe_sha256(recipe: Recipe) -> str:
    """Hash a recipe; equal recipes give equal hashes whatever their key order."""
    return hashlib.sha256(_canonical(recipe).encode()).hexdigest()


def _canonical(recipe: Recipe) -> str:
    return json_text(recipe, sort_keys=True)


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # file names need not be valid UTF-8


# --- writing -------------------------------------------------------------------------------------


class StoreWriter:
    """Writes a store block by block; opened anew with an equal recipe, it goes on where it was.

    A block is a range of rows [start, stop); blocks may be written in any order, each once.
    `force` drops an unfinished store of another recipe, which is an error otherwise. A store that
    is at `path` already stays as it is until this one is finished.
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
        force: bool = False,
    ) -> None:
        """Take the (N,) content hashes of the cohort's image files; none where they are unknown."""
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal_path = path.with_name(path.name + ".journal")
        self._recipe = recipe
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.callback(_unlock, _lock(path))
            self._journal = opened.enter_context(self.journal_path.open("a+", encoding="utf-8"))
            self._blocks = self._resume(force)
            if self._blocks is None:
                self._blocks = {}
                self._start(cohort, shape, feature_sets, image_hashes)
            self._maps: dict[str, np.memmap[Any, Any]] = {
                name: _map(self.partial, name, "r+") for name in _row_names(self.partial)
            }
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._opened.close()

    def _resume(self, force: bool) -> dict[tuple[int, int], dict[str, int]] | None:
        """Return the finished blocks of an earlier try with an equal recipe; None to start anew."""
        self._journal.seek(0)
        text = self._journal.read()
        lines = text.splitlines()
        if not lines or not self.partial.exists():
            return None
        header = _parse_line(lines[0])
        if header is None:  # killed while writing the very first line
            return None
        differences = differing_fields(self._recipe, header["recipe"])
        if differences and force:
            return None
        if differences:
            raise StoreError(
                f"{self.partial}: an unfinished store of another recipe is there: "
                f"{'; '.join(differences)}. Finish it with its own options, choose another "
                "--out, or start over with --force."
            )
        blocks = {}
        for line in lines[1:]:
            entry = _parse_line(line)
            if entry is not None:  # a torn last line is a block not finished
                blocks[(entry["start"], entry["stop"])] = entry["crc32"]
        if not text.endswith("\n"):
            self._journal.write("\n")  # the next entry must not continue a torn line
        return blocks

    def _start(
        self,
        cohort: Cohort,
        shape: MapShape,
        feature_sets: Sequence[FeatureSet],
        image_hashes: Sequence[str],
    ) -> None:
        self._journal.seek(0)
        self._journal.truncate()
        self.partial.unlink(missing_ok=True)
        _create(self.partial, self._recipe, cohort, shape, feature_sets, image_hashes)
        _fsync(self.partial)
        self._append({"recipe": self._recipe})

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        self._journal.write(json_text(entry) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def finished(self, start: int, stop: int) -> bool:
        """Say whether an earlier try has written this block."""
        assert self._blocks is not None
        return (start, stop) in self._blocks

    def write(
        self,
        start: int,
        features: Mapping[str, NDArray[np.float32]],
        crc32: NDArray[np.uint32],
    ) -> None:
        """Write the rows from `start` on of every feature set, and the image files' checksums.

        `features` maps a set's name to (n, V, C, h, w); `crc32` is (n,). Raises StoreError when
        float16 cannot hold a value.
        """
        stop = start + len(crc32)
        rows: dict[str, NDArray[Any]] = {"images/crc32": crc32}
        for name, maps in features.items():
            rows[f"features/{name}"] = _to_float16(maps, name, start)
            rows[f"pooled/{name}"] = rows[f"features/{name}"].mean((3, 4), dtype=np.float32)
        checksums = {}
        for name, values in rows.items():
            self._maps[name][start:stop] = values
            checksums[name] = zlib.crc32(self._maps[name][start:stop].tobytes())
            self._maps[name].flush()
        _fsync(self.partial)  # rows are on the disk before the journal says so
        self._append({"start": start, "stop": stop, "crc32": checksums})
        assert self._blocks is not None
        self._blocks[(start, stop)] = checksums

    def finish(self) -> None:
        """Verify every block against the journal, mark the store complete and publish it."""
        self._check_whole()
        self._maps.clear()
        with h5py.File(self.partial, "r+") as file:
            file.attrs.modify("complete", np.uint8(1))
        _fsync(self.partial)
        self.partial.replace(self.path)
        _fsync_folder(self.path.parent)
        self._journal.close()  # Windows removes no open file
        self.journal_path.unlink()

    def _check_whole(self) -> None:
        assert self._blocks is not None
        expected, n = 0, len(self._maps["images/crc32"])
        for (start, stop), checksums in sorted(self._blocks.items()):
            if start != expected:
                break
            expected = stop
            for name, crc32 in checksums.items():
                if zlib.crc32(self._maps[name][start:stop].tobytes()) != crc32:
                    self._journal.truncate(0)  # so that the next try starts over
                    raise StoreError(
                        f"{self.partial}: rows {start}:{stop} of /{name} read back differently "
                        "than they were written; check the disk, then run the same line again."
                    )
        if expected != n:
            raise StoreError(f"{self.partial}: rows {expected}:{n} were never written.")


def _lock(path: Path) -> FileLock:
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(
            f"{path}: another process is writing this store; wait for it or choose another --out."
        ) from None
    return lock


def _unlock(lock: FileLock) -> None:
    # Removed while it is held. Who has opened the file and then gets the lock of what is no longer
    # there tries again, in FileLock. On Windows release() removes it.
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry


def _fsync(path: Path) -> None:
    with path.open("r+b") as file:  # Windows syncs no file opened for reading
        os.fsync(file.fileno())


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
    largest = np.abs(maps).max(axis=tuple(range(1, maps.ndim)))  # (n,)
    bad = np.flatnonzero(~(largest <= FLOAT16_MAX))  # catches NaN too
    if len(bad):
        raise StoreError(
            f"features/{name}, row {start + bad[0]}: magnitude (={largest[bad[0]]}) must be at "
            f"most {FLOAT16_MAX:.0f}, for a store holds float16. Check --weights, and use the "
            "--normalization that they were trained with."
        )
    # In C order, for means to be summed in the order in which `verify` sums them.
    return maps.astype(np.float16, order="C")


def _create(
    path: Path,
    recipe: Recipe,
    cohort: Cohort,
    shape: MapShape,
    feature_sets: Sequence[FeatureSet],
    image_hashes: Sequence[str],
) -> None:
    n = int(cohort.offsets[-1])
    with h5py.File(path, "w", libver=("v108", "v110")) as file:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["recipe"] = _canonical(recipe)
        file.attrs["recipe_sha256"] = recipe_sha256(recipe)
        file.attrs["complete"] = np.uint8(0)
        _write_patients(file.create_group("patients"), cohort)
        images = file.create_group("images")
        _write_strings(images, "name", [path.name for paths in cohort.images for path in paths])
        _allocate(images, "crc32", (n,), np.uint32)
        if image_hashes:
            _write_strings(images, "hash", image_hashes)
        for feature_set in feature_sets:
            features = _allocate(
                file.require_group("features"), feature_set.name, shape.rows(n), np.float16
            )
            features.attrs["backbone"] = feature_set.backbone
            features.attrs["weights_sha256"] = feature_set.weights_sha256
            features.attrs["split"] = feature_set.split
            if feature_set.split:
                features.attrs["seed"], features.attrs["repeat"] = (
                    feature_set.seed,
                    feature_set.repeat,
                )
                features.attrs["parents"] = json_text(feature_set.parents)
                _write_strings(
                    file.require_group("training"), feature_set.name, feature_set.training
                )
                _write_strings(
                    file.require_group("validation"), feature_set.name, feature_set.validation
                )
            # Datasets of their own: an attribute is limited to 64 kB.
            provenance = feature_set.provenance
            _write_strings(file.require_group("trained_on"), feature_set.name, provenance.label_ids)
            _write_strings(
                file.require_group("provenance"),
                feature_set.name,
                [_canonical(provenance.to_json())],
            )
            pooled = (n, shape.views, shape.channels)
            _allocate(file.require_group("pooled"), feature_set.name, pooled, np.float32)


def _write_patients(group: h5py.Group, cohort: Cohort) -> None:
    _write_strings(group, "id", cohort.ids)
    group["label"] = cohort.labels.astype(np.int8)
    group["offsets"] = cohort.offsets.astype(np.int64)
    _write_strings(group, "split", cohort.table["split"])
    covariates = group.create_group("covariates", track_order=True)
    for name in cohort.covariates:
        column = cohort.table[name]
        key = name.replace("/", _SLASH)
        if pd.api.types.is_numeric_dtype(column):
            covariates[key] = column.to_numpy(np.float64, na_value=np.nan)
        else:
            _write_strings(covariates, key, column.astype(object).fillna(""))
    group.attrs["submission_ids"] = json_text(cohort.submission_ids)


def _write_strings(group: h5py.Group, name: str, values: Sequence[str] | pd.Series) -> None:
    # Fixed length: the heap of variable-length strings depends on the order of writes.
    encoded = np.array([_encode(str(value)) for value in values] or [b""], dtype="S")
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
    """Name the datasets that have one row an image and are written in place."""
    with h5py.File(path, "r") as file:
        names = [f"{group}/{name}" for group in ("features", "pooled") for name in file[group]]
    return ["images/crc32", *names]


def _map(path: Path, name: str, mode: Any) -> np.memmap[Any, Any]:
    """Map a contiguous dataset of the file; `mode` as numpy.memmap's."""
    with h5py.File(path, "r") as file:
        dataset = file[name]
        offset, shape, dtype = dataset.id.get_offset(), dataset.shape, dataset.dtype
    if offset is None or path.stat().st_size < offset + dtype.itemsize * int(np.prod(shape)):
        if mode == "r":
            raise StoreError(
                f"{path}: /{name} is cut short or not contiguous; extract it again with --force."
            )
        with path.open("r+b") as file:  # early allocation reserves space past the end of the file
            file.truncate(offset + dtype.itemsize * int(np.prod(shape)))
    return np.memmap(path, dtype=dtype, mode=mode, offset=offset, shape=shape)


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """A complete store, opened for reading. Maps are memory-mapped: nothing is read until used."""

    path: Path
    recipe: Recipe
    recipe_sha256: str
    table: pd.DataFrame  # index "id"; "label", "split", then covariates, as in Cohort
    offsets: NDArray[np.int64]  # (P + 1,) patient p's images are rows offsets[p]:offsets[p+1]
    image_names: tuple[str, ...]  # (N,)
    crc32: NDArray[np.uint32]  # (N,)
    image_hashes: tuple[str, ...]  # (N,) of the image files' contents; empty in old stores
    feature_sets: Mapping[str, FeatureSet]
    shape: MapShape
    submission_ids: tuple[str, ...]
    notes: tuple[str, ...] = ()  # how it differs from what `extract` was asked for

    @classmethod
    def open(cls, path: Path | str) -> "FeatureStore":
        """Open a complete store; raises StoreError, saying what to do, for anything else."""
        path = Path(path)
        with _open_hdf5(path) as file:
            _check_format(file, path)
            sets = {name: _read_feature_set(file, name) for name in file["features"]}
            first = file["features"][next(iter(sets))]
            return cls(
                path=path,
                recipe=json.loads(file.attrs["recipe"]),
                recipe_sha256=str(file.attrs["recipe_sha256"]),
                table=_read_patients(file["patients"]),
                offsets=file["patients/offsets"][:],
                image_names=tuple(_read_strings(file["images/name"])),
                crc32=file["images/crc32"][:],
                image_hashes=_read_image_hashes(file["images"]),
                feature_sets=sets,
                shape=MapShape(
                    views=first.shape[1],
                    channels=first.shape[2],
                    height=first.shape[3],
                    width=first.shape[4],
                ),
                submission_ids=tuple(json.loads(file["patients"].attrs["submission_ids"])),
            )

    def verify(self) -> None:
        """Read every feature map; raises StoreError, naming image and patient, for a damaged one.

        A map that is whole averages to its pooled feature.
        """
        if recipe_sha256(self.recipe) != self.recipe_sha256:
            raise StoreError(
                f"{self.path}: recipe and recipe_sha256 must agree; the file is damaged, "
                "extract it again with --force."
            )
        for name in self.feature_sets:
            maps, pooled = self.features(name), self.pooled(name)
            for patient, start, stop in zip(
                self.ids, self.offsets[:-1], self.offsets[1:], strict=True
            ):
                with np.errstate(invalid="ignore"):  # a damaged map may hold inf and -inf
                    averages = maps[start:stop].mean((3, 4), dtype=np.float32)
                damaged = np.flatnonzero((averages != pooled[start:stop]).any((1, 2)))
                if len(damaged):
                    raise StoreError(
                        f"{self.path}: /features/{name}, image "
                        f"{self.image_names[start + damaged[0]]} of {patient}: map and pooled "
                        "feature must agree; the file is damaged, extract it again with --force."
                    )

    def describe(self) -> dict[str, Any]:
        """Say what the store is, for people and machines."""
        return {
            "path": str(self.path),
            "patients": len(self.table),
            "labelled": int((self.labels >= 0).sum()),
            "images": len(self.image_names),
            "features": list(self.feature_sets),
            "shape": asdict(self.shape),
            "bytes": self.path.stat().st_size,
            "recipe_sha256": self.recipe_sha256,
            "recipe": dict(self.recipe),
            "trained_on": {name: len(self.label_seen(name)) for name in self.feature_sets},
            "pretrained_on": {name: len(self.images_seen(name)) for name in self.feature_sets},
        }

    def label_seen(self, name: str = "frozen") -> tuple[str, ...]:
        """Name the patients here whose labels the weights have seen, by whatever id."""
        return self.feature_sets[self._known(name)].provenance.labelled(self.keys)

    def images_seen(self, name: str = "frozen") -> tuple[str, ...]:
        """Name the patients here whose images the weights have seen without labels."""
        return self.feature_sets[self._known(name)].provenance.pictured(self.keys)

    @cached_property
    def keys(self) -> tuple[PatientKey, ...]:
        """Return what each patient is recognised by: (P,)."""
        if not self.image_hashes:
            return tuple(PatientKey(id=id) for id in self.ids)
        return tuple(
            PatientKey.of(id, self.image_hashes[start:stop])
            for id, start, stop in zip(self.ids, self.offsets[:-1], self.offsets[1:], strict=True)
        )

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.table.index)

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.table["label"].to_numpy(np.int64)

    @property
    def n_images(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def covariates(self) -> tuple[str, ...]:
        return tuple(self.table.columns[2:])

    @property
    def splits(self) -> tuple[Split, ...]:
        """Return the splits for which the store has features of their own, fine-tuned backbone."""
        tuned = [found for found in self.feature_sets.values() if found.split]
        splits = [
            Split(
                id=found.split,
                seed=found.seed,
                repeat=found.repeat,
                train=found.training,
                validation=found.validation,
                parents=found.parents or (),
            )
            for found in tuned
        ]
        recorded = all(found.parents is not None for found in tuned)
        return tuple(splits if recorded else with_guessed_parents(splits))

    def features(self, name: str = "frozen") -> NDArray[np.float16]:
        """Map the feature maps called `name`, (N, V, C, h, w), read-only."""
        return _map(self.path, f"features/{self._known(name)}", "r")

    def pooled(self, name: str = "frozen") -> NDArray[np.float32]:
        """Map the average-pooled features called `name`, (N, V, C), read-only."""
        return _map(self.path, f"pooled/{self._known(name)}", "r")

    def _known(self, name: str) -> str:
        if name not in self.feature_sets:
            raise StoreError(
                f"{self.path}: features (={name}) must be one of {', '.join(self.feature_sets)}."
            )
        return name


@contextmanager
def _open_hdf5(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        unfinished = path.with_name(path.name + ".partial").exists()
        hint = (
            "an unfinished one is beside it: run the same `lymphfeat extract` again"
            if unfinished
            else "make it with `lymphfeat extract`"
        )
        raise StoreError(f"store (={path}) must be an existing file; {hint}.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise StoreError(f"{path}: is not a readable HDF5 file ({error}).") from None
    with file:
        try:
            yield file
        except StoreError:
            raise
        except Exception as error:  # damaged metadata fails in as many ways as h5py has
            raise StoreError(
                f"{path}: is damaged ({error}); extract it again with --force."
            ) from error


def _check_format(file: h5py.File, path: Path) -> None:
    if file.attrs.get("format") != FORMAT:
        raise StoreError(f"{path}: is an HDF5 file but no lymphfeat feature store.")
    version = _version(file)
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path}: format_version (={version}) must be at most {FORMAT_VERSION}; "
            "update lymphfeat to read it."
        )
    if not file.attrs["complete"]:
        raise StoreError(f"{path}: is not complete; run the same `lymphfeat extract` again.")


def _version(file: h5py.File) -> int:
    return int(file.attrs["format_version"])


def _read_strings(dataset: h5py.Dataset) -> list[str]:
    return [value.decode(errors="surrogateescape") for value in dataset[:]]


def _read_image_hashes(group: h5py.Group) -> tuple[str, ...]:
    return tuple(_read_strings(group["hash"])) if "hash" in group else ()


def _read_feature_set(file: h5py.File, name: str) -> FeatureSet:
    attributes = file["features"][name].attrs
    split = str(attributes["split"])
    # In version 1 the training patients of a split were those of "trained_on".
    sides = ("trained_on" if _version(file) == 1 else "training", "validation")
    training, validation = (_read_ids(file, side, name) if split else () for side in sides)
    return FeatureSet(
        name=name,
        backbone=str(attributes["backbone"]),
        weights_sha256=str(attributes["weights_sha256"]),
        provenance=_read_provenance(file, name),
        split=split,
        training=training,
        validation=validation,
        seed=int(attributes.get("seed", 0)),
        repeat=int(attributes.get("repeat", 0)),
        parents=_read_parents(attributes),
    )


def _read_provenance(file: h5py.File, name: str) -> Provenance:
    if _version(file) == 1:
        return Provenance.of_ids(
            labels=_read_ids(file, "trained_on", name),
            images=_read_ids(file, "pretrained_on", name),
        )
    (text,) = _read_strings(file["provenance"][name])
    return Provenance.from_json(json.loads(text))


def _read_ids(file: h5py.File, group: str, name: str) -> tuple[str, ...]:
    return tuple(_read_strings(file[group][name])) if name in file.get(group, {}) else ()


def _read_parents(attributes: h5py.AttributeManager) -> tuple[str, ...] | None:
    if "parents" in attributes:
        return tuple(json.loads(attributes["parents"]))
    return None if attributes["split"] else ()


def _read_patients(group: h5py.Group) -> pd.DataFrame:
    table = pd.DataFrame(
        {"label": group["label"][:].astype(np.int64), "split": _read_strings(group["split"])},
        index=pd.Index(_read_strings(group["id"]), name="id"),
    )
    for key, column in group["covariates"].items():
        name = key.replace(_SLASH, "/")
        if column.dtype.kind == "f":
            table[name] = column[:]
        else:
            table[name] = pd.Categorical([value or None for value in _read_strings(column)])
    return table
