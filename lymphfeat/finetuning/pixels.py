"""Crops decoded once and kept as bytes; augmented and normalised on the device, batch by batch.

Crops that do not fit in memory are mapped from an unnamed file in the temporary folder ($TMPDIR).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.image_checks import check_images
from lymphfeat.cohort.images import Normalization, decode_crops, find_normalization
from lymphfeat.cohort.stains import stain_normaliser
from lymphfeat.features.views import normalize
from lymphfeat.finetuning.augmentation import Views, unaltered
from lymphfeat.runtime.devices import available_memory, to_device
from lymphfeat.runtime.mapped_arrays import map_array
from lymphfeat.runtime.processes import share
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import BackboneSettings

# Of a GPU's free memory; beyond it the crops stay in host memory and are copied batch by batch.
_RESIDENT_SHARE = 0.4
# Of the free host memory; beyond it the crops are mapped from a file.
_HOST_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of one pass: rows of a `PixelCache`, and the view of each. On the CPU."""

    rows: Tensor  # (n,) int64
    views: Views

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, n: int) -> "ImageBatch":
        """Keep the first n images."""
        return self._cut(lambda table: table[:n])

    def rest(self, n: int) -> "ImageBatch":
        """Keep all but the first n images."""
        return self._cut(lambda table: table[n:])

    def share(self) -> "ImageBatch":
        """Keep this process's part."""
        return self._cut(share)

    def chunks(self, size: int) -> list["ImageBatch"]:
        """Cut into parts of at most `size`, as equal as possible, in order."""
        count = -(-len(self) // size)
        if not count:
            return []
        return [
            self._cut(lambda table, part=part: table.tensor_split(count)[part])  # type: ignore[misc]
            for part in range(count)
        ]

    def _cut(self, cut: Callable[[Tensor], Tensor]) -> "ImageBatch":
        return ImageBatch(rows=cut(self.rows), views=self.views.map(cut))


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Patients to train on or to evaluate: where a cache has their images, and their labels."""

    starts: Tensor  # (P,) int64, row of the first image
    sizes: Tensor  # (P,) int64
    labels: Tensor  # (P,) float32

    @classmethod
    def of(cls, patients: Cohort, cached: Cohort) -> "Roster":
        """Find patients in the cache of a cohort that contains them all."""
        start = dict(zip(cached.ids, cached.offsets[:-1].tolist(), strict=True))
        return cls(
            starts=torch.tensor([start[id] for id in patients.ids]),
            sizes=torch.from_numpy(patients.n_images),
            labels=torch.from_numpy(patients.labels.astype(np.float32)),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def images(self) -> "ImageBatch":
        """Return all images, patient after patient, unaltered."""
        rows = [
            torch.arange(start, start + size)
            for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True)
        ]
        return as_they_are(torch.cat(rows))


class PixelCache:
    """The crops of all images of a cohort, patient after patient."""

    def __init__(self, pixels: Tensor, normalization: Normalization, device: torch.device) -> None:
        """Take crops (N, 3, H, W) uint8; they move to the device if they fit."""
        self.device = device
        self._normalization = normalization
        self._resident = _fits(pixels, device)
        self._pixels = pixels.to(device) if self._resident else pixels

    @classmethod
    def decode(
        cls,
        cohort: Cohort,
        settings: BackboneSettings,
        device: torch.device,
        progress: Progress = silent,
    ) -> "PixelCache":
        """Decode every image of a cohort."""
        crop = settings.crop
        paths = [path for images in cohort.images for path in images]
        check_images(paths, crop)

        def report(done: int, total: int, text: str = "") -> None:
            progress(done, total, "decoding images")

        room = _make_room((len(paths), 3, crop, crop))
        pixels = decode_crops(
            paths,
            crop,
            into=room,
            threads=torch.get_num_threads(),
            normalise=stain_normaliser(settings.stain_normalization, cohort.images, crop),
            progress=report,
        )
        normalization = find_normalization(settings.normalization)
        return cls(torch.from_numpy(pixels), normalization, device)

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, batch: ImageBatch) -> Tensor:
        """Return the views of a batch, normalised: (n, 3, H, W) on the device."""
        pixels = batch.views.apply(self._gather(batch.rows))
        images = normalize(pixels, self._normalization)
        return images.contiguous(memory_format=torch.channels_last)

    def crops(self) -> NDArray[np.uint8]:
        """Return all crops: (N, 3, H, W)."""
        return self._pixels.cpu().numpy()

    def _gather(self, rows: Tensor) -> Tensor:
        if self._resident:
            return self._pixels[to_device(rows, self.device)]
        return to_device(self._pixels[rows], self.device)


@dataclass(frozen=True, kw_only=True)
class DecodedCohort:
    """A cohort and the crops of its images."""

    cohort: Cohort
    pixels: PixelCache

    def roster(self, patients: Cohort) -> Roster:
        """Find patients of the cohort among the crops."""
        return Roster.of(patients, self.cohort)


def _fits(pixels: Tensor, device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return bool(pixels.nbytes < _RESIDENT_SHARE * free)


def as_they_are(rows: Tensor) -> ImageBatch:
    """Return the batch of rows (n,), their views unaltered."""
    return ImageBatch(rows=rows, views=unaltered(len(rows)))


def _make_room(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an array in memory, or mapped from a file if it does not fit."""
    if math.prod(shape) <= _HOST_SHARE * available_memory(torch.device("cpu")):
        return np.empty(shape, np.uint8)
    return map_array(
        shape, np.uint8, f"the crops of {shape[0]:,} images", "choose a smaller --crop"
    )
