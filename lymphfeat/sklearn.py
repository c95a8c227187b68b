"""A head as an estimator of scikit-learn: the samples are bags."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from lymphfeat.cohort.splits import Split
from lymphfeat.errors import SettingsError
from lymphfeat.evaluation.calibration import logit
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import EVERYBODY, Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import resolve
from lymphfeat.heads.head import Head
from lymphfeat.heads.portable import portable_head
from lymphfeat.runtime.devices import cpu_threads, whole_float32
from lymphfeat.settings import (
    BlockWeights,
    ClassWeights,
    FitSettings,
    HeadSettings,
    RankingLoss,
    Reduction,
    Solver,
    Unit,
    require,
)

_HEAD, _FIT = HeadSettings(agg="mean+std"), FitSettings()  # the defaults
_MAX_SEED = 2**31 - 1
Floats32 = NDArray[np.float32]


@dataclass(frozen=True)
class PackedBags(Sequence[Floats32]):
    """Bags one after another in one array; scikit-learn takes it for a list of arrays.

    features: (N, D). offsets: (P + 1,), bag p has the rows offsets[p]:offsets[p + 1].
    """

    features: Floats32
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, store: FeatureStore, features: str = FROZEN) -> "PackedBags":
        """Take the average-pooled features of a store's patients, in its order."""
        return cls(store.pooled(features)[:, 0], store.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises IndexError, and counts from the end
        return self.features[self.offsets[place] : self.offsets[place + 1]]


class MILClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A head of `fit-head` for bags of vectors, with the interface of scikit-learn.

    X is a sequence of bags, each an array (n_i, D) of its instances: a list, an object array, an
    array (B, n, D) or `PackedBags`. y holds two labels of any kind; the second of `classes_`, in
    sorted order, counts as tumoral.

    The settings of the head are those of `HeadSettings`; `epochs`, `batch_size` and
    `images_per_patient` are those of `FitSettings`. Heads of the family `distribution`, and `mean`,
    are solved exactly. The head of `fit-head` on the same training patients gives the same
    probabilities. They are not calibrated: use `CalibratedClassifierCV`. It computes on the CPU.

    `fit` raises SettingsError, a ValueError, for bags or labels of another kind.

    classes_: (2,) the labels. n_features_in_: D. head_: the fitted head, a torch module.
    chosen_: what an exact head chose inside the training bags, such as its penalty.

    >>> bags = [rng.normal(0, 1 + k % 2, (20, 8)) for k in range(30)]
    >>> MILClassifier().fit(bags, [k % 2 for k in range(30)]).predict(bags[:2])
    """

    def __init__(
        self,
        agg: str = _HEAD.agg,
        *,
        unit: Unit = _HEAD.unit,
        k_train: int = _HEAD.k_train,
        k_agg: int = _HEAD.k_agg,
        k_percent: float | None = _HEAD.k_percent,
        k_min: int = _HEAD.k_min,
        reduce: Reduction = _HEAD.reduce,
        loss: RankingLoss = _HEAD.loss,
        temperature: float = _HEAD.temperature,
        momentum: float = _HEAD.momentum,
        solver: Solver = _HEAD.solver,
        penalty: float | None = _HEAD.penalty,
        block_weights: BlockWeights = _HEAD.block_weights,
        quantiles: str = _HEAD.quantiles,
        prototypes: int = _HEAD.prototypes,
        width: int = _HEAD.width,
        layers: int = _HEAD.layers,
        class_weights: ClassWeights = _HEAD.class_weights,
        lr: float = _HEAD.lr,
        weight_decay: float = _HEAD.weight_decay,
        epochs: int = _FIT.epochs,
        batch_size: int = _FIT.batch_size,
        images_per_patient: int | None = _FIT.images_per_patient,
        threads: int | None = _FIT.threads,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        """Take the settings; they are checked when the head is fitted."""
        self.agg = agg
        self.unit = unit
        self.k_train = k_train
        self.k_agg = k_agg
        self.k_percent = k_percent
        self.k_min = k_min
        self.reduce = reduce
        self.loss = loss
        self.temperature = temperature
        self.momentum = momentum
        self.solver = solver
        self.penalty = penalty
        self.block_weights = block_weights
        self.quantiles = quantiles
        self.prototypes = prototypes
        self.width = width
        self.layers = layers
        self.class_weights = class_weights
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.images_per_patient = images_per_patient
        self.threads = threads
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.two_d_array = False
        return tags

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Fit the head on bags X and their labels y, (B,)."""
        features, sizes = _pack(X)
        self.classes_, labels = _two_classes(y, len(sizes))
        settings, how = self._settings()
        own = _features(features, sizes, labels)
        split = Split(
            id=EVERYBODY, seed=self._seed(), repeat=0, train=tuple(own.row), validation=()
        )
        sampling = Sampling(
            batch_size=how.batch_size, images_per_patient=how.images_per_patient, views=1
        )
        with cpu_threads(self.threads), whole_float32():
            fits = [Fit(head=settings, split=split, curve="nobody")]
            fitted = fit_stacked(own, fits, epochs=how.epochs, sampling=sampling)
        self.head_: Head = portable_head(fitted, 0, [own.channels]).eval()
        self.chosen_ = fitted.chosen(0)
        self.n_features_in_ = own.channels
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return the logit of the second class for each bag: (B,)."""
        check_is_fitted(self)
        features, sizes = _pack(X)
        if features.shape[1] != self.n_features_in_:
            raise SettingsError(
                f"X has {features.shape[1]} features, but MILClassifier is expecting "
                f"{self.n_features_in_} features as input"
            )
        bags = Bags.of(sizes)
        with cpu_threads(self.threads), whole_float32(), torch.inference_mode():
            kept = self.head_.keep(torch.from_numpy(features)[:, None])  # (N, 1, D)
            if self.head_.of_logits:
                return np.asarray(self.head_.patient_logits(kept, bags).double().numpy())
            chance = self.head_.patient_probability(kept, bags).double().numpy()
        return logit(chance)

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each of `classes_` for each bag: (B, 2)."""
        second = expit(self.decision_function(X))
        return np.column_stack([1 - second, second])

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the label of each bag whose probability exceeds .5: (B,)."""
        above = self.decision_function(X) > 0
        return cast("NDArray[Any]", self.classes_[above.astype(int)])

    def _settings(self) -> tuple[HeadSettings, FitSettings]:
        head = HeadSettings(**{each.name: getattr(self, each.name) for each in fields(_HEAD)})
        how = FitSettings(
            epochs=self.epochs,
            batch_size=self.batch_size,
            images_per_patient=self.images_per_patient,
            threads=self.threads,
        )
        return resolve(head, solver="exact"), how

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(_MAX_SEED))


def _pack(X: Any) -> tuple[Floats32, NDArray[np.int64]]:
    """Return the instances of all bags (N, D), and how many each has (B,)."""
    if isinstance(X, PackedBags):
        return np.array(X.features, np.float32), np.diff(X.offsets)
    require(
        isinstance(X, np.ndarray | Sequence) and not isinstance(X, str) and len(X) > 0,
        f"X must be a sequence of bags, arrays (n, D); got {type(X).__name__}.",
    )
    parts = [np.asarray(bag) for bag in X]
    for number, own in enumerate(parts):
        require(
            own.ndim == 2 and own.size > 0 and own.dtype.kind in "fiub",
            f"X: bag {number} must be an array (n, D) of numbers, n at least 1; got "
            f"{own.dtype} {own.shape}.",
        )
        require(
            own.shape[1] == parts[0].shape[1],
            f"X: bag {number} must have the {parts[0].shape[1]} features of bag 0; got "
            f"{own.shape[1]}.",
        )
        require(bool(np.isfinite(own).all()), f"X: bag {number} must not hold NaN or infinity.")
    return np.concatenate(parts).astype(np.float32), np.array([len(own) for own in parts])


def _two_classes(y: ArrayLike, bags: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the two labels in order, and which each bag has: (B,)."""
    labels = np.asarray(y)
    check_classification_targets(labels)
    require(labels.shape == (bags,), f"y must have a label per bag, ({bags},); got {labels.shape}.")
    classes, places = np.unique(labels, return_inverse=True)
    require(len(classes) == 2, f"y must have two classes; got {len(classes)} class(es).")
    return classes, places.astype(np.int64)


def _features(features: Floats32, sizes: NDArray[np.int64], labels: NDArray[np.int64]) -> Features:
    """Lay bags out as the head engine reads them; an instance is an image of one pixel."""
    return Features(
        features[:, None, :, None, None],  # type: ignore[arg-type]  # a store has float16
        features[:, None],  # (N, 1, D)
        np.concatenate([[0], np.cumsum(sizes)]),
        [str(number) for number in range(len(sizes))],
        labels,
    )
