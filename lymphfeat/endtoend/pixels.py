"""Crops decoded once and kept as bytes; normalised and flipped on the device, batch by batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lymphfeat.backbones import normalize
from lymphfeat.cohort import Cohort
from lymphfeat.compute import to_device
from lymphfeat.images import Normalization, decode_crops
from lymphfeat.processes import share
from lymphfeat.progress import Progress, silent

# Of a GPU's free memory; beyond it the crops stay in host memory and are copied batch by batch.
_RESIDENT_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images to be seen in one go: rows of a `PixelCache`, and how each is flipped. On the CPU."""

    rows: Tensor  # (n,) int64
    flips: Tensor  # (n, 2) bool: left-right, upside-down

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, n: int) -> "ImageBatch":
        """Keep the first n images."""
        return ImageBatch(rows=self.rows[:n], flips=self.flips[:n])

    def rest(self, n: int) -> "ImageBatch":
        """Keep all but the first n images."""
        return ImageBatch(rows=self.rows[n:], flips=self.flips[n:])

    def share(self) -> "ImageBatch":
        """Keep this process's part."""
        return ImageBatch(rows=share(self.rows), flips=share(self.flips))

    def chunks(self, size: int) -> list["ImageBatch"]:
        """Cut into parts of at most `size`, as equal as can be, in order."""
        count = -(-len(self) // size)
        if not count:
            return []
        parts = zip(self.rows.tensor_split(count), self.flips.tensor_split(count), strict=True)
        return [ImageBatch(rows=rows, flips=flips) for rows, flips in parts]


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Patients to learn from or to measure: where a cache has their images, and their labels."""

    starts: Tensor  # (P,) int64, row of the first image
    sizes: Tensor  # (P,) int64
    labels: Tensor  # (P,) float32

    @classmethod
    def of(cls, patients: Cohort, cached: Cohort) -> "Roster":
        """Find patients in the cache of a cohort that has them all."""
        start = dict(zip(cached.ids, cached.offsets[:-1].tolist(), strict=True))
        return cls(
            starts=torch.tensor([start[id] for id in patients.ids]),
            sizes=torch.from_numpy(patients.n_images),
            labels=torch.from_numpy(patients.labels.astype(np.float32)),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def images(self) -> "ImageBatch":
        """Return all images, patient after patient, none of them flipped."""
        rows = [
            torch.arange(start, start + size)
            for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True)
        ]
        return unflipped(torch.cat(rows))


class PixelCache:
    """The crops of all images of a cohort, patient after patient."""

    def __init__(self, pixels: Tensor, normalization: Normalization, device: torch.device) -> None:
        """Take crops (N, 3, H, W) uint8; they move to the device if it has room for them."""
        self.device = device
        self._normalization = normalization
        self._resident = _fits(pixels, device)
        self._pixels = pixels.to(device) if self._resident else pixels

    @classmethod
    def decode(
        cls,
        cohort: Cohort,
        crop: int,
        normalization: Normalization,
        device: torch.device,
        progress: Progress = silent,
    ) -> "PixelCache":
        """Decode every image of a cohort."""
        paths = [path for images in cohort.images for path in images]

        def report(done: int, total: int, text: str = "") -> None:
            progress(done, total, "decoding images")

        pixels = decode_crops(paths, crop, threads=torch.get_num_threads(), progress=report)
        return cls(torch.from_numpy(pixels), normalization, device)

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, batch: ImageBatch) -> Tensor:
        """Return the images of a batch, flipped and normalised: (n, 3, H, W) on the device."""
        pixels = self._gather(batch.rows)
        if batch.flips.any():
            pixels = flip_each(pixels, to_device(batch.flips, self.device))
        images = normalize(pixels, self._normalization)
        return images.contiguous(memory_format=torch.channels_last)

    def _gather(self, rows: Tensor) -> Tensor:
        if self._resident:
            return self._pixels[to_device(rows, self.device)]
        return to_device(self._pixels[rows], self.device)


def _fits(pixels: Tensor, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return bool(pixels.nbytes < _RESIDENT_SHARE * free)


def flip_each(images: Tensor, flips: Tensor) -> Tensor:
    """Flip each of (n, C, H, W) left-right where flips (n, 2) says so, and upside-down likewise."""
    for column, dim in ((0, -1), (1, -2)):
        images = torch.where(flips[:, column, None, None, None], images.flip(dim), images)
    return images


def draw_flips(n: int, generator: torch.Generator, *, enabled: bool = True) -> Tensor:
    """Draw whether to flip each of n images: (n, 2) bool, each with probability one half."""
    if not enabled:
        return torch.zeros(n, 2, dtype=torch.bool)
    return torch.rand(n, 2, generator=generator) < 0.5


def unflipped(rows: Tensor) -> ImageBatch:
    """Return the batch of rows (n,), none of them flipped."""
    return ImageBatch(rows=rows, flips=torch.zeros(len(rows), 2, dtype=torch.bool))
