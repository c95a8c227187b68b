"""Who is unlike training: limits from patients left out whole, and what they let through."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from lymphfeat.cohort.image_statistics import NAMES
from lymphfeat.model.familiarity import Familiarity, Judgement
from lymphfeat.runtime.strict_json import json_value

Array = NDArray[np.float64]
CHANNELS = 12


class Lab:
    """Draws patients whose features and image statistics vary as patients' do."""

    def __init__(self, seed: int) -> None:
        self._mixed = np.random.default_rng(seed).normal(0, 1, (CHANNELS, CHANNELS))

    def draw(
        self, seed: int, sizes: Sequence[int], bluer: float = 0.0, changed: float = 0.0
    ) -> tuple[list[Array], pd.DataFrame, list[int]]:
        """Move every statistic nucleus_blue by `bluer`, and the features of a share of images."""
        rng = np.random.default_rng(seed)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        features = rng.standard_t(6, (len(owner), CHANNELS))
        features += 0.4 * rng.normal(0, 1, (len(sizes), CHANNELS))[owner]
        features[rng.random(len(owner)) < changed, 0] += 20
        numbers = rng.normal(0, 1, (len(owner), len(NAMES)))
        numbers = 0.3 * numbers + 0.2 * rng.normal(0, 1, (len(sizes), len(NAMES)))[owner]
        statistics = pd.DataFrame(numbers, columns=list(NAMES))
        statistics["nucleus_blue"] += bluer
        return [features @ self._mixed], statistics, list(sizes)


def sizes_of(seed: int, patients: int) -> list[int]:
    sizes: list[int] = np.random.default_rng(seed).integers(4, 30, patients).tolist()
    return sizes


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(0)


@pytest.fixture(scope="module")
def model(lab: Lab) -> Familiarity:
    return Familiarity.learn(*lab.draw(1, sizes_of(1, 60)))


# --- the limits ----------------------------------------------------------------------------------


def plain_deviations(
    pooled: Array, statistics: Array, owner: NDArray[np.int64], left_out: int
) -> tuple[Array, float]:
    """Compare a patient with all others: the largest deviation of each image, and of the patient.

    The distances of the others are theirs when they are left out, as the model keeps them.
    """
    patients = range(int(owner.max()) + 1)
    _, shrinkage = ledoit_wolf(pooled)
    scatter = np.cov(pooled.T, bias=True) * len(pooled)
    prior = shrinkage / (1 - shrinkage) * np.trace(scatter) / pooled.shape[1]

    def distance(images: Array, patient: int) -> Array:
        others = pooled[owner != patient]
        covariance = np.cov(others.T, bias=True) + prior / len(others) * np.eye(CHANNELS)
        centred = images - others.mean(0)
        squares = np.sum(centred @ np.linalg.inv(covariance) * centred, axis=1)
        return np.asarray(np.log(squares) / 2)

    values = np.vstack(
        [
            np.column_stack([distance(pooled[owner == own], own), statistics[owner == own]])
            for own in patients
        ]
    )
    middles = np.array(
        [distance(pooled[owner == own].mean(0, keepdims=True), own)[0] for own in patients]
    )
    sizes = np.bincount(owner)
    rest = np.array([own for own in patients if own != left_out])
    low, middle, high = np.quantile(values[owner != left_out], [0.005, 0.5, 0.995], axis=0)
    mine = values[owner == left_out]
    far = np.where(
        mine > middle, (mine - middle) / (high - middle), (middle - mine) / (middle - low)
    )
    far[mine[:, 0] < middle[0], 0] = 0  # nearer than others is not unlike

    squares = np.exp(2 * middles)
    weights = np.linalg.lstsq(
        np.column_stack([sizes[rest], np.ones(len(rest))]), squares[rest] * sizes[rest], rcond=None
    )[0]
    assert (weights > 0).all()  # else the least squares must be those with none below 0
    over = np.log(squares / (weights[0] + weights[1] / sizes))
    means = np.array([values[owner == own].mean(0) for own in patients])
    deviations = [abs(over[left_out] - over[rest].mean()) / over[rest].std(ddof=1)]
    if over[left_out] < over[rest].mean():
        deviations = [0.0]
    for column in range(values.shape[1]):
        own = [values[owner == each, column] for each in rest]
        freedom = sum(len(each) - 1 for each in own)
        within = sum(((each - each.mean()) ** 2).sum() for each in own) / freedom
        theirs = means[rest, column]
        between = max(theirs.var(ddof=1) - within * np.mean(1 / sizes[rest]), 1e-4)
        z = (means[left_out, column] - theirs.mean()) / np.sqrt(between + within / sizes[left_out])
        deviations.append(max(z, 0.0) if column == 0 else abs(z))
    return far.max(1), max(deviations)


def test_limits_are_those_of_patients_left_out_whole(lab: Lab) -> None:
    sizes = sizes_of(2, 25)
    (pooled,), statistics, _ = lab.draw(2, sizes)
    owner = np.repeat(np.arange(25), sizes)
    found = [plain_deviations(pooled, statistics.to_numpy(), owner, own) for own in range(25)]
    learnt = Familiarity.learn([pooled], statistics, sizes)
    images = np.quantile(np.concatenate([own for own, _ in found]), 0.99)
    assert learnt.image_limit == pytest.approx(images, rel=1e-4)
    patients = sorted(patient for _, patient in found)
    limit = 0.3 * patients[-2] + 0.7 * patients[-1]  # at rank .95 * 26 = 24.7
    assert learnt.patient_limit == pytest.approx(limit, rel=1e-4)


