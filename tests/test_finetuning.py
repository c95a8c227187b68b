"""Feature stores from backbones fine-tuned per split: who taught the maps, who may be judged."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split, find_splits, write_splits
from lymphfeat.errors import LeakageError, ModelError, SettingsError
from lymphfeat.evaluation.decision import Decision
from lymphfeat.extraction import extract
from lymphfeat.features.store import FeatureStore
from lymphfeat.finalization import finalize
from lymphfeat.fitting import fit_heads
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import resolve
from lymphfeat.settings import (
    BackboneSettings,
    ExtractSettings,
    FitSettings,
    HeadSettings,
    ThresholdRule,
)
from lymphfeat_cli.main import cli
from tests.tiny import BACKBONE, SIDE, tiny_settings, write_red_cohort

SETTINGS = ExtractSettings(
    backbone=BACKBONE,
    finetune=tiny_settings(epochs=1),
    precision="float32",
    device="cpu",
    threads=1,
    batch_size=8,
)
HEADS = [resolve(HeadSettings(agg=agg, lr=0.05)) for agg in ("mean", "topk")]
FIT = FitSettings(epochs=3, batch_size=4, device="cpu", threads=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path_factory.mktemp("red")))


def splits_of(cohort: Cohort, text: str) -> list[Split]:
    return find_splits(text, cohort.ids, cohort.labels)


@pytest.fixture(scope="module")
def store(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("store") / "tuned.h5"
    return extract(cohort, out, SETTINGS, splits=splits_of(cohort, "kfold:3+inner"))


def features_of(store: FeatureStore, name: str) -> Features:
    maps, pooled = store.features(name)[:, 0], store.pooled(name)[:, 0]
    return Features(maps, pooled, store.offsets, store.ids, store.labels)


# --- the store -----------------------------------------------------------------------------------


def test_every_patient_is_stored_under_every_split(store: FeatureStore, cohort: Cohort) -> None:
    splits = {split.id: split for split in splits_of(cohort, "kfold:3+inner")}
    assert {split.id: split for split in store.splits} == splits
    for name, found in store.feature_sets.items():
        assert found.provenance.label_ids == splits[name].train
        assert len(store.features(name)) == cohort.offsets[-1]
    assert len({found.weights_sha256 for found in store.feature_sets.values()}) == 6
    assert not np.array_equal(store.features("kfold3-r0-f0"), store.features("kfold3-r0-f1"))
    store.verify()


def test_maps_are_those_of_the_weights_beside_the_store(
    store: FeatureStore, cohort: Cohort, tmp_path: Path
) -> None:
    weights = store.path.with_name("tuned.h5.backbones") / "kfold3-r0-f1" / "backbone.safetensors"
    backbone = replace(BACKBONE, weights=str(weights))
    plain = extract(cohort, tmp_path / "p.h5", replace(SETTINGS, backbone=backbone, finetune=None))
    np.testing.assert_array_equal(plain.features("frozen"), store.features("kfold3-r0-f1"))
    # The file itself knows whom it was trained on, wherever it is used.
    tuned = store.feature_sets["kfold3-r0-f1"]
    assert plain.feature_sets["frozen"].provenance == tuned.provenance
    with pytest.raises(LeakageError, match="learnt from the labels of P"):
        fit_heads(plain, HEADS, replace(FIT, folds=3), tmp_path / "run")


def test_validation_patients_teach_nothing(cohort: Cohort, tmp_path: Path) -> None:
    split = splits_of(cohort, "report:1")[0]
    table = cohort.table.copy()
    table.loc[list(split.validation), "label"] = 1 - table.loc[list(split.validation), "label"]
    flipped = replace(cohort, table=table)
    one, other = (
        extract(each, tmp_path / f"{i}.h5", SETTINGS, splits=[split])
        for i, each in enumerate((cohort, flipped))
    )
    assert one.feature_sets[split.id].weights_sha256 == other.feature_sets[split.id].weights_sha256


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside frozen"])
def test_heads_of_fine_tuned_features_are_no_final_model(
    beside: bool, store: FeatureStore, cohort: Cohort, tmp_path: Path
) -> None:
    stores = [store.path]
    if beside:
        frozen = extract(cohort, tmp_path / "frozen.h5", replace(SETTINGS, finetune=None))
        stores = [frozen.path, store.path]
    fit_heads(stores, agg="std", settings=FIT, out=tmp_path / "run")
    with pytest.raises(SettingsError, match="must be on features of frozen weights"):
        finalize(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


class Stop(Exception):
    pass


@pytest.mark.seconds
def test_interrupted_ends_with_the_same_bytes(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, finetune=tiny_settings(epochs=2))
    splits = splits_of(cohort, "report:2")
    whole = extract(cohort, tmp_path / "whole.h5", settings, splits=splits)

    def stopping(done: int, total: int, text: str = "") -> None:
        if text.startswith("report-s1 (2/2) epoch 2/2"):
            raise Stop

    parts = tmp_path / "parts.h5"
    with pytest.raises(Stop):
        extract(cohort, parts, settings, splits=splits, progress=stopping)
    seen: list[str] = []
    extract(
        cohort, parts, settings, splits=splits, progress=lambda d, t, text="": seen.append(text)
    )
    assert not any(text.startswith(("report-s0", "report-s1 (2/2) epoch 1/2")) for text in seen)
    assert parts.read_bytes() == whole.path.read_bytes()
    assert not list(tmp_path.rglob("checkpoint.pt"))
    before = parts.stat().st_mtime_ns
    extract(cohort, parts, settings, splits=splits)  # finished: left as it is
    assert parts.stat().st_mtime_ns == before


def test_other_views_train_nothing_anew(cohort: Cohort, tmp_path: Path) -> None:
    splits = splits_of(cohort, "all")
    out = tmp_path / "s.h5"
    one = extract(cohort, out, SETTINGS, splits=splits)
    assert one.feature_sets["all"].provenance.label_ids == cohort.labelled().ids
    with pytest.raises(LeakageError, match="fine-tuned on all labelled patients: none are left"):
        fit_heads(one, HEADS, FIT, tmp_path / "run")
    seen: list[str] = []
    more = extract(
        cohort,
        out,
        replace(SETTINGS, views=2),
        splits=splits,
        force=True,
        progress=lambda done, total, text="": seen.append(text),
    )
    assert more.feature_sets == one.feature_sets
    assert not any("epoch" in text for text in seen)
    out.unlink()
    other = replace(SETTINGS, finetune=tiny_settings(epochs=2))
    with pytest.raises(ModelError, match="already holds weights of another training: epochs is 1"):
        extract(cohort, out, other, splits=splits)


# --- heads on it ---------------------------------------------------------------------------------


def test_each_split_is_paired_with_its_own_backbone(store: FeatureStore, tmp_path: Path) -> None:
    settings = replace(FIT, protocol="report")
    outcome = fit_heads(store, HEADS, settings, tmp_path / "run").outcome
    assert [split.id for split in outcome.splits] == [f"kfold3-r0-f{f}" for f in range(3)]
    assert [fit.split.id for fit in outcome.fitted.fits] == 2 * [s.id for s in outcome.splits]
    for i, fit in enumerate(outcome.fitted.fits):
        alone = fit_stacked(
            features_of(store, fit.split.id), [fit], epochs=3, sampling=Sampling(batch_size=4)
        )
        np.testing.assert_allclose(outcome.fitted.weight[i], alone.weight[0], rtol=1e-4, atol=1e-6)
        predictions = outcome.predictions.query("split == @fit.split.id")
        assert set(predictions["patient"]) == set(fit.split.validation)


@pytest.mark.parametrize("rule", ["prevalence", "best-ba"])
def test_thresholds_come_from_the_inner_backbones(
    rule: ThresholdRule, store: FeatureStore, tmp_path: Path
) -> None:
    outcome = fit_heads(store, HEADS[:1], replace(FIT, threshold=rule), tmp_path / "run").outcome
    assert outcome.thresholds == f"{rule}, from training patients out of fold"
    split = outcome.splits[2]
    probabilities: list[float] = []
    labels: list[int] = []
    for name in ("kfold3-r0-f0+2", "kfold3-r0-f1+2"):
        inner = next(s for s in store.splits if s.id == name)
        features = features_of(store, name)
        found = fit_stacked(
            features, [Fit(head=HEADS[0], split=inner)], epochs=3, sampling=Sampling(batch_size=4)
        )
        rows = features.rows_of([p for p in inner.validation if p in split.train])
        probabilities += found.curves[0, -1, rows].tolist()
        labels += store.labels[rows].tolist()
    expected = Decision.learn(np.array(probabilities), np.array(labels), rule=rule).threshold
    assert outcome.runs["threshold"].iloc[2] == pytest.approx(expected, abs=1e-6)


def test_initial_weights_must_not_know_the_validation_patients(
    store: FeatureStore, cohort: Cohort, tmp_path: Path
) -> None:
    weights = store.path.with_name("tuned.h5.backbones") / "kfold3-r0-f0" / "backbone.safetensors"
    settings = replace(SETTINGS, backbone=replace(BACKBONE, weights=str(weights)))
    with pytest.raises(LeakageError, match="learnt from the labels of P"):
        extract(cohort, tmp_path / "s.h5", settings, splits=splits_of(cohort, "report:1"))


# --- the command line ----------------------------------------------------------------------------


def run(command: str, *arguments: str) -> Result:
    options = ["--threads", "1", "--device", "cpu"]
    return CliRunner().invoke(cli, [command, *arguments, *options])


def extract_line(cohort: Cohort, *arguments: str) -> Sequence[str]:
    backbone = ["--backbone", BACKBONE.backbone, "--crop", str(SIDE)]
    precise = ["--precision", "float32"]
    return ["extract", "--cohort", str(cohort.root), *backbone, *precise, *arguments]


def test_from_the_command_line(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = extract_line(cohort, "--finetune-epochs", "1", "--splits", "kfold:2")
    result = run(*line)
    assert result.exit_code == 0, result.output
    assert "fine-tuned per split, for 2 splits: kfold2-r0-f0, kfold2-r0-f1" in result.stdout
    fitted = run("fit-head", "--agg", "mean", "--epochs", "2", "--out", "run")
    assert fitted.exit_code == 0, fitted.output
    assert (
        "last epoch, threshold prevalence, from training patients as fitted" in fitted.stdout
    )  # no inner ones
    refused = run("fit-head", "--agg", "mean", "--threshold", "best-ba", "--out", "other")
    assert refused.exit_code == 2
    assert "threshold (=best-ba) must be chosen on out-of-fold probabilities" in refused.stderr
    written = Path("run/splits.json")
    assert set(json.loads(written.read_text())) == {"kfold2-r0-f0", "kfold2-r0-f1"}
    # The splits of a run are those of the extraction: nothing is trained again.
    again = run(*line[:-2], "--splits", str(written), "--json")
    assert json.loads(again.stdout)["features"] == ["kfold2-r0-f0", "kfold2-r0-f1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "kfold:5"], "use both --splits and --finetune-epochs, or neither"),
        (["--finetune-epochs", "1", "--splits", "kfold:1"], "splits (=kfold:1) must be kfold:K"),
        (
            ["--finetune-epochs", "1", "--splits", "report:2x3"],
            "splits (=report:2x3) must be kfold",
        ),
        (["--finetune-epochs", "1", "--splits", "gone.json"], "gone.json: must be a JSON file"),
        (
            ["--finetune-epochs", "1", "--splits", "other.json"],
            "must name patients of this cohort; got X9",
        ),
        (
            ["--finetune-epochs", "1", "--splits", "odd.json"],
            "split id (=a/b) must consist of letters",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    cohort: Cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    split: dict[str, Any] = {"seed": 0, "repeat": 0, "train": ["P1", "P2"], "validation": ["X9"]}
    Path("other.json").write_text(json.dumps({"a": split}))
    Path("odd.json").write_text(json.dumps({"a/b": split}))
    result = run(*extract_line(cohort, *arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_settings_name_fine_tuning_and_splits_together(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="or neither"):
        extract(cohort, tmp_path / "s.h5", SETTINGS)
    backbone = BackboneSettings(backbone="test_resnet", crop=SIDE)
    plain = ExtractSettings(backbone=backbone, precision="float32")
    with pytest.raises(SettingsError, match="or neither"):
        extract(cohort, tmp_path / "s.h5", plain, splits=splits_of(cohort, "report:1"))


# --- which split serves which --------------------------------------------------------------------


def test_splits_of_ones_own_are_all_measured(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    halves = splits_of(cohort, "report:2")
    named = [replace(split, id=id) for split, id in zip(halves, ("a", "a.1"), strict=True)]
    write_splits(named, Path("mine.json"))
    assert (
        run(*extract_line(cohort, "--finetune-epochs", "1", "--splits", "mine.json")).exit_code == 0
    )
    fitted = run("fit-head", "--agg", "mean", "--epochs", "1", "--out", "run", "--json")
    assert fitted.exit_code == 0, fitted.output
    assert set(pd.read_csv("run/runs.csv")["split"]) == {"a", "a.1"}


def test_a_store_that_does_not_record_who_serves_whom(store: FeatureStore, tmp_path: Path) -> None:
    old = tmp_path / "old.h5"
    shutil.copy(store.path, old)
    with h5py.File(old, "r+") as file:
        for maps in file["features"].values():
            del maps.attrs["parents"]
    assert FeatureStore.open(old).splits == store.splits
    parents = {split.id: split.parents for split in store.splits}
    assert parents["kfold3-r0-f1+2"] == ("kfold3-r0-f1", "kfold3-r0-f2")
