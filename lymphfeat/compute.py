"""How work is run: CPU threads, autocast, transfers to the device, and its rate."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from lymphfeat.progress import Progress


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Compute with this many CPU threads for a while; None leaves torch's own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` where that is safe; float32 is left alone."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for what the device is doing."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def available_memory(device: torch.device) -> int:
    """Return how many bytes a device has free; of the CPU's, what its control group allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    with suppress(OSError, ValueError):  # no such group, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held: of a GPU's memory, or of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class RateMeter:
    """Adds images per second to progress."""

    def __init__(self, progress: Progress, total: int, text: str = "", *, done: int = 0) -> None:
        """Begin with `done` of `total` images finished earlier; they do not count in the rate."""
        self._progress, self._total, self._text = progress, total, text
        self._first, self._done, self._start = done, done, time.perf_counter()
        progress(done, total, text)

    def add(self, n: int) -> None:
        """Say that `n` more images are done."""
        self._done += n
        rate = (self._done - self._first) / (time.perf_counter() - self._start)
        self._progress(self._done, self._total, f"{self._text} {rate:.0f} images/s".strip())
