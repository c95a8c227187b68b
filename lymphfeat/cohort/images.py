"""Cell images: decode, centre crop, normalisation constants, augmented views."""

import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lymphfeat.cohort.image_statistics import Pixels, measure_image
from lymphfeat.errors import CohortError, SettingsError, first_line
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.runtime.threads import in_order

# Modes whose conversion to RGB keeps 8 bits per channel; 16-bit and float files would be clipped.
_CONVERTIBLE_MODES = {"RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"}
_JPEG_END = b"\xff\xd9"

# What the suffixes of a cohort's images can be, whatever they say: Pillow would hand others to
# programs of their own (EPS to Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")
Normalise = Callable[[Path, Pixels], Pixels]  # cohort.stains
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
    original: NDArray[np.uint8]  # the same before its stain was normalised, if it was
    crc32: int  # of the file's bytes
    statistics: NDArray[np.float32] | None = None  # (S,) of the pixels, where they were asked for


class ImageError(CohortError):
    """An image that cannot be used, why, and what to do."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}; {remedy}")
        self.summary = f"{path}: {reason}"


def decode_crop(path: Path, crop: int) -> Crop:
    """Decode the centre `crop` x `crop` pixels of an image file.

    Raises ImageError, naming the file, when it cannot be read or is smaller than the crop.
    """
    with _one_error(path):
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(path, image, crop)
            rgb = image.crop(_centre_box(image.size, crop)).convert("RGB")
    pixels = np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8).transpose(2, 0, 1))
    return Crop(pixels=pixels, original=pixels, crc32=zlib.crc32(content))  # (3, crop, crop)


def check_image(path: Path, crop: int) -> None:
    """Check an image file by its header and its end; decode it only where these are in doubt.

    Raises ImageError as `decode_crop` does.
    """
    with _one_error(path):
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(path, image, crop)
            if image.format == "PNG":
                image.verify()  # by the checksums of its parts
            elif image.format != "JPEG" or not content.endswith(_JPEG_END):
                image.load()


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Raise one ImageError for whatever a decoder raises: each format fails in its own way."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(
            path,
            f"cannot be read as an image ({why_unreadable(path, error)})",
            "restore or remove it (`lymphfeat audit` lists every such file), or leave it out with "
            "--on-error skip (extract, endtoend, predict).",
        ) from None


def why_unreadable(path: Path, error: Exception) -> str:
    """Say in a few words why an image cannot be read, by what its decoder raised."""
    if path.is_file() and not path.stat().st_size:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of any known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).removesuffix(".")


def _check_size(path: Path, image: Image.Image, crop: int) -> None:
    if image.mode not in _CONVERTIBLE_MODES:
        raise ImageError(
            path,
            f"pixel mode (={image.mode}) must be 8 bits per channel",
            "convert the image to 8-bit RGB.",
        )
    if min(image.size) < crop:
        raise ImageError(
            path,
            f"size (={image.width}x{image.height}) must be at least the crop (={crop})",
            "choose a smaller --crop (extract, endtoend), remove the image, or leave it out with "
            "--on-error skip.",
        )
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ImageError(
            path,
            f"size (={image.width}x{image.height}) must be at most {Image.MAX_IMAGE_PIXELS} pixels",
            "an image must show one cell; cut the cells out.",
        )


def _centre_box(size: tuple[int, int], crop: int) -> tuple[int, int, int, int]:
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    return left, top, left + crop, top + crop


def crop_decoder(
    crop: int, *, measured: bool = False, normalise: Normalise | None = None
) -> Callable[[Path], Crop]:
    """Return what decodes a file as `decode_crop` does.

    With `measured` crops have their image statistics. `normalise` changes their pixels after that.
    """

    def decode(path: Path) -> Crop:
        decoded = decode_crop(path, crop)
        if measured:
            decoded = replace(decoded, statistics=measure_image(decoded.pixels))
        if normalise is None:
            return decoded
        return replace(decoded, pixels=normalise(path, decoded.pixels))

    return decode


def stream_crops(
    paths: Sequence[Path],
    crop: int,
    *,
    threads: int = 2,
    ahead: int = 512,
    normalise: Normalise | None = None,
) -> Iterator[Crop]:
    """Yield the decoded crops in order, at most `ahead` of them waiting in memory."""
    decode = crop_decoder(crop, normalise=normalise)
    return in_order(decode, paths, threads=threads, ahead=ahead, name="decode")


def decode_crops(
    paths: Sequence[Path],
    crop: int,
    *,
    into: NDArray[np.uint8] | None = None,
    threads: int = 2,
    normalise: Normalise | None = None,
    progress: Progress = silent,
) -> NDArray[np.uint8]:
    """Decode all centre crops into one array, (N, 3, crop, crop) uint8; `into` if given."""
    pixels = np.empty((len(paths), 3, crop, crop), np.uint8) if into is None else into
    for row, image in enumerate(stream_crops(paths, crop, threads=threads, normalise=normalise)):
        pixels[row] = image.pixels
        progress(row + 1, len(paths))
    return pixels
