"""The ranking family (METHOD §2 A; report §3.1–3.3): pure functions on ragged bags.

A bag is ranked once, by one stable sort; every k, top and bottom, is then read off cumulative sums.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lymphfeat.heads.bags import Bags


def effective_k(sizes: Tensor, k: int, percent: float | None = None, minimum: int = 1) -> Tensor:
    """Return how many instances of each bag are used (report §3.2): (B,), from sizes (B,).

    min(n, k), or with `percent` min(n, max(minimum, ceil(percent / 100 · n))).
    """
    if percent is None:
        return sizes.clamp(max=k)
    # In whole millionths: 7 % of 100 is 7, not the 8 that 7.000000000000001 would round up to.
    millionths = round(percent * 10_000)
    wanted = (sizes * millionths + 999_999) // 1_000_000
    return torch.minimum(sizes, wanted.clamp(min=minimum))


@dataclass(frozen=True)
class Ranking:
    """Every bag's instances from the highest score to the lowest, ties in instance order.

    Bucket i of `bags` has `rows[i]` (b, H, n), the instances' rows in that order, and `scores[i]`
    (b, H, n), their scores; padding (row M, score -inf) comes last.
    """

    bags: Bags
    rows: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]

    @classmethod
    def of(cls, scores: Tensor, bags: Bags) -> "Ranking":
        """Rank scores (M, H)."""
        padded = torch.cat([scores.detach(), scores.new_full((1, scores.shape[1]), -math.inf)])
        ranked = []
        for _, rows in bags.buckets:  # (b, n)
            values, order = from_highest(padded[rows].movedim(2, 1))  # (b, H, n)
            ranked.append((rows[:, None].expand_as(order).gather(2, order), values))
        return cls(bags, tuple(rows for rows, _ in ranked), tuple(values for _, values in ranked))

    @property
    def heads(self) -> int:
        return self.rows[0].shape[1]

    def columns(self, heads: Tensor) -> "Ranking":
        """Select some heads."""
        return Ranking(
            self.bags,
            tuple(rows.index_select(1, heads) for rows in self.rows),
            tuple(scores.index_select(1, heads) for scores in self.scores),
        )

    def top(self, k: int) -> Tensor:
        """Return the rows of each bag's k highest instances: (B, H, k), padded with M.

        All instances of a bag with fewer than k are returned.
        """
        top = self.rows[0].new_full((self.bags.n_bags, self.heads, k), self.bags.n_instances)
        for (bags, _), rows in zip(self.bags.buckets, self.rows, strict=True):
            n = min(k, rows.shape[2])
            top[bags, :, :n] = rows[:, :, :n]
        return top


def from_highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sort scores (…, n) from the highest, equals by place; return scores and places (…, n).

    On a CPU, integers of a score's bits and its place are sorted: numpy does that in less than half
    the time that torch takes for scores with their places.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.isnan().any():
        values, places = scores.sort(dim=-1, descending=True, stable=True)
        return values, places
    bits = (scores.contiguous() + 0.0).numpy().view(np.int32)  # -0 is equal to 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as the scores do; bits of negative ones fall
    keys = (~rising.astype(np.int64) << 32) | np.arange(scores.shape[-1])
    keys.sort(axis=-1)
    places = torch.from_numpy(keys & 0xFFFFFFFF)
    # Laid out as the scores are: the order in which a reduction adds up depends on it.
    values = torch.empty_like(scores).copy_(scores.gather(-1, places))
    return values, places


def _chosen_places(sizes: Tensor, k: Tensor, n: int, bottom: bool) -> Tensor:
    """Mark the ranks that count in bags of the given sizes: (b,), (b,) -> (b, n) bool.

    Where top and bottom overlap a rank is marked, and so counts, once.
    """
    place = torch.arange(n, device=sizes.device)  # (n,)
    chosen = place < k[:, None]  # (b, n)
    if bottom:
        chosen = chosen | ((place >= (sizes - k)[:, None]) & (place < sizes[:, None]))
    return chosen


def selected_probability(
    ranking: Ranking, k: Tensor, *, bottom: bool = False, reduce: str = "mean"
) -> Tensor:
    """Return each patient's probability from its top k (B,) instances: (B, H).

    With `bottom` its k lowest count too. The scores ranked are logits; the mean (or max) is taken
    of PROBABILITIES (METHOD §2 A).
    """
    result = torch.empty(ranking.bags.n_bags, ranking.heads, device=k.device)
    for (bags, _), scores in zip(ranking.bags.buckets, ranking.scores, strict=True):
        chosen = _chosen_places(ranking.bags.sizes[bags], k[bags], scores.shape[2], bottom)
        probabilities = scores.sigmoid().float() * chosen[:, None]  # (b, H, n); padding is 0
        result[bags] = (
            probabilities.amax(2)
            if reduce == "max"
            else probabilities.sum(2) / chosen.sum(1, keepdim=True)
        )
    return result


def selected_mask(ranking: Ranking, k: Tensor, *, bottom: bool = False) -> Tensor:
    """Mark the instances that `selected_probability` counts: (M, H) bool."""
    mask = torch.zeros(
        ranking.bags.n_instances + 1, ranking.heads, dtype=torch.bool, device=k.device
    )
    for (bags, _), rows in zip(ranking.bags.buckets, ranking.rows, strict=True):
        chosen = _chosen_places(ranking.bags.sizes[bags], k[bags], rows.shape[2], bottom)
        mask.scatter_(
            0,
            rows.movedim(1, 2).reshape(-1, ranking.heads),
            chosen[:, :, None].expand(-1, -1, ranking.heads).reshape(-1, ranking.heads),
        )
    return mask[:-1]
