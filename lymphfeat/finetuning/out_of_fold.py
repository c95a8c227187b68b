"""How members of a k-fold predict as one, learnt from patients that each has not seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.attributes import AttributeRecipe, choose_attributes
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.baselines import Metrics, folds_of, measure_baselines
from lymphfeat.evaluation.calibration import logit
from lymphfeat.evaluation.decision import Decision, cross_fit_decisions
from lymphfeat.evaluation.fusion import FUSIONS, cross_fit_fusion
from lymphfeat.evaluation.intervals import bootstrap_auc_gain
from lymphfeat.evaluation.metrics import brier_score, log_loss
from lymphfeat.evaluation.rows import fused_name
from lymphfeat.evaluation.scores import patient_metrics
from lymphfeat.finetuning.job import Job
from lymphfeat.heads.grid import head_name
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.held_out import HeldOut
from lymphfeat.model.members import Member
from lymphfeat.model.predictions import Predictions
from lymphfeat.model.sources import BackboneSource
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.runtime.progress import Progress, part_of
from lymphfeat.settings import EndToEndSettings, PredictSettings

IMAGES_ALONE = "out of fold, images alone"
_UNDECIDED = Decision()


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """Labelled patients, each predicted by a member that has not seen them, and a decision."""

    # id, label, probability; by the OTHER folds calibrated, threshold and predicted
    patients: pd.DataFrame
    folds: NDArray[np.int64]  # (P,)
    decision: Decision  # learnt on all of these patients; what is kept

    @classmethod
    def of(cls, unseen: pd.DataFrame, splits: Sequence[Split], rule: str) -> "OutOfFold":
        """Decide about `unseen`, with columns id, label and probability."""
        folds = folds_of(unseen["id"].tolist(), splits)
        probability = unseen["probability"].to_numpy(np.float64)
        labels = unseen["label"].to_numpy(np.int64)
        source = f"out-of-fold probabilities of the {len(unseen)} training patients "
        source += f"({len(splits)} folds)"
        found = cross_fit_decisions(probability, labels, folds, rule=rule)
        return cls(
            patients=unseen.assign(
                calibrated=found.calibrated,
                threshold=found.threshold,
                predicted=(probability > found.threshold).astype(np.int64),
            ),
            folds=folds,
            decision=Decision.learn(probability, labels, rule=rule, source=source),
        )

    @property
    def probability(self) -> Floats:
        """The patients' probabilities, before calibration: (P,)."""
        return self.patients["probability"].to_numpy(np.float64)

    @property
    def labels(self) -> Labels:
        """Their labels: (P,)."""
        return self.patients["label"].to_numpy(np.int64)

    def held_out(self, rule: str) -> HeldOut:
        """Return what a model keeps of them, each fold decided by the others."""
        others = [
            Decision.learn(self.probability[other], self.labels[other], rule=rule)
            for other in (self.folds != fold for fold in np.unique(self.folds))
        ]
        kept = [self.decision] * len(others)
        return HeldOut.of(
            *(self.probability, self.labels, self.folds),
            measured_by=others,
            kept=kept,
            ids=self.patients["id"].tolist(),
        )

    def measure(self) -> Metrics:
        """Measure each fold by what the other folds decide."""
        calibrated = self.patients["calibrated"].to_numpy(np.float64)
        return {
            **patient_metrics(self.patients, self.patients["threshold"], self.folds),
            "log_loss_calibrated": float(log_loss(calibrated, self.labels)),
            "brier_calibrated": float(brier_score(calibrated, self.labels)),
        }

    def gain_over(self, other: "OutOfFold") -> Metrics:
        """Return by how much the AUC within folds is larger, with its 95 % interval."""
        gain = bootstrap_auc_gain(self.probability, other.probability, self.labels, self.folds)
        return dict(zip(("auc_gain", "auc_gain_low", "auc_gain_high"), gain, strict=True))

    def beside(self, predictions: Predictions) -> Predictions:
        """Add columns of what is predicted of each labelled patient out of fold."""
        judged, ids = self.patients.set_index("id"), predictions.patients["id"]
        patients = predictions.patients.assign(
            out_of_fold=ids.map(judged["probability"]),
            out_of_fold_calibrated=ids.map(judged["calibrated"]),
            out_of_fold_predicted=ids.map(judged["predicted"]).astype("Int64"),
        )
        return replace(predictions, patients=patients)


def read_attributes(cohort: Cohort, settings: EndToEndSettings) -> AttributeRecipe:
    """Return how the clinical attributes of a cohort are read.

    Raises SettingsError for a column that does not exist, a number without a logarithm, and a
    fusion without attributes.
    """
    table = cohort.labelled().table
    names = choose_attributes(table, settings.attributes)
    if settings.fusion and not names:
        raise SettingsError(
            f"fusion (={settings.fusion}) must have clinical attributes to fuse with; the cohort's "
            "table has none. Add columns to it, or leave out --fusion."
        )
    recipe = AttributeRecipe.of(table, names, settings.log_attributes)
    recipe.matrix(cohort.table)
    return recipe


# --- images alone --------------------------------------------------------------------------------


