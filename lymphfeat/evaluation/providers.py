"""The features that the heads of each split read, and the splits that can be measured on them.

Everything that fits heads asks a `FeatureProvider` and never which kind it is. Patients, labels and
image counts belong to the provider, because all of its sets of features are of the same images.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lymphfeat.cohort.splits import Plan, Split, check_splits, kfold_splits, report_splits
from lymphfeat.errors import LeakageError, SettingsError
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.heads.engine.instances import Features
from lymphfeat.runtime.arrays import Labels
from lymphfeat.settings import FitSettings


@dataclass(frozen=True, kw_only=True)
class FeatureProvider(ABC):
    """Gives the heads of each split their features."""

    ids: tuple[str, ...]  # (P,) all patients
    labels: Labels  # (P,)
    n_images: NDArray[np.int64]  # (P,)

    @abstractmethod
    def plan(self, settings: FitSettings, splits: Sequence[Split] | None = None) -> Plan:
        """Return the splits to measure on, and the inner splits on which choices are made.

        `splits` replace those of the protocol. Raises SettingsError for a split that does not have
        both classes on both sides.
        """

    @abstractmethod
    def set_of(self, split: Split) -> str:
        """Return the name of a split's features; splits with the same name share them."""

    @abstractmethod
    def for_split(self, split: Split) -> Features:
        """Return the features that a split's heads read."""


@dataclass(frozen=True, kw_only=True)
class SharedFeatures(FeatureProvider):
    """One set of features, of frozen weights, for all splits."""

    features: Features

    @classmethod
    def of(cls, features: Features) -> "SharedFeatures":
        """Take features and their patients."""
        return cls(
            ids=tuple(features.row),
            labels=features.labels.cpu().numpy(),
            n_images=np.diff(features.offsets),
            features=features,
        )

    def plan(self, settings: FitSettings, splits: Sequence[Split] | None = None) -> Plan:
        return plan_splits(self.ids, self.labels, settings, splits)

    def set_of(self, split: Split) -> str:
        return FROZEN

    def for_split(self, split: Split) -> Features:
        return self.features


@dataclass(frozen=True, kw_only=True)
class SplitFeatures(FeatureProvider):
    """One set of features per split, of the backbone fine-tuned on it; read when asked for."""

    splits: Sequence[Split]  # those that have features
    read: Callable[[str], Features]  # by the split's id

    def plan(self, settings: FitSettings, splits: Sequence[Split] | None = None) -> Plan:
        """Plan the splits that have features, or those of them that are given.

        Inner splits are planned where all of them have features, too. Raises LeakageError when
        nobody is left to measure on, or no backbone was fine-tuned on a given split.
        """
        plan = Plan.recorded(split for split in self.splits if split.validation)
        if not plan.outer:
            raise LeakageError(
                "the backbones of these features were fine-tuned on all labelled patients: none "
                "are left to evaluate heads on. Extract with --splits kfold:5, or with frozen "
                "weights."
            )
        if splits:
            wanted = Plan.recorded(splits).outer
            _check_tuned(wanted, plan.outer)
            plan = plan.only([split.id for split in wanted])
        label_of = dict(zip(self.ids, self.labels.tolist(), strict=True))
        check_splits(plan.outer, label_of, "splits of these features")
        return Plan.flat(plan.outer) if settings.protocol == "report" else plan

    def set_of(self, split: Split) -> str:
        return split.id

    def for_split(self, split: Split) -> Features:
        return self.read(split.id)


