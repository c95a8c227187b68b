"""Random views of cells: flips, right angles, scale, shift, stain, blur, noise; on any device.

Nothing here hides the texture of a nucleus: no cut-outs, no strong blur, no grey-scale, and no crop
that leaves the nucleus out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far views of one cell may differ. Colours are factors around 1, on the 0..255 scale."""

    size: int  # pixels of a view's side
    zoom: tuple[float, float] = (0.8, 1.15)  # magnification, log-uniform
    shift: float = 0.07  # of half the field, either way, along each axis
    brightness: float = 0.12
    stain: float = 0.08  # of each channel separately: the hue of a stain
    saturation: float = 0.25
    contrast: float = 0.15
    blur: float = 0.25  # share of views that are blurred a little
    noise: float = 4.0  # largest standard deviation of pixel noise

    def draw(self, fields: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one view of each field of pixels.

        `fields` (n, 3, F, F) are 0..255 of any dtype; the views (n, 3, size, size) are float32, 0
        to 255. The generator must be on the fields' device.
        """
        dice = _Dice(len(fields), generator)
        views = self._place(fields.float(), dice)  # (n, 3, size, size)
        views = self._stain(views, dice)
        views = torch.where(dice.share(self.blur), _blurred(views), views)
        noise = torch.randn(views.shape, generator=generator, device=views.device)
        return (views + noise * dice.uniform(0, self.noise)).clamp_(0, 255)

    def _place(self, fields: Tensor, dice: "_Dice") -> Tensor:
        """Rotate, mirror, magnify and shift."""
        n, side = len(fields), fields.shape[-1]
        low, high = (math.log(factor) for factor in self.zoom)
        scale = self.size / side / dice.uniform(low, high).exp().flatten()  # (n,)
        mirror = torch.where(dice.share(0.5).flatten(), -1.0, 1.0)
        cos, sin = dice.right_angles()
        shifts = [dice.uniform(-self.shift, self.shift).flatten() for _ in range(2)]
        rows = [
            torch.stack([cos * mirror * scale, -sin * scale, shifts[0]], dim=1),
            torch.stack([sin * mirror * scale, cos * scale, shifts[1]], dim=1),
        ]
        return sample(fields, torch.stack(rows, dim=1), n, self.size)

    def _stain(self, views: Tensor, dice: "_Dice") -> Tensor:
        gain = dice.about_one(self.brightness) * dice.about_one(self.stain, channels=3)
        return recolour(views, gain, dice.about_one(self.saturation), dice.about_one(self.contrast))


def recolour(views: Tensor, gain: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Change the colours of views (n, 3, H, W) by factors: gain (n, 3, 1, 1), others (n, 1, 1, 1).

    Saturation moves a pixel from its grey, contrast from the mean of its view and channel.
    """
    views = views * gain
    grey = views.mean(1, keepdim=True)  # (n, 1, H, W)
    views = grey + (views - grey) * saturation
    mean = views.mean((2, 3), keepdim=True)  # (n, 3, 1, 1)
    return mean + (views - mean) * contrast


def centre_views(fields: Tensor, size: int, zoom: float) -> Tensor:
    """Return the unaltered centre of each field (n, 3, F, F) at one magnification, as float32."""
    scale = size / fields.shape[-1] / zoom
    matrix = torch.tensor([[scale, 0.0, 0.0], [0.0, scale, 0.0]], device=fields.device)
    return sample(fields.float(), matrix.expand(len(fields), 2, 3), len(fields), size)


def sample(fields: Tensor, matrices: Tensor, n: int, size: int) -> Tensor:
    """Sample (n, 3, F, F) at affine places (n, 2, 3), mirrored beyond the border."""
    grid = F.affine_grid(matrices, [n, 3, size, size], align_corners=False)
    return F.grid_sample(fields, grid, padding_mode="reflection", align_corners=False)


def _blurred(views: Tensor) -> Tensor:
    box = F.avg_pool2d(F.pad(views, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return 0.6 * box + 0.4 * views


class _Dice:
    """Random numbers for n views, each of shape (n, 1, 1, 1) unless it says otherwise."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self._n, self._generator = n, generator

    def uniform(self, low: float, high: float, channels: int = 1) -> Tensor:
        shape = (self._n, channels, 1, 1)
        numbers = torch.rand(shape, generator=self._generator, device=self._generator.device)
        return low + (high - low) * numbers

    def about_one(self, width: float, channels: int = 1) -> Tensor:
        return self.uniform(1 - width, 1 + width, channels)

    def share(self, share: float) -> Tensor:
        return self.uniform(0, 1) < share

    def right_angles(self) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of 0, 90, 180 or 270 degrees, each (n,)."""
        turns = torch.randint(
            0, 4, (self._n,), generator=self._generator, device=self._generator.device
        )
        cos = torch.tensor([1.0, 0.0, -1.0, 0.0], device=turns.device)[turns]
        sin = torch.tensor([0.0, 1.0, 0.0, -1.0], device=turns.device)[turns]
        return cos, sin
