"""Heads with room for what they learn, to be filled from a file."""

import torch

from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.registry import DistributionAggregator, NetworkAggregator, find_aggregator
from lymphfeat.heads.stack import HeadStack, NetworkHead
from lymphfeat.settings import HeadSettings


def empty_head(settings: HeadSettings, *channels: int) -> Head:
    """Make a head of these settings on sets of features with these numbers of channels.

    Only heads of the family `distribution` read several sets; the others read the first.
    """
    aggregator = find_aggregator(settings)
    if isinstance(aggregator, DistributionAggregator):
        return DistributionHead.empty(settings, *channels)
    zeros = torch.zeros(channels[0])
    if isinstance(aggregator, NetworkAggregator):
        with torch.random.fork_rng(devices=[]):  # a network is initialised, in vain
            network = aggregator.make(channels[0], settings)
        return NetworkHead(settings, network, zeros, zeros.clone())
    return HeadStack([settings], zeros[None], torch.zeros(1))
