"""Ragged bags: instances of many patients in one array, without padding to the largest patient.

Everywhere M counts instances, B bags (patients), H heads; a score array is (M, H), instances of one
bag contiguous and in order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.runtime.devices import to_device


@dataclass(frozen=True)
class Bags:
    """How M instances are cut into B bags."""

    sizes: Tensor  # (B,) int64, each at least 1
    n_instances: int  # M, their sum; asking the device for it would mean waiting for the device

    @classmethod
    def of(
        cls, sizes: Sequence[int] | NDArray[np.int64] | Tensor, device: torch.device | None = None
    ) -> "Bags":
        """Take sizes (B,) from the host to a device."""
        array = np.asarray(sizes, np.int64)
        host = torch.as_tensor(array)
        return cls(host if device is None else to_device(host, device), int(array.sum()))

    @cached_property
    def n_bags(self) -> int:
        return len(self.sizes)

    @cached_property
    def offsets(self) -> Tensor:
        """(B + 1,) bag b's instances are rows offsets[b]:offsets[b + 1]."""
        return torch.nn.functional.pad(self.sizes.cumsum(0), (1, 0))

    @cached_property
    def index(self) -> Tensor:
        """(M,) the bag of each instance."""
        bags = torch.arange(self.n_bags, device=self.sizes.device)
        return bags.repeat_interleave(self.sizes, output_size=self.n_instances)

    def times(self, n: int) -> "Bags":
        """Return the bags when every instance becomes `n` (an image its h·w pixels)."""
        return Bags(self.sizes * n, self.n_instances * n)

    def sum(self, values: Tensor) -> Tensor:
        """Add up the values (M, H) of each bag: (B, H)."""
        return self._reduce(values, "sum")

    def max(self, values: Tensor) -> Tensor:
        """Return the largest value (M, H) of each bag: (B, H)."""
        return self._reduce(values, "max")

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        # Unsafe skips a check of the sizes that would have to wait for the device.
        return torch.segment_reduce(values, how, lengths=self.sizes, axis=0, unsafe=True)

    def mean(self, values: Tensor) -> Tensor:
        """Average the values (M, H) of each bag: (B, H)."""
        return self.sum(values) / self.sizes[:, None]

    def softmax(self, values: Tensor) -> Tensor:
        """Return exp(value) divided by its sum over the bag: (M, H) -> (M, H)."""
        powers = (values - self.spread(self.max(values.detach()))).exp()
        return powers / self.spread(self.sum(powers))

    def spread(self, per_bag: Tensor) -> Tensor:
        """Give every instance its bag's value: (B, H) -> (M, H)."""
        return per_bag.index_select(0, self.index)

    def argmax(self, values: Tensor) -> Tensor:
        """Return the row of each bag's largest value, the first of equals: (M, H) -> (B, H)."""
        values = values.detach()
        largest = self.max(values)  # (B, H)
        rows = torch.arange(len(values), device=values.device)[:, None]  # (M, 1)
        candidates = torch.where(values == self.spread(largest), rows, len(values))  # (M, H)
        first = candidates.new_full(largest.shape, len(values))
        return first.scatter_reduce_(
            0, self.index[:, None].expand_as(candidates), candidates, "amin"
        )

    @cached_property
    def buckets(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Bags of similar size, for work that needs a rectangle: (bags (b,), rows (b, n)) each.

        Within a bucket bags are padded to the bucket's largest with row M. Sizes of one bucket
        differ by at most a quarter, so at most a fifth of a rectangle is padding.
        """
        sizes = self.sizes.cpu().numpy()
        order = np.argsort(sizes, kind="stable")
        buckets = []
        start = 0
        while start < len(order):
            limit = math.floor(sizes[order[start]] * 1.25)
            stop = int(np.searchsorted(sizes[order], limit, side="right"))
            buckets.append(self._bucket(torch.from_numpy(order[start:stop]).to(self.sizes.device)))
            start = stop
        return tuple(buckets)

    def _bucket(self, bags: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.sizes[bags]
        within = torch.arange(int(sizes.max()), device=bags.device)  # (n,)
        rows = self.offsets[bags][:, None] + within  # (b, n)
        return bags, rows.masked_fill_(within >= sizes[:, None], self.n_instances)
