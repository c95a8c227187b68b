"""A final model notices patients whose images are unlike those of training, and says how."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFilter
from safetensors.numpy import load_file, save_file

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_statistics import NAMES
from lymphfeat.errors import ModelError
from lymphfeat.extraction import extract
from lymphfeat.features.store import FeatureStore
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.inspection import inspect
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.predictions import Predictions
from lymphfeat.settings import (
    ExtractSettings,
    FitSettings,
    HeadGrid,
    PredictSettings,
    SyntheticSettings,
)
from lymphfeat.synthetic.cohort import write_synthetic_cohort
from lymphfeat_cli.main import cli
from tests.tiny import BACKBONE

pytestmark = pytest.mark.seconds

ON_CPU = PredictSettings(device="cpu", precision="float32", threads=1)
RECIPE = ExtractSettings(backbone=BACKBONE, precision="float32", device="cpu", threads=1)
SETTINGS = FitSettings(seeds=1, folds=3, fusions=("late",), threads=1)
ROW = "std + clinical (late)"
Look = Callable[[Image.Image], Image.Image]
ADDED = ["unlikeness", "unlike"]


def synthesise(root: Path, patients: int, seed: int) -> Cohort:
    settings = SyntheticSettings(patients=patients, test_patients=0, images=6, seed=seed)
    return Cohort.load(write_synthetic_cohort(settings, root, workers=1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store, a run and a model."""
    root = tmp_path_factory.mktemp("unlike")
    store = extract(synthesise(root / "cohort", 40, seed=0), root / "store.h5", RECIPE)
    fit_heads(store, HeadGrid(agg=("std",)), SETTINGS, root / "run")
    finalize(root / "run", root / "model", row=ROW)
    return root


@pytest.fixture(scope="module")
def model(home: Path) -> FinalModel:
    return FinalModel.load(home / "model")


@pytest.fixture(scope="module")
def new(home: Path) -> Cohort:
    """Return patients of another seed."""
    return synthesise(home / "new", 24, seed=1)


