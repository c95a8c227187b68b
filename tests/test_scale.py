"""Pictures of another camera show cells at the scale that a model was trained with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import ModelError
from lymphfeat.extraction import extract
from lymphfeat.features.store import FeatureStore
from lymphfeat.model.model import Model
from lymphfeat.settings import BackboneSettings, ExtractSettings, PredictSettings
from lymphfeat.training import train
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_red_cohort

pytestmark = pytest.mark.seconds

FIELD = BackboneSettings(backbone=BACKBONE.backbone, field_um=6.4, um_per_px=0.1, resize=SIDE)
FINER = replace(FIELD, um_per_px=0.05)
ON_CPU = PredictSettings(device="cpu", precision="float32", threads=1)


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Cohort]:
    """Return a cohort, and the same cells with twice as many pixels a side; both smooth."""
    root = tmp_path_factory.mktemp("scale")
    for name, factor in (("coarse", 2), ("fine", 1)):
        write_red_cohort(root / name, side=2 * SIDE)
        for path in (root / name).rglob("*.png"):
            with Image.open(path) as image:
                smooth = image.filter(ImageFilter.GaussianBlur(6))
                smooth.reduce(factor).save(path)
    return Cohort.load(root / "coarse"), Cohort.load(root / "fine")


def test_maps_are_the_same(cohorts: tuple[Cohort, Cohort], tmp_path: Path) -> None:
    stores = []
    for cohort, backbone in zip(cohorts, (FIELD, FINER), strict=True):
        settings = ExtractSettings(backbone=backbone, precision="float32", device="cpu", threads=1)
        path = tmp_path / f"{backbone.um_per_px}.h5"
        stores.append(FeatureStore.open(extract(cohort, path, settings).path))
    coarse, fine = stores
    assert (coarse.recipe["crop"], fine.recipe["crop"]) == (64, 128)
    assert coarse.recipe["layout"] == {"resize": 64, "token": "patches", "grid": None}
    assert coarse.recipe["field_um"] == 6.4
    distance = np.abs(coarse.pooled() - fine.pooled()).mean()
    assert distance < 0.1 * coarse.pooled().std()


def test_a_model_reads_pictures_of_another_camera(
    cohorts: tuple[Cohort, Cohort], tmp_path: Path
) -> None:
    coarse, fine = cohorts
    train(coarse, tmp_path / "model", tiny_settings(backbone=FIELD))
    model = Model.load(tmp_path / "model")
    assert model.recipe.field_um == 6.4
    expected = model.predict(coarse, ON_CPU).images["logit"]
    found = model.predict(fine, replace(ON_CPU, um_per_px=0.05)).images["logit"]
    unscaled = model.predict(fine, ON_CPU).images["logit"]
    error, without = ((each - expected).abs().mean() for each in (found, unscaled))
    assert error < 0.2 * expected.std()
    assert error < 0.5 * without
    train(coarse, tmp_path / "pixels", tiny_settings())
    with pytest.raises(ModelError, match=r"um_per_px \(=0\.05\) must go with a model whose crop"):
        Model.load(tmp_path / "pixels").predict(fine, replace(ON_CPU, um_per_px=0.05))
