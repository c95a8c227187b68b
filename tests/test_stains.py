"""Stain normalisation: its levels, and that features and models follow it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lymphfeat as lf
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_statistics import Pixels
from lymphfeat.cohort.images import decode_crop, stream_crops
from lymphfeat.cohort.stains import Stain, stain_normaliser
from lymphfeat.errors import StoreError
from lymphfeat.finetuning.loop import decode
from lymphfeat.settings import PredictSettings, StainNormalization
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_red_cohort


def cell(seed: int = 0, side: int = 40) -> Pixels:
    """Draw a dark disc on a light ground, (3, side, side), with every level a little noisy."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    disc = (rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (side / 4) ** 2
    light = np.where(disc, 0.35, 0.85) + rng.normal(0, 0.02, (3, side, side))
    return (255 * light.clip(0, 1)).astype(np.uint8)


def test_levels_are_those_of_sorted_pixels() -> None:
    images = [cell(seed) for seed in range(3)]
    found = Stain.measure(images)
    for channel in range(3):
        levels = np.sort(np.concatenate([image[channel].ravel() for image in images]))
        white, dark = (levels[int(np.ceil(q * len(levels))) - 1] for q in (0.98, 0.05))
        assert found.white[channel] == white
        assert found.density[channel] == pytest.approx(np.log(white / dark))


@given(
    density=st.tuples(*[st.floats(0.7, 1.5)] * 3),
    light=st.tuples(*[st.floats(0.7, 1.0)] * 3),
)
def test_another_stain_and_another_light_are_taken_out(
    density: tuple[float, ...], light: tuple[float, ...]
) -> None:
    picture = cell() / 255
    moved = picture ** np.reshape(density, (3, 1, 1)) * np.reshape(light, (3, 1, 1))
    pictures = [np.round(255 * each.clip(0, 1)).astype(np.uint8) for each in (picture, moved)]
    plain, back = (Stain.measure([each]).normalise(each).astype(float) for each in pictures)
    assert np.abs(plain - back).mean() < 3  # of 255: levels are whole numbers
    assert np.abs(plain.mean((1, 2)) - back.mean((1, 2))).max() < 4


@pytest.mark.parametrize("level", [0, 17, 255])
def test_a_picture_of_one_colour_stays_one(level: int) -> None:
    picture = np.full((3, 8, 8), level, np.uint8)
    normal = Stain.measure([picture]).normalise(picture)
    assert normal.dtype == np.uint8
    assert len(np.unique(normal.reshape(3, -1), axis=1).T) == 1


def write_pictures(root: Path) -> list[list[Path]]:
    """Write two patients of three images, the second's much darker."""
    patients = []
    for number, gain in enumerate((1.0, 0.6)):
        paths = []
        for image in range(3):
            pixels = (cell(image) * gain).astype(np.uint8).transpose(1, 2, 0)
            path = root / f"{number}-{image}.png"
            Image.fromarray(pixels).save(path)
            paths.append(path)
        patients.append(paths)
    return patients


@pytest.mark.parametrize("how", ["image", "patient"])
def test_what_is_measured_together(how: StainNormalization, tmp_path: Path) -> None:
    patients = write_pictures(tmp_path)
    normalise = stain_normaliser(how, patients, 40)
    paths = [path for images in patients for path in images]
    found = [each.pixels for each in stream_crops(paths, 40, threads=2, normalise=normalise)]
    for images in patients:
        crops = [decode_crop(path, 40).pixels for path in images]
        for path, crop in zip(images, crops, strict=True):
            stain = Stain.measure([crop] if how == "image" else crops)
            assert np.array_equal(found[paths.index(path)], stain.normalise(crop))
    # The darker patient looks like the other one now.
    assert abs(float(found[0].mean()) - float(found[3].mean())) < 6


def test_without_it_nothing_is_done(tmp_path: Path) -> None:
    assert stain_normaliser("none", write_pictures(tmp_path), 40) is None


@pytest.mark.seconds
@pytest.mark.parametrize("how", ["image", "patient"])
def test_a_model_predicts_from_images_as_from_its_store(
    how: StainNormalization, tmp_path: Path
) -> None:
    cohort = Cohort.load(write_red_cohort(tmp_path / "cohort", "01" * 12))
    settings = lf.ExtractSettings(
        backbone=replace(BACKBONE, stain_normalization=how),
        precision="float32",
        device="cpu",
        threads=1,
    )
    store = lf.extract(cohort, tmp_path / "f.h5", settings)
    assert store.recipe["stain_normalization"] == how
    plain = lf.extract(cohort, tmp_path / "plain.h5", replace(settings, backbone=BACKBONE))
    assert "stain_normalization" not in plain.recipe
    assert not np.array_equal(store.pooled(), plain.pooled())
    statistics = [each.image_statistics for each in (store, plain)]
    assert statistics[0] is not None
    assert statistics[1] is not None
    assert statistics[0].equals(statistics[1])  # of the pictures as they are

    lf.fit_heads(store, agg="std", settings=lf.FitSettings(seeds=2), out=tmp_path / "run")
    model = lf.finalize(tmp_path / "run", tmp_path / "model", row="std")
    on_cpu = PredictSettings(device="cpu", threads=1, precision="float32")
    of_images = model.predict(cohort, on_cpu).patients["probability"].to_numpy()
    of_store = model.predict_stores(store).patients["probability"].to_numpy()
    assert np.allclose(of_images, of_store, atol=2e-3)  # a store holds float16
    with pytest.raises(StoreError, match="stain_normalization is none there"):
        model.predict_stores(plain)


def test_endtoend_sees_normalised_pixels(tmp_path: Path) -> None:
    cohort = Cohort.load(write_red_cohort(tmp_path / "cohort"))
    settings = tiny_settings(backbone=replace(BACKBONE, stain_normalization="patient"))
    crops = decode(cohort, settings).pixels.crops()
    normalise = stain_normaliser("patient", cohort.images, SIDE)
    paths = [path for images in cohort.images for path in images]
    expected = stream_crops(paths, SIDE, threads=1, normalise=normalise)
    assert np.array_equal(crops, np.stack([each.pixels for each in expected]))
