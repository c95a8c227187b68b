"""Statistics as each training set learns them, and the regressions on them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import softplus

from lymphfeat.heads.aggregators.distribution import (
    Deviation,
    KernelMean,
    LogDeviation,
    Mean,
    OrderStatistic,
    QuantileRange,
    Standardised,
    Statistic,
    confidence,
)
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.descriptions import (
    Description,
    Fixed,
    KernelMeans,
    LogDeviations,
    Prototypes,
)
from lymphfeat.heads.engine.exact import Mixture, TrainingSet, mixtures, solve_heads
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.logistic import solve_paths

CHANNELS = 6
SIZES = np.array([3, 20, 16, 7, 30, 18, 16, 25, 40, 17, 22, 19])
PATIENTS = len(SIZES)
TRAIN = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])


def draw(seed: int = 0) -> NDArray[np.float32]:
    """Return the maps (N, C, 2, 2) of all images; tumoral patients' cells differ less."""
    rng = np.random.default_rng(seed)
    spread = np.where(LABELS.numpy() == 1, 0.6, 1.2)
    maps = rng.normal(size=(SIZES.sum(), CHANNELS, 2, 2)) * 0.3
    maps += (rng.normal(size=(SIZES.sum(), CHANNELS)) * np.repeat(spread, SIZES)[:, None])[
        ..., None, None
    ]
    return maps.astype(np.float16).astype(np.float32)


def instances_of(maps: NDArray[np.float32], unit: str = "image") -> Instances:
    offsets = np.concatenate([[0], SIZES.cumsum()])
    features = Features(
        maps.astype(np.float16),
        maps.mean((2, 3)),
        offsets,
        [f"P{i}" for i in range(PATIENTS)],
        LABELS.numpy(),
    )
    return features.of_unit(unit)


def describe(instances: Instances, name: str) -> Description:
    if name == "logstd":
        return LogDeviations(instances)
    if name == "kernel-mean":
        return KernelMeans(instances)
    if name == "prototypes":
        return Prototypes.of(instances, 3)
    fixed: dict[str, Statistic] = {
        "mean": Mean(),
        "std": Deviation(),
        "plain std": PlainDeviation(),
        "q": OrderStatistic(QuantileRange(0.9, 0.5)),
    }
    return Fixed.of(instances, fixed[name])


def learn(instances: Instances, names: tuple[str, ...], train: Tensor = TRAIN) -> TrainingSet:
    descriptions = [(0, describe(instances, name)) for name in names]
    ones = torch.ones(len(train), dtype=torch.float64)
    return TrainingSet.of(descriptions, train, ones, [instances.bags.sizes])


NAMES = ("mean", "std", "q", "logstd", "kernel-mean", "prototypes")


@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_learnt_from_patients_outside_the_training_set(name: str, unit: str) -> None:
    maps = draw()
    others = maps.copy()
    others[SIZES[: len(TRAIN)].sum() :] *= -3  # every patient after the training patients
    before, after = (learn(instances_of(m, unit), (name,)) for m in (maps, others))
    for one, other in zip(before.statistics, after.statistics, strict=True):
        for field in ("typical", "mean", "scale"):
            assert torch.equal(getattr(one, field), getattr(other, field))
    for values, changed in zip(before.values, after.values, strict=True):
        assert torch.equal(values[TRAIN], changed[TRAIN])
        assert not torch.equal(values, changed)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learnt_describes_a_new_patient_as_it_does_the_known_ones(name: str) -> None:
    instances = instances_of(draw())
    for statistic, values in describe(instances, name).learn(TRAIN):
        for patient in (0, 11):
            (_, own, bags), *_ = replace_images(instances, patient).chunks(1)
            torch.testing.assert_close(
                statistic.describe(own, bags)[0], values[patient], rtol=1e-5, atol=1e-6
            )


