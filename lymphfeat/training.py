"""End-to-end training of a final model, or of the members of a k-fold: cohort -> model folder."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split, kfold_splits
from lymphfeat.evaluation.baselines import folds_of, measure_baselines
from lymphfeat.evaluation.decision import (
    BEST_BA,
    Decision,
    cross_fit_decisions,
    refuse_best_ba,
)
from lymphfeat.evaluation.metrics import brier_score, log_loss
from lymphfeat.evaluation.scores import patient_metrics
from lymphfeat.finetuning.curves import CURVES, EpochRow, mean_curves, write_curves
from lymphfeat.finetuning.job import Job, hold_out
from lymphfeat.finetuning.per_split import SplitTraining
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble, member_name
from lymphfeat.model.model import FACTS_FILE, WEIGHTS_FILE, Model
from lymphfeat.model.predictions import Predictions
from lymphfeat.model.submission import (
    HEADERS,
    IMAGES_FILE,
    PATIENTS_FILE,
    SUBMISSION_FILE,
    write_submission,
)
from lymphfeat.plots.learning_curves import draw_curves
from lymphfeat.runtime.checkpoint import CHECKPOINT_FILE
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import ResultKind, result_folder, unfinished_folder
from lymphfeat.runtime.processes import is_first, join_processes
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.settings import EndToEndSettings, PredictSettings

_ONE = (FACTS_FILE, WEIGHTS_FILE, *CURVES)
MODEL = ResultKind(
    name="model",
    marks=(FACTS_FILE, MEMBERS_FILE),
    files=(
        *(*_ONE, PATIENTS_FILE, IMAGES_FILE, SUBMISSION_FILE),
        *(MEMBERS_FILE, *(f"fold-*/{name}" for name in _ONE)),
    ),
)


@overload
def train(
    cohort: Cohort,
    out: str | os.PathLike[str],
    settings: EndToEndSettings | None = ...,
    *,
    folds: None = ...,
    force: bool = ...,
    submission_header: str = ...,
    progress: Progress = ...,
) -> Model: ...
@overload
def train(
    cohort: Cohort,
    out: str | os.PathLike[str],
    settings: EndToEndSettings | None = ...,
    *,
    folds: int,
    force: bool = ...,
    submission_header: str = ...,
    progress: Progress = ...,
) -> Ensemble: ...
def train(
    cohort: Cohort,
    out: str | os.PathLike[str],
    settings: EndToEndSettings | None = None,
    *,
    folds: int | None = None,
    force: bool = False,
    submission_header: str = HEADERS[0],
    progress: Progress = silent,
) -> Model | Ensemble:
    """Train backbone and head together; write the model and its predictions to the folder `out`.

    Without `folds` one model is trained on the labelled patients, except those of
    `settings.validation`. With `folds` one member is trained without each fold of them; the members
    predict as one, and threshold and calibration come from out-of-fold probabilities.

    Writes the model or members, predictions.csv, images.csv, curves.csv, curves.png and, when there
    are unlabelled patients, submission.csv. For members, predictions.csv has their spread, and
    `out_of_fold`: the probability by the member that has not seen a labelled patient;
    `out_of_fold_calibrated` and `out_of_fold_predicted` are what the other folds make of it. The
    folder is replaced as a whole, at the end. An interrupted training resumes when called again.

    Raises SettingsError when `out` holds a model and `force` is not set, or anything else, and for
    the threshold `best-ba` without folds; ModelError when an unfinished training of other settings
    exists and `force` is not set; CohortError unless patients of both classes are labelled;
    LeakageError when a training and a held-out patient share an image.

    >>> settings = lf.EndToEndSettings(backbone=lf.BackboneSettings(crop=64), epochs=1)
    >>> lf.train(lf.Cohort.load("cohort"), "model", settings).threshold
    """
    out, settings = Path(out), settings or EndToEndSettings()
    if folds is None:
        splits, resumes = [_hold_out(cohort, settings)], [CHECKPOINT_FILE]
    else:
        settings = replace(settings, validation=0.0)
        splits = _fold_splits(cohort, folds, settings.seed)
        resumes = [f"{split.id}.pt" for split in splits]
    training = SplitTraining(cohort, splits, settings, force=force, progress=progress)
    join_processes()
    with (
        result_folder(out, MODEL, force=force, resumes=resumes, writes=is_first()) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
    ):
        jobs = [training.prepare(split) for split in splits]
        checkpoints = [unfinished_folder(out) / name for name in resumes]
        curves = [training.train(*each) for each in zip(jobs, checkpoints, strict=True)]
        trained = jobs[0].model if folds is None else Ensemble(tuple(job.model for job in jobs))
        if is_first():
            finish = _finish_model if folds is None else _finish_members
            trained, predictions = finish(jobs, cohort, part_of(progress, 0, 1, "predicting"))
            _write(folder, trained, predictions, curves)
            if cohort.submission_ids:
                ids, path = cohort.submission_ids, folder / SUBMISSION_FILE
                write_submission(predictions.patients, ids, path, submission_header)
    return trained


def _hold_out(cohort: Cohort, settings: EndToEndSettings) -> Split:
    if settings.threshold == BEST_BA:
        refuse_best_ba()
    return hold_out(cohort, settings)


def _fold_splits(cohort: Cohort, folds: int, seed: int) -> list[Split]:
    """Hold out each fold of the labelled patients, stratified, under the member's name."""
    labelled = cohort.labelled()
    (repeat,) = kfold_splits(labelled.ids, labelled.labels, folds=folds, seeds=1, seed=seed)
    return [replace(split, id=member_name(fold)) for fold, split in enumerate(repeat.outer)]


