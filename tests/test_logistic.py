"""The dual solver beside scikit-learn, one regression after the other."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from lymphfeat.heads.engine.logistic import PENALTIES, Solution, solve_paths

N, CHANNELS = 40, 90


def draw(seed: int, n: int = N) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return features (n, D) of unit mean square and noisy labels (n,)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, CHANNELS)) / np.sqrt(CHANNELS)
    return z, (z[:, :9].sum(1) + rng.normal(scale=0.3, size=n) > 0).astype(np.int64)


def solve(
    z: NDArray[np.float64], labels: NDArray[np.int64], weights: NDArray[np.float64] | None = None
) -> list[Solution]:
    importance = None if weights is None else torch.from_numpy(weights)[None]
    return solve_paths(torch.from_numpy(z @ z.T)[None], torch.from_numpy(labels)[None], importance)


def fit_by_sklearn(
    z: NDArray[np.float64],
    labels: NDArray[np.int64],
    penalty: float,
    weights: NDArray[np.float64] | None = None,
    n: int = N,
) -> LogisticRegression:
    model = LogisticRegression(C=1 / (n * penalty), tol=1e-10, max_iter=100_000)
    return model.fit(z, labels, sample_weight=weights)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_penalty_gives_what_sklearn_gives(weighted: bool) -> None:
    z, labels = draw(0)
    weights = np.random.default_rng(1).uniform(0.5, 2, N) if weighted else None
    for penalty, found in zip(PENALTIES, solve(z, labels, weights), strict=True):
        model = fit_by_sklearn(z, labels, penalty, weights)
        own = found.alpha[0].numpy() @ z  # (D,)
        np.testing.assert_allclose(own, model.coef_[0], atol=1e-4 * np.abs(own).max())
        assert float(found.intercept[0]) == pytest.approx(float(model.intercept_[0]), abs=1e-4)


@pytest.mark.parametrize(("penalty", "tolerance"), [(1e-3, 0.1), (1e-2, 0.02), (1.0, 0.002)])
def test_a_patient_left_out_is_scored_as_by_a_fit_without_it(
    penalty: float, tolerance: float
) -> None:
    z, labels = draw(2)
    (found,) = solve_paths(
        torch.from_numpy(z @ z.T)[None], torch.from_numpy(labels)[None], penalties=[penalty]
    )
    refitted = []
    for i in range(N):
        others = np.arange(N) != i
        model = fit_by_sklearn(z[others], labels[others], penalty)
        refitted.append(float(model.decision_function(z[i : i + 1])[0]))
    error = np.abs(found.left_out[0].numpy() - np.array(refitted)).max()
    assert error < tolerance * np.std(refitted) + 1e-3


def test_training_sets_together_are_solved_as_each_alone() -> None:
    drawn = [draw(seed) for seed in range(4)]
    grams = torch.stack([torch.from_numpy(z @ z.T) for z, _ in drawn])
    labels = torch.stack([torch.from_numpy(y) for _, y in drawn])
    for at, together in enumerate(solve_paths(grams, labels)):
        for place, (z, y) in enumerate(drawn):
            alone = solve(z, y)[at]
            torch.testing.assert_close(together.alpha[place], alone.alpha[0], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(
                together.left_out[place], alone.left_out[0], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("weighted", [False, True])
def test_patients_left_out_are_those_of_the_least_squares_problem_at_the_optimum(
    weighted: bool,
) -> None:
    z, labels = draw(4)
    weights = np.random.default_rng(1).uniform(0.5, 2, N) if weighted else np.ones(N)
    for penalty, found in zip(PENALTIES, solve(z, labels, weights), strict=True):
        logits = found.alpha[0].numpy() @ z @ z.T + float(found.intercept[0])
        p = 1 / (1 + np.exp(-logits))
        response = logits + (labels - p) / (p * (1 - p))
        expected = [
            solve_without(i, z, weights * p * (1 - p), response, N * penalty) for i in range(N)
        ]
        np.testing.assert_allclose(found.left_out[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def solve_without(
    patient: int,
    z: NDArray[np.float64],
    curvature: NDArray[np.float64],
    response: NDArray[np.float64],
    ridge: float,
) -> float:
    """Return a patient's logit by weighted ridge regression on the others, intercept free."""
    others = np.arange(len(z)) != patient
    inputs = np.column_stack([z, np.ones(len(z))])
    weighed = inputs[others] * curvature[others, None]
    free = np.diag([*np.full(z.shape[1], ridge), 0.0])
    solution = np.linalg.solve(weighed.T @ inputs[others] + free, weighed.T @ response[others])
    return float(inputs[patient] @ solution)


def test_penalties_are_answered_in_the_order_asked() -> None:
    z, labels = draw(3)
    gram, y = torch.from_numpy(z @ z.T)[None], torch.from_numpy(labels)[None]
    rising = solve_paths(gram, y, penalties=[0.01, 1.0])
    falling = solve_paths(gram, y, penalties=[1.0, 0.01])
    assert torch.equal(rising[0].alpha, falling[1].alpha)
    assert float(rising[0].alpha.abs().max()) > 1.5 * float(rising[1].alpha.abs().max())


def test_separable_patients_are_solved_down_to_the_smallest_penalty() -> None:
    z = np.concatenate([np.full((20, 3), 1.0), np.full((20, 3), -1.0)])
    labels = np.repeat([1, 0], 20)
    for found in solve(z, labels):
        assert found.left_out.isfinite().all()
        logits = found.alpha[0].numpy() @ z @ z.T + float(found.intercept[0])
        assert ((logits > 0) == labels).all()


def test_features_that_say_nothing_leave_the_share_of_tumoral_patients() -> None:
    labels = np.repeat([1, 0], [30, 10])
    (found,) = solve_paths(
        torch.zeros(1, N, N, dtype=torch.float64), torch.from_numpy(labels)[None], penalties=[0.1]
    )
    assert float(found.intercept.sigmoid()) == pytest.approx(0.75)
    # A reactive patient left out raises the share: 30 of 39.
    assert float(found.left_out[0, -1].sigmoid()) == pytest.approx(30 / 39, abs=0.002)
