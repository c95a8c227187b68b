"""End-to-end training of a final model, or of the members of a k-fold: cohort -> model folder."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import overload

import numpy as np

from lymphfeat import __version__
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split, kfold_splits
from lymphfeat.evaluation.baselines import measure_baselines
from lymphfeat.evaluation.decision import BEST_BA, Decision, refuse_best_ba
from lymphfeat.finetuning.curves import CURVES, EpochRow, mean_curves, write_curves
from lymphfeat.finetuning.job import Job, hold_out
from lymphfeat.finetuning.out_of_fold import finish_fused, finish_members, read_attributes
from lymphfeat.finetuning.per_split import SplitTraining
from lymphfeat.model.ensemble import MEMBERS_FILE, Ensemble, member_name
from lymphfeat.model.final_model import TENSORS_FILE, FinalModel
from lymphfeat.model.model import FACTS_FILE, FINAL_FILE, WEIGHTS_FILE, Model
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
from lymphfeat.runtime.circumstances import circumstances
from lymphfeat.runtime.devices import (
    choose_device,
    cpu_threads,
    deterministic,
    whole_float32,
)
from lymphfeat.runtime.files import ResultKind, result_folder, unfinished_folder
from lymphfeat.runtime.processes import count, is_first, join_processes
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import EndToEndSettings, PredictSettings, require

# What is needed to train the same again, except the place of the images: no part of the model.
TRAINING_FILE, TRAINING_FORMAT, TRAINING_VERSION = "training.json", "lymphfeat-training", 1
_ONE = (FACTS_FILE, WEIGHTS_FILE, *CURVES)
MODEL = ResultKind(
    name="model",
    marks=(FACTS_FILE, MEMBERS_FILE, FINAL_FILE),
    files=(
        *(*_ONE, PATIENTS_FILE, IMAGES_FILE, SUBMISSION_FILE, TRAINING_FILE),
        *(MEMBERS_FILE, FINAL_FILE, TENSORS_FILE, *(f"fold-*/{name}" for name in _ONE)),
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
) -> Ensemble | FinalModel: ...
def train(
    cohort: Cohort,
    out: str | os.PathLike[str],
    settings: EndToEndSettings | None = None,
    *,
    folds: int | None = None,
    force: bool = False,
    submission_header: str = HEADERS[0],
    progress: Progress = silent,
) -> Model | Ensemble | FinalModel:
    """Train backbone and head together; write the model and its predictions to the folder `out`.

    Without `folds` one model is trained on the labelled patients, except those of
    `settings.validation`. With `folds` one member is trained without each fold of them; the members
    predict as one, and threshold and calibration come from out-of-fold probabilities. With
    `settings.fusion` they are fused with the clinical attributes, and become a `FinalModel`.

    Writes the model or members, predictions.csv, images.csv, curves.csv, curves.png, training.json
    (what `rerun` needs) and, when there are unlabelled patients, submission.csv. For members,
    predictions.csv has their spread, and `out_of_fold`: the probability by the member that has not
    seen a labelled patient; `out_of_fold_calibrated` and `out_of_fold_predicted` are what the other
    folds make of it. The folder is replaced as a whole, at the end. An interrupted training resumes
    when called again.

    Raises SettingsError when `out` holds a model and `force` is not set, or anything else, for the
    threshold `best-ba` and a fusion without folds, for `validation` with folds, and for attributes
    that the cohort's table does not have; ModelError when an unfinished training of other settings
    exists and `force` is not set; CohortError unless patients of both classes are labelled;
    LeakageError when a training and a held-out patient share an image.

    >>> settings = lf.EndToEndSettings(backbone=lf.BackboneSettings(crop=64), epochs=1)
    >>> lf.train(lf.Cohort.load("cohort"), "model", settings).threshold
    """
    out, settings = Path(out), settings or EndToEndSettings()
    if folds is None:
        splits, resumes = [_hold_out(cohort, settings)], [CHECKPOINT_FILE]
    else:
        splits = _fold_splits(cohort, folds, settings)
        resumes = [f"{split.id}.pt" for split in splits]
    read_attributes(cohort, settings)  # refused before anything is trained
    training = SplitTraining(cohort, splits, settings, force=force, progress=progress)
    join_processes()
    with (
        result_folder(out, MODEL, force=force, resumes=resumes, writes=is_first()) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
        deterministic(choose_device(settings.device), wanted=settings.deterministic),
    ):
        jobs = [training.prepare(split) for split in splits]
        checkpoints = [unfinished_folder(out) / name for name in resumes]
        curves = [training.train(*each) for each in zip(jobs, checkpoints, strict=True)]
        trained: Model | Ensemble | FinalModel = (
            jobs[0].model if folds is None else Ensemble(tuple(job.model for job in jobs))
        )
        if is_first():
            with_folds = finish_fused if settings.fusion else finish_members
            finish = _finish_model if folds is None else with_folds
            trained, predictions = finish(jobs, cohort, part_of(progress, 0, 1, "predicting"))
            _write(folder, trained, predictions, curves)
            _record(folder, cohort, settings, folds, submission_header)
            if cohort.submission_ids:
                ids, path = cohort.submission_ids, folder / SUBMISSION_FILE
                write_submission(predictions.patients, ids, path, submission_header)
    return trained


def _hold_out(cohort: Cohort, settings: EndToEndSettings) -> Split:
    require(
        settings.fusion is None,
        f"fusion (={settings.fusion}) must be learnt from out-of-fold image logits; a single model "
        "has none. Train with --folds.",
    )
    if settings.threshold == BEST_BA:
        refuse_best_ba()
    return hold_out(cohort, settings)


def _fold_splits(cohort: Cohort, folds: int, settings: EndToEndSettings) -> list[Split]:
    """Hold out each fold of the labelled patients, stratified, under the member's name."""
    require(
        not settings.validation,
        f"validation (={settings.validation}) must not go with folds (={folds}), each of which is "
        "held out once already. Leave out one of the two.",
    )
    labelled, seed = cohort.labelled(), settings.seed
    (repeat,) = kfold_splits(labelled.ids, labelled.labels, folds=folds, seeds=1, seed=seed)
    return [replace(split, id=member_name(fold)) for fold, split in enumerate(repeat.outer)]


def _write(
    folder: Path,
    trained: Model | Ensemble | FinalModel,
    predictions: Predictions,
    curves: Sequence[Sequence[EpochRow]],
) -> None:
    trained.save(folder)
    predictions.save(folder / PATIENTS_FILE, folder / IMAGES_FILE)
    mean = mean_curves(curves)
    write_curves(mean, folder)
    draw_curves(mean, folder)
    if len(curves) > 1:
        for number, rows in enumerate(curves):
            write_curves(rows, folder / member_name(number))


def _record(
    folder: Path, cohort: Cohort, settings: EndToEndSettings, folds: int | None, header: str
) -> None:
    """Write what a repeat needs, and where and with what was trained."""
    content = {
        "format": TRAINING_FORMAT,
        "format_version": TRAINING_VERSION,
        "lymphfeat": __version__,
        "settings": asdict(settings),
        "folds": folds,
        "submission_header": header,
        "reading": dict(cohort.reading),
        "computed": {**circumstances(choose_device(settings.device)), "processes": count()},
    }
    (folder / TRAINING_FILE).write_text(json_text(content, indent=1), encoding="utf-8")


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
        recipe = read_attributes(cohort, settings)
        metrics |= measure_baselines(
            held_out, labelled, [job.split], rule=settings.threshold, recipe=recipe
        )
    model.facts = replace(model.facts, metrics=metrics)
    return model, replace(predictions, patients=patients)
