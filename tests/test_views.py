"""Random views in training: what they do to an image, and how far they go."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lymphfeat.finetuning.augmentation import Views, draw_views, unaltered
from lymphfeat.settings import EndToEndSettings

assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, side: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator())


def placed(*numbers: float) -> Views:
    return Views(**{**vars(unaltered(1)), "places": torch.tensor([numbers])})


def test_nothing_is_altered_unless_asked_for() -> None:
    pixels = noise(5)
    assert unaltered(5).apply(pixels) is pixels
    views = draw_views(5, EndToEndSettings(flips=False), generator())
    assert views.apply(pixels) is pixels


@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_a_right_angle_turns_the_image(turns: int) -> None:
    pixels = noise(1)
    turned = placed(turns * math.pi / 2, 1, 0, 0).apply(pixels)
    assert_close(turned, torch.rot90(pixels, turns, (2, 3)).float())


def test_shifts_count_half_sides() -> None:
    pixels = noise(1)  # 8 pixels a side
    shifted = placed(0, 1, 2 / 4, -1 / 4).apply(pixels)
    assert_close(shifted[..., 1:, :6], pixels[..., :7, 2:].float())


def test_magnification_is_about_the_centre() -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, 2:6, 2:6] = 200
    view = placed(0, 2, 0, 0).apply(pixels)
    assert_close(view[..., 1:-1, 1:-1], torch.full((1, 3, 6, 6), 200.0))


def test_colours_are_factors() -> None:
    pixels = noise(2)
    factors = torch.tensor([[1.1, 0.9, 1.0, 0.8, 1.2], [0.95, 1.05, 1.0, 1.2, 0.9]])
    views = Views(**{**vars(unaltered(2)), "colours": factors})
    for seen, image, row in zip(views.apply(pixels), pixels, factors.numpy(), strict=True):
        changed = image.numpy().astype(np.float64) * row[:3, None, None]
        grey = changed.mean(0)
        changed = grey + (changed - grey) * row[3]
        mean = changed.mean((1, 2))[:, None, None]
        expected = np.clip(mean + (changed - mean) * row[4], 0, 255)
        np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-4, atol=1e-3)


@given(strength=st.floats(0.01, 0.9), seed=st.integers(0, 100))
def test_draws_stay_within_their_strength(strength: float, seed: int) -> None:
    settings = EndToEndSettings(colour_jitter=strength, affine=strength)
    views = draw_views(50, settings, generator(seed))
    assert views.flips.any()
    assert not views.flips.all()
    slack = 1 + 1e-5
    assert ((views.colours - 1).abs() <= strength * slack).all()
    angle, zoom, x, y = views.places.unbind(1)
    assert (angle.abs() <= math.pi * strength * slack).all()
    assert (zoom.log().abs() <= math.log1p(strength) * slack).all()
    assert (torch.stack([x, y]).abs() <= strength / 2 * slack).all()
    for column in (*views.colours.unbind(1), *views.places.unbind(1)):
        assert len(set(column.tolist())) > 25


def test_tables_are_cut_alike() -> None:
    views = draw_views(6, EndToEndSettings(colour_jitter=0.1, affine=0.1), generator())
    pixels = noise(6)
    parts = [
        views.map(lambda table, part=part: table[part]).apply(pixels[part])  # type: ignore[misc]
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert_close(torch.cat(parts), views.apply(pixels))
