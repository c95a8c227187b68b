"""Explanations from the maps of a store: as from the images, whose files are only shown."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import LymphfeatError, ModelError, StoreError
from lymphfeat.explanation.explanation import explain
from lymphfeat.extraction import extract
from lymphfeat.features.store import FROZEN, FeatureStore, map_rows
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import AnyModel
from lymphfeat.settings import (
    ExplainSettings,
    ExtractSettings,
    FitSettings,
    HeadGrid,
    SyntheticSettings,
)
from lymphfeat.synthetic.cohort import write_synthetic_cohort
from lymphfeat_cli.main import cli
from tests.test_model import make_model
from tests.tiny import BACKBONE

pytestmark = pytest.mark.seconds

ON_CPU = ExplainSettings(device="cpu", precision="float32", threads=2)
RECIPE = ExtractSettings(backbone=BACKBONE, precision="float32", device="cpu", threads=1, views=4)
OTHER = replace(RECIPE, backbone=replace(BACKBONE, crop=48))
OF_BOTH = "std@2+mean@1 + clinical (late)"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cohort, its stores by two recipes, and a run on each and on both."""
    root = tmp_path_factory.mktemp("stored")
    synthetic = SyntheticSettings(patients=18, test_patients=2, images=4, difficulty=0.0)
    cohort = Cohort.load(write_synthetic_cohort(synthetic, root / "cohort", workers=1))
    store = extract(cohort, root / "store.h5", RECIPE)
    other = extract(cohort, root / "other.h5", OTHER)
    settings = FitSettings(seeds=1, folds=3, epochs=3, fusions=("late",), threads=1)
    fit_heads(store, HeadGrid(agg=("topk", "bnsigmoid"), k_agg=(2,)), settings, root / "run")
    fit_heads([store, other], HeadGrid(agg=("std@2+mean@1",)), settings, root / "both")
    finalize(root / "run", root / "model", row="top2 + clinical (late)")
    return root


@pytest.fixture
def cohort(home: Path) -> Cohort:
    return Cohort.load(home / "cohort")


@pytest.fixture
def model(home: Path) -> FinalModel:
    return FinalModel.load(home / "model")


@pytest.mark.parametrize(
    ("run", "row", "tta"),
    [
        ("run", "top2 + clinical (late)", False),
        ("run", "bnsigmoid", True),
        ("both", OF_BOTH, False),
    ],
)
def test_the_same_from_maps_and_from_images(
    run: str, row: str, tta: bool, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = replace(finalize(home / run, tmp_path / "model", row=row), tta=tta)
    names = ("store.h5", "other.h5")[: len(model.sources)]
    stores = [FeatureStore.open(home / name) for name in names]
    found, expected = explain(model, cohort, ON_CPU, stores=stores), explain(model, cohort, ON_CPU)
    # The maps of a store are float16, so cells of nearly one score may change places.
    tables = [each.patients.drop(columns="without_top") for each in (found, expected)]
    pd.testing.assert_frame_equal(tables[0], tables[1], atol=1e-2, rtol=0)
    tables = [each.images.drop(columns="rank") for each in (found, expected)]
    pd.testing.assert_frame_equal(tables[0], tables[1], atol=5e-2, rtol=2e-3)
    np.testing.assert_allclose(found.maps, expected.maps, atol=5e-2)
    assert found.thumbnails.sheets == expected.thumbnails.sheets
    predicted = model.predict_stores(*stores, settings=ON_CPU.scoring).patients
    np.testing.assert_allclose(
        found.patients["probability"], predicted["probability"], rtol=0, atol=1e-6
    )
    assert list(found.patients["notes"]) == list(predicted["notes"])


def test_attributes_are_those_of_the_cohort(home: Path, cohort: Cohort, model: FinalModel) -> None:
    older = replace(cohort, table=cohort.table.assign(age=cohort.table["age"] + 40))
    stores = [FeatureStore.open(home / "store.h5")]
    for tta in (False, True):
        own = replace(model, tta=tta)
        found, expected = explain(own, older, ON_CPU, stores=stores), explain(own, older, ON_CPU)
        np.testing.assert_allclose(
            found.patients["probability"], expected.patients["probability"], atol=1e-2
        )
        young = explain(own, cohort, ON_CPU, stores=stores).patients["probability"]
        assert np.abs(found.patients["probability"] - young).max() > 2e-2


def _another_picture(cohort: Path) -> None:
    image = Cohort.load(cohort).images[3][1]
    with Image.open(image) as picture:
        picture.transpose(Image.Transpose.ROTATE_180).save(image)


def _renamed(cohort: Path) -> None:
    image = Cohort.load(cohort).images[3][0]
    image.rename(image.with_name("another" + image.suffix))


def _fewer(cohort: Path) -> None:
    Cohort.load(cohort).images[3][0].unlink()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_another_picture, r"must be the image that .*store\.h5 was extracted from; it is another"),
        (_renamed, r"must have the cohort's images; those of patient P\w+ differ, or are not"),
        (_fewer, r"must have the cohort's images; those of patient P\w+ differ, or are not"),
    ],
)
def test_images_that_are_not_those_of_the_store_are_refused(
    change: Callable[[Path], None], told: str, home: Path, model: FinalModel, tmp_path: Path
) -> None:
    changed = shutil.copytree(home / "cohort", tmp_path / "changed")
    change(changed)
    with pytest.raises(StoreError, match=told):
        explain(
            *(model, Cohort.load(changed), ON_CPU), stores=[FeatureStore.open(home / "store.h5")]
        )


