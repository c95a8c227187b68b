"""Explanations of final models and of members: the numbers of `predict`, and what speaks for it."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy.special import logit

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.provenance import Provenance
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.evaluation.calibration import Calibration
from lymphfeat.evaluation.decision import Decision
from lymphfeat.explanation.explanation import explain
from lymphfeat.explanation.page import render_page
from lymphfeat.explanation.report import write_cell, write_report
from lymphfeat.explanation.scores import mean_map, probability_without, score_cohort
from lymphfeat.explanation.text import speaks
from lymphfeat.extraction import extract
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.stack import NetworkHead
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.final_model import FinalModel
from lymphfeat.model.model import Model
from lymphfeat.settings import (
    ExplainSettings,
    ExtractSettings,
    FitSettings,
    HeadGrid,
    HeadSettings,
    SyntheticSettings,
)
from lymphfeat.synthetic.cohort import write_synthetic_cohort
from lymphfeat_cli.main import cli
from tests.test_distribution_head import make_distribution_model
from tests.test_model import make_model
from tests.tiny import BACKBONE, write_red_cohort

ON_CPU = ExplainSettings(device="cpu", precision="float32", threads=1)
SCHEMA = json.loads(
    (Path(__file__).parent.parent / "docs/json/explain.schema.json").read_text(encoding="utf-8")
)
MOVED = Decision(threshold=0.6, calibration=Calibration(slope=0.7, intercept=-0.4))
ROWS = [
    *("mean+std + clinical (late)", "attention width=8 + clinical (sum)", "bnsigmoid"),
    *("top2 + clinical (experts)", "stack of 4 heads + clinical (late)"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cohort, its store and a run."""
    root = tmp_path_factory.mktemp("explained")
    synthetic = SyntheticSettings(patients=18, test_patients=2, images=4, difficulty=0.0)
    cohort = Cohort.load(write_synthetic_cohort(synthetic, root / "cohort", workers=1))
    recipe = ExtractSettings(backbone=BACKBONE, precision="float32", device="cpu", threads=1)
    store = extract(cohort, root / "store.h5", recipe)
    settings = FitSettings(
        seeds=1, folds=3, epochs=3, fusions=("late", "sum", "experts"), threads=1
    )
    grid = HeadGrid(agg=("mean+std", "bnsigmoid", "topk", "attention"), width=(8,), k_agg=(2,))
    fit_heads(store, grid, settings, root / "run")
    return root


@pytest.fixture(scope="module")
def cohort(home: Path) -> Cohort:
    return Cohort.load(home / "cohort")


def made(home: Path, out: Path, row: str, *, members: bool = False) -> FinalModel:
    return finalize(home / "run", out / "model", row=row, members=members, force=True)


