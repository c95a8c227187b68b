"""The estimator in scikit-learn's own tools, and against the head that fit-head fits.

Of `check_estimator` those checks are run that do not pass a matrix of samples: for bags a matrix is
no X. Left out are therefore all that call `fit` with one (`check_fit2d_*`, `check_classifiers_*`,
`check_n_features_in`, …), and those of sample weights and sparse matrices, which it does not take.
What these check of the results is checked here with bags.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from lymphfeat.cohort.splits import Split
from lymphfeat.errors import SettingsError
from lymphfeat.fitting import fit_heads
from lymphfeat.importing import import_bags
from lymphfeat.settings import FitSettings, HeadSettings
from lymphfeat.sklearn import MILClassifier, PackedBags
from tests.cohorts import write_text

Bag = NDArray[Any]
SOME = (
    *("mean+std", "mean", "logstd", "quantiles", "kernel-mean", "prototypes"),
    *("topk", "topbottomk", "lse", "bnsigmoid", "attention", "lstm"),
)


def bags(n: int = 24, seed: int = 0, channels: int = 4) -> tuple[list[Bag], NDArray[np.int64]]:
    """Return bags of which those of label 1 vary more and lie elsewhere."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    found = [rng.normal(k / 2, 1 + k, (17 + i % 5, channels)) for i, k in enumerate(labels)]
    return [bag.astype(np.float16) for bag in found], labels  # as a store holds them


def quick(agg: str = "mean+std", **settings: Any) -> MILClassifier:
    return MILClassifier(agg, epochs=3, width=4, threads=1, **settings)


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_mixin_order,
        estimator_checks.check_parameters_default_constructible,
    ],
    ids=lambda check: check.__name__,
)
def test_checks_of_scikit_learn(check: Callable[[str, Any], None]) -> None:
    check("MILClassifier", MILClassifier())


@pytest.mark.parametrize("agg", SOME)
def test_probabilities_are_those_of_fit_head(agg: str, tmp_path: Path) -> None:
    """On the training patients of a split, for held-out patients."""
    X, y = bags()
    for number, bag in enumerate(X):
        np.save(tmp_path / f"P{number}.npy", bag)
    lines = [f"P{number},{label}" for number, label in enumerate(y)]
    table = write_text(tmp_path / "t.csv", "id,label", *lines)
    store = import_bags(tmp_path, tmp_path / "s.h5", table=table)
    ids = store.ids
    # Of this name, because a fit's seed is that of its split and its name.
    split = Split(id="everybody", seed=3, repeat=0, train=ids[:16], validation=ids[16:])
    settings = FitSettings(
        protocol="report", epochs=3, threads=1, precision="float32", device="cpu"
    )
    head = HeadSettings(agg=agg, width=4)
    run = fit_heads(store, [head], settings, splits=[split])
    expected = run.outcome.curves(run.outcome.scores[0].name)[0][-1]  # (8,)
    model = quick(agg, random_state=3).fit(X[:16], y[:16])
    # The kernel's bandwidth comes from pairs drawn among all of a store's instances.
    atol = 1e-3 if agg == "kernel-mean" else 2e-6
    np.testing.assert_allclose(model.predict_proba(X[16:])[:, 1], expected, atol=atol)


@pytest.mark.parametrize("agg", ["mean+std", "topk"])
def test_any_two_labels(agg: str) -> None:
    X, y = bags()
    expected = quick(agg).fit(X, y).predict_proba(X)
    for labels in (np.array(["reactive", "tumoral"])[y], y == 1, y * 3.0 - 1, (y + 5).tolist()):
        model = quick(agg).fit(X, labels)
        assert model.classes_.tolist() == sorted(set(np.asarray(labels).tolist()))
        np.testing.assert_array_equal(model.predict_proba(X), expected)
        assert set(model.predict(X).tolist()) <= set(model.classes_.tolist())
    np.testing.assert_array_equal(model.predict(X), model.classes_[expected.argmax(1)])
    np.testing.assert_allclose(expit(model.decision_function(X)), expected[:, 1])


def test_bags_in_any_container_give_the_same() -> None:
    X, y = bags()
    sizes = [len(bag) for bag in X]
    packed = PackedBags(np.concatenate(X).astype(np.float32), np.cumsum([0, *sizes]))
    objects = np.empty(len(X), object)
    objects[:] = X
    expected = quick().fit(X, y).predict_proba(X)
    for own in (packed, objects, tuple(X), packed[:]):
        np.testing.assert_array_equal(quick().fit(own, y).predict_proba(own), expected)
    equal = [bag[:17] for bag in X]
    one_by_one = quick().fit(equal, y).predict_proba(equal)
    np.testing.assert_array_equal(quick().fit(np.stack(equal), y).predict_proba(equal), one_by_one)
    np.testing.assert_array_equal(packed[-1], X[-1])
    with pytest.raises(IndexError):
        packed[len(X)]


