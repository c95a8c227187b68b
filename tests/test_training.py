"""The head engine against one head at a time, one bag at a time, in plain PyTorch."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lymphfeat.aggregators.ranking import effective_k
from lymphfeat.heads import AGGREGATORS, initial_scorer, resolve
from lymphfeat.settings import HeadSettings
from lymphfeat.splits import Split, report_splits
from lymphfeat.training import Features, Fit, StackedAdam, fit_heads, split_generator
from tests import references

SIZES = [1, 4, 2, 7, 3, 5, 1, 6, 2, 9, 4, 3]  # single-image patients, and fewer images than k
EPOCHS, BATCH = 3, 3
CHANNELS, HEIGHT, WIDTH = 6, 2, 3


@pytest.fixture(scope="module")
def maps() -> NDArray[np.float16]:
    rng = np.random.default_rng(0)
    values = rng.normal(2, 1.5, (sum(SIZES), CHANNELS, HEIGHT, WIDTH))
    values[:, 3] = 1.0  # a channel that never varies
    values[5] = values[6]  # ties
    return values.astype(np.float16)


@pytest.fixture(scope="module")
def features(maps: NDArray[np.float16]) -> Features:
    return Features(
        maps,
        maps.mean((2, 3), dtype=np.float32),
        np.cumsum([0, *SIZES]),
        [f"P{i}" for i in range(len(SIZES))],
        _labels(),
    )


def _labels() -> NDArray[np.int64]:
    return np.array([0, 1] * (len(SIZES) // 2), np.int64)


def _splits(n: int = 2) -> list[Split]:
    return report_splits([f"P{i}" for i in range(len(SIZES))], _labels(), seeds=n)


HEADS = [
    resolve(HeadSettings(agg=agg, lr=0.05, weight_decay=0.01, k_agg=3, unit=unit))
    for agg in AGGREGATORS
    for unit in ("image", "pixel")
] + [
    resolve(HeadSettings(agg="topk", lr=0.05, k_train=3, k_agg=2)),
    resolve(HeadSettings(agg="topk", lr=0.05, k_train=2, k_agg=2, loss="bag")),
    resolve(HeadSettings(agg="topbottomk", lr=0.05, k_percent=40, k_min=2)),
    resolve(HeadSettings(agg="lse", lr=0.05, temperature=3.0)),
    resolve(HeadSettings(agg="bnsigmoid", lr=0.05, momentum=0.9)),
]


class OneHead:
    """The reference: one head on one split, with torch's own layers, optimiser and loss."""

    def __init__(self, maps: NDArray[np.float16], head: HeadSettings, split: Split) -> None:
        self.head, self.split = head, split
        pooled = torch.from_numpy(maps.mean((2, 3), dtype=np.float32))
        pixels = torch.from_numpy(maps.astype(np.float32)).flatten(2).mT.reshape(-1, CHANNELS)
        per_image = HEIGHT * WIDTH if head.unit == "pixel" else 1
        bounds = np.cumsum([0, *SIZES])
        train = sorted(int(patient[1:]) for patient in split.train)
        images = torch.cat([pooled[bounds[p] : bounds[p + 1]] for p in train])
        std = images.std(0, correction=0)
        instances = ((pixels if head.unit == "pixel" else pooled) - images.mean(0)) / std
        instances[:, std <= 1e-6] = 0
        self.bags = [
            instances[bounds[p] * per_image : bounds[p + 1] * per_image] for p in range(len(SIZES))
        ]
        self.generator = split_generator(split)
        weight, bias = initial_scorer(CHANNELS, self.generator)
        self.scorer = nn.Linear(CHANNELS, 1)
        self.scorer.weight.data, self.scorer.bias.data = weight[None].clone(), bias[None].clone()
        self.gamma, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.running = (0.0, 1.0)
        self.optimizer = torch.optim.Adam(
            [*self.scorer.parameters(), self.gamma, self.beta],
            lr=head.lr,
            weight_decay=head.weight_decay,
        )

    def run(self) -> NDArray[np.float64]:
        curves = []
        for _ in range(EPOCHS):
            if AGGREGATORS[self.head.agg].family == "ranking":
                self._ranking_epoch()
            else:
                self._weighted_epoch()
            curves.append([self.probability(bag) for bag in self.bags])
        return np.array(curves)

    def _scores(self, bag: Tensor) -> list[float]:
        with torch.no_grad():
            values: list[float] = self.scorer(bag)[:, 0].tolist()
        return values

    def _k(self, bag: Tensor, k: int) -> int:
        percent = None if self.head.k_percent is None else str(self.head.k_percent)
        return references.effective_k(len(bag), k, percent, self.head.k_min)

    def _ranking_epoch(self) -> None:
        examples = []  # (instances, label): one instance, or with the bag loss a patient's
        for patient in self.split.train:
            bag, label = self.bags[int(patient[1:])], float(_labels()[int(patient[1:])])
            top = bag[references.ranked(self._scores(bag))[: self._k(bag, self.head.k_train)]]
            groups = [top] if self.head.loss == "bag" else list(torch.split(top, 1))
            examples += [(group, label) for group in groups]
        order = torch.randperm(len(examples), generator=self.generator).tolist()
        for start in range(0, max(len(order) // BATCH, 1) * BATCH, BATCH):
            batch = [examples[i] for i in order[start : start + BATCH]]
            logits = torch.stack([self.scorer(group).mean() for group, _ in batch])
            self._update(logits, [label for _, label in batch])

    def _weighted_epoch(self) -> None:
        order = torch.randperm(len(self.split.train), generator=self.generator).tolist()
        patients = [int(self.split.train[i][1:]) for i in order]
        for start in range(0, max(len(order) // BATCH, 1) * BATCH, BATCH):
            batch = patients[start : start + BATCH]
            scores = [self.scorer(self.bags[p])[:, 0] for p in batch]
            everything = torch.cat(scores).detach()
            statistics = everything.mean(), everything.var(correction=0)
            logits = torch.stack([self._patient_logit(s, statistics) for s in scores])
            m = self.head.momentum
            self.running = tuple(  # type: ignore[assignment]
                (1 - m) * old + m * float(new)
                for old, new in zip(self.running, statistics, strict=True)
            )
            self._update(logits, [float(_labels()[p]) for p in batch])

    def _patient_logit(self, scores: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
        if self.head.agg == "mean":
            return scores.mean()
        if self.head.agg == "max":
            return scores[references.ranked(scores.tolist())[0]]
        if self.head.agg == "lse":
            r = self.head.temperature
            return ((r * scores).exp().mean().log()) / r
        normalized = (scores.detach() - statistics[0]) / (statistics[1] + 1e-5).sqrt()
        weights = torch.sigmoid(self.beta + self.gamma * normalized)
        return (weights * scores).sum() / weights.sum()

    def _update(self, logits: Tensor, labels: list[float]) -> None:
        self.optimizer.zero_grad()
        for parameter in (self.gamma, self.beta):  # weight decay acts on them in the engine too
            parameter.grad = torch.zeros(())
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels))
        torch.autograd.backward(loss)
        self.optimizer.step()

    def probability(self, bag: Tensor) -> float:
        scores = self._scores(bag)
        head = self.head
        if AGGREGATORS[head.agg].family == "ranking":
            k = self._k(bag, head.k_agg)
            return references.ranking_probability(
                scores, k, AGGREGATORS[head.agg].bottom, head.reduce
            )
        with torch.no_grad():
            statistics = torch.tensor(self.running[0]), torch.tensor(self.running[1])
            return float(self._patient_logit(torch.tensor(scores), statistics).sigmoid())


def _name(head: HeadSettings) -> str:
    return f"{head.agg}-{head.unit}-{head.k_train}-{head.k_percent}-{head.loss}"


@pytest.mark.parametrize("head", HEADS, ids=_name)
def test_engine_fits_what_one_head_alone_fits(
    maps: NDArray[np.float16], features: Features, head: HeadSettings
) -> None:
    (split,) = _splits(1)
    slow = OneHead(maps, head, split).run()
    fast = fit_heads(features, [Fit(head=head, split=split)], epochs=EPOCHS, batch_size=BATCH)
    np.testing.assert_allclose(fast.curves[0], slow, atol=2e-4)


def test_fitting_together_is_fitting_alone(features: Features) -> None:
    fits = [Fit(head=head, split=split) for head in HEADS for split in _splits(3)]
    fits += [replace(fit, head=replace(fit.head, lr=0.01)) for fit in fits]
    together = fit_heads(features, fits, epochs=EPOCHS, batch_size=BATCH)
    for position in range(0, len(fits), 5):
        alone = fit_heads(features, [fits[position]], epochs=EPOCHS, batch_size=BATCH)
        for ours, theirs in (
            (together.weight[position], alone.weight[0]),
            (together.curves[position], alone.curves[0]),
            (together.losses[position], alone.losses[0]),
        ):
            np.testing.assert_allclose(
                ours, theirs, atol=1e-5, rtol=1e-4, err_msg=str(fits[position].head)
            )


def test_weights_apply_to_raw_features(features: Features, maps: NDArray[np.float16]) -> None:
    head = resolve(HeadSettings(agg="mean", lr=0.05))
    fitted = fit_heads(features, [Fit(head=head, split=_splits(1)[0])], epochs=2, batch_size=BATCH)
    logits = maps.mean((2, 3), dtype=np.float32) @ fitted.weight[0] + fitted.bias[0]
    bounds = np.cumsum([0, *SIZES])
    means = [logits[a:b].mean() for a, b in pairwise(bounds)]
    expected = [references.sigmoid(float(mean)) for mean in means]
    np.testing.assert_allclose(fitted.curves[0, -1], expected, atol=1e-5)


def test_validation_patients_do_not_touch_the_fit(maps: NDArray[np.float16]) -> None:
    (split,) = _splits(1)
    changed = maps.copy()
    bounds = np.cumsum([0, *SIZES])
    for patient in split.validation:
        row = int(patient[1:])
        changed[bounds[row] : bounds[row + 1]] *= -3
    fits = [Fit(head=head, split=split) for head in HEADS]
    weights = [
        fit_heads(
            Features(
                m,
                m.mean((2, 3), dtype=np.float32),
                bounds,
                [f"P{i}" for i in range(len(SIZES))],
                _labels(),
            ),
            fits,
            epochs=2,
            batch_size=BATCH,
        ).weight
        for m in (maps, changed)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])


def test_heads_without_curve_are_evaluated_after_the_last_epoch_only(features: Features) -> None:
    fits = [
        Fit(head=resolve(HeadSettings(agg=agg)), split=_splits(1)[0], curve=False)
        for agg in ("max", "mean")
    ]
    curves = fit_heads(features, fits, epochs=2, batch_size=BATCH).curves
    assert np.isnan(curves[:, 0]).all()
    assert np.isfinite(curves[:, 1]).all()


def test_stacked_adam_is_torch_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, generator=generator)
    lr, decay = torch.tensor([0.1, 0.01, 0.3]), torch.tensor([0.0, 0.1, 0.0])
    active = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=torch.float32)
    gradients = torch.randn(4, 3, 4, generator=generator)
    stacked = start.clone()
    adam = StackedAdam([stacked], lr, decay)
    for gradient, on in zip(gradients, active, strict=True):
        adam.step([gradient], on)
    for head in range(3):
        own = nn.Parameter(start[head].clone())
        torch_adam = torch.optim.Adam([own], lr=float(lr[head]), weight_decay=float(decay[head]))
        for gradient, on in zip(gradients, active, strict=True):
            if on[head]:
                own.grad = gradient[head]
                torch_adam.step()
        torch.testing.assert_close(stacked[head], own.detach())


def test_effective_k_never_exceeds_the_bag() -> None:
    sizes = torch.tensor(SIZES)
    assert (effective_k(sizes, 5) <= sizes).all()
    assert (effective_k(sizes, 1, 90.0, minimum=4) <= sizes).all()
