"""Cell images: exact crops, refused files, streams in order."""

import contextlib
import re
import struct
import threading
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lymphfeat.cohort import images
from lymphfeat.cohort.images import decode_crop, decode_crops, find_normalization, stream_crops
from lymphfeat.errors import CohortError, SettingsError
from tests.cohorts import write_image


@pytest.mark.parametrize(("width", "height"), [(16, 16), (17, 16), (16, 19), (8, 8), (9, 30)])
def test_crops_the_centre(tmp_path: Path, width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    crop = decode_crop(tmp_path / "x.png", 8)
    top, left = (height - 8) // 2, (width - 8) // 2
    expected = np.empty((3, 8, 8), np.uint8)
    for channel in range(3):
        for row in range(8):
            for column in range(8):
                expected[channel, row, column] = pixels[top + row, left + column, channel]
    assert np.array_equal(crop.pixels, expected)
    assert crop.pixels.flags.c_contiguous
    assert crop.crc32 == zlib.crc32((tmp_path / "x.png").read_bytes())


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_converts_8_bit_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    converted = Image.fromarray(noise).convert(mode)
    converted.save(path)
    expected = np.asarray(converted.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_crop(path, 8).pixels, expected)


def write_16_bit(path: Path) -> None:
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path)


def write_float(path: Path) -> None:
    Image.fromarray(np.zeros((16, 16), np.float32)).save(path, format="TIFF")


def write_small(path: Path) -> None:
    write_image(path, 0, side=15)


def write_truncated(path: Path) -> None:
    content = write_image(path, 0).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_empty(path: Path) -> None:
    path.touch()


def write_note(path: Path) -> None:
    path.write_text("no image")


def write_odd_tiff(path: Path) -> None:
    """Claim 43,011 samples a pixel, which no decoder takes."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path, format="TIFF")
    content = path.read_bytes()
    tag = struct.pack("<HHI", 277, 3, 1)
    path.write_bytes(content.replace(tag + struct.pack("<H", 3), tag + struct.pack("<H", 43011)))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_16_bit, "pixel mode (=I;16) must be 8 bits per channel; convert"),
        (write_float, "pixel mode (=F) must be 8 bits"),
        (write_small, "size (=15x15) must be at least the crop (=16); choose a smaller --crop"),
        (write_truncated, "cannot be read as an image ("),
        (write_empty, "cannot be read as an image ("),
        (write_note, "cannot be read as an image ("),
        (write_odd_tiff, "cannot be read as an image ("),
        (Path.mkdir, "cannot be read as an image ("),
        (lambda path: None, "cannot be read as an image ("),
    ],
)
def test_refusals_name_the_file(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "P1" / "cell.png"
    path.parent.mkdir()
    write(path)
    with pytest.raises(CohortError, match=re.escape(f"{path}: {message}")):
        decode_crop(path, 16)


def test_pixels_are_read_as_they_are_stored(tmp_path: Path) -> None:
    """A cell has no top: an orientation in EXIF changes nothing."""
    exif = Image.Exif()
    exif[0x112] = 6
    with Image.open(write_image(tmp_path / "x.png", 0)) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert image.getexif()[0x112] == 6
    expected = decode_crop(tmp_path / "x.png", 8).pixels
    assert np.array_equal(decode_crop(tmp_path / "turned.png", 8).pixels, expected)


def test_refuses_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(tmp_path / "x.png", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(CohortError, match=re.escape(f"{path}: cannot be read as an image")):
        decode_crop(path, 8)


@settings(max_examples=150)
@given(cuts=st.data())
def test_damaged_files_are_decoded_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cuts: st.DataObject
) -> None:
    suffix = cuts.draw(st.sampled_from(["png", "jpg", "bmp"]))
    path = write_image(tmp_path_factory.getbasetemp() / f"damaged.{suffix}", 0)
    content = bytearray(path.read_bytes())
    for _ in range(cuts.draw(st.integers(0, 3))):
        content[cuts.draw(st.integers(0, len(content) - 1))] = cuts.draw(st.integers(0, 255))
    path.write_bytes(content[: cuts.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CohortError):
        assert decode_crop(path, 8).pixels.shape == (3, 8, 8)


# --- streams -------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_image(tmp_path / f"{seed}.png", seed, side=8) for seed in range(20)]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 3), (4, 512)])
def test_streams_keep_the_order(
    paths: list[Path], threads: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_late_ones_first(path: Path, crop: int) -> images.Crop:
        if int(path.stem) % 3 == 0:
            threading.Event().wait(0.005)
        return decode_crop(path, crop)

    monkeypatch.setattr(images, "decode_crop", decode_late_ones_first)
    crops = list(stream_crops(paths, 8, threads=threads, ahead=ahead))
    assert [crop.crc32 for crop in crops] == [zlib.crc32(path.read_bytes()) for path in paths]


def test_an_abandoned_stream_stops(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def count(path: Path, crop: int) -> images.Crop:
        decoded.append(path)
        return decode_crop(path, crop)

    monkeypatch.setattr(images, "decode_crop", count)
    stream = stream_crops(paths, 8, threads=1, ahead=3)
    assert len(list(islice(stream, 2))) == 2
    stream.close()  # type: ignore[attr-defined]
    assert len(decoded) <= 2 + 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_a_failed_stream_names_the_file_in_its_turn(paths: list[Path]) -> None:
    paths[5].write_text("no image")
    stream = stream_crops(paths, 8, threads=2)
    assert len(list(islice(stream, 5))) == 5
    with pytest.raises(CohortError, match=re.escape(str(paths[5]))):
        next(stream)


def test_decodes_into_one_array(paths: list[Path]) -> None:
    calls: list[tuple[int, int]] = []
    pixels = decode_crops(
        paths, 8, progress=lambda done, total, text="": calls.append((done, total))
    )
    assert pixels.shape == (20, 3, 8, 8)
    for row, path in enumerate(paths):
        assert np.array_equal(pixels[row], decode_crop(path, 8).pixels)
    assert calls == [(done, 20) for done in range(1, 21)]
    assert decode_crops([], 8).shape == (0, 3, 8, 8)


def test_unknown_normalization() -> None:
    with pytest.raises(SettingsError, match=r"normalization \(=x\) must be one of imagenet, chal"):
        find_normalization("x")
    assert find_normalization("challenge").mean == (0.8183, 0.6977, 0.7034)  # METHOD §3
    assert find_normalization("challenge").std == (0.1917, 0.2156, 0.0917)
