"""A head that the engine has fitted, as the module that a model keeps."""

from collections.abc import Sequence

import torch

from lymphfeat.heads.blank import empty_head
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.engine.results import FittedHeads
from lymphfeat.heads.exact_head import ExactHead
from lymphfeat.heads.head import Head
from lymphfeat.heads.stack import NetworkHead


def portable_head(fitted: FittedHeads, position: int, channels: Sequence[int]) -> Head:
    """Return one of the fitted heads, which reads sets of features of so many channels."""
    module = fitted.modules.get(position)
    if isinstance(module, ExactHead):
        return DistributionHead(module, channels if len(channels) > 1 else ())
    if isinstance(module, NetworkHead):
        return module
    head = empty_head(fitted.fits[position].head, *channels)
    learnt = {
        name: torch.from_numpy(value.reshape(head.state_dict()[name].shape))
        for name, value in fitted.tensors(position).items()
    }
    head.load_state_dict(head.state_dict() | learnt)
    return head
