"""A backbone and head trained for each split of a cohort, on images decoded once."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split
from lymphfeat.evaluation.leakage import find_shared_crops, refuse_shared_images
from lymphfeat.finetuning.curves import EpochRow
from lymphfeat.finetuning.job import Job, prepare
from lymphfeat.finetuning.loop import decode, fit
from lymphfeat.finetuning.pixels import DecodedCohort
from lymphfeat.heads.grid import require_trainable, resolve
from lymphfeat.runtime.checkpoint import Checkpoint
from lymphfeat.runtime.processes import is_first
from lymphfeat.runtime.progress import Progress, part_of, silent
from lymphfeat.settings import EndToEndSettings


class SplitTraining:
    """Trains one job per split; what becomes of the trained models is the caller's.

    Under torchrun every step's images are shared out over the processes.
    """

    def __init__(
        self,
        cohort: Cohort,
        splits: Sequence[Split],
        settings: EndToEndSettings,
        *,
        force: bool = False,
        progress: Progress = silent,
    ) -> None:
        """Take splits of labelled patients; SettingsError for a head that needs cached maps.

        `force` starts over where a checkpoint is of another training.
        """
        head = resolve(settings.head)
        require_trainable(head)
        self.splits = tuple(splits)
        self._settings = replace(settings, head=head)
        self._cohort, self._force, self._progress = cohort, force, progress

    def prepare(self, split: Split) -> Job:
        """Initialise the training on a split; raises as `finetuning.job.prepare`."""
        return prepare(self._cohort, split, self._settings)

    def train(self, job: Job, checkpoint: Path) -> list[EpochRow]:
        """Train a job's model in place, from its checkpoint if one exists; return the curves.

        Resumed, it ends (on a CPU) with the same bits. Raises ModelError for a checkpoint of
        another training, and LeakageError when a training and a held-out patient share an image.
        """
        state = Checkpoint(checkpoint, job.identity, job.model.facts.provenance.to_json())
        if is_first():
            state.check(force=self._force)  # before images are decoded
        curves = fit(job, self._decoded, state, self._progress_of(job.split))
        job.model.backbone.to("cpu")  # makes room for the next one
        job.model.head.to("cpu")
        return curves

    @cached_property
    def _decoded(self) -> DecodedCohort:
        decoded = decode(self._cohort.labelled(), self._settings, self._progress)
        judged = [split for split in self.splits if split.validation]
        if judged and not self._settings.allow_shared_images:
            shared = find_shared_crops(decoded.pixels.crops(), decoded.cohort)
            refuse_shared_images(judged, shared)
        return decoded

    def _progress_of(self, split: Split) -> Progress:
        number, count = self.splits.index(split), len(self.splits)
        name = f"{split.id} ({number + 1}/{count})" if count > 1 else ""
        return part_of(self._progress, number, count, name)
