"""Whose labels went into what, followed through every kind of file to everything that measures.

For each pair (what learnt from laboratory A's labels, what measures) a cohort is measured on:
laboratory A's itself and A's under other ids, which must be refused or marked as seen; and another
laboratory's that has the same ids, which must pass.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.fingerprints import patient_keys
from lymphfeat.cohort.image_folders import Cells
from lymphfeat.cohort.provenance import SKETCH_SIZE, PatientKey, Provenance
from lymphfeat.cohort.splits import Split, find_splits
from lymphfeat.comparison import compare
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.evaluation.run_provenance import PROVENANCE_FILE, RunProvenance
from lymphfeat.explanation.explanation import explain
from lymphfeat.extraction import extract
from lymphfeat.features.backbones import build_backbone, read_provenance, write_weights
from lymphfeat.features.store import FeatureStore
from lymphfeat.finetuning.initial_head import read_initial_head
from lymphfeat.fitting import fit_heads
from lymphfeat.heads.grid import resolve
from lymphfeat.model.loading import load_model
from lymphfeat.model.model import Model
from lymphfeat.pretraining.run import pretrain
from lymphfeat.reproduction import ReproductionSettings, reproduce_report
from lymphfeat.settings import (
    ExplainSettings,
    ExtractSettings,
    FitSettings,
    HeadSettings,
    PredictSettings,
)
from lymphfeat.training import train
from tests.tiny import BACKBONE, PRETRAINING, tiny_settings, write_red_cohort

SIDE = 112
LABELS = "010101010101"
EXTRACT = ExtractSettings(
    backbone=BACKBONE, precision="float32", device="cpu", threads=1, batch_size=16
)
FIT = FitSettings(seeds=1, folds=3, epochs=1, device="cpu", threads=1)
HEADS = [resolve(HeadSettings(agg="mean"))]
TRAINED = tuple(f"P{number}" for number in range(8))  # of laboratory A


def write_lab(root: Path, seed: int, prefix: str = "P") -> Cohort:
    """Write a laboratory's cohort; the same seed gives the same patients, under any ids."""
    return Cohort.load(write_red_cohort(root, LABELS, side=SIDE, seed=seed, prefix=prefix))


