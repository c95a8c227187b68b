"""What every test starts from, on whatever machine: seeded generators, one thread, no GPU,
and nothing of the user's shell.

Nor does the processor choose a precision. A test names its own (`--precision`, `tests/tiny.py`), or
takes the fixture `auto_precision` and runs with `auto` forced either way.
"""

import os
import random
from collections.abc import Iterator

# Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line
os.environ["OMP_NUM_THREADS"] = "1"  # on tiny tensors several only wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.pop("LYMPHFEAT_COHORT", None)
os.environ.pop("LYMPHFEAT_CACHE", None)
os.environ.pop("COLUMNS", None)
os.environ.pop("FORCE_COLOR", None)

import numpy as np
import pytest
import torch
from hypothesis import settings

from lymphfeat.runtime import devices
from lymphfeat_cli import progress_lines

settings.register_profile("lymphfeat", deadline=None)
settings.load_profile("lymphfeat")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_processor_chooses() -> Iterator[None]:
    """Fail a test whose precision is left to the processor: on another it would be another test."""

    def refuse(device: torch.device) -> bool:
        pytest.fail("name a precision, or take the fixture auto_precision (tests/conftest.py)")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "has_fast_bfloat16", refuse)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_slow_machine_adds_lines() -> Iterator[None]:
    """Keep progress lines out of stderr, on which they would depend on how fast a machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_lines, "FIRST_SECONDS", 3600.0)
        yield


@pytest.fixture(params=["float32", "bfloat16"])
def auto_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make `auto` this precision, whatever the processor (which then computes it more slowly)."""
    chosen = str(request.param)
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: chosen == "bfloat16")
    return chosen
