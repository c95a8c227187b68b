"""Adam for many heads side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor


class StackedAdam:
    """Adam (Kingma & Ba 2015, torch's defaults) for H heads, each with its own lr and step count.

    Heads without a gradient in a step (`active` false) are left unchanged.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: Tensor, weight_decay: Tensor) -> None:
        """Take parameters (H, …); lr and weight_decay (H,)."""
        self._parameters = list(parameters)
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]
        self._lr, self._weight_decay = lr, weight_decay
        self._steps = torch.zeros_like(lr)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], active: Tensor) -> None:
        """Update the active (H,) heads by their gradients, (H, …) each."""
        self._steps += active
        steps = self._steps.clamp(min=1)
        step_size = active * self._lr / (1 - 0.9**steps)
        second_correction = (1 - 0.999**steps).sqrt()
        for parameter, gradient, first, second in zip(
            self._parameters, gradients, self._first, self._second, strict=True
        ):
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            on = active.view(shape)
            gradient = gradient + self._weight_decay.view(shape) * parameter
            first.lerp_(gradient, 0.1 * on)
            second.lerp_(gradient * gradient, 0.001 * on)
            divisor = second.sqrt() / second_correction.view(shape) + 1e-8
            parameter -= step_size.view(shape) * first / divisor