def test_a_bag_is_predicted_whatever_bags_are_beside_it() -> None:
    X, y = bags()
    model = quick("bnsigmoid").fit(X, y)
    together = model.predict_proba(X)
    alone = np.concatenate([model.predict_proba([bag]) for bag in X])
    np.testing.assert_allclose(alone, together, atol=1e-6)


@pytest.mark.parametrize("agg", ["mean+std", "topk", "attention"])
def test_clones_and_pickles_predict_the_same(agg: str) -> None:
    X, y = bags()
    model = quick(agg).fit(X, y)
    expected = model.predict_proba(X)
    again = clone(model)
    assert not hasattr(again, "head_")
    np.testing.assert_array_equal(again.fit(X, y).predict_proba(X), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), expected)


def test_the_seed_decides() -> None:
    X, y = bags()
    one, other, drawn, again = (
        quick("attention", random_state=seed).fit(X, y).predict_proba(X)
        for seed in (1, 2, np.random.RandomState(5), np.random.RandomState(5))
    )
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(drawn, again)
    quick("attention", random_state=None).fit(X, y)


@pytest.mark.seconds
@pytest.mark.filterwarnings("error")
def test_in_the_tools_of_scikit_learn() -> None:
    X, y = bags(40)
    packed = PackedBags(
        np.concatenate(X).astype(np.float32), np.cumsum([0, *(len(bag) for bag in X)])
    )
    assert cross_val_score(quick(), X, y, cv=4, scoring="roc_auc").mean() > 0.9
    np.testing.assert_array_equal(
        cross_val_predict(quick(), packed, y, cv=4, method="predict_proba"),
        cross_val_predict(quick(), X, y, cv=4, method="predict_proba"),
    )
    search = GridSearchCV(quick(), {"agg": ["mean", "std"], "penalty": [None, 10.0]}, cv=3)
    assert search.fit(X, y).score(X, y) > 0.8
    calibrated = CalibratedClassifierCV(quick(), cv=3).fit(X, y)
    assert calibrated.predict_proba(X).shape == (40, 2)
    assert (calibrated.predict(X) == y).mean() > 0.8
    isotonic = CalibratedClassifierCV(quick("topk"), method="isotonic", cv=3).fit(X, y)
    assert np.isfinite(isotonic.predict_proba(X)).all()
    halved = make_pipeline(FunctionTransformer(_first_channels), quick())
    assert cross_val_score(halved, X, y, cv=3).mean() > 0.7
    assert halved.fit(X, y)[-1].n_features_in_ == 2


def _first_channels(X: list[Bag]) -> list[Bag]:
    return [bag[:, :2] for bag in X]


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (np.zeros((4, 3)), [0, 1, 0, 1], r"bag 0 must be an array \(n, D\)"),
        ([], [], "must be a sequence of bags"),
        ("bags", [0], "must be a sequence of bags"),
        ([np.ones((2, 3)), np.ones((0, 3))], [0, 1], r"bag 1 .*n at least 1; got float64 \(0, 3\)"),
        ([np.ones((2, 3)), np.ones((2, 4))], [0, 1], "bag 1 must have the 3 features of bag 0"),
        ([np.ones((2, 3)), np.full((2, 3), np.nan)], [0, 1], "bag 1 must not hold NaN"),
        ([np.ones((2, 3))] * 2, [0, 1, 0], r"a label per bag, \(2,\); got \(3,\)"),
        ([np.ones((2, 3))] * 3, [0, 1, 2], "must have two classes; got 3"),
        ([np.ones((2, 3))] * 2, [1, 1], "must have two classes; got 1"),
        ([np.ones((2, 3))] * 3, [0.1, 0.2, 0.3], "Unknown label type"),
    ],
)
def test_what_is_no_bag_or_no_label_is_refused(X: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick().fit(X, y)


def test_other_mistakes_are_refused() -> None:
    X, y = bags()
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(SettingsError, match="expecting 4 features"):
        quick().fit(X, y).predict([bag[:, :3] for bag in X])
    with pytest.raises(SettingsError, match="agg"):
        quick("nothing").fit(X, y)
    with pytest.raises(SettingsError, match=r"lr \(=-1\) must be above 0"):
        quick(lr=-1).fit(X, y)