def test_fewer_or_more_patients_are_refused(home: Path, cohort: Cohort, model: FinalModel) -> None:
    store = FeatureStore.open(home / "store.h5")
    with pytest.raises(StoreError, match=f"those of patient {cohort.ids[0]} differ, or are not"):
        explain(model, cohort.select(cohort.ids[1:]), ON_CPU, stores=[store])
    with pytest.raises(StoreError, match=f"those of patient {cohort.ids[-1]} differ, or are not"):
        explain(model, cohort.select(cohort.ids[:-1]), ON_CPU, stores=[store])


def test_stores_and_models_that_do_not_fit_are_refused(
    home: Path, cohort: Cohort, model: FinalModel
) -> None:
    store, other = (FeatureStore.open(home / name) for name in ("store.h5", "other.h5"))
    refused: list[tuple[AnyModel, list[FeatureStore], type[LymphfeatError], str]] = [
        (model, [other], StoreError, r"other\.h5: must hold the maps that this model reads: crop"),
        (model, [store, store], StoreError, "must name a store for each of the model's 1 backb"),
        (make_model(), [store], ModelError, "model must be a final one to be explained from st"),
    ]
    for each, stores, error, told in refused:
        with pytest.raises(error, match=told):
            explain(each, cohort, ON_CPU, stores=stores)


def test_maps_that_are_not_finite_are_refused(
    home: Path, cohort: Cohort, model: FinalModel, tmp_path: Path
) -> None:
    path = Path(shutil.copy(home / "store.h5", tmp_path / "damaged.h5"))
    store = FeatureStore.open(path)
    maps = map_rows(path, f"features/{FROZEN}", "r+")
    maps[store.offsets[2], 0, 0, 0, 0] = np.nan
    maps.flush()
    with pytest.raises(StoreError, match=f"of {store.ids[2]}: features must be finite numbers"):
        explain(model, cohort, ON_CPU, stores=[store])


def test_the_command(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["explain", "--model", str(home / "model"), "--device", "cpu", "--figures", "none"]
    stored = ["--store", str(home / "store.h5")]
    done = CliRunner().invoke(cli, [*line, "--cohort", str(home / "cohort"), *stored])
    assert done.exit_code == 0, done.output
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    image = next((home / "cohort").rglob("*.jpg"))
    both = CliRunner().invoke(cli, [*line, "--image", str(image), *stored])
    assert (both.exit_code, "--image and --store: give only one" in both.stderr) == (2, True)
    make_model("topk").save("single")
    single = CliRunner().invoke(
        cli, [*line, "--model", "single", "--cohort", str(home / "cohort"), *stored, "--force"]
    )
    assert (single.exit_code, "--store needs a final model" in single.stderr) == (2, True)
