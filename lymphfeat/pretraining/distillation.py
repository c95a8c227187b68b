"""Distillation: a backbone learns to say what larger ones say, however a cell is shown."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lymphfeat.features.backbones import Backbone
from lymphfeat.pretraining.pairs import PairSampler
from lymphfeat.pretraining.trainer import Trainer
from lymphfeat.settings import PretrainSettings


class Distiller(Trainer):
    """Linear functions of the backbone's pooled features should be what its teachers say."""

    def __init__(
        self,
        backbone: Backbone,
        fields: Tensor,
        groups: Tensor,
        targets: Tensor,
        settings: PretrainSettings,
        *,
        balanced: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take fields of pixels (N, 3, F, F) uint8, groups (N,) and targets (N, D)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # layers initialise from the global generator
            answer = nn.Linear(backbone.channels, targets.shape[1])
        super().__init__(backbone, {"answer": answer}, fields, settings, dtype)
        self._targets = targets
        self._sampler = PairSampler(
            groups, same_group=0.0, balanced=balanced, generator=self._generator
        )

    @property
    def views_per_step(self) -> int:
        return self.batch_size

    def _losses(self) -> Tensor:
        rows, _ = self._sampler.draw(self.batch_size)
        (answers,) = self._through(self._draw(rows), "answer")  # (n, D)
        loss = F.mse_loss(answers, self._targets[rows])
        return torch.stack([loss, loss, loss.new_zeros(()), loss.new_zeros(())])
