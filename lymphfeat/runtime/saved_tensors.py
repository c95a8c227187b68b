"""Files of `torch.save`, of which tensors and plain values are read and nothing is executed."""

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


class UnfitTensorError(ValueError):
    """A tensor that would not be what its file holds."""


def read_saved(path: Path) -> Any:
    """Read what was saved, its tensors on the CPU.

    A tensor can declare any shape over a few bytes, and would take that memory as soon as it is
    copied: raises UnfitTensorError for tensors that are sparse, or larger than the file. Whatever
    else is wrong fails in as many ways as torch, pickle and zip have.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:  # torch packs nothing
            if sum(entry.file_size for entry in file.infolist()) > size:
                raise ValueError("it becomes larger when unpacked")
    content = torch.load(path, map_location="cpu", weights_only=True)
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UnfitTensorError("its tensors must be dense")
        if tensor.numel() * tensor.element_size() > min(size, tensor.untyped_storage().nbytes()):
            shape = tuple(tensor.shape)
            raise UnfitTensorError(f"a tensor declares {shape}, more than the file holds")
    return content


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a state; what is in it twice is looked at once."""
    waiting, seen = [content], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, Mapping):
            waiting.extend(each.values())
        elif isinstance(each, (list, tuple, set)):
            waiting.extend(each)
