"""Networks through the backbone: on features standardised as they are when training starts."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.errors import SettingsError
from lymphfeat.explanation.explanation import explain
from lymphfeat.features.backbones import build_backbone
from lymphfeat.finetuning.job import hold_out, prepare
from lymphfeat.finetuning.loop import decode, make_fine_tuner
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.registry import AGGREGATORS, NetworkAggregator
from lymphfeat.heads.stack import NetworkHead
from lymphfeat.model.ensemble import Ensemble
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import Predictions
from lymphfeat.settings import (
    EndToEndSettings,
    ExplainSettings,
    HeadSettings,
    PredictSettings,
)
from lymphfeat.training import train
from lymphfeat_cli.main import cli
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_red_cohort

NETWORKS = [name for name, row in AGGREGATORS.items() if isinstance(row, NetworkAggregator)]
ON_CPU = PredictSettings(device="cpu", precision="float32", threads=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path_factory.mktemp("red")))


def settings_for(agg: str, **changes: Any) -> EndToEndSettings:
    return tiny_settings(head=HeadSettings(agg=agg, lr=3e-3, width=8), **changes)


@pytest.mark.seconds
@pytest.mark.parametrize("agg", NETWORKS)
def test_every_network_trains(agg: str, cohort: Cohort, tmp_path: Path) -> None:
    model = train(cohort, tmp_path, settings_for(agg, epochs=10))
    backbone, _ = build_backbone(BACKBONE.backbone, image_size=SIDE)
    before, after = backbone.state_dict(), model.backbone.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before if "weight" in key)
    assert (model.facts.metrics["train"]["auc"] or 0) > 0.9
    written = Predictions.read(tmp_path / "predictions.csv", tmp_path / "images.csv")
    again = Model.load(tmp_path).predict(cohort, ON_CPU)
    pd.testing.assert_frame_equal(again.images, written.images, check_dtype=False)
    np.testing.assert_array_equal(
        again.patients["probability"], written.patients["probability"].astype(np.float32)
    )
    weight = written.images.groupby("patient")["weight"].sum()
    np.testing.assert_allclose(weight, 1, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_features_are_standardised_as_a_step_sees_them(frozen: bool, cohort: Cohort) -> None:
    """All images make one chunk here, whose batch-norm statistics no order changes."""
    settings = settings_for("attention", max_forward_size=99, frozen_batchnorm=frozen)
    job = prepare(cohort, hold_out(cohort, settings), settings)
    tuner = make_fine_tuner(job, decode(cohort.labelled(), settings))
    kept = [buffer.clone() for buffer in tuner.backbone.buffers()]
    tuner.prepare_head()
    assert all(map(torch.equal, kept, tuner.backbone.buffers()))
    head = tuner.head
    assert isinstance(head, NetworkHead)
    with torch.no_grad():
        images = tuner.encoder(tuner.roster.images())[:, 0]  # (N, C)
    varies = images.std(0) > 1e-5
    assert varies.any()
    standard = ((images - head.mean) * head.scale)[:, varies]
    torch.testing.assert_close(standard.mean(0), torch.zeros(len(standard[0])), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        standard.std(0, correction=0), torch.ones(len(standard[0])), rtol=1e-3, atol=0
    )
    before = head.mean.clone(), head.scale.clone()
    tuner.run_epoch()
    tuner.finish_head()
    assert torch.equal(before[0], head.mean)
    assert torch.equal(before[1], head.scale)


def test_a_constant_channel_counts_nothing() -> None:
    head = NetworkHead.initial(
        HeadSettings(agg="attention", width=4),
        torch.zeros(3),
        torch.zeros(3),
        torch.Generator().manual_seed(0),
    )
    images = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    images[:, 1] = 7.3
    head.standardise(images)
    assert head.scale[1] == 0
    other = images.clone()
    other[:, 1] = -2
    torch.testing.assert_close(head(other, Bags.of([2, 3])), head(images, Bags.of([2, 3])))


@pytest.mark.seconds
def test_members_and_an_explanation(cohort: Cohort, tmp_path: Path) -> None:
    members = train(cohort, tmp_path, settings_for("gated-attention", epochs=1), folds=2)
    assert isinstance(members, Ensemble)
    assert pd.read_csv(tmp_path / "predictions.csv")["out_of_fold"][:10].notna().all()
    settings = ExplainSettings(device="cpu", precision="float32", threads=1)
    found = explain(members.models[0], cohort, settings)
    expected = members.models[0].predict(cohort, ON_CPU).patients["probability"]
    np.testing.assert_allclose(found.patients["probability"], expected, rtol=1e-5)


def test_a_network_does_not_start_from_another_head(cohort: Cohort, tmp_path: Path) -> None:
    settings = settings_for("lstm", init_head="runs/best")
    with pytest.raises(SettingsError, match=r"init_head \(=runs/best\) must not go with agg"):
        train(cohort, tmp_path / "model", settings)
    assert not (tmp_path / "model").exists()


@pytest.mark.seconds
def test_on_the_command_line(cohort: Cohort, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["endtoend", "--help"]).output
    assert "--width" in said
    assert "--layers" in said
    line = f"endtoend --backbone test_efficientnet --crop {SIDE} --threads 1 --device cpu"
    line += " --precision float32 --epochs 1 --agg transformer --width 12 --layers 2"
    line += f" --gradient exact --cohort {cohort.root} --out {tmp_path / 'm'}"
    result = CliRunner().invoke(cli, line.split())
    assert result.exit_code == 0, result.output
    head = Model.load(tmp_path / "m").head_settings
    assert (head.agg, head.width, head.layers) == ("transformer", 12, 2)
