"""End-to-end training of a final model, or of the members of a k-fold: cohort -> model folder."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
from lymphfeat.evaluation.leakage import find_shared_crops, refuse_shared_images
from lymphfeat.evaluation.metrics import brier_score, log_loss
from lymphfeat.evaluation.scores import patient_metrics
from lymphfeat.finetuning.curves import CURVES, Row, write_curves
from lymphfeat.finetuning.job import Job, Parts, hold_out, parts_of, prepare
from lymphfeat.finetuning.loop import decode, fit
from lymphfeat.finetuning.pixels import PixelCache
from lymphfeat.heads.grid import require_linear, resolve
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
from lymphfeat.runtime.checkpoint import CHECKPOINT_FILE, Checkpoint
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.runtime.files import ResultKind, result_folder, unfinished_folder
from lymphfeat.runtime.processes import is_first, join_processes
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.settings import EndToEndSettings

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
    folds: int | None,
    force: bool = ...,
    submission_header: str = ...,
    progress: Progress = ...,
) -> Model | Ensemble: ...
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
    """Train a backbone and its head together; write the model and its predictions to folder `out`.

    With `folds` trains one member without each fold of the labelled patients and averages them (see
    `train_folds`); otherwise one model (see `train_end_to_end`). `settings` has defaults. Raises
    SettingsError, ModelError, CohortError and LeakageError as those do.
    """
    train_one_or_all = train_end_to_end if folds is None else partial(train_folds, folds=folds)
    return train_one_or_all(
        cohort,
        settings or EndToEndSettings(),
        Path(out),
        force=force,
        submission_header=submission_header,
        progress=progress,
    )


def train_end_to_end(
    cohort: Cohort,
    settings: EndToEndSettings,
    out: Path,
    *,
    force: bool = False,
    submission_header: str = HEADERS[0],
    progress: Progress = silent,
) -> Model:
    """Train on a cohort's labelled patients; write the model and all it predicts to folder `out`.

    Writes model.safetensors, model.json, predictions.csv, images.csv, curves.csv, curves.png and,
    when there are unlabelled patients, submission.csv; the folder is replaced as a whole, at the
    end. An interrupted run with the same settings goes on from its last checkpoint and ends (on a
    CPU) with the same bits. Under torchrun every step's images are shared out over the processes,
    and the first one writes.

    Raises SettingsError when a model is in `out` and `force` is not set, or anything else, and for
    the threshold `best-ba`; ModelError when an unfinished training of other settings is there and
    `force` is not set; CohortError unless patients of both classes are labelled; LeakageError when
    a training and a held-out patient share an image.
    """
    settings = replace(settings, head=resolve(settings.head))
    require_linear(settings.head)
    if settings.threshold == BEST_BA:
        refuse_best_ba()
    parts = hold_out(cohort, settings)
    join_processes()
    resumes = (CHECKPOINT_FILE,)
    with (
        result_folder(out, MODEL, force=force, resumes=resumes, writes=is_first()) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
    ):
        job = prepare(cohort, parts, settings)
        checkpoint = Checkpoint(
            unfinished_folder(out) / CHECKPOINT_FILE,
            job.identity,
            job.model.facts.provenance.to_json(),
        )
        if is_first():
            checkpoint.check(force=force)  # before images are decoded
        labelled = cohort.labelled()
        pixels = decode(labelled, job, progress)
        splits = [_split_of(parts)] if parts.validation else []
        if splits and not settings.allow_shared_images:
            refuse_shared_images(splits, find_shared_crops(pixels.crops(), labelled))
        history = fit(job, pixels, labelled, checkpoint, progress)
        if not is_first():
            return job.model
        # In float32, whatever trained it: what `lymphfeat predict` says of the same patients.
        predicting = part_of(progress, 0, 1, "predicting")
        predictions = job.model.predict(cohort, device=settings.device, progress=predicting)
        job.model.decision = _decide(predictions.patients, parts, settings.threshold)
        predictions = predictions.decided(job.model.decision)
        patients = _mark(predictions.patients, parts)
        metrics = job.model.measure(patients)
        if splits:
            held_out = patients[patients["split"] == "validation"]
            metrics |= measure_baselines(held_out, labelled, splits, rule=settings.threshold)
        job.model.facts = replace(job.model.facts, metrics=metrics)
        _write(folder, job.model, replace(predictions, patients=patients), history)
        if cohort.submission_ids:
            write_submission(
                patients, cohort.submission_ids, folder / SUBMISSION_FILE, submission_header
            )
    return job.model


def _decide(patients: pd.DataFrame, parts: Parts, rule: str) -> Decision:
    fitted = patients.loc[patients["id"].isin(parts.train.ids), "probability"]
    return Decision.of_fitted(fitted.to_numpy(np.float64), rule=rule)


def _split_of(parts: Parts) -> Split:
    assert parts.validation is not None
    return Split(
        id="validation", seed=0, repeat=0, train=parts.train.ids, validation=parts.validation.ids
    )


def _mark(patients: pd.DataFrame, parts: Parts) -> pd.DataFrame:
    """Add the column `split`: train, validation, or unlabelled."""
    role = dict.fromkeys(parts.train.ids, "train")
    if parts.validation is not None:
        role |= dict.fromkeys(parts.validation.ids, "validation")
    marked = patients.copy()
    marked.insert(2, "split", [role.get(id, "unlabelled") for id in patients["id"]])
    return marked


def _write(folder: Path, model: Model, predictions: Predictions, history: list[Row]) -> None:
    predictions.save(folder / PATIENTS_FILE, folder / IMAGES_FILE)
    write_curves(history, folder)
    draw_curves(history, folder)
    model.save(folder)


def train_folds(
    cohort: Cohort,
    settings: EndToEndSettings,
    out: Path,
    *,
    folds: int,
    force: bool = False,
    submission_header: str = HEADERS[0],
    progress: Progress = silent,
) -> Ensemble:
    """Train a member without each fold of the labelled patients; write all they predict to `out`.

    Writes the members' folders, predictions.csv (the members' mean and spread; `out_of_fold` is the
    probability by the member that has not seen a labelled patient, `out_of_fold_calibrated` and
    `out_of_fold_predicted` what the other folds make of it), images.csv, submission.csv, the mean
    curves and members.json. Interrupted, it goes on when called again. Raises as
    `train_end_to_end`, and LeakageError when patients of different folds share an image.
    """
    settings = replace(settings, head=resolve(settings.head), validation=0.0)
    require_linear(settings.head)
    labelled = cohort.labelled()
    (repeat,) = kfold_splits(
        labelled.ids, labelled.labels, folds=folds, seeds=1, seed=settings.seed
    )
    join_processes()
    resumes = [_checkpoint_file(number) for number in range(folds)]
    with (
        result_folder(out, MODEL, force=force, resumes=resumes, writes=is_first()) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
    ):
        jobs, histories = _train_members(
            cohort, labelled, repeat.outer, settings, out, force, progress
        )
        members = Ensemble(tuple(job.model for job in jobs))
        if not is_first():
            return members
        # In float32, whatever trained it: what `lymphfeat predict` says of the same patients.
        predicting = part_of(progress, 0, 1, "predicting")
        predicted = members.predict_each(cohort, device=settings.device, progress=predicting)
        unseen = pd.concat(
            part.patients[part.patients["id"].isin(split.validation)]
            for part, split in zip(predicted, repeat.outer, strict=True)
        )
        held_out = folds_of(unseen["id"].tolist(), repeat.outer)
        decision, out_of_fold = _decide_out_of_fold(unseen, held_out, settings.threshold)
        for number, (model, history) in enumerate(zip(members.models, histories, strict=True)):
            model.decision = decision
            write_curves(history, folder / member_name(number))
        predictions = members.average(predicted)
        _write_members(folder, cohort, predictions, out_of_fold, histories, submission_header)
        metrics = {
            "out of fold": _measure(out_of_fold, held_out),
            **measure_baselines(out_of_fold, labelled, repeat.outer, rule=settings.threshold),
        }
        members = replace(members, metrics=metrics)
        members.save(folder)
    return members


def _checkpoint_file(number: int) -> str:
    return f"fold-{number}.pt"


def _train_members(
    cohort: Cohort,
    labelled: Cohort,
    splits: Sequence[Split],
    settings: EndToEndSettings,
    out: Path,
    force: bool,
    progress: Progress,
) -> tuple[list[Job], list[list[Row]]]:
    """Train the members one after the other; a finished one is read from its last checkpoint."""
    pixels: PixelCache | None = None
    jobs, histories = [], []
    for number, split in enumerate(splits):
        job = prepare(cohort, parts_of(labelled, split), settings)
        checkpoint = Checkpoint(
            unfinished_folder(out) / _checkpoint_file(number),
            job.identity,
            job.model.facts.provenance.to_json(),
        )
        if is_first():
            checkpoint.check(force=force)
        if pixels is None:
            pixels = decode(labelled, job, progress)
            if not settings.allow_shared_images:
                refuse_shared_images(splits, find_shared_crops(pixels.crops(), labelled))
        own = part_of(progress, number, len(splits), f"fold {number + 1}/{len(splits)}")
        histories.append(fit(job, pixels, labelled, checkpoint, own))
        job.model.backbone.to("cpu")
        jobs.append(job)
    return jobs, histories


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


def _write_members(
    folder: Path,
    cohort: Cohort,
    predictions: Predictions,
    out_of_fold: pd.DataFrame,
    histories: Sequence[Sequence[Row]],
    header: str,
) -> None:
    judged = out_of_fold.set_index("id")
    patients = predictions.patients.copy()
    patients["out_of_fold"] = patients["id"].map(judged["probability"])
    patients["out_of_fold_calibrated"] = patients["id"].map(judged["calibrated"])
    called = patients["id"].map(judged["predicted"])
    patients["out_of_fold_predicted"] = called.astype("Int64")
    replace(predictions, patients=patients).save(folder / PATIENTS_FILE, folder / IMAGES_FILE)
    if cohort.submission_ids:
        write_submission(patients, cohort.submission_ids, folder / SUBMISSION_FILE, header)
    means = [
        {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        for rows in zip(*histories, strict=True)
    ]
    write_curves(means, folder)
    draw_curves(means, folder)
