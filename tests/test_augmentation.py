"""Random views: what they may change of a cell, and what not."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from lymphfeat.features.augmentation import (
    Augmentation,
    blurred,
    centre_views,
    saturated,
    turned,
)

STILL = Augmentation(size=32, shift=0, stain=0, blur=0, noise=0)
ONES = torch.ones(6)


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
    views = STILL.draw(image.expand(64, -1, -1, -1), generator(), torch.ones(64))
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
        view = STILL.draw(image, generator(), torch.tensor([zoom]))
        assert float(view[0, 0].mean()) * 32 * 32 / 255 == pytest.approx((16 * zoom) ** 2, rel=0.05)
        assert torch.allclose(view, centre_views(image, 32, zoom), atol=0.5)


def test_views_stay_pixels_and_differ() -> None:
    views = Augmentation(size=40).draw(fields(6, 48), generator(), ONES)
    assert views.shape == (6, 3, 40, 40)
    assert views.dtype == torch.float32
    assert 0 <= float(views.min()) < float(views.max()) <= 255
    assert not torch.equal(views, Augmentation(size=40).draw(fields(6, 48), generator(1), ONES))
    assert torch.equal(views, Augmentation(size=40).draw(fields(6, 48), generator(), ONES))


def test_turned_and_saturated_are_what_they_say() -> None:
    third = torch.full((1, 1, 1, 1), 2 * math.pi / 3)
    red, green, blue = torch.eye(3)
    assert torch.allclose(turned(third)[0] @ red, green, atol=1e-6)
    assert torch.allclose(turned(third)[0] @ green, blue, atol=1e-6)
    colour = torch.tensor([0.9, 0.2, 0.4])
    grey = colour.mean().expand(3)
    for angle in (0.3, -1.2):
        matrix = turned(torch.full((1, 1, 1, 1), angle))[0]
        assert torch.allclose(matrix @ grey, grey, atol=1e-6)  # grey stays grey
        assert torch.allclose(matrix @ matrix.T, torch.eye(3), atol=1e-6)  # saturation stays
    for factor in (0.0, 1.0, 1.7):
        matrix = saturated(torch.full((1, 1, 1, 1), factor))[0]
        assert torch.allclose(matrix @ colour, grey + factor * (colour - grey), atol=1e-6)


def test_stain_follows_its_strength() -> None:
    cell = torch.tensor([150.0, 90.0, 170.0]).view(1, 3, 1, 1).expand(300, 3, 8, 8)
    spread = []
    for stain in (0.0, 0.3, 1.0):
        means = (
            replace(STILL, size=8, stain=stain)
            .draw(cell, generator(), torch.ones(300))
            .mean((2, 3))
        )  # (n, 3)
        spread.append(float(means.std(0).mean()))
    assert spread[0] < 1e-3 < spread[1] < spread[2] / 2
    assert spread[2] > 15


def test_stain_leaves_the_form_of_a_cell() -> None:
    image = torch.full((50, 3, 16, 16), 220.0)
    image[..., 4:12, 4:12] = 120.0  # dark on light
    views = replace(STILL, size=16, stain=1.0).draw(image, generator(), torch.ones(50))
    assert (views[..., 8, 8].mean(1) < views[..., 1, 1].mean(1) - 20).all()


def test_blur_is_what_scipy_says() -> None:
    views = fields(4, 24).float()
    weight = torch.tensor([0.0, 0.3, 0.7, 1.0]).view(4, 1, 1, 1)
    kernel = np.convolve([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    soft = views.double().numpy()
    for axis in (2, 3):
        soft = correlate1d(soft, kernel, axis=axis, mode="mirror")
    expected = (1 - weight.double()) * views.double() + weight.double() * torch.from_numpy(soft)
    assert torch.allclose(blurred(views, weight).double(), expected, atol=1e-3)
