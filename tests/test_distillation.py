"""Distillation: what teachers say, what a student learns of it, and interruption."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lymphfeat.cohort.image_folders import Cells
from lymphfeat.cohort.images import decode_crops
from lymphfeat.errors import LymphfeatError, SettingsError
from lymphfeat.features.backbones import build_backbone, read_facts
from lymphfeat.pretraining.run import pretrain
from lymphfeat.pretraining.teachers import Teacher, steady_components, teach
from tests.test_pretraining import write_cells
from tests.tiny import PRETRAINING

DISTILLING = replace(
    PRETRAINING,
    teachers=("test_resnet=none", "test_efficientnet=none"),
    teacher_size=64,
    teacher_views=2,
    components=6,
    stain=0.5,
)


def said(cells: int = 80, views: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Make features of two teachers: three traits of each cell, magnification, and noise."""
    rng = np.random.default_rng(0)
    zooms = np.exp(rng.uniform(-0.3, 0.3, (cells, views)))
    traits = np.repeat(rng.normal(size=(1, cells, 3)), views, axis=0)
    noise = rng.normal(size=(views, cells, 3))
    causes = np.concatenate([traits, 3 * np.log(zooms).T[..., None], noise], axis=2)
    parts = [causes @ rng.normal(size=(7, width)) for width in (8, 20)]
    parts = [part + 0.05 * rng.normal(size=part.shape) for part in parts]
    return [torch.from_numpy(part).float() for part in parts], torch.from_numpy(zooms).float()


def test_components_are_those_of_a_plain_computation() -> None:
    features, zooms = said()
    views, cells, _ = features[0].shape
    targets = steady_components(features, zooms, 4, seed=0).numpy()  # (80, 3, 4)

    flat = [part.reshape(views * cells, -1).double().numpy() for part in features]
    flat = [(x - x.mean(0)) / (x.std(0, ddof=1) + 1e-3) / np.sqrt(x.shape[1]) for x in flat]
    scores = np.hstack(flat)
    log = np.log(zooms.numpy()).T.ravel()
    powers = np.stack([log - log.mean(), log**2 - (log**2).mean()], axis=1)
    magnified = powers @ np.linalg.pinv(powers) @ scores
    rest = (scores - magnified).reshape(views, cells, -1)
    within = np.zeros((28, 28))
    between = np.zeros((28, 28))
    for cell in range(cells):
        mean = rest[:, cell].mean(0)
        between += np.outer(mean, mean) / cells
        for view in range(views):
            gap = rest[view, cell] - mean
            within += np.outer(gap, gap) / (cells * (views - 1))
    between -= within / views
    shares, directions = np.linalg.eig(
        np.linalg.solve(between + within + 1e-6 * np.eye(28), between)
    )
    order = np.argsort(-shares.real)[:4]
    expected = (rest.mean(0) + magnified.reshape(views, cells, -1)) @ directions.real[:, order]
    for axis in range(4):  # up to sign and scale
        seen = np.corrcoef(targets[..., axis].T.ravel(), expected[..., axis].ravel())[0, 1]
        assert abs(seen) > 0.999, axis
    spread = targets.std((0, 1))
    assert (np.diff(spread) <= 1e-6).all()  # the steadier, the heavier


def test_components_keep_the_traits_of_cells_and_leave_what_views_differ_in() -> None:
    features, zooms = said(cells=400)
    targets = steady_components(features, zooms, 6, seed=0).numpy()
    spread = targets.std((0, 1))
    assert spread[2] > 4 * spread[3]  # there are three traits
    moved = targets - targets.mean(1, keepdims=True)
    log = np.log(zooms.numpy())
    for axis in range(3):  # of one cell, targets differ by magnification alone
        fit = np.polynomial.Polynomial.fit(log.ravel(), moved[..., axis].ravel(), 2)
        left = moved[..., axis] - fit(log)
        assert left.std() < 0.2 * targets[..., axis].std()


