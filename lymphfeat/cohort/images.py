"""Cell images: decode, centre crop, normalisation constants, augmented views."""

import io
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lymphfeat.cohort.image_statistics import measure_image
from lymphfeat.errors import CohortError, SettingsError
from lymphfeat.runtime.progress import Progress, silent

# Modes whose conversion to RGB keeps 8 bits per channel; 16-bit and float files would be clipped.
_CONVERTIBLE_MODES = {"RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"}

VIEWS = ("identity", "hflip", "vflip", "both")


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Channel constants on the 0..1 scale: a pixel becomes (pixel / 255 - mean) / std."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATIONS = {
    normalization.name: normalization
    for normalization in (
        Normalization(name="imagenet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        # Training frames of the challenge, METHOD §3.
        Normalization(
            name="challenge", mean=(0.8183, 0.6977, 0.7034), std=(0.1917, 0.2156, 0.0917)
        ),
        # What TensorFlow's Inception and EfficientNet-Lite models were trained with.
        Normalization(name="inception", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )
}


def find_normalization(name: str) -> Normalization:
    """Return the constants called `name`."""
    if name not in NORMALIZATIONS:
        raise SettingsError(
            f"normalization (={name}) must be one of {', '.join(NORMALIZATIONS)}; "
            "choose one with --normalization."
        )
    return NORMALIZATIONS[name]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One decoded image."""

    pixels: NDArray[np.uint8]  # (3, crop, crop)
    crc32: int  # of the file's bytes
    statistics: NDArray[np.float32] | None = None  # (S,) of the pixels, where they were asked for


def decode_crop(path: Path, crop: int) -> Crop:
    """Decode the centre `crop` x `crop` pixels of an image file.

    Raises CohortError, naming the file, when it cannot be read or is smaller than the crop.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            _check_image(path, image, crop)
            rgb = image.convert("RGB").crop(_centre_box(image.size, crop))
    except CohortError:
        raise
    except Exception as error:  # each format fails in its own way; the user sees one message
        raise CohortError(
            f"{path}: cannot be read as an image ({error}); "
            "restore or remove it (`lymphfeat audit` lists every such file)."
        ) from None
    pixels = np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))
    return Crop(pixels=pixels, crc32=zlib.crc32(content))  # pixels (3, crop, crop)


def _measure_crop(path: Path, crop: int) -> Crop:
    decoded = decode_crop(path, crop)
    return replace(decoded, statistics=measure_image(decoded.pixels))


def _check_image(path: Path, image: Image.Image, crop: int) -> None:
    if image.mode not in _CONVERTIBLE_MODES:
        raise CohortError(
            f"{path}: pixel mode (={image.mode}) must be 8 bits per channel; "
            "convert the image to 8-bit RGB."
        )
    if min(image.size) < crop:
        raise CohortError(
            f"{path}: size (={image.width}x{image.height}) must be at least the crop "
            f"(={crop}); choose a smaller --crop or remove the image."
        )


def _centre_box(size: tuple[int, int], crop: int) -> tuple[int, int, int, int]:
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    return left, top, left + crop, top + crop


def stream_crops(
    paths: Sequence[Path],
    crop: int,
    *,
    threads: int = 2,
    ahead: int = 512,
    measured: bool = False,
) -> Iterator[Crop]:
    """Yield the decoded crops in order, at most `ahead` of them waiting in memory.

    With `measured` they have their image statistics.
    """
    decode = _measure_crop if measured else decode_crop
    remaining = iter(paths)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting = deque(pool.submit(decode, path, crop) for path in islice(remaining, ahead))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(decode, path, crop) for path in islice(remaining, 1))
        finally:  # an abandoned or failed stream does not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)


def decode_crops(
    paths: Sequence[Path],
    crop: int,
    *,
    into: NDArray[np.uint8] | None = None,
    threads: int = 2,
    progress: Progress = silent,
) -> NDArray[np.uint8]:
    """Decode all centre crops into one array, (N, 3, crop, crop) uint8; `into` if given."""
    pixels = np.empty((len(paths), 3, crop, crop), np.uint8) if into is None else into
    for row, image in enumerate(stream_crops(paths, crop, threads=threads)):
        pixels[row] = image.pixels
        progress(row + 1, len(paths))
    return pixels