@dataclass(frozen=True, kw_only=True)
class JoinedFeatures(FeatureProvider):
    """Features of several stores for the same images; heads of several sets read them all."""

    providers: Sequence[FeatureProvider]

    @classmethod
    def of(cls, providers: Sequence[FeatureProvider]) -> "JoinedFeatures":
        """Join providers of the same patients and images."""
        first = providers[0]
        return cls(ids=first.ids, labels=first.labels, n_images=first.n_images, providers=providers)

    def plan(self, settings: FitSettings, splits: Sequence[Split] | None = None) -> Plan:
        """Plan the splits that all fine-tuned features have, or those of them that are given."""
        tuned = [each for each in self.providers if isinstance(each, SplitFeatures)]
        first, *others = tuned or self.providers[:1]
        plan = first.plan(settings, splits)
        for other in others:
            other.plan(settings, plan.outer)  # raises LeakageError for splits it does not have
        return plan

    def set_of(self, split: Split) -> str:
        return "+".join(each.set_of(split) for each in self.providers)

    def for_split(self, split: Split) -> Features:
        first, *others = (each.for_split(split) for each in self.providers)
        return first.joined_with(others)


def _check_tuned(splits: Sequence[Split], tuned: Sequence[Split]) -> None:
    """Raise LeakageError for a split on which no backbone was fine-tuned."""
    for split in splits:
        if split not in tuned:
            raise LeakageError(
                f"split {split.id}: no backbone of these features was fine-tuned on its training "
                f"patients alone; there are backbones for {', '.join(s.id for s in tuned)}."
            )


def plan_splits(
    ids: Sequence[str],
    labels: Labels,
    settings: FitSettings,
    splits: Sequence[Split] | None = None,
) -> Plan:
    """Return the splits of a protocol, or the given ones, with the inner splits it chooses on.

    `ids` and `labels` (P,) are of all patients; those without a label are left out. Raises
    SettingsError where a class has too few patients.
    """
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    if splits is None:
        plan = Plan.flat(_protocol_splits(ids, labels, settings))
    else:
        plan = Plan.recorded(splits)
    check_splits(plan.outer, label_of, "splits")
    if settings.protocol == "report":
        return Plan.flat(plan.outer)
    return plan if plan.is_nested else Plan.nested(plan.outer, label_of, folds=settings.folds)


def _protocol_splits(ids: Sequence[str], labels: Labels, settings: FitSettings) -> list[Split]:
    known = [id for id, label in zip(ids, labels.tolist(), strict=True) if label >= 0]
    truth = labels[labels >= 0]
    if settings.protocol == "report":
        return report_splits(known, truth, seeds=settings.seeds, seed=settings.seed)
    repeats = kfold_splits(
        known, truth, folds=settings.folds, seeds=settings.seeds, seed=settings.seed
    )
    return [split for repeat in repeats for split in repeat.outer]


def load_features(
    stores: Sequence[FeatureStore],
    dtype: torch.dtype,
    device: torch.device,
    *,
    views: int | None = None,
    memory: int | None = None,
) -> FeatureProvider:
    """Open the first `views` of stores (None: all): their frozen features, or each split's own.

    Features that take more than half of `memory` bytes (None: of what is free) are read from their
    file at every step. Raises StoreError unless all stores are of the same images, and
    SettingsError if one has fewer views.
    """
    for other in stores[1:]:
        stores[0].check_same_images(other)
    each = None if memory is None else memory // len(stores)
    providers = [_load(store, dtype, device, views, each) for store in stores]
    return providers[0] if len(providers) == 1 else JoinedFeatures.of(providers)


def _load(
    store: FeatureStore,
    dtype: torch.dtype,
    device: torch.device,
    views: int | None,
    memory: int | None,
) -> FeatureProvider:
    if views is not None and views > store.shape.views:
        raise SettingsError(
            f"views (={views}) must be at most the {store.shape.views} of {store.path}; "
            "run `lymphfeat extract --views` for more."
        )

    def read(name: str) -> Features:
        store.check_finite(name)
        return Features(
            store.features(name)[:, :views],  # (N, V, C, h, w)
            store.pooled(name)[:, :views],  # (N, V, C)
            store.offsets,
            store.ids,
            store.labels,
            dtype=dtype,
            device=device,
            memory=memory,
        )

    if FROZEN in store.feature_sets:
        return SharedFeatures.of(read(FROZEN))
    return SplitFeatures(
        ids=store.ids,
        labels=store.labels,
        n_images=store.n_images,
        splits=store.splits,
        read=read,
    )
