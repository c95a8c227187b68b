"""The origin of a model, and whose labels and images it has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lymphfeat.cohort.provenance import NOBODY, PatientKey, Provenance, keys_from_json, keys_to_json


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """The origin of a model."""

    trained_on: tuple[str, ...]  # ids of its own training patients
    validated_on: tuple[PatientKey, ...] = ()
    provenance: Provenance = NOBODY  # of everything in it, including its initial weights
    cohort: Mapping[str, Any] = field(default_factory=dict)  # its fingerprint
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0
    seed: int = 0
    initial_weights: str = "none"
    initial_weights_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    # "train", "validation" -> the metrics of those patients, as predicted by the final model
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def seen(self, patients: Sequence[PatientKey]) -> list[str]:
        """Return what the model has seen of each patient, as one of `SEEN`."""
        validated = Provenance(labels=self.validated_on)

        def seen_of(patient: PatientKey) -> str:
            if self.provenance.has_label_of(patient):
                return "label"
            if validated.has_label_of(patient):
                return "validation"
            return "images" if self.provenance.has_images_of(patient) else "no"

        return [seen_of(patient) for patient in patients]

    def to_json(self) -> dict[str, Any]:
        """Return the content for a model file."""
        return asdict(self) | {
            "validated_on": keys_to_json(self.validated_on),
            "provenance": self.provenance.to_json(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TrainingFacts":
        """Read what `to_json` returned; models of earlier versions have no provenance."""
        trained_on = tuple(content["trained_on"])
        provenance = (
            Provenance.from_json(content["provenance"])
            if "provenance" in content
            else Provenance.of_ids(labels=trained_on)
        )
        return cls(
            **{
                **content,
                "trained_on": trained_on,
                "validated_on": keys_from_json(content["validated_on"]),
                "provenance": provenance,
            }
        )
