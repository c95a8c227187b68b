"""Hashes of a cohort, its patients and its images. No torch."""

import hashlib
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.runtime.identity import file_hashes


def cohort_fingerprint(
    cohort: Cohort, hashes: Sequence[Sequence[str]] | None = None, *, of: str = "file contents"
) -> dict[str, Any]:
    """Describe a cohort for a recipe: its size, and a hash of its table and its images.

    The images' `hashes` are of their files unless they are given, patient by patient. `hash_of`
    says what they are `of`; earlier ones were of names and file sizes.
    """
    hashes = image_hashes(cohort) if hashes is None else hashes
    digest = hashlib.sha256(cohort.table.to_csv().encode())
    for id, paths, own in zip(cohort.ids, cohort.images, hashes, strict=True):
        digest.update(f"{id}:{len(paths)}\n".encode())  # an image may move to another patient
        for path, hash in zip(paths, own, strict=True):
            digest.update(f"{path.name}:{hash}\n".encode(errors="surrogateescape"))
    return {
        "patients": len(cohort.table),
        "images": int(cohort.offsets[-1]),
        "hash_of": of,
        "sha256": digest.hexdigest(),
    }


def patient_keys(cohort: Cohort) -> tuple[PatientKey, ...]:
    """Return what each patient of a cohort is recognised by: (P,)."""
    found = zip(cohort.ids, image_hashes(cohort), strict=True)
    return tuple(PatientKey.of(id, hashes) for id, hashes in found)


def image_hashes(cohort: Cohort) -> tuple[tuple[str, ...], ...]:
    """Hash each image file's contents, patient by patient in the order of `cohort.images`."""
    hashes = iter(file_hashes(list(chain.from_iterable(cohort.images))))
    return tuple(tuple(islice(hashes, len(paths))) for paths in cohort.images)
