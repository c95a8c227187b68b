"""`lymphfeat rerun` of what is made of images: stores and models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import lymphfeat as lf
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_checks import leave_out_unusable
from lymphfeat.cohort.splits import find_splits
from lymphfeat.extraction import extract
from lymphfeat.features.backbones import build_backbone
from lymphfeat.features.store import FeatureStore
from lymphfeat.settings import BackboneSettings, ExtractSettings
from lymphfeat.training import train
from lymphfeat_cli.main import cli
from tests.folders import contents
from tests.goldens import DATA
from tests.test_json import validator
from tests.tiny import BACKBONE, tiny_settings, write_red_cohort

EXTRACTING = ExtractSettings(
    backbone=replace(BACKBONE, weights="none", weights_seed=3),
    precision="float32",
    batch_size=4,
    device="cpu",
    threads=1,
)


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A cohort with ages."""
    root = write_red_cohort(tmp_path / "red")
    head, *rows = (root / "cohort.csv").read_text().splitlines()
    aged = [f"{head},age", *(f"{row},{30 + 7 * n % 50}" for n, row in enumerate(rows))]
    (root / "cohort.csv").write_text("\n".join(aged) + "\n")
    return root


@pytest.fixture
def store(red: Path, tmp_path: Path) -> Path:
    return extract(Cohort.load(red), tmp_path / "s.h5", EXTRACTING).path


def refusal(*line: str) -> str:
    result = CliRunner().invoke(cli, ["rerun", *line])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def repaint(path: Path) -> None:
    """Change an image a little."""
    pixels = np.asarray(Image.open(path)) // 2
    Image.fromarray(pixels).save(path)


def without_origin(store: Path) -> None:
    """Make a store one of an earlier version."""
    with h5py.File(store, "r+") as file:
        del file.attrs["origin"]


# --- stores --------------------------------------------------------------------------------------


