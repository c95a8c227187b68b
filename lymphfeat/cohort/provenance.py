"""Whose labels and whose images went into what was learnt, and whether a patient is among them.

Every file that holds learnt numbers (weights, store, checkpoint, run, model) carries a `Provenance`
that includes those of all it was made of.

A patient is recognised by its images, whatever its id: another laboratory's P1 is another patient,
and the same patient under another id is the same patient. Kept are the smallest of the hashes of
its image files (a bottom-k sketch), so that a patient is still recognised when images were added
or removed, and a file's size does not grow with the bags.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lymphfeat.errors import LeakageError

SKETCH_SIZE = 16  # image hashes kept per patient
_DIGITS = 16  # of each hash: 64 bits tell some 10⁸ images apart
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class PatientKey:
    """What a patient is recognised by."""

    id: str
    images: tuple[str, ...] = ()  # hashes of image files, sorted; empty where they are not known

    @classmethod
    def of(cls, id: str, hashes: Iterable[str]) -> "PatientKey":
        """Keep the smallest hashes of a patient's image files."""
        return cls(id=id, images=tuple(sorted({hash[:_DIGITS] for hash in hashes})[:SKETCH_SIZE]))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The patients that learnt numbers come from, directly or through what they were made of."""

    labels: tuple[PatientKey, ...] = ()  # whose LABELS were learnt from
    images: tuple[PatientKey, ...] = ()  # whose images were learnt from without labels

    def __or__(self, other: "Provenance") -> "Provenance":
        """Return what was made of both."""
        return Provenance(
            labels=tuple(dict.fromkeys(self.labels + other.labels)),
            images=tuple(dict.fromkeys(self.images + other.images)),
        )

    @property
    def label_ids(self) -> tuple[str, ...]:
        """Return the ids of the patients whose labels were learnt from."""
        return tuple(dict.fromkeys(key.id for key in self.labels))

    @cached_property
    def _labels(self) -> "_Index":
        return _Index(self.labels)

    @cached_property
    def _images(self) -> "_Index":
        return _Index(self.images)

    def has_label_of(self, patient: PatientKey) -> bool:
        """Say whether the label of a patient was learnt from."""
        return patient in self._labels

    def has_images_of(self, patient: PatientKey) -> bool:
        """Say whether images of a patient were learnt from, with or without its label."""
        return patient in self._images or patient in self._labels

    def labelled(self, patients: Iterable[PatientKey]) -> tuple[str, ...]:
        """Return the ids of those patients whose labels were learnt from."""
        return tuple(patient.id for patient in patients if self.has_label_of(patient))

    def pictured(self, patients: Iterable[PatientKey]) -> tuple[str, ...]:
        """Return the ids of those patients whose images were learnt from without their labels."""
        return tuple(patient.id for patient in patients if patient in self._images)

    def to_json(self) -> dict[str, Any]:
        """Return what a file holds."""
        return {"labels": keys_to_json(self.labels), "images": keys_to_json(self.images)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Provenance":
        """Read what `to_json` returned."""
        return cls(
            labels=keys_from_json(content.get("labels", ())),
            images=keys_from_json(content.get("images", ())),
        )

    @classmethod
    def of_ids(cls, labels: Iterable[str] = (), images: Iterable[str] = ()) -> "Provenance":
        """Take over the ids of a file that was written before images were hashed."""
        return cls(
            labels=tuple(PatientKey(id=id) for id in labels),
            images=tuple(PatientKey(id=id) for id in images),
        )


NOBODY = Provenance()


class _Index:
    """Patients, to be recognised among others."""

    def __init__(self, keys: Sequence[PatientKey]) -> None:
        self._hashes = {hash for key in keys for hash in key.images}
        self._ids = {key.id for key in keys}
        self._only_ids = {key.id for key in keys if not key.images}

    def __contains__(self, patient: PatientKey) -> bool:
        """Compare images; where one side's are not known, ids."""
        if not patient.images:
            return patient.id in self._ids
        return patient.id in self._only_ids or not self._hashes.isdisjoint(patient.images)


def is_same_patient(one: PatientKey, other: PatientKey) -> bool:
    """Say whether two keys are of one patient."""
    return one in _Index([other])


def keys_to_json(keys: Iterable[PatientKey]) -> list[dict[str, str]]:
    """Return keys as a file holds them."""
    return [{"id": key.id, "images": " ".join(key.images)} for key in keys]


def keys_from_json(content: Iterable[Any]) -> tuple[PatientKey, ...]:
    """Read keys; plain ids are those of files written before images were hashed."""
    return tuple(
        PatientKey(id=item)
        if isinstance(item, str)
        else PatientKey(id=item["id"], images=tuple(item["images"].split()))
        for item in content
    )


def refuse_seen(seen: Iterable[str], source: str, remedy: str) -> None:
    """Raise LeakageError when there are patients to be measured on whose labels were learnt from.

    `seen` are their ids, `source` is what learnt from them.
    """
    ids = sorted(set(seen))
    if ids:
        more = f", … ({len(ids)} in all)" if len(ids) > _SHOWN else ""
        raise LeakageError(
            f"{source} learnt from the labels of {', '.join(ids[:_SHOWN])}{more}; nothing must be "
            f"measured on them. {remedy}"
        )
