"""Heads of the family `distribution` in the engine: together as alone, views, precision, shares."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.splits import Split, report_splits
from lymphfeat.errors import SettingsError
from lymphfeat.heads.engine import instances
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.exact import ExactHeadTrainer
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.results import Curve, Fit, FittedHeads
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.heads.grid import head_name, resolve
from lymphfeat.runtime.devices import cpu_threads
from lymphfeat.settings import HeadSettings

CHANNELS, PATIENTS, VIEWS = 5, 24, 4
SIZES = np.array([1, 2, 15, 16, 17, 20, 3, 30] * 3)
LABELS = np.tile([0, 1], PATIENTS // 2)
IDS = [f"P{i}" for i in range(PATIENTS)]
OFFSETS = np.concatenate([[0], SIZES.cumsum()])
SPLITS = report_splits(IDS, LABELS, seeds=3, seed=0)
AGGS = ("mean", "std", "logstd", "gini", "quantiles", "kernel-mean", "prototypes", "mean+std")


def make_features(
    dtype: torch.dtype = torch.float32, seed: int = 0, memory: int | None = None
) -> Features:
    rng = np.random.default_rng(seed)
    spread = np.repeat(1.5 - LABELS, SIZES)[:, None, None, None, None]
    maps = rng.normal(size=(SIZES.sum(), VIEWS, CHANNELS, 2, 2)) * spread
    maps += rng.normal(size=(SIZES.sum(), 1, CHANNELS, 1, 1))
    stored = maps.astype(np.float16)
    pooled = stored.mean((3, 4), dtype=np.float32)
    return Features(stored, pooled, OFFSETS, IDS, LABELS, dtype=dtype, memory=memory)


def head_of(agg: str, **more: object) -> HeadSettings:
    solver = "exact" if agg == "mean" else ""
    return resolve(HeadSettings(agg=agg, solver=solver, prototypes=2, **more))  # type: ignore[arg-type]


def fit(
    features: Features, heads: Sequence[HeadSettings], *, epochs: int = 1, tta: bool = False
) -> FittedHeads:
    fits = [Fit(head=head, split=split) for head in heads for split in SPLITS]
    return fit_stacked(
        features, fits, epochs=epochs, sampling=Sampling(batch_size=4, views=VIEWS), tta=tta
    )


def exact_head(fitted: FittedHeads, position: int) -> ExactHead:
    head = fitted.modules[position]
    assert isinstance(head, ExactHead)
    return head


def test_together_as_alone() -> None:
    features = make_features()
    heads = [head_of(agg, unit=unit) for agg in ("std", "mean+std") for unit in ("image", "pixel")]
    heads += [head_of("std", penalty=0.1), resolve(HeadSettings(agg="lse"))]
    together = fit(features, heads)
    for number, head in enumerate(heads[:-1]):
        alone = fit(features, [head])
        own = slice(number * len(SPLITS), (number + 1) * len(SPLITS))
        np.testing.assert_array_equal(together.curves[own], alone.curves)


def test_heads_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2000, 4)).astype(np.float32)  # more than k-means gives a thread
    bounds, ids = np.arange(0, 2001, 100), [f"P{i}" for i in range(20)]
    labels = np.arange(20) % 2
    heads = []
    for threads in (1, 2):
        with cpu_threads(threads):
            maps = images[..., None, None].astype(np.float16)
            features = Features(maps, images, bounds, ids, labels)
            split = Split(id="s", seed=0, repeat=0, train=tuple(ids[:16]), validation=(ids[-1],))
            settings = head_of("prototypes+std+kernel-mean")
            fitted = fit_stacked(
                features,
                [Fit(head=settings, split=split)],
                epochs=1,
                sampling=Sampling(batch_size=4),
            )
            heads.append(exact_head(fitted, 0).state_dict())
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, heads[1][name]), name


@pytest.mark.parametrize("unit", ["image", "pixel"])
def test_streaming_is_reading_from_memory(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [head_of(agg, unit=unit) for agg in ("mean+std", "kernel-mean", "prototypes")]
    expected = fit(make_features(memory=1 << 30), heads, tta=True).curves
    monkeypatch.setattr(instances, "_CHUNK_ROWS", 64)
    found = fit(make_features(memory=0), heads, tta=True).curves
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("agg", AGGS)
def test_a_head_predicts_what_its_fit_says(agg: str) -> None:
    features = make_features()
    fitted = fit(features, [head_of(agg)])
    images = features.of_unit("image")
    for position in range(len(SPLITS)):
        logits = exact_head(fitted, position).patient_logits([(features.images, images.bags)])
        np.testing.assert_allclose(
            logits.sigmoid().numpy(), fitted.curves[position, -1], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("stores", [1, 2])
@pytest.mark.parametrize("unit", ["image", "pixel"])
@pytest.mark.parametrize("agg", ["mean", "std", "gini", "quantiles", "kernel-mean", "mean+std"])
def test_shares_and_what_belongs_to_no_image_add_up_to_the_logit(
    agg: str, unit: str, stores: int
) -> None:
    first, *others = (make_features(seed=seed) for seed in range(stores))
    features, everyone = first.joined_with(others), np.arange(len(IDS))
    head = exact_head(fit(features, [head_of(agg, unit=unit)]), 0)
    bags = features.of_unit("image").bags
    sets = [own.images_of(everyone, unit) for own in features.sets]  # (n, U, C) each
    instances = [(own.flatten(0, 1), bags.times(own.shape[1])) for own in sets]
    shares = bags.times(sets[0].shape[1]).sum(head.shares(instances)[:, None])[:, 0]
    rest = head.patient_logits(instances) - shares
    whole = SIZES >= 16  # the spread of smaller bags is in part the typical patient's
    np.testing.assert_allclose(rest[whole], float(rest[whole][0]), rtol=1e-6, atol=1e-8)
    if agg in ("mean", "kernel-mean"):
        np.testing.assert_allclose(rest, float(rest[0]), rtol=1e-6, atol=1e-8)
    scores = head.image_logits(sets, bags)  # (n,)
    np.testing.assert_allclose(bags.mean(scores[:, None])[:, 0], shares)


@pytest.mark.parametrize("curve", get_args(Curve))
def test_every_epoch_is_the_same(curve: Curve) -> None:
    features = make_features()
    head, sampling = head_of("std"), Sampling(batch_size=4, views=VIEWS)
    fits = [Fit(head=head, split=split, curve=curve) for split in SPLITS]
    once = fit_stacked(features, fits, epochs=1, sampling=sampling, tta=True)
    often = fit_stacked(features, fits, epochs=3, sampling=sampling, tta=True)
    np.testing.assert_array_equal(often.losses, once.losses.repeat(3, 1))
    np.testing.assert_array_equal(often.curves[:, -1], once.curves[:, -1])
    before = np.full((len(SPLITS), 1, PATIENTS), np.nan, np.float32)
    for number, split in enumerate(SPLITS):
        shown = {"nobody": (), "held-out": split.validation, "everyone": IDS}[curve]
        rows = features.rows_of(shown)
        before[number, 0, rows] = once.curves[number, -1, rows]
    np.testing.assert_array_equal(often.curves[:, :-1], before.repeat(2, 1))


def test_views_are_scored_once_for_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    score = ExactHeadTrainer._score

    def counting(
        self: ExactHeadTrainer, sets: Sequence[Instances], wanted: Sequence[int], view: int
    ) -> Tensor:
        scored.append(view)
        return score(self, sets, wanted, view)

    monkeypatch.setattr(ExactHeadTrainer, "_score", counting)
    fit(make_features(), [head_of("std")], epochs=5, tta=True)
    assert scored == list(range(1, VIEWS))  # the identity is known from the solution


def test_tta_is_the_mean_over_the_views() -> None:
    features = make_features()
    identity, averaged = (fit(features, [head_of("std")], tta=tta) for tta in (False, True))
    head = exact_head(identity, 0)
    bags = features.of_unit("image").bags
    views = [
        head.patient_logits([(features.of_unit("image").source.span(0, OFFSETS[-1], view), bags)])
        for view in range(VIEWS)
    ]
    expected = torch.stack(views).sigmoid().mean(0)
    np.testing.assert_allclose(averaged.curves[0, 0], expected, rtol=1e-5)
    assert not np.allclose(identity.curves[0, 0], averaged.curves[0, 0], rtol=1e-3)


@pytest.mark.parametrize("agg", ["std", "mean+std", "quantiles"])
def test_bfloat16_features_are_compared_with_float32(agg: str) -> None:
    rounded = fit(make_features(torch.bfloat16), [head_of(agg, penalty=0.1)])
    exact = fit(make_features(), [head_of(agg, penalty=0.1)])
    assert 0 < rounded.rounding.max() < 0.05
    assert np.abs(rounded.curves - exact.curves).max() < 0.05


def test_losses_are_those_of_the_training_patients() -> None:
    features = make_features()
    fitted = fit(features, [head_of("std", penalty=0.01)])
    for position, split in enumerate(SPLITS):
        rows = features.rows_of(split.train)
        p: NDArray[np.float64] = fitted.curves[position, 0, rows].astype(np.float64)
        expected = -np.mean(np.where(LABELS[rows] == 1, np.log(p), np.log1p(-p)))
        assert fitted.losses[position, 0] == pytest.approx(expected, rel=1e-4)


def test_balanced_class_weights_move_the_intercept() -> None:
    features = make_features()
    few = [
        Fit(
            head=head_of("std", penalty=10.0, class_weights=weights),
            split=Split(
                id="s", seed=0, repeat=0, train=tuple(IDS[:3] + IDS[4:16:2]), validation=(IDS[-1],)
            ),
        )
        for weights in ("none", "balanced")
    ]
    plain, balanced = fit_stacked(features, few, epochs=1, sampling=Sampling(batch_size=4)).curves[
        :, 0, -1
    ]
    assert plain < 0.3  # one of nine training patients is tumoral
    assert balanced == pytest.approx(0.5, abs=0.05)


def test_names_say_what_was_chosen() -> None:
    fitted = fit(make_features(), [head_of("std"), head_of("std", penalty=0.1)])
    assert fitted.chosen(0).startswith("penalty ")
    assert fitted.chosen(len(SPLITS)) == ""
    assert [head_name(head_of("std", penalty=0.1)), head_name(head_of("quantiles"))] == [
        "std penalty=0.1",
        "quantiles",
    ]
    assert set(fitted.tensors(0)) >= {"intercept", "penalty", "0.weight", "0.mean", "0.scale"}


def test_an_exact_mean_is_a_scorer_unless_it_names_its_store() -> None:
    features = make_features()
    fitted = fit(features, [head_of("mean"), head_of("mean@1")])
    tensors = fitted.tensors(0)
    assert set(tensors) == {"weight", "bias"}
    bags = features.of_unit("image").bags
    logits = bags.mean(features.images @ torch.from_numpy(tensors["weight"])[:, None])[:, 0]
    probability = (logits + torch.from_numpy(tensors["bias"])).sigmoid()
    np.testing.assert_allclose(probability.numpy(), fitted.curves[0, 0], rtol=1e-4)
    assert "0.weight" in fitted.tensors(len(SPLITS))


@pytest.mark.parametrize(
    ("agg", "message"),
    [
        ("std+std", "must name each statistic once"),
        ("std+max", "must be one of top1, .* joined by"),
        ("", "must be one of top1"),
        ("mean+", "must be one of top1"),
    ],
)
def test_names_that_are_none(agg: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(HeadSettings(agg=agg))


@pytest.mark.parametrize("text", ["90", "50-90", "a-b", "90-50-10", "110-50"])
def test_quantiles_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match=rf"quantiles \(={text}\) must be two percents"):
        resolve(HeadSettings(agg="quantiles", quantiles=text))
