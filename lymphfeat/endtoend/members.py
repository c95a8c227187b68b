"""K-fold members: a model trained without each fold, their average, and what is chosen out of fold.

Each member is a model folder of its own, `fold-0`, `fold-1`, …; `members.json` names them.
Threshold, calibration and operating points come from the probabilities of each fold by the member
that has not seen it; they are measured on each fold as the other folds would set them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lymphfeat.checkpoint import Checkpoint
from lymphfeat.cohort import Cohort
from lymphfeat.compute import cpu_threads, whole_float32
from lymphfeat.decision import Decision, combine, cross_fit_decisions
from lymphfeat.endtoend.baselines import folds_of, measure_baselines
from lymphfeat.endtoend.curves import Row, draw_curves, write_curves
from lymphfeat.endtoend.fitting import decode, fit
from lymphfeat.endtoend.folder import MODEL
from lymphfeat.endtoend.job import Job, parts_of, prepare
from lymphfeat.endtoend.pixels import PixelCache
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
from lymphfeat.metrics import brier_score, log_loss
from lymphfeat.model import (
    MEMBERS_FILE,
    MEMBERS_FORMAT,
    Model,
    Predictions,
    average_predictions,
    patient_metrics,
)
from lymphfeat.processes import is_first, join_processes
from lymphfeat.progress import Progress, silent
from lymphfeat.settings import EndToEndSettings
from lymphfeat.splits import Split, kfold_splits
from lymphfeat.strict_json import json_text


@dataclass(frozen=True, kw_only=True)
class Members:
    """Models of one training whose calibrated logits are averaged."""

    models: tuple[Model, ...]
    decision: Decision  # about their mean
    # "out of fold": the labelled patients, each by the member that has not seen it
    metrics: Mapping[str, Mapping[str, float | None]]

    @property
    def threshold(self) -> float:
        """Return the probability above which a patient is called tumoral by all of them."""
        return self.decision.threshold

    @property
    def threshold_from(self) -> str:
        """Say what the threshold was chosen on."""
        return self.decision.threshold_from


def train_folds(
    cohort: Cohort,
    settings: EndToEndSettings,
    out: Path,
    *,
    folds: int,
    force: bool = False,
    submission_header: str = HEADERS[0],
    progress: Progress = silent,
) -> Members:
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
        jobs, histories = _train(cohort, labelled, repeat.outer, settings, out, force, progress)
        models = [job.model for job in jobs]
        if not is_first():
            return Members(models=tuple(models), decision=Decision(), metrics={})
        predicted = [_predict(model, cohort, settings, progress) for model in models]
        unseen = pd.concat(
            part.patients[part.patients["id"].isin(split.validation)]
            for part, split in zip(predicted, repeat.outer, strict=True)
        )
        held_out = folds_of(unseen["id"].tolist(), repeat.outer)
        decision, out_of_fold = _decide(unseen, held_out, settings.threshold)
        for number, (model, history) in enumerate(zip(models, histories, strict=True)):
            model.decision = decision
            write_curves(history, folder / f"fold-{number}")
            model.save(folder / f"fold-{number}")
        predictions = average_predictions(predicted, [decision] * folds)
        _write(folder, cohort, predictions, out_of_fold, histories, submission_header)
        members = Members(
            models=tuple(models),
            decision=combine([decision] * folds),
            metrics={
                "out of fold": _measure(out_of_fold, held_out),
                **measure_baselines(out_of_fold, labelled, repeat.outer, rule=settings.threshold),
            },
        )
        _write_facts(folder, members)
    return members


def _checkpoint_file(number: int) -> str:
    return f"fold-{number}.pt"


def _train(
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
            job.model.facts.provenance,
        )
        if is_first():
            checkpoint.check(force=force)
        if pixels is None:
            pixels = decode(labelled, job, progress)
            if not settings.allow_shared_images:
                refuse_shared_images(splits, find_shared_crops(pixels.crops(), labelled))
        histories.append(
            fit(job, pixels, labelled, checkpoint, _numbered(progress, number, len(splits)))
        )
        job.model.backbone.to("cpu")
        jobs.append(job)
    return jobs, histories


def _numbered(progress: Progress, number: int, count: int) -> Progress:
    def report(done: int, total: int, text: str = "") -> None:
        progress(number * total + done, count * total, f"fold {number + 1}/{count} {text}")

    return report


def _predict(
    model: Model, cohort: Cohort, settings: EndToEndSettings, progress: Progress
) -> Predictions:
    # In float32, whatever trained it: what `lymphfeat predict` says of the same patients.
    predictions = model.predict(cohort, device=settings.device, progress=progress)
    model.backbone.to("cpu")
    return predictions


def _decide(
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


def _write(
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


def _write_facts(folder: Path, members: Members) -> None:
    content = {
        "format": MEMBERS_FORMAT,
        "members": [f"fold-{number}" for number in range(len(members.models))],
        **members.decision.to_json(),
        "metrics": members.metrics,
    }
    (folder / MEMBERS_FILE).write_text(json_text(content, indent=2), encoding="utf-8")
