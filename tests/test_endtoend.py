"""End-to-end training: what it learns, writes, repeats and resumes."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import NORMALIZATIONS, decode_crop
from lymphfeat.errors import CohortError, ModelError, OutputError, SettingsError
from lymphfeat.features.backbones import build_backbone, stages
from lymphfeat.features.views import normalize
from lymphfeat.finetuning import pixels as pixels_module
from lymphfeat.finetuning.encoder import Encoder, batchnorms
from lymphfeat.finetuning.fine_tuners import FINE_TUNERS, FineTuner, full_batches
from lymphfeat.finetuning.gradients import LossOf
from lymphfeat.finetuning.job import hold_out, prepare
from lymphfeat.finetuning.pixels import ImageBatch, PixelCache, Roster, as_they_are
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.registry import AGGREGATORS
from lymphfeat.heads.stack import HeadStack, initial_scorer
from lymphfeat.model.model import Model
from lymphfeat.model.predictions import Predictions
from lymphfeat.runtime.files import unfinished_folder
from lymphfeat.settings import (
    BackboneSettings,
    EndToEndSettings,
    HeadSettings,
    OutputStride,
    PredictSettings,
    RankingLoss,
)
from lymphfeat.training import train
from tests.folders import contents
from tests.rounding import MORE_THAN_FLOAT32, bfloat16_tolerance
from tests.tiny import SIDE, tiny_settings, write_red_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.load(write_red_cohort(tmp_path_factory.mktemp("red")))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


# --- what a run writes ---------------------------------------------------------------------------


@pytest.mark.seconds
def test_learns_and_writes_everything(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "models" / "red"
    model = train(cohort, out, tiny_settings(epochs=12))
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.csv",
        "curves.png",
        "images.csv",
        "model.json",
        "model.safetensors",
        "predictions.csv",
        "submission.csv",
        "training.json",
    ]
    assert model.facts.metrics["train"]["auc"] == 1
    assert model.facts.trained_on == tuple(f"P{n}" for n in range(10))
    assert (out / "submission.csv").read_text() == "Id,Predicted\nP10,0\nP11,1\n"
    written = Predictions.read(out / "predictions.csv", out / "images.csv")
    assert list(written.patients["split"]) == ["train"] * 10 + ["unlabelled"] * 2
    again = Model.load(out).predict(cohort, PredictSettings(device="cpu", threads=1))
    np.testing.assert_array_equal(
        again.patients["probability"], written.patients["probability"].astype(np.float32)
    )
    pd.testing.assert_frame_equal(again.images, written.images, check_dtype=False)
    curves = pd.read_csv(out / "curves.csv")
    assert list(curves["epoch"]) == list(range(1, 13))
    assert curves["loss"].iloc[-1] < curves["loss"].iloc[0] / 2
    told = json.loads((out / "model.json").read_text())
    fitted = written.patients.loc[written.patients["split"] == "train", "probability"]
    assert told["threshold"] == pytest.approx(fitted.mean(), rel=1e-6)
    assert "the 10 training patients, as the model fits them" in told["threshold_from"]
    assert (written.patients["predicted"] == again.patients["predicted"]).all()
    assert model.metrics["train"]["ba"] == 1


@pytest.mark.seconds
def test_what_bfloat16_trained_predicts_in_float32(cohort: Cohort, tmp_path: Path) -> None:
    """The folder's predictions are those that `predict` gives of it by default."""
    model = train(cohort, tmp_path, tiny_settings(epochs=8, precision="bfloat16"))
    assert model.facts.metrics["train"]["auc"] == 1
    assert model.facts.settings["precision"] == "bfloat16"
    written = Predictions.read(tmp_path / "predictions.csv", tmp_path / "images.csv")
    loaded = Model.load(tmp_path)
    again = loaded.predict(cohort, PredictSettings(device="cpu", threads=1))
    for found, expected in ((again.images, written.images), (again.patients, written.patients)):
        np.testing.assert_array_equal(
            found["probability"], expected["probability"].astype(np.float32)
        )
    rough = loaded.predict(cohort, PredictSettings(device="cpu", threads=1, precision="bfloat16"))
    assert not np.array_equal(rough.images["probability"], again.images["probability"])


