"""The predictions of a model on a cohort: tables of patients and images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.evaluation.decision import Decision
from lymphfeat.evaluation.scores import patient_metrics
from lymphfeat.features.store import FeatureStore
from lymphfeat.model.familiarity import Judgement
from lymphfeat.runtime.files import replace_files

# What a model has seen of a patient: its label in training; its label in validation, where nothing
# was learnt from it; its images without its label; nothing.
SEEN = ("label", "validation", "images", "no")
ROLE_OF = {"label": "train", "validation": "validation", "images": "new", "no": "new"}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of a model on a cohort.

    Where the model knows what training images were like, both tables also have the columns of a
    `Judgement`, and the patients' notes say what is unlike training.

    patients: id, label (missing where unknown), seen (one of `SEEN`), n_images, probability (of
        tumoral), calibrated (missing where the model has no calibration), predicted (1 where the
        probability is above the threshold). For several models the probability is already
        calibrated, and there is a column spread, the standard deviation of the members'
        calibrated probabilities.
    images: patient, image (file name), logit, probability (its logistic), weight (how much the
        image counts, at least 0, adding up to 1 per patient), contribution (its share of the
        patient's logit, with its sign; of the ranking family of the probability). The logit is the
        mean of its instances' logits; for heads of the family `distribution` the contribution times
        the number of the patient's images, shifted so that the mean of a patient's logits is the
        patient's logit, and the weight is the contribution's size relative to the others'.
    """

    patients: pd.DataFrame
    images: pd.DataFrame

    def decided(self, decision: Decision) -> "Predictions":
        """Return the same probabilities, calibrated and thresholded by a decision."""
        decided = decided_columns(self.patients["probability"].to_numpy(np.float64), decision)
        return replace(self, patients=self.patients.assign(**decided))

    def judged(self, judgement: Judgement) -> "Predictions":
        """Add how unlike training images and patients are, and notes on the patients."""
        patients = self.patients.assign(**judgement.patients)
        before = patients["notes"] if "notes" in patients else [""] * len(patients)
        patients["notes"] = [
            "; ".join(filter(None, pair)) for pair in zip(before, judgement.notes, strict=True)
        ]
        return replace(self, patients=patients, images=self.images.assign(**judgement.images))

    def save(
        self,
        patients: Path | None = None,
        images: Path | None = None,
        beside: Mapping[Path, Callable[[Path], object]] | None = None,
    ) -> None:
        """Write either table as CSV, and other files `beside`: all completely or none at all."""
        tables = ((self.patients, patients), (self.images, images))
        writes = {path: partial(_write_table, table) for table, path in tables if path is not None}
        replace_files({**writes, **(beside or {})})

    @classmethod
    def read(cls, patients: Path, images: Path) -> "Predictions":
        """Read both tables back."""
        labels: dict[str, Any] = {"id": str, "label": "Int64"}
        return cls(
            patients=pd.read_csv(
                patients, dtype=labels, keep_default_na=False, na_values={"label": [""]}
            ),
            images=pd.read_csv(images, dtype={"patient": str, "image": str}, keep_default_na=False),
        )


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


def decided_columns(probability: NDArray[np.float64], decision: Decision) -> dict[str, Any]:
    return {
        "calibrated": np.nan
        if decision.calibration is None
        else decision.calibration.apply(probability),
        "predicted": (probability > decision.threshold).astype(np.int64),
    }


def measure_by_role(patients: pd.DataFrame, threshold: float) -> dict[str, dict[str, float | None]]:
    """Measure the patients with a label, by what the model has seen of them (`ROLE_OF`)."""
    known = patients[patients["label"].notna()]
    roles = known["seen"].map(ROLE_OF)
    return {
        role: patient_metrics(known[roles == role], threshold)
        for role in ("train", "validation", "new")
        if (roles == role).any()
    }


def patient_table(
    cohort: Cohort | FeatureStore,
    seen: Sequence[str],
    probability: NDArray[np.float32],
    decision: Decision,
) -> pd.DataFrame:
    labels = pd.Series(cohort.labels, dtype="Int64")
    return pd.DataFrame(
        {
            "id": cohort.ids,
            "label": labels.mask(labels < 0),
            "seen": seen,
            "n_images": cohort.n_images,
            "probability": probability,
            **decided_columns(probability.astype(np.float64), decision),
        }
    )


def image_table(
    cohort: Cohort | FeatureStore,
    logit: NDArray[np.float32],
    weight: NDArray[np.float32],
    contribution: NDArray[np.float32],
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": np.repeat(np.array(cohort.ids), cohort.n_images),
            "image": cohort.image_names,
            "logit": logit,
            "probability": expit(logit),
            "weight": weight,
            "contribution": contribution,
        }
    )
