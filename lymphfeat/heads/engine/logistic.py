"""L2 logistic regression solved exactly in the dual: many training sets and penalties at once.

Patients are few and features many, so a regression is solved by its patients: with Gram matrices
K (n, n) of the standardised features a fit costs O(n³), whatever the number of features. It
minimises

    mean over patients of the log loss + penalty / 2 · ‖weights‖²

with a free intercept. In scikit-learn's terms C = 1 / (n · penalty). METHOD §2 C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

PENALTIES = tuple(10.0 ** (half / 2) for half in range(-10, 3))  # .00001 to 10, two per decade
_TOLERANCE = 1e-5  # of a logit; a Newton step after a smaller one changes next to nothing
_STEPS = 100
_LEAST_CURVATURE = 1e-12  # of a patient's loss, whose logit is as good as certain


@dataclass(frozen=True)
class Solution:
    """The regressions of B training sets under one penalty, float64."""

    alpha: Tensor  # (B, n): the weights are Zᵀ alpha, Z (n, D) the standardised features
    intercept: Tensor  # (B,)
    left_out: Tensor  # (B, n) each patient's logit by a fit without it (approximate leave-one-out)


def solve_paths(
    grams: Tensor,
    labels: Tensor,
    importance: Tensor | None = None,
    penalties: Sequence[float] = PENALTIES,
) -> list[Solution]:
    """Solve B training sets of n patients under every penalty; one solution per penalty, in order.

    `grams` (B, n, n), `labels` (B, n) of 0 and 1, `importance` (B, n) multiplies a patient's loss
    (None: 1). From the largest penalty down, each starts where the path leads. The logit of a
    patient left out is that of its weighted least-squares problem at the optimum, solved without it
    in closed form (Rad & Maleki 2020), so no fit is repeated.
    """
    n = grams.shape[1]
    importance = torch.ones_like(grams[:, 0]) if importance is None else importance
    found: dict[float, Solution] = {}
    for penalty in sorted(set(penalties), reverse=True):
        problem = _Problem(grams, labels.to(grams.dtype), importance, n * penalty)
        found[penalty] = problem.solve(*_expected(found, penalty, importance))
    return [found[penalty] for penalty in penalties]


def _expected(
    found: Mapping[float, Solution], penalty: float, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Continue a path of solutions to the next penalty, linearly in its logarithm."""
    if not found:
        return torch.zeros_like(importance), torch.zeros_like(importance[:, 0])
    *_, last = found
    alpha, intercept = found[last].alpha, found[last].intercept
    if len(found) > 1:
        *_, before, _ = found
        further = math.log(penalty / last) / math.log(last / before)
        alpha = alpha + further * (alpha - found[before].alpha)
        intercept = intercept + further * (intercept - found[before].intercept)
    return alpha, intercept


@dataclass(frozen=True)
class _Point:
    """Dual weights and intercepts, and what they give."""

    alpha: Tensor  # (B, n)
    intercept: Tensor  # (B,)
    fitted: Tensor  # (B, n) K alpha

    @property
    def logits(self) -> Tensor:
        return self.fitted + self.intercept[:, None]

    def towards(self, step: "_Point", size: Tensor) -> "_Point":
        """Go a step of the sizes (B,)."""
        return _Point(
            self.alpha + size[:, None] * step.alpha,
            self.intercept + size * step.intercept,
            self.fitted + size[:, None] * step.fitted,
        )


@dataclass(frozen=True)
class _LeastSquares:
    """The weighted least-squares problems whose solution is a Newton step's end."""

    curvature: Tensor  # (B, n)
    response: Tensor  # (B, n)
    root: Tensor  # (B, n) of the curvature
    factor: Tensor  # (B, n, n) Cholesky factor of ridge · I + R K R, R the roots

    def solve(self) -> tuple[Tensor, Tensor]:
        """Solve (K + ridge / curvature) alpha + intercept = response, the alphas adding up to 0."""
        sides = torch.stack([self.root * self.response, self.root], dim=2)  # (B, n, 2)
        solved = self.root[..., None] * torch.cholesky_solve(sides, self.factor)
        of_response, of_one = solved.unbind(2)  # (B, n) each
        intercept = of_response.sum(1) / of_one.sum(1)
        return of_response - intercept[:, None] * of_one, intercept

    def left_out(self, alpha: Tensor) -> Tensor:
        """Return each patient's logit by the problem without it; alpha (B, n) its solution."""
        inverse = torch.cholesky_inverse(self.factor)  # (B, n, n)
        of_one = self.root * (inverse @ self.root[..., None])[..., 0]  # (B, n)
        diagonal = self.curvature * inverse.diagonal(dim1=1, dim2=2)
        diagonal = diagonal - of_one**2 / of_one.sum(1, keepdim=True)
        return self.response - alpha / diagonal


@dataclass(frozen=True)
class _Problem:
    """Σ importance · log loss + ridge / 2 · alphaᵀ K alpha, for B training sets."""

    gram: Tensor  # (B, n, n)
    labels: Tensor  # (B, n)
    importance: Tensor  # (B, n)
    ridge: float

    def solve(self, alpha: Tensor, intercept: Tensor) -> Solution:
        """Take Newton steps until no logit of any training set moves.

        The last step starts where the next would, to the tolerance: its least-squares problem is
        that of the optimum, which gives the patients left out.
        """
        point = _Point(alpha, intercept, self._fitted(alpha))
        value = self.value(point)
        for _ in range(_STEPS):
            squares = self._least_squares(point.logits)
            to_alpha, to_intercept = squares.solve()
            change = to_alpha - point.alpha
            step = _Point(change, to_intercept - point.intercept, self._fitted(change))
            point, value, moved = self._go(point, step, value)
            if moved < _TOLERANCE:
                break
        return Solution(point.alpha, point.intercept, squares.left_out(to_alpha))

    def value(self, point: _Point) -> Tensor:
        """Return what is minimised: (B,)."""
        logits = point.logits
        loss = self.importance * (softplus(logits) - self.labels * logits)
        return loss.sum(1) + self.ridge / 2 * (point.alpha * point.fitted).sum(1)

    def _fitted(self, alpha: Tensor) -> Tensor:
        return (self.gram @ alpha[..., None])[..., 0]

    def _go(self, point: _Point, step: _Point, value: Tensor) -> tuple[_Point, Tensor, float]:
        """Go a step, halved where it would go up; return where to, values, the largest move."""
        size = torch.ones_like(value)
        for _ in range(30):
            there = point.towards(step, size)
            after = self.value(there)
            worse = after > value + 1e-10 * value.abs()
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        return there, after, float((size[:, None] * step.logits).abs().max())

    def _least_squares(self, logits: Tensor) -> _LeastSquares:
        """Return the weighted least-squares problem at logits (B, n)."""
        p = logits.sigmoid()
        curvature = (p * (1 - p)).clamp(min=_LEAST_CURVATURE)
        response = logits + (self.labels - p) / curvature
        curvature = self.importance * curvature
        root = curvature.sqrt()
        matrix = root[:, :, None] * self.gram * root[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return _LeastSquares(curvature, response, root, torch.linalg.cholesky(matrix))
