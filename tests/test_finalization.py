"""A row of a run becomes a model: it predicts as the run measured, and says what speaks for it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.special import logit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import CohortError, LymphfeatError, ModelError, SettingsError, StoreError
from lymphfeat.extraction import extract
from lymphfeat.features.store import FeatureStore
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.loading import load_model
from lymphfeat.model.model import Model
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
SETTINGS = FitSettings(seeds=2, folds=3, epochs=3, fusions=("late", "experts"), threads=1)
GRID = HeadGrid(agg=("mean+std", "bnsigmoid", "topk", "attention"), width=(8,), k_agg=(2, 3))
ROWS = [
    *("mean+std", "bnsigmoid", "attention width=8", "topk, best of 2 chosen inside"),
    *("top2 + clinical (late)", "stack of 5 heads + clinical (late)"),
    "any head, best of 5 chosen inside + clinical (experts)",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cohort, its store and a run."""
    root = tmp_path_factory.mktemp("final")
    synthetic = SyntheticSettings(patients=30, test_patients=4, images=5, difficulty=0.0)
    cohort = Cohort.load(write_synthetic_cohort(synthetic, root / "cohort", workers=1))
    recipe = ExtractSettings(backbone=BACKBONE, precision="float32", device="cpu", threads=1)
    store = extract(cohort, root / "store.h5", recipe)
    fit_heads(store, GRID, SETTINGS, root / "run")
    return root


@pytest.fixture(scope="module")
def cohort(home: Path) -> Cohort:
    return Cohort.load(home / "cohort")


def predict(model: FinalModel, cohort: Cohort) -> Predictions:
    return model.predict(cohort, ON_CPU)


