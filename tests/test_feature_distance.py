"""Distances to the other patients' cells, against a covariance made anew for each patient."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf_shrinkage

from lymphfeat.model.feature_distance import left_out_distances


@pytest.mark.parametrize("channels", [3, 8, 40])
def test_each_patient_is_measured_by_the_others(channels: int) -> None:
    """Bags smaller and larger than the number of features take different ways."""
    rng = np.random.default_rng(channels)
    sizes = [1, 5, 30, 12, 60]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    images = rng.normal(size=(sum(sizes), channels)) * rng.uniform(0.1, 3, channels)
    centred = images - images.mean(0)
    shrinkage = ledoit_wolf_shrinkage(centred, assume_centered=True)
    variance = (centred**2).sum() / centred.size
    prior = len(images) * shrinkage / (1 - shrinkage) * variance
    for number, (distances, of_mean) in enumerate(left_out_distances(images, offsets.tolist())):
        own = np.arange(offsets[number], offsets[number + 1])
        others = np.delete(images, own, axis=0)
        deviations = others - others.mean(0)
        scatter = deviations.T @ deviations + prior * np.eye(channels)
        inverse = np.linalg.inv(scatter / len(others))
        queries = np.vstack([images[own], images[own].mean(0)]) - others.mean(0)
        expected = [float(np.sqrt(query @ inverse @ query)) for query in queries]
        np.testing.assert_allclose([*distances, of_mean], expected)
