"""Training of networks on a patient's pooled images, one by one, as stacking gains nothing.

All fits of a split see the same patients in the same order and share what is read.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, FittedHeads, split_generator
from lymphfeat.heads.engine.sampling import Batch, Sampler, Sampling
from lymphfeat.heads.engine.scorers import Scaling
from lymphfeat.heads.stack import NetworkHead, class_weights
from lymphfeat.runtime.devices import autocast

_CHUNK_WIDTH = 512  # number of heads a network counts as when patients are cut into chunks


@dataclass(frozen=True)
class _Lane:
    """The networks of one split, with their optimisers and class weights (2,)."""

    sampler: Sampler
    positions: list[int]
    heads: list[NetworkHead]
    optimizers: list[torch.optim.Adam]
    class_weights: list[Tensor]


class NetworkTrainer:
    """Trains fits whose aggregator is a network."""

    def __init__(
        self,
        features: Features,
        fits: Sequence[Fit],
        positions: Sequence[int],
        sampling: Sampling,
        *,
        tta: bool = False,
    ) -> None:
        """Take the positions of the fits that this trainer is for."""
        self._features, self._fits, self._sampling = features, fits, sampling
        self._instances = features.of_unit("image")
        self._views = range(sampling.views if tta else 1)
        by_split: dict[str, list[int]] = defaultdict(list)
        for position in positions:
            by_split[fits[position].split.id].append(position)
        self._lanes = [self._make_lane(group) for group in by_split.values()]

    def _make_lane(self, positions: list[int]) -> _Lane:
        own = [self._fits[position] for position in positions]
        features, split = self._features, own[0].split
        scaling = Scaling.of(features, own[:1])
        heads = [
            NetworkHead.initial(fit.head, scaling.mean[0], scaling.scale[0], split_generator(split))
            for fit in own
        ]
        train = features.rows_of(split.train)
        labels = features.labels[torch.from_numpy(train).to(features.device)]
        return _Lane(
            sampler=Sampler(train, self._instances, self._sampling, split_generator(split)),
            positions=positions,
            heads=heads,
            optimizers=[
                torch.optim.Adam(
                    head.parameters(),
                    lr=fit.head.lr,
                    weight_decay=fit.head.weight_decay,
                    fused=True,
                )
                for head, fit in zip(heads, own, strict=True)
            ],
            class_weights=[class_weights(fit.head, labels) for fit in own],
        )

    def run_epoch(self, epoch: int, result: FittedHeads) -> None:
        """Train every network for an epoch and evaluate it."""
        last = epoch == result.losses.shape[1] - 1
        for lane in self._lanes:
            losses = [self._step(lane, batch) for batch in lane.sampler.epoch()]
            result.losses[lane.positions, epoch] = torch.stack(losses).mean(0).cpu().numpy()
        self._evaluate(last, epoch, result)

    def evaluate_on(self, features: Features, result: FittedHeads) -> None:
        """Evaluate the trained networks on other features, into a result of one epoch."""
        self._instances = features.of_unit("image")
        self._evaluate(True, 0, result)

    def _evaluate(self, last: bool, epoch: int, result: FittedHeads) -> None:
        for lane in self._lanes:
            for position, head in zip(lane.positions, lane.heads, strict=True):
                if last or self._fits[position].curve:
                    result.curves[position, epoch] = self._probability(head)

    def _step(self, lane: _Lane, batch: Batch) -> Tensor:
        """Take one step of a lane's networks; return their losses (K,)."""
        images = self._read(batch)  # (m, C)
        bags = Bags.of(batch.sizes, images.device)
        labels = self._features.labels[batch.patients.to(images.device)]  # (b,)
        losses = []
        for head, optimizer, weights in zip(
            lane.heads, lane.optimizers, lane.class_weights, strict=True
        ):
            head.train()
            with autocast(images.device, images.dtype):
                logits = head(images, bags)  # (b,)
            loss = binary_cross_entropy_with_logits(logits, labels.float(), weights[labels])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def _read(self, batch: Batch) -> Tensor:
        images = batch.images
        if images is None:
            images = self._instances.images_of(batch.patients)
        return self._instances.source.gather(images, batch.views)[:, 0]

    @torch.no_grad()
    def _probability(self, head: NetworkHead) -> NDArray[np.float32]:
        """Return every patient's probability: (P,)."""
        head.eval()
        total = torch.zeros(len(self._features.labels), device=self._features.device)
        for view in self._views:
            for patients, images, bags in self._instances.chunks(_CHUNK_WIDTH, view):
                with autocast(images.device, images.dtype):
                    total[patients] += head(images, bags).sigmoid()
        return (total / len(self._views)).cpu().numpy()

    def keep(self, result: FittedHeads) -> None:
        """Write the networks into the result."""
        for lane in self._lanes:
            for position, head in zip(lane.positions, lane.heads, strict=True):
                result.networks[position] = head.eval().cpu()
