"""Train a job's networks, epoch after epoch, with checkpoints and curves."""

import math
import time

import numpy as np
import torch

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.finetuning.curves import Row, metric_columns
from lymphfeat.finetuning.job import Job
from lymphfeat.finetuning.pixels import PixelCache, Roster
from lymphfeat.finetuning.trainers import TRAINERS, EpochResult, Trainer, evaluate
from lymphfeat.heads.registry import AGGREGATORS
from lymphfeat.runtime.checkpoint import Checkpoint
from lymphfeat.runtime.devices import peak_memory
from lymphfeat.runtime.processes import from_first, is_first
from lymphfeat.runtime.progress import Progress, silent


def decode(cohort: Cohort, job: Job, progress: Progress = silent) -> PixelCache:
    """Decode the images of a cohort as a job needs them."""
    recipe = job.model.recipe
    return PixelCache.decode(cohort, recipe.crop, recipe.normalization, job.device, progress)


def make_trainer(job: Job, pixels: PixelCache, cached: Cohort) -> Trainer:
    """Make the trainer of a job's model and move the model to the device."""
    model = job.model
    model.backbone.to(job.device).to(memory_format=torch.channels_last)
    model.head.to(job.device)
    return TRAINERS[AGGREGATORS[job.settings.head.agg].family](
        model.backbone,
        model.head,
        pixels,
        Roster.of(job.parts.train, cached),
        job.settings,
        dtype=job.dtype,
        generator=job.generator,
    )


def fit(
    job: Job,
    pixels: PixelCache,
    cached: Cohort,
    checkpoint: Checkpoint,
    progress: Progress = silent,
) -> list[Row]:
    """Train the job's model in place, from its checkpoint if one exists; return the curves.

    `pixels` are the images of the cohort `cached`, which contains the job's patients.
    """
    model, settings = job.model, job.settings
    trainer = make_trainer(job, pixels, cached)
    held_out = None if job.parts.validation is None else Roster.of(job.parts.validation, cached)
    history: list[Row] = []
    state = from_first(checkpoint.read() if is_first() else None)
    if state is not None:
        trainer.load_state(state["trainer"])
        history = state["history"]
    while len(history) < settings.epochs:
        history.append(_run_epoch(job, trainer, held_out, history, progress))
        last = len(history) == settings.epochs
        if is_first():
            checkpoint.write({"trainer": trainer.state(), "history": history}, last=last)
    model.backbone.eval()
    model.head.eval()
    return history


def _run_epoch(
    job: Job, trainer: Trainer, held_out: Roster | None, history: list[Row], progress: Progress
) -> Row:
    epoch, epochs = len(history), job.settings.epochs
    start = time.perf_counter()
    figures = _shown(history[-1]) if history else ""

    def report(done: int, total: int, text: str = "") -> None:
        progress(epoch * total + done, epochs * total, f"epoch {epoch + 1}/{epochs}{figures}")

    result = trainer.run_epoch(report)
    seconds = time.perf_counter() - start
    if not math.isfinite(result.loss):
        raise SettingsError(
            f"lr (={job.settings.head.lr}) must keep the loss finite; got {result.loss} in epoch "
            f"{epoch + 1}. Start again with a smaller --lr."
        )
    row = _row(job, epoch, result, seconds)
    return row if held_out is None else row | _measure(job, trainer, held_out)


def _row(job: Job, epoch: int, result: EpochResult, seconds: float) -> dict[str, float]:
    threshold = job.model.threshold
    labels = job.parts.train.labels[result.patients]
    return {
        "epoch": float(epoch + 1),
        "loss": result.loss,
        **metric_columns("train", result.probability, labels, threshold),
        "seconds": seconds,
        "images_per_second": result.images / seconds,
        "peak_memory_gb": peak_memory(job.device) / 1e9,
    }


def _measure(job: Job, trainer: Trainer, held_out: Roster) -> dict[str, float]:
    chunk_size = job.settings.max_forward_size
    probability = evaluate(trainer.encoder, job.model.head, held_out, chunk_size)
    labels = held_out.labels.numpy().astype(np.int64)
    return metric_columns("validation", probability, labels, job.model.threshold)


def _shown(row: Row) -> str:
    """Summarise an epoch in a few words."""
    validation = f" validation BA {row['validation_ba']:.3f}" if "validation_ba" in row else ""
    gigabytes = row["peak_memory_gb"]
    memory = f" {gigabytes:.1f} GB" if math.isfinite(gigabytes) else ""
    return (
        f" loss {row['loss']:.3f} BA {row['train_ba']:.3f}{validation}"
        f" {row['images_per_second']:.0f} images/s{memory}"
    )
