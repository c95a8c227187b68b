"""Heads of the family `distribution` through the backbone: solved, trained, solved again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import VIEWS
from lymphfeat.cohort.splits import find_splits
from lymphfeat.errors import SettingsError
from lymphfeat.extraction import extract
from lymphfeat.features.backbones import build_backbone
from lymphfeat.features.store import FROZEN
from lymphfeat.finetuning.job import hold_out, prepare
from lymphfeat.finetuning.loop import decode, make_fine_tuner
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.exact import solve_head
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.heads.registry import AGGREGATORS, DistributionAggregator
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import Predictions
from lymphfeat.model.scoring import CohortScorer
from lymphfeat.runtime.progress import silent
from lymphfeat.settings import (
    EndToEndSettings,
    ExtractSettings,
    HeadSettings,
    PredictSettings,
    Unit,
)
from lymphfeat.training import train
from lymphfeat_cli.main import cli
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_red_cohort

AGGS = [name for name, row in AGGREGATORS.items() if isinstance(row, DistributionAggregator)]
ON_CPU = PredictSettings(device="cpu", threads=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path_factory.mktemp("red")))


def settings_for(agg: str, unit: Unit = "", **changes: Any) -> EndToEndSettings:
    head = HeadSettings(agg=agg, lr=3e-3, prototypes=3, unit=unit)
    return tiny_settings(head=head, **changes)


@pytest.mark.seconds
@pytest.mark.parametrize("agg", [*AGGS, "gini+prototypes"])
def test_every_statistic_trains(agg: str, cohort: Cohort, tmp_path: Path) -> None:
    model = train(cohort, tmp_path, settings_for(agg))
    backbone, _ = build_backbone(BACKBONE.backbone, image_size=SIDE)
    before, after = backbone.state_dict(), model.backbone.state_dict()
    moved = any(not torch.equal(before[key], after[key]) for key in before if "weight" in key)
    assert moved
    written = Predictions.read(tmp_path / "predictions.csv", tmp_path / "images.csv")
    again = Model.load(tmp_path).predict(cohort, ON_CPU)
    pd.testing.assert_frame_equal(again.images, written.images, check_dtype=False)
    np.testing.assert_array_equal(
        again.patients["probability"], written.patients["probability"].astype(np.float32)
    )
    assert np.isfinite(pd.read_csv(tmp_path / "curves.csv")["loss"]).all()


@pytest.mark.seconds
def test_it_learns(cohort: Cohort, tmp_path: Path) -> None:
    model = train(cohort, tmp_path, settings_for("mean+std", epochs=12))
    loss = pd.read_csv(tmp_path / "curves.csv")["loss"]
    assert loss.iloc[-1] < loss.iloc[0] / 2
    assert model.facts.metrics["train"]["auc"] == 1
    assert (tmp_path / "submission.csv").read_text() == "Id,Predicted\nP10,0\nP11,1\n"


@pytest.mark.seconds
@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("agg", ["mean+std", "logstd+prototypes"])
def test_the_head_that_is_kept_is_the_solution_on_the_models_own_features(
    agg: str, unit: Unit, cohort: Cohort, tmp_path: Path
) -> None:
    model = train(cohort, tmp_path, settings_for(agg, unit, precision="bfloat16"))
    learnt = cohort.labelled()
    scorer = CohortScorer(model.backbone, model.head, model.recipe, ON_CPU, views=VIEWS[:1])
    (features,) = scorer.score(learnt, silent)  # (N, U, C)
    labels = torch.from_numpy(learnt.labels)
    assert isinstance(model.head, DistributionHead)
    chosen = float(model.head.penalty), tuple(model.head.mixture.tolist())
    solved = solve_head(model.head_settings, features, learnt.n_images, labels, chosen)
    assert_same_head(model, solved, 1e-3)
    expected = solved.patient_logits([(features.flatten(0, 1), bags_of(learnt, features))])
    patients = model.predict(learnt, ON_CPU).patients
    assert patients["probability"].to_numpy() == pytest.approx(expected.sigmoid(), abs=1e-4)


def bags_of(cohort: Cohort, features: torch.Tensor) -> Bags:
    return Bags.of(cohort.n_images).times(features.shape[1])


def assert_same_head(model: Model, solved: ExactHead, tolerance: float) -> None:
    assert isinstance(model.head, DistributionHead)
    assert model.head.exact.penalty == solved.penalty
    found, expected = model.head.state_dict(), DistributionHead(solved).state_dict()
    for name, values in expected.items():
        atol = tolerance * float(values.abs().max())
        torch.testing.assert_close(found[name], values, rtol=tolerance, atol=atol)


@pytest.mark.seconds
def test_fit_head_finds_the_head_on_features_of_the_trained_backbone(
    cohort: Cohort, tmp_path: Path
) -> None:
    """As near as the store's float16 maps allow."""
    model = train(cohort, tmp_path / "model", settings_for("mean+std"))
    weights = tmp_path / "weights.safetensors"
    tensors = model.backbone.model.state_dict().items()
    save_file({name: values.contiguous() for name, values in tensors}, weights)
    recipe = ExtractSettings(
        backbone=replace(BACKBONE, weights=str(weights)),
        precision="float32",
        device="cpu",
        threads=1,
    )
    store = extract(cohort, tmp_path / "store.h5", recipe)
    maps, pooled = store.features(FROZEN), store.pooled(FROZEN)
    features = Features(maps, pooled, store.offsets, store.ids, store.labels)
    assert isinstance(model.head, DistributionHead)
    head = replace(model.head_settings, penalty=float(model.head.penalty))  # the first solution's
    fit = Fit(head=head, split=hold_out(cohort, tiny_settings()))
    fitted = fit_stacked(features, [fit], epochs=1, sampling=Sampling(batch_size=4))
    solved = fitted.modules[0]
    assert isinstance(solved, ExactHead)
    assert_same_head(model, solved, 0.02)
    probability = model.predict(cohort, ON_CPU).patients["probability"].to_numpy()
    assert probability == pytest.approx(fitted.curves[0, -1], abs=2e-3)


