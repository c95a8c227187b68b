"""Where and how to compute: device, precision, CPU threads, transfers, memory."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from lymphfeat.errors import SettingsError
from lymphfeat.settings import Precision


def choose_device(name: str = "auto") -> torch.device:
    """Turn auto, cpu or cuda into an available device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device (=cuda) must be available; got none. Use --device cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is computed in hardware: tensor cores, or AVX512-bf16 and newer."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn auto, float32 or bfloat16 into a dtype; auto is bfloat16 where hardware supports it."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16"):
        raise SettingsError(f"precision (={name}) must be auto, float32 or bfloat16.")
    return torch.float32 if name == "float32" else torch.bfloat16


def precision_name(dtype: torch.dtype) -> Precision:
    """Return the name of a precision that `choose_precision` accepts."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


_GROUPS = Path("/sys/fs/cgroup")
# By controllers in /proc/self/cgroup (version 2 names none): the files with a group's limit and
# usage, and the line of memory.stat with the part of the usage that is unused cached files.
_NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_ASSUMED_MEMORY = 4 << 30  # where the system does not report it: Windows


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Compute with this many CPU threads inside the context; None keeps torch's own choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work_alone() -> None:
    """Compute with this thread alone, while others beside it use the other cores."""
    torch.set_num_threads(1)
    threadpool_limits(1, user_api="openmp")  # of this thread only, so it need not be undone


_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Compute the same bits every time on a GPU inside the context; on a CPU, change nothing.

    An operation that has no such algorithm raises RuntimeError.
    """
    if not wanted or device.type == "cpu":
        yield
        return
    cudnn, workspace = torch.backends.cudnn, os.environ.get(_CUBLAS)
    before = cudnn.deterministic, cudnn.benchmark
    algorithms = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        os.environ[_CUBLAS] = ":4096:8"  # read when cuBLAS starts, at the first product
        cudnn.deterministic, cudnn.benchmark = True, False
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=only_warns)
        cudnn.deterministic, cudnn.benchmark = before
        if workspace is None:
            del os.environ[_CUBLAS]
        else:
            os.environ[_CUBLAS] = workspace


# The parts of torch.backends that may round the factors of float32 products: GPUs to TF32, with 10
# bits after the point instead of 23 (torch's default in convolutions), CPUs to bfloat16, with 7.
_FLOAT32_PRODUCTS = (
    *("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)


@contextmanager
def whole_float32() -> Iterator[None]:
    """Compute float32 at full precision inside the context, whatever torch is set to."""
    parts = [attrgetter(name)(torch.backends) for name in _FLOAT32_PRODUCTS]
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` where that is safe; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for what the device is doing."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def available_memory(device: torch.device, groups: Path = _GROUPS) -> int:
    """Return how many bytes are free on a device; on the CPU, within its control groups.

    `groups` is where the system mounts control groups.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_free_memory(), *_left_in_groups(groups)])


def _free_memory() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    with suppress(AttributeError, OSError, ValueError):  # macOS
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _ASSUMED_MEMORY


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield how many bytes each control group of this process may still use."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    for line in ["0::/", *lines]:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers not in _NAMES:
            continue
        group = Path(controllers, path.lstrip("/"))  # relative to the root
        for place in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such group, or "max"
                yield _left(root / place, *_NAMES[controllers])


def _left(group: Path, limit: str, usage: str, cache: str) -> int:
    used = int((group / usage).read_text(encoding="utf-8"))
    with suppress(OSError):
        for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines():
            name, value = line.split()
            if name == cache:  # file pages, which are freed on demand
                used -= int(value)
    return max(int((group / limit).read_text(encoding="utf-8")) - used, 0)


def give_back_freed_memory() -> None:
    """Give back to the system what glibc keeps of freed memory; does nothing elsewhere.

    Work on blocks of ever other sizes leaves holes that few later blocks fit.
    """
    with suppress(AttributeError, OSError, TypeError):  # no glibc; no names of the process's own
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in bytes: of the GPU, or of the host.

    NaN on Windows, where the standard library does not know it.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