def test_a_store_is_repeated_to_the_byte(store: Path, red: Path, tmp_path: Path) -> None:
    moved = red.rename(tmp_path / "moved")
    result = CliRunner().invoke(cli, ["rerun", str(store), "--cohort", str(moved), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    validator("rerun").validate(told)
    assert [part["name"] for part in told["files"]] == [
        *("recipe", "patients", "images", "features/frozen")
    ]
    assert told["changed"] == []
    assert (tmp_path / "s-again.h5").read_bytes() == store.read_bytes()
    assert str(tmp_path).encode() not in store.read_bytes()  # nor any other path
    assert "s-again.h5 exists" in refusal(str(store), "--cohort", str(moved))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "backbone",
    [
        replace(BACKBONE, field_um=6.1, um_per_px=0.0951, stain_normalization="patient", grid=1),
        replace(BACKBONE, normalization="challenge", output_stride=16, resize=80),
    ],
)
def test_a_store_says_all_that_it_was_made_with(
    backbone: BackboneSettings, red: Path, tmp_path: Path
) -> None:
    settings = replace(EXTRACTING, backbone=backbone, views=2, batch_size=3)
    store = extract(Cohort.load(red), tmp_path / "s.h5", settings)
    found = lf.rerun(store.path, cohort=red)
    assert found.same, found.different
    assert found.out.read_bytes() == store.path.read_bytes()


def test_a_changed_image_is_told_by_patient(store: Path, red: Path) -> None:
    repaint(red / "P7" / "0.png")
    (red / "P6" / "0.png").rename(red / "P6" / "00.png")
    found = lf.rerun(store, cohort=red)
    where = {each.name: each.where for each in found.different}
    assert list(where) == ["recipe", "images", "features/frozen"]
    assert "cohort.sha256" in where["recipe"]
    assert where["images"] == "P6, P7"
    assert where["features/frozen"] == "P7"
    was, now = (FeatureStore.open(path) for path in (store, found.out))
    difference = np.abs(np.float64(was.features()) - np.float64(now.features())).max()
    assert {e.name: e.largest for e in found.files}["features/frozen"] == difference > 0
    line = ["rerun", str(store), "--cohort", str(red), "--force"]
    result = CliRunner().invoke(cli, line)
    assert result.exit_code == 1
    assert "3 of 4 parts differ" in result.stdout


def test_other_patients_and_attributes_are_told(store: Path, red: Path) -> None:
    table = (red / "cohort.csv").read_text()
    (red / "cohort.csv").write_text(table.replace("P4,0,58", "P4,1,59") + "Q1,0,40\n")
    shutil.copytree(red / "P1", red / "Q1")  # new, and no patient of the store
    (red / "P3" / "3.png").unlink()
    found = lf.rerun(store, cohort=red)
    told = {each.name: (each.largest, each.where) for each in found.different}
    assert told["patients"] == (1.0, "P4")
    assert told["images"] == (None, "P3")
    # Those of later patients are in other batches now, which may round otherwise.
    assert told["features/frozen"][1].startswith("P3")
    shutil.rmtree(red / "Q1")
    (red / "cohort.csv").write_text(table.replace("P4,", "R4,"))
    (red / "P4").rename(red / "R4")
    again = refusal(str(store), "--cohort", str(red), "--force")
    assert "must have the patients of" in again
    assert "it lacks P4" in again


@pytest.mark.seconds
def test_fine_tuned_backbones_are_trained_again(red: Path, tmp_path: Path) -> None:
    cohort = Cohort.load(red)
    settings = replace(EXTRACTING, finetune=tiny_settings(epochs=1, frozen_batchnorm=True))
    splits = find_splits("kfold:2", cohort.ids, cohort.labels, seed=3)[::-1]
    store = extract(cohort, tmp_path / "s.h5", settings, splits=splits)
    found = lf.rerun(store.path, cohort=red)
    assert found.same, found.different
    assert found.out.read_bytes() == store.path.read_bytes()

    kept = tmp_path / "s-again.h5.backbones" / splits[0].id / "backbone.safetensors"
    trained = kept.read_bytes()
    shutil.copy(tmp_path / "s-again.h5.backbones" / splits[1].id / kept.name, kept)
    assert lf.rerun(store.path, cohort=red, force=True).same
    assert kept.read_bytes() == trained

    without_origin(store.path)
    message = refusal(str(store.path), "--cohort", str(red), "--force", "--seed", "3")
    assert "in which order its backbones were fine-tuned" in message


def test_how_a_cohort_was_read_is_recorded(tmp_path: Path) -> None:
    root = write_red_cohort(tmp_path / "red")
    rows = (root / "cohort.csv").read_text().splitlines()
    born = ["id,label,dob", *(f"{row},{1940 + n}-07-01" for n, row in enumerate(rows[1:]))]
    (root / "tables").mkdir()
    (root / "tables" / "born.csv").write_text("\n".join([*born, "P99,1,1950-01-01"]) + "\n")
    (root / "P3" / "1.png").write_bytes(b"no image")
    for path in (root / "P5").iterdir():  # who is left without any
        path.write_bytes(b"no image")
    cohort = Cohort.load(
        root,
        table=root / "tables" / "born.csv",
        allow_missing=True,
        reference_date=date(2009, 1, 1),
    )
    cohort = leave_out_unusable(cohort, 64)
    store = extract(cohort, tmp_path / "s.h5", EXTRACTING)
    moved = root.rename(tmp_path / "moved")
    found = lf.rerun(store.path, cohort=moved)
    assert found.same, found.different
    assert found.out.read_bytes() == store.path.read_bytes()

    elsewhere = (moved / "tables" / "born.csv").rename(tmp_path / "born.csv")
    line = [str(store.path), "--cohort", str(moved), "--force"]
    assert "must hold the table tables/born.csv" in refusal(*line)
    assert lf.rerun(store.path, cohort=moved, table=elsewhere, force=True).same

    without_origin(store.path)
    line += ["--seed", "3", "--table", str(elsewhere), "--allow-missing"]
    assert "does not say how" in refusal(*line)
    result = CliRunner().invoke(cli, ["rerun", *line, "--reference-date", "2009-01-01"])
    assert result.exit_code == 0, result.output


def test_what_a_store_cannot_say(
    store: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LYMPHFEAT_COHORT", raising=False)
    assert "Name their folder with --cohort" in refusal(str(store))
    line = [str(store), "--cohort", str(red)]
    assert "--truth must not go with a store" in refusal(*line, "--truth", str(red / "cohort.csv"))
    same = refusal(*line, "--out", str(store))
    assert "must be another path than the store" in same
    without_origin(store)
    assert "name it with --seed" in refusal(*line)
    assert "Random ones follow from --seed" in refusal(*line, "--seed", "4")
    found = lf.rerun(store, cohort=red, seed=3)
    assert found.same
    assert found.changed == ()
    with h5py.File(store, "r+") as file:
        file.attrs["origin"] = json.dumps({"reading": {"reference_date": "soon"}})
    assert "is damaged" in refusal(*line, "--seed", "3", "--out", str(tmp_path / "t.h5"))


def test_imported_features_are_not_repeated(store: Path, tmp_path: Path) -> None:
    for line in (
        f"export {store} --format torchmil --out {tmp_path}/bags",
        f"import {tmp_path}/bags --out {tmp_path}/i.h5",
    ):
        result = CliRunner().invoke(cli, line.split())
        assert result.exit_code == 0, result.output
    assert "are made again by `lymphfeat import`" in refusal(str(tmp_path / "i.h5"))


# --- models --------------------------------------------------------------------------------------


def with_weights(red: Path, out: Path) -> None:
    path = out.with_name("w.safetensors")
    save_file(build_backbone(BACKBONE.backbone, image_size=64, seed=5)[0].model.state_dict(), path)
    settings = tiny_settings("topk", validation=0.3, backbone=replace(BACKBONE, weights=str(path)))
    train(Cohort.load(red), out, settings)


def of_folds(red: Path, out: Path) -> None:
    settings = tiny_settings(tta=True, backbone=replace(BACKBONE, weights_seed=4), seed=2)
    train(Cohort.load(red), out, settings, folds=2, submission_header="ID,LABEL")


def fused(way: str) -> Callable[[Path, Path], None]:
    def make(red: Path, out: Path) -> None:
        settings = tiny_settings("mean+std", fusion=way, attributes=("age",), epochs=1)
        train(Cohort.load(red), out, settings, folds=3)

    return make


@pytest.mark.seconds
@pytest.mark.parametrize(
    "make",
    [
        with_weights,
        pytest.param(of_folds, marks=pytest.mark.slow),
        fused("late"),
        pytest.param(fused("sum"), marks=pytest.mark.slow),
        pytest.param(fused("experts"), marks=pytest.mark.slow),
    ],
)
def test_a_model_is_repeated_to_the_byte(
    make: Callable[[Path, Path], None], red: Path, tmp_path: Path
) -> None:
    make(red, tmp_path / "m")
    assert str(red).encode() not in b"".join(contents(tmp_path / "m").values())
    moved = red.rename(tmp_path / "moved")
    result = CliRunner().invoke(
        cli, ["rerun", str(tmp_path / "m"), "--cohort", str(moved), "--json"]
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    validator("rerun").validate(told)
    assert told["changed"] == []
    assert contents(tmp_path / "m-again") == contents(tmp_path / "m")


def test_a_recalibrated_model_is_made_again_by_its_own_command(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "recalibration.json").write_text("{}")
    assert "made again by the same `lymphfeat recalibrate`" in refusal(str(tmp_path / "m"))


@pytest.mark.seconds
def test_a_model_of_an_earlier_version(red: Path, tmp_path: Path) -> None:
    of_folds(red, tmp_path / "m")
    (tmp_path / "m" / "training.json").unlink()
    found = lf.rerun(tmp_path / "m", cohort=red)
    assert found.same, found.different
    assert found.changed == ()
    repaint(red / "P7" / "0.png")
    message = refusal(str(tmp_path / "m"), "--cohort", str(red), "--force")
    assert "does not say how" in message


@pytest.mark.seconds
def test_what_a_model_was_made_of_elsewhere(red: Path, tmp_path: Path) -> None:
    with_weights(red, tmp_path / "m")
    weights = (tmp_path / "w.safetensors").rename(tmp_path / "v.safetensors")
    line = [str(tmp_path / "m"), "--cohort", str(red)]
    assert "are now with --weights" in refusal(*line)
    assert "must be those that" in refusal(*line, "--weights", "none")
    facts = json.loads((tmp_path / "m" / "model.json").read_text())
    facts["training"]["versions"]["torch"] = "1.0"  # nor is that a difference
    (tmp_path / "m" / "model.json").write_text(json.dumps(facts))
    assert lf.rerun(tmp_path / "m", cohort=red, weights=weights).same

    repaint(red / "P7" / "0.png")
    again = ["--weights", str(weights), "--threads", "2", "--force"]
    result = CliRunner().invoke(cli, ["rerun", *line, *again])
    assert result.exit_code == 1, result.output
    assert "Changed since: the images of P7 are others now." in result.stdout
    assert "Changed since: threads is 1 there, 2 now." in result.stdout
    assert "predictions.csv" in result.stdout
    assert "training.json" not in result.stdout


def test_goldens_are_read() -> None:
    cohort = str(DATA / "v0.1.0" / "cohort")
    for name in ("model", "members"):
        message = refusal(str(DATA / "v0.1.0" / name), "--cohort", cohort)
        assert "with --weights" in message
    assert "lymphfeat finalize" in refusal(str(DATA / "v0.1.0" / "final"))
    assert "must be an existing file" in refusal(str(DATA / "v0.1.0" / "run"))  # its store


def test_a_damaged_model_is_one_line(red: Path, tmp_path: Path) -> None:
    train(Cohort.load(red), tmp_path / "m", tiny_settings(epochs=1))
    for name in ("training.json", "model.json", "predictions.csv"):
        path = tmp_path / "m" / name
        whole = path.read_bytes()
        path.write_text('{"format": "lymphfeat-training"}')
        assert "is damaged" in refusal(str(tmp_path / "m"), "--cohort", str(red)), name
        path.write_bytes(whole)
