"""Train a job's networks, epoch after epoch, with checkpoints and curves."""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.finetuning.curves import EpochRow, metric_columns, unmeasured
from lymphfeat.finetuning.encoder import Encoder
from lymphfeat.finetuning.fine_tuners import FINE_TUNERS, EpochResult, FineTuner, evaluate
from lymphfeat.finetuning.job import Job
from lymphfeat.finetuning.pixels import DecodedCohort, PixelCache, Roster
from lymphfeat.heads.registry import find_aggregator
from lymphfeat.runtime.checkpoint import Checkpoint
from lymphfeat.runtime.devices import choose_device, give_back_freed_memory, peak_memory
from lymphfeat.runtime.processes import from_first, is_first
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import EndToEndSettings


def decode(
    cohort: Cohort, settings: EndToEndSettings, progress: Progress = silent
) -> DecodedCohort:
    """Decode the images of a cohort as a training needs them."""
    device = choose_device(settings.device)
    pixels = PixelCache.decode(cohort, settings.backbone, device, progress)
    return DecodedCohort(cohort=cohort, pixels=pixels)


def make_fine_tuner(job: Job, decoded: DecodedCohort) -> FineTuner:
    """Make the fine-tuner of a job's model and move the model to the device.

    The job's patients must be among those decoded.
    """
    model, settings = job.model, job.settings
    model.backbone.to(job.device).to(memory_format=torch.channels_last)
    model.head.to(job.device)
    encoder = Encoder(
        model.backbone,
        decoded.pixels,
        unit=settings.head.unit,
        dtype=job.dtype,
        frozen_batchnorm=settings.frozen_batchnorm,
    )
    make = FINE_TUNERS[find_aggregator(settings.head).family]
    return make(encoder, model.head, decoded.roster(job.train), settings, job.generator)


def fit(
    job: Job, decoded: DecodedCohort, checkpoint: Checkpoint, progress: Progress = silent
) -> list[EpochRow]:
    """Train the job's model in place, from its checkpoint if one exists; return the curves."""
    model = job.model
    tuner = make_fine_tuner(job, decoded)
    held_out = None if job.validation is None else decoded.roster(job.validation)
    history: list[EpochRow] = []
    pace = ""
    state = from_first(checkpoint.read() if is_first() else None)
    if state is None:
        tuner.prepare_head()
    else:
        tuner.load_state(state["trainer"])
        history = state["history"]
    while len(history) < job.settings.epochs:
        row, pace = _run_epoch(job, tuner, history, pace, progress)
        history.append(row if held_out is None else row | _judge(job, tuner, held_out, row))
        last = len(history) == job.settings.epochs
        if is_first():
            checkpoint.write({"trainer": tuner.state(), "history": history}, last=last)
        give_back_freed_memory()  # whole patients make every batch another size
    tuner.finish_head()
    model.backbone.eval()
    model.head.eval()
    return history


def _run_epoch(
    job: Job, tuner: FineTuner, history: Sequence[EpochRow], pace: str, progress: Progress
) -> tuple[dict[str, float], str]:
    """Return the row of the next epoch, and how fast it was, which no file has."""
    epoch, epochs = len(history), job.settings.epochs
    start = time.perf_counter()
    results = _shown(history) + pace if history else ""

    def report(done: int, total: int, text: str = "") -> None:
        progress(epoch * total + done, epochs * total, f"epoch {epoch + 1}/{epochs}{results}")

    result = tuner.run_epoch(report)
    seconds = time.perf_counter() - start
    if not math.isfinite(result.loss):
        raise SettingsError(
            f"lr (={job.settings.head.lr}) must keep the loss finite; got {result.loss} in epoch "
            f"{epoch + 1}. Start again with a smaller --lr."
        )
    return _row(job, epoch, result), _pace(job, result.images / seconds)


def _row(job: Job, epoch: int, result: EpochResult) -> dict[str, float]:
    labels = job.train.labels[result.patients]
    return {
        "epoch": float(epoch + 1),
        "loss": result.loss,
        **metric_columns("train", result.probability, labels, job.model.threshold),
    }


def _pace(job: Job, images_per_second: float) -> str:
    gigabytes = peak_memory(job.device) / 1e9
    memory = f" {gigabytes:.1f} GB" if math.isfinite(gigabytes) else ""
    return f" {images_per_second:.0f} images/s{memory}"


def _judge(job: Job, tuner: FineTuner, held_out: Roster, row: EpochRow) -> dict[str, float]:
    """Measure the patients held out after every so many epochs, and the last; otherwise NaN."""
    epoch, settings = int(row["epoch"]), job.settings
    if epoch % settings.evaluate_every and epoch < settings.epochs:
        return unmeasured("validation")
    return _measure(job, tuner, held_out)


def _measure(job: Job, tuner: FineTuner, held_out: Roster) -> dict[str, float]:
    chunk_size = job.settings.max_forward_size
    probability = evaluate(tuner.encoder, job.model.head, held_out, chunk_size)
    labels = held_out.labels.numpy().astype(np.int64)
    return metric_columns("validation", probability, labels, job.model.threshold)


def _shown(history: Sequence[EpochRow]) -> str:
    """Summarise the last epoch, and the last one measured on the patients held out."""
    row = history[-1]
    known = [ba for row in history if math.isfinite(ba := row.get("validation_ba", math.nan))]
    validation = f" validation BA {known[-1]:.3f}" if known else ""
    return f" loss {row['loss']:.3f} BA {row['train_ba']:.3f}{validation}"
