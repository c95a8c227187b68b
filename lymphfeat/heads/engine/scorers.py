"""Stacked linear scorers: standardised in training, folded for use; their optimiser."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, FittedHeads, split_generator
from lymphfeat.heads.stack import class_weights, initial_scorer, scale_of


@dataclass(frozen=True)
class Scaling:
    """Per split and channel, mean and 1 / standard deviation over its TRAINING patients' images.

    A scorer is trained on standardised features and applied to raw ones: it is folded, (w / s,
    b − w · m / s), so no aggregator knows of it and every head stays a 1×1 convolution. A channel
    that never varies in training gets scale 0 and so weight 0: Adam would blow up the rounding
    errors of its gradient.
    """

    mean: Tensor  # (H, C)
    scale: Tensor  # (H, C)

    @classmethod
    def of(cls, features: Features, fits: Sequence[Fit]) -> "Scaling":
        moments = {train: _moments(features, train) for train in {fit.split.train for fit in fits}}
        pairs = [moments[fit.split.train] for fit in fits]
        return cls(
            torch.stack([mean for mean, _ in pairs]), torch.stack([scale for _, scale in pairs])
        )

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scorer (H, C), (H,) that gives the same logits on raw features."""
        folded = weight * self.scale
        return folded, bias - (folded * self.mean).sum(1)

    def unfold_gradient(self, folded: Tensor, total: Tensor) -> Tensor:
        """Turn a gradient by the folded weight (H, C) into one by the weight; `total` (H,)."""
        return (folded - total[:, None] * self.mean) * self.scale


def _moments(features: Features, patients: Sequence[str]) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(features.rows_of(sorted(patients))).to(features.device)
    count, total, squares = (sums[rows].sum(0) for sums in features.patient_sums)
    mean = total / count  # (C,)
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return mean.float(), scale_of(mean, std).float()


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


class Scorers:
    """The linear scorers of a trainer, and their optimiser."""

    def __init__(self, features: Features, fits: Sequence[Fit]) -> None:
        """Initialise one scorer for each of `fits`, as its split's generator draws it."""
        device = features.device
        self.scaling = Scaling.of(features, fits)
        self.generators = [split_generator(fit.split) for fit in fits]  # drawn from on
        drawn = [initial_scorer(features.channels, generator) for generator in self.generators]
        self.weight = torch.stack([weight for weight, _ in drawn]).to(device)  # (H, C)
        self.bias = torch.stack([bias for _, bias in drawn]).to(device)  # (H,)
        self.class_weights = torch.stack([_class_weights(features, fit) for fit in fits])  # (H, 2)

    def optimizer(self, fits: Sequence[Fit], *others: Tensor) -> StackedAdam:
        """Return the optimiser of the weights, the biases and `others` (H, …)."""
        device = self.weight.device
        return StackedAdam(
            [self.weight, self.bias, *others],
            torch.tensor([fit.head.lr for fit in fits], device=device),
            torch.tensor([fit.head.weight_decay for fit in fits], device=device),
        )

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return the scorers (H, C), (H,) of raw features."""
        return self.scaling.fold(self.weight, self.bias)

    def keep(self, result: FittedHeads, positions: Sequence[int], columns: Sequence[int]) -> None:
        """Write the folded scorers in some columns to some positions of a result."""
        weight, bias = self.folded()
        result.weight[positions] = weight[columns].cpu().numpy()
        result.bias[positions] = bias[columns].cpu().numpy()


def _class_weights(features: Features, fit: Fit) -> Tensor:
    rows = torch.from_numpy(features.rows_of(fit.split.train)).to(features.device)
    return class_weights(fit.head, features.labels[rows])


def score(instances: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Score instances (M, C) by folded scorers (H, C), (H,): logits (M, H) in float32."""
    return (instances @ weight.to(instances.dtype).mT).float() + bias


def score_rows(instances: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Score instances (m, C) by folded scorers (K, C), (K,): logits (K, m) in float32.

    As `score`, heads first: a bag of one head is contiguous.
    """
    return (weight.to(instances.dtype) @ instances.mT).float() + bias[:, None]
