"""Averages of heads: learnt from out-of-fold logits of training patients."""

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from lymphfeat.cohort.splits import Plan, kfold_splits
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.averaging import (
    Mixture,
    combine_heads,
    learn_average,
    learn_stack,
    read_mixture,
)
from lymphfeat.evaluation.calibration import fit_calibrations, logit
from lymphfeat.evaluation.fusion import FUSIONS, read_fusion
from lymphfeat.evaluation.rows import find_row, image_rows
from lymphfeat.evaluation.scores import PlannedPatients, Scores
from lymphfeat.heads.grid import resolve
from lymphfeat.runtime.arrays import Floats, Labels
from lymphfeat.runtime.strict_json import json_text
from lymphfeat.settings import HeadSettings

LABELS = np.tile([0, 1], 40)
IDS = [f"P{i}" for i in range(len(LABELS))]


HEADS = [
    *(resolve(HeadSettings(agg="topk", k_agg=k)) for k in (5, 10)),
    resolve(HeadSettings(agg="std")),
]
JOINT = [row for row in image_rows(HEADS, nested=True) if row.joint in ("average", "stack")]


def draw_logits(seed: int = 0) -> NDArray[np.float64]:
    """Return the logits (n, 3) of a good head, a fair one and one that says nothing."""
    rng = np.random.default_rng(seed)
    signal = np.where(LABELS == 1, 1.0, -1.0)[:, None] * np.array([1.5, 0.7, 0.0])
    return np.asarray(signal + rng.normal(size=(len(LABELS), 3)))


def test_the_average_is_the_mean_of_calibrated_logits() -> None:
    logits, new = draw_logits(), draw_logits(1)
    by_hand = []
    for head in range(3):
        (fitted,) = fit_calibrations(expit(logits[None, :, head]), LABELS)
        by_hand.append(fitted.slope * new[:, head] + fitted.intercept)
    np.testing.assert_allclose(
        learn_average(logits, LABELS)(new), expit(np.mean(by_hand, 0)), rtol=1e-9
    )


def test_the_stack_gives_no_head_a_negative_weight_and_good_heads_more() -> None:
    logits = draw_logits()
    predict = learn_stack(logits, LABELS)
    base, *steps = logit(predict(np.concatenate([np.zeros((1, 3)), np.eye(3)])))
    gains = [step - base for step in steps]
    assert gains[0] > gains[1] > gains[2] >= 0
    against = learn_stack(np.column_stack([logits[:, 0], -logits[:, 0]]), LABELS)
    flat = against(np.array([[0.0, -3.0], [0.0, 3.0]]))
    np.testing.assert_allclose(flat[0], flat[1], atol=0.02)  # a head that is wrong is not turned


def scores_of(logits: NDArray[np.float64], patients: PlannedPatients, name: str) -> Scores:
    """Return a head that gives each patient one logit, whoever it was trained on."""
    outer, inner = patients.empty(), patients.empty()
    for place, (train, validation) in enumerate(
        zip(patients.train, patients.validation, strict=True)
    ):
        outer[place, validation] = expit(logits[validation])
        inner[place, train] = expit(logits[train])
    return Scores(name=name, kind="head", outer=outer, inner=inner, fitted=inner)


def plan(labels: NDArray[np.int64]) -> PlannedPatients:
    (repeat,) = kfold_splits(IDS, LABELS, folds=4, seeds=1, seed=0)
    nested = Plan.nested(repeat.outer, dict(zip(IDS, LABELS.tolist(), strict=True)), folds=4)
    return PlannedPatients(IDS, labels, nested)


def test_validation_labels_are_never_read() -> None:
    logits = draw_logits()
    found = []
    for flipped in (False, True):
        patients = plan(LABELS)
        if flipped:
            patients.labels = LABELS.copy()
            patients.labels[patients.validation[0]] = 1 - LABELS[patients.validation[0]]
        heads = [scores_of(logits[:, i], patients, str(i)) for i in range(3)]
        found.append([combine_heads(patients, heads, row) for row in JOINT])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.outer[0], other.outer[0])
        np.testing.assert_array_equal(one.inner[0], other.inner[0])
        assert (one.outer[1] != other.outer[1])[~np.isnan(one.outer[1])].any()
    assert [each.name for each in found[0]] == ["average of 3 heads", "stack of 3 heads"]


def test_fewer_than_two_heads_have_no_average() -> None:
    assert [row.name for row in image_rows([HEADS[0]], nested=True)] == ["top5"]
    assert [row.name for row in image_rows(HEADS, nested=False)] == ["top5", "top10", "std"]


def test_a_row_is_found_by_its_name() -> None:
    names = [
        *("top5", "top10", "std", "topk, best of 2 chosen inside"),
        *("any head, best of 3 chosen inside", "average of 3 heads", "stack of 3 heads"),
    ]
    assert [row.name for row in image_rows(HEADS, nested=True)] == names
    for name in [*names, *(f"{name} + clinical (late)" for name in names)]:
        assert find_row(name, HEADS, ["late", "sum"]).name == name
    with pytest.raises(SettingsError, match=r"row \(=top7\) must be .*; got none of top5; top10; "):
        find_row("top7", HEADS, [])


@pytest.mark.parametrize("learn", [learn_average, learn_stack])
def test_a_mixture_is_read_back(learn: Callable[[Floats, Labels], Mixture]) -> None:
    mixture = learn(draw_logits(), LABELS)
    read = read_mixture(json.loads(json_text(asdict(mixture))))
    np.testing.assert_array_equal(read(draw_logits()), mixture(draw_logits()))


@pytest.mark.parametrize("way", FUSIONS)
def test_a_fusion_is_read_back(way: str) -> None:
    inputs = draw_logits()
    fusion = FUSIONS[way](inputs, LABELS)
    read = read_fusion(json.loads(json_text(asdict(fusion))))
    np.testing.assert_array_equal(read(inputs), fusion(inputs))