def _write(
    folder: Path,
    trained: Model | Ensemble,
    predictions: Predictions,
    curves: Sequence[Sequence[EpochRow]],
) -> None:
    trained.save(folder)
    predictions.save(folder / PATIENTS_FILE, folder / IMAGES_FILE)
    mean = mean_curves(curves)
    write_curves(mean, folder)
    draw_curves(mean, folder)
    if isinstance(trained, Ensemble):
        for number, rows in enumerate(curves):
            write_curves(rows, folder / member_name(number))


# --- one model -----------------------------------------------------------------------------------


def _finish_model(
    jobs: Sequence[Job], cohort: Cohort, progress: Progress
) -> tuple[Model, Predictions]:
    """Decide by the training patients, as the model fits them, and measure what it predicts."""
    (job,) = jobs
    model, settings = job.model, job.settings
    # In float32, whatever trained it: what `lymphfeat predict` says of the same patients.
    predictions = model.predict(cohort, PredictSettings(device=settings.device), progress=progress)
    role = dict.fromkeys(job.split.train, "train")
    role |= dict.fromkeys(job.split.validation, "validation")
    parts = predictions.patients["id"].map(role).fillna("unlabelled")
    fitted = predictions.patients.loc[parts == "train", "probability"].to_numpy(np.float64)
    model.decision = Decision.of_fitted(fitted, rule=settings.threshold)
    patients = predictions.decided(model.decision).patients
    patients.insert(2, "split", parts)
    metrics = model.measure(patients)
    if job.validation is not None:
        held_out, labelled = patients[parts == "validation"], cohort.labelled()
        metrics |= measure_baselines(held_out, labelled, [job.split], rule=settings.threshold)
    model.facts = replace(model.facts, metrics=metrics)
    return model, replace(predictions, patients=patients)


# --- members of a k-fold -------------------------------------------------------------------------


def _finish_members(
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
    folds = folds_of(unseen["id"].tolist(), splits)
    decision, out_of_fold = _decide_out_of_fold(unseen, folds, settings.threshold)
    for model in members.models:
        model.decision = decision
    metrics = {
        "out of fold": _measure(out_of_fold, folds),
        **measure_baselines(out_of_fold, cohort.labelled(), splits, rule=settings.threshold),
    }
    predictions = _with_out_of_fold(members.average(predicted), out_of_fold)
    return replace(members, metrics=metrics), predictions


def _decide_out_of_fold(
    unseen: pd.DataFrame, folds: NDArray[np.int64], rule: str
) -> tuple[Decision, pd.DataFrame]:
    """Learn the decision kept on all patients, and decide each fold by the others to measure it.

    Returns `unseen` with the calibrated probability, threshold and prediction of each patient.
    """
    probability = unseen["probability"].to_numpy(np.float64)
    labels = unseen["label"].to_numpy(np.int64)
    decision = Decision.learn(
        probability,
        labels,
        rule=rule,
        source=f"out-of-fold probabilities of the {len(unseen)} training patients "
        f"({len(np.unique(folds))} folds)",
    )
    found = cross_fit_decisions(probability, labels, folds, rule=rule)
    return decision, unseen.assign(
        calibrated=found.calibrated,
        threshold=found.threshold,
        predicted=(probability > found.threshold).astype(np.int64),
    )


def _measure(out_of_fold: pd.DataFrame, folds: NDArray[np.int64]) -> dict[str, float | None]:
    labels = out_of_fold["label"].to_numpy(np.int64)
    calibrated = out_of_fold["calibrated"].to_numpy(np.float64)
    return {
        **patient_metrics(out_of_fold, out_of_fold["threshold"], folds),
        "log_loss_calibrated": float(log_loss(calibrated, labels)),
        "brier_calibrated": float(brier_score(calibrated, labels)),
    }


def _with_out_of_fold(predictions: Predictions, out_of_fold: pd.DataFrame) -> Predictions:
    """Add columns of what is predicted of each labelled patient out of fold."""
    judged, ids = out_of_fold.set_index("id"), predictions.patients["id"]
    patients = predictions.patients.assign(
        out_of_fold=ids.map(judged["probability"]),
        out_of_fold_calibrated=ids.map(judged["calibrated"]),
        out_of_fold_predicted=ids.map(judged["predicted"]).astype("Int64"),
    )
    return replace(predictions, patients=patients)
