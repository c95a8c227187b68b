"""Importing: bags of features that another tool has made become a store, without images."""

import hashlib
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import REFERENCE_DATE, Cohort
from lymphfeat.cohort.csv_rows import peek_columns
from lymphfeat.cohort.fingerprints import cohort_fingerprint
from lymphfeat.cohort.images import VIEWS
from lymphfeat.cohort.tables import ClinicalTable, choose_tables, read_labels, read_tables
from lymphfeat.errors import SettingsError, StoreError
from lymphfeat.features.exchange.arrays import read_maps
from lymphfeat.features.exchange.layouts import SCEMILA, BagFiles, FoundBags, find_bags
from lymphfeat.features.exchange.origin import Origin, read_origin
from lymphfeat.features.store import (
    FORMAT_VERSION,
    FROZEN,
    FeatureSet,
    FeatureStore,
    MapShape,
    Recipe,
)
from lymphfeat.features.store_writer import StoreWriter, clear_leavings
from lymphfeat.runtime.identity import differing_fields, file_hashes
from lymphfeat.runtime.progress import Progress, RateMeter, silent

IMPORTED = "imported"  # the name of weights, and of a backbone without one
_HASH_BYTES = 16


def import_bags(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    table: str | os.PathLike[str] | None = None,
    backbone: str = IMPORTED,
    tumoral: Collection[str] = (),
    allow_missing: bool = False,
    reference_date: date = REFERENCE_DATE,
    force: bool = False,
    progress: Progress = silent,
) -> FeatureStore:
    """Write the bags of features under the folder `source` to the store `out` and open it.

    Layouts of CLAM, TRIDENT, STAMP, torchmil, SCEMILA, slide2vec and of `lymphfeat export` are
    recognised (docs/exchange.md). Labels, attributes and splits come from a CSV, `table` or one in
    the folder, as those of a cohort do; without one labels come from the layout if it has any.
    `tumoral` names the labels of SCEMILA that count as 1; all others count as 0. A vector becomes a
    map of one pixel. `backbone` names what made the features: a model reads stores of the same
    backbone only. One bag is in memory at a time.

    What is interrupted is continued by the same call. A complete store is left as it is if the same
    bags would be written. Raises StoreError for bags that cannot be read, are empty, differ in
    shape or hold values that float16 cannot, and CohortError for the table.

    >>> lf.import_bags("BAGS", "bags.h5", table="labels.csv").shape
    """
    source, out = Path(source), Path(out)
    if out.is_dir():
        raise StoreError(f"out (={out}) must be a file; got a folder. Choose another --out.")
    found = find_bags(source)
    csv = None if table is None else Path(table)
    clinical = _read_table(source, found, csv, tumoral, reference_date)
    names = {id: [path.name for path in own.files] for id, own in found.bags.items()}
    cohort = Cohort.of_bags(source, clinical, names, allow_missing=allow_missing)
    origin = read_origin(source, backbone)
    meter = RateMeter(progress, 2 * len(cohort.ids))  # every bag is read twice
    bags = [_Bag.read(id, found.bags[id], origin, meter) for id in cohort.ids]
    cohort = replace(
        cohort,
        images=tuple(tuple(source / bag.id / name for name in bag.names) for bag in bags),
        notes=(*cohort.notes, *found.notes),
    )
    recipe = _recipe(cohort, found, bags, origin)
    if out.exists() and not force:
        return _reuse(out, recipe, cohort)
    _write(out, recipe, cohort, bags, origin, meter, force=force)
    return replace(FeatureStore.open(out), notes=cohort.notes)


@dataclass(frozen=True, kw_only=True)
class _Bag:
    """What is known of a bag when its features have been read once."""

    id: str
    source: BagFiles
    shape: tuple[int, ...]  # (C, h, w)
    names: tuple[str, ...]  # (n,) of its images
    rows: tuple[str, ...]  # (n,) hashes of its features
    hashes: tuple[str, ...]  # (n,) of its images' files, where they are known; else `rows`

    @classmethod
    def read(cls, id: str, source: BagFiles, origin: Origin, meter: RateMeter) -> "_Bag":
        maps = _read(source)
        rows, (n, *shape) = _hashes(maps), maps.shape
        meter.add(1)
        return cls(
            id=id,
            source=source,
            shape=tuple(shape),
            names=tuple(origin.names_of(id, n) or map(str, range(n))),
            rows=rows,
            hashes=tuple(origin.hashes_of(id, n) or rows),
        )

    def read_again(self) -> NDArray[np.float32]:
        """Return the maps (n, C, h, w); raises StoreError if they have changed."""
        maps = _read(self.source)
        if _hashes(maps) != self.rows:
            raise StoreError(
                f"{self.source.files[0]}: has changed while it was imported; run the same line "
                "again."
            )
        return maps


def _read(source: BagFiles) -> NDArray[np.float32]:
    """Read the maps of a bag, which may lie in several files: (n, C, h, w)."""
    parts = [read_maps(path, source.rows) for path in source.files]
    for path, own in zip(source.files, parts, strict=True):
        _check_shape(path, own.shape[1:], source.files[0], parts[0].shape[1:])
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _check_shape(path: Path, shape: tuple[int, ...], first: Path, wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise StoreError(
            f"{path}: features must have the shape {_shown(wanted)} of {first}; got "
            f"{_shown(shape)}. Import bags of one backbone."
        )


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape if shape[1:] != (1, 1) else shape[:1]))


