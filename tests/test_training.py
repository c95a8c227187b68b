"""The head engine against one head at a time, one bag at a time, in plain PyTorch."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lymphfeat.cohort.splits import Split, report_splits
from lymphfeat.heads.aggregators.ranking import effective_k
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine import instances as instances_module
from lymphfeat.heads.engine import weighted
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features, Resident, Streamed
from lymphfeat.heads.engine.networks import NetworkHeadTrainer
from lymphfeat.heads.engine.results import Fit, FittedHeads, split_generator
from lymphfeat.heads.engine.sampling import Batch, Sampler, Sampling
from lymphfeat.heads.engine.scorers import StackedAdam
from lymphfeat.heads.engine.trainer import HeadTrainer
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.heads.registry import (
    AGGREGATORS,
    LinearAggregator,
    RankingAggregator,
    WeightedAggregator,
)
from lymphfeat.heads.stack import NetworkHead, initial_scorer
from lymphfeat.runtime.devices import cpu_threads
from lymphfeat.settings import HeadSettings
from tests import references
from tests.rounding import bfloat16_tolerance, score_tolerance

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
    return make_features(maps)


def _labels() -> NDArray[np.int64]:
    return np.array([0, 1] * (len(SIZES) // 2), np.int64)


def _splits(n: int = 2) -> list[Split]:
    return report_splits([f"P{i}" for i in range(len(SIZES))], _labels(), seeds=n)


HEADS = [
    resolve(HeadSettings(agg=agg, lr=0.05, weight_decay=0.01, k_agg=3, unit=unit))
    for agg, row in AGGREGATORS.items()
    if isinstance(row, LinearAggregator)
    for unit in ("image", "pixel")
] + [
    resolve(HeadSettings(agg="topk", lr=0.05, k_train=3, k_agg=2)),
    resolve(HeadSettings(agg="topk", lr=0.05, k_train=2, k_agg=2, loss="bag")),
    resolve(HeadSettings(agg="topbottomk", lr=0.05, k_percent=40, k_min=2)),
    resolve(HeadSettings(agg="lse", lr=0.05, temperature=3.0)),
    resolve(HeadSettings(agg="bnsigmoid", lr=0.05, momentum=0.9)),
    resolve(HeadSettings(agg="bnsigmoid", lr=0.05, class_weights="balanced")),
    resolve(HeadSettings(agg="topk", lr=0.05, k_train=2, class_weights="balanced")),
]


PLAIN = Sampling(batch_size=BATCH)
BOUNDS = np.cumsum([0, *SIZES])
FLIPS: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)]  # identity, hflip, vflip, both


class OneHead:
    """The reference: one head on one split, with torch's own layers, optimiser and loss."""

    def __init__(
        self,
        maps: NDArray[np.float16],
        head: HeadSettings,
        split: Split,
        sampling: Sampling = PLAIN,
        *,
        tta: bool = False,
    ) -> None:
        """Take maps (N, C, h, w), or (N, V, C, h, w)."""
        self.head, self.split, self.sampling = head, split, sampling
        maps = maps if maps.ndim == 5 else maps[:, None]
        pooled = torch.from_numpy(maps.mean((3, 4), dtype=np.float32))  # (N, V, C)
        self.train = [int(patient[1:]) for patient in split.train]
        images = torch.cat([pooled[BOUNDS[p] : BOUNDS[p + 1], 0] for p in sorted(self.train)])
        std, mean = torch.std_mean(images, dim=0, correction=0)
        views = []
        for view in range(maps.shape[1]):
            flipped = torch.from_numpy(maps[:, view].astype(np.float32)).flip(FLIPS[view])
            raw = flipped.flatten(2).mT if head.unit == "pixel" else pooled[:, view, None]
            views.append(((raw - mean) / std).where(std > 1e-6, 0))
        self.views = torch.stack(views)  # (V, N, U, C)
        self.per_image = self.views.shape[2]
        self.evaluated = range(sampling.views if tta else 1)
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

    def run(self, features: Features) -> NDArray[np.float64]:
        # What is drawn is the sampler's business (test_sampling.py); what is made of it is ours.
        instances = features.of_unit(self.head.unit)
        self.sampler = Sampler(np.array(self.train), instances, self.sampling, self.generator)
        curves = []
        for _ in range(EPOCHS):
            if isinstance(AGGREGATORS[self.head.agg], RankingAggregator):
                self._ranking_epoch()
            else:
                self._weighted_epoch()
            curves.append([self.probability(patient) for patient in range(len(SIZES))])
        return np.array(curves)

    def _bag(self, patient: int, view: int = 0) -> Tensor:
        return self.views[view, BOUNDS[patient] : BOUNDS[patient + 1]].flatten(0, 1)

    def _scores(self, bag: Tensor) -> list[float]:
        with torch.no_grad():
            values: list[float] = self.scorer(bag)[:, 0].tolist()
        return values

    def _k(self, n: int, k: int) -> int:
        percent = None if self.head.k_percent is None else str(self.head.k_percent)
        return references.effective_k(n, k, percent, self.head.k_min)

    def _ranking_epoch(self) -> None:
        groups = []  # (image, pixel) of each instance, label: one instance, or a patient's
        for patient in self.train:
            images = self.sampler.images_of(patient).tolist()
            places = [(image, pixel) for image in images for pixel in range(self.per_image)]
            scores = self._scores(torch.stack([self.views[0, i, u] for i, u in places]))
            k = self._k(len(places), self.head.k_train)
            top = [places[i] for i in references.ranked(scores)[:k]]
            together = [top] if self.head.loss == "bag" else [[place] for place in top]
            groups += [(group, float(_labels()[patient])) for group in together]
        order = self.sampler.shuffled(len(groups)).tolist()
        steps = max(len(order) // BATCH, 1)
        width = max(len(group) for group, _ in groups)
        views = self.sampler.views((steps, BATCH, width))
        for step in range(steps):
            batch = [groups[i] for i in order[step * BATCH : (step + 1) * BATCH]]
            logits = []
            for row, (group, _) in enumerate(batch):
                seen = [0] * len(group) if views is None else views[step, row].tolist()
                inputs = [self.views[v, i, u] for v, (i, u) in zip(seen, group, strict=False)]
                logits.append(self.scorer(torch.stack(inputs)).mean())
            self._update(torch.stack(logits), [label for _, label in batch])

    def _weighted_epoch(self) -> None:
        for batch in self.sampler.epoch():
            scores = [self.scorer(bag)[:, 0] for bag in self._drawn(batch)]
            everything = torch.cat(scores).detach()
            statistics = everything.mean(), everything.var(correction=0)
            logits = torch.stack([self._patient_logit(s, statistics) for s in scores])
            m = self.head.momentum
            self.running = tuple(  # type: ignore[assignment]
                (1 - m) * old + m * float(new)
                for old, new in zip(self.running, statistics, strict=True)
            )
            self._update(logits, [float(_labels()[p]) for p in batch.patients.tolist()])

    def _drawn(self, batch: Batch) -> list[Tensor]:
        if batch.images is None:
            return [self._bag(patient) for patient in batch.patients.tolist()]
        views = torch.zeros_like(batch.images) if batch.views is None else batch.views
        instances = self.views[views, batch.images]  # (n, U, C)
        return [part.flatten(0, 1) for part in torch.split(instances, batch.sizes.tolist())]

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
        truth = torch.tensor(labels)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        torch.autograd.backward((losses * self._counts(truth)).mean())
        self.optimizer.step()

    def _counts(self, labels: Tensor) -> Tensor:
        if self.head.class_weights == "none":
            return torch.ones_like(labels)
        tumoral = sum(_labels()[patient] for patient in self.train)
        n = len(self.train)
        return torch.where(labels == 1, n / (2 * tumoral), n / (2 * (n - tumoral)))

    def probability(self, patient: int) -> float:
        return float(np.mean([self._probability(self._bag(patient, v)) for v in self.evaluated]))

    def _probability(self, bag: Tensor) -> float:
        scores = self._scores(bag)
        head = self.head
        aggregator = AGGREGATORS[head.agg]
        if isinstance(aggregator, RankingAggregator):
            k = self._k(len(bag), head.k_agg)
            return references.ranking_probability(scores, k, aggregator.bottom, head.reduce)
        with torch.no_grad():
            statistics = torch.tensor(self.running[0]), torch.tensor(self.running[1])
            return float(self._patient_logit(torch.tensor(scores), statistics).sigmoid())


def _name(head: HeadSettings) -> str:
    return head_name(head).replace(" ", "-") + f"-{head.unit}"


@pytest.mark.parametrize("head", HEADS, ids=_name)
def test_engine_fits_what_one_head_alone_fits(
    maps: NDArray[np.float16], features: Features, head: HeadSettings
) -> None:
    (split,) = _splits(1)
    slow = OneHead(maps, head, split).run(features)
    fast = fit_stacked(features, [Fit(head=head, split=split)], epochs=EPOCHS, sampling=PLAIN)
    np.testing.assert_allclose(fast.curves[0], slow, atol=2e-4)


DRAWN = {
    "few images": Sampling(batch_size=BATCH, images_per_patient=2),
    "views": Sampling(batch_size=BATCH, views=4),
    "both": Sampling(batch_size=BATCH, images_per_patient=3, views=4),
}


@pytest.fixture(scope="module")
def viewed() -> NDArray[np.float16]:
    """Maps (N, 4, C, h, w) whose views differ by more than their flips."""
    rng = np.random.default_rng(1)
    return rng.normal(1, 2, (sum(SIZES), 4, CHANNELS, HEIGHT, WIDTH)).astype(np.float16)


def make_features(maps: NDArray[np.float16], **more: Any) -> Features:
    pooled = maps.mean((-2, -1), dtype=np.float32)
    return Features(maps, pooled, BOUNDS, [f"P{i}" for i in range(len(SIZES))], _labels(), **more)


@pytest.mark.parametrize("sampling", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("head", [HEADS[i] for i in (0, 2, 3, 12, 13, 14, 15)], ids=_name)
def test_drawn_images_and_views_are_what_is_learnt(
    viewed: NDArray[np.float16], head: HeadSettings, sampling: Sampling
) -> None:
    (split,) = _splits(1)
    features = make_features(viewed)
    slow = OneHead(viewed, head, split, sampling, tta=True).run(features)
    fast = fit_stacked(
        features,
        [Fit(head=head, split=split)],
        epochs=EPOCHS,
        sampling=sampling,
        tta=True,
    )
    np.testing.assert_allclose(fast.curves[0], slow, atol=2e-4)


@pytest.mark.parametrize("views", [1, 4])
def test_streaming_is_reading_from_memory(viewed: NDArray[np.float16], views: int) -> None:
    fits = [Fit(head=head, split=split) for head in HEADS for split in _splits(2)]
    curves = []
    for memory in (0, 1 << 30):
        features = make_features(viewed, memory=memory)
        for unit in ("image", "pixel"):
            assert isinstance(features.of_unit(unit).source, Resident if memory else Streamed)
        fitted = fit_stacked(
            features, fits, epochs=2, sampling=Sampling(batch_size=BATCH, views=views), tta=True
        )
        curves.append(fitted.curves)
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-6)


@pytest.mark.parametrize("few", [None, 2])
def test_averages_of_all_instances_do_not_depend_on_threads(
    viewed: NDArray[np.float16], few: int | None
) -> None:
    own = [head for head in HEADS if isinstance(AGGREGATORS[head.agg], WeightedAggregator)]
    fits = [Fit(head=head, split=split) for head in own for split in _splits(5)]
    sampling = Sampling(batch_size=BATCH, images_per_patient=few)
    fitted = []
    for threads in (1, 2, 3):
        with cpu_threads(threads):
            fitted.append(fit_stacked(make_features(viewed), fits, epochs=2, sampling=sampling))
    for other in fitted[1:]:
        np.testing.assert_array_equal(other.curves, fitted[0].curves)
        np.testing.assert_array_equal(other.weight, fitted[0].weight)


def test_memory_is_for_averages_and_pixels_together(viewed: NDArray[np.float16]) -> None:
    averages, pixels = (4 * n for n in (viewed[..., 0, 0].size, viewed.size))
    for memory, kind in ((2 * pixels, Streamed), (2 * (averages + pixels), Resident)):
        features = make_features(viewed, memory=memory)
        assert isinstance(features.of_unit("image").source, Resident)
        assert isinstance(features.of_unit("pixel").source, kind)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_sum_that_overflows_is_no_damage(viewed: NDArray[np.float16], memory: int) -> None:
    pooled = viewed.mean((3, 4), dtype=np.float32)
    pooled[:] = 1e38
    ids = [f"P{i}" for i in range(len(SIZES))]
    made = Features(viewed, pooled, BOUNDS, ids, _labels(), memory=memory)
    assert (made.images == 1e38).all()


@pytest.mark.seconds
@pytest.mark.parametrize("few", [None, 4])
def test_fitting_together_is_fitting_alone(features: Features, few: int | None) -> None:
    fits = [Fit(head=head, split=split) for head in HEADS for split in _splits(3)]
    fits += [replace(fit, head=replace(fit.head, lr=0.01)) for fit in fits]
    sampling = Sampling(batch_size=BATCH, images_per_patient=few)
    call = partial(fit_stacked, features, epochs=EPOCHS, sampling=sampling)
    together = call(fits)
    for position in range(0, len(fits), 5):
        alone = call([fits[position]])
        for ours, theirs in (
            (together.weight[position], alone.weight[0]),
            (together.curves[position], alone.curves[0]),
            (together.losses[position], alone.losses[0]),
        ):
            np.testing.assert_allclose(
                ours, theirs, atol=1e-5, rtol=1e-4, err_msg=str(fits[position].head)
            )


def test_blocks_are_the_whole(features: Features) -> None:
    heads = [*HEADS, resolve(HeadSettings(agg="attention", width=4))]
    fits = [Fit(head=head, split=split) for head in heads for split in _splits(2)]
    seen: list[tuple[int, int, str]] = []
    whole, cut = (
        fit_stacked(
            features,
            fits,
            epochs=2,
            sampling=PLAIN,
            memory=memory,
            progress=lambda done, total, text="": seen.append((done, total, text)),
        )
        for memory in (1 << 30, 2000)
    )
    np.testing.assert_allclose(whole.curves, cut.curves, atol=1e-5)
    np.testing.assert_allclose(whole.weight, cut.weight, atol=1e-5)
    assert sorted(cut.modules) == sorted(whole.modules) == [len(fits) - 2, len(fits) - 1]
    assert seen[-1][:2] == (2 * len(fits), 2 * len(fits))
    assert seen[-1][2] == "attention width=4, epoch 2 of 2"


def test_pieces_of_few_fits_are_the_whole(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = [*HEADS, resolve(HeadSettings(agg="attention", width=4))]
    fits = [Fit(head=head, split=split) for head in heads for split in _splits(3)]
    finished: list[list[str]] = []

    def fit() -> FittedHeads:
        finished.clear()
        return fit_stacked(
            features,
            fits,
            epochs=2,
            sampling=PLAIN,
            finished=lambda own, results, seconds: finished.append(
                [results.fits[position].head.agg for position in own]
            ),
        )

    whole = fit()
    assert len(finished) < len(heads)
    monkeypatch.setattr(HeadTrainer, "most", 4)
    monkeypatch.setattr(NetworkHeadTrainer, "most", 2)
    cut = fit()
    np.testing.assert_allclose(whole.curves, cut.curves, atol=1e-5)
    assert sorted(agg for piece in finished for agg in piece) == sorted(
        fit.head.agg for fit in fits
    )
    assert finished[-2:] == [["attention"] * 2, ["attention"]]
    assert max(map(len, finished)) == 4


def test_bfloat16_says_how_far_it_is_off(viewed: NDArray[np.float16]) -> None:
    heads = [*HEADS[:6], resolve(HeadSettings(agg="bnsigmoid", lr=0.05))]
    heads.append(resolve(HeadSettings(agg="attention", width=4, lr=0.05)))
    fits = [Fit(head=head, split=_splits(1)[0]) for head in heads]
    exact, rounded = (
        fit_stacked(make_features(viewed, dtype=dtype), fits, epochs=2, sampling=PLAIN)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (exact.rounding == 0).all()
    assert (rounded.rounding > 0).all()
    linear = [_Scores(viewed[:, 0], rounded, position) for position in range(7)]
    # A probability moves by at most a quarter of what its logit does, and a mean of the highest
    # probabilities by no more than the one that moves most.
    bounds = [each.moved / 4 for each in linear[:6]]
    bounds.append(linear[6].moved * _steepness_of_bnsigmoid(linear[6], rounded) / 4)
    network = rounded.modules[7]
    assert isinstance(network, NetworkHead)
    bounds.append(_moved_by_bfloat16(network, viewed[:, 0]) / 4)
    assert (rounded.rounding <= np.array(bounds) + 1e-6).all()
    # By definition: the weights of the run, applied in float32.
    scores = rounded.image_logits(4, [torch.from_numpy(viewed[:, 0]).float().flatten(2).mT])
    again = [
        references.ranking_probability(part.tolist(), min(3, len(part)), bottom=True)
        for part in np.split(scores, BOUNDS[1:-1])
    ]
    assert (heads[4].agg, heads[4].unit) == ("topbottomk", "image")
    change = np.abs(rounded.curves[4, -1] - np.array(again)).max()
    np.testing.assert_allclose(rounded.rounding[4], change, atol=1e-5)


def test_bfloat16_learns_from_the_loss_of_float32(viewed: NDArray[np.float16]) -> None:
    heads = [replace(head, lr=1e-12, weight_decay=0.0) for head in HEADS[:6]]  # weights stay put
    fits = [Fit(head=head, split=_splits(1)[0]) for head in heads]
    exact, rounded = (
        fit_stacked(make_features(viewed, dtype=dtype), fits, epochs=1, sampling=PLAIN)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for position in range(len(fits)):
        # The loss of an instance moves by no more than its logit.
        moved = _Scores(viewed[:, 0], exact, position).moved
        difference = abs(rounded.losses[position, 0] - exact.losses[position, 0])
        assert 0 < difference <= moved


class _Scores:
    """The logits of a fitted linear head, and the most that bfloat16 moves one of them."""

    def __init__(self, maps: NDArray[np.float16], fitted: FittedHeads, position: int) -> None:
        """Take maps (N, C, h, w)."""
        instances = maps.mean((2, 3), dtype=np.float32)  # (N, C)
        if fitted.fits[position].head.unit == "pixel":
            instances = np.moveaxis(maps, 1, -1).reshape(-1, CHANNELS).astype(np.float32)
        weight = fitted.weight[position]
        self.logits = instances @ weight + fitted.bias[position]  # (n,)
        self.moved = float(score_tolerance(instances, weight).max())


def _steepness_of_bnsigmoid(scores: _Scores, fitted: FittedHeads) -> float:
    """Return the most that a patient's logit moves when none of its instances' moves by over 1.

    L = Σ wᵢ lᵢ with wᵢ in proportion to σ(β + g lᵢ), so ∂L/∂lᵢ = wᵢ (1 + g (1 - σᵢ)(lᵢ - L)); the
    wᵢ add up to 1, and L lies among the lᵢ.
    """
    g = abs(fitted.extras["gamma"][6]) / np.sqrt(fitted.extras["running_var"][6])
    return float(1 + g * (np.ptp(scores.logits) + 2 * scores.moved))


def _moved_by_bfloat16(network: NetworkHead, maps: NDArray[np.float16]) -> float:
    images = torch.from_numpy(maps.mean((2, 3), dtype=np.float32))
    bags = Bags.of(np.array(SIZES))
    tolerance = bfloat16_tolerance(
        lambda inputs: network(inputs, bags), images, network.parameters()
    )
    return float(tolerance.max())


def test_weights_apply_to_raw_features(features: Features, maps: NDArray[np.float16]) -> None:
    head = resolve(HeadSettings(agg="mean", lr=0.05))
    fitted = fit_stacked(features, [Fit(head=head, split=_splits(1)[0])], epochs=2, sampling=PLAIN)
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
        fit_stacked(make_features(m), fits, epochs=2, sampling=PLAIN).weight
        for m in (maps, changed)
    ]
    np.testing.assert_array_equal(weights[0], weights[1])


def test_heads_without_curve_are_evaluated_after_the_last_epoch_only(features: Features) -> None:
    fits = [
        Fit(head=resolve(HeadSettings(agg=agg)), split=_splits(1)[0], curve="nobody")
        for agg in ("max", "mean")
    ]
    curves = fit_stacked(features, fits, epochs=2, sampling=PLAIN).curves
    assert np.isnan(curves[:, 0]).all()
    assert np.isfinite(curves[:, 1]).all()


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(batch_size=BATCH, images_per_patient=2)])
def test_heads_without_curve_learn_the_same(features: Features, sampling: Sampling) -> None:
    networks = [resolve(HeadSettings(agg=agg, width=4)) for agg in ("attention", "lstm")]
    fits = [Fit(head=head, split=split) for head in (*HEADS, *networks) for split in _splits(2)]
    everyone, nobody = (
        fit_stacked(
            features, [replace(fit, curve=curve) for fit in fits], epochs=3, sampling=sampling
        )
        for curve in ("everyone", "nobody")
    )
    np.testing.assert_array_equal(nobody.curves[:, -1], everyone.curves[:, -1])
    for position in range(len(fits)):
        for name, values in everyone.tensors(position).items():
            np.testing.assert_array_equal(nobody.tensors(position)[name], values)


@pytest.mark.parametrize("large", [1, 8, 256])
def test_curves_of_those_held_out_are_those_of_everyone(
    viewed: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(weighted, "_LARGE", large)  # instances of a patient
    networks = [resolve(HeadSettings(agg=agg, width=4)) for agg in ("attention", "lstm")]
    features, rows = make_features(viewed), np.arange(len(SIZES))
    fits = [Fit(head=head, split=split) for head in (*HEADS, *networks) for split in _splits(3)]
    fit = partial(fit_stacked, features, epochs=2, sampling=Sampling(batch_size=BATCH, views=4))
    everyone = fit(fits, tta=True).curves
    held_out = fit([replace(each, curve="held-out") for each in fits], tta=True).curves
    np.testing.assert_allclose(held_out[:, 1], everyone[:, 1], atol=1e-6)
    for each, ours, theirs in zip(fits, held_out[:, 0], everyone[:, 0], strict=True):
        own = np.isin(rows, features.rows_of(each.split.validation))
        np.testing.assert_allclose(ours[own], theirs[own], atol=1e-6)
        if each.head in networks or (large == 1 and each.head.agg in ("max", "bnsigmoid")):
            assert np.isnan(ours[~own]).all()


@pytest.mark.parametrize("memory", [0, 1 << 30])
@pytest.mark.parametrize("view", [0, 3])
def test_patients_are_read_in_any_order(
    viewed: NDArray[np.float16], memory: int, view: int
) -> None:
    instances = make_features(viewed, memory=memory).of_unit("pixel")
    one_by_one = [instances.read(np.array([row]), view) for row in range(len(SIZES))]
    for own in ([2], [3, 4, 5], [0, 11, 1, 2, 7], list(range(len(SIZES)))):
        values, bags = instances.read(np.array(own), view)
        np.testing.assert_array_equal(values, torch.cat([one_by_one[row][0] for row in own]))
        assert bags.sizes.tolist() == [SIZES[row] * HEIGHT * WIDTH for row in own]
    whole, _ = instances.read(np.arange(len(SIZES)), view)
    np.testing.assert_array_equal(whole, torch.cat([values for values, _ in one_by_one]))


@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("at_once", [1, 64 << 20])
def test_single_instances_are_those_of_their_images(
    viewed: NDArray[np.float16], monkeypatch: pytest.MonkeyPatch, unit: str, at_once: int
) -> None:
    monkeypatch.setattr(instances_module, "_CHUNK_BYTES", at_once)
    kept, streamed = (make_features(viewed, memory=m).of_unit(unit) for m in (1 << 30, 0))
    rows = torch.tensor([[3, 0], [17, 3], [40, 41]])
    views = torch.tensor([[0, 3], [1, 2], [2, 2]])
    for own in (None, views):
        expected = kept.source.gather(
            rows.flatten() // kept.per_image, None if own is None else own.flatten()
        )[torch.arange(6), rows.flatten() % kept.per_image]
        for instances in (kept, streamed):
            np.testing.assert_array_equal(instances.pick(rows, own), expected.view(3, 2, -1))


def test_chunks_are_all_patients_in_their_order(features: Features) -> None:
    instances = features.of_unit("image")
    for heads in (1, 1 << 20, 4 << 20, 16 << 20):  # all together … each alone
        some = list(instances.cut(np.array([5, 3, 4, 0]), heads))
        assert np.concatenate(some).tolist() == [5, 3, 4, 0]
        assert len(some) == {1: 1, 1 << 20: 3, 4 << 20: 4, 16 << 20: 4}[heads]


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
