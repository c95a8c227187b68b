"""Small pictures of the cells for the page, within a budget of bytes."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lymphfeat.cohort.images import decode_crop
from lymphfeat.runtime.progress import Progress, silent

SIDES = (112, 80, 64, 48)  # px; the largest that fits the budget is used
_QUALITY = 80
_SAMPLE = 64  # images used to estimate the bytes at a given side
_BASE64 = 4 / 3
_SEPARATORS = 3  # extra bytes per picture: quotes and a comma


@dataclass(frozen=True, kw_only=True)
class Thumbnails:
    """Pictures, each a base64 JPEG; None where left out to stay within the budget."""

    pictures: tuple[str | None, ...]  # (N,)
    side: int  # px

    @property
    def left_out(self) -> int:
        """Return how many images have no picture."""
        return sum(picture is None for picture in self.pictures)


def make_thumbnails(
    paths: Sequence[Path],
    crop: int,
    worth: NDArray[np.float64],
    *,
    budget: int,
    threads: int = 2,
    progress: Progress = silent,
) -> Thumbnails:
    """Make pictures of the centre crops of images, at most `budget` bytes of base64 in total.

    The largest side at which all fit is used; where none fits, the smallest side is used and the
    pictures of lowest `worth` (N,) are left out.
    """
    sample = paths[:: max(1, len(paths) // _SAMPLE)]
    side = _choose_side(sample, len(paths), crop, budget)
    order = np.argsort(-worth, kind="stable")
    pictures: list[str | None] = [None] * len(paths)
    with ThreadPoolExecutor(threads, thread_name_prefix="thumbnail") as pool:
        encoded = pool.map(partial(_encode, crop=crop, side=side), [paths[row] for row in order])
        left = budget
        for done, (row, picture) in enumerate(zip(order, encoded, strict=True)):
            left -= len(picture) + _SEPARATORS
            if left < 0:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            pictures[row] = picture
            progress(done + 1, len(paths))
    return Thumbnails(pictures=tuple(pictures), side=side)


def _choose_side(sample: Sequence[Path], n: int, crop: int, budget: int) -> int:
    sides = [side for side in SIDES if side <= crop] or [crop]
    for side in sides:
        mean = np.mean([len(_encode(path, crop=crop, side=side)) for path in sample])
        if (mean + _SEPARATORS) * n * 1.03 <= budget:
            return side
    return sides[-1]


def _encode(path: Path, *, crop: int, side: int) -> str:
    picture = Image.fromarray(decode_crop(path, crop).pixels.transpose(1, 2, 0))
    if side != crop:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
