"""Several models as one: the mean of their calibrated logits."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.provenance import PatientKey
from lymphfeat.errors import ModelError
from lymphfeat.evaluation.decision import Decision, average, combine
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import SEEN, Predictions, decided_columns, measure_by_role
from lymphfeat.runtime.arrays import Floats
from lymphfeat.runtime.files import recover, replace_file
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.runtime.strict_json import json_text, parse_json
from lymphfeat.runtime.versions import refuse_newer
from lymphfeat.settings import PredictSettings

MEMBERS_FILE, FORMAT = "members.json", "lymphfeat-members"
FORMAT_VERSION = 1  # which a file need not say; the next one must


@dataclass(frozen=True)
class Ensemble:
    """Several models that predict as one, used as a `Model` is.

    Its folder holds a model folder per member and `members.json`.
    """

    models: tuple[Model, ...]
    # "out of fold": the labelled patients, each predicted by the member that has not seen it
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    recalibration: Decision | None = None  # about the members' mean

    @classmethod
    def of(cls, models: "Iterable[Model | Ensemble]") -> "Ensemble":
        """Combine models, and the members of ensembles, all with the same weight."""
        parts = [model.models if isinstance(model, Ensemble) else (model,) for model in models]
        return cls(tuple(model for part in parts for model in part))

    @property
    def decision(self) -> Decision:
        """Return the decision about the mean: the members' thresholds on its scale."""
        if self.recalibration is not None:
            return self.recalibration.about_calibrated()
        return combine([model.decision for model in self.models])

    @property
    def threshold(self) -> float:
        """Return the probability above which a patient is called tumoral."""
        return self.decision.threshold

    @property
    def threshold_from(self) -> str:
        """Return what the threshold was chosen on."""
        return self.decision.threshold_from

    def at_sensitivity(self, target: float) -> "Ensemble":
        """Decide by every member's operating point for a sensitivity; see `Model`."""
        if self.recalibration is not None:
            return replace(self, recalibration=self.recalibration.at_sensitivity(target))
        return replace(self, models=tuple(model.at_sensitivity(target) for model in self.models))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a model folder per member and `members.json`, creating the folder if needed."""
        names = [member_name(number) for number in range(len(self.models))]
        for name, model in zip(names, self.models, strict=True):
            model.save(Path(folder, name))
        content = {
            "format": FORMAT,
            "members": names,
            **self.decision.to_json(),
            "metrics": self.metrics,
            "recalibration": self.recalibration and self.recalibration.to_json(),
        }
        text = json_text(content, indent=2)
        replace_file(
            Path(folder, MEMBERS_FILE), lambda path: path.write_text(text, encoding="utf-8")
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Ensemble":
        """Read what `save` wrote; raises ModelError, saying what to do, if it is incomplete."""
        content = _read_members(Path(folder))
        models = tuple(Model.load(Path(folder, name)) for name in content["members"])
        return cls(models, content["metrics"], content["recalibration"])

    def predict(
        self,
        cohort: Cohort,
        settings: PredictSettings | None = None,
        *,
        progress: Progress = silent,
    ) -> Predictions:
        """Predict every patient and image by the members' mean, as `Model.predict` does.

        The patients' probability is the logistic of the mean of the calibrated logits, and their
        spread the standard deviation of the calibrated probabilities.
        """
        return self.average(self.predict_each(cohort, settings, progress=progress))

    def predict_each(
        self,
        cohort: Cohort,
        settings: PredictSettings | None = None,
        *,
        progress: Progress = silent,
    ) -> list[Predictions]:
        """Return the predictions of every member; only one at a time is on the device."""
        predicted, count = [], len(self.models)
        for number, model in enumerate(self.models):
            own = part_of(progress, number, count, f"member {number + 1}/{count}")
            predicted.append(model.predict(cohort, settings, progress=own))
            model.backbone.to("cpu")
        return predicted

    def average(self, members: Sequence[Predictions]) -> Predictions:
        """Average what `predict_each` returned, by the members' present decisions."""
        raw = np.stack([member.patients["probability"].to_numpy(np.float64) for member in members])
        probability, each = self.together(raw)
        patients = members[0].patients.assign(
            probability=probability,
            **decided_columns(probability, self.decision),
            spread=np.std(each, axis=0),
            seen=_most_seen([member.patients["seen"] for member in members]),
        )
        images = members[0].images.copy()
        for name in ("logit", "weight", "contribution"):
            images[name] = np.mean([member.images[name] for member in members], axis=0)
        images["probability"] = expit(images["logit"])
        return Predictions(patients=patients, images=images)

    def together(self, probabilities: Floats) -> tuple[Floats, Floats]:
        """Return the calibrated probability of all members, and of each: (M, P) -> (P,), (M, P)."""
        decisions = [model.decision for model in self.models]
        last = self.recalibration or Decision()
        each = [own.calibrate(p) for own, p in zip(decisions, probabilities, strict=True)]
        return last.calibrate(average(decisions, probabilities)), last.calibrate(np.stack(each))

    def measure(self, patients: pd.DataFrame) -> dict[str, dict[str, float | None]]:
        """Measure predicted patients with a label, as `Model.measure` does."""
        return measure_by_role(patients, self.threshold)

    def seen(self, patients: Sequence[PatientKey]) -> list[str]:
        """Return the most that any member has seen of each patient, as one of `SEEN`."""
        return _most_seen([model.seen(patients) for model in self.models])


def member_name(number: int) -> str:
    """Return the name of a member's folder."""
    return f"fold-{number}"


def _read_members(folder: Path) -> dict[str, Any]:
    recover(folder)
    path = folder / MEMBERS_FILE
    if not path.is_file():
        raise ModelError(f"model (={folder}) must be a folder with {MEMBERS_FILE}; got none.")
    try:
        content = dict(parse_json(path.read_bytes()))
        refuse_newer(path, content.get("format_version", 1), FORMAT_VERSION, ModelError)
        _check_names(content["members"])
        recalibration = content.get("recalibration")
        content["recalibration"] = recalibration and Decision.from_json(recalibration)
        content["metrics"] = {name: dict(own) for name, own in content.get("metrics", {}).items()}
    except ModelError:
        raise
    except Exception as error:  # damaged content fails in as many ways as there is of it
        raise ModelError(f"{path}: is damaged ({error}); copy the model folder again.") from None
    return content


def _check_names(members: Sequence[str]) -> None:
    """Raise ValueError unless there are members, all of them right in the folder."""
    if not members:
        raise ValueError("it names no members")
    for name in members:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"member {name!r} must lie in the folder")


def _most_seen(members: "Sequence[Sequence[str] | pd.Series[str]]") -> list[str]:
    return [min(each, key=SEEN.index) for each in zip(*members, strict=True)]
