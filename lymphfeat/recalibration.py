"""A model fitted to another laboratory: calibration and threshold learnt from its patients."""

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import logit as logit_of

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.provenance import PatientKey, Provenance
from lymphfeat.cohort.splits import kfold_splits
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.evaluation.baselines import folds_of
from lymphfeat.evaluation.calibration import Calibration, calibration_error, fit_calibrations
from lymphfeat.evaluation.decision import Decision, cross_fit_decisions
from lymphfeat.evaluation.metrics import brier_score, log_loss
from lymphfeat.evaluation.scores import patient_metrics
from lymphfeat.features.store import FeatureStore
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble
from lymphfeat.model.final_model import TENSORS_FILE, FinalModel
from lymphfeat.model.held_out import HeldOut
from lymphfeat.model.loading import AnyModel, load_model
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE, WEIGHTS_FILE, Model
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.runtime.files import ResultKind, result_folder
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import PredictSettings, RecalibrateSettings

FIGURES_FILE = "recalibration.json"
RECALIBRATED = ResultKind(
    name="recalibrated model",
    marks=(FIGURES_FILE,),
    files=(
        *(FIGURES_FILE, FACTS_FILE, WEIGHTS_FILE, FINAL_FILE, TENSORS_FILE, MEMBERS_FILE),
        *(f"fold-*/{name}" for name in (FACTS_FILE, WEIGHTS_FILE)),
    ),
)
FOLDS = 5
Figures = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """A recalibrated model, and its figures on the patients before and after.

    Those after are of five folds, each recalibrated by the others. `calibration_slope` and
    `calibration_intercept` are what the probabilities still need: 1 and 0 if nothing.
    """

    model: AnyModel
    prevalence: float  # share of tumoral patients
    before: Figures
    after: Figures


