"""How far a cell's features are from those of training cells: the Mahalanobis distance."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.linalg import cholesky, solve_triangular
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor, nn

from lymphfeat.runtime.arrays import Floats

_LEAST_VARIANCE = 1e-6  # of a feature, so that constant ones do no harm
_MOST_SHRINKAGE = 0.999


class FeatureDistance(nn.Module):
    """The mean and covariance of the training patients' images, as tensors of a model file.

    The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf 2004): there are
    often fewer images than pairs of features.
    """

    mean: Tensor  # (C,)
    whitening: Tensor  # (C, C) makes the covariance the identity

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("whitening", torch.eye(channels))

    @classmethod
    def learn(cls, images: Floats) -> "FeatureDistance":
        """Learn from pooled features of images: (N, C)."""
        mean, whitening = _learn(images)
        learnt = cls(images.shape[1])
        learnt.mean.copy_(torch.from_numpy(mean))
        learnt.whitening.copy_(torch.from_numpy(whitening * np.sqrt(len(images))))
        return learnt

    def of_images(self, images: Floats) -> Floats:
        """Return the distances of images (N, C): (N,)."""
        return np.asarray(np.linalg.norm(self._white(images), axis=1))

    def of_means(self, images: Floats, offsets: Sequence[int]) -> Floats:
        """Return the distances of the mean images of patients: (P,), of images (N, C)."""
        return self.of_images(np.add.reduceat(images, offsets[:-1]) / np.diff(offsets)[:, None])

    def _white(self, images: Floats) -> Floats:
        mean, whitening = self.mean.double().numpy(), self.whitening.double().numpy()
        return np.asarray((images - mean) @ whitening.T)


def _learn(images: Floats) -> tuple[Floats, Floats]:
    """Return the mean, (C,), and the factor (C, C) whose square is the inverse of the scatter.

    The scatter is the sum of the squared deviations of the images (N, C), and of the prior.
    """
    mean = images.mean(0)
    centred = images - mean
    scatter = centred.T @ centred  # (C, C)
    shrinkage = min(ledoit_wolf_shrinkage(centred, assume_centered=True), _MOST_SHRINKAGE)
    variance = np.trace(scatter) / centred.size  # the mean over features
    prior = len(images) * max(shrinkage / (1 - shrinkage) * variance, _LEAST_VARIANCE)
    lower = cholesky(scatter + prior * np.eye(len(mean)), lower=True)
    return mean, solve_triangular(lower, np.eye(len(mean)), lower=True)


def left_out_distances(images: Floats, offsets: Sequence[int]) -> Iterator[tuple[Floats, float]]:
    """Yield, of each patient, the distances of its images, (n,), and of their mean.

    They are those to all other patients' images (N, C), with the prior that shrinks the covariance
    of all: exactly, by a change of the covariance instead of a new one.
    """
    mean, whitening = _learn(images)
    white = (images - mean) @ whitening.T  # (N, C) scatter and prior are the identity
    for start, stop in pairwise(offsets):
        own, others = white[start:stop], len(white) - (stop - start)
        moved = -own.sum(0) / others  # the others' mean
        removed = np.vstack([own, np.sqrt(others) * moved])  # (n + 1, C) what the scatter loses
        queries = np.vstack([own, own.mean(0)]) - moved
        distances = np.sqrt(others * _squares_without(removed, queries))
        yield distances[:-1], float(distances[-1])


def _squares_without(removed: Floats, queries: Floats) -> Floats:
    """Return q (I - RᵀR)⁻¹ qᵀ of queries (m, C) and removed rows R (n, C): (m,).

    By the smaller of two systems: that of the features, or that of the rows (Woodbury).
    """
    n, channels = removed.shape
    if n > channels:
        lower = cholesky(np.eye(channels) - removed.T @ removed, lower=True)
        return np.asarray((solve_triangular(lower, queries.T, lower=True) ** 2).sum(0))
    lower = cholesky(np.eye(n) - removed @ removed.T, lower=True)
    gained = solve_triangular(lower, removed @ queries.T, lower=True)  # (n, m)
    return np.asarray((queries**2).sum(1) + (gained**2).sum(0))
