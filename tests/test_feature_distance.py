"""Distances between cells' features: against plain inverses, each patient left out whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from lymphfeat.model.feature_distance import FeatureDistance, left_out_distances

Array = NDArray[np.float64]


def made_up(seed: int, sizes: list[int], channels: int) -> Array:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(0, 1, (channels, channels))
    owner = np.repeat(rng.normal(0, 1, (len(sizes), channels)), sizes, axis=0)
    return np.asarray((rng.normal(0, 1, owner.shape) + owner) @ mixed + 5)


def prior_of(images: Array) -> float:
    """Return the squared deviations that shrinking the covariance adds to each feature."""
    covariance = np.cov(images.T, bias=True)
    shrinkage = min(ledoit_wolf(images)[1], 0.999)
    return float(len(images) * shrinkage / (1 - shrinkage) * np.trace(covariance) / len(covariance))


def plain(images: Array, others: Array, prior: float) -> Array:
    covariance = np.cov(others.T, bias=True) + prior / len(others) * np.eye(others.shape[1])
    centred = images - others.mean(0)
    return np.asarray(np.sqrt(np.sum(centred @ np.linalg.inv(covariance) * centred, axis=1)))


@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=6),
    channels=st.integers(2, 12),
)
def test_left_out_distances_are_those_to_the_others_alone(
    seed: int, sizes: list[int], channels: int
) -> None:
    """Of bags smaller and larger than the number of features, which are solved differently."""
    images = made_up(seed, sizes, channels)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    prior = prior_of(images)
    for place, (own, middle) in enumerate(left_out_distances(images, offsets.tolist())):
        mine = np.arange(offsets[place], offsets[place + 1])
        others = np.delete(images, mine, axis=0)
        np.testing.assert_allclose(own, plain(images[mine], others, prior), rtol=1e-5)
        mean = images[mine].mean(0, keepdims=True)
        assert middle == pytest.approx(plain(mean, others, prior)[0], rel=1e-5, abs=1e-6)


def test_new_images_are_measured_by_all_training_images() -> None:
    images = made_up(0, [4, 6, 5], 8)
    new = made_up(1, [3, 2], 8)
    learnt = FeatureDistance.learn(images)
    expected = plain(new, images, prior_of(images))
    np.testing.assert_allclose(learnt.of_images(new), expected, rtol=1e-5)
    means = np.stack([new[:3].mean(0), new[3:].mean(0)])
    expected = plain(means, images, prior_of(images))
    np.testing.assert_allclose(learnt.of_means(new, [0, 3, 5]), expected, rtol=1e-5)


def test_left_out_is_farther_than_in_sample() -> None:
    """Why the limits come from patients left out: there are few images for so many features."""
    sizes = [5] * 12
    images = made_up(0, sizes, 40)
    offsets = np.arange(0, 61, 5).tolist()
    left_out = np.concatenate([own for own, _ in left_out_distances(images, offsets)])
    inside = FeatureDistance.learn(images).of_images(images)
    assert np.median(left_out) > 1.2 * np.median(inside)


def test_constant_features_do_no_harm() -> None:
    images = made_up(0, [5, 5, 5], 4)
    images[:, 1] = 3.0
    learnt = FeatureDistance.learn(images)
    assert np.isfinite(learnt.of_images(images)).all()
    assert np.isfinite(FeatureDistance.learn(np.zeros((6, 3))).of_images(np.zeros((2, 3)))).all()
