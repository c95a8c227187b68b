"""Images that stand on both sides of a split: found in a store, refused in a plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from lymphfeat.errors import LeakageError
from lymphfeat.splits import Split
from lymphfeat.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class SharedImage:
    """One picture that several patients have."""

    patients: tuple[str, ...]
    names: tuple[str, ...]  # of its first copy in each


def find_shared_images(store: FeatureStore, features: str) -> list[SharedImage]:
    """Return the pictures that different patients of a store have in common.

    Two images are the same when their files are (by checksum, their features agreeing, for 32 bits
    may collide), or when their features are to the last bit (the same pixels in another file).
    """
    pooled = np.array(store.pooled(features)[:, 0])  # (N, C)
    owner = np.repeat(np.arange(len(store.ids)), store.n_images)
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for rows in [*_same_files(store.crc32, pooled), *_same_features(pooled)]:
        first = dict(zip(reversed(owner[rows].tolist()), reversed(rows), strict=True))
        if len(first) > 1:
            owners = tuple(sorted(first))
            found[tuple(first[o] for o in owners)] = owners
    return [
        SharedImage(
            patients=tuple(store.ids[o] for o in owners),
            names=tuple(store.image_names[row] for row in rows),
        )
        for rows, owners in found.items()
    ]


def _same_files(crc32: NDArray[np.uint32], pooled: NDArray[np.float32]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for row, checksum in enumerate(crc32.tolist()):
        first = groups.setdefault(checksum, [])
        if not first or np.allclose(pooled[first[0]], pooled[row], rtol=1e-2, atol=1e-2):
            first.append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _same_features(pooled: NDArray[np.float32]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for row, values in enumerate(pooled):
        groups.setdefault(blake2b(values.tobytes(), digest_size=16).digest(), []).append(row)
    if len(groups) < len(pooled) / 2:  # a backbone that sees no difference says nothing of images
        return []
    return [rows for rows in groups.values() if len(rows) > 1]


def refuse_shared_images(splits: Sequence[Split], shared: Sequence[SharedImage]) -> None:
    """Raise LeakageError when a picture is trained on in one patient and validated in another."""
    for split in splits:
        train, validation = set(split.train), set(split.validation)
        torn = [s for s in shared if train & {*s.patients} and validation & {*s.patients}]
        if torn:
            where = " = ".join(
                f"{name} of {patient}"
                for patient, name in zip(torn[0].patients, torn[0].names, strict=True)
            )
            raise LeakageError(
                f"the same image must not be trained on and evaluated on; got {where}, torn apart "
                f"by split {split.id} ({len(torn)} such images). `lymphfeat audit` lists them: "
                "mend the cohort, keep such patients together by --splits FILE, or go on with "
                "--allow-shared-images."
            )