def retaken(cohort: Cohort, root: Path, look: Look) -> Cohort:
    """Return the same cells, looking otherwise."""
    for path in [path for images in cohort.images for path in images]:
        with Image.open(path) as image:
            changed = look(image.convert("RGB"))
        target = root / path.relative_to(cohort.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        changed.save(target, quality=95)
    images = tuple(
        tuple(root / path.relative_to(cohort.root) for path in images) for images in cohort.images
    )
    return replace(cohort, root=root, images=images)


def predict(model: FinalModel, cohort: Cohort) -> Predictions:
    return model.predict(cohort, ON_CPU)


def turn_hue(image: Image.Image) -> Image.Image:
    values = np.array(image.convert("HSV"))
    values[..., 0] -= 15  # of 256: from purple towards blue
    return Image.fromarray(values, "HSV").convert("RGB")


def reduce(image: Image.Image) -> Image.Image:
    return image.resize((image.width * 2 // 3, image.height * 2 // 3))


LOOKS: dict[str, Look] = {
    "bluer nuclei": turn_hue,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
    "smaller nuclei": reduce,
}


def test_patients_like_those_of_training_are_let_through(model: FinalModel, new: Cohort) -> None:
    found = predict(model, new)
    assert found.patients["unlike"].sum() <= 4  # of 24; about 1 is expected
    assert found.images["unlike"].mean() < 0.08
    noted = found.patients["notes"].str.contains("unlike those of training")
    assert np.array_equal(noted, found.patients["unlike"] == 1)


@pytest.mark.parametrize("words", LOOKS)
def test_unlike_patients_are_noticed(
    words: str, model: FinalModel, new: Cohort, tmp_path: Path
) -> None:
    found = predict(model, retaken(new, tmp_path, LOOKS[words]))
    assert found.patients["unlike"].mean() > 0.8
    assert found.patients["notes"].str.contains(words).mean() > 0.6


def test_the_model_says_what_it_compares(home: Path, model: FinalModel) -> None:
    assert model.compares == ("features", *NAMES)
    assert inspect(home / "model")["compares"] == ["features", *NAMES]
    assert replace(model, familiarity=None).compares == ()


def test_both_tables_say_so(model: FinalModel, new: Cohort, tmp_path: Path) -> None:
    found = predict(model, retaken(new, tmp_path, turn_hue))
    unlike = found.images.groupby("patient", sort=False)["unlike"].mean()
    np.testing.assert_allclose(found.patients["unlike_images"], unlike)
    for table in (found.patients, found.images):
        assert np.array_equal(table["unlike"], table["unlikeness"] > 1)
    assert np.array_equal(found.images["unlike_in"] != "", found.images["unlike"] == 1)
    found.save(tmp_path / "p.csv", tmp_path / "i.csv")
    again = Predictions.read(tmp_path / "p.csv", tmp_path / "i.csv")
    pd.testing.assert_frame_equal(
        again.images[[*ADDED, "unlike_in"]], found.images[[*ADDED, "unlike_in"]]
    )
    assert again.patients["notes"].tolist() == found.patients["notes"].tolist()


def test_maps_of_a_store_say_the_same(model: FinalModel, new: Cohort, tmp_path: Path) -> None:
    changed = retaken(new, tmp_path, turn_hue)
    store = extract(changed, tmp_path / "new.h5", RECIPE)
    found, expected = model.predict_stores(store, settings=ON_CPU), predict(model, changed)
    for mine, theirs in ((found.patients, expected.patients), (found.images, expected.images)):
        # The store's maps are float16.
        np.testing.assert_allclose(mine["unlikeness"], theirs["unlikeness"], rtol=0.01)
    assert found.patients["notes"].tolist() == expected.patients["notes"].tolist()
    with h5py.File(store.path, "r+") as file:
        del file["images/statistics"]
    poorer = model.predict_stores(FeatureStore.open(store.path), settings=ON_CPU)
    assert set(poorer.images["unlike_in"]) <= {"", "of another look"}


def test_probabilities_are_those_of_a_model_without(
    home: Path, model: FinalModel, new: Cohort, tmp_path: Path
) -> None:
    """Also of a folder that was written before models knew what is familiar."""
    replace(model, familiarity=None).save(tmp_path)
    facts = json.loads((tmp_path / "final.json").read_text())
    del facts["familiarity"]
    (tmp_path / "final.json").write_text(json.dumps(facts))
    assert not [key for key in load_file(tmp_path / "final.safetensors") if "famil" in key]
    old, now = predict(FinalModel.load(tmp_path), new), predict(model, new)
    assert not {*ADDED, "unlike_images"} & {*old.patients, *old.images}
    same = [name for name in old.patients if name != "notes"]
    pd.testing.assert_frame_equal(now.patients[same], old.patients[same])
    pd.testing.assert_frame_equal(now.images[list(old.images)], old.images)


def test_other_tensors_are_refused(home: Path, new: Cohort, tmp_path: Path) -> None:
    tensors = load_file(home / "model" / "final.safetensors")
    tensors["familiarity.0.mean"] = tensors["familiarity.0.mean"] + 1
    save_file(tensors, tmp_path / "final.safetensors")
    (tmp_path / "final.json").write_bytes((home / "model" / "final.json").read_bytes())
    with pytest.raises(ModelError, match="tensors must be those"):
        FinalModel.load(tmp_path)


def test_a_store_without_statistics_teaches_features_alone(
    home: Path, new: Cohort, tmp_path: Path
) -> None:
    (tmp_path / "old.h5").write_bytes((home / "store.h5").read_bytes())
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        del file["images/statistics"]
    assert FeatureStore.open(tmp_path / "old.h5").image_statistics is None
    line = ["finalize", str(home / "run"), "--row", ROW, "--store", str(tmp_path / "old.h5")]
    told = CliRunner().invoke(
        cli, [*line, "--out", str(tmp_path / "model")], catch_exceptions=False
    )
    assert "Only features will tell which patients are unlike training" in told.output
    assert FinalModel.load(tmp_path / "model").compares == ("features",)
    blurred = retaken(new, tmp_path / "images", LOOKS["blurred"])
    found = predict(FinalModel.load(tmp_path / "model"), blurred)
    assert set(found.images["unlike_in"]) <= {"", "of another look"}


def test_several_backbones_are_heard(home: Path, new: Cohort, tmp_path: Path) -> None:
    recipe = replace(RECIPE, backbone=replace(BACKBONE, crop=48))
    second = extract(Cohort.load(home / "cohort"), tmp_path / "second.h5", recipe)
    stores = [FeatureStore.open(home / "store.h5"), second]
    fit_heads(stores, HeadGrid(agg=("std",)), SETTINGS, tmp_path / "run")
    made = finalize(tmp_path / "run", tmp_path / "model", row=ROW)
    assert made.familiarity is not None
    assert len(made.familiarity.features) == 2
    loaded = FinalModel.load(tmp_path / "model")
    found = predict(loaded, retaken(new, tmp_path / "images", turn_hue))
    assert found.patients["unlike"].mean() > 0.8


def test_the_command_line_counts_them(home: Path, new: Cohort, tmp_path: Path) -> None:
    blurred = retaken(new, tmp_path / "images", LOOKS["blurred"])
    cohort = tmp_path / "cohort"
    for id, images in zip(new.ids, blurred.images, strict=True):
        for path in images:
            (cohort / id).mkdir(parents=True, exist_ok=True)
            path.rename(cohort / id / path.name)
    columns = new.table.rename_axis("id")[["gender", "age", "lymph_count"]]
    columns.to_csv(cohort / "patients.csv")
    line = ["predict", "--model", str(home / "model"), "--cohort", str(cohort)]
    line += ["--out", str(tmp_path / "p.csv"), "--threads", "1", "--precision", "float32"]
    told = CliRunner().invoke(cli, [*line, "--device", "cpu"], catch_exceptions=False)
    written = pd.read_csv(tmp_path / "p.csv")
    unlike = int(written["unlike"].sum())
    assert unlike > 12
    assert f"Images unlike those of training: {unlike} of 24 patients" in told.output
    line += ["--device", "cpu", "--force", "--json"]
    result = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert json.loads(result.stdout)["unlike"] == unlike