@dataclass(frozen=True, kw_only=True)
class World:
    """The cohorts, and what learnt from laboratory A's first eight patients."""

    root: Path
    cohorts: dict[str, Cohort]
    sources: dict[str, Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    cohorts = {
        "same": write_lab(root / "a", 0),
        "renamed": write_lab(root / "renamed", 0, prefix="Q"),
        "another": write_lab(root / "b", 1),
    }
    third = write_lab(root / "c", 2, prefix="R")
    split = Split(id="half", seed=0, repeat=0, train=TRAINED, validation=("P8", "P9", "P10", "P11"))
    tuning = replace(EXTRACT, finetune=tiny_settings(epochs=1))
    extract(cohorts["same"], root / "tuned.h5", tuning, splits=[split])
    tuned = root / "tuned.h5.backbones" / "half" / "backbone.safetensors"
    pretrained = root / "pretrained.safetensors"
    pretrain(Cells.find(third.root), pretrained, replace(PRETRAINING, init=str(tuned), epochs=1))
    train(cohorts["same"].select(TRAINED), root / "model", tiny_settings(epochs=1))
    inheriting = tiny_settings(epochs=1, backbone=replace(BACKBONE, weights=str(pretrained)))
    train(third, root / "heir", inheriting)
    train(third, root / "members", inheriting, folds=2)
    frozen = extract(cohorts["same"], root / "frozen.h5", EXTRACT)
    fit_heads(frozen, HEADS, FIT, root / "run", splits=[split], save=True)
    resnet, _ = build_backbone("resnet18", weights="none")
    write_weights(resnet, root / "resnet.safetensors", {"provenance": _facts(pretrained)})
    return World(
        root=root,
        cohorts=cohorts,
        sources={
            "fine-tuned weights": tuned,
            "weights pre-trained from fine-tuned ones": pretrained,
            "resnet18 of that descent": root / "resnet.safetensors",
            "run": root / "run",
            "model": root / "model",
            "model trained from such weights": root / "heir",
            "members trained from such weights": root / "members",
        },
    )


def _facts(weights: Path) -> dict[str, object]:
    return read_provenance(weights).to_json()


# --- consumers: (source, cohort, an empty folder) -------------------------------------------------


def _store(source: Path, cohort: Cohort, out: Path) -> FeatureStore:
    backbone = replace(BACKBONE, weights=str(source))
    return extract(cohort, out / "s.h5", replace(EXTRACT, backbone=backbone))


def fit_heads_on(source: Path, cohort: Cohort, out: Path) -> None:
    fit_heads(_store(source, cohort, out), HEADS, FIT, out / "run")


def fine_tune_from(source: Path, cohort: Cohort, out: Path) -> None:
    backbone = replace(BACKBONE, weights=str(source))
    settings = replace(EXTRACT, backbone=backbone, finetune=tiny_settings(epochs=1))
    splits = find_splits("kfold:2", cohort.ids, cohort.labels)
    extract(cohort, out / "s.h5", settings, splits=splits)


def train_folds_from(source: Path, cohort: Cohort, out: Path) -> None:
    settings = tiny_settings(epochs=1, backbone=replace(BACKBONE, weights=str(source)))
    train(cohort, out / "m", settings, folds=2)


def train_with_validation_from(source: Path, cohort: Cohort, out: Path) -> None:
    settings = tiny_settings(epochs=1, backbone=replace(BACKBONE, weights=str(source)))
    train(cohort, out / "m", replace(settings, validation=0.5))


def reproduce_with(source: Path, cohort: Cohort, out: Path) -> None:
    settings = ReproductionSettings(
        backbones=("resnet18",),
        weights={"": str(source)},
        fit=replace(FIT, seeds=1),
        precision="float32",
    )
    reproduce_report(cohort, settings, out / "r", out)


def start_folds_from_run(source: Path, cohort: Cohort, out: Path) -> None:
    train(cohort, out / "m", tiny_settings("mean", epochs=1, init_head=str(source)), folds=2)


def start_validated_from_run(source: Path, cohort: Cohort, out: Path) -> None:
    settings = tiny_settings("mean", epochs=1, init_head=str(source), validation=0.5)
    train(cohort, out / "m", settings)


def compare_run_on(source: Path, cohort: Cohort, out: Path) -> None:
    """Compare a run of these patients, with provenance as if its features came from the source."""
    split = find_splits("kfold:3", cohort.ids, cohort.labels)
    store = extract(cohort, out / "s.h5", EXTRACT)
    fit_heads(store, HEADS, FIT, out / "run", splits=split)
    honest = RunProvenance.of([store])
    planted = replace(honest, features={"frozen": read_provenance(source)})
    (out / "run" / PROVENANCE_FILE).write_text(json.dumps(planted.to_json()))
    compare([out / "run"])


def predict_by(source: Path, cohort: Cohort, out: Path) -> None:
    model = load_model(source)
    patients = model.predict(cohort, PredictSettings(device="cpu")).patients
    assert patients["seen"].tolist() == model.seen(patient_keys(cohort))
    _refuse_marked(patients["seen"].tolist(), set(model.measure(patients)))


def explain_by(source: Path, cohort: Cohort, out: Path) -> None:
    explanation = explain(Model.load(source), cohort, ExplainSettings(device="cpu"))
    _refuse_marked(explanation.patients["seen"].tolist(), set(explanation.metrics()))


def _refuse_marked(seen: list[str], groups: set[str]) -> None:
    """Turn the marks of what was seen into what a refusal would say."""
    if groups == {"new"}:
        assert set(seen) <= {"no", "images"}
        return
    assert groups == {"train", "new"}
    assert seen == ["label"] * 8 + ["no"] * 4
    raise LeakageError("8 patients marked: it learnt from the labels of them")


WEIGHTS = ("fine-tuned weights", "weights pre-trained from fine-tuned ones")
ON_WEIGHTS: tuple[Callable[[Path, Cohort, Path], None], ...] = (
    fit_heads_on,
    fine_tune_from,
    train_folds_from,
    train_with_validation_from,
    compare_run_on,
)
PAIRS = [
    *((source, consumer) for source in WEIGHTS for consumer in ON_WEIGHTS),
    ("resnet18 of that descent", reproduce_with),
    ("run", start_folds_from_run),
    ("run", start_validated_from_run),
    ("model", predict_by),
    ("model", explain_by),
    ("model trained from such weights", predict_by),
    ("model trained from such weights", explain_by),
    ("members trained from such weights", predict_by),
]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("source", "consumer"), PAIRS, ids=[f"{s} x {c.__name__}" for s, c in PAIRS]
)
@pytest.mark.parametrize("lab", ["same", "renamed", "another"])
def test_a_label_that_was_learnt_from_is_not_measured_on(
    world: World,
    source: str,
    consumer: Callable[[Path, Cohort, Path], None],
    lab: str,
    tmp_path: Path,
) -> None:
    measure = partial(consumer, world.sources[source], world.cohorts[lab], tmp_path)
    if lab == "another":
        measure()
        return
    with pytest.raises(LeakageError, match=r"learnt from the labels of|did not train on"):
        measure()


