"""A model of imported features predicts other imported stores, and nothing else."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import read_splits
from lymphfeat.errors import ModelError, SettingsError, StoreError
from lymphfeat.features.store import FeatureStore
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.importing import import_bags
from lymphfeat.model.final_model import FinalModel
from lymphfeat.settings import FitSettings, HeadGrid, PredictSettings
from lymphfeat_cli.main import cli
from tests.cohorts import write_text
from tests.stores import write_store
from tests.tiny import write_red_cohort

pytestmark = pytest.mark.seconds

SETTINGS = FitSettings(seeds=1, folds=3, epochs=2, precision="float32", device="cpu", threads=1)
GRID = HeadGrid(agg=("mean+std", "topk", "attention"), width=(4,))
ON_CPU = PredictSettings(device="cpu", precision="float32", threads=1)


def write_bags(root: Path, first: int, channels: int = 4, shift: float = 0.0) -> Path:
    """Write bags of patients numbered from `first`; cells of tumoral ones vary more."""
    root.mkdir()
    lines = ["id,label,age"]
    for number in range(first, first + 18):
        rng = np.random.default_rng(number)
        own = rng.normal(shift, 1 + 2 * (number % 2), (3 + number % 5, channels))
        np.save(root / f"P{number}.npy", own)
        lines.append(f"P{number},{number % 2},{40 + number % 7}")
    write_text(root / "patients.csv", *lines)
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two imported stores and a run on the first."""
    root = tmp_path_factory.mktemp("imported")
    for name, first in (("here", 0), ("there", 100)):
        import_bags(write_bags(root / name, first), root / f"{name}.h5", backbone="uni")
    fit_heads(root / "here.h5", GRID, SETTINGS, root / "run")
    return root


@pytest.mark.parametrize("row", ["mean+std", "top10", "attention width=4", "average of 3 heads"])
@pytest.mark.parametrize("members", [False, True])
def test_it_predicts_another_imported_store(
    row: str, members: bool, home: Path, tmp_path: Path
) -> None:
    made = finalize(home / "run", tmp_path / "model", row=row, members=members)
    model = FinalModel.load(tmp_path / "model")
    store = FeatureStore.open(home / "there.h5")
    found = model.predict_stores(store, settings=ON_CPU)
    pd.testing.assert_frame_equal(
        found.patients, made.predict_stores(store, settings=ON_CPU).patients
    )
    by_patient = found.images.groupby("patient", sort=False)["contribution"].sum()
    np.testing.assert_allclose(by_patient, found.patients["from_images"], atol=1e-5)
    assert set(found.patients["seen"]) == {"no"}
    own = model.predict_stores(FeatureStore.open(home / "here.h5"), settings=ON_CPU)
    assert set(own.patients["seen"]) == {"label"}


def test_what_differs_in_spread_is_learnt(home: Path, tmp_path: Path) -> None:
    model = finalize(home / "run", tmp_path / "model", row="mean+std")
    found = model.predict_stores(FeatureStore.open(home / "there.h5"), settings=ON_CPU)
    assert (model.measure(found.patients)["new"]["auc"] or 0) > 0.9


def test_features_of_another_look_are_told(home: Path, tmp_path: Path) -> None:
    model = finalize(home / "run", tmp_path / "model", row="mean+std")
    store = import_bags(
        write_bags(tmp_path / "far", 200, shift=50.0), tmp_path / "far.h5", backbone="uni"
    )
    assert model.predict_stores(store, settings=ON_CPU).patients["unlike"].all()


def test_other_features_are_refused(home: Path, tmp_path: Path) -> None:
    model = finalize(home / "run", tmp_path / "model", row="mean+std")
    other = import_bags(write_bags(tmp_path / "other", 200), tmp_path / "other.h5")
    wide = import_bags(write_bags(tmp_path / "wide", 300, 5), tmp_path / "w.h5", backbone="uni")
    with pytest.raises(StoreError, match="backbone_name is imported there, uni now"):
        model.predict_stores(other)
    with pytest.raises(StoreError, match=r"shape is \[5, 1, 1\] there, \[4, 1, 1\] now"):
        model.predict_stores(wide)
    with pytest.raises(StoreError, match="these were extracted from images"):
        model.predict_stores(write_store(tmp_path / "extracted.h5"))


def test_a_model_needs_folds_of_all_patients(home: Path, tmp_path: Path) -> None:
    lines = [f"P{number},{'test' if number < 6 else 'train'}" for number in range(18)]
    splits = read_splits(write_text(tmp_path / "splits.csv", "id,split", *lines))
    fit_heads(home / "here.h5", GRID, SETTINGS, tmp_path / "run", splits=splits)
    with pytest.raises(SettingsError, match=r"hold every labelled patient out once.* 6 of 18"):
        finalize(tmp_path / "run", tmp_path / "model", row="mean+std")


def test_images_are_refused_in_one_line(home: Path, tmp_path: Path) -> None:
    finalize(home / "run", tmp_path / "model", row="mean+std")
    cohort = str(write_red_cohort(tmp_path / "red"))
    for line in (
        ["predict", "--out", str(tmp_path / "p.csv")],
        ["explain", "--out", str(tmp_path / "e.html")],
        ["recalibrate", "--out", str(tmp_path / "there")],
    ):
        arguments = ["--cohort", cohort, "--model", str(tmp_path / "model")]
        result = CliRunner().invoke(cli, [*line, *arguments])
        assert result.exit_code == 2, (line, result.output, result.exception)
        assert "model must have a backbone to read images" in result.stderr.splitlines()[-1]
    with pytest.raises(ModelError, match="made of imported features"):
        FinalModel.load(tmp_path / "model").predict(Cohort.load(cohort))
