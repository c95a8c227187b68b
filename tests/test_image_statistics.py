"""Image statistics: against plain formulas, and what each of them notices and does not."""

from colorsys import hsv_to_rgb, rgb_to_hsv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from lymphfeat.cohort.image_statistics import NAMES, STATISTICS, measure_image
from lymphfeat.settings import SyntheticSettings
from lymphfeat.synthetic.cohort import write_synthetic_cohort

Pixels = NDArray[np.uint8]
images = arrays(np.uint8, st.tuples(st.just(3), st.integers(3, 9), st.integers(3, 9)))


def plain(pixels: Pixels) -> list[float]:
    """Compute the statistics pixel by pixel."""
    od = -np.log((pixels.astype(float) + 1) / 256)  # (3, H, W)
    red = od[0].ravel()

    def between(threshold: float) -> float:
        dark = red >= threshold
        if dark.all():
            return 0.0
        return float(dark.sum() * (~dark).sum() * (red[dark].mean() - red[~dark].mean()) ** 2)

    # The darkest of equally good thresholds; a blank image has no nucleus.
    thresholds = sorted(set(red), reverse=True)
    best = max(thresholds, key=between)
    nucleus = (od[0] >= best) & (between(best) > 0)
    colours = []
    for where in (nucleus, ~nucleus):
        r, g, b = od[:, where].mean(1) if where.any() else (0, 0, 0)
        mean = (r + g + b) / 3
        scale = max(mean, 1e-6)
        colours += [mean, r / scale - mean / scale, (g - b) / scale / 3**0.5]
    r, g, b = pixels.astype(int)
    grey = (77 * r + 150 * g + 29 * b) // 256
    background = next(level for level in range(256) if (grey <= level).sum() >= 0.9 * grey.size)
    edges = [
        (4 * grey[y, x] - grey[y - 1, x] - grey[y + 1, x] - grey[y, x - 1] - grey[y, x + 1]) ** 2
        for y in range(1, grey.shape[0] - 1)
        for x in range(1, grey.shape[1] - 1)
    ]
    focus = np.log10((np.mean(edges) + 1e-6) / (grey.var() + 1e-6))
    area = np.log2(1 + nucleus.sum())
    return [*colours[:3], *colours[4:], background / 255, focus, area]


@given(pixels=images)
def test_plain_formulas_agree(pixels: Pixels) -> None:
    np.testing.assert_allclose(measure_image(pixels), plain(pixels), rtol=1e-4, atol=1e-4)


@given(pixels=images, turns=st.integers(0, 3), mirrored=st.booleans())
def test_how_an_image_lies_does_not_matter(pixels: Pixels, turns: int, mirrored: bool) -> None:
    turned = np.rot90(pixels[..., ::-1] if mirrored else pixels, turns, axes=(1, 2))
    np.testing.assert_allclose(measure_image(turned), measure_image(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_image_has_finite_statistics(level: int) -> None:
    found = dict(zip(NAMES, measure_image(np.full((3, 8, 8), level, np.uint8)), strict=True))
    assert np.isfinite(list(found.values())).all()
    assert found["nucleus_area"] == 0
    assert found["background"] == pytest.approx(level / 255)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    settings = SyntheticSettings(patients=2, test_patients=0, images=1, seed=1)
    root = write_synthetic_cohort(settings, tmp_path_factory.mktemp("cells") / "c", workers=1)
    with Image.open(sorted(root.rglob("*.jpg"))[0]) as image:
        return image.convert("RGB")


def measure(image: Image.Image) -> dict[str, float]:
    numbers = measure_image(np.asarray(image).transpose(2, 0, 1))
    return dict(zip(NAMES, numbers.tolist(), strict=True))


def test_blur_lowers_focus_alone(cell: Image.Image) -> None:
    before, after = measure(cell), measure(cell.filter(ImageFilter.GaussianBlur(1.5)))
    assert after["focus"] < before["focus"] - 0.3
    for name in ("nucleus_density", "nucleus_blue", "nucleus_area", "background"):
        assert after[name] == pytest.approx(before[name], rel=0.05, abs=0.02), name


def test_twice_the_side_is_four_times_the_area(cell: Image.Image) -> None:
    before, after = measure(cell), measure(cell.resize((2 * cell.width, 2 * cell.height)))
    assert after["nucleus_area"] - before["nucleus_area"] == pytest.approx(2, abs=0.05)
    assert after["nucleus_blue"] == pytest.approx(before["nucleus_blue"], abs=0.02)


def test_a_turned_hue_is_noticed_in_both_directions(cell: Image.Image) -> None:
    found = [turn(cell, shift) for shift in (-0.06, 0.0, 0.06)]
    blue = [each["nucleus_blue"] for each in found]
    assert blue[0] - blue[1] > 0.05 < blue[1] - blue[2]  # purple turns to blue, and to red


def turn(image: Image.Image, shift: float) -> dict[str, float]:
    values = np.asarray(image.resize((56, 56))).reshape(-1, 3) / 255
    turned = []
    for red, green, blue in values.tolist():
        hue, saturation, value = rgb_to_hsv(red, green, blue)
        turned.append(hsv_to_rgb((hue + shift) % 1, saturation, value))
    pixels = np.round(255 * np.array(turned)).astype(np.uint8)
    return measure(Image.fromarray(pixels.reshape(56, 56, 3)))


def test_a_thicker_stain_is_darker_and_of_the_same_hue(cell: Image.Image) -> None:
    before = measure(cell)
    levels = 256 * ((np.asarray(cell) + 1.0) / 256) ** 1.2 - 1  # 1.2 times the optical density
    after = measure(Image.fromarray(np.round(levels).astype(np.uint8)))
    ratio = after["nucleus_density"] / before["nucleus_density"]
    assert ratio == pytest.approx(1.2, rel=0.01)
    assert after["nucleus_blue"] == pytest.approx(before["nucleus_blue"], abs=0.01)
    assert after["nucleus_purple"] == pytest.approx(before["nucleus_purple"], abs=0.01)


def test_every_statistic_says_both_ways_it_can_differ() -> None:
    words = [word for each in STATISTICS for word in (each.low, each.high)]
    assert len(set(words)) == len(words) == 2 * len(set(NAMES))