def finish_members(
    jobs: Sequence[Job], cohort: Cohort, progress: Progress
) -> tuple[Ensemble, Predictions]:
    """Decide by out-of-fold probabilities, and measure each fold by what the others decide."""
    splits, settings = [job.split for job in jobs], jobs[0].settings
    members = Ensemble(tuple(job.model for job in jobs))
    # In float32, whatever trained them: what `lymphfeat predict` says of the same patients.
    predicted = members.predict_each(
        cohort, PredictSettings(device=settings.device), progress=progress
    )
    unseen = pd.concat(
        part.patients[part.patients["id"].isin(split.validation)]
        for part, split in zip(predicted, splits, strict=True)
    )
    found = OutOfFold.of(unseen, splits, settings.threshold)
    for model in members.models:
        model.decision = found.decision
    metrics = {"out of fold": found.measure(), **_baselines(found, cohort, jobs)}
    return replace(members, metrics=metrics), found.beside(members.average(predicted))


def _baselines(found: OutOfFold, cohort: Cohort, jobs: Sequence[Job]) -> dict[str, Metrics]:
    return measure_baselines(
        found.patients,
        cohort.labelled(),
        [job.split for job in jobs],
        rule=jobs[0].settings.threshold,
        recipe=read_attributes(cohort, jobs[0].settings),
    )


# --- fused with the clinical attributes ----------------------------------------------------------


def finish_fused(
    jobs: Sequence[Job], cohort: Cohort, progress: Progress
) -> tuple[FinalModel, Predictions]:
    """Fuse members with the attributes, by a fusion learnt from out-of-fold image logits.

    Each fold is measured by the fusion, calibration and threshold of the others.
    """
    splits, settings = [job.split for job in jobs], jobs[0].settings
    assert settings.fusion is not None
    recipe, scoring = read_attributes(cohort, settings), PredictSettings(device=settings.device)
    images = OutOfFold.of(
        _predict_unseen(jobs, cohort, scoring, part_of(progress, 0, 2, "out of fold")),
        splits,
        settings.threshold,
    )
    attributes = recipe.matrix(cohort.table.loc[images.patients["id"]])  # (P, D)
    inputs = np.column_stack([logit(images.probability), attributes])  # (P, 1 + D)
    fused = cross_fit_fusion(settings.fusion, inputs, images.labels, images.folds)
    found = OutOfFold.of(images.patients.assign(probability=fused), splits, settings.threshold)
    metrics = {
        "out of fold": found.measure(),
        IMAGES_ALONE: {**images.measure(), **found.gain_over(images)},
        **_baselines(found, cohort, jobs),
    }
    head = Member(
        heads=(),
        fusion=FUSIONS[settings.fusion](inputs, images.labels),
        decision=found.decision,
        image_decision=images.decision,
    )
    model = FinalModel(
        row=fused_name(_head_names(jobs), settings.fusion),
        sources=tuple(_source(job) for job in jobs),
        members=tuple(
            replace(head, heads=(job.model.head,), sources=(number,))
            for number, job in enumerate(jobs)
        ),
        attributes=recipe,
        facts=replace(_facts(jobs), metrics=metrics),
        figures={"row": metrics["out of fold"], "images": metrics[IMAGES_ALONE]},
        held_out={
            "row": found.held_out(settings.threshold),
            "images": images.held_out(settings.threshold),
        },
        tta=settings.tta,
    )
    own = part_of(progress, 1, 2, "predicting")
    return model, found.beside(model.predict(cohort, scoring, progress=own))


def _predict_unseen(
    jobs: Sequence[Job], cohort: Cohort, settings: PredictSettings, progress: Progress
) -> pd.DataFrame:
    """Predict each fold from images alone, uncalibrated, as its member of the final model does."""
    parts = []
    for number, job in enumerate(jobs):
        alone = FinalModel(
            row=job.split.id,
            sources=(_source(job),),
            members=(
                Member(heads=(job.model.head,), decision=_UNDECIDED, image_decision=_UNDECIDED),
            ),
            attributes=AttributeRecipe(()),
            facts=job.model.facts,
            tta=job.settings.tta,
        )
        unseen, own = cohort.select(job.split.validation), part_of(progress, number, len(jobs), "")
        parts.append(alone.predict(unseen, settings, progress=own).patients)
    return pd.concat(parts)


def _head_names(jobs: Sequence[Job]) -> str:
    """Name the members' heads; those that start from different heads of a run may differ."""
    return " / ".join(dict.fromkeys(head_name(job.model.head_settings) for job in jobs))


def _source(job: Job) -> BackboneSource:
    return BackboneSource(backbone=job.model.backbone, recipe=job.model.recipe)


def _facts(jobs: Sequence[Job]) -> TrainingFacts:
    """Return what all members together have seen, and otherwise the facts of the first."""
    facts = [job.model.facts for job in jobs]
    provenance = facts[0].provenance
    for each in facts[1:]:
        provenance |= each.provenance
    ids = dict.fromkeys(id for each in facts for id in each.trained_on)
    return replace(facts[0], trained_on=tuple(ids), validated_on=(), provenance=provenance)
