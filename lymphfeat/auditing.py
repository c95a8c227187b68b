"""What is in a cohort, what is odd about it, and what would let a model cheat.

Every image is decoded once, whole; two images are the same when their decoded RGB pixels are, in
whatever format they are stored.
"""

import hashlib
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageFile

from lymphfeat.cohort.cell_values import UNKNOWN
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import FORMATS, decode_crop, why_unreadable
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.evaluation.shortcuts import Predictor, find_predictors
from lymphfeat.runtime.files import replace_file
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text, json_value
from lymphfeat.runtime.threads import map_in_order

LABEL_NAMES = {1: "tumoral", 0: "reactive", UNKNOWN: "unknown"}


@dataclass(frozen=True, kw_only=True)
class Group:
    """The patients of one split and label."""

    split: str
    label: int
    patients: int
    images: int
    fewest: int  # images of a patient
    median: float
    most: int


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """The range of one covariate: of a number its quantiles, of a category its counts."""

    name: str
    missing: int
    minimum: float | None = None
    median: float | None = None
    maximum: float | None = None
    counts: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An image that cannot be used as it is."""

    patient: str
    path: str  # below the cohort's folder
    reason: str


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The images that exactly these patients have in common, or that one has more than once."""

    patients: tuple[str, ...]
    labels: tuple[int, ...]
    images: int  # distinct pictures
    example: tuple[str, ...]  # the paths of one of them


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All that `audit` found."""

    root: str
    crop: int
    patients: int
    images: int
    groups: tuple[Group, ...]
    formats: Mapping[str, int]  # "JPEG RGB" -> readable images
    sizes: Mapping[str, int]  # "224x224" -> readable images
    attributes: tuple[Attribute, ...]
    quirks: tuple[str, ...]  # and how each was resolved
    unreadable: tuple[Fault, ...]
    too_small: tuple[Fault, ...]
    repeated: tuple[Copies, ...]  # within a patient
    shared: tuple[Copies, ...]  # across patients: a leak
    predictors: tuple[Predictor, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """One line per finding to fix or to know before training a model."""
        return tuple(_findings(self))

    @property
    def verdict(self) -> str:
        """One line: the number of findings, or that there are none."""
        count = len(self.findings)
        if not count:
            return f"nothing to fix in {self.patients} patients, {self.images} images"
        return f"{count} finding{'s' if count > 1 else ''}, listed above"

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON has it; what is not a finite number becomes None."""
        result: dict[str, object] = json_value(asdict(self))
        return {**result, "findings": list(self.findings), "verdict": self.verdict}

    def save(self, path: Path) -> None:
        """Write `to_dict` as JSON; a file already there is replaced, whole or not at all."""
        text = json_text(self.to_dict(), indent=2) + "\n"
        replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def audit(cohort: Cohort, *, crop: int = 112, progress: Progress = silent) -> Audit:
    """Decode every image of a cohort and report counts, faults, copies and shortcuts (METHOD §6).

    crop: images with a side below it, in pixels, are reported as too small.

    >>> lf.audit(lf.Cohort.load("cohort")).findings
    """
    if crop < 1:
        raise SettingsError(f"crop (={crop}) must be at least 1 pixel.")
    pictures = _inspect_all(cohort, progress)
    readable = [picture for picture in pictures if not picture.fault]
    repeated, shared = _find_copies(cohort, readable)
    return Audit(
        root=str(cohort.root),
        crop=crop,
        patients=len(cohort.ids),
        images=len(pictures),
        groups=_count_groups(cohort),
        formats=_count(picture.kind for picture in readable),
        sizes=_count(f"{picture.width}x{picture.height}" for picture in readable),
        attributes=tuple(_summarise(cohort.table[name]) for name in cohort.covariates),
        quirks=cohort.notes,
        unreadable=tuple(_fault(cohort, p, p.fault) for p in pictures if p.fault),
        too_small=tuple(
            _fault(cohort, p, f"{p.width}x{p.height}") for p in readable if p.side < crop
        ),
        repeated=repeated,
        shared=shared,
        predictors=find_predictors(cohort, _storage(cohort, readable)),
    )


# --- images -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Picture:
    patient: int  # its row in the cohort
    path: Path
    kind: str = ""  # file format and pixel mode
    width: int = 0
    height: int = 0
    pixels: bytes = b""  # hash of size and RGB pixels
    fault: str = ""  # why it cannot be read; empty when it can

    @property
    def side(self) -> int:
        return min(self.width, self.height)


def _inspect_all(cohort: Cohort, progress: Progress) -> list[_Picture]:
    owners = np.repeat(np.arange(len(cohort.ids)), cohort.n_images).tolist()
    paths = [path for paths in cohort.images for path in paths]
    pictures: list[_Picture] = []
    with _strict_decoding():
        for picture in map_in_order(
            lambda owned: _inspect(*owned),
            list(zip(owners, paths, strict=True)),
            threads=os.cpu_count() or 1,
            name="inspect",
        ):
            pictures.append(picture)
            progress(len(pictures), len(paths))
    return pictures


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Refuse truncated images, and keep Pillow's warnings out of the report."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _inspect(patient: int, path: Path) -> _Picture:
    try:
        with Image.open(path, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            kind = f"{image.format} {image.mode}"
            rgb = image.convert("RGB")
        if not kind.endswith(" RGB"):
            decode_crop(path, 1)  # whose rule it is which pixel modes can be used
    except Exception as error:  # decoders of damaged files raise anything: struct.error, zlib.error
        return _Picture(patient=patient, path=path, fault=_reason(path, error))
    if frames > 1:
        kind += f" ({frames} frames, only the first is used)"
    digest = hashlib.blake2b(repr(rgb.size).encode(), digest_size=16)
    digest.update(rgb.tobytes())
    return _Picture(
        patient=patient,
        path=path,
        kind=kind,
        width=rgb.width,
        height=rgb.height,
        pixels=digest.digest(),
    )


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, CohortError):
        return str(error).removeprefix(f"{path}: ")
    return why_unreadable(path, error)


