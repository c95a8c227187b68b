"""What libhdf5 would believe: it is read from the file itself, to be checked before.

A text of variable length is stored as its length and its place in a heap, and libhdf5 takes memory
for the length before it looks into the heap. An array that is made of others is stored as a list in
a heap, for which memory is taken when the array is opened. Both can be seen in the headers of
objects (HDF5 file format 3.0, IV.A) and in the stored parts of arrays.
"""

import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np

Read = Callable[[int, int], bytes]  # of an address and a size

TEXT = np.dtype([("length", "<u4"), ("heap", "<u8"), ("number", "<u4")])
_OLD_FILL, _FILL, _LAYOUT, _ATTRIBUTE = 4, 5, 8, 12  # messages of a header
_CONTINUATION, _ATTRIBUTES = 16, 21
_OURS = (_OLD_FILL, _FILL, _LAYOUT, _ATTRIBUTE, _ATTRIBUTES)
_VIRTUAL = 3  # class of a layout
_SHARED = 2  # a message's flag
_MOST = 1 << 20  # bytes of a header


def length_of_array(found: h5py.Dataset, read: Read) -> int:
    """Return how many bytes the texts of an array say they have."""
    parts = _parts(found.id, read)
    return sum(int(np.frombuffer(part, TEXT)["length"].sum(dtype=np.uint64)) for part in parts)


def _parts(array: Any, read: Read) -> Iterator[bytes]:
    properties = array.get_create_plist()
    if properties.get_layout() == h5py.h5d.CONTIGUOUS:
        if (offset := array.get_offset()) is not None:
            yield read(offset, array.get_storage_size())
    elif properties.get_layout() == h5py.h5d.CHUNKED:
        yield from _chunks(array, properties, read)
    else:
        raise ValueError("its texts must be stored in a row or in chunks")


def _chunks(array: Any, properties: Any, read: Read) -> Iterator[bytes]:
    """Yield chunks as libhdf5 unpacks them, in a file in memory in which they are no texts."""
    stored: list[Any] = []
    array.chunk_iter(stored.append)
    size = math.prod(properties.get_chunk()) * TEXT.itemsize
    filters = [properties.get_filter(number)[:3] for number in range(properties.get_nfilters())]
    with h5py.File("chunks", "w", driver="core", backing_store=False) as file:
        for chunk in stored:
            skipped = chunk.filter_mask  # bits: filters that this chunk went without
            if (name := str(skipped)) not in file:
                own = [each for number, each in enumerate(filters) if not skipped >> number & 1]
                _create_bytes(file, name, size, own)
            unpacked = file[name]
            unpacked.id.write_direct_chunk((0,), read(chunk.byte_offset, chunk.size))
            yield unpacked[()].tobytes()


def _create_bytes(file: h5py.File, name: str, size: int, filters: list[Any]) -> None:
    """Create an array of bytes, in one chunk that is packed by filters."""
    packing, width = h5py.h5p.create(h5py.h5p.DATASET_CREATE), 1
    for code, flags, values in filters:
        packing.set_filter(code, flags, values)
        if code == h5py.h5z.FILTER_SHUFFLE and values:  # libhdf5 skips it for texts
            width = values[0]
    if size % width:
        raise ValueError("its parts must hold whole units of what shuffles them")
    sides = (size // width,)
    packing.set_chunk(sides)
    kind, space = h5py.h5t.py_create(np.dtype(f"V{width}")), h5py.h5s.create_simple(sides)
    h5py.h5d.create(file.id, name.encode(), kind, space, packing)


def is_virtual(address: int, read: Read) -> bool:
    """Return whether what begins at an address is an array that is made of others."""
    found = [body[:2] for kind, body in _messages(address, read) if kind == _LAYOUT]
    return any(each[0] >= 4 and each[1] == _VIRTUAL for each in found)


def has_fill(address: int, read: Read) -> bool:
    """Return whether an array has a value for what is not stored, which may be a text, too."""
    messages = _messages(address, read)
    return any(_fills(kind, body) for kind, body in messages if kind in (_OLD_FILL, _FILL))


def _fills(kind: int, body: bytes) -> bool:
    if kind == _OLD_FILL:
        return any(body[:4])  # its size
    if body[0] == 3:
        return bool(body[1] & 32) and any(body[2:6])
    return any(body[4:8])


def lengths_of_attribute(address: int, name: str, read: Read) -> list[int]:
    """Return how many bytes an object's text says it has: once, unless the header is damaged."""
    found = []
    for kind, body in _messages(address, read):
        if kind == _ATTRIBUTES and body[2 + 2 * (body[1] & 1) :][:8] != b"\xff" * 8:
            raise ValueError("an object has too many attributes")  # they lie in a heap
        if kind == _ATTRIBUTE:
            version, _, *sizes = struct.unpack_from("<BBHHH", body)
            start, unit = 8 + (version == 3), 8 if version == 1 else 1
            if body[start : start + sizes[0]].split(b"\0")[0] == name.encode():
                place = start + sum(-(-size // unit) * unit for size in sizes)
                found.append(int.from_bytes(body[place : place + 4], "little"))
    return found


def _messages(address: int, read: Read) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the content of what the header of an object holds."""
    prefix = read(address, 64)
    if newer := prefix[:4] == b"OHDR":
        flags = prefix[5]
        start, width = 6 + 16 * bool(flags & 32) + 4 * bool(flags & 16), 1 << (flags & 3)
        size = int.from_bytes(prefix[start : start + width], "little")
        start, head = start + width, struct.Struct("<BHB2x" if flags & 4 else "<BHB")
    else:
        start, size, head = 16, *struct.unpack_from("<I", prefix, 8), struct.Struct("<HHB3x")
    blocks, left = [(address + start, size)], _MOST
    for start, size in blocks:  # which grow
        block, place = read(start, size), 0
        if (left := left - len(block)) < 0:
            raise ValueError(f"the header of an object must have at most {_MOST} bytes")
        while place + head.size <= len(block):
            kind, length, flags = head.unpack_from(block, place)
            body = block[place + head.size :][:length]
            if kind in _OURS and flags & _SHARED:
                raise ValueError("the header of an object must lie in one place")
            if kind == _CONTINUATION:
                start, size = struct.unpack_from("<QQ", body)
                blocks.append((start + 4, size - 8) if newer else (start, size))
            yield kind, body
            place += head.size + length
