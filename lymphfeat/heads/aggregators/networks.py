"""Aggregators that are networks: attention (Ilse et al. 2018), a transformer, an LSTM."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lymphfeat.heads.bags import Bags
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
        # The classifier is linear: its logit of the mean is the mean of its logits of the images.
        logits = self.classifier(images).float()  # (m, 1)
        return bags.sum(self.weights(images, bags) * logits)[:, 0]


def gated_attention(channels: int, settings: HeadSettings) -> Attention:
    """Return attention with a gate (Ilse et al. 2018, eq. 9)."""
    return Attention(channels, settings, gated=True)


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
        means = _by_size(self.embed(images), bags, self._mean)  # (B, D)
        logits: Tensor = self.classifier(means)[:, 0]
        return logits.float()

    def _mean(self, embedded: Tensor, sizes: Tensor) -> Tensor:
        """Return the mean encoded image of bags of `sizes` (b,): (b, n, D), padded, -> (b, D)."""
        padding = torch.arange(embedded.shape[1], device=sizes.device) >= sizes[:, None]  # (b, n)
        encoded = self.encoder(embedded, src_key_padding_mask=padding)  # (b, n, D)
        real = (~padding)[:, :, None]
        mean: Tensor = (encoded * real).sum(1) / real.sum(1)
        return mean


class LSTM(nn.Module):
    """A bidirectional LSTM reads the images in their order; a linear classifier of its last states.

    The only aggregator for which the order of a patient's images matters.
    """

    def __init__(self, channels: int, settings: HeadSettings) -> None:
        """Take the width of each direction and the number of layers."""
        super().__init__()
        self.recurrent = nn.LSTM(channels, settings.width, settings.layers, bidirectional=True)
        self.classifier = nn.Linear(2 * settings.width, 1)

    def forward(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the patients' logits: images (m, C) -> (B,)."""
        # torch has fast kernels for packed bags on GPUs alone, and for padded ones on CPUs.
        states = self._read_packed(images, bags) if images.is_cuda else self._read(images, bags)
        logits: Tensor = self.classifier(states)[:, 0]
        return logits.float()

    def _read_packed(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the last states of both directions: images (m, C) -> (B, 2 D)."""
        sequences = list(torch.split(images, bags.sizes.tolist()))
        last: Tensor
        _, (last, _) = self.recurrent(pack_sequence(sequences, enforce_sorted=False))
        return last[-2:].movedim(0, 1).flatten(1)

    def _read(self, images: Tensor, bags: Bags) -> Tensor:
        """Return the same, of bags of similar size at a time."""
        return _by_size(images, bags, self._last_states)

    def _last_states(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Return the last states (b, 2 D) of bags of `sizes` (b,): images (b, n, C), padded."""
        weights, states = self.recurrent.all_weights, images.transpose(0, 1)  # (n, b, C)
        bag, place = torch.arange(len(sizes)), torch.arange(len(states))[:, None]
        # Where to find the images in reverse, padding at the end as before; done twice, in order.
        reverse = (sizes - 1 - place) % len(states)  # (n, b)
        for ahead, back in zip(weights[::2], weights[1::2], strict=True):  # of each layer
            reversed_states = _run_lstm(states[reverse, bag], back)
            states = torch.cat([_run_lstm(states, ahead), reversed_states[reverse, bag]], dim=2)
        width = self.recurrent.hidden_size
        return torch.cat([states[sizes - 1, bag, :width], states[0, :, width:]], dim=1)


def _by_size(images: Tensor, bags: Bags, summarise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Summarise bags of similar size at a time: images (m, D) -> (B, E).

    `summarise` takes images (b, n, D), padded with zeros, and how many are real (b,).
    """
    padded = torch.cat([images, images.new_zeros(1, images.shape[1])])
    parts = [summarise(padded[rows], bags.sizes[own]) for own, rows in bags.buckets]
    order = torch.cat([own for own, _ in bags.buckets]).argsort()
    return torch.cat(parts)[order]


def _run_lstm(images: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the states (n, b, D) of an LSTM of one layer and direction: images (n, b, C)."""
    start = images.new_zeros(1, images.shape[1], weights[1].shape[1])
    training = torch.is_grad_enabled()
    # With biases; a layer; no dropout; a direction; places before bags.
    fixed = (True, 1, 0.0, training, False, False)
    states, _, _ = torch.lstm(images, (start, start), tuple(weights), *fixed)
    return states
