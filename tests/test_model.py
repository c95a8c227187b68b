"""The portable model: saved, loaded, damaged, applied."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import NORMALIZATIONS, decode_crop
from lymphfeat.cohort.provenance import PatientKey, Provenance
from lymphfeat.errors import ModelError, WeightsError
from lymphfeat.evaluation.calibration import Calibration
from lymphfeat.evaluation.decision import Decision
from lymphfeat.features.backbones import build_backbone
from lymphfeat.features.views import normalize
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.stack import HeadStack
from lymphfeat.model.facts import TrainingFacts
from lymphfeat.model.loading import load_model
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import Predictions
from lymphfeat.model.scoring import ModelRecipe
from lymphfeat.runtime.files import unfinished_folder
from lymphfeat.settings import HeadSettings, PredictSettings, Unit
from tests.folders import contents, interrupt_swap, names_in
from tests.rounding import MORE_THAN_FLOAT32, bfloat16_tolerance
from tests.tiny import SIDE, write_red_cohort

AGGS = ["mean", "max", "lse", "bnsigmoid", "top1", "topk", "topbottomk"]


def make_model(agg: str = "bnsigmoid", unit: Unit = "", k_agg: int = 2) -> Model:
    backbone, _ = build_backbone("test_efficientnet", image_size=SIDE)
    generator = torch.Generator().manual_seed(0)
    weight = 20 * torch.randn(1, backbone.channels, generator=generator)
    settings = resolve(HeadSettings(agg=agg, unit=unit, k_agg=k_agg))
    head = HeadStack([settings], weight, torch.zeros(1))
    head.running_mean.fill_(0.3)
    head.running_var.fill_(0.1)
    return Model(
        backbone,
        head,
        recipe=ModelRecipe(
            backbone="test_efficientnet",
            output_stride=None,
            crop=SIDE,
            normalization=NORMALIZATIONS["challenge"],
        ),
        facts=TrainingFacts(
            trained_on=("P0", "P1"),
            validated_on=(PatientKey(id="P2"),),
            provenance=Provenance.of_ids(labels=("P0", "P1")),
            epochs=3,
        ),
    )


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path / "cohort", "01010??"))


def reference_logits(model: Model, path: Path) -> torch.Tensor:
    """Score one image by itself: (h · w,) pixel logits."""
    with torch.no_grad():
        return logits_of(model, model.backbone(pixels_of(model, [path]))).flatten()


def pixels_of(model: Model, paths: Sequence[Path]) -> torch.Tensor:
    """Read images as the backbone sees them: (n, 3, H, W)."""
    pixels = torch.from_numpy(np.stack([decode_crop(path, SIDE).pixels for path in paths]))
    return normalize(pixels, model.recipe.normalization)


def logits_of(model: Model, maps: torch.Tensor) -> torch.Tensor:
    """Score the pixels (n, h, w) of maps (n, C, h, w)."""
    assert isinstance(model.head, HeadStack)
    scorer = model.head.weight[0].view(-1, 1, 1)
    logits: torch.Tensor = (maps * scorer).sum(1) + model.head.bias[0]
    return logits


def test_loading_reads_no_shipped_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, _ = build_backbone("resnet18", weights="none", image_size=SIDE)
    tiny = make_model()
    model = Model(
        backbone,
        HeadStack([tiny.head_settings], torch.ones(1, backbone.channels), torch.zeros(1)),
        recipe=replace(tiny.recipe, backbone="resnet18"),
        facts=tiny.facts,
    )
    model.save(tmp_path)
    monkeypatch.setattr("lymphfeat.features.shipped_weights._FOLDER", tmp_path / "gone")
    with pytest.raises(WeightsError):
        build_backbone("resnet18", image_size=SIDE)
    weight = Model.load(tmp_path).backbone.state_dict()["model.conv1.weight"]
    assert torch.equal(weight, backbone.state_dict()["model.conv1.weight"])


@pytest.mark.seconds
@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("unit", ["pixel", "image"])
def test_predictions_against_image_by_image(agg: str, unit: Unit, cohort: Cohort) -> None:
    model = make_model(agg, unit)
    predictions = model.predict(cohort, PredictSettings(batch_size=4))
    images = predictions.images
    assert images.groupby("patient")["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    for patient, paths in zip(cohort.ids, cohort.images, strict=True):
        mine = images[images["patient"] == patient]
        assert list(mine["image"]) == [path.name for path in paths]
        logits = torch.stack([reference_logits(model, path) for path in paths])  # (n, U)
        expected = logits.mean(1).numpy()
        np.testing.assert_allclose(mine["logit"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mine["probability"], 1 / (1 + np.exp(-expected)), rtol=1e-4)
        if agg in ("mean", "bnsigmoid"):  # the weights shown are the weights that decide
            _check_weighted(model, patient, logits, mine, predictions.patients, unit)
    assert ((predictions.patients["probability"] > 0.5) == predictions.patients["predicted"]).all()


def _check_weighted(
    model: Model,
    patient: str,
    logits: torch.Tensor,
    images: pd.DataFrame,
    patients: pd.DataFrame,
    unit: Unit,
) -> None:
    instances = logits if unit == "pixel" else logits.mean(1, keepdim=True)  # (n, U)
    raw = torch.ones_like(instances)
    if model.head_settings.agg == "bnsigmoid":
        raw = ((instances - 0.3) / np.sqrt(0.1 + 1e-5)).sigmoid()
    weights = raw / raw.sum()
    np.testing.assert_allclose(images["weight"], weights.sum(1), rtol=1e-3, atol=1e-6)
    probability = patients.set_index("id").loc[patient, "probability"]
    assert probability == pytest.approx(float((weights * instances).sum().sigmoid()), rel=1e-4)


@pytest.mark.seconds
@pytest.mark.parametrize("agg", AGGS)
def test_bfloat16_is_as_near_as_its_roundings_allow(agg: str, cohort: Cohort) -> None:
    model = make_model(agg, "image")
    exact, rough = (
        model.predict(cohort, PredictSettings(device="cpu", precision=precision))
        for precision in ("float32", "bfloat16")
    )
    moved = (rough.images["logit"] - exact.images["logit"]).abs().to_numpy()  # (N,)
    tolerance = bfloat16_tolerance(
        model.backbone,
        pixels_of(model, [path for paths in cohort.images for path in paths]),
        model.backbone.parameters(),
        lambda maps: logits_of(model, maps).mean((1, 2)),
    )
    assert (moved <= tolerance).all()
    assert moved.max() > MORE_THAN_FLOAT32 * tolerance.max()
    # The patients are read out in float32, of whatever logits there are.
    logits = torch.tensor(rough.images["logit"].to_numpy())[:, None, None]
    expected = model.head.read_out(logits, Bags.of(cohort.n_images)).probability
    np.testing.assert_allclose(rough.patients["probability"], expected, rtol=1e-5)
    if agg != "bnsigmoid":  # whose weights move, too; else no more than the logit that moves most
        changed = (rough.patients["probability"] - exact.patients["probability"]).abs()
        worst = np.maximum.reduceat(tolerance, cohort.offsets[:-1])
        assert (changed <= worst / 4).all()  # the logistic's steepest slope


def test_auto_is_one_of_them_and_float32_the_default(auto_precision: str, cohort: Cohort) -> None:
    model = make_model()
    by_name = {
        name: model.predict(cohort, PredictSettings(device="cpu", precision=name)).images
        for name in ("float32", "bfloat16", "auto")
    }
    pd.testing.assert_frame_equal(by_name["auto"], by_name[auto_precision])
    pd.testing.assert_frame_equal(
        model.predict(cohort, PredictSettings(device="cpu")).images, by_name["float32"]
    )
    assert not by_name["float32"].equals(by_name["bfloat16"])


def test_top1_reads_the_highest_image(cohort: Cohort) -> None:
    predictions = make_model("top1").predict(cohort)
    highest = predictions.images.groupby("patient")["probability"].max()
    expected = highest[predictions.patients["id"]].to_numpy()
    np.testing.assert_allclose(predictions.patients["probability"], expected, rtol=1e-6)


@pytest.mark.parametrize("agg", ["bnsigmoid", "topk"])
def test_a_patient_depends_on_no_other(agg: str, cohort: Cohort) -> None:
    model = make_model(agg)
    whole = model.predict(cohort, PredictSettings(batch_size=3)).patients.set_index("id")
    for patient in cohort.ids:
        alone = model.predict(cohort.select([patient])).patients
        # to rounding: batches of other sizes add up in another order
        assert alone["probability"][0] == pytest.approx(whole.loc[patient, "probability"], rel=1e-4)


@pytest.mark.parametrize("agg", AGGS)
def test_order_of_images_is_nothing(agg: str, cohort: Cohort) -> None:
    model = make_model(agg)
    forward = model.predict(cohort)
    backward = model.predict(
        replace(cohort, images=tuple(tuple(reversed(paths)) for paths in cohort.images))
    )
    np.testing.assert_allclose(
        forward.patients["probability"], backward.patients["probability"], rtol=1e-5
    )
    keys = ["patient", "image"]
    pd.testing.assert_frame_equal(
        forward.images.sort_values(keys, ignore_index=True),
        backward.images.sort_values(keys, ignore_index=True),
        rtol=1e-3,
    )


def test_tta_is_the_mean_over_flips(cohort: Cohort) -> None:
    model = make_model()
    plain = model.predict(cohort).patients["probability"]
    tta = model.predict(cohort, PredictSettings(tta=True))
    assert np.abs(plain - tta.patients["probability"]).max() > 1e-5
    assert tta.images.groupby("patient")["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    model.tta = True
    pd.testing.assert_frame_equal(model.predict(cohort).patients, tta.patients)


def test_labels_are_not_needed(cohort: Cohort) -> None:
    unlabelled = replace(cohort, table=cohort.table.assign(label=-1))
    model = make_model()
    with_labels, without = model.predict(cohort).patients, model.predict(unlabelled).patients
    assert without["label"].isna().all()
    assert list(with_labels["label"].isna()) == [False] * 5 + [True] * 2
    pd.testing.assert_series_equal(with_labels["probability"], without["probability"])


def test_measure_keeps_training_patients_apart(cohort: Cohort) -> None:
    model = make_model()
    patients = model.predict(cohort).patients
    patients["probability"] = [0.9, 0.1, 0.2, 0.7, 0.4, 0.9, 0.9]
    measured = model.measure(patients)
    assert {group: values["patients"] for group, values in measured.items()} == {
        "train": 2,
        "validation": 1,
        "new": 2,
    }
    assert measured["train"]["auc"] == 0
    assert measured["validation"]["auc"] is None
    assert measured["new"]["ba"] == 1


def test_save_and_load(tmp_path: Path, cohort: Cohort) -> None:
    model = make_model("topk")
    model.save(tmp_path / "a" / "model")
    loaded = Model.load(tmp_path / "a" / "model")
    assert sorted(path.name for path in (tmp_path / "a" / "model").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]
    assert (loaded.recipe, loaded.facts, loaded.head_settings) == (
        model.recipe,
        model.facts,
        model.head_settings,
    )
    pd.testing.assert_frame_equal(loaded.predict(cohort).images, model.predict(cohort).images)


def test_predictions_are_read_as_written(tmp_path: Path, cohort: Cohort) -> None:
    predictions = make_model().predict(cohort)
    predictions.patients.loc[0, "id"] = "NA"  # an id like any other
    predictions.save(tmp_path / "p.csv", tmp_path / "i.csv")
    read = Predictions.read(tmp_path / "p.csv", tmp_path / "i.csv")
    assert list(read.patients["id"]) == list(predictions.patients["id"])
    assert list(read.patients["label"].isna()) == list(predictions.patients["label"].isna())
    np.testing.assert_allclose(read.images["logit"], predictions.images["logit"], rtol=1e-6)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop_facts(folder: Path) -> None:
    (folder / "model.json").unlink()


def _only_checkpoint(folder: Path) -> None:
    _drop_facts(folder)
    unfinished_folder(folder).mkdir()
    (unfinished_folder(folder) / "checkpoint.pt").touch()


def _drop_tensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _other_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)


def _no_json(folder: Path) -> None:
    (folder / "model.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_facts, "must be a folder with model.json; got none; make one with"),
        (_only_checkpoint, "holds an unfinished training: run the same"),
        (_drop_tensors, r"model.safetensors: cannot be read as this model's tensors"),
        (_cut_tensors, r"model.safetensors: cannot be read as this model's tensors"),
        (_other_tensors, "tensors must be those that model.json was written with; got others"),
        (_no_json, "model.json: is not valid JSON"),
        (lambda f: _edit(f, format="other"), "is JSON but not a lymphfeat model"),
        (
            lambda f: _edit(f, format_version=99),
            r"format_version \(=99\) must be at most 1; update",
        ),
        (lambda f: _edit(f, head={"agg": "mean", "nose": 1}), "model.json: is damaged .*nose"),
        (lambda f: _edit(f, recipe={}), "model.json: is damaged"),
        (lambda f: _edit(f, head={"agg": "nose"}), "model.json: is damaged"),
    ],
)
def test_what_is_not_whole_is_refused(damage: object, message: str, tmp_path: Path) -> None:
    make_model().save(tmp_path / "m")
    assert callable(damage)
    damage(tmp_path / "m")
    with pytest.raises(ModelError, match=message) as caught:
        Model.load(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_a_model_is_found_whose_writer_was_killed_between_the_renames(tmp_path: Path) -> None:
    make_model().save(tmp_path / "m")
    before = contents(tmp_path)
    interrupt_swap(tmp_path / "m")
    assert Model.load(tmp_path / "m").threshold == make_model().threshold
    assert contents(tmp_path) == before
    interrupt_swap(tmp_path / "m")
    assert load_model(tmp_path / "m").threshold == make_model().threshold
    assert contents(tmp_path) == before
    assert names_in(tmp_path) == {"m"}


def test_a_diverged_model_names_the_image(cohort: Cohort) -> None:
    model = make_model()
    assert isinstance(model.head, HeadStack)
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"P0/0.png: the model's score must be a finite number"):
        model.predict(cohort)


def test_a_probability_is_called_as_it_is_stored() -> None:
    """In float32, .1 is above .1: it is called so in tables and in metrics alike."""
    probability = np.array([0.1, 0.09], np.float32)
    patients = pd.DataFrame({"id": ["P0", "P1"], "probability": probability})
    decision = Decision(threshold=0.1, calibration=Calibration(slope=2))
    found = Predictions(patients=patients, images=pd.DataFrame()).decided(decision).patients
    assert found["predicted"].tolist() == [1, 0]
    expected = decision.calibrate(probability.astype(np.float64))
    assert found["calibrated"].to_numpy() == pytest.approx(expected)
