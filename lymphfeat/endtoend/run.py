"""A whole end-to-end run: cohort -> trained model, its predictions, curves and submission."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from lymphfeat.checkpoint import CHECKPOINT_FILE, Checkpoint
from lymphfeat.cohort import Cohort
from lymphfeat.compute import cpu_threads, whole_float32
from lymphfeat.decision import BEST_BA, Decision, refuse_best_ba
from lymphfeat.endtoend.baselines import measure_baselines
from lymphfeat.endtoend.curves import Row, draw_curves, write_curves
from lymphfeat.endtoend.fitting import decode, fit
from lymphfeat.endtoend.folder import MODEL
from lymphfeat.endtoend.job import Parts, hold_out, prepare
from lymphfeat.endtoend.submission import (
    HEADERS,
    IMAGES_FILE,
    PATIENTS_FILE,
    SUBMISSION_FILE,
    write_submission,
)
from lymphfeat.files import result_folder, unfinished_folder
from lymphfeat.guards import find_shared_crops, refuse_shared_images
from lymphfeat.heads import require_linear, resolve
from lymphfeat.model import Model, Predictions
from lymphfeat.processes import is_first, join_processes
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import EndToEndSettings
from lymphfeat.splits import Split


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
            unfinished_folder(out) / CHECKPOINT_FILE, job.identity, job.model.facts.provenance
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
        predictions = job.model.predict(cohort, device=settings.device, progress=progress)
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
