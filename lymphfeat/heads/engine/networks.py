"""Training of networks on a patient's pooled images, one by one, as stacking gains nothing."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.adam import adam

from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.instances import Features, Instances
from lymphfeat.heads.engine.results import Fit, FittedHeads, split_generator
from lymphfeat.heads.engine.sampling import Batch, Sampler, Sampling
from lymphfeat.heads.engine.scorers import Scaling
from lymphfeat.heads.engine.trainer import HeadTrainer, runs
from lymphfeat.heads.registry import NetworkAggregator, aggregator_of
from lymphfeat.heads.stack import NetworkHead, class_weights
from lymphfeat.runtime.devices import autocast
from lymphfeat.settings import HeadSettings

_CHUNK_WIDTH = 512  # number of heads a network counts as when patients are cut into chunks


class _Adam:
    """Fused Adam of torch's defaults; making `torch.optim.Adam` imports the compiler: a second."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self._lr, self._weight_decay = lr, weight_decay
        self._first = [torch.zeros_like(each) for each in self.parameters]
        self._second = [torch.zeros_like(each) for each in self.parameters]
        self._steps = [torch.zeros((), device=each.device) for each in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Update the parameters by their gradients."""
        adam(
            *(self.parameters, list(gradients), self._first, self._second, [], self._steps),
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )


@dataclass(frozen=True)
class _Learner:
    """A network, its optimiser and its class weights (2,)."""

    head: NetworkHead
    optimizer: _Adam
    class_weights: Tensor

    @classmethod
    def of(cls, fit: Fit, scaling: Scaling, labels: Tensor) -> "_Learner":
        """Initialise a fit's network; `labels` (p,) are those of its training patients."""
        head = NetworkHead.initial(
            fit.head, scaling.mean[0], scaling.scale[0], split_generator(fit.split)
        )
        optimizer = _Adam(list(head.parameters()), fit.head.lr, fit.head.weight_decay)
        return cls(head, optimizer, class_weights(fit.head, labels))

    def step(self, images: Tensor, bags: Bags, labels: Tensor) -> Tensor:
        """Take one step on images (m, C) of patients with labels (b,); return the loss."""
        self.head.train()
        with autocast(images.device, images.dtype):
            logits = self.head(images, bags)  # (b,)
        weights = self.class_weights[labels]
        loss = binary_cross_entropy_with_logits(logits, labels.float(), weights)
        self.optimizer.step(torch.autograd.grad(loss, self.optimizer.parameters))
        return loss.detach()


@dataclass(frozen=True)
class _Lane:
    """The networks of one split."""

    sampler: Sampler
    learners: list[_Learner]


class NetworkHeadTrainer(HeadTrainer):
    """Trains fits whose aggregator is a network."""

    most = 25

    def __init__(
        self, features: Features, fits: Mapping[int, Fit], sampling: Sampling, *, tta: bool = False
    ) -> None:
        super().__init__(features, fits, sampling, tta=tta)
        splits = [fit.split.id for fit in self._fits]
        self._lanes = [self._make_lane(self._fits[own]) for own in runs(splits)]
        self._heads = [learner.head for lane in self._lanes for learner in lane.learners]

    @classmethod
    def stack_key(cls, head: HeadSettings, sampling: Sampling) -> Hashable:
        return head

    @classmethod
    def bytes_of(cls, head: HeadSettings, channels: int, batch_size: int) -> int:
        with torch.device("meta"):
            network = aggregator_of(head, NetworkAggregator).make(channels, head)
        return 16 * sum(parameter.numel() for parameter in network.parameters())

    @classmethod
    def unit_of(cls, head: HeadSettings, sampling: Sampling) -> str:
        return "image"

    def _make_lane(self, fits: Sequence[Fit]) -> _Lane:
        split = fits[0].split
        scaling = Scaling.of(self._features, fits[:1])
        sampler = self._sampler(split, split_generator(split))
        labels = self._labels[sampler.train.to(self._features.device)]
        return _Lane(sampler, [_Learner.of(fit, scaling, labels) for fit in fits])

    def _learn(self) -> NDArray[np.float32]:
        return np.concatenate([self._train(lane) for lane in self._lanes])

    def _train(self, lane: _Lane) -> NDArray[np.float32]:
        losses = [self._step(lane, batch) for batch in lane.sampler.epoch()]
        return np.asarray(torch.stack(losses).mean(0).cpu().numpy())

    def _step(self, lane: _Lane, batch: Batch) -> Tensor:
        """Take one step of a lane's networks; return their losses (K,)."""
        images = self._read(batch)  # (m, C)
        bags = Bags.of(batch.sizes, images.device)
        labels = self._labels[batch.patients.to(images.device)]  # (b,)
        return torch.stack([learner.step(images, bags, labels) for learner in lane.learners])

    def _read(self, batch: Batch) -> Tensor:
        images = batch.images
        if images is None:
            images = self._instances.images_of(batch.patients)
        return self._instances.source.gather(images, batch.views)[:, 0]

    def _probabilities(
        self, instances: Instances, wanted: Sequence[int], view: int, *, last: bool
    ) -> Tensor:
        device = instances.device
        result = torch.full((len(wanted), len(self._labels)), torch.nan, device=device)
        for place, i in enumerate(wanted):
            evaluated = self._evaluated(self._fits[i], last=last)
            for some in instances.cut(evaluated, _CHUNK_WIDTH):
                result[place, some] = _probability(self._heads[i], *instances.read(some, view))
        return result

    def keep(self, result: FittedHeads) -> None:
        for position, head in zip(self._positions, self._heads, strict=True):
            result.modules[position] = head.eval().cpu()


@torch.no_grad()
def _probability(head: NetworkHead, images: Tensor, bags: Bags) -> Tensor:
    """Return patients' probabilities: images (m, C) -> (b,)."""
    head.eval()
    with autocast(images.device, images.dtype):
        probability: Tensor = head(images, bags).sigmoid()
    return probability.float()
