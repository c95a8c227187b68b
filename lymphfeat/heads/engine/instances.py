"""A store's feature maps as instances that trainers read: in memory, or streamed from the file."""

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.images import VIEWS
from lymphfeat.errors import StoreError
from lymphfeat.features.views import flip_view
from lymphfeat.heads.bags import Bags
from lymphfeat.runtime.devices import available_memory
from lymphfeat.runtime.part_reader import PartReader

_CHUNK_BYTES = 64 << 20  # of feature maps laid out as pixels at a time
_CHUNK_VALUES = 4 << 20  # logits made at a time
_CHUNK_ROWS = 1 << 15  # instances read at a time
T = TypeVar("T")


class Source(Protocol):
    """Where the instances of one unit are stored."""

    def span(self, start: int, stop: int, view: int) -> Tensor:
        """Return the instances (m, C) of images start:stop in a view."""

    def gather(self, images: Tensor, views: Tensor | None) -> Tensor:
        """Return the instances (n, U, C) of images (n,), each in its view (n,) or the identity."""

    def pick(self, rows: Tensor, views: Tensor | None) -> Tensor:
        """Return single instances (n, C) by their rows (n,), each in its view or the identity."""


class Resident:
    """Instances in memory, on the device."""

    def __init__(self, values: Tensor, per_image: int) -> None:
        """Take values (V, N · U, C)."""
        self._values, self._per_image = values, per_image

    def span(self, start: int, stop: int, view: int) -> Tensor:
        return self._values[view, start * self._per_image : stop * self._per_image]

    def gather(self, images: Tensor, views: Tensor | None) -> Tensor:
        return self._select(images, views, self._per_image)

    def pick(self, rows: Tensor, views: Tensor | None) -> Tensor:
        return self._select(rows, views, 1)[:, 0]

    def _select(self, places: Tensor, views: Tensor | None, together: int) -> Tensor:
        """Return instances (n, together, C), where so many neighbours have one place (n,)."""
        m, channels = self._values.shape[1:]
        places = places.to(self._values.device)
        if views is not None:
            places = places + views.to(places.device) * (m // together)
        return self._values.view(-1, together, channels).index_select(0, places)


class Streamed:
    """Pixels read from the mapped file every time: for stores larger than memory."""

    def __init__(
        self,
        maps: NDArray[np.floating[Any]],
        dtype: torch.dtype,
        device: torch.device,
        refuse: Callable[[int], NoReturn],
    ) -> None:
        """Take maps (N, V, C, h, w); `refuse` is called with the row of one that is not finite."""
        self._maps, self._dtype, self._device = PartReader(maps), dtype, device
        self._shape, self._refuse = maps.shape[2:], refuse

    def span(self, start: int, stop: int, view: int) -> Tensor:
        return self.pixels(start, stop, view).contiguous().flatten(0, 1)

    def pixels(self, start: int, stop: int, view: int) -> Tensor:
        """Return the pixels (n, h · w, C) of images start:stop in a view, as a transposed view."""
        maps = self._to_device(self._maps.read(slice(start, stop), view), range(start, stop))
        return _as_pixels(maps, view)

    def gather(self, images: Tensor, views: Tensor | None) -> Tensor:
        rows = images.cpu().numpy()
        if views is None:
            return self._read(rows, 0)
        of_image = views.cpu().numpy()
        places = [np.flatnonzero(of_image == view) for view in np.unique(of_image)]
        parts = [self._read(rows[place], int(of_image[place[0]])) for place in places]
        order = torch.from_numpy(np.concatenate(places).argsort()).to(self._device)
        return torch.cat(parts)[order]

    def pick(self, rows: Tensor, views: Tensor | None) -> Tensor:
        channels, height, width = self._shape
        per_image = height * width
        some = max(1, _CHUNK_BYTES // (channels * per_image * self._dtype.itemsize))  # images read
        parts = []
        for start in range(0, len(rows), some):
            own = slice(start, start + some)
            images = self.gather(rows[own] // per_image, None if views is None else views[own])
            place = (rows[own] % per_image).to(images.device)
            parts.append(images[torch.arange(len(images), device=images.device), place])
        return torch.cat(parts)

    def _read(self, rows: NDArray[np.int64], view: int) -> Tensor:
        return _as_pixels(self._to_device(self._maps.read(rows, view), rows), view).contiguous()

    def _to_device(self, maps: NDArray[Any], rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        values = torch.from_numpy(maps).to(self._device, self._dtype)
        if not values.sum().isfinite():  # a sum of float32 may overflow, too
            wrong = (~values.isfinite()).flatten(1).any(1).nonzero()
            if len(wrong):
                self._refuse(int(rows[int(wrong[0])]))
        return values


def _as_pixels(maps: Tensor, view: int) -> Tensor:
    """Turn maps (n, C, h, w) of a view into (n, h · w, C), pixels at their image positions."""
    return flip_view(maps, VIEWS[view]).flatten(2).mT


@dataclass(frozen=True)
class Instances:
    """All instances of one unit, patient after patient."""

    source: Source
    per_image: int
    images: NDArray[np.int64]  # (P + 1,) patient p has images images[p]:images[p + 1]
    device: torch.device

    @cached_property
    def bags(self) -> Bags:
        """The patients."""
        return Bags.of(np.diff(self.images) * self.per_image, self.device)

    @property
    def n_instances(self) -> int:
        return int(self.images[-1]) * self.per_image

    @property
    def channels(self) -> int:
        return int(self.of_patient(0).shape[1])

    @property
    def mean_size(self) -> float:
        """How many instances a patient has, on average."""
        return self.n_instances / (len(self.images) - 1)

    def of_patient(self, patient: int) -> Tensor:
        """Return a patient's instances (m, C)."""
        return self.source.span(int(self.images[patient]), int(self.images[patient + 1]), 0)

    def images_of(self, patients: Tensor) -> Tensor:
        """Return the rows of all images of some patients (b,), patient after patient."""
        first, last = self.images[patients], self.images[patients + 1]
        return torch.cat([torch.arange(*ends) for ends in zip(first, last, strict=True)])

    def pick(self, rows: Tensor, views: Tensor | None) -> Tensor:
        """Return single instances (…, C) by their rows (…), each in its view (…)."""
        chosen = self.source.pick(rows.flatten(), None if views is None else views.flatten())
        return chosen.view(*rows.shape, -1)

    def chunks(self, heads: int, view: int = 0) -> Iterator[tuple[slice, Tensor, Bags]]:
        """Yield all patients, some at a time (`cut`): (patients, instances (m, C), bags)."""
        for own in self.cut(np.arange(len(self.images) - 1), heads):
            yield slice(int(own[0]), int(own[-1]) + 1), *self.read(own, view)

    def read(self, patients: NDArray[np.int64], view: int = 0) -> tuple[Tensor, Bags]:
        """Return the instances (m, C) of some patients (n,); neighbours' are not copied."""
        first, last = self.images[patients], self.images[patients + 1]
        new = np.flatnonzero(first[1:] != last[:-1]) + 1  # where no neighbour follows
        starts, stops = first[[0, *new]].tolist(), last[[*(new - 1), -1]].tolist()
        spans = [self.source.span(*ends, view) for ends in zip(starts, stops, strict=True)]
        bags = Bags.of((last - first) * self.per_image, self.device)
        return spans[0] if len(spans) == 1 else torch.cat(spans), bags

    def cut(self, patients: NDArray[np.int64], heads: int) -> Iterator[NDArray[np.int64]]:
        """Cut patients (n,) into chunks, each as large as the limit on its logits of `heads` heads
        allows, at least a patient.
        """
        ends = np.concatenate([[0], np.diff(self.images)[patients].cumsum()])
        limit = max(1, min(_CHUNK_ROWS, _CHUNK_VALUES // heads) // self.per_image)  # images
        start = 0
        while start < len(ends) - 1:
            stop = int(np.searchsorted(ends, ends[start] + limit, side="right")) - 1
            stop = max(stop, start + 1)
            yield patients[start:stop]
            start = stop


class Features:
    """A store's feature maps as matrices of instances, and their patients."""

    def __init__(
        self,
        maps: NDArray[np.float16],
        pooled: NDArray[np.float32],
        offsets: NDArray[np.int64],
        ids: Sequence[str],
        labels: NDArray[np.int64],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        memory: int | None = None,
    ) -> None:
        """Take maps (N, V, C, h, w), or (N, C, h, w) of one view, and their averages (N, V, C).

        Averages are laid out now, pixels on first use; where they would not fit into half of
        `memory` bytes (None: the free memory) they are read from `pooled` and `maps` each time
        instead. `maps` that hold NaN or infinity raise StoreError, naming the patient, when they
        are read.
        """
        self._maps = maps if maps.ndim == 5 else maps[:, None]
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self._averages = pooled if pooled.ndim == 3 else pooled[:, None]
        self.offsets = offsets
        self.labels = torch.from_numpy(np.array(labels)).to(self.device)
        self.row = {patient: row for row, patient in enumerate(ids)}
        self._memory, self._kept = memory, 0  # bytes
        self._images = self._keep(self._averages[..., None, None])
        self.others: tuple[Features, ...] = ()
        self._made: dict[Hashable, Any] = {}

    @property
    def sets(self) -> tuple["Features", ...]:
        """These features and those of other backbones for the same images."""
        return (self, *self.others)

    def joined_with(self, others: Sequence["Features"]) -> "Features":
        """Return the same features, with others of the same images beside them."""
        joined = copy.copy(self)
        joined.others, joined._made = tuple(others), {}
        return joined

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what is made of these features under a key, made when first asked for."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    @property
    def n_views(self) -> int:
        return int(self._averages.shape[1])

    @property
    def channels(self) -> int:
        return int(self._averages.shape[2])

    @property
    def images(self) -> Tensor:
        """(N, C) the average-pooled maps of the identity view, in memory."""
        return self._images.span(0, len(self._averages), 0)

    def images_of(self, patients: NDArray[np.int64], unit: str) -> Tensor:
        """Return the instances (n, U, C) of patients' images, in float32 on the CPU."""
        instances = self.of_unit(unit)
        values, _ = instances.read(patients)
        return values.float().cpu().view(-1, instances.per_image, self.channels)

    @cached_property
    def _pixels(self) -> Source:
        return self._keep(self._maps)

    def _room(self) -> int:
        """Return how many bytes may be laid out; what is free knows of all that has been."""
        if self._memory is None:
            return available_memory(self.device) // 2
        return self._memory // 2 - self._kept

    def _keep(self, maps: NDArray[np.floating[Any]]) -> Source:
        """Return the source of maps (N, V, C, h, w): laid out in memory if they fit."""
        source = Streamed(maps, self.dtype, self.device, self._refuse)
        size = maps.size * self.dtype.itemsize
        if size > self._room():
            return source
        self._kept += size
        n, views, channels, height, width = maps.shape
        shape = (views, n, height * width, channels)
        pixels = torch.empty(shape, dtype=self.dtype, device=self.device)
        step = max(1, _CHUNK_BYTES // (maps[0, 0].nbytes * 2))
        for view in range(views):
            for start in range(0, n, step):
                stop = min(start + step, n)
                pixels[view, start:stop] = source.pixels(start, stop, view)
        return Resident(pixels.flatten(1, 2), height * width)

    def _refuse(self, image: int) -> NoReturn:
        """Raise StoreError, naming the patient, for an image whose map is not finite."""
        patient = list(self.row)[int(np.searchsorted(self.offsets, image, side="right")) - 1]
        raise StoreError(
            f"features of {patient} (row {image} of the store) must be finite numbers; the store "
            "is damaged, extract it again with --force."
        )

    def of_unit(self, unit: str) -> Instances:
        """Return the instances of a unit: pixel, image, or patient (the mean of its images)."""
        if unit == "patient":
            count, total, _ = self.patient_sums
            means = (total / count).to(self.dtype)[None]  # (1, P, C)
            return Instances(Resident(means, 1), 1, np.arange(len(self.row) + 1), self.device)
        if unit == "pixel":
            per_image = math.prod(self._maps.shape[3:])
            return Instances(self._pixels, per_image, self.offsets, self.device)
        return Instances(self._images, 1, self.offsets, self.device)

    @cached_property
    def patient_sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each patient's number of images (P, 1), their sum (P, C) and the sum of their squares."""
        totals, squares = [], []
        few = 4 * self.channels  # so that a chunk's squares fit into a cache
        for _, images, bags in self.of_unit("image").chunks(few):
            exact = images.double()
            totals.append(bags.sum(exact))
            squares.append(bags.sum(exact**2))
        count = torch.from_numpy(np.diff(self.offsets))[:, None].to(self.device)
        return count, torch.cat(totals), torch.cat(squares)

    def in_float32(self) -> "Features":
        """Return the same features in float32, read from the file."""
        own = Features(
            self._maps,
            self._averages,
            self.offsets,
            list(self.row),
            self.labels.cpu().numpy(),
            device=self.device,
            memory=0,
        )
        return own.joined_with([other.in_float32() for other in self.others])

    def rows_of(self, patients: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self.row[patient] for patient in patients], np.int64)