def _fault(cohort: Cohort, picture: _Picture, reason: str) -> Fault:
    path = _below_root(cohort, picture)
    return Fault(patient=cohort.ids[picture.patient], path=path, reason=reason)


def _below_root(cohort: Cohort, picture: _Picture) -> str:
    return picture.path.relative_to(cohort.root).as_posix()


def _storage(cohort: Cohort, pictures: Sequence[_Picture]) -> pd.DataFrame:
    """Return for each patient the commonest format and size of the images."""
    return pd.DataFrame(
        {
            "image format": _commonest(pictures, "kind", len(cohort.ids)),
            "image size": _commonest(pictures, "side", len(cohort.ids)),
        }
    )


def _commonest(pictures: Sequence[_Picture], name: str, patients: int) -> list[object]:
    counts: list[Counter[object]] = [Counter() for _ in range(patients)]
    for picture in pictures:
        counts[picture.patient][getattr(picture, name)] += 1
    return [count.most_common(1)[0][0] if count else None for count in counts]


def _find_copies(
    cohort: Cohort, pictures: Sequence[_Picture]
) -> tuple[tuple[Copies, ...], tuple[Copies, ...]]:
    """Return images repeated within a patient and images shared by patients, one entry a set."""
    alike: dict[bytes, list[_Picture]] = {}
    for picture in pictures:
        alike.setdefault(picture.pixels, []).append(picture)
    within: dict[tuple[int, ...], list[list[_Picture]]] = {}
    across: dict[tuple[int, ...], list[list[_Picture]]] = {}
    for same in alike.values():
        owners = Counter(picture.patient for picture in same)
        if len(owners) > 1:
            across.setdefault(tuple(sorted(owners)), []).append(same)
        for owner, count in owners.items():
            if count > 1:
                within.setdefault((owner,), []).append([p for p in same if p.patient == owner])
    return _copies(cohort, within), _copies(cohort, across)


def _copies(
    cohort: Cohort, sets: Mapping[tuple[int, ...], Sequence[Sequence[_Picture]]]
) -> tuple[Copies, ...]:
    return tuple(
        Copies(
            patients=tuple(cohort.ids[owner] for owner in owners),
            labels=tuple(int(cohort.labels[owner]) for owner in owners),
            images=len(pictures),
            example=tuple(_below_root(cohort, picture) for picture in pictures[0]),
        )
        for owners, pictures in sorted(sets.items())
    )


# --- counts -----------------------------------------------------------------------------------


def _count(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _count_groups(cohort: Cohort) -> tuple[Group, ...]:
    groups: dict[tuple[str, int], list[int]] = {}
    rows = zip(cohort.table["split"], cohort.labels, cohort.n_images, strict=True)
    for split, label, images in rows:
        groups.setdefault((str(split), int(label)), []).append(int(images))
    return tuple(
        Group(
            split=split,
            label=label,
            patients=len(counts),
            images=sum(counts),
            fewest=min(counts),
            median=statistics.median(counts),
            most=max(counts),
        )
        for (split, label), counts in sorted(groups.items())
    )


def _summarise(column: "pd.Series[Any]") -> Attribute:
    name, missing = str(column.name), int(column.isna().sum())
    if isinstance(column.dtype, pd.CategoricalDtype):
        counts = {str(value): int(count) for value, count in column.value_counts().items()}
        return Attribute(name=name, missing=missing, counts=counts)
    if missing == len(column):
        return Attribute(name=name, missing=missing)
    return Attribute(
        name=name,
        missing=missing,
        minimum=float(column.min()),
        median=float(column.median()),
        maximum=float(column.max()),
    )


# --- findings ---------------------------------------------------------------------------------


def _findings(audit: Audit) -> Iterator[str]:
    if audit.unreadable:
        yield f"broken: {len(audit.unreadable)} unreadable image(s); restore or remove them"
    if audit.too_small:
        found = f"{len(audit.too_small)} image(s) smaller than the crop (={audit.crop})"
        yield f"broken: {found}; restore them or choose a smaller crop"
    yield from _leaks(audit.shared)
    if audit.repeated:
        count = sum(copies.images for copies in audit.repeated)
        yield f"repeats: {count} image(s) occur more than once in a patient, and count each time"
    yield from filter(None, (predictor.finding for predictor in audit.predictors))


def _leaks(shared: Sequence[Copies]) -> Iterator[str]:
    if not shared:
        return
    images = sum(copies.images for copies in shared)
    patients = {patient for copies in shared for patient in copies.patients}
    yield f"leak: {images} image(s) shared by different patients ({len(patients)} of them)"
    if mixed := [c for c in shared if UNKNOWN in c.labels and set(c.labels) != {UNKNOWN}]:
        count = sum(copies.images for copies in mixed)
        yield f"leak: {count} of them shared by labelled and unlabelled patients"
    if opposed := [c for c in shared if {0, 1} <= set(c.labels)]:
        count = sum(copies.images for copies in opposed)
        yield f"contradiction: {count} of them shared by reactive and tumoral patients"