@pytest.mark.parametrize("row", ROWS)
def test_each_member_predicts_its_fold_as_the_run_did(
    row: str, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    finalize(home / "run", tmp_path / "model", row=row, members=True)
    model = FinalModel.load(tmp_path / "model")
    measured = pd.read_csv(home / "run" / "predictions.csv")
    measured = measured[measured["head"] == row]
    folds = measured["split"].unique()[:3]
    for member, fold in zip(model.members, folds, strict=True):
        alone = predict(replace(model, members=(member,)), cohort).patients.set_index("id")
        own = measured[measured["split"] == fold]
        found = alone.loc[own["patient"], "probability"]
        # The store's maps are float16.
        np.testing.assert_allclose(found, own["calibrated"], atol=2e-3)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("members", [False, True])
def test_what_speaks_for_a_patient_adds_up(
    row: str, members: bool, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    made = finalize(home / "run", tmp_path / "model", row=row, members=members)
    found = predict(made, cohort)
    patients = found.patients
    parts = patients.filter(like="from_").sum(axis=1) + patients["rest"]
    np.testing.assert_allclose(parts, logit(patients["probability"]), atol=1e-5)
    by_patient = found.images.groupby("patient", sort=False)
    np.testing.assert_allclose(by_patient["contribution"].sum(), patients["from_images"], atol=1e-5)
    np.testing.assert_allclose(by_patient["weight"].sum(), 1, rtol=1e-5)
    assert ("from_age" in patients) == ("clinical" in row)
    again = predict(FinalModel.load(tmp_path / "model"), cohort)
    pd.testing.assert_frame_equal(again.patients, patients)
    pd.testing.assert_frame_equal(again.images, found.images)


def test_without_attributes_a_model_of_its_own_decides(
    home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    fused = finalize(home / "run", tmp_path / "fused", row="top2 + clinical (late)")
    images = finalize(home / "run", tmp_path / "images", row="top2")
    blind = cohort.select(cohort.ids)
    blind = replace(blind, table=blind.table[["label", "split"]])
    with pytest.raises(CohortError, match=r"must have the columns gender, age, lymph_count"):
        predict(fused, blind)
    found = predict(fused.without_attributes(), blind).patients
    pd.testing.assert_frame_equal(found, predict(images, blind).patients)
    assert images.threshold == fused.without_attributes().threshold != fused.threshold


def test_it_carries_the_figures_of_its_row_and_its_patients(home: Path, tmp_path: Path) -> None:
    model = finalize(home / "run", tmp_path / "model", row="top2 + clinical (late)")
    lines = json.loads((home / "run" / "summary.json").read_text())
    summary = {line["head"]: line for line in lines}
    assert model.figures["row"] == summary["top2 + clinical (late)"]
    assert model.figures["images"] == summary["top2"]
    assert len(model.facts.trained_on) == 30
    assert model.facts.provenance.labels


@pytest.mark.parametrize("members", [False, True])
def test_it_keeps_what_it_said_of_patients_held_out(
    members: bool, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    row = "top2 + clinical (late)"
    model = finalize(home / "run", tmp_path / "model", row=row, members=members)
    assert FinalModel.load(tmp_path / "model").held_out["row"].rates == model.held_out["row"].rates
    measured = pd.read_csv(home / "run" / "predictions.csv")
    measured = measured[(measured["head"] == row) & measured["split"].isin(_first_repeat(measured))]
    kept = model.held_out["row"]
    assert kept.rates[""].sensitivity == pytest.approx(
        measured.loc[measured["label"] == 1, "predicted"].mean()
    )
    assert kept.rates[""].specificity == pytest.approx(
        1 - measured.loc[measured["label"] == 0, "predicted"].mean()
    )
    np.testing.assert_array_equal(kept.labels, measured["label"])
    if members:
        np.testing.assert_allclose(kept.logits, logit(measured["calibrated"]), atol=1e-5)
    for point in ("0.8", "0.99"):
        asked = model.at_sensitivity(float(point)).at_prevalence(0.5)
        values = asked.predictive_values
        assert values is not None
        rates = kept.rates[point]
        expected = rates.sensitivity / (rates.sensitivity + 1 - rates.specificity)
        assert values.positive.value == pytest.approx(expected)


def _first_repeat(measured: pd.DataFrame) -> list[str]:
    return [str(name) for name in measured["split"].unique()[:3]]


@pytest.mark.parametrize("members", [False, True])
def test_it_abstains(members: bool, home: Path, cohort: Cohort, tmp_path: Path) -> None:
    row = "top2 + clinical (late)"
    model = finalize(home / "run", tmp_path / "model", row=row, members=members)
    with pytest.raises(SettingsError, match=r"alpha \(=0\.01\) must be at least .* 99 patients"):
        model.abstaining(0.01)
    found = predict(model.abstaining(0.2).at_prevalence(0.5), cohort).patients
    assert set(found["answer"]) <= {"reactive", "tumoral", "refer"}
    sure = found[found["answer"] != "refer"]
    assert ((sure["p_reactive"] > 0.2) == (sure["answer"] == "reactive")).all()
    share = model.held_out["row"].prevalence
    moved = logit(found["probability_at_prevalence"]) - logit(found["probability"])
    np.testing.assert_allclose(moved, -logit(share), atol=1e-6)
    plain = predict(model, cohort).patients
    pd.testing.assert_frame_equal(found[plain.columns], plain)
    assert ("about 2α" in model.guarantee) == members
    old = replace(model, held_out={})
    with pytest.raises(ModelError, match="made by an earlier version"):
        old.abstaining()


def test_the_default_is_chosen_inside_and_fused(home: Path, tmp_path: Path) -> None:
    model = finalize(home / "run", tmp_path / "model")
    assert model.row == "any head, best of 5 chosen inside + clinical (late)"


def test_several_stores_and_members_average(home: Path, cohort: Cohort, tmp_path: Path) -> None:
    recipe = ExtractSettings(
        backbone=replace(BACKBONE, crop=48), precision="float32", device="cpu", threads=1
    )
    second = extract(cohort, tmp_path / "second.h5", recipe)
    settings = replace(SETTINGS, seeds=1, fusions=())
    grid = HeadGrid(agg=("mean+std", "quantiles@2+mean@1"))
    run = fit_heads([home / "store.h5", second], grid, settings, tmp_path / "run")
    for row in ("mean+std", "quantiles@2+mean@1"):
        model = finalize(tmp_path / "run", tmp_path / "model", row=row, members=True, force=True)
        assert len(model.sources) == 2
        single = [predict(replace(model, members=(each,)), cohort) for each in model.members]
        together = predict(FinalModel.load(tmp_path / "model"), cohort).patients
        logits = [logit(each.patients["probability"]) for each in single]
        np.testing.assert_allclose(
            logit(together["probability"]), np.mean(logits, axis=0), rtol=1e-6
        )
        measured = run.outcome.predictions
        own = measured[(measured["head"] == row) & (measured["split"] == run.outcome.splits[0].id)]
        found = single[0].patients.set_index("id").loc[own["patient"], "probability"]
        np.testing.assert_allclose(found, own["calibrated"], atol=2e-3)


@pytest.mark.parametrize("row", ["mean+std", "top2 + clinical (late)", ROWS[-1]])
def test_the_same_by_store_and_by_images(
    row: str, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = finalize(home / "run", tmp_path / "model", row=row)
    store = FeatureStore.open(home / "store.h5")
    by_images, by_store = predict(model, cohort), model.predict_stores(store, settings=ON_CPU)
    # The store's maps are float16.
    pd.testing.assert_frame_equal(by_images.patients, by_store.patients, atol=5e-3, rtol=0)
    pd.testing.assert_frame_equal(by_images.images, by_store.images, atol=5e-2, rtol=2e-3)


def test_the_same_by_stores_with_flips(home: Path, cohort: Cohort, tmp_path: Path) -> None:
    recipe = ExtractSettings(
        backbone=BACKBONE, precision="float32", device="cpu", threads=1, views=4
    )
    flipped = extract(cohort, tmp_path / "flipped.h5", recipe)
    model = finalize(home / "run", tmp_path / "model", row="top2")
    tta = replace(ON_CPU, tta=True)
    by_store = model.predict_stores(flipped, settings=tta).patients
    by_images = model.predict(cohort, tta).patients
    pd.testing.assert_frame_equal(by_images, by_store, atol=5e-3, rtol=0)
    with pytest.raises(StoreError, match=r"store\.h5: must have the maps of the views identity, "):
        model.predict_stores(FeatureStore.open(home / "store.h5"), settings=tta)
    other = replace(recipe, backbone=replace(BACKBONE, crop=40), views=1)
    wrong = extract(cohort, tmp_path / "other.h5", other)
    with pytest.raises(StoreError, match="maps that this model reads: crop is 40 there, "):
        model.predict_stores(wrong, settings=ON_CPU)
    with pytest.raises(StoreError, match="must name a store for each of the model's 1 backbones"):
        model.predict_stores(flipped, wrong, settings=ON_CPU)


def test_one_patient_as_in_its_cohort(home: Path, cohort: Cohort, tmp_path: Path) -> None:
    model = finalize(home / "run", tmp_path / "model", row="top2 + clinical (late)")
    id = cohort.ids[3]
    row = cohort.table.loc[id]
    folder = cohort.images[3][0].parent
    given = {"AGE": f"{row['age']:.17g}", "Gender": str(row["gender"]).lower()}
    alone = Cohort.of_patient(folder, given)
    with pytest.raises(CohortError, match=r"got none named lymph_count\. Add them, let the"):
        predict(model, alone)
    lenient = replace(ON_CPU, allow_missing_attributes=True)
    found = model.predict(alone, lenient).patients
    left_empty = Cohort.of_patient(folder, given | {"lymph_count": ""})
    pd.testing.assert_frame_equal(predict(model, left_empty).patients, found)
    blank = replace(cohort, table=cohort.table.assign(lymph_count=np.nan))
    expected = predict(model, blank).patients
    same = expected[expected["id"] == id].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.drop(columns="label"), same.drop(columns="label"))
    assert "lymph_count is missing; the mean" in found["notes"].item()


def test_what_cannot_be_made_a_model_is_refused(home: Path, tmp_path: Path) -> None:
    def refused(kind: type[LymphfeatError], message: str, run: Path, **options: str) -> None:
        with pytest.raises(kind, match=message):
            finalize(run, tmp_path / "model", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "model").exists()

    run = home / "run"
    refused(SettingsError, r"row \(=top7\) must be a head of the run", run, row="top7")
    refused(SettingsError, r"run \(=.*\) must be a run folder of", home / "cohort")
    report = fit_heads(
        home / "store.h5",
        agg="mean",
        settings=replace(SETTINGS, protocol="report", seeds=1, fusions=()),
        out=tmp_path / "report",
    )
    assert report.folder is not None
    refused(SettingsError, "must be fitted with --protocol honest", report.folder)
    nested = replace(SETTINGS, epoch="nested", seeds=1, fusions=())
    fit_heads(home / "store.h5", agg="bnsigmoid", settings=nested, out=tmp_path / "nested")
    refused(SettingsError, "must be fitted with --choose-epoch last", tmp_path / "nested")
    other = Cohort.load(home / "cohort")
    extract(
        other,
        tmp_path / "other.h5",
        ExtractSettings(backbone=replace(BACKBONE, crop=40), precision="float32", device="cpu"),
    )
    with pytest.raises(ModelError, match=r"must be the store that .* was fitted on"):
        finalize(run, tmp_path / "model", stores=[tmp_path / "other.h5"])


def test_a_damaged_folder_is_named(home: Path, tmp_path: Path) -> None:
    finalize(home / "run", tmp_path / "one", row="mean+std")
    finalize(home / "run", tmp_path / "two", row="top2")
    with pytest.raises(ModelError, match=r"two\) must be used alone|one\) must be used alone"):
        load_model(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ModelError, match="a final model, which `lymphfeat predict` and"):
        Model.load(tmp_path / "one")
    tensors = (tmp_path / "two" / "final.safetensors").read_bytes()
    (tmp_path / "one" / "final.safetensors").write_bytes(tensors)
    with pytest.raises(ModelError, match=r"cannot be read as this model's tensors"):
        load_model(tmp_path / "one")
    (tmp_path / "two" / "final.json").write_text('{"format": "lymphfeat-final-model"}')
    with pytest.raises(ModelError, match=r"format_version \(=None\) must be at most 1"):
        load_model(tmp_path / "two")


def test_from_the_command_line(home: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> str:
        found = CliRunner().invoke(cli, [str(each) for each in arguments])
        assert found.exit_code == 0, found.output
        return found.output

    out, table = tmp_path / "model", tmp_path / "new.csv"
    row = "top2 + clinical (late)"
    said = run("finalize", home / "run", "--row", row, "--out", out)
    assert f"{row}: reads images, gender, age, lymph_count; " in said
    assert "As measured by fit-head: BA " in said
    assert "Research software, not a medical device." in said
    common = ("--cohort", home / "cohort", "--precision", "float32", "--out", table, "--force")
    run("predict", "--model", out, *common)
    assert {"from_images", "from_age", "notes"} <= set(pd.read_csv(table).columns)
    run("predict", "--model", out, "--without-attributes", *common)
    assert "from_age" not in pd.read_csv(table).columns
    assert "final model" in run("info", out)


def test_a_run_and_its_model_in_one_call(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--folds", "3", "--seeds", "1", "--device", "cpu", "--precision", "float32"]
    line = ["fit-head", "--store", home / "store.h5", "--agg", "mean+std", *few]
    line += ["--out", tmp_path / "run", "--model-out", tmp_path / "model"]

    def run(*more: str) -> tuple[int, str]:
        found = CliRunner().invoke(cli, [str(each) for each in [*line, *more]])
        return found.exit_code, found.output

    assert run("--protocol", "report")[0] == 2
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        code, said = run()
    assert code == 2
    assert "run `lymphfeat finalize` on the run afterwards" in said.replace("\n", " ")
    assert not (tmp_path / "run").exists()
    code, said = run()
    assert code == 0, said
    assert f"Model of mean+std: {tmp_path / 'model'}" in said
    assert isinstance(load_model(tmp_path / "model"), FinalModel)


@pytest.mark.parametrize("option", [("--protocol", "both"), ("--groups", "gender")])
def test_a_run_that_is_there_is_told_as_the_first_time(
    option: tuple[str, str], home: Path, tmp_path: Path
) -> None:
    few = ["--folds", "3", "--seeds", "1", "--device", "cpu", "--precision", "float32"]
    line = ["fit-head", "--store", str(home / "store.h5"), "--agg", "mean+std", *few, *option]
    line += ["--out", str(tmp_path / "run"), "--model-out", str(tmp_path / "model"), "--json"]
    first = CliRunner().invoke(cli, line)
    assert first.exit_code == 0, first.output
    shutil.rmtree(tmp_path / "model")
    again = CliRunner().invoke(cli, line)
    assert "holds this run already" in again.stderr
    assert again.stdout == first.stdout
    assert {"report", "optimism"} <= json.loads(first.stdout).keys() or option[0] == "--groups"