@pytest.mark.seconds
def test_the_loss_in_bfloat16_is_as_near_as_its_roundings_allow(
    cohort: Cohort, tmp_path: Path
) -> None:
    """One step on all labelled images together, batch-norm in training."""
    labelled = cohort.labelled()
    whole = tiny_settings("mean", epochs=1, batch_size=10, max_backward_size=99, flips=False)
    losses = {}
    for precision in ("float32", "bfloat16"):
        train(labelled, tmp_path / precision, replace(whole, precision=precision))
        losses[precision] = float(pd.read_csv(tmp_path / precision / "curves.csv")["loss"][0])
    job = prepare(labelled, hold_out(labelled, whole), whole)
    network, head = job.model.backbone.train(), job.model.head
    labels = torch.tensor(labelled.labels).float()

    def loss_of(maps: torch.Tensor) -> torch.Tensor:
        logits = head.keep(maps.flatten(2).mT)[:, :, 0].mean(1, keepdim=True)  # (N, 1)
        patients = Bags.of(labelled.n_images).mean(logits)[:, 0]  # (P,)
        return binary_cross_entropy_with_logits(patients, labels)[None]

    pixels = [decode_crop(path, SIDE).pixels for paths in labelled.images for path in paths]
    images = normalize(torch.from_numpy(np.stack(pixels)), job.model.recipe.normalization)
    with torch.no_grad():
        assert losses["float32"] == pytest.approx(float(loss_of(network(images))), rel=1e-5)
    tolerance = bfloat16_tolerance(network, images, network.parameters(), loss_of)
    moved = abs(losses["bfloat16"] - losses["float32"])
    assert MORE_THAN_FLOAT32 * tolerance < moved <= tolerance


@pytest.mark.seconds
@pytest.mark.parametrize(
    "settings",
    [
        tiny_settings("top1", epochs=16),
        tiny_settings(epochs=8, gradient="exact", no_grad_batchnorm="eval", head_lr=0.01),
        tiny_settings("mean", epochs=8, images_per_patient=2),
    ],
    ids=["top1", "exact", "drawn"],
)
def test_other_ways_learn_too(settings: EndToEndSettings, cohort: Cohort, tmp_path: Path) -> None:
    model = train(cohort, tmp_path, settings)
    assert (model.facts.metrics["train"]["auc"] or 0) > 0.9


@pytest.mark.seconds
@pytest.mark.parametrize(
    "head",
    [
        HeadSettings(agg="top1", unit="pixel", lr=1e-3),
        HeadSettings(agg="topk", loss="bag", k_train=3, lr=1e-3),
        HeadSettings(agg="topbottomk", k_percent=50, unit="pixel", loss="bag", lr=1e-3),
        HeadSettings(agg="max", unit="image", lr=1e-3),
        HeadSettings(agg="lse", lr=1e-3),
    ],
    ids=lambda head: f"{head.agg}-{head.loss}",
)
def test_every_head_trains(head: HeadSettings, cohort: Cohort, tmp_path: Path) -> None:
    settings = tiny_settings(head=head, epochs=1, images_per_patient=3)
    model = train(cohort, tmp_path, settings)
    backbone, _ = build_backbone("test_efficientnet", image_size=SIDE)
    before, after = backbone.state_dict(), model.backbone.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before if "weight" in key)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("name", "output_stride"), [("resnet18", 8), ("test_vit", None), ("test_efficientnet", 16)]
)
def test_every_kind_of_backbone_trains(
    name: str, output_stride: OutputStride | None, cohort: Cohort, tmp_path: Path
) -> None:
    backbone = BackboneSettings(
        backbone=name, weights="none", crop=SIDE, output_stride=output_stride
    )
    ways: dict[str, Any] = {
        "gradient": "exact",
        "colour_jitter": 0.05,
        "affine": 0.05,
        "layer_decay": 0.7,
    }
    settings = tiny_settings(backbone=backbone, epochs=1, freeze_stages=1, **ways)
    model = train(cohort, tmp_path, settings)
    first, _ = build_backbone(name, weights="none", image_size=SIDE, output_stride=output_stride)
    changed = {
        key
        for key, value in first.named_parameters()
        if not torch.equal(value, dict(model.backbone.named_parameters())[key])
    }
    frozen = {id(parameter) for parameter in stages(first)[0]}
    learning = {key for key, value in first.named_parameters() if id(value) not in frozen}
    assert changed == learning


