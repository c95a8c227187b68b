"""A recurrent network over a patient's images (the report's future work)."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lymphfeat.bags import Bags
from lymphfeat.settings import HeadSettings


class LSTM(nn.Module):
    """A bidirectional LSTM reads the images in their order; a linear classifier of its last states.

    The only aggregator for which the order of a patient's images counts.
    """

    def __init__(self, channels: int, settings: HeadSettings) -> None:
        """Take the width of each direction and the number of layers."""
        super().__init__()
        self.recurrent = nn.LSTM(
            channels, settings.width, settings.layers, bidirectional=True, batch_first=True
        )
        self.classifier = nn.Linear(2 * settings.width, 1)

    def forward(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits: images (m, C) -> (B,)."""
        sequences = list(torch.split(images, bags.sizes.tolist()))
        _, (last, _) = self.recurrent(pack_sequence(sequences, enforce_sorted=False))
        states = last[-2:].movedim(0, 1).flatten(1)  # (B, 2 D), forward and backward
        logits: Tensor = self.classifier(states)[:, 0]
        return logits.float()
