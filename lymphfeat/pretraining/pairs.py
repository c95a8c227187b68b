"""Pairs of pixel fields that should look alike: one cell twice, or two cells of one patient."""

import torch
from torch import Tensor


class PairSampler:
    """Draws anchors and their partners.

    Rows of one group are adjacent. With `balanced`, an image of a group of n is drawn with weight
    n^-1/2: rare classes more often than they occur, common ones still more often than rare.
    """

    def __init__(
        self,
        groups: Tensor,
        *,
        same_group: float,
        balanced: bool,
        generator: torch.Generator,
    ) -> None:
        """Take the group of each row, (N,) ascending, on the generator's device."""
        self._groups, self._generator, self._same_group = groups, generator, same_group
        sizes = torch.bincount(groups)  # (G,)
        self._sizes, self._starts = sizes, sizes.cumsum(0) - sizes
        exponent = -0.5 if balanced else 0.0
        self._weights = sizes.float().pow(exponent)[groups]  # (N,)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Draw n different anchors and a partner for each: two tensors of rows (n,)."""
        anchors = torch.multinomial(self._weights, n, generator=self._generator)
        chance, place = torch.rand(
            (2, n), generator=self._generator, device=self._generator.device, dtype=torch.float64
        )
        group = self._groups[anchors]
        partners = self._starts[group] + (place * self._sizes[group]).long()
        return anchors, torch.where(chance < self._same_group, partners, anchors)
