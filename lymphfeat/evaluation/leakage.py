"""Images that several patients share: found in a store or cohort, refused in splits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import LeakageError
from lymphfeat.features.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class SharedImage:
    """One image that several patients have."""

    patients: tuple[str, ...]
    names: tuple[str, ...]  # of the first copy in each patient


def find_shared_images(store: FeatureStore, features: str) -> list[SharedImage]:
    """Return the images that different patients of a store have in common.

    Two images are the same if their files are (equal checksums and similar features, because 32
    bits may collide), or if their features are equal to the last bit (the same pixels in another
    file). `features` names the set of features to compare.
    """
    files = _same_files(store.crc32, store.pooled(features))
    groups = [*files, *_same_features(store, features)]
    return _between_patients(groups, store.ids, store.n_images, store.image_names)


def find_shared_crops(crops: NDArray[np.uint8], cohort: Cohort) -> list[SharedImage]:
    """Return the images that different patients of a cohort have in common.

    crops: (N, 3, H, W), its decoded images. Two are the same if all their pixels are.
    """
    names = [path.name for images in cohort.images for path in images]
    return _between_patients(_same_bytes(crops), cohort.ids, cohort.n_images, names)


def _between_patients(
    groups: Iterable[list[int]],
    ids: Sequence[str],
    n_images: NDArray[np.int64],
    names: Sequence[str],
) -> list[SharedImage]:
    """Keep those groups of rows, each of the same image, that belong to several patients."""
    owner = np.repeat(np.arange(len(ids)), n_images)
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rows in groups:
        first = dict(zip(reversed(owner[rows].tolist()), reversed(rows), strict=True))
        if len(first) > 1:
            owners = tuple(sorted(first))
            found[tuple(first[o] for o in owners)] = owners
    return [
        SharedImage(
            patients=tuple(ids[o] for o in owners),
            names=tuple(names[row] for row in rows),
        )
        for rows, owners in found.items()
    ]


def _same_files(crc32: NDArray[np.uint32], pooled: NDArray[np.float32]) -> list[list[int]]:
    """Group the rows of equal files; pooled: (N, V, C)."""
    groups: dict[int, list[int]] = {}
    for row, checksum in enumerate(crc32.tolist()):
        first = groups.setdefault(checksum, [])
        if not first or np.allclose(pooled[first[0], 0], pooled[row, 0], rtol=1e-2, atol=1e-2):
            first.append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _same_features(store: FeatureStore, features: str) -> list[list[int]]:
    same = _same_bytes(row for _, pooled in store.pooled_blocks(features) for row in pooled[:, 0])
    copies = sum(len(rows) - 1 for rows in same)
    # Features of a backbone that cannot tell images apart say nothing about them.
    return same if copies <= len(store.image_names) / 2 else []


def _same_bytes(rows: Iterable[NDArray[Any]]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for row, values in enumerate(rows):
        groups.setdefault(blake2b(values.tobytes(), digest_size=16).digest(), []).append(row)
    return [found for found in groups.values() if len(found) > 1]


def refuse_shared_images(splits: Sequence[Split], shared: Sequence[SharedImage]) -> None:
    """Raise LeakageError if training and validation patients of a split share an image."""
    for split in splits:
        train, validation = set(split.train), set(split.validation)
        both = [s for s in shared if train & {*s.patients} and validation & {*s.patients}]
        if both:
            where = " = ".join(
                f"{name} of {patient}"
                for patient, name in zip(both[0].patients, both[0].names, strict=True)
            )
            raise LeakageError(
                f"the same image must not be trained on and evaluated on; got {where}, on both "
                f"sides of split {split.id} ({len(both)} such images). `lymphfeat audit` lists "
                "them: fix the cohort, keep such patients on one side (fit-head --splits FILE), or "
                "continue with --allow-shared-images."
            )
