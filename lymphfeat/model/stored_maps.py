"""The feature maps of a store in a backbone's place: what was extracted is not computed again."""

from collections.abc import Iterator
from itertools import pairwise, zip_longest

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import Crop, stream_crops
from lymphfeat.errors import StoreError
from lymphfeat.features.store import FROZEN, FeatureStore
from lymphfeat.model.scoring import Show, instances_of
from lymphfeat.runtime.part_reader import PartReader
from lymphfeat.runtime.progress import Progress, RateMeter

_HINT = "Extract from this cohort again, or leave out --store."


class StoredMaps:
    """The maps of a cohort's images, from the store that was extracted from them."""

    def __init__(self, store: FeatureStore, crop: int, *, show: Show | None = None) -> None:
        """Take the side of the pictures for `show`, which is given all of them, in order."""
        self._store, self._crop, self._show = store, crop, show

    @property
    def statistics(self) -> pd.DataFrame | None:
        """The image statistics of all images, (N, S); None where the store has none."""
        return self._store.image_statistics

    def score_patients(self, cohort: Cohort, progress: Progress) -> Iterator[Tensor]:
        """Yield the pixels of one patient's images after another: (1, n, U, C) in float32.

        Raises StoreError unless the cohort's images are those of the store. Whether files are the
        same is only checked where they are shown.
        """
        check_images(self._store, cohort)
        maps = PartReader(self._store.features())  # (N, V, C, h, w)
        meter = RateMeter(progress, int(cohort.n_images.sum()))
        shown = self._shown(cohort)
        for start, stop in pairwise(self._store.offsets.tolist()):
            if self._show is not None:
                self._show([next(shown).original for _ in range(start, stop)])
            values = np.asarray(maps.read(slice(start, stop), 0), np.float32)  # (n, C, h, w)
            wrong = np.flatnonzero(~np.isfinite(values).all((1, 2, 3)))
            if len(wrong):
                self._store.refuse(FROZEN, start + int(wrong[0]), "features must be finite numbers")
            yield instances_of(torch.from_numpy(values), "pixel")[None]
            meter.add(stop - start)

    def _shown(self, cohort: Cohort) -> Iterator[Crop]:
        """Yield the pictures of all images."""
        paths = [path for own in cohort.images for path in own]
        crops = stream_crops(paths, self._crop, threads=torch.get_num_threads())
        for path, crop, crc32 in zip(paths, crops, self._store.crc32.tolist(), strict=True):
            if crop.crc32 != crc32:
                raise StoreError(
                    f"{path}: must be the image that {self._store.path} was extracted from; it is "
                    f"another one. {_HINT}"
                )
            yield crop


def check_images(store: FeatureStore, cohort: Cohort) -> None:
    """Raise StoreError unless a store has the patients and images of a cohort, in its order."""
    stored = (store.image_names[start:stop] for start, stop in pairwise(store.offsets))
    given = (tuple(path.name for path in own) for own in cohort.images)
    pairs = zip_longest(zip(store.ids, stored, strict=True), zip(cohort.ids, given, strict=True))
    for mine, theirs in pairs:
        if mine != theirs:
            id, _ = min(own for own in (mine, theirs) if own)
            raise StoreError(
                f"{store.path}: must have the cohort's images; those of patient {id} differ, or "
                f"are not in both. {_HINT}"
            )
