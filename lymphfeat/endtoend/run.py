"""A whole end-to-end run: cohort -> trained model, its predictions, curves and submission."""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from lymphfeat.checkpoint import Checkpoint
from lymphfeat.cohort import Cohort
from lymphfeat.compute import cpu_threads
from lymphfeat.endtoend.baselines import measure_baselines
from lymphfeat.endtoend.curves import CURVES, Row, draw_curves, write_curves
from lymphfeat.endtoend.fitting import decode, fit
from lymphfeat.endtoend.job import Parts, hold_out, prepare
from lymphfeat.endtoend.submission import (
    HEADERS,
    IMAGES_FILE,
    PATIENTS_FILE,
    SUBMISSION_FILE,
    write_submission,
)
from lymphfeat.errors import ModelError
from lymphfeat.guards import find_shared_crops, refuse_shared_images
from lymphfeat.heads import require_linear, resolve
from lymphfeat.model import (
    CHECKPOINT_FILE,
    FACTS_FILE,
    WEIGHTS_FILE,
    Model,
    Predictions,
)
from lymphfeat.processes import is_first, join_processes
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import EndToEndSettings
from lymphfeat.splits import Split

OUTPUTS = (
    FACTS_FILE,
    WEIGHTS_FILE,
    PATIENTS_FILE,
    IMAGES_FILE,
    SUBMISSION_FILE,
    *CURVES,
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
    when there are unlabelled patients, submission.csv. An interrupted run with the same settings
    goes on from its last checkpoint and ends (on a CPU) with the same bits. Under torchrun every
    step's images are shared out over the processes, and the first one writes.

    Raises ModelError when a finished model, or an unfinished one of other settings, is in `out` and
    `force` is not set; CohortError unless patients of both classes are labelled; LeakageError when
    a training and a held-out patient share an image.
    """
    settings = replace(settings, head=resolve(settings.head))
    require_linear(settings.head)
    parts = hold_out(cohort, settings)
    join_processes()
    with cpu_threads(settings.threads):
        job = prepare(cohort, parts, settings)
        checkpoint = Checkpoint(out / CHECKPOINT_FILE, job.identity, job.model.facts.provenance)
        if is_first():
            _make_way(out, checkpoint, force=force)
        labelled = cohort.labelled()
        pixels = decode(labelled, job, progress)
        splits = [_split_of(parts)] if parts.validation else []
        if splits and not settings.allow_shared_images:
            refuse_shared_images(splits, find_shared_crops(pixels.crops(), labelled))
        history = fit(job, pixels, labelled, checkpoint, progress)
        if not is_first():
            return job.model
        predictions = job.model.predict(
            cohort, device=settings.device, precision=settings.precision, progress=progress
        )
    patients = _mark(predictions.patients, parts)
    metrics = job.model.measure(patients)
    if splits:
        held_out = patients[patients["split"] == "validation"]
        metrics |= measure_baselines(held_out, labelled, splits, threshold=job.model.threshold)
    job.model.facts = replace(job.model.facts, metrics=metrics)
    _write(out, job.model, replace(predictions, patients=patients), history)
    if cohort.submission_ids:
        write_submission(patients, cohort.submission_ids, out / SUBMISSION_FILE, submission_header)
    checkpoint.remove()
    return job.model


def _split_of(parts: Parts) -> Split:
    assert parts.validation is not None
    return Split(
        id="validation", seed=0, repeat=0, train=parts.train.ids, validation=parts.validation.ids
    )


def _make_way(out: Path, checkpoint: Checkpoint, *, force: bool) -> None:
    """Refuse to touch another run's results, or remove them by force."""
    if out.exists() and not out.is_dir():
        raise ModelError(f"out (={out}) must be a folder; got a file. Choose another --out.")
    if force:
        _discard(out, checkpoint)
    elif not checkpoint.path.exists() and (out / FACTS_FILE).exists():
        raise ModelError(
            f"{out}: a finished model is there; choose another --out, or train anew with --force."
        )
    checkpoint.read()


def _discard(out: Path, checkpoint: Checkpoint) -> None:
    """Remove results, and a checkpoint unless it is this very run's."""
    checkpoint.discard_another()
    for name in OUTPUTS:
        (out / name).unlink(missing_ok=True)


def _mark(patients: pd.DataFrame, parts: Parts) -> pd.DataFrame:
    """Add the column `split`: train, validation, or unlabelled."""
    role = dict.fromkeys(parts.train.ids, "train")
    if parts.validation is not None:
        role |= dict.fromkeys(parts.validation.ids, "validation")
    marked = patients.copy()
    marked.insert(2, "split", [role.get(id, "unlabelled") for id in patients["id"]])
    return marked


def _write(out: Path, model: Model, predictions: Predictions, history: list[Row]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    predictions.save(out / PATIENTS_FILE, out / IMAGES_FILE)
    write_curves(history, out)
    draw_curves(history, out)
    model.save(out)
