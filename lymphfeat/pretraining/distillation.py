"""Distillation: a backbone learns to say what larger ones say, whatever the colours of a cell."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lymphfeat.features.backbones import Backbone
from lymphfeat.pretraining.pairs import PairSampler
from lymphfeat.pretraining.teachers import Lessons
from lymphfeat.pretraining.trainer import Trainer
from lymphfeat.settings import PretrainSettings

_ZOOM_JITTER = 1.05  # of the magnification that the teacher saw


class Distiller(Trainer):
    """Linear functions of the backbone's pooled features should be what its teachers say."""

    def __init__(
        self,
        backbone: Backbone,
        fields: Tensor,
        groups: Tensor,
        lessons: Lessons,
        settings: PretrainSettings,
        *,
        balanced: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take fields of pixels (N, 3, F, F) uint8, groups (N,) and lessons, on one device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # layers initialise from the global generator
            answer = nn.Linear(backbone.channels, lessons.targets.shape[-1])
        super().__init__(backbone, {"answer": answer}, fields, settings, dtype)
        self._lessons = lessons
        self._sampler = PairSampler(
            groups, same_group=0.0, balanced=balanced, generator=self._generator
        )

    @property
    def views_per_step(self) -> int:
        return self.batch_size

    def _losses(self) -> Tensor:
        rows, _ = self._sampler.draw(self.batch_size)
        views, zooms = self._choose(rows)
        targets = self._lessons.targets[rows, views]  # (n, D)
        (answers,) = self._through(self._draw(rows, zooms), "answer")  # (n, D)
        loss = F.mse_loss(answers, targets)
        return torch.stack([loss, loss, loss.new_zeros(()), loss.new_zeros(())])

    def _choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draw which of the teacher's views is to be predicted, and the student's magnification."""
        device = rows.device
        zooms = self._lessons.zooms
        views = torch.randint(zooms.shape[1], rows.shape, generator=self._generator, device=device)
        jitter = 2 * torch.rand(rows.shape, generator=self._generator, device=device) - 1
        return views, zooms[rows, views] * _ZOOM_JITTER**jitter
