"""The backbone in training: a batch of cached crops -> instances, with the batch-norm mode given.

Under torchrun every process encodes its part of a batch and gets the instances of all: what follows
the backbone, including the statistics of bnsigmoid, sees the whole batch in every process.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lymphfeat.features.backbones import Backbone
from lymphfeat.finetuning.augmentation import flip_each
from lymphfeat.finetuning.pixels import ImageBatch, PixelCache
from lymphfeat.heads.head import Head
from lymphfeat.model.scoring import instances_of
from lymphfeat.runtime import processes
from lymphfeat.runtime.devices import autocast, to_device


class Encoder:
    """Turns batches into instances (n, U, C), float32, with gradients unless they are disabled."""

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
        self.pixels = pixels
        self._unit = unit
        self._dtype = dtype
        self._frozen_batchnorm = frozen_batchnorm
        if processes.count() > 1:
            share_statistics(backbone)

    def __call__(self, batch: ImageBatch, *, batchnorm_training: bool = True) -> Tensor:
        """Encode a batch in training mode, with batch-norm in the mode given."""
        self.backbone.train()
        # A single image has no statistics.
        training = batchnorm_training and not self._frozen_batchnorm and len(batch) > 1
        for module in batchnorms(self.backbone):
            module.train(training and _learns(module))
        return self._together(batch, self._encode)

    @torch.no_grad()
    def score(self, head: Head, batch: ImageBatch, chunk_size: int) -> Tensor:
        """Return what the head keeps of a batch (n, U, D), the backbone in eval mode."""
        self.backbone.eval()

        def kept(part: ImageBatch) -> Tensor:
            return head.keep(self._encode(part))

        parts = batch.chunks(chunk_size * processes.count())
        return torch.cat([self._together(part, kept) for part in parts])

    def in_float32(self) -> "Encoder":
        """Return an encoder by the same backbone and images, whatever the precision of this one."""
        encoder = copy.copy(self)
        encoder._dtype = torch.float32
        return encoder

    def _together(self, batch: ImageBatch, encode: Callable[[ImageBatch], Tensor]) -> Tensor:
        """Encode a batch, divided among the processes."""
        if len(batch) < processes.count():  # too few to divide: every process encodes all
            return processes.one_voice(encode(batch))
        return processes.gather_rows(encode(batch.share()), len(batch))

    def _encode(self, batch: ImageBatch) -> Tensor:
        device = self.pixels.device
        with autocast(device, self._dtype):
            maps = self.backbone(self.pixels.load(batch))  # (n, C, h, w)
        maps = maps.float()
        if self._unit == "pixel" and batch.views.flips.any():
            # Back to their positions in the file, so that a pixel has the same index in every view
            # (approximately, with affine transforms).
            maps = flip_each(maps, to_device(batch.views.flips, device))
        return instances_of(maps, self._unit)


class CommonBatchNorm(nn.BatchNorm2d):
    """Batch-norm that trains on the statistics of all processes' images together.

    It takes over the parameters, buffers and parts of a layer, under their names. SyncBatchNorm, of
    torch and of timm, does the same on GPUs only.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.weight, self.bias = layer.weight, layer.bias  # (C,)
        self.running_mean, self.running_var = layer.running_mean, layer.running_var  # (C,)
        self.num_batches_tracked = layer.num_batches_tracked
        for name, part in layer.named_children():  # timm's drop and act
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, C, h, w), this process's images, then apply the layer's parts."""
        y = self._normalise(x) if self.training else super().forward(x)
        for part in self.children():
            y = part(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        values = x.float()  # (n, C, h, w)
        n = processes.summed(values.new_tensor([values.numel() / values.shape[1]]))
        mean = processes.summed(values.sum((0, 2, 3))) / n  # (C,)
        centred = values - mean[:, None, None]
        variance = processes.summed((centred * centred).sum((0, 2, 3))) / n
        self._follow(mean, variance * n / (n - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards a batch's, if there are any."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def share_statistics(module: nn.Module) -> None:
    """Replace the batch-norm layers of a network by common ones; its state dict stays the same."""
    for name, part in module.named_children():
        if isinstance(part, _BatchNorm):
            setattr(module, name, CommonBatchNorm(part))
        else:
            share_statistics(part)


def _learns(layer: nn.Module) -> bool:
    """Return whether a layer is not frozen; one without parameters is not."""
    return all(parameter.requires_grad for parameter in layer.parameters())


def batchnorms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers of a network."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics of batch-norm afterwards."""
    buffers = [buffer for layer in batchnorms(module) for buffer in layer.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
