"""Every aggregator against a slow, obvious reference on ragged bags, and their laws."""

import math
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lymphfeat.errors import SettingsError
from lymphfeat.heads.aggregators import closed_forms
from lymphfeat.heads.aggregators.ranking import (
    Ranking,
    effective_k,
    from_highest,
    selected_mask,
    selected_probability,
)
from lymphfeat.heads.aggregators.weighted import (
    AggregatorState,
    bnsigmoid_logit,
    lse_logit,
    max_logit,
    mean_logit,
)
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.grid import expand, head_name, resolve
from lymphfeat.heads.head import ReadOut
from lymphfeat.heads.registry import AGGREGATORS, LinearAggregator, WeightedAggregator
from lymphfeat.heads.stack import HeadStack
from lymphfeat.settings import HeadGrid, HeadSettings, Reduction
from tests import references

LINEAR = [name for name, row in AGGREGATORS.items() if isinstance(row, LinearAggregator)]
# Few distinct values, so that ties are the rule; bags of 1 to 9, so that k > n happens.
BAGS = st.lists(
    st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 2.0, 4.0]), min_size=1, max_size=9),
    min_size=1,
    max_size=6,
)


def stack(bags: list[list[float]], heads: int = 2) -> tuple[Tensor, Bags]:
    """Lay bags out as logits (M, heads); the second head sees them negated."""
    column = torch.tensor([x for bag in bags for x in bag])
    logits = torch.stack([column * (1 - 2 * h) for h in range(heads)], dim=1)
    return logits, Bags.of([len(bag) for bag in bags])


def state_of(heads: int = 2, temperature: float = 1.0, **more: Any) -> AggregatorState:
    """Return a fresh state, with other tensors or in training."""
    settings = [HeadSettings(temperature=temperature)] * heads
    return replace(AggregatorState.fresh(settings, torch.device("cpu")), **more)


def read_out(head: HeadStack, logits: Tensor, bags: Bags) -> ReadOut:
    """Read out instances (M, 1), each an image of its own."""
    return head.read_out(logits[:, None], bags)


def column(bags: list[list[float]], head: int) -> list[list[float]]:
    return [[x * (1 - 2 * head) for x in bag] for bag in bags]


@given(
    st.lists(
        st.sampled_from([-math.inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, math.inf])
        | st.floats(width=32, allow_nan=False),
        max_size=40,
    ),
    st.booleans(),
)
def test_sorted_as_torch_sorts(numbers: list[float], diverged: bool) -> None:
    row = torch.tensor([*numbers, math.nan] if diverged else numbers)
    scores = torch.stack([row, -row, row.flip(0)]).mT[None].movedim(1, 2)  # not contiguous
    values, places = from_highest(scores)
    expected, order = scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(places, order)
    assert values.stride() == expected.stride()
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


@given(BAGS, st.integers(1, 12), st.booleans(), st.sampled_from(["mean", "max"]))
def test_ranking_probability_is_the_reference(
    bags: list[list[float]], k: int, bottom: bool, reduce: str
) -> None:
    logits, ragged = stack(bags)
    ks = effective_k(ragged.sizes, k)
    ranking = Ranking.of(logits, ragged)
    fast = selected_probability(ranking, ks, bottom=bottom, reduce=reduce)
    for head in range(2):
        slow = [
            references.ranking_probability(bag, min(k, len(bag)), bottom, reduce)
            for bag in column(bags, head)
        ]
        np.testing.assert_allclose(fast[:, head].numpy(), slow, rtol=1e-5)


@given(BAGS, st.integers(1, 12), st.booleans())
def test_selection_breaks_ties_by_instance_order(
    bags: list[list[float]], k: int, bottom: bool
) -> None:
    logits, ragged = stack(bags)
    ranking = Ranking.of(logits, ragged)
    mask = selected_mask(ranking, effective_k(ragged.sizes, k), bottom=bottom)
    top = ranking.top(k)
    for head in range(2):
        start = 0
        for b, bag in enumerate(column(bags, head)):
            rows = torch.nonzero(mask[start : start + len(bag), head])[:, 0].tolist()
            assert rows == references.selected(bag, min(k, len(bag)), bottom)
            chosen = [row - start for row in top[b, head].tolist() if row < len(logits)]
            assert chosen == references.ranked(bag)[:k]
            start += len(bag)