def test_every_part_of_the_zoom_is_shown(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    fields = torch.from_numpy(decode_crops(cells.paths, DISTILLING.field))
    teachers = [Teacher.load(text, 64) for text in DISTILLING.teachers]
    shown: list[int] = []
    lessons = teach(
        teachers, fields, DISTILLING, torch.float32, lambda done, total, text="": shown.append(done)
    )
    low, high = DISTILLING.zoom
    middle = (low * high) ** 0.5
    assert lessons.targets.shape == (24, 2, 6)
    assert shown[-1] == 48
    assert (low <= lessons.zooms[:, 0]).all()
    assert (lessons.zooms[:, 0] <= middle).all()
    assert (middle <= lessons.zooms[:, 1]).all()
    assert (lessons.zooms[:, 1] <= high).all()


def test_a_teacher_sees_what_it_was_trained_on() -> None:
    teacher = Teacher.load("test_resnet=none", 64)
    assert teacher.normalization.mean == (0.5, 0.5, 0.5)  # timm's, of this model
    assert not teacher.backbone.training


@pytest.mark.seconds
def test_a_student_learns_what_its_teachers_say(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    settings = replace(DISTILLING, epochs=40, batch_size=12, lr=1e-2, stain=0.1)
    trained = pretrain(cells, tmp_path / "w.safetensors", settings)
    losses = [row["loss"] for row in trained.curve[1:]]
    assert losses[-1] < 0.8 * losses[0]
    assert "class_loss" not in trained.curve[-1]  # labels of classes are not used
    recipe = read_facts(trained.weights)["recipe"]
    assert recipe["method"] == "distillation"
    assert [teacher["name"] for teacher in recipe["teachers"]] == [
        "test_resnet",
        "test_efficientnet",
    ]
    _, loaded = build_backbone(PRETRAINING.backbone, weights=str(trained.weights), image_size=32)
    assert loaded.sha256 == trained.sha256


@pytest.mark.seconds
@pytest.mark.parametrize(("during", "at"), [("views shown", 24), ("views/s", 0), ("views/s", 9)])
def test_interrupted_ends_with_the_same_bits(during: str, at: int, tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    whole = pretrain(cells, tmp_path / "whole.safetensors", DISTILLING)
    out = tmp_path / "parts.safetensors"

    def interrupt(done: int, total: int, text: str = "") -> None:
        if during in text and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(cells, out, DISTILLING, progress=interrupt)
    seen: list[str] = []
    parts = pretrain(cells, out, DISTILLING, progress=lambda *told: seen.append(str(told[-1])))
    assert parts.sha256 == whole.sha256
    assert out.read_bytes() == whole.weights.read_bytes()
    assert any("views shown" in text for text in seen) == (during == "views shown")
    assert {path.name for path in tmp_path.glob("parts*")} == {
        f"parts.{suffix}" for suffix in ("safetensors", "csv", "png")
    }


@pytest.mark.seconds
def test_what_teachers_said_for_other_settings_is_refused(tmp_path: Path) -> None:
    cells = Cells.find(write_cells(tmp_path / "cells"))
    out = tmp_path / "w.safetensors"

    def interrupt(done: int, total: int, text: str = "") -> None:
        if "views/s" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(cells, out, DISTILLING, progress=interrupt)
    other = replace(DISTILLING, zoom=(1.0, 1.2))
    with pytest.raises(LymphfeatError, match=re.escape("zoom is [0.8, 1.15] there, [1.0, 1.2]")):
        pretrain(cells, out, other)
    assert pretrain(cells, out, other, force=True).weights == out


def test_what_is_refused() -> None:
    with pytest.raises(SettingsError, match="must be a timm model"):
        Teacher.load("resnett18", 64)
    with pytest.raises(SettingsError, match=r"patient_pairs \(=0.5\) must be 0 with teachers"):
        replace(DISTILLING, patient_pairs=0.5)
