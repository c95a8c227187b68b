"""How far bfloat16 may move a result: derived from its 8 significant bits, not fitted to a run.

A value x is rounded to the nearest of the numbers that bfloat16 has, which lie 2^(e - 7) apart
where 2^e ≤ |x| < 2^(e + 1): it moves by at most half of that, no more than 2^-8 |x|.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

UNIT_ROUNDOFF = 2.0**-8
# Of a tolerance: float32 has 24 significant bits, so its own roundings move a result 2^-16 as far.
MORE_THAN_FLOAT32 = 2.0**-16
_UNLIKELY = 1e-6  # the chance that rounding moves a result further than its tolerance


def largest_rounding(values: Tensor) -> Tensor:
    """Return half the distance between bfloat16's numbers at `values`, the most they may move."""
    _, exponent = torch.frexp(values)  # |x| = m 2^exponent with m in [1/2, 1)
    return torch.where(values == 0, 0.0, torch.ldexp(torch.ones_like(values), exponent - 9))


class _Results(TorchFunctionMode):
    """Keeps the result of every operation that gradients flow through."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}  # in place is the same tensor

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, Tensor) and result.requires_grad:
            self.kept[id(result)] = result
        return result


def bfloat16_tolerance(
    compute: Callable[[Tensor], Tensor],
    inputs: Tensor,
    weights: Iterable[Tensor],
    read: Callable[[Tensor], Tensor] = lambda results: results,
) -> NDArray[np.float64]:
    """Return how far bfloat16 may move read(compute(inputs)), each of the numbers (K,).

    `compute` rounds the inputs, the weights and the result of every operation, and makes sums in
    float32; `read` is in float32. To first order a result y moves by Σ ∂y/∂xᵢ δᵢ. Each δᵢ is taken
    for independent of the others and uniform over its interval ± hᵢ (the usual model; Higham and
    Mary 2019, SIAM J. Sci. Comput. 41). A uniform variable is sub-Gaussian with its own variance
    hᵢ²/3, so P(|Σ| > t) ≤ 2 exp(-t² / 2 Σ (∂y/∂xᵢ hᵢ)²/3): solved for t at a chance of 10⁻⁶. The
    gradients are those of the float32 computation. Second order is about 2^-8 of first order and
    left out.
    """
    inputs = inputs.clone().requires_grad_()
    with _Results() as results:
        computed = compute(inputs)
    outputs = read(computed)  # (K,)
    rounded = [inputs, *weights, *results.kept.values()]
    gradients = torch.autograd.grad(
        outputs, rounded, torch.eye(len(outputs)), is_grads_batched=True, allow_unused=True
    )
    variance = torch.zeros(len(outputs), dtype=torch.float64)
    for values, gradient in zip(rounded, gradients, strict=True):
        if gradient is not None:  # (K, …)
            moved = gradient.flatten(1).double() * largest_rounding(values.detach()).flatten()
            variance += moved.square().sum(1) / 3
    tolerance: NDArray[np.float64] = (2 * math.log(2 / _UNLIKELY) * variance).sqrt().numpy()
    return tolerance


def score_tolerance(
    instances: NDArray[np.float32], weight: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the most that bfloat16 moves the logits of instances (n, C) by a linear scorer.

    Σ wᵢ fᵢ of rounded wᵢ and fᵢ, itself rounded: no chance here, at the worst every one of them is
    off by the unit roundoff u the same way. The bias is added in float32.
    """
    products = instances.astype(np.float64) * weight  # (n, C)
    grown = (1 + UNIT_ROUNDOFF) ** 2 - 1
    moved = grown * np.abs(products).sum(1)
    most: NDArray[np.float64] = moved + UNIT_ROUNDOFF * (np.abs(products.sum(1)) + moved)
    return most
