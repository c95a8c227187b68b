"""A complete pre-training: a folder of cells -> a weights file, its curve and its plot."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lymphfeat import __version__
from lymphfeat.cohort.image_folders import Cells
from lymphfeat.cohort.images import decode_crops, find_normalization
from lymphfeat.cohort.provenance import Provenance
from lymphfeat.errors import SettingsError
from lymphfeat.features.backbones import Backbone, LoadedWeights, build_backbone, write_weights
from lymphfeat.finetuning.curves import EpochRow, write_csv
from lymphfeat.plots.pretraining import draw_curve
from lymphfeat.pretraining.distillation import Distiller
from lymphfeat.pretraining.probe import nearest_neighbour_share, pooled_features, probe_rows
from lymphfeat.pretraining.teachers import Lessons, Teacher, teach
from lymphfeat.pretraining.trainer import Trainer
from lymphfeat.pretraining.vicreg import PairTrainer
from lymphfeat.runtime.checkpoint import CHECKPOINT_FILE, Checkpoint
from lymphfeat.runtime.devices import (
    choose_device,
    choose_precision,
    cpu_threads,
    deterministic,
    precision_name,
    whole_float32,
)
from lymphfeat.runtime.files import result_files, unfinished_folder
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import PretrainSettings

_LEAST_IMAGES = 8
_COLUMNS = ("epoch", "loss", "class_loss", "class_accuracy", "probe")  # epoch 0 has no losses
_LESSONS_FILE = "lessons.pt"  # beside the checkpoint
_TIMED_STEPS = 8  # to estimate how many fit in the minutes; no checkpoint before


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The results of a pre-training."""

    weights: Path
    sha256: str
    curve: tuple[EpochRow, ...]
    files: tuple[Path, ...]  # the weights, the curve as CSV and as PNG


