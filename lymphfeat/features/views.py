"""What a backbone sees: normalised pixels, and the flipped views of an image."""

import torch
from torch import Tensor

from lymphfeat.cohort.images import VIEWS, Normalization
from lymphfeat.errors import SettingsError


def normalize(pixels: Tensor, normalization: Normalization) -> Tensor:
    """Turn uint8 pixels (N, 3, H, W) into the float input of a backbone, on their device."""
    mean = torch.tensor(normalization.mean, device=pixels.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(normalization.std, device=pixels.device).view(1, 3, 1, 1) * 255
    return pixels.to(torch.float32).sub_(mean).div_(std)  # (N, 3, H, W)


def flip_view(images: Tensor, view: str) -> Tensor:
    """Return the augmented copy called `view` (identity, hflip, vflip, both) of (…, H, W)."""
    dims = {"identity": (), "hflip": (-1,), "vflip": (-2,), "both": (-2, -1)}[view]
    return images.flip(dims) if dims else images


def parse_views(count: int) -> tuple[str, ...]:
    """Return the first `count` views in their order."""
    if not 1 <= count <= len(VIEWS):
        raise SettingsError(f"views (={count}) must be 1 to {len(VIEWS)}: {', '.join(VIEWS)}.")
    return VIEWS[:count]