# --- final models ---------------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("members", [False, True])
def test_an_explanation_says_what_predict_says(
    row: str, members: bool, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = made(home, tmp_path, row, members=members)
    if members:  # as for another laboratory
        model = replace(model, recalibration={"row": MOVED, "images": MOVED})
    found, expected = explain(model, cohort, ON_CPU), model.predict(cohort, ON_CPU.scoring)
    told = "probability|predicted|spread|rest|unlikeness|without_attributes|from_.*"
    numbers = expected.patients.filter(regex=f"^({told})$")
    for name, values in numbers.items():
        np.testing.assert_allclose(found.patients[name], values, atol=1e-5, err_msg=str(name))
    assert list(found.patients["notes"]) == list(expected.patients["notes"])
    assert list(found.images["unlike_in"]) == list(expected.images["unlike_in"])
    for name in ("logit", "probability", "weight", "contribution"):
        np.testing.assert_allclose(found.images[name], expected.images[name], atol=1e-4)
    np.testing.assert_allclose(found.maps.mean((1, 2)), found.logit, atol=1e-4)
    added = found.shares.sum(axis=1) + found.decisions.rest
    np.testing.assert_allclose(added, logit(found.patients["probability"]), atol=1e-5)
    assert (found.maps.shape[1] > 1) == ("attention" not in row)
    page = render_page(found)
    assert "NaN" not in page.split("<script>")[0]


@pytest.mark.seconds
@pytest.mark.parametrize("row", [row for row in ROWS if "clinical" in row])
def test_images_and_attributes_alone(row: str, home: Path, cohort: Cohort, tmp_path: Path) -> None:
    model = made(home, tmp_path, row)
    found = explain(model, cohort, ON_CPU).patients
    blind = model.without_attributes().predict(cohort, ON_CPU.scoring).patients
    np.testing.assert_allclose(found["without_attributes"], blind["probability"], atol=1e-5)
    if "late" in row:  # linear: the fused logit less the images' term
        expected = logit(found["probability"]) - found["from_images"]
        np.testing.assert_allclose(logit(found["without_images"]), expected, atol=1e-5)
    turned = replace(cohort, images=cohort.images[::-1])  # the same attributes, other images
    other = explain(model, turned, ON_CPU).patients
    np.testing.assert_allclose(other["without_images"], found["without_images"], atol=1e-12)
    assert not np.allclose(other["probability"], found["probability"])


def test_without_images_the_sum_is_the_clinical_logit(
    home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = made(home, tmp_path, "bnsigmoid + clinical (sum)")
    (member,) = model.members
    attributes = model.attributes.matrix(cohort.table)
    found = member.attribute_logits(attributes)
    # the image logit whose calibrated value is the share of tumoral patients, so says nothing more
    fusion: Any = member.fusion
    silent = (fusion.prior - fusion.calibration.intercept) / fusion.calibration.slope
    expected = member.fused_logits(np.full(len(attributes), silent), attributes)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.seconds
@pytest.mark.parametrize("row", ["mean+std + clinical (late)", "top2 + clinical (experts)"])
def test_deleting_images_against_predicting_the_rest(
    row: str, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = made(home, tmp_path, row, members=True)
    subject = explain(model, cohort, ON_CPU).subject
    kept = score_cohort(subject, cohort, ON_CPU.scoring).kept
    left_out = np.random.default_rng(0).random(int(cohort.n_images.sum())) < 0.4
    left_out[cohort.offsets[:-1]] = False  # every patient has an image left
    fast = probability_without(subject, kept, cohort.n_images, left_out)
    parts = np.split(~left_out, cohort.offsets[1:-1])
    fewer = replace(
        cohort,
        images=tuple(
            tuple(path for path, keep in zip(own, part, strict=True) if keep)
            for own, part in zip(cohort.images, parts, strict=True)
        ),
    )
    expected = model.predict(fewer, ON_CPU.scoring).patients["probability"]
    np.testing.assert_allclose(fast, expected, atol=1e-5)
    rows = np.array([3, 1])  # of some patients only: their own attributes count
    some = cohort.select([cohort.ids[row] for row in rows])
    again = score_cohort(subject, some, ON_CPU.scoring).kept
    nothing = np.zeros(int(some.n_images.sum()), bool)
    found = probability_without(subject, again, some.n_images, nothing, _places(cohort, some))
    whole = model.predict(some, ON_CPU.scoring).patients["probability"]
    np.testing.assert_allclose(found, whole, atol=1e-5)


def _places(cohort: Cohort, some: Cohort) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([cohort.ids.index(id) for id in some.ids])


@pytest.mark.seconds
def test_what_speaks_for_a_patient_in_words(home: Path, cohort: Cohort, tmp_path: Path) -> None:
    model = made(home, tmp_path, "mean+std + clinical (late)")
    table = cohort.table.copy()
    table.loc[cohort.ids[0], "age"] = np.nan
    found = explain(model, replace(cohort, table=table), ON_CPU)
    for row in (0, 1):
        tumoral, reactive = speaks(found, row)
        assert tumoral.startswith("What speaks for tumoral: ")
        assert reactive.startswith("What speaks for reactive: ")
        told = re.findall(r"(?:: |; )([^;:]+), ([+−]\d+\.\d\d)", tumoral + reactive)
        values = [float(value.replace("−", "-")) for _, value in told]
        expected = [v for v in found.shares.iloc[row] if abs(v) >= 0.005]
        assert sorted(values) == pytest.approx(sorted(expected), abs=0.0051)
        assert all("+" in v for _, v in re.findall(r"([^;:]+), ([+−])", tumoral))
    age = table["age"].iloc[1]
    assert f"age {age:.3g}" in " ".join(speaks(found, 1))
    assert "age is missing" in found.patients["notes"][0]


@pytest.mark.seconds
def test_heads_on_several_backbones_have_no_maps(
    home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    recipe = ExtractSettings(
        backbone=replace(BACKBONE, crop=48), precision="float32", device="cpu", threads=1
    )
    second = extract(cohort, tmp_path / "second.h5", recipe)
    settings = FitSettings(seeds=1, folds=3, threads=1, fusions=("late",))
    grid = HeadGrid(agg=("quantiles@2+mean@1",))
    fit_heads([home / "store.h5", second], grid, settings, tmp_path / "run")
    row = "quantiles@2+mean@1 + clinical (late)"
    model = finalize(tmp_path / "run", tmp_path / "model", row=row)
    found = explain(model, cohort, ON_CPU)
    expected = model.predict(cohort, ON_CPU.scoring)
    np.testing.assert_allclose(
        found.patients["probability"], expected.patients["probability"], atol=1e-5
    )
    np.testing.assert_allclose(found.images["logit"], expected.images["logit"], atol=1e-4)
    assert found.maps.shape[1:] == (1, 1)
    assert found.deletion is not None
    files = write_report(found, tmp_path / "report.html", replace(ON_CPU, plates=1))
    assert not any(path.name.startswith("grids") for path in files)
    told = "This model has no maps: its heads read the pooled features of several backbones"
    assert told in (tmp_path / "report.html").read_text()


@pytest.mark.seconds
def test_attributes_that_the_table_lacks(home: Path, cohort: Cohort, tmp_path: Path) -> None:
    model = made(home, tmp_path, "mean+std + clinical (late)")
    blind = replace(cohort, table=cohort.table[["label", "split"]])
    with pytest.raises(CohortError, match="must have the columns gender, age, lymph_count"):
        explain(model, blind, ON_CPU)
    found = explain(model, blind, replace(ON_CPU, allow_missing_attributes=True))
    assert found.patients["notes"].str.contains("age is missing").all()
    assert "age (missing)" in render_page(found)
    images = explain(model.without_attributes(), blind, ON_CPU)
    assert not images.patients["notes"].str.contains("missing").any()
    assert images.deletion is not None
    path = cohort.images[0][0]
    with pytest.raises(SettingsError, match=r"head mean\+std\) must score single cells"):
        write_cell(model, path, tmp_path / "cell.png", ON_CPU)
    linear = made(home, tmp_path, "bnsigmoid + clinical (late)", members=True)
    alone = write_cell(linear, path, tmp_path / "cell.png", ON_CPU)
    assert alone.logit == pytest.approx(explain(linear, cohort, ON_CPU).logit[0], abs=1e-4)


@pytest.mark.seconds
def test_from_the_command_line(home: Path, tmp_path: Path) -> None:
    made(home, tmp_path, "mean+std + clinical (late)", members=True)

    def run(*arguments: str) -> dict[str, Any]:
        common = ("--model", str(tmp_path / "model"), "--cohort", str(home / "cohort"))
        places = ("--out", str(tmp_path / "page.html"), "--figures", "none", "--force", "--json")
        how = ("--precision", "float32", "--device", "cpu", "--threads", "1")
        found = CliRunner().invoke(cli, ["explain", *common, *places, *how, *arguments])
        assert found.exit_code == 0, found.output
        told: dict[str, Any] = json.loads(found.stdout)
        jsonschema.validate(told, SCHEMA)
        return told

    told = run()
    assert told["subgroups"]["patients"] == "out of fold"
    assert {Path(name).name for name in told["files"]} == {"page.html", "page-subgroups.csv"}
    page = (tmp_path / "page.html").read_text()
    assert "What speaks for tumoral: " in page
    run("--without-attributes")
    page = (tmp_path / "page.html").read_text()
    assert "This model uses images only" in page
    assert "Without images" not in page.split("<script>")[0].split("</main>")[0]


# --- subgroups ------------------------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("row", ["bnsigmoid", "mean+std + clinical (late)"])
def test_subgroups_are_of_patients_held_out(
    row: str, members: bool, home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    made(home, tmp_path, row, members=members)
    found = explain(FinalModel.load(tmp_path / "model"), cohort, ON_CPU)
    assert found.subgroups is not None
    assert found.subgroups.of == "out of fold"
    rows = found.subgroups.rows.set_index(["by", "group"])
    assert set(rows.index.get_level_values(0)) == {"all patients", *cohort.covariates, "images"}
    measured = pd.read_csv(home / "run" / "predictions.csv")
    measured = measured[measured["head"] == row]
    whole = found.subgroups.rows.iloc[0]
    assert (whole["reactive"], whole["tumoral"]) == (
        (measured["label"] == 0).sum(),
        (measured["label"] == 1).sum(),
    )
    judged = found.subject.out_of_fold(found.keys, None).set_index(pd.Index(cohort.ids)).dropna()
    own = measured.set_index("patient").loc[judged.index]
    if members:
        np.testing.assert_allclose(judged["probability"], own["calibrated"], atol=1e-6)
        called = (judged["probability"] > judged["threshold"]).astype(int)
        assert called.tolist() == own["predicted"].tolist()
        women = cohort.table["gender"].loc[own.index] == "F"
        right = own.loc[women & (own["label"] == 1), "predicted"]
        assert len(right) >= 5
        assert rows.loc[("gender", "F"), "sensitivity"] == pytest.approx(right.mean())
    page = render_page(found)
    assert "each judged by what had not seen its label" in page
    files = write_report(found, tmp_path / "report.html", replace(ON_CPU, plates=0))
    assert {"report-subgroups.csv", "subgroups.png"} <= {path.name for path in files}
    written = pd.read_csv(tmp_path / "report-subgroups.csv")
    np.testing.assert_allclose(written["auc"], found.subgroups.rows["auc"])


def test_a_model_of_an_earlier_version_has_subgroups_of_training_patients(
    home: Path, cohort: Cohort, tmp_path: Path
) -> None:
    model = made(home, tmp_path, "bnsigmoid")
    old = {name: replace(each, ids=()) for name, each in model.held_out.items()}
    found = explain(replace(model, held_out=old), cohort, ON_CPU)
    assert found.subgroups is not None
    assert found.subgroups.of == "train"
    assert "THE MODEL WAS TRAINED ON THESE PATIENTS" in render_page(found)


# --- members --------------------------------------------------------------------------------------


@pytest.fixture
def red(tmp_path: Path) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path / "red", "010101??"))


def decided(models: Sequence[Model]) -> list[Model]:
    """Give models calibrations and thresholds of their own."""
    for number, model in enumerate(models, start=1):
        calibration = Calibration(slope=0.5 * number, intercept=0.1 * number)
        model.decision = replace(model.decision, calibration=calibration, threshold=0.3 * number)
    return list(models)


def linear_members(agg: str) -> list[Model]:
    models = [make_model(agg), make_model(agg)]
    weight = models[1].head.get_parameter("weight")
    torch.nn.init.normal_(weight, std=20, generator=torch.Generator().manual_seed(7))
    return decided(models)


def network(agg: str, seed: int) -> Model:
    linear = make_model("mean")
    channels, generator = linear.backbone.channels, torch.Generator().manual_seed(seed)
    mean, scale = torch.zeros(channels), 50 * torch.ones(channels)
    head = NetworkHead.initial(resolve(HeadSettings(agg=agg)), mean, scale, generator)
    return Model(linear.backbone, head, recipe=linear.recipe, facts=linear.facts)


@pytest.mark.parametrize("agg", ["bnsigmoid", "topk", "lse", "mean+std", "attention", "lstm"])
def test_members_are_explained_together(agg: str, red: Cohort) -> None:
    if agg in ("attention", "lstm"):
        models = decided([network(agg, 0), network(agg, 1)])
    elif agg == "mean+std":
        models = decided([make_distribution_model(agg), make_distribution_model(agg)])
    else:
        models = linear_members(agg)
    ensemble = Ensemble.of(models)
    found, expected = explain(ensemble, red, ON_CPU), ensemble.predict(red, ON_CPU.scoring)
    for name in ("probability", "predicted", "spread"):
        np.testing.assert_allclose(found.patients[name], expected.patients[name], atol=1e-5)
    for name in ("logit", "weight", "contribution"):
        np.testing.assert_allclose(found.images[name], expected.images[name], atol=1e-4)
    each = [explain(model, red, ON_CPU) for model in models]
    np.testing.assert_allclose(found.maps, np.mean([own.maps for own in each], axis=0), atol=1e-4)
    np.testing.assert_allclose(
        found.decisions.total, np.mean([own.decisions.total for own in each], axis=0), atol=1e-4
    )
    moved = replace(ensemble, recalibration=MOVED)
    again, expected = explain(moved, red, ON_CPU), moved.predict(red, ON_CPU.scoring)
    for name in ("probability", "predicted", "calibrated", "spread"):
        np.testing.assert_allclose(again.patients[name], expected.patients[name], atol=1e-5)
    page = render_page(found)
    assert "averages 2 members" in page
    assert ("Attention is the weight that the network gives" in page) == (agg == "attention")


def test_members_judge_the_patients_that_each_has_not_seen(red: Cohort) -> None:
    models = linear_members("bnsigmoid")
    for model, seen in zip(models, ("P0", "P1"), strict=True):
        model.facts = TrainingFacts(
            trained_on=(seen,), provenance=Provenance.of_ids(labels=(seen,))
        )
    found = explain(Ensemble.of(models), red, ON_CPU)
    judged = found.subject.out_of_fold(found.keys, found.decisions.members)
    assert judged.notna().all(axis=1).tolist() == [True, True] + [False] * (len(red.ids) - 2)
    for row, (other, threshold) in enumerate(((1, 0.6), (0, 0.3))):
        decision, alone = models[other].decision, explain(models[other], red, ON_CPU)
        expected = decision.calibrate(alone.decisions.probability)[row]
        assert judged["probability"][row] == pytest.approx(expected, abs=1e-6)
        calibrated = decision.calibrate(np.array([threshold]))[0]
        assert judged["threshold"][row] == pytest.approx(calibrated)
        assert judged["fold"][row] == other


def test_members_of_different_kinds_are_explained_one_at_a_time(red: Cohort) -> None:
    ensemble = Ensemble.of([make_model("topk"), make_model("mean")])
    with pytest.raises(SettingsError, match="must have members of one kind to be explained"):
        explain(ensemble, red, ON_CPU)


def test_marks_of_members_are_those_of_most(red: Cohort) -> None:
    models = linear_members("topk")
    found = explain(Ensemble.of(models), red, ON_CPU)
    each = [explain(model, red, ON_CPU).decisions.mark for model in models]
    assert found.decisions.mark.tolist() == (np.mean(each, axis=0) > 0.5).astype(int).tolist()
    assert "in most members among the 2 highest" in found.wording.marks
    assert "most members did not use the others" in found.wording.marks


def test_attention_weighs_what_adds_up(red: Cohort) -> None:
    found = explain(network("attention", 0), red, ON_CPU)
    np.testing.assert_allclose(found.decisions.rest, 0, atol=1e-4)
    assert found.wording.weight == "attention"
    assert explain(network("lstm", 0), red, ON_CPU).wording.attention == ""


def test_a_mean_map_keeps_the_score() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, n, n, generator=generator) for n in (2, 3))
    scores = [first.mean((1, 2)), second.mean((1, 2)), torch.tensor([1.0, -2.0, 4.0])]
    found = mean_map([first, second, None], scores, [0.5, 0.3, 0.2])
    assert found.shape == (3, 2, 2)
    expected = 0.5 * scores[0] + 0.3 * scores[1] + 0.2 * scores[2]
    torch.testing.assert_close(found.mean((1, 2)), expected)
    alone = mean_map([first, None, None], scores, [0.5, 0.3, 0.2])
    even = (0.3 * scores[1] + 0.2 * scores[2])[:, None, None]
    torch.testing.assert_close(alone, 0.5 * first + even)
    assert mean_map([None], scores[:1], [1.0]).shape == (3, 1, 1)
