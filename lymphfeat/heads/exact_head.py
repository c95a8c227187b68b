"""A head that is a linear score of statistics of a patient's instances (METHOD §2 C)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lymphfeat.heads.aggregators.distribution import Standardised
from lymphfeat.heads.bags import Bags
from lymphfeat.settings import HeadSettings


@dataclass(frozen=True)
class Block:
    """A standardised statistic of one set of features, and its weights."""

    features: int  # which of the sets of features
    statistic: Standardised
    weight: Tensor  # (D,)


@dataclass(frozen=True)
class ExactHead:
    """The blocks of a head that was solved exactly."""

    settings: HeadSettings
    blocks: tuple[Block, ...]
    intercept: Tensor  # ()
    penalty: float  # that was given, or chosen on the training patients
    mixture: tuple[float, ...] = ()  # of each block its weight, given or chosen; for the record

    @property
    def chosen(self) -> str:
        """The penalty, unless it was given, and the weights of the blocks, if they were chosen."""
        parts = [] if self.settings.penalty else [f"penalty {self.penalty:.2g}"]
        if self.settings.block_weights == "chosen":
            parts.append("weights " + " ".join(f"{each:.2g}" for each in self.mixture))
        return ", ".join(parts)

    def patient_logits(self, sets: Sequence[tuple[Tensor, Bags]]) -> Tensor:
        """Score patients from each set's instances (M, C) and bags: (B,), float64."""
        parts = [self.score_of_set(place, *own) for place, own in enumerate(sets)]
        return torch.stack(parts).sum(0) + self.intercept

    def score_of_set(self, place: int, instances: Tensor, bags: Bags) -> Tensor:
        """Return what one of the sets, (M, C) and bags, adds to the logits: (B,), float64."""
        total = self.intercept.new_zeros(bags.n_bags)
        for block in self.blocks:
            if block.features == place:
                total += block.statistic.score(instances, bags, block.weight)
        return total

    def shares(self, sets: Sequence[tuple[Tensor, Bags]]) -> Tensor:
        """Return each image's share of its patient's logit: (N,), float64.

        The shares of a patient and what belongs to no image (the intercept and the standardising
        constants, the same for all patients whose bags are not small) add up to the logit where
        the statistics' shares do.
        """
        parts = []
        for block in self.blocks:
            instances, bags = sets[block.features]
            parts.append(block.statistic.shares(instances, bags, block.weight))
        return torch.stack(parts).sum(0)

    def image_logits(self, sets: Sequence[Tensor], bags: Bags) -> Tensor:
        """Score images (N, U, C) of each set: each one's share times their number, (N,)."""
        n, units, _ = sets[0].shape
        shares = self.shares([(own.flatten(0, 1), bags.times(units)) for own in sets])
        return shares.view(n, units).sum(1) * bags.spread(bags.sizes[:, None])[:, 0]

    @property
    def scorer(self) -> tuple[Tensor, Tensor] | None:
        """The weight (C,) and bias (1,) of the scorer that `mean` is; None of other heads.

        `mean@2` is none: an end-to-end training starts from the first store's weights.
        """
        first, *others = self.blocks
        if others or self.settings.agg != "mean":
            return None
        weight = first.weight * first.statistic.scale
        return weight, self.intercept - (weight @ first.statistic.mean)[None]

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the head has learnt, by name; a mean's is folded into a scorer."""
        scorer = self.scorer
        if scorer is not None:
            return {"weight": scorer[0].float(), "bias": scorer[1].float()}
        state = {
            "intercept": self.intercept[None],
            "penalty": torch.tensor([self.penalty]),
        }
        for number, block in enumerate(self.blocks):
            own = block.statistic
            tensors = {"weight": block.weight, "mean": own.mean, "scale": own.scale}
            tensors |= {"typical": own.typical, **own.statistic.learnt()}
            state |= {f"{number}.{name}": tensor.float() for name, tensor in tensors.items()}
        return state
