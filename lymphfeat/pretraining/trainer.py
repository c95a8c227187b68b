"""The state of a pre-training, and its next step; its subclasses say what is learnt."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lymphfeat.cohort.images import find_normalization
from lymphfeat.features.augmentation import Augmentation
from lymphfeat.features.backbones import Backbone
from lymphfeat.features.views import normalize
from lymphfeat.runtime.devices import autocast
from lymphfeat.settings import PretrainSettings

_WARMUP_STEPS = 50
_ENOUGH_STEPS = 6400  # a few hundred gain little (docs/backbones.md)
_MAX_GRADIENT = 5.0
_SMALL = 2 / 3  # of the side
_SMALL_COST = 0.5  # of what a step on whole views takes (measured: .53 in bfloat16, .49 in float32)


class Trainer(ABC):
    """Trains a backbone on views of cells."""

    supervised = False  # whether there is a class loss

    def __init__(
        self,
        backbone: Backbone,
        heads: dict[str, nn.Module],
        fields: Tensor,
        settings: PretrainSettings,
        dtype: torch.dtype,
    ) -> None:
        """Take fields of pixels (N, 3, F, F) uint8, and what is trained beside the backbone."""
        device = fields.device
        self.backbone = backbone.train().to(device).to(memory_format=torch.channels_last)
        self._heads = {name: head.to(device) for name, head in heads.items()}
        self._fields, self._settings, self._dtype = fields, settings, dtype
        self._generator = torch.Generator(device).manual_seed(settings.seed)
        self._views = {
            scale: Augmentation(size=round(settings.view_size * scale), stain=settings.stain)
            for scale in (_SMALL, 1.0)
        }
        self._normalization = find_normalization("imagenet")
        self._parameters = [p for module in self._modules().values() for p in module.parameters()]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.batch_size = min(settings.batch_size, len(fields))
        self.steps_per_epoch = max(len(fields) // self.batch_size, 1)
        # With minutes, an unreachable number until `fill_minutes`.
        epochs = settings.epochs or max(10, math.ceil(_ENOUGH_STEPS / self.steps_per_epoch))
        if settings.minutes is not None:
            epochs = 10**6
        self.total_steps = epochs * self.steps_per_epoch
        self.step = 0

    @property
    @abstractmethod
    def views_per_step(self) -> int:
        """Return how many views a step shows to the backbone."""

    @abstractmethod
    def _losses(self) -> Tensor:
        """Draw a batch; return loss, its main term, class loss, share of classes correct: (4,)."""

    @property
    def minutes(self) -> float | None:
        """Return the time to train for, when the settings give it instead of epochs."""
        return self._settings.minutes

    def fill_minutes(self, seconds_per_step: float) -> None:
        """Set the steps to whole epochs that fill the minutes, started epochs included.

        `seconds_per_step` are those of the first steps: on small views, if there are any.
        """
        assert self.minutes is not None
        small = self._settings.small_views
        if small:
            seconds_per_step *= small + (1 - small) / _SMALL_COST
        epochs = round(self.minutes * 60 / seconds_per_step / self.steps_per_epoch)
        self.total_steps = max(epochs, -(-self.step // self.steps_per_epoch)) * self.steps_per_epoch

    def _modules(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, **self._heads}

    def advance(self) -> Tensor:
        """Take one step; return (main loss, class loss, share of classes correct), (3,)."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * self._rate()
        losses = self._losses()
        losses[0].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        return losses[1:].detach()

    def _draw(self, rows: Tensor, zooms: Tensor | None = None) -> Tensor:
        """Draw a view of each of these cells; `zooms` (n,) are the magnifications if given.

        The first steps see small views of the same region: cells are learnt coarsely, then finely.
        """
        scale = _SMALL if self.step < self._settings.small_views * self.total_steps else 1.0
        if zooms is None:
            low, high = (math.log(zoom) for zoom in self._settings.zoom)
            part = torch.rand(len(rows), generator=self._generator, device=rows.device)
            zooms = torch.exp(low + (high - low) * part)
        return self._views[scale].draw(self._fields[rows], self._generator, zooms * scale)

    def _through(self, views: Tensor, *heads: str) -> list[Tensor]:
        """Return what each head says of the pooled features of views (n, 3, size, size)."""
        images = normalize(views, self._normalization)
        with autocast(images.device, self._dtype):
            maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
            pooled = maps.mean((2, 3))  # (n, C)
            said = [self._heads[name](pooled) for name in heads]
        return [each.float() for each in said]

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
