"""Random views of training images: flips, and optionally colour and affine transforms.

Views are drawn on the CPU for a whole batch and applied on the device, so that both passes of the
exact gradient see the same views, as do runs on a CPU and on a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lymphfeat.features.augmentation import sample
from lymphfeat.runtime.devices import to_device
from lymphfeat.settings import EndToEndSettings


@dataclass(frozen=True, kw_only=True)
class Views:
    """The transforms of n images. Disabled ones have no columns. On the CPU."""

    flips: Tensor  # (n, 2) bool: left-right, upside-down
    colours: Tensor  # (n, 5 or 0) factors: of red, green and blue, saturation, contrast
    places: Tensor  # (n, 4 or 0): angle in radians, magnification, shift by x and y of half a side

    def map(self, change: Callable[[Tensor], Tensor]) -> "Views":
        """Apply the same change to every table."""
        return Views(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def apply(self, pixels: Tensor) -> Tensor:
        """Return the views of uint8 pixels (n, 3, H, W), 0 to 255, on their device."""
        if self.flips.any():
            pixels = flip_each(pixels, to_device(self.flips, pixels.device))
        if self.places.shape[1]:
            pixels = _place(pixels.float(), to_device(self.places, pixels.device))
        if self.colours.shape[1]:
            factors = to_device(self.colours, pixels.device)[:, :, None, None]
            gain, saturation, contrast = factors[:, :3], factors[:, 3:4], factors[:, 4:]
            pixels = recolour(pixels.float(), gain, saturation, contrast).clamp_(0, 255)
        return pixels


def unaltered(n: int) -> Views:
    """Return the identity views of n images."""
    return Views(
        flips=torch.zeros(n, 2, dtype=torch.bool),
        colours=torch.zeros(n, 0),
        places=torch.zeros(n, 0),
    )


def draw_views(n: int, settings: EndToEndSettings, generator: torch.Generator) -> Views:
    """Draw the views of n images.

    - flips: each of the two with probability one half.
    - `colour_jitter` s: every factor uniform in 1 ± s.
    - `affine` s: rotated by up to s half-turns either way, scaled by (1 + s) to the power of -1
      to 1, shifted by up to s quarters of a side along each axis; mirrored beyond the border.
    """
    views = unaltered(n)
    flips, colours, places = views.flips, views.colours, views.places

    def uniform(columns: int) -> Tensor:
        return 2 * torch.rand(n, columns, generator=generator) - 1

    if settings.flips:
        flips = torch.rand(n, 2, generator=generator) < 0.5
    if settings.colour_jitter:
        colours = 1 + settings.colour_jitter * uniform(5)
    if settings.affine:
        numbers = uniform(4)
        places = torch.cat(
            [
                math.pi * settings.affine * numbers[:, :1],
                (1 + settings.affine) ** numbers[:, 1:2],
                settings.affine / 2 * numbers[:, 2:],
            ],
            dim=1,
        )
    return Views(flips=flips, colours=colours, places=places)


def flip_each(images: Tensor, flips: Tensor) -> Tensor:
    """Flip each of (n, C, H, W) left-right where flips (n, 2) says so, and upside-down likewise."""
    for column, dim in ((0, -1), (1, -2)):
        images = torch.where(flips[:, column, None, None, None], images.flip(dim), images)
    return images


def _place(images: Tensor, places: Tensor) -> Tensor:
    angle, zoom, *shift = places.unbind(1)  # each (n,)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = [torch.stack([cos, -sin, shift[0]], dim=1), torch.stack([sin, cos, shift[1]], dim=1)]
    return sample(images, torch.stack(rows, dim=1), len(images), images.shape[-1])


def recolour(views: Tensor, gain: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Change the colours of views (n, 3, H, W) by factors: gain (n, 3, 1, 1), others (n, 1, 1, 1).

    Saturation moves a pixel from its grey, contrast from the mean of its view and channel.
    """
    views = views * gain
    grey = views.mean(1, keepdim=True)  # (n, 1, H, W)
    views = grey + (views - grey) * saturation
    mean = views.mean((2, 3), keepdim=True)  # (n, 3, 1, 1)
    return mean + (views - mean) * contrast