def test_validation_patients_are_held_out(cohort: Cohort, tmp_path: Path) -> None:
    model = train(cohort, tmp_path, tiny_settings(validation=0.4))
    held_out = {key.id for key in model.facts.validated_on}
    assert len(held_out) == 4
    assert held_out.isdisjoint(model.facts.trained_on)
    assert cohort.select(held_out).labels.sum() == 2
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert set(predictions["id"][predictions["split"] == "validation"]) == held_out
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert {"train_ba", "validation_ba", "validation_log_loss"} <= set(curves.columns)
    baselines = ["baseline: majority", "baseline: bag size"]
    assert list(model.facts.metrics) == ["train", "validation", *baselines]


@pytest.mark.seconds
def test_how_often_held_out_patients_are_predicted_changes_nothing_else(
    cohort: Cohort, tmp_path: Path
) -> None:
    found = {}
    for every in (1, 2, 9):
        settings = tiny_settings(epochs=5, validation=0.4, evaluate_every=every)
        train(cohort, tmp_path / str(every), settings)
        assert_same_weights(tmp_path / "1", tmp_path / str(every))
        found[every] = pd.read_csv(tmp_path / str(every) / "curves.csv", index_col="epoch")
    judged = [name for name in found[1].columns if name.startswith("validation_")]
    for every, epochs in ((2, [2, 4, 5]), (9, [5])):
        own, others = found[every].loc[epochs, judged], found[every].drop(epochs)[judged]
        pd.testing.assert_frame_equal(own, found[1].loc[epochs, judged])
        assert others.isna().all(axis=None)
        assert (found[every]["loss"] == found[1]["loss"]).all()


def test_an_unfinished_training_may_be_judged_more_often(cohort: Cohort, tmp_path: Path) -> None:
    settings = tiny_settings(epochs=3, validation=0.4)
    interrupt(cohort, settings, tmp_path)
    train(cohort, tmp_path, replace(settings, evaluate_every=1))
    curves = pd.read_csv(tmp_path / "curves.csv")
    assert curves["validation_auc"].isna().tolist() == [True, False, False]


def test_no_submission_without_unlabelled_patients(cohort: Cohort, tmp_path: Path) -> None:
    train(cohort.labelled(), tmp_path, tiny_settings(epochs=1))
    assert not (tmp_path / "submission.csv").exists()


@pytest.mark.seconds
def test_same_seed_same_weights(cohort: Cohort, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(name) + seed)  # the global generator has no say
        train(cohort, tmp_path / name, tiny_settings(seed=seed))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


# --- resuming ------------------------------------------------------------------------------------


def stop_after(epochs: int) -> Any:
    """Return a progress callback that interrupts a training at the start of a later epoch."""

    def progress(done: int, total: int, text: str = "") -> None:
        if text.startswith(f"epoch {epochs + 1}/"):
            raise KeyboardInterrupt

    return progress


def interrupt(cohort: Cohort, settings: EndToEndSettings, out: Path, epochs: int = 1) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, settings, progress=stop_after(epochs))
    assert (unfinished_folder(out) / "checkpoint.pt").exists()


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("agg", "precision"),
    [
        *(("bnsigmoid", "float32"), ("topk", "float32"), ("topk", "bfloat16")),
        *(("mean+std", "float32"), ("mean+std", "bfloat16")),
        *(("attention", "float32"), ("lstm", "bfloat16")),
    ],
)
def test_interrupted_training_ends_with_the_same_bits(
    agg: str, precision: str, cohort: Cohort, tmp_path: Path
) -> None:
    settings = tiny_settings(
        agg, epochs=3, images_per_patient=2, validation=0.4, precision=precision
    )
    train(cohort, tmp_path / "whole", settings)
    interrupt(cohort, settings, tmp_path / "parts")
    train(cohort, tmp_path / "parts", settings)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    columns = ["epoch", "loss", "train_ba", "validation_auc"]
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "whole" / "curves.csv")[columns],
        pd.read_csv(tmp_path / "parts" / "curves.csv")[columns],
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