@given(
    st.integers(1, 400),
    st.decimals("0.1", "100", places=1),
    st.integers(1, 30),
)
def test_percentage_k_is_exact(n: int, percent: Decimal, minimum: int) -> None:
    fast = effective_k(torch.tensor([n]), 1, float(percent), minimum).item()
    assert fast == references.effective_k(n, 1, str(percent), minimum)


def test_percentage_k_is_not_pushed_up_by_rounding() -> None:
    assert effective_k(torch.tensor([100, 33, 1]), 1, 7.0).tolist() == [7, 3, 1]


@given(BAGS)
def test_top_k_of_all_is_the_mean_probability(bags: list[list[float]]) -> None:
    logits, ragged = stack(bags)
    everything = selected_probability(Ranking.of(logits, ragged), ragged.sizes)
    torch.testing.assert_close(everything, ragged.mean(logits.sigmoid()))


@given(BAGS, st.floats(0.1, 4))
def test_weighted_logits_are_the_reference(bags: list[list[float]], temperature: float) -> None:
    logits, ragged = stack(bags)
    state = state_of(temperature=temperature)
    fast = {
        "mean": mean_logit(state, logits, ragged),
        "max": max_logit(state, logits, ragged),
        "lse": lse_logit(state, logits, ragged),
    }
    for head in range(2):
        own = column(bags, head)
        slow = {
            "mean": [references.mean_logit(bag) for bag in own],
            "max": [references.max_logit(bag) for bag in own],
            "lse": [references.lse_logit(bag, temperature) for bag in own],
        }
        for name, values in slow.items():
            np.testing.assert_allclose(fast[name][:, head], values, rtol=1e-4, atol=1e-5)


@given(BAGS, st.floats(-2, 2), st.floats(-1, 1))
def test_bnsigmoid_is_the_reference(bags: list[list[float]], gamma: float, beta: float) -> None:
    logits, ragged = stack(bags)
    state = state_of(gamma=torch.full((2,), gamma), beta=torch.full((2,), beta), training=True)
    fast = bnsigmoid_logit(state, logits, ragged)
    for head in range(2):
        own = column(bags, head)
        mean, variance = references.moments(own)
        slow = [references.bnsigmoid_logit(bag, mean, variance, gamma, beta) for bag in own]
        np.testing.assert_allclose(fast[:, head], slow, rtol=1e-3, atol=1e-4)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000), st.booleans())
@pytest.mark.parametrize("name", ["mean", "max", "lse", "bnsigmoid"])
def test_closed_forms_are_what_differentiation_finds(
    name: str, bags: int, size: int, seed: int, ties: bool
) -> None:
    aggregator, rng = AGGREGATORS[name], torch.Generator().manual_seed(seed)
    assert isinstance(aggregator, WeightedAggregator)
    assert aggregator.closed_form is not None
    logits = 3 * torch.randn(2, bags, size, generator=rng, dtype=torch.float64)
    tensors = torch.rand(5, 2, generator=rng, dtype=torch.float64) + 0.3
    names = ("gamma", "beta", "running_mean", "running_var", "temperature")
    state = replace(state_of(), **dict(zip(names, tensors, strict=True)))
    logits = logits.round() if ties else logits
    fast = aggregator.aggregate(state, logits)
    slow = closed_forms.derived(aggregator.patient_logit, state, logits)
    weights = fast.weights
    if weights is None:
        assert fast.chosen is not None
        weights = torch.nn.functional.one_hot(fast.chosen, size)
    assert torch.allclose(fast.total, slow.total)
    assert slow.weights is not None
    assert torch.allclose(weights.double(), slow.weights)
    for mine, derived in ((fast.gamma, slow.gamma), (fast.beta, slow.beta)):
        assert derived is not None
        assert torch.allclose(torch.zeros_like(derived) if mine is None else mine, derived)


