"""End-to-end training: a backbone and a head learn together (METHOD §3)."""

from lymphfeat.endtoend.members import train_folds
from lymphfeat.endtoend.run import train_end_to_end

__all__ = ["train_end_to_end", "train_folds"]
