"""The backbone in training: a batch of cached crops -> instances, batch-norm as told."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lymphfeat.backbones import Backbone
from lymphfeat.compute import autocast, to_device
from lymphfeat.endtoend.pixels import ImageBatch, PixelCache, flip_each
from lymphfeat.heads import HeadStack
from lymphfeat.model import instances_of


class Encoder:
    """Turns batches into instances (n, U, C), float32, with gradients unless torch forbids them."""

    def __init__(
        self,
        backbone: Backbone,
        pixels: PixelCache,
        *,
        unit: str,
        dtype: torch.dtype = torch.float32,
        frozen_batchnorm: bool = False,
    ) -> None:
        """Take a backbone that is on the pixels' device; `frozen_batchnorm` never trains it."""
        self.backbone = backbone
        self._pixels = pixels
        self._unit = unit
        self._dtype = dtype
        self._frozen_batchnorm = frozen_batchnorm

    def __call__(self, batch: ImageBatch, *, batchnorm_training: bool = True) -> Tensor:
        """Encode a batch in training mode, batch-norm as told."""
        self.backbone.train()
        # The statistics of a single image are none.
        training = batchnorm_training and not self._frozen_batchnorm and len(batch) > 1
        for module in batchnorms(self.backbone):
            module.train(training)
        return self._encode(batch)

    @torch.no_grad()
    def score(self, head: HeadStack, batch: ImageBatch, chunk_size: int) -> Tensor:
        """Return the logits (n, U) of a batch, the backbone in eval mode."""
        self.backbone.eval()
        parts = batch.chunks(chunk_size)
        return torch.cat([head.logits(self._encode(part))[:, :, 0] for part in parts])

    def _encode(self, batch: ImageBatch) -> Tensor:
        device = self._pixels.device
        with autocast(device, self._dtype):
            maps = self.backbone(self._pixels.load(batch))  # (n, C, h, w)
        maps = maps.float()
        if self._unit == "pixel" and batch.flips.any():
            # Back to where they lie in the file, so that a pixel has one number in every view.
            maps = flip_each(maps, to_device(batch.flips, device))
        return instances_of(maps, self._unit)


def batchnorms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers of a network."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Put the running statistics of batch-norm back afterwards as they were before."""
    buffers = [buffer for layer in batchnorms(module) for buffer in layer.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