def test_bnsigmoid_stops_gradients_through_the_weights_but_trains_gamma_and_beta() -> None:
    logits, ragged = stack([[1.0, -2.0, 0.5], [3.0, 0.1]], heads=1)
    logits.requires_grad_()
    gamma, beta = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    state = state_of(1, gamma=gamma, beta=beta, training=True)
    torch.autograd.backward(bnsigmoid_logit(state, logits, ragged).sum())
    # d/dℓ Σ α ℓ is α itself only if no gradient passes through α (report §3.4).
    plain = logits[:, 0].detach()
    sigmoid = ((plain - plain.mean()) / (plain.var(correction=0) + 1e-5).sqrt()).sigmoid()
    weights = torch.cat([part / part.sum() for part in torch.split(sigmoid, [3, 2])])
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 0], weights)
    assert gamma.grad is not None
    assert beta.grad is not None
    assert gamma.grad.abs() > 1e-3
    assert beta.grad.abs() > 1e-3


def test_bnsigmoid_survives_logits_whose_weights_underflow() -> None:
    logits, ragged = stack([[-1e4, -1e4, -1e4 + 50.0], [5.0]], heads=1)
    head = HeadStack([resolve(HeadSettings(agg="bnsigmoid"))], torch.zeros(1, 1), torch.zeros(1))
    weights = read_out(head, logits, ragged).weight
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("agg", LINEAR)
def test_probabilities_are_those_of_the_read_out(agg: str) -> None:
    head = HeadStack([resolve(HeadSettings(agg=agg))], torch.ones(1, 4), torch.zeros(1)).train()
    kept = torch.randn(7, 9, 1, generator=torch.Generator().manual_seed(0))
    images = Bags.of([3, 4])
    expected = head.read_out(kept, images).probability
    assert torch.equal(head.patient_probability(kept, images), expected)


@given(BAGS)
def test_weights_of_every_bag_add_up_to_one(bags: list[list[float]]) -> None:
    logits, ragged = stack(bags, heads=1)
    for name in LINEAR:
        weights = read_out(_make_stack(name), logits, ragged).weight
        total = ragged.sum(weights[:, None])
        torch.testing.assert_close(total, torch.ones_like(total), msg=name)
        assert (weights >= 0).all()


@pytest.mark.parametrize(
    ("agg", "reduce"), [("top1", "mean"), ("topk", "mean"), ("topk", "max"), ("topbottomk", "mean")]
)
def test_weighted_probabilities_are_the_patient_s(agg: str, reduce: Reduction) -> None:
    """Of equals the first counts where one instance decides."""
    logits, ragged = stack([[0.5, 2.0, 2.0, -1.0], [3.0], [-2.0, -4.0]], heads=1)
    settings = resolve(HeadSettings(agg=agg, k_agg=3, reduce=reduce))
    head = HeadStack([settings], torch.zeros(1, 4), torch.zeros(1))
    read = read_out(head, logits, ragged)
    total = ragged.sum(read.weight[:, None] * logits.sigmoid())[:, 0]
    torch.testing.assert_close(total, read.probability)
    if reduce == "max":
        assert read.weight.tolist() == [0, 1, 0, 0, 1, 1, 0]