def test_every_file_names_whose_labels_and_images_it_comes_from(world: World) -> None:
    tuned = read_provenance(world.sources["fine-tuned weights"])
    assert tuned.label_ids == TRAINED
    assert tuned.labels == patient_keys(world.cohorts["same"])[:8]
    pretrained = read_provenance(world.sources["weights pre-trained from fine-tuned ones"])
    assert pretrained.labels == tuned.labels
    assert {key.id for key in pretrained.images} == {f"R{number}" for number in range(12)}
    heir = Model.load(world.sources["model trained from such weights"]).facts
    assert set(heir.provenance.label_ids) == {*TRAINED, *heir.trained_on}
    assert heir.provenance.images == pretrained.images
    run = RunProvenance.read(world.sources["run"])
    assert run.features["frozen"] == Provenance()
    assert set(run.patients) == set(world.cohorts["same"].ids)


def test_a_checkpoint_names_whose_labels_it_comes_from(world: World, tmp_path: Path) -> None:
    settings = tiny_settings(
        epochs=100_000,
        backbone=replace(BACKBONE, weights=str(world.sources["fine-tuned weights"])),
    )

    def stop(done: int, total: int, text: str = "") -> None:
        if "epoch 3/" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(world.cohorts["another"], tmp_path / "m", settings, progress=stop)
    (path,) = tmp_path.rglob("checkpoint.pt")
    content = torch.load(path, weights_only=True)
    found = Provenance.from_json(json.loads(content["provenance"]))
    both = (*patient_keys(world.cohorts["same"])[:8], *patient_keys(world.cohorts["another"]))
    assert found == Provenance(labels=both)


def test_a_patient_is_known_again_with_images_added_and_removed(world: World) -> None:
    (key, *_) = [key for key in patient_keys(world.cohorts["same"]) if len(key.images) >= 3]
    seen = Provenance(labels=(key,))
    fewer = PatientKey.of("X", key.images[1:])
    more = PatientKey.of("Y", [*key.images, "0" * 32])
    assert seen.labelled([fewer, more]) == ("X", "Y")


@pytest.mark.seconds
def test_runs_of_two_cohorts_are_not_compared(world: World, tmp_path: Path) -> None:
    for name in ("same", "another"):
        store = extract(world.cohorts[name], tmp_path / f"{name}.h5", EXTRACT)
        fit_heads(store, HEADS, FIT, tmp_path / name)
    with pytest.raises(SettingsError, match="have different images of P"):
        compare([tmp_path / "same", tmp_path / "another"])


