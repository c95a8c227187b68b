"""VICReg on pairs of views, plus a classifier where folders are classes.

VICReg (Bardes et al. 2022) requires the projections of two views to be alike, every dimension to
vary over the batch, and dimensions to be uncorrelated. It needs neither negatives nor
large batches, so it works on two cores. The loss and the projector are lightly's.
"""

import torch
import torch.nn.functional as F
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor, nn

from lymphfeat.features.backbones import Backbone
from lymphfeat.pretraining.pairs import PairSampler
from lymphfeat.pretraining.trainer import Trainer
from lymphfeat.settings import PretrainSettings

_INVARIANCE = 25.0  # VICReg's own weight of its first two terms; divided out of the loss
_LABEL_SMOOTHING = 0.05


class PairTrainer(Trainer):
    """Two views of one cell, or of two cells of a patient, should look alike to the backbone."""

    def __init__(
        self,
        backbone: Backbone,
        fields: Tensor,
        groups: Tensor,
        settings: PretrainSettings,
        *,
        supervised: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take fields of pixels (N, 3, F, F) uint8 and the group of each (N,), on one device."""
        self.supervised = supervised
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # layers initialise from the global generator
            width = settings.projection
            heads: dict[str, nn.Module] = {
                "projector": VICRegProjectionHead(backbone.channels, width, width),
                "classifier": nn.Identity(),
            }
            if supervised:
                heads["classifier"] = nn.Linear(backbone.channels, int(groups.max()) + 1)
        super().__init__(backbone, heads, fields, settings, dtype)
        self._groups = groups
        self._pairs = PairSampler(
            groups,
            same_group=settings.patient_pairs,
            balanced=supervised,
            generator=self._generator,
        )
        self._vicreg = VICRegLoss()

    @property
    def views_per_step(self) -> int:
        return 2 * self.batch_size

    def _losses(self) -> Tensor:
        anchors, partners = self._pairs.draw(self.batch_size)
        views = [self._draw(rows) for rows in (anchors, partners)]  # (n, 3, size, size) each
        # projected (2n, projection); logits (2n, classes), unused without classes
        projected, logits = self._through(torch.cat(views), "projector", "classifier")
        similarity = self._vicreg(*projected.chunk(2)) / _INVARIANCE
        classes, right = self._class_loss(logits, torch.cat([anchors, partners]))
        loss = similarity + self._settings.supervised * classes
        return torch.stack([loss, similarity, classes, right])

    def _class_loss(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self.supervised:
            return logits.new_zeros(()), logits.new_zeros(())
        targets = self._groups[rows]
        loss = F.cross_entropy(logits, targets, label_smoothing=_LABEL_SMOOTHING)
        return loss, (logits.argmax(1) == targets).float().mean()