@given(BAGS, st.integers(0, 1000))
@settings(max_examples=40)
def test_order_of_instances_and_of_patients_says_nothing(
    bags: list[list[float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(bags)).tolist()
    shuffled = [rng.permutation(bags[b]).tolist() for b in order]
    for name in LINEAR:
        head = _make_stack(name)
        one = read_out(head, *stack(bags, heads=1)).probability
        other = read_out(head, *stack(shuffled, heads=1)).probability
        torch.testing.assert_close(one[order], other, msg=name)


@given(BAGS)
@settings(max_examples=40)
def test_a_patient_scores_the_same_alone(bags: list[list[float]]) -> None:
    for name in LINEAR:
        head = _make_stack(name)
        together = read_out(head, *stack(bags, heads=1)).probability
        alone = [read_out(head, *stack([bag], heads=1)).probability for bag in bags]
        torch.testing.assert_close(together, torch.cat(alone), msg=name)


def test_lse_runs_from_mean_to_max() -> None:
    logits, ragged = stack([[0.0, 1.0, 3.0], [2.0]], heads=1)
    low, high = (lse_logit(state_of(1, r), logits, ragged) for r in (1e-4, 200.0))
    torch.testing.assert_close(low, ragged.mean(logits), atol=1e-2, rtol=0)
    torch.testing.assert_close(high, torch.tensor([[3.0], [2.0]]), atol=1e-2, rtol=0)


def test_lse_weights_are_the_softmax() -> None:
    with torch.inference_mode():  # as the scores of a frozen model come
        logits, _ = stack([[0.0, 1.0, 3.0], [2.0, -1.0]], heads=1)
    ragged = Bags.of([3, 2])
    settings = resolve(HeadSettings(agg="lse", temperature=0.7))
    head = HeadStack([settings], torch.zeros(1, 1), torch.zeros(1))
    weights = read_out(head, logits, ragged).weight
    torch.testing.assert_close(weights, ragged.softmax(0.7 * logits)[:, 0])


def test_mean_over_pixels_is_mean_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(7, 5, 2, 3, generator=generator)  # (N, C, h, w)
    head = HeadStack(
        [resolve(HeadSettings(agg="mean"))], torch.randn(1, 5, generator=generator), torch.ones(1)
    )
    images = Bags.of([2, 4, 1])
    by_pixel = head.patient_probability(head.keep(maps.flatten(2).mT), images)
    by_image = head.patient_probability(head.keep(maps.mean((2, 3))[:, None]), images)
    torch.testing.assert_close(by_pixel, by_image)


def test_names_expand_as_documented() -> None:
    names = [head_name(head) for head in expand(HeadGrid(agg=("all",)))]
    assert names == [
        "top1",
        *("top5", "top10"),
        *("topbottom5", "topbottom10"),
        *("mean exact", "max", "lse", "bnsigmoid"),
        *("std", "logstd", "gini", "quantiles", "kernel-mean", "prototypes", "mean+std"),
    ]
    (topk,) = expand(HeadGrid())
    assert (topk.k_train, topk.k_agg, topk.reduce, topk.unit) == (1, 10, "mean", "image")
    assert resolve(HeadSettings(agg="bnsigmoid")).unit == "pixel"
    by_pixel = HeadSettings(agg="topk", unit="pixel", k_train=3)
    assert head_name(by_pixel) == "top10 k_train=3 unit=pixel"


def names_of(**grid: Any) -> list[str]:
    return [head_name(head) for head in expand(HeadGrid(**grid))]


def test_a_grid_is_every_combination_once() -> None:
    names = names_of(agg=("topk", "mean"), k_agg=(1, 5), k_train=(1, 2), lr=(0.003, 0.1))
    assert names == [
        *("top1", "top1 lr=0.1", "top5", "top5 lr=0.1"),
        *("top1 k_train=2", "top1 k_train=2 lr=0.1", "top5 k_train=2", "top5 k_train=2 lr=0.1"),
        "mean exact",  # which has no learning rate
    ]
    assert names_of(agg=("mean",), solver=("adam",), lr=(0.003, 0.1)) == ["mean", "mean lr=0.1"]
    assert names_of(agg=("mean",), solver=("exact", "adam")) == ["mean exact", "mean"]
    assert names_of(agg=("std+quantiles",), quantiles=("90-50", "75-25"), penalty=(0.1,)) == [
        *("std+quantiles penalty=0.1", "std+quantiles 75-25 penalty=0.1"),
    ]
    assert names_of(k_agg=(5,), k_percent=(2.5, 10.0), k_min=(1, 3)) == [
        *("top5", "top2.5%", "top2.5% k_min=3", "top10%", "top10% k_min=3"),
    ]
    assert names_of(k_percent=(10.0,)) == ["top10%"]
    assert names_of(agg=("all",), k_percent=(10.0,), temperature=(1.0, 2.0)) == [
        *("top1", "top10%", "topbottom10%", "mean exact", "max", "lse", "lse temperature=2"),
        *("bnsigmoid", "std", "logstd", "gini", "quantiles", "kernel-mean", "prototypes"),
        "mean+std",
    ]
    assert names_of(agg=("lse",)) == [
        *("lse temperature=0.1", "lse temperature=0.3", "lse", "lse temperature=3"),
        "lse temperature=10",
    ]
    assert names_of(agg=("lse",), temperature=(2.0,)) == ["lse temperature=2"]
    assert "lse temperature=3" not in names_of(agg=("weighted",))
    assert names_of(agg=("ranking",)) == ["top1", "top5", "top10", "topbottom5", "topbottom10"]
    assert names_of(agg=("network",), width=(16,), layers=(2,)) == [
        *("attention width=16", "gated-attention width=16"),
        *("transformer layers=2 width=16", "lstm layers=2 width=16"),
    ]


def test_heads_that_do_the_same_are_equal() -> None:
    assert resolve(HeadSettings(agg="mean", k_agg=3, loss="bag")) == resolve(
        HeadSettings(agg="mean", momentum=0.5)
    )
    assert resolve(HeadSettings(k_percent=5, k_agg=3)) == resolve(HeadSettings(k_percent=5))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"agg": ("mean", "max"), "k_agg": (5,)}, r"k_agg \(=5\) must be used .*; got mean, max"),
        ({"k_min": (3,)}, r"k_min \(=3\) must be used .* with k_percent"),
        ({"k_percent": (5.0,), "k_train": (2,)}, r"k_train \(=2\) must be used"),
        ({"unit": ("cell",)}, r"unit \(=cell\) must be one of"),
    ],
)
def test_a_value_that_no_head_reads_is_refused(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        expand(HeadGrid(**grid))


@given(
    st.lists(st.sampled_from([*AGGREGATORS, "all", "weighted"]), min_size=1, max_size=3),
    st.lists(st.integers(1, 20), max_size=3, unique=True),
    st.lists(st.sampled_from([0.5, 0.001, 0.003]), max_size=2, unique=True),
)
def test_names_tell_heads_of_a_grid_apart(aggs: list[str], ks: list[int], lrs: list[float]) -> None:
    grid = HeadGrid(agg=(*aggs, "topk"), k_agg=tuple(ks), lr=tuple(lrs))
    heads = expand(grid)
    assert len({head_name(head) for head in heads}) == len(heads) == len(set(heads))
    assert all(resolve(head) == head for head in heads)


def test_unknown_aggregator_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"agg \(=median\) must be one of top1, topk"):
        expand(HeadGrid(agg=("median",)))


def _make_stack(name: str) -> HeadStack:
    head = HeadStack([resolve(HeadSettings(agg=name, k_agg=3))], torch.zeros(1, 1), torch.zeros(1))
    head.running_mean.fill_(0.3)
    head.running_var.fill_(2.0)
    return head.eval()


def test_running_statistics_follow_the_batches() -> None:
    head = HeadStack(
        [resolve(HeadSettings(agg="bnsigmoid", momentum=0.25))], torch.zeros(1, 1), torch.zeros(1)
    )
    logits, ragged = stack([[1.0, 3.0], [5.0]], heads=1)
    head.train().patient_logit(logits, ragged)
    mean, variance = references.moments([[1.0, 3.0], [5.0]])
    assert math.isclose(head.running_mean.item(), 0.25 * mean, rel_tol=1e-6)
    assert math.isclose(head.running_var.item(), 0.75 + 0.25 * variance, rel_tol=1e-6)
    before = head.running_mean.clone()
    head.eval().patient_logit(logits, ragged)
    assert torch.equal(head.running_mean, before)