def recalibrate(
    model: str | os.PathLike[str],
    cohort: Cohort | FeatureStore,
    out: str | os.PathLike[str],
    settings: RecalibrateSettings | None = None,
    *,
    scoring: PredictSettings | None = None,
    other_stores: Sequence[FeatureStore] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Recalibration:
    """Learn a model's calibration, threshold and operating points again, from labelled patients.

    Its backbones, heads and fusion stay. The new model, and its figures, are written to the folder
    `out`. The patients must not be those it was trained on, and at least five of each class; those
    without a label are left out. `scoring` says how they are predicted. The maps of a final model
    can come from a store, with `other_stores` if it has several backbones.

    Raises CohortError for too few patients or such that the model was trained on, SettingsError for
    a prevalence out of range or stores for a model that reads none.

    >>> lf.recalibrate("models/endtoend", lf.Cohort.load("OTHER_DIR"), "models/there").after
    """
    settings, scoring = settings or RecalibrateSettings(), scoring or PredictSettings()
    old = load_model(model)
    with result_folder(Path(out), RECALIBRATED, force=force) as folder:
        base = _without_recalibration(old)
        patients, keys = _predict(base, cohort, other_stores, scoring, progress)
        known = patients["label"].notna().to_numpy()
        labelled = patients[known].reset_index(drop=True)
        _check(labelled)
        judged = _Judged.of(labelled, settings)
        seen = Provenance(labels=tuple(key for key, own in zip(keys, known, strict=True) if own))
        images = None
        if isinstance(base, FinalModel) and base.fused:
            images = judged.with_probability(labelled["without_attributes"])
        found = Recalibration(
            model=_decide_again(base, judged, images, seen),
            prevalence=float(judged.labels.mean()),
            before=judged.measure_by(_decision(old)),
            after=judged.measure_after(),
        )
        found.model.save(folder)
        _write_figures(found, settings, folder / FIGURES_FILE)
    return found


def _write_figures(found: Recalibration, settings: RecalibrateSettings, path: Path) -> None:
    content = {
        "prevalence": found.prevalence,
        "settings": asdict(settings),
        "before": found.before,
        "after": found.after,
    }
    path.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")


def _predict(
    model: AnyModel,
    cohort: Cohort | FeatureStore,
    other_stores: Sequence[FeatureStore],
    scoring: PredictSettings,
    progress: Progress,
) -> tuple[pd.DataFrame, Sequence[PatientKey]]:
    if isinstance(cohort, Cohort):
        cohort = cohort.labelled()
        return model.predict(cohort, scoring, progress=progress).patients, patient_keys(cohort)
    if not isinstance(model, FinalModel):
        raise SettingsError(
            f"store (={cohort.path}) must go with a model of `lymphfeat finalize`; another reads "
            "images. Name the cohort."
        )
    found = model.predict_stores(cohort, *other_stores, settings=scoring)
    return found.patients, cohort.keys


def _check(patients: pd.DataFrame) -> None:
    trained = patients.loc[patients["seen"] == "label", "id"]
    if len(trained):
        shown = ", ".join(trained.head(5)) + (" and others" if len(trained) > 5 else "")
        raise CohortError(
            f"cohort must have patients that the model was not trained on; it was on {shown}. "
            "Leave them out: of them its probabilities are too confident."
        )
    counts = [int((patients["label"] == label).sum()) for label in (0, 1)]
    if min(counts) < FOLDS:
        raise CohortError(
            f"cohort must have at least {FOLDS} labelled patients of each class to recalibrate "
            f"with; got {counts[0]} reactive and {counts[1]} tumoral."
        )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """Labelled patients and their probabilities by a model that was not trained on them."""

    probability: Floats  # (n,) as calibration takes it: of several members their mean's
    labels: Labels  # (n,)
    folds: NDArray[np.int64]  # (n,)
    settings: RecalibrateSettings

    @classmethod
    def of(cls, patients: pd.DataFrame, settings: RecalibrateSettings) -> "_Judged":
        labels, ids = patients["label"].to_numpy(np.int64), patients["id"].tolist()
        (repeat,) = kfold_splits(ids, labels, folds=FOLDS, seeds=1, seed=settings.seed)
        return cls(
            probability=patients["probability"].to_numpy(np.float64),
            labels=labels,
            folds=folds_of(ids, repeat.outer),
            settings=settings,
        )

    def with_probability(self, probability: "pd.Series[float]") -> "_Judged":
        return replace(self, probability=np.asarray(probability, np.float64))

    def decision(self) -> Decision:
        """Learn what is kept, from all patients; calibrated for the prevalence asked for."""
        learnt = self._learn(np.ones(len(self.labels), bool))
        if self.settings.prevalence is None:
            return learnt
        own = learnt.calibration or Calibration()
        moved = logit_of(self.settings.prevalence) - logit_of(self.labels.mean())
        intercept = own.intercept + float(moved)
        return replace(learnt, calibration=replace(own, intercept=intercept))

    def held_out(self, decision: Decision) -> HeldOut:
        """Return what the model keeps of these patients, each fold decided by the others."""
        others = [self._learn(self.folds != fold) for fold in range(FOLDS)]
        found = HeldOut.of(
            self.probability, self.labels, self.folds, measured_by=others, kept=[decision]
        )
        return replace(found, scheme="recalibrated", calibrated_for=self.settings.prevalence)

    def _learn(self, rows: NDArray[np.bool_]) -> Decision:
        return Decision.learn(
            self.probability[rows],
            self.labels[rows],
            rule=self.settings.threshold,
            method=self.settings.calibration,
            source=f"{rows.sum()} patients that it was recalibrated on",
        )

    def measure_by(self, decision: Decision) -> Figures:
        """Measure them by a decision about their probabilities."""
        predicted = (self.probability > decision.threshold).astype(np.int64)
        return self.measure(decision.calibrate(self.probability), predicted)

    def measure_after(self) -> Figures:
        """Measure every fold as recalibrated by the others."""
        found = cross_fit_decisions(
            self.probability,
            self.labels,
            self.folds,
            rule=self.settings.threshold,
            method=self.settings.calibration,
        )
        predicted = (self.probability > found.threshold).astype(np.int64)
        return self.measure(found.calibrated, predicted)

    def measure(self, calibrated: Floats, predicted: Labels) -> Figures:
        """Measure the patients as decided, and how well probabilities are calibrated."""
        patients = pd.DataFrame({"label": self.labels, "probability": calibrated})
        at = np.where(predicted == 1, -1.0, 1.0)  # thresholds that decide as predicted
        (left,) = fit_calibrations(calibrated[None], self.labels)
        return patient_metrics(patients, at) | {
            "log_loss": float(log_loss(calibrated, self.labels)),
            "brier": float(brier_score(calibrated, self.labels)),
            "ece": calibration_error(calibrated, self.labels),
            "calibration_slope": left.slope,
            "calibration_intercept": left.intercept,
        }


def _without_recalibration(model: AnyModel) -> AnyModel:
    if isinstance(model, FinalModel):
        return replace(model, recalibration={})
    return replace(model, recalibration=None) if isinstance(model, Ensemble) else model


def _decision(model: AnyModel) -> Decision:
    """Return the decision of a model about its probability before any recalibration."""
    if isinstance(model, FinalModel):
        return model.recalibration.get("row") or model.decision
    if isinstance(model, Ensemble):
        return model.recalibration or model.decision
    return model.decision


def _decide_again(
    model: AnyModel, judged: _Judged, images: _Judged | None, seen: Provenance
) -> AnyModel:
    """Return the model with what was learnt of its patients, whose labels it has now seen."""
    decision = judged.decision()
    if isinstance(model, Model):
        new = _having_seen(model, seen)
        new.decision = decision
        return new
    if isinstance(model, Ensemble):
        members = tuple(_having_seen(each, seen) for each in model.models)
        return replace(model, models=members, recalibration=decision)
    of_images = decision if images is None else images.decision()
    return replace(
        model,
        recalibration={"row": decision, "images": of_images},
        facts=replace(model.facts, provenance=model.facts.provenance | seen),
        held_out={
            "row": judged.held_out(decision),
            "images": (images or judged).held_out(of_images),
        },
    )


def _having_seen(model: Model, seen: Provenance) -> Model:
    new = copy.copy(model)
    new.facts = replace(model.facts, provenance=model.facts.provenance | seen)
    return new
