"""What may change the last bits of a result: the device, its kind, CPU threads and versions."""

import platform
from importlib.metadata import version

import torch

from lymphfeat import __version__

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "pillow", "timm")


def circumstances(device: torch.device) -> dict[str, object]:
    """Describe where and with what is computed here and now.

    `processor` is the GPU's name, or the CPU's instructions that torch uses: sums are in another
    order with others.
    """
    gpu = device.type == "cuda"
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device)
        if gpu
        else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {
            "lymphfeat": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }
