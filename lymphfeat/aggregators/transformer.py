"""A transformer encoder over a patient's images (the report's future work)."""

import torch
from torch import Tensor, nn

from lymphfeat.bags import Bags
from lymphfeat.settings import HeadSettings


class Transformer(nn.Module):
    """Images attend to each other, without positions; a linear classifier of their mean."""

    def __init__(self, channels: int, settings: HeadSettings) -> None:
        """Take the width of the embeddings and the number of layers."""
        super().__init__()
        width = settings.width
        self.embed = nn.Linear(channels, width)
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=next(n for n in (4, 2, 1) if width % n == 0),
            dim_feedforward=2 * width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, 1)

    def forward(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits: images (m, C) -> (B,)."""
        embedded = self.embed(images)  # (m, D)
        padded = torch.cat([embedded, embedded.new_zeros(1, embedded.shape[1])])
        means = []
        for _, rows in bags.buckets:  # (b, n), padding is row m
            padding = rows == len(images)
            encoded = self.encoder(padded[rows], src_key_padding_mask=padding)  # (b, n, D)
            real = (~padding)[:, :, None]
            means.append((encoded * real).sum(1) / real.sum(1))
        order = torch.cat([patients for patients, _ in bags.buckets]).argsort()
        logits: Tensor = self.classifier(torch.cat(means)[order])[:, 0]
        return logits.float()
