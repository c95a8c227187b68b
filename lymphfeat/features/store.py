"""The feature store: one HDF5 file with a spatial feature map per image (DESIGN §4). No torch.

Readers map the file (`numpy.memmap` at the dataset's offset), so processes share one page cache and
a store larger than memory streams; hence features are contiguous and uncompressed.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance
from lymphfeat.cohort.splits import Split, with_guessed_parents
from lymphfeat.errors import StoreError
from lymphfeat.features.hdf5 import (
    attribute,
    dataset,
    has,
    member,
    names_in,
    numbers,
    open_hdf5,
)
from lymphfeat.runtime.part_reader import PartReader
from lymphfeat.runtime.strict_json import json_text, parse_json
from lymphfeat.runtime.versions import refuse_newer

FORMAT = "lymphfeat"
FROZEN = "frozen"  # the features of given weights; those of fine-tuned ones have their split's id
FORMAT_VERSION = 2
STATISTICS = "images/statistics"  # the dataset; stores of earlier versions have none
SLASH = "\u2215"  # replaces the / in a covariate's name (CD4/CD8), which HDF5 takes for a path
_BLOCK_BYTES = 16 << 20  # of features read at a time
Recipe = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """What is known about the feature maps under one name of a store."""

    name: str  # FROZEN, or the split's id for weights fine-tuned on that split
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
    return hashlib.sha256(canonical(recipe).encode()).hexdigest()


def canonical(recipe: Recipe) -> str:
    return json_text(recipe, sort_keys=True)


def encode_text(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # file names need not be valid UTF-8


def map_rows(path: Path, name: str, mode: Any) -> np.memmap[Any, Any]:
    """Map a contiguous dataset of the file; `mode` as numpy.memmap's."""
    with open_hdf5(path) as file:
        found = member(file, name)
        offset, shape, dtype = found.id.get_offset(), found.shape, found.dtype
    if offset is None or path.stat().st_size < offset + dtype.itemsize * int(np.prod(shape)):
        if mode == "r":
            raise StoreError(
                f"{path}: /{name} is cut short or not contiguous; extract it again with --force."
            )
        with path.open("r+b") as file:  # early allocation reserves space past the end of the file
            file.truncate(offset + dtype.itemsize * int(np.prod(shape)))
    return np.memmap(path, dtype=dtype, mode=mode, offset=offset, shape=shape)


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
    statistic_names: tuple[str, ...]  # (S,) of the image statistics; empty in old stores
    feature_sets: Mapping[str, FeatureSet]
    shape: MapShape
    submission_ids: tuple[str, ...]
    # how the cohort was read, and where and with what the maps were computed; empty in old stores
    origin: Mapping[str, Any]
    notes: tuple[str, ...] = ()  # how it differs from what `extract` was asked for

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "FeatureStore":
        """Open a complete store; raises StoreError, saying what to do, for anything else.

        >>> lf.FeatureStore.open("cache/features.h5").pooled().shape  # (N, V, C)
        """
        path = Path(path)
        with _opened(path) as file:
            _check_format(file, path)
            sets = {name: _read_feature_set(file, name) for name in names_in(file, "features")}
            if not sets:
                raise ValueError("it has no features")
            store = cls(
                path=path,
                recipe=_checked(parse_json(attribute(file, "recipe")), dict),
                recipe_sha256=str(attribute(file, "recipe_sha256")),
                table=_read_patients(file),
                offsets=numbers(file, "patients/offsets")[:],
                image_names=tuple(_read_strings(file, "images/name")),
                crc32=numbers(file, "images/crc32")[:],
                image_hashes=_read_image_hashes(file),
                statistic_names=_read_statistic_names(file),
                feature_sets=sets,
                shape=_read_shape(file, next(iter(sets))),
                submission_ids=_texts(attribute(member(file, "patients"), "submission_ids")),
                origin=_read_origin(file),
            )
            _check_parts(store)
            return store

    def check(self) -> None:
        """Check recipe, sizes and the first and last map; raises StoreError for a damaged file.

        It reads next to nothing, so a map that is damaged in between is not found: see `verify`.
        """
        if recipe_sha256(self.recipe) != self.recipe_sha256:
            raise StoreError(
                f"{self.path}: recipe and recipe_sha256 must agree; the file is damaged, "
                "extract it again with --force."
            )
        for name in self.feature_sets:
            self._check_sizes(name)
            for start, stop in ((0, 1), (len(self.image_names) - 1, len(self.image_names))):
                self._check_maps(name, start, stop)
        if self.statistic_names:
            map_rows(self.path, STATISTICS, "r")  # is there to its end

    def verify(self) -> None:
        """Read every feature map; raises StoreError, naming image and patient, for a damaged one.

        An undamaged map averages to its pooled feature.
        """
        self.check()
        for name in self.feature_sets:
            for start, stop in pairwise(self.offsets):
                self._check_maps(name, int(start), int(stop))

    def check_finite(self, name: str) -> None:
        """Raise StoreError, naming image and patient, for a pooled feature that is no number."""
        for start, pooled in self.pooled_blocks(name):
            wrong = np.flatnonzero(~np.isfinite(pooled).all((1, 2)))
            if len(wrong):
                self.refuse(name, start + int(wrong[0]), "features must be finite numbers")

    def refuse(self, name: str, image: int, rule: str) -> NoReturn:
        """Raise StoreError for the features of an image, by its row, that break a rule."""
        patient = self.ids[int(np.searchsorted(self.offsets, image, side="right")) - 1]
        raise StoreError(
            f"{self.path}: /features/{name}, image {self.image_names[image]} of {patient}: {rule}; "
            "the file is damaged, extract it again with --force."
        )

    def _check_sizes(self, name: str) -> None:
        wanted = self.shape.rows(len(self.image_names))
        for group, found, expected in (
            ("features", self.features(name).shape, wanted),
            ("pooled", self.pooled(name).shape, wanted[:3]),
        ):
            if found != expected:
                raise StoreError(
                    f"{self.path}: /{group}/{name} must be of shape {expected}; got {found}; "
                    "the file is damaged, extract it again with --force."
                )

    def _check_maps(self, name: str, start: int, stop: int) -> None:
        """Check the maps of the images from `start` to `stop` against their pooled features."""
        maps, pooled = self.features(name)[start:stop], self.pooled(name)[start:stop]
        with np.errstate(invalid="ignore"):  # a damaged map may hold inf and -inf
            averages = maps.mean((3, 4), dtype=np.float32)
        damaged = np.flatnonzero(((averages != pooled) | ~np.isfinite(averages)).any((1, 2)))
        if len(damaged):
            self.refuse(name, start + int(damaged[0]), "map and pooled feature must agree")

    def check_same_images(self, other: "FeatureStore") -> None:
        """Raise StoreError unless another store has the same patients and images, in one order."""
        hint = "Extract both from the same cohort."
        for mine, theirs in zip_longest(self.ids, other.ids):
            if mine != theirs:
                raise StoreError(
                    f"{other.path}: must have the patients of {self.path} in the same order; got "
                    f"{theirs or 'none'} instead of {mine or 'none'}. {hint}"
                )
        for pair in zip_longest(self._image_facts(), other._image_facts()):
            if pair[0] != pair[1]:
                patient, image, _ = min(facts for facts in pair if facts)
                raise StoreError(
                    f"{other.path}: must have the images of {self.path} in the same order; image "
                    f"{image} of {patient} is not in both, or differs. {hint}"
                )
        if not np.array_equal(self.labels, other.labels):
            row = int(np.flatnonzero(self.labels != other.labels)[0])
            raise StoreError(
                f"{other.path}: must have the labels of {self.path}; patient {self.ids[row]} has "
                f"{other.labels[row]} instead of {self.labels[row]}. {hint}"
            )

    def _image_facts(self) -> Iterator[tuple[str, str, int]]:
        """Yield the patient, name and checksum of every image."""
        patients = np.repeat(self.ids, self.n_images)
        return zip(patients.tolist(), self.image_names, self.crc32.tolist(), strict=True)

    def describe(self) -> dict[str, Any]:
        """Summarise the store, for people and machines."""
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

    def label_seen(self, name: str = FROZEN) -> tuple[str, ...]:
        """Return the patients in this store whose labels the weights have seen, under any id."""
        return self.feature_sets[self._known(name)].provenance.labelled(self.keys)

    def images_seen(self, name: str = FROZEN) -> tuple[str, ...]:
        """Return the patients in this store whose images the weights have seen without labels."""
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
    def is_imported(self) -> bool:
        """Whether the features were made by another tool: there is no backbone to run."""
        return "imported" in self.recipe

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
        """Return the splits for which the store has features of a fine-tuned backbone."""
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

    def features(self, name: str = FROZEN) -> NDArray[np.float16]:
        """Map the feature maps called `name`, (N, V, C, h, w), read-only."""
        return map_rows(self.path, f"features/{self._known(name)}", "r")

    def pooled(self, name: str = FROZEN) -> NDArray[np.float32]:
        """Map the average-pooled features called `name`, (N, V, C), read-only."""
        return map_rows(self.path, f"pooled/{self._known(name)}", "r")

    def pooled_blocks(self, name: str = FROZEN) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the average-pooled features some images at a time: (first row, (n, V, C))."""
        reader = PartReader(self.pooled(name))
        step = max(1, _BLOCK_BYTES // reader.array[0].nbytes)
        for start in range(0, len(reader.array), step):
            yield start, reader.read(slice(start, start + step))

    @cached_property
    def image_statistics(self) -> pd.DataFrame | None:
        """Return what was measured of each image (N, S), by name; None in old stores.

        They are those of the crop that the backbone saw: stain, brightness, focus and scale.
        """
        if not self.statistic_names:
            return None
        numbers = np.array(map_rows(self.path, STATISTICS, "r"))
        return pd.DataFrame(numbers, columns=list(self.statistic_names))

    def _known(self, name: str) -> str:
        if name not in self.feature_sets:
            raise StoreError(
                f"{self.path}: features (={name}) must be one of {', '.join(self.feature_sets)}."
            )
        return name


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        unfinished = path.with_name(path.name + ".partial").exists()
        hint = (
            "an unfinished one is beside it: run the same `lymphfeat extract` again"
            if unfinished
            else "make it with `lymphfeat extract`"
        )
        raise StoreError(f"store (={path}) must be an existing file; {hint}.")
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open_hdf5(path))
        except Exception as error:
            raise StoreError(
                f"{path}: is not a readable HDF5 file ({error}); if it should be a store, copy it "
                "again, or make it again with `lymphfeat extract`."
            ) from None
        try:
            yield file
        except StoreError:
            raise
        except Exception as error:  # damaged metadata fails in as many ways as h5py has
            raise StoreError(
                f"{path}: is damaged ({error}); extract it again with --force."
            ) from error


def _check_format(file: h5py.File, path: Path) -> None:
    if "format" not in file.attrs or attribute(file, "format") != FORMAT:
        raise StoreError(f"{path}: is an HDF5 file but not a lymphfeat feature store.")
    refuse_newer(path, _version(file), FORMAT_VERSION, StoreError)
    if not attribute(file, "complete"):
        raise StoreError(
            f"{path}: is not complete; run the same `lymphfeat extract` or `lymphfeat import` "
            "again."
        )


def _read_origin(file: h5py.File) -> dict[str, Any]:
    if "origin" not in file.attrs:
        return {}
    return _checked(parse_json(attribute(file, "origin")), dict)


def _version(file: h5py.File) -> int:
    return int(attribute(file, "format_version"))


def _checked(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.40} must be a {kind.__name__}")
    return value


def _texts(text: str) -> tuple[str, ...]:
    """Read a JSON list of texts."""
    return tuple(_checked(value, str) for value in _checked(parse_json(text), list))


def _read_strings(file: h5py.File, name: str) -> list[str]:
    found = dataset(file, name)
    if found.dtype.kind != "S" or found.ndim != 1:
        raise ValueError(f"{name} must be a row of texts")
    return [value.decode(errors="surrogateescape") for value in found[:]]


def _read_image_hashes(file: h5py.File) -> tuple[str, ...]:
    return tuple(_read_strings(file, "images/hash")) if has(file, "images/hash") else ()


def _read_statistic_names(file: h5py.File) -> tuple[str, ...]:
    if not has(file, STATISTICS):
        return ()
    return _texts(attribute(numbers(file, STATISTICS), "names"))


def _read_shape(file: h5py.File, name: str) -> MapShape:
    shape = numbers(file, f"features/{name}").shape
    if len(shape) != 5 or 0 in shape:
        raise ValueError(f"features/{name} must be maps (N, V, C, h, w); got {shape}")
    return MapShape(views=shape[1], channels=shape[2], height=shape[3], width=shape[4])


def _check_parts(store: FeatureStore) -> None:
    """Raise ValueError unless the parts agree on how many patients and images there are."""
    n, patients = len(store.image_names), len(store.table)
    offsets = store.offsets
    if offsets.shape != (patients + 1,) or offsets[0] or offsets[-1] != n:
        raise ValueError("patients/offsets must divide the images among the patients")
    if offsets.dtype.kind not in "iu" or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError("patients/offsets must rise: every patient has images")
    if store.crc32.shape != (n,) or len(store.image_hashes) not in (0, n):
        raise ValueError(f"images/crc32 and images/hash must have a row for each of {n} images")
    if not store.table.index.is_unique or not store.table["label"].isin((-1, 0, 1)).all():
        raise ValueError("patients must have ids of their own, and labels -1, 0 or 1")


def _read_feature_set(file: h5py.File, name: str) -> FeatureSet:
    maps = numbers(file, f"features/{name}")
    if maps.dtype != np.float16 or numbers(file, f"pooled/{name}").dtype != np.float32:
        raise ValueError(f"features/{name} must be float16, and pooled/{name} float32")
    split = str(attribute(maps, "split"))
    # In version 1 the training patients of a split were those of "trained_on".
    sides = ("trained_on" if _version(file) == 1 else "training", "validation")
    training, validation = (_read_ids(file, side, name) if split else () for side in sides)
    return FeatureSet(
        name=name,
        backbone=str(attribute(maps, "backbone")),
        weights_sha256=str(attribute(maps, "weights_sha256")),
        provenance=_read_provenance(file, name),
        split=split,
        training=training,
        validation=validation,
        seed=int(attribute(maps, "seed")) if "seed" in maps.attrs else 0,
        repeat=int(attribute(maps, "repeat")) if "repeat" in maps.attrs else 0,
        parents=_read_parents(maps, split),
    )


def _read_provenance(file: h5py.File, name: str) -> Provenance:
    if _version(file) == 1:
        return Provenance.of_ids(
            labels=_read_ids(file, "trained_on", name),
            images=_read_ids(file, "pretrained_on", name),
        )
    (text,) = _read_strings(file, f"provenance/{name}")
    return Provenance.from_json(parse_json(text))


def _read_ids(file: h5py.File, group: str, name: str) -> tuple[str, ...]:
    place = f"{group}/{name}"
    return tuple(_read_strings(file, place)) if has(file, place) else ()


def _read_parents(maps: h5py.Dataset, split: str) -> tuple[str, ...] | None:
    if "parents" in maps.attrs:
        return _texts(attribute(maps, "parents"))
    return None if split else ()


def _read_patients(file: h5py.File) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "label": numbers(file, "patients/label")[:].astype(np.int64),
            "split": _read_strings(file, "patients/split"),
        },
        index=pd.Index(_read_strings(file, "patients/id"), name="id"),
    )
    for key in names_in(file, "patients/covariates"):
        name, place = key.replace(SLASH, "/"), f"patients/covariates/{key}"
        if dataset(file, place).dtype.kind == "f":
            table[name] = numbers(file, place)[:]
        else:
            table[name] = pd.Categorical([value or None for value in _read_strings(file, place)])
    return table
