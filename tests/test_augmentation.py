"""Random views: what they may change of a cell, and what not."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lymphfeat.features.augmentation import Augmentation, centre_views

PLAIN = {"shift": 0.0, "brightness": 0.0, "stain": 0.0, "saturation": 0.0, "contrast": 0.0}
STILL = Augmentation(size=32, zoom=(1.0, 1.0), blur=0.0, noise=0.0, **PLAIN)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fields(n: int, side: int = 32) -> Tensor:
    numbers = np.random.default_rng(0).integers(0, 256, (n, 3, side, side), dtype=np.uint8)
    return torch.from_numpy(numbers)


def eight(image: Tensor) -> list[Tensor]:
    """Return the flips and right angles of an image, by torch's own operations."""
    turned = [torch.rot90(image, turns, (1, 2)) for turns in range(4)]
    return turned + [view.flip(2) for view in turned]


def test_without_jitter_a_view_is_one_of_the_eight() -> None:
    image = fields(1).float()
    views = STILL.draw(image.expand(64, -1, -1, -1), generator())
    seen = set()
    for view in views:
        distances = [float((view - other).abs().max()) for other in eight(image[0])]
        assert min(distances) < 0.1
        seen.add(int(np.argmin(distances)))
    assert seen == set(range(8))


def test_zoom_keeps_the_centre() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 24:40, 24:40] = 255  # a square cell of side 16
    for zoom in (0.75, 1.0, 1.5):
        settings = Augmentation(size=32, zoom=(zoom, zoom), blur=0.0, noise=0.0, **PLAIN)
        view = settings.draw(image, generator())
        assert float(view[0, 0].mean()) * 32 * 32 / 255 == pytest.approx((16 * zoom) ** 2, rel=0.05)
        assert torch.allclose(view, centre_views(image, 32, zoom), atol=0.5)


def test_views_stay_pixels_and_differ() -> None:
    views = Augmentation(size=40).draw(fields(6, 48), generator())
    assert views.shape == (6, 3, 40, 40)
    assert views.dtype == torch.float32
    assert 0 <= float(views.min()) < float(views.max()) <= 255
    assert not torch.equal(views, Augmentation(size=40).draw(fields(6, 48), generator(1)))
    assert torch.equal(views, Augmentation(size=40).draw(fields(6, 48), generator()))


def test_stain_moves_colours_within_its_bounds() -> None:
    grey = torch.full((200, 3, 8, 8), 100.0)
    settings = Augmentation(size=8, zoom=(1, 1), blur=0, noise=0, **PLAIN | {"stain": 0.1})
    means = settings.draw(grey, generator()).mean((2, 3))  # (n, 3)
    assert 90 <= float(means.min()) < 92
    assert 108 < float(means.max()) <= 110
    assert float((means[:, 0] - means[:, 1]).abs().max()) > 5  # each channel by itself