def test_an_epoch_moves_weights_and_leaves_constants(cohort: Cohort) -> None:
    settings = settings_for("mean+logstd+prototypes", epochs=1)
    job = prepare(cohort, hold_out(cohort, settings), settings)
    tuner = make_fine_tuner(job, decode(cohort.labelled(), settings))
    tuner.prepare_head()
    before = {name: values.clone() for name, values in tuner.head.state_dict().items()}
    assert all(float(before[f"blocks.{b}.weight"].abs().max()) > 0 for b in range(4))
    tuner.run_epoch()
    trained = {name for name, _ in tuner.head.named_parameters()}
    for name, values in tuner.head.state_dict().items():
        assert torch.equal(before[name], values) == (name not in trained), name


@pytest.mark.parametrize("frozen", [False, True])
def test_training_starts_from_the_solution_on_what_a_step_sees(
    frozen: bool, cohort: Cohort
) -> None:
    """All images make one chunk here, whose batch-norm statistics no order changes."""
    settings = settings_for("mean+std", max_forward_size=99, frozen_batchnorm=frozen)
    job = prepare(cohort, hold_out(cohort, settings), settings)
    tuner = make_fine_tuner(job, decode(cohort.labelled(), settings))
    kept = [buffer.clone() for buffer in tuner.backbone.buffers()]
    tuner.prepare_head()
    assert all(map(torch.equal, kept, tuner.backbone.buffers()))
    bags = Bags.of(cohort.labelled().n_images)
    with torch.no_grad():
        features = tuner.encoder(tuner.roster.images())  # (N, 1, C)
        found = tuner.head.patient_logits(features, bags)
        labels = tuner.roster.labels.long()
        solved = solve_head(settings.head, features, bags.sizes.numpy(), labels)
    expected = solved.patient_logits([(features[:, 0], bags)])
    torch.testing.assert_close(found, expected.float(), rtol=1e-2, atol=1e-2)
    penalty = float(tuner.head.state_dict()["penalty"])
    tuner.finish_head()
    assert float(tuner.head.state_dict()["penalty"]) == penalty
    with torch.no_grad():
        apart = tuner.head.patient_logits(features, bags) - found
    assert (float(apart.abs().max()) < 0.01) == frozen


@pytest.mark.seconds
def test_members_and_penalty(cohort: Cohort, tmp_path: Path) -> None:
    head = HeadSettings(agg="std", penalty=0.3, lr=1e-3)
    members = train(cohort, tmp_path, tiny_settings(head=head, epochs=1), folds=3)
    assert isinstance(members, Ensemble)
    for model in members.models:
        assert isinstance(model.head, DistributionHead)
        assert float(model.head.penalty) == 0.3
    written = pd.read_csv(tmp_path / "predictions.csv")
    assert written["out_of_fold"][:10].notna().all()


@pytest.mark.seconds
@pytest.mark.parametrize("agg", ["mean+std", "attention"])
def test_a_store_of_backbones_trained_so(agg: str, cohort: Cohort, tmp_path: Path) -> None:
    finetune = tiny_settings(agg, epochs=1)
    settings = ExtractSettings(
        backbone=BACKBONE,
        finetune=finetune,
        precision="float32",
        device="cpu",
        threads=1,
    )
    splits = find_splits("kfold:2", cohort.ids, cohort.labels)
    store = extract(cohort, tmp_path / "tuned.h5", settings, splits=splits)
    assert sorted(store.feature_sets) == sorted(split.id for split in splits)
    # What happens after training is no part of a recipe.
    fused = replace(settings, finetune=replace(finetune, fusion="late"))
    assert extract(cohort, store.path, fused, splits=splits).recipe == store.recipe


def test_what_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    many = HeadSettings(agg="prototypes", prototypes=99)
    for settings, message in (
        (settings_for("mean+std", init_head="runs/best"), r"init_head \(=runs/best\) must"),
        (settings_for("std@2"), r"agg \(=std@2\) must not name a store after @"),
        (tiny_settings(head=many), r"prototypes \(=99\) must be at most the number"),
    ):
        with pytest.raises(SettingsError, match=message):
            train(cohort, tmp_path / "model", settings)
    assert not (tmp_path / "model").exists()


@pytest.mark.seconds
def test_on_the_command_line(cohort: Cohort, tmp_path: Path) -> None:
    line = f"endtoend --backbone test_efficientnet --crop {SIDE} --threads 1 --device cpu"
    line += " --precision float32 --epochs 1 --lr 0.001 --agg std+quantiles --quantiles 75-25"
    line += f" --penalty 0.01 --cohort {cohort.root} --out {tmp_path / 'm'}"
    result = CliRunner().invoke(cli, line.split())
    assert result.exit_code == 0, result.output
    head = Model.load(tmp_path / "m").head_settings
    assert (head.agg, head.quantiles, head.penalty) == ("std+quantiles", "75-25", 0.01)
    assert (head.lr, head.unit) == (0.001, "image")
