"""Random views of cells: flips, right angles, scale, shift, stain, blur, noise; on any device.

Nothing here hides the nucleus: no cut-outs, no grey-scale, and no crop that leaves it out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLUR = tuple(share / 64 for share in (1, 6, 15, 20, 15, 6, 1))  # deviation 1.2 pixels


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far views of one cell may differ."""

    size: int  # pixels of a view's side
    shift: float = 0.07  # of half the field, either way, along each axis
    stain: float = 1.0  # how strongly colours change; 0: not at all
    blur: float = 0.5  # share of views that are blurred, by up to a deviation of 1.2 pixels
    noise: float = 4.0  # largest standard deviation of pixel noise

    def draw(self, fields: Tensor, generator: torch.Generator, zooms: Tensor) -> Tensor:
        """Draw one view of each field of pixels, at magnifications `zooms` (n,).

        `fields` (n, 3, F, F) are 0..255 of any dtype; the views (n, 3, size, size) are float32, 0
        to 255. The generator must be on the fields' device.
        """
        dice = _Dice(len(fields), generator)
        views = self._place(fields.float(), dice, zooms)  # (n, 3, size, size)
        if self.stain:
            views = self._stain(views, dice)
        if self.blur:
            views = blurred(views, dice.share(self.blur) * dice.uniform(0, 1))
        if self.noise:
            noise = torch.randn(views.shape, generator=generator, device=views.device)
            views = views + noise * dice.uniform(0, self.noise)
        return views.clamp_(0, 255)

    def _place(self, fields: Tensor, dice: "_Dice", zooms: Tensor) -> Tensor:
        """Rotate, mirror, magnify and shift."""
        n, side = len(fields), fields.shape[-1]
        scale = self.size / side / zooms  # (n,)
        mirror = torch.where(dice.share(0.5).flatten(), -1.0, 1.0)
        cos, sin = dice.right_angles()
        shifts = [dice.uniform(-self.shift, self.shift).flatten() for _ in range(2)]
        rows = [
            torch.stack([cos * mirror * scale, -sin * scale, shifts[0]], dim=1),
            torch.stack([sin * mirror * scale, cos * scale, shifts[1]], dim=1),
        ]
        return sample(fields, torch.stack(rows, dim=1), n, self.size)

    def _stain(self, views: Tensor, dice: "_Dice") -> Tensor:
        """Change the amount and the colour of the dyes, the light, saturation and contrast."""
        density = dice.factor(0.3 * self.stain) * dice.factor(0.2 * self.stain, channels=3)
        light = (views / 255).clamp_(1 / 255, 1).pow_(density)  # Beer and Lambert: a dye's amount
        gain = dice.factor(0.12 * self.stain) * dice.factor(0.08 * self.stain, channels=3)
        turn = 2 * math.pi * dice.uniform(-0.08 * self.stain, 0.08 * self.stain)
        matrix = saturated(dice.factor(0.5 * self.stain)) @ turned(turn) * gain.view(-1, 1, 3)
        light = (matrix @ light.flatten(2)).view_as(light)
        mean = light.mean((2, 3), keepdim=True)  # (n, 3, 1, 1)
        return 255 * (mean + (light - mean) * dice.factor(0.25 * self.stain))


def turned(angle: Tensor) -> Tensor:
    """Return matrices (n, 3, 3) that turn colours about grey by angles (n, 1, 1, 1) in radians."""
    grey = torch.full((3, 3), 1 / 3, device=angle.device)
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=angle.device) / 3**0.5
    cos, sin = angle[..., 0].cos(), angle[..., 0].sin()  # (n, 1, 1)
    return cos * torch.eye(3, device=angle.device) + (1 - cos) * grey + sin * across


def saturated(factor: Tensor) -> Tensor:
    """Return matrices (n, 3, 3) that move colours from grey by factors (n, 1, 1, 1)."""
    grey = torch.full((3, 3), 1 / 3, device=factor.device)
    return grey + factor[..., 0] * (torch.eye(3, device=factor.device) - grey)


def centre_views(fields: Tensor, size: int, zoom: float) -> Tensor:
    """Return the unaltered centre of each field (n, 3, F, F) at one magnification, as float32."""
    scale = size / fields.shape[-1] / zoom
    matrix = torch.tensor([[scale, 0.0, 0.0], [0.0, scale, 0.0]], device=fields.device)
    return sample(fields.float(), matrix.expand(len(fields), 2, 3), len(fields), size)


def sample(fields: Tensor, matrices: Tensor, n: int, size: int) -> Tensor:
    """Sample (n, 3, F, F) at affine places (n, 2, 3), mirrored beyond the border."""
    grid = F.affine_grid(matrices, [n, 3, size, size], align_corners=False)
    return F.grid_sample(fields, grid, padding_mode="reflection", align_corners=False)


def blurred(views: Tensor, weight: Tensor) -> Tensor:
    """Mix views with blurred ones, whose weight is (n, 1, 1, 1)."""
    soft = views
    # Sums of slices: on a CPU several times as fast as a convolution of one channel.
    for axis in (2, 3):
        side = soft.shape[axis]
        border = (3, 3, 0, 0) if axis == 3 else (0, 0, 3, 3)
        padded = F.pad(soft, border, mode="reflect")
        soft = padded.narrow(axis, 0, side) * _BLUR[0]
        for place, share in enumerate(_BLUR[1:], start=1):
            soft.add_(padded.narrow(axis, place, side), alpha=share)
    return torch.lerp(views, soft, weight)


class _Dice:
    """Random numbers for n views, each of shape (n, 1, 1, 1) unless it says otherwise."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self._n, self._generator = n, generator

    def uniform(self, low: float, high: float, channels: int = 1) -> Tensor:
        shape = (self._n, channels, 1, 1)
        numbers = torch.rand(shape, generator=self._generator, device=self._generator.device)
        return low + (high - low) * numbers

    def factor(self, width: float, channels: int = 1) -> Tensor:
        return self.uniform(-width, width, channels).exp()

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