def _hashes(maps: NDArray[np.float32]) -> tuple[str, ...]:
    """Hash the features of every image as a store holds them, (n,): equal in any file format."""
    stored = maps.astype(np.float16)
    return tuple(
        hashlib.blake2b(own.tobytes(), digest_size=_HASH_BYTES).hexdigest() for own in stored
    )


# --- labels --------------------------------------------------------------------------------------


def _read_table(
    source: Path,
    found: FoundBags,
    table: Path | None,
    tumoral: Collection[str],
    reference_date: date,
) -> ClinicalTable:
    """Read the table, the only one in the folder, or else the labels that the layout gives."""
    if table is not None:
        return read_tables([table], reference_date)
    candidates = [path for path in found.tables if "id" in peek_columns(path)]
    if candidates:
        paths, unread = choose_tables(source, candidates)
        clinical = read_tables(paths, reference_date)
        return replace(clinical, notes=(*clinical.notes, *unread))
    given = {id: own.label for id, own in found.bags.items() if own.label is not None}
    if given:
        given = _binary(given, found.layout, tumoral)
    clinical = read_labels({id: given.get(id) or "" for id in found.bags}, source / "labels")
    source_of = "those of the layout" if given else "no table, so every patient is unlabelled (-1)"
    return replace(clinical, notes=(*clinical.notes, f"labels: {source_of}"))


def _binary(labels: Mapping[str, str], layout: str, tumoral: Collection[str]) -> dict[str, str]:
    """Return labels as 0 and 1: those of SCEMILA are names, of which some count as tumoral."""
    if layout != SCEMILA:
        return dict(labels)
    names = sorted(set(labels.values()))
    wrong = sorted(set(tumoral) - set(names))
    if wrong or not tumoral:
        raise SettingsError(
            f"tumoral (={', '.join(wrong) or 'none'}) must name the labels that count as tumoral, "
            f"out of {', '.join(names)}. Name them with --tumoral, or give labels with --table."
        )
    return {id: str(int(label in tumoral)) for id, label in labels.items()}


# --- the store -----------------------------------------------------------------------------------


def _recipe(
    cohort: Cohort, found: FoundBags, bags: Sequence[_Bag], origin: Origin
) -> dict[str, Any]:
    """Collect all that determines the store's bytes."""
    files = file_hashes(list(dict.fromkeys(path for bag in bags for path in bag.source.files)))
    digest = hashlib.sha256("\n".join(files).encode())
    rows = [bag.rows for bag in bags]
    return {
        "backbone": origin.backbone,
        "weights": IMPORTED,
        "weights_sha256": origin.weights_sha256,
        IMPORTED: {"layout": found.layout, "files": len(files), "sha256": digest.hexdigest()},
        "views": list(VIEWS[:1]),
        "precision": "float16",
        "versions": {"format": FORMAT_VERSION},
        "cohort": cohort_fingerprint(cohort, rows, of="rows of features"),
    }


def _reuse(out: Path, recipe: Recipe, cohort: Cohort) -> FeatureStore:
    store = FeatureStore.open(out)
    clear_leavings(out)
    differences = differing_fields(recipe, store.recipe)
    if differences:
        raise StoreError(
            f"{out} already holds a store with a different recipe: {'; '.join(differences)}. "
            "Choose another --out, or overwrite it with --force."
        )
    return replace(store, notes=cohort.notes)


def _write(
    out: Path,
    recipe: Recipe,
    cohort: Cohort,
    bags: Sequence[_Bag],
    origin: Origin,
    meter: RateMeter,
    *,
    force: bool,
) -> None:
    """Write a block per patient; those that an earlier try has written are not read again."""
    for bag in bags:
        _check_shape(bag.source.files[0], bag.shape, bags[0].source.files[0], bags[0].shape)
    channels, height, width = bags[0].shape
    frozen = FeatureSet(
        name=FROZEN,
        backbone=origin.backbone,
        weights_sha256=origin.weights_sha256,
        provenance=origin.provenance,
    )
    with StoreWriter(
        out,
        recipe=recipe,
        cohort=cohort,
        shape=MapShape(views=1, channels=channels, height=height, width=width),
        feature_sets=[frozen],
        image_hashes=[hash for bag in bags for hash in bag.hashes],
        force=force,
    ) as writer:
        for bag, start in zip(bags, cohort.offsets.tolist(), strict=False):
            if not writer.finished(start, start + len(bag.rows)):
                maps = bag.read_again()[:, None]  # (n, 1, C, h, w)
                writer.write(start, {FROZEN: maps}, _checksums(bag.rows))
            meter.add(1)
        writer.finish()


def _checksums(rows: Sequence[str]) -> NDArray[np.uint32]:
    """Return a checksum of each image's features from their hash: (n,)."""
    return np.array([zlib.crc32(bytes.fromhex(row)) for row in rows], np.uint32)