@pytest.mark.seconds
@pytest.mark.parametrize("patients", [25, 80])
def test_about_a_twentieth_of_patients_like_those_of_training_are_beyond(patients: int) -> None:
    shares, images = [], []
    for seed in range(12):
        own = Lab(seed)
        learnt = Familiarity.learn(*own.draw(seed, sizes_of(seed, patients)))
        judged = learnt.judge(*own.draw(100 + seed, sizes_of(50 + seed, 150)))
        shares.append(judged.patients["unlike"].mean())
        images.append(judged.images["unlike"].mean())
    error = np.std(shares, ddof=1) / np.sqrt(len(shares))
    assert np.mean(shares) == pytest.approx(0.05, abs=3 * error)
    assert 0 < np.mean(shares) < 0.08
    assert np.mean(images) == pytest.approx(0.01, abs=0.005)


def test_bag_size_is_no_reason(model: Familiarity, lab: Lab) -> None:
    """Means of few images vary more, and are given more room."""
    small = model.judge(*lab.draw(5, [4] * 200)).patients["unlike"].mean()
    large = model.judge(*lab.draw(6, [29] * 200)).patients["unlike"].mean()
    assert small < 0.12
    assert large < 0.12


# --- what is beyond them -------------------------------------------------------------------------


def test_a_moved_statistic_is_noticed_and_named(model: Familiarity, lab: Lab) -> None:
    judged = model.judge(*lab.draw(7, [20] * 30, bluer=1.0))
    assert judged.patients["unlike"].mean() > 0.8
    named = [note for note in judged.notes if "bluer nuclei" in note]
    assert len(named) > 20
    other = model.judge(*lab.draw(7, [20] * 30, bluer=-1.0))
    assert sum("redder nuclei" in note for note in other.notes) > 20


def test_some_images_of_another_kind_are_noticed(model: Familiarity, lab: Lab) -> None:
    judged = model.judge(*lab.draw(8, [20] * 40, changed=0.3))
    assert judged.patients["unlike"].mean() > 0.6
    assert judged.images["unlike"].mean() == pytest.approx(0.3, abs=0.1)
    assert set(judged.images["unlike_in"][judged.images["unlike"] == 1]) >= {"of another look"}
    of_them = judged.images["unlike"].to_numpy().reshape(40, 20)
    np.testing.assert_allclose(judged.patients["unlike_images"], of_them.mean(1))


def test_notes_count_unlike_images_and_name_unusual_bag_sizes(model: Familiarity, lab: Lab) -> None:
    (note,) = model.judge(*lab.draw(9, [50], bluer=3.0)).notes
    assert note == (
        "the images are unlike those of training: bluer nuclei (50 of 50 are, each by itself); "
        f"50 images; training patients had {model.fewest} to {model.most}"
    )
    one = model.judge(*lab.draw(10, [1]))
    assert "1 image; training patients had" in one.notes[0]


def assert_same(one: Judgement, other: Judgement) -> None:
    pd.testing.assert_frame_equal(one.patients, other.patients, atol=1e-9)
    pd.testing.assert_frame_equal(one.images, other.images, atol=1e-9)
    assert one.notes == other.notes


def test_each_patient_is_judged_from_its_own_images_alone(model: Familiarity, lab: Lab) -> None:
    (pooled,), statistics, sizes = lab.draw(11, [3, 8, 5])
    together = model.judge([pooled], statistics, sizes)
    alone = model.judge([pooled[3:11]], statistics.iloc[3:11], [8])
    pd.testing.assert_frame_equal(
        alone.patients, together.patients.iloc[[1]].reset_index(drop=True), atol=1e-9
    )
    pd.testing.assert_frame_equal(
        alone.images, together.images.iloc[3:11].reset_index(drop=True), atol=1e-9
    )


def test_without_statistics_features_alone_decide(model: Familiarity, lab: Lab) -> None:
    pooled, statistics, sizes = lab.draw(12, [20] * 10, bluer=5.0)
    assert model.judge(pooled, statistics, sizes).patients["unlike"].all()
    assert not model.judge(pooled, None, sizes).patients["unlike"].all()
    learnt = Familiarity.learn(*lab.draw(1, sizes_of(1, 60))[:1], None, sizes_of(1, 60))
    assert learnt.statistics == ()
    assert not learnt.judge(pooled, statistics, sizes).patients["unlike"].all()


def test_several_sources_are_judged_together(lab: Lab) -> None:
    sizes = sizes_of(3, 30)
    pooled, statistics, _ = lab.draw(3, sizes)
    both = Familiarity.learn([pooled[0][:, :5], pooled[0][:, 5:]], statistics, sizes)
    (new,), statistics, counts = lab.draw(4, [20] * 10)
    moved = np.hstack([new[:, :5], new[:, 5:] + 40])
    judged = both.judge([moved[:, :5], moved[:, 5:]], statistics, counts)
    assert judged.patients["unlike"].all()
    assert judged.notes[0].startswith("the images are unlike those of training: of another look")


def test_it_is_kept_whole(model: Familiarity, lab: Lab) -> None:
    again = Familiarity.from_json(json_value(model.to_json()), [CHANNELS])
    for mine, theirs in zip(again.features, model.features, strict=True):
        mine.load_state_dict(theirs.state_dict())
    new = lab.draw(13, sizes_of(13, 10), bluer=0.5)
    assert_same(again.judge(*new), model.judge(*new))


def test_images_that_are_all_alike_do_no_harm(lab: Lab) -> None:
    (pooled,), statistics, sizes = lab.draw(14, [5] * 6)
    blank = Familiarity.learn([0 * pooled], 0 * statistics, sizes)
    assert not blank.judge([0 * pooled], 0 * statistics, sizes).patients["unlike"].any()
    assert blank.judge([0 * pooled + 1], 0 * statistics, sizes).patients["unlike"].all()
