"""Statistics of a patient's instances beside slow references, and the laws they obey."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.heads.aggregators.distribution import (
    Deviation,
    KernelMean,
    LogDeviation,
    Mean,
    OrderStatistic,
    PrototypeMeans,
    PrototypeShares,
    QuantileRange,
    Statistic,
    gini_weights,
    quantile_weights,
)
from lymphfeat.heads.bags import Bags

CHANNELS = 5
CENTRES = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(5))
STATISTICS: dict[str, Statistic] = {
    "mean": Mean(),
    "std": Deviation(),
    "logstd": LogDeviation(torch.full((CHANNELS,), 0.1)),
    "gini": OrderStatistic(gini_weights),
    "q90-50": OrderStatistic(QuantileRange(0.9, 0.5)),
    "kernel-mean": KernelMean.draw(CHANNELS, bandwidth=2.0),
    "prototype shares": PrototypeShares(CENTRES),
    "prototype means": PrototypeMeans(CENTRES),
}
# Averaged over all bags that lack one instance they are what they are of the whole bag.
UNBIASED: dict[str, tuple[Statistic, int]] = {
    "mean": (Mean(), 2),
    "gini": (OrderStatistic(gini_weights), 3),
    "q90-50": (OrderStatistic(QuantileRange(0.9, 0.5)), 17),
    "kernel-mean": (STATISTICS["kernel-mean"], 2),
    "prototype shares": (STATISTICS["prototype shares"], 2),
}


def draw(sizes: list[int], seed: int = 0) -> tuple[Tensor, Bags]:
    """Return skewed instances (M, C) of bags of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(sizes), CHANNELS, generator=generator).exp(), Bags.of(sizes)


