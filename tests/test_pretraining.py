"""Pre-training: pairs, probe, interruption, and what it writes."""

import csv
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lymphfeat.cohort.image_folders import Cells
from lymphfeat.errors import LymphfeatError, WeightsError
from lymphfeat.features.backbones import build_backbone, read_facts, write_weights
from lymphfeat.pretraining.pairs import PairSampler
from lymphfeat.pretraining.probe import nearest_neighbour_share
from lymphfeat.pretraining.run import Pretrained, pretrain
from lymphfeat.pretraining.vicreg import PairTrainer
from lymphfeat.settings import PretrainSettings
from tests.folders import contents
from tests.tiny import PRETRAINING


def write_cells(root: Path, n: int = 24) -> Path:
    """Write two folders of n / 2 noisy cells: reddish discs and greenish ones."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :48]
    disc = (rows - 24) ** 2 + (columns - 24) ** 2 < 15**2
    for index in range(n):
        colour = index % 2
        pixels = rng.integers(100, 200, (48, 48, 3))
        pixels[disc, colour] = 30
        path = root / ("red", "green")[colour] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


# --- pairs ---------------------------------------------------------------------------------------

GROUPS = torch.tensor([0] * 5 + [1] + [2] * 30)


def sampler(same_group: float, balanced: bool = False) -> PairSampler:
    generator = torch.Generator().manual_seed(0)
    return PairSampler(GROUPS, same_group=same_group, balanced=balanced, generator=generator)


def test_partners_are_the_anchors_unless_pairs_of_a_group_are_asked_for() -> None:
    anchors, partners = sampler(0.0).draw(20)
    assert torch.equal(anchors, partners)
    assert len(set(anchors.tolist())) == 20


def test_partners_of_a_group_are_drawn_from_all_of_it() -> None:
    pairs, draw = set(), sampler(1.0)
    for _ in range(100):
        anchors, partners = draw.draw(36)
        assert torch.equal(GROUPS[anchors], GROUPS[partners])
        pairs.update(partners[anchors == 0].tolist())
    assert pairs == set(range(5))


def test_share_of_patient_pairs() -> None:
    draw = sampler(0.3)
    differ = [(a != p).float().mean() for a, p in (draw.draw(36) for _ in range(200))]
    # A partner may be the anchor by chance: 1/5, 1 and 1/30 of the draws in the three groups.
    assert float(torch.stack(differ).mean()) == pytest.approx(0.3 * (4 + 0 + 29) / 36, abs=0.02)


def test_balanced_draws_rare_groups_more_often() -> None:
    draw = sampler(0.0, balanced=True)
    drawn = torch.cat([GROUPS[draw.draw(1)[0]] for _ in range(4000)])
    expected = GROUPS.bincount().float().sqrt()  # n · n^-1/2
    observed = drawn.bincount().float() / len(drawn)
    assert torch.allclose(observed, expected / expected.sum(), atol=0.03)


# --- probe ---------------------------------------------------------------------------------------


def test_nearest_neighbour_share_is_what_a_loop_says() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    groups = rng.integers(0, 3, 40)
    scaled = (features - features.mean(0)) / features.std(0)
    right = 0
    for i in range(40):
        others = [j for j in range(40) if j != i]
        cosine = [
            scaled[i] @ scaled[j] / np.linalg.norm(scaled[i]) / np.linalg.norm(scaled[j])
            for j in others
        ]
        right += groups[others[int(np.argmax(cosine))]] == groups[i]
    assert nearest_neighbour_share(features, groups) == pytest.approx(right / 40)


# --- whole runs ----------------------------------------------------------------------------------


def test_learns_classes_and_writes_what_can_be_loaded(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    settings = replace(PRETRAINING, epochs=6, batch_size=6, supervised=1.0, lr=1e-2)
    trained = pretrain(cells, tmp_path / "w.safetensors", settings)
    assert trained.curve[-1]["class_accuracy"] > 0.9
    assert trained.curve[-1]["class_loss"] < trained.curve[1]["class_loss"]
    with (tmp_path / "w.csv").open(encoding="utf-8") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(e) for e in range(7)]
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cells", "w.safetensors", "w.csv", "w.png"}
    assert {path.name for path in trained.files} == names - {"cells"}

    _, loaded = build_backbone(PRETRAINING.backbone, weights=str(trained.weights), image_size=32)
    assert loaded.sha256 == trained.sha256
    facts = read_facts(trained.weights)
    assert facts["classes"] == {"green": 12, "red": 12}
    assert loaded.provenance.labels == ()
    assert len(loaded.provenance.images) == 24  # of no patient: one by one
    assert facts["recipe"]["method"] == "vicreg"
    assert facts["recipe"]["init"] == "none"
    assert facts["recipe"]["steps"] == 6 * 4


def test_the_recipe_says_what_auto_was(auto_precision: str, tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    settings = replace(PRETRAINING, epochs=1, precision="auto")
    pretrain(cells, tmp_path / "w.safetensors", settings)
    assert read_facts(tmp_path / "w.safetensors")["recipe"]["precision"] == auto_precision


def test_the_similarity_loss_alone_falls(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"), "none")
    trained = pretrain(
        cells, tmp_path / "w.safetensors", replace(PRETRAINING, epochs=8, batch_size=12, lr=1e-2)
    )
    losses = [row["loss"] for row in trained.curve[1:]]
    assert losses[-1] < 0.9 * losses[0]
    assert "class_loss" not in trained.curve[-1]


def make_trainer(settings: PretrainSettings, cells: int) -> PairTrainer:
    fields = torch.zeros(cells, 3, 32, 32, dtype=torch.uint8)
    backbone, _ = build_backbone(settings.backbone, weights="none", image_size=32)
    return PairTrainer(
        *(backbone, fields, torch.zeros(cells, dtype=torch.int64), settings),
        supervised=False,
        dtype=torch.float32,
    )


@pytest.mark.seconds
def test_minutes_become_whole_epochs(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"), "none")
    shortest = replace(PRETRAINING, minutes=1e-9)
    assert pretrain(cells, tmp_path / "a.safetensors", shortest).curve[-1]["epoch"] == 2
    begin = time.perf_counter()
    longer = pretrain(cells, tmp_path / "b.safetensors", replace(PRETRAINING, minutes=0.03))
    assert longer.curve[-1]["epoch"] > 1
    assert time.perf_counter() - begin > 0.5  # a bound that no slow machine can break


@pytest.mark.parametrize(("cells", "epochs"), [(40, 640), (6400, 10)])  # 10 and 1,600 steps each
def test_few_cells_are_seen_in_more_epochs(cells: int, epochs: int) -> None:
    settings = replace(PRETRAINING, epochs=None, batch_size=4)
    assert make_trainer(settings, cells).total_steps == epochs * (cells // 4)


@pytest.mark.parametrize("small_views", [0.0, 0.6, 1.0])
def test_the_minutes_hold_small_views_and_whole_ones(small_views: float) -> None:
    settings = replace(PRETRAINING, minutes=100, small_views=small_views, batch_size=4)
    trainer = make_trainer(settings, 40)
    trainer.fill_minutes(first := 2.0)  # seconds of a first step
    small = round(small_views * trainer.total_steps)
    whole = trainer.total_steps - small
    seconds = first * (small + whole * (2 if small_views else 1))
    assert seconds == pytest.approx(100 * 60, rel=0.01)
    assert trainer.total_steps % 10 == 0  # whole epochs


def run_interrupted(cells: Cells, out: Path, settings: PretrainSettings, at: int) -> None:
    def interrupt(done: int, total: int, text: str = "") -> None:
        if "views/s" in text and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(cells, out, settings, progress=interrupt)


@pytest.mark.seconds
@pytest.mark.parametrize("grouping", ["patients", "classes"])
def test_interrupted_ends_with_the_same_bits(grouping: str, tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"), grouping)
    settings = replace(PRETRAINING, patient_pairs=0.5 if grouping == "patients" else 0.0)
    whole = pretrain(cells, tmp_path / "whole.safetensors", settings)
    out = tmp_path / "parts.safetensors"
    run_interrupted(cells, out, settings, at=13)
    assert not out.exists()
    parts = pretrain(cells, out, settings)
    assert parts.sha256 == whole.sha256
    assert parts.curve == whole.curve
    assert out.read_bytes() == whole.weights.read_bytes()


@pytest.mark.seconds
def test_another_runs_checkpoint_is_refused_and_force_starts_over(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    out = tmp_path / "w.safetensors"
    run_interrupted(cells, out, PRETRAINING, at=11)
    other = replace(PRETRAINING, lr=2e-3)
    with pytest.raises(LymphfeatError, match=re.escape("lr is 0.001 there, 0.002 now")):
        pretrain(cells, out, other)
    forced: Pretrained = pretrain(cells, out, other, force=True)
    assert forced.sha256 == pretrain(cells, tmp_path / "new.safetensors", other).sha256


@pytest.mark.seconds
def test_weights_and_curve_are_of_one_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    out = tmp_path / "out" / "w.safetensors"
    pretrain(cells, out, PRETRAINING)
    before = contents(out.parent)

    def crash(*arguments: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lymphfeat.pretraining.run.draw_curve", crash)
        with pytest.raises(OSError, match="no space left"):
            pretrain(cells, out, replace(PRETRAINING, seed=5), force=True)
    after = contents(out.parent)
    assert {name: after[name] for name in before} == before
    seen: list[str] = []
    progress = lambda done, total, text="": seen.append(f"{done} {text}")  # noqa: E731
    pretrain(cells, out, replace(PRETRAINING, seed=5), force=True, progress=progress)
    assert not any(line.startswith("1 ") and "views/s" in line for line in seen)  # it went on
    assert set(contents(out.parent)) == set(before)
    assert contents(out.parent)["w.csv"] != before["w.csv"]


def test_a_curve_of_other_weights_is_not_overwritten(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    (tmp_path / "w.csv").write_text("precious")
    with pytest.raises(LymphfeatError, match=r"w.csv exists"):
        pretrain(cells, tmp_path / "w.safetensors", PRETRAINING)
    assert (tmp_path / "w.csv").read_text() == "precious"


def test_what_is_refused(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    for message, out, settings in (
        ("out (=w.pth) must end in .safetensors", Path("w.pth"), PRETRAINING),
        ("there.safetensors exists; choose another", tmp_path / "there.safetensors", PRETRAINING),
        ("needs one folder per patient", tmp_path / "w.safetensors", _with_pairs()),
        ("must be at least the crop", tmp_path / "w.safetensors", replace(PRETRAINING, field=64)),
    ):
        (tmp_path / "there.safetensors").touch()
        with pytest.raises(LymphfeatError, match=re.escape(message)):
            pretrain(cells, out, settings)
    few = Cells.find(write_cells(tmp_path / "few", n=6))
    with pytest.raises(LymphfeatError, match="must be at least 8"):
        pretrain(few, tmp_path / "w.safetensors", PRETRAINING)


def _with_pairs() -> PretrainSettings:
    return replace(PRETRAINING, patient_pairs=0.5)


# --- weights -------------------------------------------------------------------------------------


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    backbone, _ = build_backbone("test_resnet", image_size=32)
    with torch.no_grad():
        next(backbone.parameters()).flatten()[0] = 1e6
    with pytest.raises(WeightsError, match="lower learning rate"):
        write_weights(backbone, tmp_path / "w.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_files_of_others_tell_nothing_of_pretraining(tmp_path: Path) -> None:
    assert read_facts(tmp_path / "w.pth") == {}
