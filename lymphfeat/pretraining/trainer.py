"""VICReg on pairs of views, plus a classifier where folders are classes.

VICReg (Bardes et al. 2022) requires the projections of two views to be alike, every dimension to
vary over the batch, and dimensions to be uncorrelated. It needs neither negatives nor
large batches, so it works on two cores. The loss and the projector are lightly's.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor, nn

from lymphfeat.cohort.images import Normalization
from lymphfeat.features.augmentation import Augmentation
from lymphfeat.features.backbones import Backbone
from lymphfeat.features.views import normalize
from lymphfeat.pretraining.pairs import PairSampler
from lymphfeat.runtime.devices import autocast
from lymphfeat.settings import PretrainSettings

_WARMUP_STEPS = 50
_INVARIANCE = 25.0  # VICReg's own weight of its first two terms; divided out of the loss
_LABEL_SMOOTHING = 0.05
_MAX_GRADIENT = 5.0


class PairTrainer:
    """The state of a pre-training, and its next step."""

    def __init__(
        self,
        backbone: Backbone,
        fields: Tensor,
        groups: Tensor,
        settings: PretrainSettings,
        *,
        supervised: bool,
        normalization: Normalization,
        dtype: torch.dtype,
    ) -> None:
        """Take fields of pixels (N, 3, F, F) uint8 and the group of each (N,), on one device."""
        device = fields.device
        self.supervised = supervised
        self.backbone = backbone.train().to(device).to(memory_format=torch.channels_last)
        self._fields, self._groups, self._settings = fields, groups, settings
        self._normalization, self._dtype = normalization, dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # layers initialise from the global generator
            width = settings.projection
            self._projector = VICRegProjectionHead(backbone.channels, width, width).to(device)
            self._classifier: nn.Module = nn.Identity()
            if supervised:
                n_classes = int(groups.max()) + 1
                self._classifier = nn.Linear(backbone.channels, n_classes).to(device)
        self._generator = torch.Generator(device).manual_seed(settings.seed)
        self._pairs = PairSampler(
            groups,
            same_group=settings.patient_pairs,
            balanced=supervised,
            generator=self._generator,
        )
        self._augmentation = Augmentation(size=settings.view_size, zoom=settings.zoom)
        self._vicreg = VICRegLoss()
        self._parameters = [p for module in self._modules().values() for p in module.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.batch_size = min(settings.batch_size, len(fields))
        self.steps_per_epoch = max(len(fields) // self.batch_size, 1)
        # With minutes, an unreachable number until `fill_minutes`.
        epochs = settings.epochs if settings.minutes is None else 10**6
        self.total_steps = epochs * self.steps_per_epoch
        self.step = 0

    @property
    def minutes(self) -> float | None:
        """Return the time to train for, when the settings give it instead of epochs."""
        return self._settings.minutes

    def fill_minutes(self, seconds_per_step: float) -> None:
        """Set the steps to whole epochs that fill the minutes, started epochs included."""
        assert self.minutes is not None
        epochs = round(self.minutes * 60 / seconds_per_step / self.steps_per_epoch)
        self.total_steps = max(epochs, -(-self.step // self.steps_per_epoch)) * self.steps_per_epoch

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "backbone": self.backbone,
            "projector": self._projector,
            "classifier": self._classifier,
        }

    def advance(self) -> Tensor:
        """Take one step; return (similarity loss, class loss, share of classes correct), (3,)."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * self._rate()
        anchors, partners = self._pairs.draw(self.batch_size)
        views = [
            self._augmentation.draw(self._fields[rows], self._generator)
            for rows in (anchors, partners)
        ]
        images = normalize(torch.cat(views), self._normalization)  # (2n, 3, size, size)
        with autocast(images.device, self._dtype):
            maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
            pooled = maps.mean((2, 3))  # (2n, C)
            projected = self._projector(pooled)  # (2n, projection)
            logits = self._classifier(pooled)  # (2n, classes); unused without classes
        first, second = projected.float().chunk(2)
        similarity = self._vicreg(first, second) / _INVARIANCE
        classes, right = self._class_loss(logits.float(), torch.cat([anchors, partners]))
        (similarity + self._settings.supervised * classes).backward()
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return torch.stack([similarity, classes, right]).detach()

    def _class_loss(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if not self.supervised:
            return logits.new_zeros(()), logits.new_zeros(())
        targets = self._groups[rows]
        loss = F.cross_entropy(logits, targets, label_smoothing=_LABEL_SMOOTHING)
        return loss, (logits.argmax(1) == targets).float().mean()

    def _rate(self) -> float:
        """Return the learning rate's factor: a short warm-up, then half a cosine to near 0."""
        warmup = min(1.0, (self.step + 1) / min(_WARMUP_STEPS, max(self.total_steps // 5, 1)))
        done = self.step / self.total_steps
        return warmup * 0.5 * (1.02 + 0.98 * math.cos(math.pi * done))

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "modules": {name: module.state_dict() for name, module in self._modules().items()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step, self.total_steps = state["step"], state["total_steps"]
        for name, module in self._modules().items():
            module.load_state_dict(state["modules"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