def pretrain(
    cells: Cells,
    out: Path,
    settings: PretrainSettings,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Pretrained:
    """Train a backbone on cells without their patients' labels and write its weights to `out`.

    Next to the .safetensors file (float16, timm's keys, the recipe in its header) it writes the
    learning curve as CSV and PNG; the three are replaced together, at the end. An interrupted run
    resumes from its checkpoint, bit for bit on a CPU. Raises SettingsError when one of the files
    exists and `force` is not set, or for cells that do not fit the settings; CohortError for an
    image that cannot be read.
    """
    _check(cells, out, settings)
    dtype = choose_precision(settings.precision, choose_device(settings.device))
    settings = replace(settings, precision=precision_name(dtype))
    csv, png = (out.with_suffix(suffix).name for suffix in (".csv", ".png"))
    beside = dict.fromkeys((csv, png))
    with (
        result_files(out, beside, force=force, resumes=(CHECKPOINT_FILE, _LESSONS_FILE)) as folder,
        cpu_threads(settings.threads),
        whole_float32(),
        deterministic(choose_device(settings.device), wanted=settings.deterministic),
    ):
        backbone, init = build_backbone(
            settings.backbone,
            weights=settings.init,
            seed=settings.seed,
            image_size=settings.view_size,
        )
        teachers = [Teacher.load(text, settings.teacher_size) for text in settings.teachers]
        recipe = _recipe(cells, settings, init, teachers)
        provenance = init.provenance | cells.provenance()
        checkpoint, kept = (
            Checkpoint(unfinished_folder(out) / name, recipe, provenance.to_json())
            for name in (CHECKPOINT_FILE, _LESSONS_FILE)
        )
        for each in (checkpoint, kept):
            each.check(force=force)  # before images are decoded
        fields, groups = _decode(cells, settings, progress)
        lessons = _learn_lessons(teachers, fields, settings, kept, progress)
        trainer = _make_trainer(cells, backbone, fields, groups, lessons, settings)
        curve = _train(trainer, _Probe(fields, groups, settings), checkpoint, progress)
        facts = _facts(cells, recipe | {"steps": trainer.step}, provenance)
        sha256 = write_weights(backbone, folder / out.name, facts)
        write_csv(curve, _COLUMNS, folder / csv)
        draw_curve(curve, folder / png, cells.grouping)
    files = tuple(out.with_name(name) for name in (out.name, csv, png))
    return Pretrained(weights=out, sha256=sha256, curve=tuple(curve), files=files)


def _check(cells: Cells, out: Path, settings: PretrainSettings) -> None:
    if out.suffix != ".safetensors":
        raise SettingsError(f"out (={out}) must end in .safetensors.")
    if len(cells.paths) < _LEAST_IMAGES:
        raise SettingsError(
            f"cells (={len(cells.paths)} images) must be at least {_LEAST_IMAGES}; "
            "pre-training needs thousands."
        )
    if settings.patient_pairs and cells.grouping != "patients":
        raise SettingsError(
            f"patient_pairs (={settings.patient_pairs}) needs one folder per patient; got "
            f"{cells.grouping}. Use --groups patients if the folders are patients."
        )


def _recipe(
    cells: Cells, settings: PretrainSettings, init: LoadedWeights, teachers: Sequence[Teacher]
) -> dict[str, Any]:
    """Collect everything that determines the weights."""
    facts = asdict(settings) | {"init": init.source, "init_sha256": init.sha256}
    return facts | {
        "method": "distillation" if teachers else "vicreg",
        "teachers": [{"name": each.name, "sha256": each.sha256} for each in teachers],
        "grouping": cells.grouping,
        "images": len(cells.paths),
        "cells_sha256": cells.fingerprint(),
        "threads": torch.get_num_threads(),
        "versions": {"lymphfeat": __version__, "torch": torch.__version__},
    }


def _facts(cells: Cells, recipe: Mapping[str, Any], provenance: Provenance) -> dict[str, Any]:
    return {
        "recipe": dict(recipe),
        "classes": _classes(cells),
        "provenance": provenance.to_json(),
    }


def _classes(cells: Cells) -> dict[str, int]:
    if cells.grouping != "classes":
        return {}
    return dict(zip(cells.names, np.bincount(cells.groups).tolist(), strict=True))


def _decode(cells: Cells, settings: PretrainSettings, progress: Progress) -> tuple[Tensor, Tensor]:
    """Return fields of pixels (N, 3, F, F) uint8 and their groups (N,), on the device."""
    device = choose_device(settings.device)
    pixels = decode_crops(
        cells.paths, settings.field, threads=torch.get_num_threads(), progress=progress
    )
    return torch.from_numpy(pixels).to(device), torch.from_numpy(cells.groups).to(device)


def _learn_lessons(
    teachers: Sequence[Teacher],
    fields: Tensor,
    settings: PretrainSettings,
    kept: Checkpoint,
    progress: Progress,
) -> Lessons | None:
    """Show the cells to the teachers, unless an interrupted run has kept what they said."""
    if not teachers:
        return None
    state = kept.read()
    if state is None:
        dtype = choose_precision(settings.precision, fields.device)
        state = vars(teach(teachers, fields, settings, dtype, progress))
        kept.write(state, last=True)
    return Lessons(**state).to(fields.device)


def _make_trainer(
    cells: Cells,
    backbone: Backbone,
    fields: Tensor,
    groups: Tensor,
    lessons: Lessons | None,
    settings: PretrainSettings,
) -> Trainer:
    dtype = choose_precision(settings.precision, fields.device)
    classes = cells.grouping == "classes"
    if lessons is not None:
        return Distiller(backbone, fields, groups, lessons, settings, balanced=classes, dtype=dtype)
    supervised = classes and settings.supervised > 0
    return PairTrainer(backbone, fields, groups, settings, supervised=supervised, dtype=dtype)


class _Probe:
    """The nearest-neighbour probe on a fixed sample of images."""

    def __init__(self, fields: Tensor, groups: Tensor, settings: PretrainSettings) -> None:
        rows = probe_rows(groups, settings.seed).to(fields.device)
        self._fields, self._groups = fields[rows], groups[rows].cpu().numpy()
        self._size = settings.view_size
        self._zoom = float(np.sqrt(settings.zoom[0] * settings.zoom[1]))

    def measure(self, backbone: Backbone) -> float:
        normalization = find_normalization("imagenet")
        features = pooled_features(backbone, self._fields, self._size, self._zoom, normalization)
        return nearest_neighbour_share(features, self._groups)


def _train(
    trainer: Trainer, probe: _Probe, checkpoint: Checkpoint, progress: Progress
) -> list[EpochRow]:
    """Train from the checkpoint if one exists; return one row per epoch, starting at epoch 0."""
    state = checkpoint.read()
    if state is None:
        curve: list[EpochRow] = [{"epoch": 0, "probe": probe.measure(trainer.backbone)}]
        sums = torch.zeros(3, device=next(trainer.backbone.parameters()).device)
    else:
        curve, sums = list(state["curve"]), state["sums"]
        trainer.load_state(state["trainer"])
    meter = _Meter(progress, trainer, curve[-1])
    while trainer.step < trainer.total_steps:
        sums = sums + trainer.advance()
        if trainer.step == _TIMED_STEPS and trainer.minutes is not None:
            sums.sum().item()  # waits for the device
            trainer.fill_minutes(meter.seconds / _TIMED_STEPS)
        if trainer.step % trainer.steps_per_epoch == 0:
            curve.append(_row(trainer, sums, probe))
            sums = torch.zeros_like(sums)
        meter.show(curve[-1])
        last = trainer.step == trainer.total_steps
        if trainer.step >= _TIMED_STEPS or last:
            state = {"trainer": trainer.state(), "curve": curve, "sums": sums}
            checkpoint.write(state, last=last)
    return curve


def _row(trainer: Trainer, sums: Tensor, probe: _Probe) -> EpochRow:
    """Return the results of the epoch just ended; `sums` are over its steps."""
    loss, class_loss, class_accuracy = (sums / trainer.steps_per_epoch).tolist()
    classes = {"class_loss": class_loss, "class_accuracy": class_accuracy}
    return {
        "epoch": trainer.step // trainer.steps_per_epoch,
        "loss": loss,
        **(classes if trainer.supervised else {}),
        "probe": probe.measure(trainer.backbone),
    }


class _Meter:
    """Shows steps, views per second and the latest results."""

    def __init__(self, progress: Progress, trainer: Trainer, row: EpochRow) -> None:
        self._progress, self._trainer = progress, trainer
        self._first, self._begin = trainer.step, time.perf_counter()
        self.show(row)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def show(self, row: EpochRow) -> None:
        steps = self._trainer.step - self._first
        rate = steps * self._trainer.views_per_step / self.seconds
        figures = " ".join(f"{name} {row[name]:.3f}" for name in ("loss", "probe") if name in row)
        self._progress(
            self._trainer.step, self._trainer.total_steps, f"{figures} {rate:.0f} views/s"
        )
