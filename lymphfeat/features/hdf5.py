"""HDF5 files that someone else has made: what they declare is checked before it is read.

A header of a few bytes can declare an array of any size, and send its reader to other files. So
everything here is read through `dataset` and `attribute`, which allow only what lies in the file
itself, in plain types, and as much of it as the file can hold. They raise KeyError for what is not
there and ValueError for what must not be; a damaged file fails in as many more ways as h5py has.
"""

import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from lymphfeat.features.hdf5_headers import (
    has_fill,
    is_virtual,
    length_of_array,
    lengths_of_attribute,
)

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_COMPRESSING = (_DEFLATE, _LZF)
_FILTERS = (*_COMPRESSING, _SHUFFLE, _FLETCHER32)
_DENSEST = 64  # bytes that a byte of compressed features may become, beyond …
_SMALL = 2**24  # … this many
_NUMBERS = "biuf"
_HEAP, _OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HHxxxxQ")  # HDF5 file format, III.E
_SIGNATURE = b"GCOL\1"  # with the only version: a patient may be called GCOL
_FIRST_PARTS = tuple(_SIGNATURE[:size] for size in range(1, len(_SIGNATURE)))
_LAST_PARTS = tuple(_SIGNATURE[size:] for size in range(1, len(_SIGNATURE)))
_METADATA = 2**16  # bytes of a read that may be of a heap


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; raises OSError for what is none."""
    with _Watched(path) as stream, h5py.File(stream, "r") as file:
        if file.id.get_create_plist().get_sizes() != (8, 8):
            raise OSError("its addresses must have 64 bits")
        number = h5py.h5o.get_info(file.id).fileno
        stream.base, _OPEN[number] = file.userblock_size, stream
        try:
            yield file
        finally:
            del _OPEN[number]


class _Watched(io.FileIO):
    """The bytes of a file, of which those are checked that libhdf5 does not check.

    Texts of variable length lie in heaps, and in one with an object of no size it would search for
    ever.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._known: set[int] = set()  # addresses of heaps
        self._size = self.seek(0, io.SEEK_END)
        self.base = 0  # of the addresses of objects

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        while count < len(view) and (got := super().readinto(view[count:])):
            count += got  # one call gives at most 2 GiB
        if count <= _METADATA and _may_touch_heap(bytes(view[:count])):
            end = self.tell()
            self._check(end - count, count)
            self.seek(end)
        return count

    def _check(self, start: int, count: int) -> None:
        """Check the heaps that begin among some bytes, or across their borders."""
        first = max(0, start - len(_SIGNATURE) + 1)
        around = self.at(first, start + count + len(_SIGNATURE) - 1 - first)
        place = around.find(_SIGNATURE)
        while place >= 0:
            if first + place not in self._known:
                self._walk(first + place)
                self._known.add(first + place)
            place = around.find(_SIGNATURE, place + 1)

    def at(self, address: int, size: int) -> bytes:
        self.seek(address)
        return self.read(max(0, min(size, self._size))) or b""

    def object_at(self, address: int, size: int) -> bytes:
        return self.at(self.base + address, size)

    def _walk(self, address: int) -> None:
        """Go from object to object to the end of a heap; raises OSError if that is not possible."""
        header = self.at(address, _HEAP.size).ljust(_HEAP.size, b"\0")
        _, _, size = _HEAP.unpack(header)
        heap = self.at(address, size) if size < self._size else b""
        place, end = _HEAP.size, len(heap)
        while place + _OBJECT.size <= end:
            number, _, length = _OBJECT.unpack_from(heap, place)
            needed = _OBJECT.size + -(-length // 8) * 8 if number else length  # 0: what is free
            if not _OBJECT.size <= needed <= end - place:
                raise OSError("a heap of texts is damaged")
            place += needed


_OPEN: dict[int, _Watched] = {}  # files by their numbers in libhdf5


def _may_touch_heap(data: bytes) -> bool:
    """Return whether a heap may begin among some bytes, or across their borders."""
    if len(data) < len(_SIGNATURE) or _SIGNATURE in data:
        return True
    return data.endswith(_FIRST_PARTS) or data.startswith(_LAST_PARTS)


def member(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset:
    """Return what lies at a path in a file; no link is followed, which could lead out of it."""
    found: h5py.Group | h5py.Dataset = group
    for name in path.split("/"):
        if not isinstance(found, h5py.Group):
            raise ValueError(f"{path} must lie in a group")
        if (link := found.get(name, getlink=True)) is None:
            raise KeyError(f"there is no {path}")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} must lie in the file itself; it is a link")
        if _is_virtual(found, name):
            raise ValueError(f"{path} must lie in the file itself; it is read from others")
        found = found[name]
    return found


def _is_virtual(group: h5py.Group, name: str) -> bool:
    return is_virtual(group.id.links.get_info(name.encode()).u, _stream(group).object_at)


def has(group: h5py.Group, path: str) -> bool:
    """Return whether something lies at a path in a file."""
    try:
        member(group, path)
    except KeyError:
        return False
    return True


def names_in(group: h5py.Group, path: str) -> list[str]:
    """Return the names in a group; of an array they would be all its values."""
    found = member(group, path)
    if not isinstance(found, h5py.Group):
        raise ValueError(f"{path} must be a group")
    return list(found)


def arrays_in(group: h5py.Group) -> list[str]:
    """Return the names of the arrays right in a group."""
    own = [name for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]
    kind = h5py.Dataset
    return [
        each for each in own if _is_virtual(group, each) or group.get(each, getclass=True) is kind
    ]


def dataset(group: h5py.Group, path: str) -> h5py.Dataset:
    """Return an array that can be read whole: of numbers or texts, in the file, as it says."""
    found = member(group, path)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{path} must be an array")
    _check_type(path, found.dtype)
    if found.shape is None:
        raise ValueError(f"{path} must have a shape")
    texts = found.dtype.kind == "O"
    if texts and has_fill(
        _address(found), _stream(found).at
    ):  # it would be read with the properties
        raise ValueError(f"{path} must have no text for what is not stored")
    properties = found.id.get_create_plist()
    if properties.get_external_count():
        raise ValueError(f"{path} must lie in the file itself; it is read from others")
    filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    if unknown := [str(each) for each in filters if each not in _FILTERS]:
        raise ValueError(
            f"{path} must be compressed by gzip or lzf, or not; got filter {unknown[0]}"
        )
    _check_size(path, found, any(each in _COMPRESSING for each in filters))
    if texts:
        _check_length(path, found, length_of_array(found, _stream(found).at))
    return found


def numbers(group: h5py.Group, path: str) -> h5py.Dataset:
    """Return an array of numbers, as `dataset` does."""
    found = dataset(group, path)
    if found.dtype.kind not in _NUMBERS:
        raise ValueError(f"{path} must hold numbers; got {found.dtype}")
    return found


def attribute(item: h5py.Group | h5py.Dataset, name: str) -> Any:
    """Return a text or a number that an item has."""
    if name not in item.attrs:
        raise KeyError(f"{item.name} has no attribute {name}")
    own = item.attrs.get_id(name)
    _check_type(name, own.dtype)
    if own.shape != ():
        raise ValueError(f"{name} of {item.name} must be one value")
    if own.dtype.kind == "O":
        lengths = lengths_of_attribute(_address(item), name, _stream(item).at)
        if not lengths:
            raise ValueError(f"{name} of {item.name} must lie in its header")
        _check_length(name, item, max(lengths))
    return item.attrs[name]


def _stream(item: h5py.Group | h5py.Dataset) -> _Watched:
    return _OPEN[h5py.h5o.get_info(item.id).fileno]


def _address(item: h5py.Group | h5py.Dataset) -> int:
    if _stream(item).base:
        raise ValueError("texts must not come behind a user block")  # or addresses are others
    return int(h5py.h5o.get_info(item.id).addr)


def _check_length(path: str, item: h5py.Group | h5py.Dataset, length: int) -> None:
    if length > item.file.id.get_filesize():
        raise ValueError(f"{path} declares texts of {length} bytes, more than the file holds")


def _check_type(path: str, dtype: Any) -> None:
    if dtype.kind not in _NUMBERS + "S" and h5py.check_string_dtype(dtype) is None:
        raise ValueError(f"{path} must hold numbers or texts; got {dtype}")


def _check_size(path: str, found: h5py.Dataset, compressed: bool) -> None:
    size = max(found.dtype.itemsize, found.id.get_type().get_size())
    volume = math.prod(found.shape) * size
    if volume and found.chunks:  # the last ones reach beyond the array
        counts = (-(-side // chunk) for side, chunk in zip(found.shape, found.chunks, strict=True))
        volume = math.prod(counts) * math.prod(found.chunks) * size
    stored = _stored(found)
    if volume > (unpacked(stored) if compressed else stored):
        raise ValueError(f"{path} declares {found.shape}, more than the file holds")


def unpacked(size: int) -> int:
    """Return how many bytes so many compressed ones may become: of features, rarely twice."""
    return max(_DENSEST * size, _SMALL if size else 0)


def _stored(found: h5py.Dataset) -> int:
    """Return how many bytes of an array the file can hold at most."""
    left = found.file.id.get_filesize()
    if found.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS:
        offset = found.id.get_offset()
        left = 0 if offset is None else left - offset
    return int(max(0, min(left, found.id.get_storage_size())))
