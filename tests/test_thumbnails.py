"""Sheets of pictures: each image in its place, within a budget, the most worthy ones last to go."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import crop_decoder, decode_crop
from lymphfeat.explanation.thumbnails import COLUMNS, PER_SHEET, SIZES, SheetMaker, Thumbnails
from tests.cohorts import write_text
from tests.tiny import SIDE

CROP, AMPLE = SIDE, 10_000_000
PATIENTS = {"A": 2 * PER_SHEET + 5, "B": 1, "C": PER_SHEET}

Colour = tuple[int, int, int]


def paint_cohort(root: Path, patients: dict[str, int]) -> dict[tuple[str, str], Colour]:
    """Write a cohort of images of one colour each, with some noise; return the colours."""
    rng, colours = np.random.default_rng(0), {}
    for patient, images in patients.items():
        (root / patient).mkdir(parents=True)
        for number in range(images):
            red, green, blue = (int(step) * 64 + 32 for step in rng.integers(0, 4, 3))
            noise = rng.integers(-4, 5, (CROP, CROP, 3))
            pixels = (np.array([red, green, blue]) + noise).astype(np.uint8)
            Image.fromarray(pixels).save(root / patient / f"{number:04d}.png")
            colours[patient, f"{number:04d}.png"] = (red, green, blue)
    labels = (f"{patient},{number % 2}" for number, patient in enumerate(patients))
    write_text(root / "cohort.csv", "id,label", *labels)
    return colours


@pytest.fixture
def painted(tmp_path: Path) -> tuple[Cohort, NDArray[np.int64]]:
    colours = paint_cohort(tmp_path / "cohort", PATIENTS)
    return Cohort.load(tmp_path / "cohort"), np.array(list(colours.values()))


def make(cohort: Cohort, budget: int = AMPLE, together: int = 7) -> Thumbnails:
    """Make the sheets from images that come some at a time, as batches do."""
    sheets = SheetMaker(cohort, CROP, budget)
    crops = [decode_crop(path, CROP).pixels for own in cohort.images for path in own]
    for begin in range(0, len(crops), together):
        sheets.add(crops[begin : begin + together])
    return sheets.made()


def colours_of(thumbnails: Thumbnails) -> NDArray[np.float64]:
    """Read the mean colour of every image off the sheets: (N, 3); NaN without a sheet."""
    side, found = thumbnails.size.side, []
    for sheets, images in zip(thumbnails.sheets, thumbnails.sizes.tolist(), strict=True):
        for image in range(images):
            sheet, place = sheets[image // PER_SHEET], image % PER_SHEET
            if not sheet:
                found.append(np.full(3, np.nan))
                continue
            pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"), np.float64)
            top, left = place // COLUMNS * side, place % COLUMNS * side
            found.append(pixels[top : top + side, left : left + side].mean((0, 1)))
    return np.array(found)


@pytest.mark.parametrize("together", [1, 7, 1000])
def test_every_image_is_in_its_place(
    painted: tuple[Cohort, NDArray[np.int64]], together: int
) -> None:
    cohort, colours = painted
    found = make(cohort, together=together)
    assert [len(own) for own in found.sheets] == [3, 1, 1]
    assert found.left_out == 0
    np.testing.assert_allclose(colours_of(found), colours, atol=15)


def test_sheets_fit_the_budget(painted: tuple[Cohort, NDArray[np.int64]]) -> None:
    cohort, colours = painted
    whole = make(cohort)
    assert whole.size == min(whole.size, SIZES[0])  # the largest
    assert whole.size.quality == SIZES[0].quality
    worth = np.random.default_rng(1).random(len(colours))
    assert whole.within(whole.bytes, worth) is whole
    for share in (0.9, 0.7, 0.5, 0.3, 0.1, 0):
        budget = int(share * whole.bytes)
        fitting = whole.within(budget, worth)
        assert fitting.bytes <= max(budget, 5 * 3)  # five empty sheets
        shown, found = fitting.shown, colours_of(fitting)
        np.testing.assert_allclose(found[shown], colours[shown], atol=15)
        if shown.any() and fitting.left_out:
            assert worth[shown].min() > worth[~shown].max()
            assert np.nan_to_num(found[~shown], nan=255.0).min() > 200  # white
    assert fitting.left_out == len(colours)


def test_a_small_budget_is_met_from_the_start(painted: tuple[Cohort, NDArray[np.int64]]) -> None:
    cohort, colours = painted
    whole = make(cohort)
    small = make(cohort, budget=int(0.9 * whole.bytes))
    assert small.size < whole.size
    assert small.bytes < whole.bytes
    np.testing.assert_allclose(colours_of(small), colours, atol=15)


def test_pictures_have_the_stain_of_their_file(tmp_path: Path) -> None:
    paint_cohort(tmp_path, {"A": 1})
    path = tmp_path / "A" / "0000.png"
    plain = decode_crop(path, CROP).pixels
    changed = crop_decoder(CROP, normalise=lambda _, pixels: 255 - pixels)(path)
    assert np.array_equal(changed.original, plain)
    assert np.array_equal(changed.pixels, 255 - plain)