def describe_by_hand(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Describe one bag (n, C) as METHOD §2 C is written."""
    if name == "mean":
        return np.asarray(x.mean(0))
    if name in ("std", "logstd"):
        n = len(x)
        read = np.log if name == "logstd" else np.asarray
        whole, *without = (
            read(part.std(0, ddof=1) + (0.1 if name == "logstd" else 0))
            for part in (x, *(np.delete(x, i, 0) for i in range(n if n > 16 else 0)))
        )
        if n <= 16:
            return np.asarray(whole)
        bias = n * (n - 1) * (np.mean(without, 0) - whole)  # times 1 / n
        return np.asarray(whole + bias * (1 / 16 - 1 / n))
    if name == "gini":
        return np.asarray(np.mean([np.abs(a - b) for a, b in combinations(x, 2)], axis=0))
    if name == "q90-50":
        subsets = [x[list(rows)] for rows in combinations(range(len(x)), min(16, len(x)))]
        low, high = np.quantile(subsets, [0.5, 0.9], axis=1)
        return np.asarray((high - low).mean(0))
    if name == "kernel-mean":
        kernel = STATISTICS[name]
        assert isinstance(kernel, KernelMean)
        return np.asarray(
            np.cos(x @ kernel.directions.numpy() / 2.0 + kernel.phases.numpy()).mean(0)
        )
    centres = CENTRES.numpy()
    nearest = np.array([np.linalg.norm(centres - row, axis=1).argmin() for row in x])
    if name == "prototype shares":
        return np.array([(nearest == k).mean() for k in range(len(centres))])
    return np.concatenate(
        [x[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(3)]
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_what_the_method_says(name: str) -> None:
    instances, bags = draw([2, 5, 16, 17, 18])
    found = STATISTICS[name].describe(instances, bags)
    parts = torch.split(instances.double(), bags.sizes.tolist())
    expected = np.stack([describe_by_hand(name, part.numpy()) for part in parts])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(STATISTICS) - {"logstd", "prototype means"}))
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_shares_add_up_to_the_score(name: str, seed: int, sizes: list[int]) -> None:
    instances, bags = draw(sizes, seed)
    statistic = STATISTICS[name]
    described = statistic.describe(instances, bags)
    weight = torch.randn(
        described.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    shares = statistic.shares(instances, bags, weight)
    torch.testing.assert_close(
        bags.sum(shares[:, None])[:, 0], described @ weight, rtol=1e-4, atol=1e-5
    )


def test_shares_of_prototype_means_leave_out_prototypes_without_instances() -> None:
    statistic = PrototypeMeans(CENTRES)
    instances, bags = CENTRES[[0, 1]] + 0.01, Bags.of([2])  # none at the third
    weight = torch.randn(
        3 * CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    whole = statistic.describe(instances, bags)[0] @ weight
    absent = CENTRES[2].double() @ weight[2 * CHANNELS :]
    assert float(statistic.shares(instances, bags, weight).sum()) == pytest.approx(
        float(whole - absent), rel=1e-5
    )


def test_shares_of_logarithms_are_the_change_of_the_score_as_deviations_grow() -> None:
    statistic = LogDeviation(torch.full((CHANNELS,), 0.3))
    instances, bags = draw([9])
    weight = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64)
    middle, step = instances.mean(0), 1e-4
    stretched = middle + (instances - middle) * (1 + step)
    change = (statistic.describe(stretched, bags) - statistic.describe(instances, bags)) / step
    total = float(statistic.shares(instances, bags, weight).sum())
    assert total == pytest.approx(float(change[0] @ weight), rel=1e-2)


@pytest.mark.parametrize("name", STATISTICS)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40))
def test_the_order_of_instances_does_not_matter(name: str, seed: int, n: int) -> None:
    instances, bags = draw([n], seed)
    shuffled = instances[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    statistic = STATISTICS[name]
    torch.testing.assert_close(
        statistic.describe(instances, bags),
        statistic.describe(shuffled, bags),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", UNBIASED)
@given(seed=st.integers(0, 1000), more=st.integers(0, 20))
def test_statistics_do_not_drift_with_the_size_of_the_bag(name: str, seed: int, more: int) -> None:
    statistic, least = UNBIASED[name]
    n = least + more
    instances, bags = draw([n], seed)
    without = torch.cat([instances[torch.arange(n) != i] for i in range(n)])
    smaller = statistic.describe(without, Bags.of([n - 1] * n)).mean(0)
    torch.testing.assert_close(
        smaller, statistic.describe(instances, bags)[0], rtol=1e-4, atol=1e-5
    )


def test_deviations_of_sparse_values_do_not_grow_with_the_bag() -> None:
    generator = torch.Generator().manual_seed(0)
    means = []
    for n in (16, 24, 120):
        instances = (torch.randn(2000 * n, 1, generator=generator) - 1).clamp(min=0)
        means.append(float(Deviation().describe(instances, Bags.of([n] * 2000)).mean()))
    # Plain standard deviations: .217, .230, .255.
    assert means[1] == pytest.approx(means[0], abs=0.006)
    assert means[2] == pytest.approx(means[0], abs=0.006)


def precise(statistic: Statistic) -> Statistic:
    """Return a statistic that computes in float64."""
    if not isinstance(statistic, KernelMean):
        return statistic
    return replace(
        statistic,
        directions=statistic.directions.double(),
        phases=statistic.phases.double(),
        bandwidth=statistic.bandwidth.double(),
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_gradients_are_the_slopes(name: str) -> None:
    """Those of prototypes within a cell, those of order statistics within an order."""
    instances, bags = draw([1, 2, 15, 16, 17])
    statistic = precise(STATISTICS[name])
    leaf = instances[:, :2].double().requires_grad_()
    rest = instances[:, 2:].double()
    assert torch.autograd.gradcheck(
        lambda varied: statistic.describe(torch.cat([varied, rest], 1), bags), leaf
    )


@pytest.mark.parametrize("name", sorted(set(STATISTICS) - {"prototype shares"}))  # has none
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_channel_does_no_harm_to_gradients(value: float, name: str) -> None:
    sizes = [1, 2, 15, 16, 17]
    instances, bags = draw(sizes)
    instances[:, 1] = value  # such as a dead unit of the backbone's last ReLU
    instances[-1, 2], instances[-17:-1, 2] = 3.0, value  # constant without one instance
    leaf = instances.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(STATISTICS[name].describe(leaf, bags).sum(), leaf)
    assert gradient.isfinite().all()
    assert float(gradient.abs().max()) < 10


@pytest.mark.parametrize("name", [name for name, s in STATISTICS.items() if s.spread])
def test_a_single_instance_shows_no_spread(name: str) -> None:
    instances, bags = draw([1])
    statistic = STATISTICS[name]
    found = statistic.describe(instances, bags)
    expected = np.log(0.1) if name == "logstd" else 0.0
    np.testing.assert_allclose(found, np.full((1, CHANNELS), expected), atol=1e-12)
    weight = torch.ones(CHANNELS, dtype=torch.float64)
    np.testing.assert_array_equal(statistic.shares(instances, bags, weight), [0.0])


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 198, 3168])
def test_the_weights_of_a_quantile_are_a_distribution(n: int) -> None:
    for level in (0.0, 0.1, 0.5, 0.9, 1.0):
        weights = quantile_weights(n, level)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)
