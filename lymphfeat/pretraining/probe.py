"""A k-NN probe: are cells of one class, or of one patient, close together in feature space?"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lymphfeat.cohort.images import Normalization
from lymphfeat.features.augmentation import centre_views
from lymphfeat.features.backbones import Backbone
from lymphfeat.features.views import normalize

PROBE_IMAGES = 1000
_CHUNK = 128


def probe_rows(groups: Tensor, seed: int) -> Tensor:
    """Choose at most PROBE_IMAGES rows at random, ascending."""
    order = np.random.default_rng(seed).permutation(len(groups))[:PROBE_IMAGES]
    return torch.from_numpy(np.sort(order))


@torch.inference_mode()
def pooled_features(
    backbone: Backbone, fields: Tensor, size: int, zoom: float, normalization: Normalization
) -> NDArray[np.float32]:
    """Return average-pooled features (n, C) of the fields' centres; the backbone is left as is."""
    training = backbone.training
    backbone.eval()
    pooled = []
    for part in torch.split(fields, _CHUNK):
        images = normalize(centre_views(part, size, zoom), normalization)
        images = images.contiguous(memory_format=torch.channels_last)
        pooled.append(backbone(images).mean((2, 3)))
    backbone.train(training)
    return torch.cat(pooled).float().cpu().numpy()  # (n, C)


def nearest_neighbour_share(features: NDArray[np.float32], groups: NDArray[np.int64]) -> float:
    """Return the share of rows whose nearest other row (cosine) is in the same group, 0 to 1."""
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-6)  # (n, C)
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(scaled)
    neighbour = nearest.kneighbors(return_distance=False)[:, 0]  # (n,) of the others
    return float((groups[neighbour] == groups).mean())