KILLED = """
import sys
import torch
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.finetuning import pixels as pixels_module
from lymphfeat.training import train
from tests.tiny import tiny_settings
torch.set_num_threads(1)
cohort = Cohort.load(sys.argv[1])
train(cohort, sys.argv[2], tiny_settings(epochs=int(sys.argv[3])))
"""


@pytest.mark.seconds
def test_killed_training_ends_with_the_same_bits(cohort: Cohort, tmp_path: Path) -> None:
    epochs = 30
    out = tmp_path / "killed"
    arguments = [sys.executable, "-c", KILLED, str(cohort.root), str(out), str(epochs)]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while not (unfinished_folder(out) / "checkpoint.pt").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model.json").exists()
    settings = tiny_settings(epochs=epochs)
    seen: list[str] = []
    train(cohort, out, settings, progress=lambda done, total, text="": seen.append(text))
    assert not any(text.startswith("epoch 1/") for text in seen)
    train(cohort, tmp_path / "whole", settings)
    assert_same_weights(out, tmp_path / "whole")


@pytest.mark.seconds
def test_an_unfinished_training_of_other_settings_is_kept(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "m"
    interrupt(cohort, tiny_settings(), out)
    other = tiny_settings(seed=9, images_per_patient=3)
    with pytest.raises(ModelError, match="images_per_patient is None there, 3 now; seed is 0") as e:
        train(cohort, out, other)
    assert "\n" not in str(e.value)
    elsewhere = tmp_path / "elsewhere"
    train(cohort, elsewhere, other)
    train(cohort, out, other, force=True)
    assert_same_weights(out, elsewhere)


@pytest.mark.seconds
def test_a_training_is_not_continued_in_another_precision(
    auto_precision: str, cohort: Cohort, tmp_path: Path
) -> None:
    other = {"float32": "bfloat16", "bfloat16": "float32"}[auto_precision]
    interrupt(cohort, tiny_settings(precision=other), tmp_path)
    auto = tiny_settings(precision="auto")
    with pytest.raises(ModelError, match=f"precision is {other} there, {auto_precision} now"):
        train(cohort, tmp_path, auto)
    model = train(cohort, tmp_path, auto, force=True)
    assert model.facts.settings["precision"] == auto_precision


def test_a_damaged_checkpoint_is_named(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "m"
    unfinished_folder(out).mkdir()
    (unfinished_folder(out) / "checkpoint.pt").write_bytes(b"nothing of use")
    with pytest.raises(
        ModelError, match=r"checkpoint.pt: cannot be read .* start over with --force"
    ):
        train(cohort, out, tiny_settings())
    train(cohort, out, tiny_settings(epochs=1), force=True)
    assert (out / "model.json").exists()
    assert not unfinished_folder(out).exists()


def test_a_finished_model_is_kept(cohort: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "m"
    train(cohort, out, tiny_settings(epochs=1))
    before = contents(out)
    with pytest.raises(SettingsError, match="m already holds a model; choose another --out"):
        train(cohort, out, tiny_settings(epochs=1, seed=2))
    assert contents(out) == before
    train(cohort.labelled(), out, tiny_settings(epochs=1, seed=2), force=True)
    after = contents(out)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert set(after) == set(before) - {"submission.csv"}  # the old one would be another model's


@pytest.mark.seconds
def test_the_old_model_stays_until_the_new_one_is_there(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    train(cohort, out, tiny_settings(epochs=1))
    before = contents(out)
    settings = tiny_settings(epochs=2, seed=2)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, out, settings, force=True, progress=stop_after(1))
    assert contents(out) == before

    def crash(*arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lymphfeat.training.draw_curves", crash)
        with pytest.raises(OSError, match="no space left"):
            train(cohort, out, settings, force=True)
    assert contents(out) == before
    seen: list[str] = []
    train(
        cohort, out, settings, force=True, progress=lambda done, total, text="": seen.append(text)
    )
    assert not any(text.startswith("epoch") for text in seen)  # it was trained already
    train(cohort, tmp_path / "whole", settings)
    assert_same_weights(out, tmp_path / "whole")


# --- mistakes ------------------------------------------------------------------------------------


def test_one_class_only(cohort: Cohort, tmp_path: Path) -> None:
    one = cohort.select(["P0", "P2", "P10"])
    with pytest.raises(
        CohortError,
        match=r"training needs labelled patients of both classes; got 0 tumoral .* 2 reactive",
    ):
        train(one, tmp_path, tiny_settings())
    with pytest.raises(CohortError, match="got 0 tumoral"):
        train(cohort.unlabelled(), tmp_path, tiny_settings())


def test_mistakes_are_named(cohort: Cohort, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"validation \(=0.01\) must leave patients of both"):
        train(cohort, tmp_path / "a", tiny_settings(validation=0.01))
    with pytest.raises(SettingsError, match=r"agg \(=nose\) must be one of"):
        train(cohort, tmp_path / "b", tiny_settings("nose"))
    head = HeadSettings(agg="mean", lr=1e30)
    with pytest.raises(SettingsError, match=r"lr \(=1e\+30\) must keep the loss finite"):
        train(cohort, tmp_path / "c", tiny_settings(head=head, epochs=4))
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="must be a folder; got a file"):
        train(cohort, tmp_path / "file", tiny_settings())


# --- the loops -----------------------------------------------------------------------------------


def make_fine_tuner(settings: EndToEndSettings) -> FineTuner:
    generator = torch.Generator().manual_seed(5)
    roster = Roster(
        starts=torch.tensor([0, 1, 5, 8]),
        sizes=torch.tensor([1, 4, 3, 5]),
        labels=torch.tensor([0.0, 1.0, 0.0, 1.0]),
    )
    pixels = torch.randint(0, 256, (13, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    backbone, _ = build_backbone("test_efficientnet", image_size=SIDE)
    weight, bias = initial_scorer(backbone.channels, generator)
    settings = replace(settings, head=resolve(settings.head))
    encoder = Encoder(
        backbone,
        PixelCache(pixels, NORMALIZATIONS["imagenet"], torch.device("cpu")),
        unit=settings.head.unit,
        frozen_batchnorm=settings.frozen_batchnorm,
    )
    head = HeadStack([settings.head], 10 * weight[None], bias[None])
    make = FINE_TUNERS[AGGREGATORS[settings.head.agg].family]
    return make(encoder, head, roster, settings, generator)


@pytest.mark.parametrize("loss", ["instance", "bag"])
def test_ranking_learns_from_the_highest(
    loss: RankingLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = HeadSettings(agg="topk", k_train=2, loss=loss)
    tuner = make_fine_tuner(tiny_settings(head=head, batch_size=16))
    logits = tuner.encoder.score(tuner.head, as_they_are(torch.arange(13)), 5)[:, 0, 0].tolist()
    expected = []
    for start, stop in ((0, 1), (1, 5), (5, 8), (8, 13)):
        ranked = sorted(range(start, stop), key=lambda row: -logits[row])
        expected += ranked[:2]
    batches: list[ImageBatch] = []

    def spy(batch: ImageBatch, loss_of: LossOf) -> torch.Tensor:
        batches.append(batch)
        return torch.zeros(())

    monkeypatch.setattr(tuner, "step", spy)
    result = tuner.run_epoch()
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == sorted(expected)
    assert result.images == 13 + len(expected)
    assert result.probability[0] == pytest.approx(1 / (1 + np.exp(-logits[0])), rel=1e-5)


def test_scoring_is_in_eval_mode() -> None:
    tuner = make_fine_tuner(tiny_settings())
    before = [b.clone() for layer in batchnorms(tuner.backbone) for b in layer.buffers()]
    together = tuner.encoder.score(tuner.head, as_they_are(torch.arange(13)), 13)
    apart = tuner.encoder.score(tuner.head, as_they_are(torch.arange(13)), 2)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    after = [b for layer in batchnorms(tuner.backbone) for b in layer.buffers()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_weighted_epoch_sees_each_patient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = make_fine_tuner(tiny_settings(batch_size=3))
    rows: list[int] = []
    plain = tuner.step

    def spy(batch: ImageBatch, loss_of: LossOf) -> torch.Tensor:
        rows.extend(batch.rows.tolist())
        return plain(batch, loss_of)

    monkeypatch.setattr(tuner, "step", spy)
    result = tuner.run_epoch()
    assert len(result.patients) == 3  # the fourth would be an incomplete batch
    bags = {0: range(1), 1: range(1, 5), 2: range(5, 8), 3: range(8, 13)}
    assert sorted(rows) == sorted(row for patient in result.patients for row in bags[patient])


def test_images_are_drawn_anew() -> None:
    tuner = make_fine_tuner(tiny_settings(images_per_patient=2))
    drawn = [tuner.draw(torch.tensor([3, 0])) for _ in range(20)]
    assert all(bag.sizes.tolist() == [2, 1] for bag in drawn)
    assert all(set(bag.rows[:2].tolist()) <= set(range(8, 13)) for bag in drawn)
    assert len({tuple(bag.rows.tolist()) for bag in drawn}) > 5


@given(n=st.integers(1, 60), size=st.integers(1, 20))
def test_full_batches(n: int, size: int) -> None:
    batches = list(full_batches(torch.arange(n), size))
    assert batches
    assert torch.cat(batches).tolist() == list(range(max(n // size * size, min(n, size))))
    assert len(batches) == 1 or {len(batch) for batch in batches} == {size}


# --- what learns, and how fast --------------------------------------------------------------------


def test_frozen_stages_keep_weights_and_statistics() -> None:
    tuner = make_fine_tuner(tiny_settings(freeze_stages=2))
    before = {k: v.clone() for k, v in tuner.backbone.model.state_dict().items()}
    tuner.run_epoch()
    after = tuner.backbone.model.state_dict()
    kept = {name for name, values in before.items() if torch.equal(values, after[name])}
    lowest = {name for name in before if name.startswith(("conv_stem", "bn1", "blocks.0"))}
    assert kept == lowest


def test_no_stage_left_to_learn() -> None:
    with pytest.raises(
        SettingsError, match=r"freeze_stages \(=6\) must leave at least one of the 6 stages"
    ):
        make_fine_tuner(tiny_settings(freeze_stages=6))


def test_lower_stages_learn_more_slowly() -> None:
    settings = tiny_settings(layer_decay=0.5, freeze_stages=2, head_lr=0.7)
    tuner = make_fine_tuner(settings)
    rates: dict[torch.nn.Parameter, float] = {}
    for group in tuner.optimizer.param_groups:
        rates |= dict.fromkeys(group["params"], group["lr"])
    lr = settings.head.lr
    for name, parameter in tuner.backbone.model.named_parameters():
        if parameter.requires_grad:  # blocks.1 is stage 2; the last, 5, has the last convolution
            stage = int(name[7]) + 1 if name.startswith("blocks") else 5
            assert rates[parameter] == pytest.approx(lr * 0.5 ** (5 - stage)), name
        else:
            assert parameter not in rates
    assert {rates[parameter] for parameter in tuner.head.parameters()} == {0.7}


@pytest.mark.seconds
def test_crops_that_memory_has_no_room_for_are_mapped(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings()
    train(cohort, tmp_path / "memory", settings)
    monkeypatch.setattr(pixels_module, "available_memory", lambda device: 1000)
    mapped = pixels_module._make_room((4, 3, 8, 8))
    assert isinstance(mapped, np.memmap)
    assert mapped.shape == (4, 3, 8, 8)
    train(cohort, tmp_path / "mapped", settings)
    one, two = (tmp_path / name / "model.safetensors" for name in ("memory", "mapped"))
    assert one.read_bytes() == two.read_bytes()


def test_no_room_anywhere_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_module, "available_memory", lambda device: 0)
    with pytest.raises(OutputError, match="fit neither in memory nor in the temporary folder"):
        pixels_module._make_room((2**40, 3, 112, 112))
