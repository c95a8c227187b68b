"""L2 logistic regression solved exactly in the dual: many training sets and penalties at once.

Patients are few and features many, so a regression is solved by its patients: with Gram matrices
K (n, n) of the standardised features a fit costs O(n³), whatever the number of features. It
minimises

    mean over patients of the log loss + penalty / 2 · ‖weights‖²

with a free intercept. In scikit-learn's terms C = 1 / (n · penalty). METHOD §2 C.
"""

from collections.abc import Sequence
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
    (None: 1). From the largest penalty down, each starts from the one before. The logit of a
    patient left out is that of its weighted least-squares problem at the optimum, solved without it
    in closed form (Rad & Maleki 2020), so no fit is repeated.
    """
    n = grams.shape[1]
    importance = torch.ones_like(grams[:, 0]) if importance is None else importance
    found: dict[float, Solution] = {}
    alpha, intercept = grams.new_zeros(grams.shape[:2]), grams.new_zeros(len(grams))
    for penalty in sorted(set(penalties), reverse=True):
        problem = _Problem(grams, labels.to(grams.dtype), importance, n * penalty)
        alpha, intercept = problem.solve(alpha, intercept)
        found[penalty] = Solution(alpha, intercept, problem.left_out(alpha, intercept))
    return [found[penalty] for penalty in penalties]


@dataclass(frozen=True)
class _Problem:
    """Σ importance · log loss + ridge / 2 · alphaᵀ K alpha, for B training sets."""

    gram: Tensor  # (B, n, n)
    labels: Tensor  # (B, n)
    importance: Tensor  # (B, n)
    ridge: float

    def solve(self, alpha: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """Take Newton steps until no logit of any training set moves."""
        value = self.value(alpha, intercept)
        for _ in range(_STEPS):
            to_alpha, to_intercept = self._newton(alpha, intercept)
            alpha_step, intercept_step = to_alpha - alpha, to_intercept - intercept
            size, value = self._step_size(alpha, intercept, alpha_step, intercept_step, value)
            alpha = alpha + size[:, None] * alpha_step
            intercept = intercept + size * intercept_step
            moved = size[:, None] * self._logits(alpha_step, intercept_step)  # (B, n)
            if float(moved.abs().max()) < _TOLERANCE:
                break
        return alpha, intercept

    def value(self, alpha: Tensor, intercept: Tensor) -> Tensor:
        """Return what is minimised: (B,)."""
        fitted = (self.gram @ alpha[..., None])[..., 0]  # (B, n)
        logits = fitted + intercept[:, None]
        loss = self.importance * (softplus(logits) - self.labels * logits)
        return loss.sum(1) + self.ridge / 2 * (alpha * fitted).sum(1)

    def _logits(self, alpha: Tensor, intercept: Tensor) -> Tensor:
        return (self.gram @ alpha[..., None])[..., 0] + intercept[:, None]

    def _step_size(
        self,
        alpha: Tensor,
        intercept: Tensor,
        alpha_step: Tensor,
        intercept_step: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Halve the steps that would go up; return the steps' sizes and the values there, (B,)."""
        size = torch.ones_like(intercept)
        for _ in range(30):
            after = self.value(
                alpha + size[:, None] * alpha_step, intercept + size * intercept_step
            )
            worse = after > value + 1e-10 * value.abs()
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        return size, after

    def _working(self, alpha: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted least-squares problem at a point: curvatures, responses (B, n)."""
        logits = self._logits(alpha, intercept)
        p = logits.sigmoid()
        curvature = (p * (1 - p)).clamp(min=_LEAST_CURVATURE)
        return self.importance * curvature, logits + (self.labels - p) / curvature

    def _factor(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of ridge · I + R K R and R, the root of the curvatures."""
        root = curvature.sqrt()
        matrix = root[:, :, None] * self.gram * root[:, None, :]
        matrix.diagonal(dim1=1, dim2=2).add_(self.ridge)
        return torch.linalg.cholesky(matrix), root

    def _newton(self, alpha: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
        """Solve (K + ridge / curvature) alpha + intercept = response, the alphas adding up to 0."""
        curvature, response = self._working(alpha, intercept)
        factor, root = self._factor(curvature)
        sides = torch.stack([root * response, root], dim=2)  # (B, n, 2)
        solved = root[..., None] * torch.cholesky_solve(sides, factor)
        of_response, of_one = solved.unbind(2)  # (B, n) each
        intercept = of_response.sum(1) / of_one.sum(1)
        return of_response - intercept[:, None] * of_one, intercept

    def left_out(self, alpha: Tensor, intercept: Tensor) -> Tensor:
        """Return each patient's logit by the least-squares problem without it: (B, n)."""
        curvature, response = self._working(alpha, intercept)
        factor, root = self._factor(curvature)
        inverse = torch.cholesky_inverse(factor)  # (B, n, n)
        of_one = root * (inverse @ root[..., None])[..., 0]  # (B, n)
        diagonal = curvature * inverse.diagonal(dim1=1, dim2=2)
        diagonal = diagonal - of_one**2 / of_one.sum(1, keepdim=True)
        return response - alpha / diagonal