@pytest.mark.seconds
def test_a_head_to_begin_with_is_chosen_without_those_held_out(
    world: World, tmp_path: Path
) -> None:
    """With several heads, the choice is the one made inside training patients, or refused.

    Here the two disagree: the best row of the summary is not what the splits chose inside.
    """
    cohort = world.cohorts["same"]
    store = extract(cohort, tmp_path / "s.h5", EXTRACT)
    heads = [resolve(HeadSettings(agg="mean", lr=lr)) for lr in (1e-3, 1e-1)]
    honest = replace(FIT, folds=3, epochs=3)
    fit_heads(store, heads, honest, tmp_path / "honest", save=True)
    runs = pd.read_csv(tmp_path / "honest" / "runs.csv", keep_default_na=False)
    rows = json.loads((tmp_path / "honest" / "summary.json").read_text())
    best, other = [row["head"] for row in rows if row["kind"] == "head"]
    runs.loc[runs["kind"] == "selected", "chosen"] = other
    runs.to_csv(tmp_path / "honest" / "runs.csv", index=False)
    fold = find_splits("kfold:3", cohort.ids, cohort.labels)[0]
    held_out = patient_keys(cohort.select(fold.validation))
    sha256 = store.recipe["weights_sha256"]
    assert read_initial_head(tmp_path / "honest", held_out, sha256).name == other
    assert read_initial_head(tmp_path / "honest", (), sha256).name == best
    report = replace(honest, protocol="report", folds=5)
    splits = find_splits("kfold:3", cohort.ids, cohort.labels)
    fit_heads(store, heads, report, tmp_path / "report", splits=splits, save=True)
    settings = tiny_settings("mean", epochs=1)
    train(cohort, tmp_path / "m", replace(settings, init_head=str(tmp_path / "honest")), folds=3)
    with pytest.raises(SettingsError, match="a choice among linear heads made within"):
        train(
            cohort, tmp_path / "n", replace(settings, init_head=str(tmp_path / "report")), folds=3
        )


# --- laws ----------------------------------------------------------------------------------------

HASHES = st.text("0123456789abcdef", min_size=32, max_size=32)
KEYS = st.builds(
    PatientKey.of, st.text("PQ19", min_size=1, max_size=2), st.lists(HASHES, max_size=20)
)
PROVENANCES = st.builds(
    Provenance, labels=st.lists(KEYS).map(tuple), images=st.lists(KEYS).map(tuple)
)


@pytest.mark.seconds
@given(PROVENANCES)
def test_round_trip_through_json(provenance: Provenance) -> None:
    assert Provenance.from_json(json.loads(json.dumps(provenance.to_json()))) == provenance


@pytest.mark.seconds
@given(PROVENANCES, PROVENANCES)
def test_a_union_has_seen_what_either_has(one: Provenance, other: Provenance) -> None:
    whole = one | other
    keys = [*one.labels, *one.images, *other.labels, *other.images]
    for key in keys:
        assert whole.has_label_of(key) == (one.has_label_of(key) or other.has_label_of(key))
        assert whole.has_images_of(key)


@given(KEYS)
def test_a_key_is_of_bounded_size(key: PatientKey) -> None:
    assert len(key.images) <= SKETCH_SIZE


def test_files_without_hashes_are_compared_by_id() -> None:
    old = Provenance.of_ids(labels=["P1"])
    assert old.labelled([PatientKey.of("P1", ["ab"]), PatientKey(id="P2")]) == ("P1",)
    hashed = Provenance(labels=(PatientKey.of("P1", ["ab"]),))
    assert hashed.labelled([PatientKey(id="P1"), PatientKey.of("P1", ["cd"])]) == ("P1",)
