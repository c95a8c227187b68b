"""Decoded crops into feature maps, with a frozen backbone."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.images import Normalization
from lymphfeat.features.backbones import Backbone, ready_to_run
from lymphfeat.features.pipeline import PIECE
from lymphfeat.features.store import MapShape
from lymphfeat.features.views import flip_view, normalize
from lymphfeat.runtime.devices import autocast


class MapEncoder:
    """Turns decoded crops into feature maps of every view."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        normalization: Normalization,
        views: tuple[str, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._backbone = ready_to_run(backbone, dtype, device)
        self._normalization = normalization
        self._views = views
        self._dtype = dtype
        self._device = device

    def map_shape(self, crop: int) -> MapShape:
        """Return the shape of what `encode` gives for one crop."""
        _, views, *size = self.encode(np.zeros((1, 3, crop, crop), np.uint8)).shape
        return MapShape(views=views, channels=size[0], height=size[1], width=size[2])

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode crops (n, 3, H, W) as feature maps (n, V, C, h, w)."""
        size = PIECE if self._device.type == "cpu" else len(pixels)
        pieces = torch.split(torch.from_numpy(pixels), size)
        return torch.cat([self._encode_views(piece) for piece in pieces]).numpy()

    def _encode_views(self, pixels: Tensor) -> Tensor:
        images = normalize(pixels.to(self._device), self._normalization)
        images = images.contiguous(memory_format=torch.channels_last)
        maps = [self._encode_view(flip_view(images, view)) for view in self._views]
        return torch.stack(maps, dim=1).cpu()  # (n, V, C, h, w)

    def _encode_view(self, images: Tensor) -> Tensor:
        with autocast(self._device, self._dtype):
            maps: Tensor = self._backbone(images)  # (n, C, h, w)
        return maps.float().contiguous()
