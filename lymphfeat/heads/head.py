"""What every head of a model offers, whatever its family."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from lymphfeat.heads.bags import Bags
from lymphfeat.runtime.arrays import Floats
from lymphfeat.settings import HeadSettings


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """What a head says of patients and of each of their images."""

    probability: Tensor  # (P,) of patients
    total: Tensor  # (P,) the patient's logit; of the ranking family the probability
    score: Tensor  # (N,) an image's logit: what it speaks for, whatever it counts
    weight: Tensor  # (N,) how much an image counts, at least 0, adding up to 1 per patient
    contribution: Tensor  # (N,) an image's share of its patient's total, with its sign

    def numbers(self, name: str) -> Floats:
        """Return a field by its name, as an array."""
        return np.asarray(getattr(self, name).double().numpy())


class Head(nn.Module):
    """Says what to keep of every instance, and makes patients of what was kept."""

    settings: tuple[HeadSettings, ...]  # of each head side by side; one in a model
    of_logits = True  # whether contributions are shares of a logit, not of a probability

    def keep(self, instances: Tensor) -> Tensor:
        """Return all that counts of instances: (n, U, C) -> (n, U, D)."""
        raise NotImplementedError

    def patient_logits(self, kept: Tensor, images: Bags) -> Tensor:
        """Score whole patients by what was kept of their images, differentiably.

        kept (N, U, D) -> (P,). Raises SettingsError for the ranking family, which has none.
        """
        raise NotImplementedError

    def patient_probability(self, kept: Tensor, images: Bags) -> Tensor:
        """Return the probabilities (P,) of a `read_out`, without what it says of images."""
        return self.read_out(kept, images).probability

    def read_out(self, kept: Tensor, images: Bags) -> ReadOut:
        """Read out whole patients from what was kept of their images (N, U, D), in eval mode."""
        raise NotImplementedError
