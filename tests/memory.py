"""The memory of this process and its peaks, on Linux."""

import ctypes
from pathlib import Path

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MEASURED = _RESET.exists()


def peak() -> float:
    """Return the most memory that this process has held since `reset_peak`, in MiB."""
    if not MEASURED:
        return 0.0
    return int(_STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1024


def reset_peak() -> float:
    """Let the peak begin at what this process holds now; return that in MiB.

    What was freed goes back to the system before, so that taking it again is seen.
    """
    if not MEASURED:
        return 0.0
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    _RESET.write_text("5", encoding="utf-8")
    return peak()
