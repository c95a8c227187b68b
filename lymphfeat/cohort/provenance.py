"""Whose labels and whose images were trained on, and whether a patient is among them.

Every file that holds the result of training (weights, store, checkpoint, run, model) carries a
`Provenance` that includes those of everything it was made from.

A patient is recognised by its images, whatever its id: another laboratory's P1 is another patient,
and the same patient under another id is the same patient. The smallest hashes of its image files
are kept (a bottom-k sketch), so that a patient is still recognised when images were added
or removed, and a file's size does not grow with the bags.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lymphfeat.errors import LeakageError

SKETCH_SIZE = 16  # image hashes kept per patient
_DIGITS = 16  # of each hash: 64 bits distinguish about 10⁸ images
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class PatientKey:
    """What a patient is recognised by."""

    id: str
    images: tuple[str, ...] = ()  # hashes of image files, sorted; empty where unknown

    @classmethod
    def of(cls, id: str, hashes: Iterable[str]) -> "PatientKey":
        """Keep the smallest hashes of a patient's image files."""
        return cls(id=id, images=tuple(sorted({hash[:_DIGITS] for hash in hashes})[:SKETCH_SIZE]))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The patients that a training result comes from, directly or through what it was made from."""

    labels: tuple[PatientKey, ...] = ()  # whose labels were trained on
    images: tuple[PatientKey, ...] = ()  # whose images were trained on without labels

    def __or__(self, other: "Provenance") -> "Provenance":
        """Return the provenance of what is made from both."""
        return Provenance(
            labels=tuple(dict.fromkeys(self.labels + other.labels)),
            images=tuple(dict.fromkeys(self.images + other.images)),
        )

    @property
    def label_ids(self) -> tuple[str, ...]:
        """Return the ids of the patients whose labels were trained on."""
        return tuple(dict.fromkeys(key.id for key in self.labels))

    @cached_property
    def _labels(self) -> "_Index":
        return _Index(self.labels)

    @cached_property
    def _images(self) -> "_Index":
        return _Index(self.images)

    def has_label_of(self, patient: PatientKey) -> bool:
        """Return whether the label of a patient was trained on."""
        return patient in self._labels

    def has_images_of(self, patient: PatientKey) -> bool:
        """Return whether images of a patient were trained on, with or without its label."""
        return patient in self._images or patient in self._labels

    def labelled(self, patients: Iterable[PatientKey]) -> tuple[str, ...]:
        """Return the ids of those patients whose labels were trained on."""
        return tuple(patient.id for patient in patients if self.has_label_of(patient))

    def pictured(self, patients: Iterable[PatientKey]) -> tuple[str, ...]:
        """Return the ids of those patients whose images were trained on without labels."""
        return tuple(patient.id for patient in patients if patient in self._images)

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON."""
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
        """Build from the ids in a file that was written before images were hashed."""
        return cls(
            labels=tuple(PatientKey(id=str(id)) for id in labels),
            images=tuple(PatientKey(id=str(id)) for id in images),
        )


NOBODY = Provenance()


class _Index:
    """A set of patients in which other patients are recognised."""

    def __init__(self, keys: Sequence[PatientKey]) -> None:
        self._hashes = {hash for key in keys for hash in key.images}
        self._ids = {key.id for key in keys}
        self._only_ids = {key.id for key in keys if not key.images}

    def __contains__(self, patient: PatientKey) -> bool:
        """Compare images, or ids where the images of one side are unknown."""
        if not patient.images:
            return patient.id in self._ids
        return patient.id in self._only_ids or not self._hashes.isdisjoint(patient.images)


def is_same_patient(one: PatientKey, other: PatientKey) -> bool:
    """Return whether two keys belong to the same patient."""
    return one in _Index([other])


def keys_to_json(keys: Iterable[PatientKey]) -> list[dict[str, str]]:
    """Return keys as JSON."""
    return [{"id": key.id, "images": " ".join(key.images)} for key in keys]


def keys_from_json(content: Iterable[Any]) -> tuple[PatientKey, ...]:
    """Read keys; files written before images were hashed hold plain ids."""
    return tuple(
        PatientKey(id=item)
        if isinstance(item, str)
        else PatientKey(id=str(item["id"]), images=tuple(item["images"].split()))
        for item in content
    )


def refuse_seen_by_weights(seen: Iterable[str], weights: str) -> None:
    """Raise LeakageError when weights learnt from the labels of patients to be measured on."""
    refuse_seen(
        seen,
        f"weights (={weights})",
        "Choose weights that were not trained on them, such as bloodcells or none.",
    )


def refuse_seen(seen: Iterable[str], source: str, remedy: str) -> None:
    """Raise LeakageError when patients to be measured on are among those trained on.

    `seen` are the ids of those whose labels were seen, `source` is what was trained on them.
    """
    ids = sorted(set(seen))
    if ids:
        more = f", … ({len(ids)} in all)" if len(ids) > _SHOWN else ""
        raise LeakageError(
            f"{source} learnt from the labels of {', '.join(ids[:_SHOWN])}{more}; nothing must be "
            f"measured on them. {remedy}"
        )
