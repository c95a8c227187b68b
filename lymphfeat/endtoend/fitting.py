"""Train a job's networks, epoch after epoch, with checkpoints and curves."""

import math
import time

import torch

from lymphfeat.checkpoint import Checkpoint
from lymphfeat.cohort import Cohort
from lymphfeat.endtoend.curves import Row, metric_columns
from lymphfeat.endtoend.encoder import Encoder
from lymphfeat.endtoend.job import Job
from lymphfeat.endtoend.pixels import PixelCache
from lymphfeat.endtoend.training import TRAINERS, EpochResult, Trainer, evaluate
from lymphfeat.errors import SettingsError
from lymphfeat.heads import AGGREGATORS
from lymphfeat.progress import Progress, silent


def fit(job: Job, checkpoint: Checkpoint, progress: Progress = silent) -> list[Row]:
    """Train the job's model in place, from its checkpoint if there is one; return the curves."""
    model, settings, device = job.model, job.settings, job.device
    model.backbone.to(device).to(memory_format=torch.channels_last)
    model.head.to(device)
    pixels = _decode(job.parts.train, job, progress)
    trainer = TRAINERS[AGGREGATORS[settings.head.agg].family](
        model.backbone,
        model.head,
        pixels,
        job.parts.train.n_images,
        job.parts.train.labels,
        settings,
        dtype=job.dtype,
        generator=job.generator,
    )
    held_out = _held_out_encoder(job, progress)
    history: list[Row] = []
    state = checkpoint.read()
    if state is not None:
        trainer.load_state(state["trainer"])
        history = state["history"]
    while len(history) < settings.epochs:
        history.append(_run_epoch(job, trainer, held_out, history, progress))
        last = len(history) == settings.epochs
        checkpoint.write({"trainer": trainer.state(), "history": history}, last=last)
    model.backbone.eval()
    model.head.eval()
    return history


def _decode(cohort: Cohort, job: Job, progress: Progress) -> PixelCache:
    normalization = job.model.recipe.normalization
    return PixelCache.decode(cohort, job.model.recipe.crop, normalization, job.device, progress)


def _held_out_encoder(job: Job, progress: Progress) -> Encoder | None:
    if job.parts.validation is None:
        return None
    pixels = _decode(job.parts.validation, job, progress)
    return Encoder(job.model.backbone, pixels, unit=job.settings.head.unit, dtype=job.dtype)


def _run_epoch(
    job: Job, trainer: Trainer, held_out: Encoder | None, history: list[Row], progress: Progress
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
            f"lr (={job.settings.head.lr}) must let the loss stay finite; in epoch {epoch + 1} "
            "it did not. Start over with a smaller --lr."
        )
    return _row(job, epoch, result, held_out, seconds)


def _row(
    job: Job, epoch: int, result: EpochResult, held_out: Encoder | None, seconds: float
) -> dict[str, float]:
    threshold = job.model.threshold
    labels = job.parts.train.labels[result.patients]
    row = {
        "epoch": float(epoch + 1),
        "loss": result.loss,
        **metric_columns("train", result.probability, labels, threshold),
        "seconds": seconds,
        "images_per_second": result.images / seconds,
    }
    if held_out is not None and job.parts.validation is not None:
        probability = evaluate(
            held_out,
            job.model.head,
            job.parts.validation.n_images,
            job.settings.max_forward_size,
        )
        row |= metric_columns("validation", probability, job.parts.validation.labels, threshold)
    return row


def _shown(row: Row) -> str:
    """Tell the figures of an epoch in a few words."""
    validation = f" validation BA {row['validation_ba']:.3f}" if "validation_ba" in row else ""
    return (
        f" loss {row['loss']:.3f} BA {row['train_ba']:.3f}{validation}"
        f" {row['images_per_second']:.0f} images/s"
    )
