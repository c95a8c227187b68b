"""The feature store: one HDF5 file with a spatial feature map per image (DESIGN §4). No torch.

Readers map the file (`numpy.memmap` at the dataset's offset), so processes share one page cache and
a store larger than memory streams; hence features are contiguous and uncompressed.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance
from lymphfeat.cohort.splits import Split, with_guessed_parents
from lymphfeat.errors import StoreError
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.runtime.versions import refuse_newer

FORMAT = "lymphfeat"
FROZEN = "frozen"  # the features of given weights; those of fine-tuned ones have their split's id
FORMAT_VERSION = 2
STATISTICS = "images/statistics"  # the dataset; stores of earlier versions have none
SLASH = "\u2215"  # replaces the / in a covariate's name (CD4/CD8), which HDF5 takes for a path
Recipe = Mapping[str, Any]


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
    notes: tuple[str, ...] = ()  # how it differs from what `extract` was asked for

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "FeatureStore":
        """Open a complete store; raises StoreError, saying what to do, for anything else.

        >>> lf.FeatureStore.open("cache/features.h5").pooled().shape  # (N, V, C)
        """
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
                statistic_names=_read_statistic_names(file),
                feature_sets=sets,
                shape=MapShape(
                    views=first.shape[1],
                    channels=first.shape[2],
                    height=first.shape[3],
                    width=first.shape[4],
                ),
                submission_ids=tuple(json.loads(file["patients"].attrs["submission_ids"])),
            )

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
        wrong = np.flatnonzero(~np.isfinite(self.pooled(name)).all((1, 2)))
        if len(wrong):
            self.refuse(name, int(wrong[0]), "features must be finite numbers")

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
        raise StoreError(
            f"{path}: is not a readable HDF5 file ({error}); if it should be a store, copy it "
            "again, or make it again with `lymphfeat extract`."
        ) from None
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
        raise StoreError(f"{path}: is an HDF5 file but not a lymphfeat feature store.")
    refuse_newer(path, _version(file), FORMAT_VERSION, StoreError)
    if not file.attrs["complete"]:
        raise StoreError(f"{path}: is not complete; run the same `lymphfeat extract` again.")


def _version(file: h5py.File) -> int:
    return int(file.attrs["format_version"])


def _read_strings(dataset: h5py.Dataset) -> list[str]:
    return [value.decode(errors="surrogateescape") for value in dataset[:]]


def _read_image_hashes(group: h5py.Group) -> tuple[str, ...]:
    return tuple(_read_strings(group["hash"])) if "hash" in group else ()


def _read_statistic_names(file: h5py.File) -> tuple[str, ...]:
    return tuple(json.loads(file[STATISTICS].attrs["names"])) if STATISTICS in file else ()


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
        name = key.replace(SLASH, "/")
        if column.dtype.kind == "f":
            table[name] = column[:]
        else:
            table[name] = pd.Categorical([value or None for value in _read_strings(column)])
    return table
