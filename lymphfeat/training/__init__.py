"""The head engine: fits many heads together on cached feature maps (`engine` says how)."""

from lymphfeat.training.adam import StackedAdam
from lymphfeat.training.engine import fit_heads
from lymphfeat.training.features import Features
from lymphfeat.training.fits import Fit, FittedHeads, split_generator

__all__ = [
    "Features",
    "Fit",
    "FittedHeads",
    "StackedAdam",
    "fit_heads",
    "split_generator",
]
