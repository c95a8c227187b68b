"""What every test starts from: seeded global generators, and no deadlines on shared machines."""

import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line; before torch

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("lymphfeat", deadline=None)
settings.load_profile("lymphfeat")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
