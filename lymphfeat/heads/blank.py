"""Heads with room for what they learn, to be filled from a file."""

import torch

from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.registry import DistributionAggregator, NetworkAggregator, find_aggregator
from lymphfeat.heads.stack import HeadStack, NetworkHead
from lymphfeat.settings import HeadSettings


def empty_head(settings: HeadSettings, *channels: int) -> Head:
    """Make a head of these settings on sets of features with these numbers of channels.

    Only heads of the family `distribution` read several sets.
    """
    aggregator = find_aggregator(settings)
    if isinstance(aggregator, DistributionAggregator):
        return DistributionHead.empty(settings, *channels)
    (own,) = channels
    zeros = torch.zeros(own)
    if isinstance(aggregator, NetworkAggregator):
        return NetworkHead(settings, aggregator.make(own, settings), zeros, zeros.clone())
    return HeadStack([settings], zeros[None], torch.zeros(1))
