"""Fits and their results."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.splits import Split
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.grid import head_name
from lymphfeat.heads.registry import LinearAggregator, aggregator_of
from lymphfeat.runtime.mapped_arrays import map_array
from lymphfeat.settings import HeadSettings

EXTRAS = ("gamma", "beta", "running_mean", "running_var")  # of bnsigmoid, besides the scorer
_LARGE = 1 << 30  # bytes of curves above which they are kept in a temporary file

Curve = Literal["nobody", "held-out", "everyone"]

EVERYBODY = "everybody"  # the id of a split that holds nobody out


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One head's settings on one split."""

    head: HeadSettings
    split: Split
    curve: Curve = "everyone"  # who is evaluated after every epoch; after the last it is everyone


class FittedModule(Protocol):
    """A fitted head that is more than a linear scorer and its aggregator, on the CPU."""

    @property
    def chosen(self) -> str:
        """What the head chose on its training patients; empty if nothing."""

    def image_logits(self, sets: Sequence[Tensor], bags: Bags) -> Tensor:
        """Score the images of whole patients, from their instances (n, U, C) in each set: (n,)."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return everything that the head has learnt, by name."""


@dataclass(frozen=True, kw_only=True)
class FittedHeads:
    """The results of fits, in the order requested."""

    fits: tuple[Fit, ...]
    curves: NDArray[np.float32]  # (fits, epochs, P) probabilities after every epoch; NaN unasked
    losses: NDArray[np.float32]  # (fits, epochs) mean training loss
    weight: NDArray[np.float32]  # (fits, C), as applied to raw features; NaN of modules
    bias: NDArray[np.float32]  # (fits,)
    extras: dict[str, NDArray[np.float32]]  # gamma, beta, running_mean, running_var: (fits,)
    # (fits,) how far any patient's last probability is from the same weights' in float32
    rounding: NDArray[np.float32]
    modules: dict[int, FittedModule] = field(default_factory=dict)  # by position

    @cached_property
    def positions(self) -> Mapping[str, Mapping[str, int]]:
        """The fits of every head, by its name, and by their splits' ids."""
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for i, fit in enumerate(self.fits):
            found[head_name(fit.head)][fit.split.id] = i
        return dict(found)

    @classmethod
    def empty(
        cls, fits: Sequence[Fit], *, epochs: int, patients: int, channels: int
    ) -> "FittedHeads":
        """Allocate the results of fits."""
        n = len(fits)
        return cls(
            fits=tuple(fits),
            curves=_nan((n, epochs, patients)),
            losses=np.zeros((n, epochs), np.float32),
            weight=np.full((n, channels), np.nan, np.float32),
            bias=np.full(n, np.nan, np.float32),
            extras={name: np.zeros(n, np.float32) for name in EXTRAS},
            rounding=np.zeros(n, np.float32),
        )

    @classmethod
    def joined(cls, parts: Sequence["FittedHeads"]) -> "FittedHeads":
        """Concatenate the fits of several calls."""
        fits = tuple(fit for part in parts for fit in part.fits)
        _, epochs, patients = parts[0].curves.shape
        channels = parts[0].weight.shape[1]
        whole = cls.empty(fits, epochs=epochs, patients=patients, channels=channels)
        start = 0
        for part in parts:
            whole.put(range(start, start + len(part.fits)), part)
            start += len(part.fits)
        return whole

    def take(self, positions: Sequence[int]) -> "FittedHeads":
        """Return some of the fits; neighbours share their arrays with these."""
        index = list(positions)
        where = _where(index)
        return FittedHeads(
            fits=tuple(self.fits[i] for i in index),
            curves=self.curves[where],
            losses=self.losses[where],
            weight=self.weight[where],
            bias=self.bias[where],
            extras={name: values[where] for name, values in self.extras.items()},
            rounding=self.rounding[where],
            modules={
                new: self.modules[old] for new, old in enumerate(index) if old in self.modules
            },
        )

    def image_logits(
        self,
        position: int,
        sets: Sequence[Tensor],
        sizes: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Score images by one of the heads, from their instances (n, U, C) in each set: (n,).

        `sizes` are the patients' numbers of images; None means that each is a patient of its own,
        which matters to heads that compare the images of a patient.
        """
        if position in self.modules:
            bags = Bags.of(np.ones(len(sets[0]), np.int64) if sizes is None else sizes)
            return np.asarray(self.modules[position].image_logits(sets, bags).numpy())
        pooled = sets[0].mean(1).numpy()  # (n, C)
        return np.asarray(pooled @ self.weight[position] + self.bias[position])

    def chosen(self, position: int) -> str:
        """Say what one of the heads chose on its training patients; empty if nothing."""
        return self.modules[position].chosen if position in self.modules else ""

    def tensors(self, position: int) -> dict[str, NDArray[np.float32]]:
        """Return everything that one of the heads has learnt, by name."""
        if position in self.modules:
            state = self.modules[position].state_dict()
            return {name: np.asarray(value.numpy()) for name, value in state.items()}
        learns = aggregator_of(self.fits[position].head, LinearAggregator).learns
        one = slice(position, position + 1)
        return {
            "weight": self.weight[position],
            "bias": self.bias[one],
            **{name: self.extras[name][one] for name in learns},
        }

    def put(self, positions: Sequence[int], part: "FittedHeads") -> None:
        """Write the results of some of the fits."""
        index = list(positions)
        for name in ("curves", "losses", "weight", "bias", "rounding"):
            getattr(self, name)[index] = getattr(part, name)
        for name, values in part.extras.items():
            self.extras[name][index] = values
        self.modules.update({index[i]: module for i, module in part.modules.items()})


def _where(index: list[int]) -> slice | list[int]:
    """Return what takes rows: of neighbours a slice, by which large curves stay in their file."""
    if index and index == list(range(index[0], index[0] + len(index))):
        return slice(index[0], index[0] + len(index))
    return index


def _nan(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array of NaN; a large one is mapped from a file, so it need not fit in memory."""
    if np.prod(shape, dtype=np.int64) * 4 < _LARGE:
        return np.full(shape, np.nan, np.float32)
    what = f"the learning curves of {shape[0]:,} fits"
    array = map_array(shape, np.float32, what, "fit fewer heads, seeds or epochs at a time")
    array[:] = np.nan
    return array


def split_generator(split: Split) -> torch.Generator:
    """Return the generator of a split's initialisation and order, the only seed of a fit."""
    return torch.Generator().manual_seed(zlib.crc32(f"{split.seed}/{split.id}".encode()))
