"""Attention-based MIL (Ilse et al. 2018): a patient is the attended mean of its images."""

import torch
from torch import Tensor, nn

from lymphfeat.bags import Bags
from lymphfeat.settings import HeadSettings


class Attention(nn.Module):
    """Weights wᵀ tanh(V h), softmax over a patient's images; a linear classifier of their mean."""

    def __init__(self, channels: int, settings: HeadSettings, *, gated: bool = False) -> None:
        """Take the width of V; `gated` multiplies its output by σ(U h)."""
        super().__init__()
        self.hidden = nn.Linear(channels, settings.width)
        self.gate = nn.Linear(channels, settings.width) if gated else None
        self.attention = nn.Linear(settings.width, 1, bias=False)
        self.classifier = nn.Linear(channels, 1)

    def weights(self, images: Tensor, bags: Bags) -> Tensor:
        """Return each image's share of attention: (m, C) -> (m, 1)."""
        hidden = torch.tanh(self.hidden(images))  # (m, D)
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(images))
        return bags.softmax(self.attention(hidden).float())

    def forward(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits: images (m, C) -> (B,)."""
        # The classifier is linear: that of the mean is the mean of the images'.
        logits = self.classifier(images).float()  # (m, 1)
        return bags.sum(self.weights(images, bags) * logits)[:, 0]


def gated_attention(channels: int, settings: HeadSettings) -> Attention:
    """Return attention with a gate (Ilse et al. 2018, eq. 9)."""
    return Attention(channels, settings, gated=True)
