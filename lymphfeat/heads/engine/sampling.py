"""Which patients, images and views a split's heads see at each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.heads.engine.instances import Instances


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the mini-batches of every fit are drawn."""

    batch_size: int  # patients, or selected instances
    images_per_patient: int | None = None  # drawn again at every step; None means all
    views: int = 1  # one of them is drawn for every image at every step

    @property
    def whole(self) -> bool:
        """Whether every step uses all images of a patient, unaltered."""
        return self.images_per_patient is None and self.views == 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some patients and the images drawn of them, patient after patient; on the CPU."""

    patients: Tensor  # (b,)
    sizes: NDArray[np.int64]  # (b,) images of each
    images: Tensor | None  # (n,) rows; None is all of the patients'
    views: Tensor | None  # (n,); None is the identity


class Sampler:
    """Draws for one split, from the split's own generator."""

    def __init__(
        self,
        train: NDArray[np.int64],
        instances: Instances,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        """Take the rows of the training patients."""
        self.train = torch.from_numpy(train)
        self._first, self._last = instances.images[:-1], instances.images[1:]
        self._sampling, self._generator = sampling, generator

    def epoch(self) -> list[Batch]:
        """Draw batches of every training patient once, except for an incomplete last batch."""
        order = self.shuffled(len(self.train))
        batches = batched(self.train[order][:, None], self._sampling.batch_size, -1)[..., 0]
        return [self._draw(batch[batch >= 0]) for batch in batches]

    def _draw(self, patients: Tensor) -> Batch:
        rows = patients.numpy()
        sizes = self._last[rows] - self._first[rows]
        if self._sampling.whole:
            return Batch(patients=patients, sizes=sizes, images=None, views=None)
        images = torch.cat([self.images_of(int(row)) for row in rows])
        most = self._sampling.images_per_patient
        return Batch(
            patients=patients,
            sizes=sizes if most is None else sizes.clip(max=most),
            images=images,
            views=self.views(images.shape),
        )

    def images_of(self, patient: int) -> Tensor:
        """Draw `images_per_patient` of a patient's images; their rows (n,), in order."""
        first, last = int(self._first[patient]), int(self._last[patient])
        most = self._sampling.images_per_patient
        return draw_images(first, last - first, most, self._generator)

    def views(self, shape: Sequence[int]) -> Tensor | None:
        """Draw a view for each image; None where there is only one view."""
        if self._sampling.views == 1:
            return None
        return torch.randint(self._sampling.views, tuple(shape), generator=self._generator)

    def shuffled(self, n: int) -> Tensor:
        """Draw an order of n things."""
        return torch.randperm(n, generator=self._generator)


def draw_images(first: int, size: int, most: int | None, generator: torch.Generator) -> Tensor:
    """Draw at most that many (None: all) of a patient's images; their rows (n,), in order."""
    if most is None or size <= most:
        return torch.arange(first, first + size)
    return first + torch.randperm(size, generator=generator)[:most].sort().values


def batched(rows: Tensor, batch_size: int, padding: int) -> Tensor:
    """Cut shuffled rows (n, …) into (steps, batch, …), without the incomplete last batch.

    Fewer rows than one batch are padded to a full one, so that there is always one step.
    """
    steps = max(1, len(rows) // batch_size)
    rows = rows[: steps * batch_size]
    padded = rows.new_full((steps * batch_size, *rows.shape[1:]), padding)
    padded[: len(rows)] = rows
    return padded.view(steps, batch_size, *rows.shape[1:])