def test_logarithms_are_those_of_patients_described_alone() -> None:
    """Outliers take most of some patients' spread: their changes are large."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 2, 16, 17, 18, 40, 150, 90])
    x = rng.standard_t(1.5, size=(sizes.sum(), 6)) * 10.0 ** rng.integers(-3, 4, 6)
    x[sizes[:6].sum() : sizes[:7].sum(), 1] = 0.5  # no spread
    instances = image_features(x, sizes, np.tile([0, 1], 4))
    ((statistic, values),) = describe(instances, "logstd").learn(torch.arange(5))
    (_, own, bags), *_ = instances.chunks(1)
    torch.testing.assert_close(values, statistic.describe(own, bags), rtol=1e-9, atol=1e-8)


def replace_images(instances: Instances, patient: int) -> Instances:
    """Return one patient alone."""
    first, last = instances.images[patient : patient + 2]
    source = instances.source.span(int(first), int(last), 0)
    maps = source.numpy()[:, :, None, None]
    return Features(
        maps.astype(np.float16), source.numpy(), np.array([0, last - first]), ["P"], np.array([0])
    ).of_unit("image")


@pytest.mark.parametrize("train", [TRAIN, torch.tensor([3, 10])], ids=["most", "two"])
@pytest.mark.parametrize("unit", ["image", "pixel"])
def test_the_bandwidth_is_about_the_median_distance_of_training_patients(
    train: torch.Tensor, unit: str
) -> None:
    instances = instances_of(draw(), unit)
    ((statistic, _),) = describe(instances, "kernel-mean").learn(train)
    assert isinstance(statistic, KernelMean)
    bags = [instances.of_patient(int(patient)) for patient in train]
    x = torch.cat(bags)
    patient = np.repeat(np.arange(len(bags)), [len(bag) for bag in bags])
    apart = torch.from_numpy(patient[:, None] != patient[None, :])
    expected = float(torch.cdist(x, x)[apart].median())
    assert float(statistic.bandwidth) == pytest.approx(expected, rel=0.03)


def test_instances_that_do_not_differ_have_a_bandwidth() -> None:
    ((statistic, values),) = describe(instances_of(np.ones_like(draw())), "kernel-mean").learn(
        TRAIN
    )
    assert isinstance(statistic, KernelMean)
    assert statistic.bandwidth == 1
    assert values.isfinite().all()


def test_epsilon_is_a_tenth_of_the_mean_deviation() -> None:
    instances = instances_of(draw())
    ((statistic, _),) = describe(instances, "logstd").learn(TRAIN)
    assert isinstance(statistic, LogDeviation)
    ends = SIZES[: len(TRAIN)].cumsum()
    bags = np.split(instances.source.span(0, int(ends[-1]), 0).double().numpy(), ends[:-1])
    expected = np.mean([bag.std(0, ddof=1) for bag in bags], axis=0) / 10
    np.testing.assert_allclose(statistic.epsilon.numpy(), expected)


def test_blocks_weigh_alike_whatever_their_length() -> None:
    for values in learn(instances_of(draw()), NAMES).values:
        known = values[TRAIN]
        torch.testing.assert_close(known.mean(0), torch.zeros(known.shape[1]).double())
        assert float((known**2).sum(1).mean()) == pytest.approx(1)


def test_a_channel_that_is_the_same_in_all_training_patients_is_dropped() -> None:
    maps = draw()
    maps[: SIZES[: len(TRAIN)].sum(), 2] = 0.5
    for values in learn(instances_of(maps), ("mean", "std", "q", "logstd")).values:
        assert (values[:, 2] == 0).all()
        assert values.isfinite().all()
        assert float((values[TRAIN] ** 2).sum(1).mean()) == pytest.approx(1)


def test_the_spread_of_small_bags_is_shrunk_to_the_typical_one() -> None:
    assert confidence(torch.tensor([1, 2, 16, 90])).tolist() == pytest.approx([0, 1 / 15, 1, 1])
    described = Fixed.of(instances_of(draw()), Deviation()).values
    sizes = torch.from_numpy(SIZES)
    own = Standardised.of(Deviation(), described[TRAIN], sizes[TRAIN])
    at = float(confidence(torch.tensor([3])))
    expected = (at * described[0] + (1 - at) * own.typical - own.mean) * own.scale
    torch.testing.assert_close(own.apply(described, sizes)[0], expected)
    alone = own.apply(described, torch.ones(PATIENTS))
    torch.testing.assert_close(alone, ((own.typical - own.mean) * own.scale).expand_as(alone))
    means = Standardised.of(Mean(), described[TRAIN], sizes[TRAIN])
    torch.testing.assert_close(
        means.apply(described, sizes), (described - means.mean) * means.scale
    )


def solve_by_sklearn(
    z: NDArray[np.float64], labels: NDArray[np.int64], penalties: list[float]
) -> tuple[float, NDArray[np.float64], float]:
    """Choose the penalty by refitting without each patient; return it, weights and intercept."""
    n = len(labels)

    def fit(rows: NDArray[np.bool_], penalty: float) -> LogisticRegression:
        model = LogisticRegression(C=1 / (n * penalty), tol=1e-10, max_iter=10_000)
        return model.fit(z[rows], labels[rows])

    losses = []
    for penalty in penalties:
        logits = [
            float(fit(np.arange(n) != i, penalty).decision_function(z[i : i + 1])[0])
            for i in range(n)
        ]
        losses.append(np.mean(np.logaddexp(0, logits) - labels * np.array(logits)))
    best = penalties[int(np.argmin(losses))]
    model = fit(np.ones(n, bool), best)
    return best, model.coef_[0], float(model.intercept_[0])


@pytest.mark.parametrize("names", [("std",), ("mean", "std")])
def test_heads_are_what_sklearn_solves_split_by_split(names: tuple[str, ...]) -> None:
    patients, rng = 40, np.random.default_rng(3)
    labels = rng.integers(0, 2, patients)
    x = rng.normal(size=(patients * 16, CHANNELS)) * np.repeat(1 - 0.25 * labels, 16)[:, None]
    instances = image_features(x, np.full(patients, 16), labels)
    trains = [torch.arange(0, 30), torch.arange(10, 40), torch.arange(0, 40, 2)]
    penalties = [0.03, 0.3, 3.0]
    sets = [learn(instances, names, train) for train in trains]
    for own, found in zip(
        sets, solve_heads(sets, torch.from_numpy(labels), penalties), strict=True
    ):
        train = own.patients
        z = torch.cat(own.values, 1).numpy() / len(own.values) ** 0.5
        penalty, weight, intercept = solve_by_sklearn(z[train], labels[train], penalties)
        assert found.penalty == penalty
        np.testing.assert_allclose(
            found.logits.numpy(), z @ weight + intercept, rtol=1e-4, atol=1e-4
        )


def image_features(
    x: NDArray[np.float64], sizes: NDArray[np.int64], labels: NDArray[np.int64]
) -> Instances:
    """Return images (N, C) of patients as instances."""
    offsets = np.concatenate([[0], sizes.cumsum()])
    ids = [f"P{i}" for i in range(len(sizes))]
    maps = x[:, :, None, None].astype(np.float16)
    return Features(maps, x.astype(np.float32), offsets, ids, labels).of_unit("image")


class PlainDeviation(Deviation):
    """The standard deviation as it is, which grows with the bag."""

    def describe(self, instances: Tensor, bags: Bags) -> Tensor:
        parts = torch.split(instances.double(), bags.sizes.tolist())
        return torch.stack([part.std(0) for part in parts])


@pytest.mark.parametrize("name", [*NAMES, "plain std"])
def test_a_label_that_is_the_bag_size_is_not_predicted(name: str) -> None:
    """Sparse cells of one distribution, tumoral patients with five times as many: AUC .5."""
    aucs = np.array([auc_of_bag_size(name, seed) for seed in range(100, 130)])
    above = (aucs.mean() - 0.5) / (aucs.std(ddof=1) / len(aucs) ** 0.5)  # standard errors
    assert above > 4 if name == "plain std" else abs(above) < 2


def auc_of_bag_size(name: str, seed: int) -> float:
    """Return the AUC on 24 held-out patients of a head learnt from 24."""
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 1], 24)
    sizes = np.where(labels == 1, rng.integers(80, 120, 48), rng.integers(16, 24, 48))
    x = np.maximum(rng.normal(-1, 1, size=(sizes.sum(), 8)), 0)
    instances = image_features(x, sizes, labels)
    own = learn(instances, (name,), torch.arange(24))
    (found,) = solve_heads([own], torch.from_numpy(labels))
    logits = found.logits[24:].numpy()
    tumoral, reactive = logits[labels[24:] == 1], logits[labels[24:] == 0]
    return float((tumoral[:, None] > reactive[None]).mean())


@given(st.integers(1, 7))
def test_mixtures_start_with_equal_weights_and_have_each_block_alone(blocks: int) -> None:
    found = mixtures(blocks)
    assert len(set(found)) == len(found)
    assert found[0] == (1 / blocks,) * blocks
    for mixture in found:
        assert min(mixture) >= 0
        assert sum(mixture) == pytest.approx(1)
    alone = {tuple(float(each == block) for each in range(blocks)) for block in range(blocks)}
    assert alone <= set(found)


@pytest.mark.parametrize("seed", range(3))
def test_chosen_weights_are_those_that_a_search_one_by_one_finds(seed: int) -> None:
    patients, rng = 40, np.random.default_rng(seed)
    labels = rng.integers(0, 2, patients)
    x = rng.normal(size=(patients * 16, CHANNELS)) * np.repeat(1 - 0.25 * labels, 16)[:, None]
    instances = image_features(x, np.full(patients, 16), labels)
    own = learn(instances, ("mean", "std"), torch.arange(30))
    penalties = [0.03, 0.3, 3.0]
    (found,) = solve_heads([own], torch.from_numpy(labels), penalties, mix=True)

    def left_out_loss(mixture: Mixture, penalty: float) -> float:
        z = torch.cat([v * w**0.5 for v, w in zip(own.values, mixture, strict=True)], 1)[:30]
        known = torch.from_numpy(labels[:30])[None].double()
        (solution,) = solve_paths((z @ z.T)[None], known, penalties=[penalty])
        return float((softplus(solution.left_out) - known * solution.left_out).mean())

    choices = [(mixture, penalty) for mixture in mixtures(2) for penalty in penalties]
    best = min(choices, key=lambda choice: left_out_loss(*choice))
    assert (found.mixture, found.penalty) == best
    scale = np.repeat(np.sqrt(found.mixture), CHANNELS)
    z = torch.cat(own.values, 1).numpy() * scale
    model = LogisticRegression(C=1 / (30 * found.penalty), tol=1e-10, max_iter=10_000)
    model.fit(z[:30], labels[:30])
    np.testing.assert_allclose(found.logits, model.decision_function(z), rtol=1e-4, atol=1e-4)


def test_a_block_of_noise_gets_little_weight() -> None:
    patients, rng = 60, np.random.default_rng(0)
    labels = np.tile([0, 1], patients // 2)
    x = rng.normal(size=(patients * 16, CHANNELS)) * np.repeat(1 - 0.4 * labels, 16)[:, None]
    instances = image_features(x, np.full(patients, 16), labels)
    sets = [
        learn(instances, ("mean", "std"), torch.arange(start, start + 40)) for start in range(20)
    ]
    found = solve_heads(sets, torch.from_numpy(labels), mix=True)
    assert np.mean([each.mixture[1] for each in found]) > 0.7


def test_a_channel_that_differs_by_rounding_alone_is_dropped() -> None:
    rng = np.random.default_rng(0)
    described = torch.from_numpy(rng.normal(size=(20, 3)) * [1.0, 1e-9, 1e-3])
    own = Standardised.of(Mean(), described, torch.full((20,), 30))
    assert (own.scale > 0).tolist() == [True, False, True]
