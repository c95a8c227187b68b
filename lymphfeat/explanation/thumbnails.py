"""Small pictures of the cells for the page, side by side on sheets, within a budget of bytes."""

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.images import decode_crop
from lymphfeat.runtime.threads import in_order

COLUMNS = 8
PER_SHEET = 48  # images of one patient at most; more save nothing
_SAMPLE = 64  # images used to estimate the bytes at a given size
_MARGIN = 1.03  # for images that are unlike the sample
_SEPARATORS = 3  # extra bytes per sheet: quotes and a comma
_METHOD = 2  # of WebP: 4 takes twice as long and saves a twentieth of the bytes


@dataclass(frozen=True, order=True)
class Size:
    """How large and how good pictures are."""

    side: int  # px; a multiple of WebP's blocks of 16, so that neighbours do not mix
    quality: int  # of WebP


# The largest that fits the budget is used.
SIZES = (
    *(Size(112, 80), Size(112, 60), Size(96, 60), Size(80, 60), Size(80, 50)),
    *(Size(64, 50), Size(64, 40), Size(48, 40)),
)


@dataclass(frozen=True, kw_only=True)
class Thumbnails:
    """Sheets of pictures: up to `PER_SHEET` of a patient in order, `COLUMNS` a row, as WebP.

    One file for many pictures is half as large as a JPEG for each.
    """

    sheets: tuple[tuple[bytes, ...], ...]  # of each patient; empty bytes where none is shown
    shown: NDArray[np.bool_]  # (N,) False where left out to stay within a budget
    sizes: NDArray[np.int64]  # (P,) images of each patient
    size: Size

    @property
    def left_out(self) -> int:
        """Return how many images have no picture."""
        return int((~self.shown).sum())

    @property
    def bytes(self) -> int:
        """Return how many bytes the sheets take as base64."""
        each = (-(-len(sheet) // 3) * 4 + _SEPARATORS for own in self.sheets for sheet in own)
        return sum(each)

    def within(self, budget: int, worth: NDArray[np.float64]) -> "Thumbnails":
        """Return pictures of at most `budget` bytes as base64.

        They are made smaller; where that is not enough, those of lowest `worth` (N,) are left out.
        """
        fitting = self
        for size in (size for size in _sizes(self.size.side) if size < self.size):
            if fitting.bytes <= budget:
                return fitting
            fitting = self._again(size, self.shown)
        order, kept = np.argsort(-worth, kind="stable"), len(worth)
        while fitting.bytes > budget and kept:
            kept = int(kept * budget / fitting.bytes / _MARGIN)
            shown = np.zeros(len(worth), np.bool_)
            shown[order[:kept]] = True
            fitting = self._again(fitting.size, shown)
        return fitting

    def _again(self, size: Size, shown: NDArray[np.bool_]) -> "Thumbnails":
        """Draw the sheets again, without what is not shown."""
        pieces = np.split(shown, np.cumsum(sheet_lengths(self.sizes))[:-1])
        sheets = [sheet for own in self.sheets for sheet in own]
        drawn = in_order(
            lambda each: _redrawn(*each, self.size.side, size),
            zip(sheets, pieces, strict=True),
            threads=os.cpu_count() or 1,
            ahead=16,
            name="thumbnail",
        )
        return Thumbnails(
            sheets=_by_patient(drawn, self.sizes), shown=shown, sizes=self.sizes, size=size
        )


class SheetMaker:
    """Makes the sheets of a cohort while its images come, one after another, in its order."""

    def __init__(self, cohort: Cohort, crop: int, budget: int) -> None:
        """Take the side of the images and how many bytes the sheets may have, as base64."""
        self._cohort, self._crop, self._budget = cohort, crop, budget
        self._lengths = iter(sheet_lengths(cohort.n_images))
        self._length = next(self._lengths, 0)
        self._waiting: list[Image.Image] = []
        self._sheets: list[bytes] = []

    @cached_property
    def size(self) -> Size:
        """The largest size at which a sample of the images says that all fit the budget."""
        paths = [path for own in self._cohort.images for path in own]
        sample = paths[:: -(-len(paths) // _SAMPLE)]
        crops = [decode_crop(path, self._crop).pixels for path in sample]
        for size in _sizes(self._crop):
            sheet = _encode(_sheet([_shrunk(crop, size.side) for crop in crops], size.side), size)
            if len(sheet) * 4 / 3 * len(paths) / len(sample) * _MARGIN <= self._budget:
                break
        return size

    def add(self, crops: Sequence[NDArray[np.uint8]]) -> None:
        """Take the next images, (3, crop, crop) each."""
        for crop in crops:
            self._waiting.append(_shrunk(crop, self.size.side))
            if len(self._waiting) == self._length:
                self._sheets.append(_encode(_sheet(self._waiting, self.size.side), self.size))
                self._waiting, self._length = [], next(self._lengths, 0)

    def made(self) -> Thumbnails:
        """Return the sheets, after all images have come."""
        sizes = self._cohort.n_images
        return Thumbnails(
            sheets=_by_patient(self._sheets, sizes),
            shown=np.ones(int(sizes.sum()), np.bool_),
            sizes=sizes,
            size=self.size,
        )


def _sizes(largest: int) -> list[Size]:
    """Return the sizes of pictures of at most this side."""
    return [Size(min(size.side, largest), size.quality) for size in SIZES]


def sheet_lengths(sizes: NDArray[np.int64]) -> list[int]:
    """Return how many images each sheet of patients of `sizes` (P,) images has."""
    return [
        min(PER_SHEET, size - begin)
        for size in sizes.tolist()
        for begin in range(0, size, PER_SHEET)
    ]


def _by_patient(sheets: Iterable[bytes], sizes: NDArray[np.int64]) -> tuple[tuple[bytes, ...], ...]:
    remaining = iter(sheets)
    return tuple(tuple(islice(remaining, -(-size // PER_SHEET))) for size in sizes.tolist())


def _shrunk(crop: NDArray[np.uint8], side: int) -> Image.Image:
    picture = Image.fromarray(crop.transpose(1, 2, 0))
    if side == len(crop[0]):
        return picture
    return picture.resize((side, side), Image.Resampling.HAMMING)


def _sheet(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Lay pictures out, `COLUMNS` a row, on white."""
    rows, columns = -(-len(pictures) // COLUMNS), min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, _place(number, side))
    return sheet


def _place(number: int, side: int) -> tuple[int, int]:
    return number % COLUMNS * side, number // COLUMNS * side


def _encode(sheet: Image.Image, size: Size) -> bytes:
    stream = io.BytesIO()
    sheet.save(stream, "WEBP", quality=size.quality, method=_METHOD)
    return stream.getvalue()


def _redrawn(sheet: bytes, shown: NDArray[np.bool_], side: int, size: Size) -> bytes:
    """Draw a sheet of pictures of `side` again at another size, white where none is shown."""
    if not sheet or not shown.any():
        return b""
    with Image.open(io.BytesIO(sheet), formats=("WEBP",)) as whole:
        parts = [
            whole.crop((x, y, x + side, y + side))
            for x, y in (_place(number, side) for number in range(len(shown)))
        ]
    small = [part.resize((size.side, size.side), Image.Resampling.HAMMING) for part in parts]
    empty = Image.new("RGB", (size.side, size.side), "white")
    kept = [own if seen else empty for own, seen in zip(small, shown, strict=True)]
    return _encode(_sheet(kept, size.side), size)
