"""The training loops: an epoch of whole patients, an epoch of the ranking family (METHOD §3).

- All randomness comes from one CPU generator, so that a run on a GPU sees what a run on a CPU sees
  and a checkpoint holds the complete state.
- Within an epoch nothing is read back from the device (the ranking family reads the ranking once,
  the family `distribution`, `transformer` and `lstm` a few numbers per step).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lymphfeat.errors import SettingsError
from lymphfeat.features.backbones import Backbone, stages
from lymphfeat.finetuning.augmentation import Views, draw_views
from lymphfeat.finetuning.encoder import Encoder, statistics_kept
from lymphfeat.finetuning.gradients import LossOf, backpropagate
from lymphfeat.finetuning.pixels import ImageBatch, Roster, as_they_are
from lymphfeat.heads.aggregators.ranking import Ranking, effective_k
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.distribution_head import DistributionHead
from lymphfeat.heads.engine.exact import Mixture, solve_head
from lymphfeat.heads.engine.sampling import draw_images
from lymphfeat.heads.head import Head
from lymphfeat.heads.stack import NetworkHead
from lymphfeat.runtime import processes
from lymphfeat.runtime.devices import to_device
from lymphfeat.runtime.progress import Progress, silent
from lymphfeat.settings import EndToEndSettings


@dataclass(frozen=True, kw_only=True)
class Bag:
    """The images of some patients, patient after patient. On the CPU."""

    rows: Tensor  # (n,) rows of the pixel cache
    sizes: Tensor  # (B,) images of each patient


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """The results of one epoch."""

    loss: float  # mean over the steps
    patients: NDArray[np.int64]  # (b,) the patients seen
    probability: NDArray[np.float32]  # (b,) their probabilities during training
    images: int  # number that passed through the backbone


class FineTuner:
    """What both families share: the networks, the optimiser, the generator, the patients."""

    def __init__(
        self,
        encoder: Encoder,
        head: Head,
        roster: Roster,
        settings: EndToEndSettings,
        generator: torch.Generator,
    ) -> None:
        """Take networks on the pixels' device, and the patients to learn from."""
        self.encoder = encoder
        self.backbone = encoder.backbone
        self.head = head
        self.roster = roster
        self.settings = settings
        self.generator = generator
        self.device = encoder.pixels.device
        freeze(self.backbone, settings.freeze_stages)
        self.optimizer = _make_optimizer(self.backbone, head, settings)

    def prepare_head(self) -> None:
        """Learn what a head takes from the training patients' features before the first epoch."""

    def finish_head(self) -> None:
        """Learn what it takes from their features after the last epoch."""

    def run_epoch(self, progress: Progress = silent) -> EpochResult:
        """Train for one epoch; progress counts its steps."""
        raise NotImplementedError

    def step(self, batch: ImageBatch, loss_of: LossOf) -> Tensor:
        """Take one step on a batch and return its loss, left on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.head.train()
        loss = backpropagate(self.encoder, batch, loss_of, self.settings)
        processes.add_gradients(self.backbone.parameters())
        # Every process has the head's whole gradient; the mean keeps them from drifting apart.
        processes.add_gradients(self.head.parameters(), mean=True)
        self.optimizer.step()
        return loss

    def draw(self, patients: Tensor) -> Bag:
        """Return the images of patients (b,), or a new draw of `images_per_patient` of each."""
        most = self.settings.images_per_patient
        starts, sizes = self.roster.starts[patients].tolist(), self.roster.sizes[patients].tolist()
        rows = [
            draw_images(start, size, most, self.generator)
            for start, size in zip(starts, sizes, strict=True)
        ]
        return Bag(rows=torch.cat(rows), sizes=torch.tensor([len(part) for part in rows]))

    def views(self, n: int) -> Views:
        """Draw the views of n images."""
        return draw_views(n, self.settings, self.generator)

    def shuffled(self, n: int) -> Tensor:
        """Draw an order of n things."""
        return torch.randperm(n, generator=self.generator)

    def state(self) -> dict[str, Any]:
        """Return all that the next epoch depends on, as tensors, numbers and texts."""
        return {
            "backbone": self.backbone.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.backbone.model.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def _make_optimizer(backbone: Backbone, head: Head, settings: EndToEndSettings) -> torch.optim.Adam:
    lr = settings.head.lr
    groups: list[dict[str, Any]] = [
        *_backbone_groups(backbone, settings),
        {"params": list(head.parameters()), "lr": settings.head_lr or lr},
    ]
    return torch.optim.Adam(groups, lr=lr, weight_decay=settings.head.weight_decay, fused=True)


def _backbone_groups(backbone: Backbone, settings: EndToEndSettings) -> list[dict[str, Any]]:
    """Return the trainable parameters of the backbone, by stage if learning rates differ."""
    lr = settings.head.lr
    if settings.layer_decay == 1:
        return [{"params": [p for p in backbone.parameters() if p.requires_grad], "lr": lr}]
    from_top = reversed(stages(backbone)[settings.freeze_stages :])
    return [
        {"params": parameters, "lr": lr * settings.layer_decay**depth}
        for depth, parameters in enumerate(from_top)
    ]


def freeze(backbone: Backbone, count: int) -> None:
    """Freeze the weights and batch-norm statistics of the backbone's lowest stages.

    Raises SettingsError unless at least one stage is left to train.
    """
    if not count:
        return
    found = stages(backbone)
    if count >= len(found):
        raise SettingsError(
            f"freeze_stages (={count}) must leave at least one of the {len(found)} stages of "
            f"{backbone.name} to train. To train only a head, use `lymphfeat fit-head`."
        )
    for parameters in found[:count]:
        for parameter in parameters:
            parameter.requires_grad_(False)


def full_batches(order: Tensor, size: int) -> Iterator[Tensor]:
    """Cut an order into batches; an incomplete last one counts only when it is the only one."""
    for start in range(0, max(1, len(order) // size) * size, size):
        yield order[start : start + size]


# --- whole patients: all families but ranking ----------------------------------------------------


class PatientFineTuner(FineTuner):
    """Trains on batches of whole patients."""

    def run_epoch(self, progress: Progress = silent) -> EpochResult:
        """Train on every patient once, except for an incomplete last batch."""
        batches = list(full_batches(self.shuffled(len(self.roster)), self.settings.batch_size))
        losses, logits, images = [], [], 0
        for done, patients in enumerate(batches):
            bag = self.draw(patients)
            order = self.shuffled(len(bag.rows))
            batch = ImageBatch(rows=bag.rows[order], views=self.views(len(order)))
            loss_of = PatientLoss(self.head, bag, order, self.roster.labels[patients], self.device)
            losses.append(self.step(batch, loss_of))
            logits.append(loss_of.patient_logit)
            images += len(batch)
            progress(done + 1, len(batches))
        return EpochResult(
            loss=float(torch.stack(losses).mean()),
            patients=torch.cat(batches).numpy(),
            probability=torch.cat(logits).sigmoid().cpu().numpy(),
            images=images,
        )

    @torch.no_grad()
    def features_in_training(self) -> Tensor:
        """Encode all unaltered images, (N, U, C), as those of a step are: in chunks of any order.

        In float32, and batch-norm keeps its statistics.
        """
        encoder, most = self.encoder.in_float32(), self.settings.max_forward_size
        rows = self.roster.images().rows
        order = self.shuffled(len(rows))
        chunks = as_they_are(rows[order]).chunks(most * processes.count())
        with statistics_kept(self.backbone):
            instances = torch.cat([encoder(chunk) for chunk in chunks])
        return instances[to_device(order.argsort(), self.device)]


class NetworkFineTuner(PatientFineTuner):
    """Trains as `PatientFineTuner`, on features standardised as they are before the first epoch."""

    head: NetworkHead

    def prepare_head(self) -> None:
        """Standardise features as training starts, batch-norm in the mode of training."""
        self.head.standardise(self.features_in_training().mean(1))  # (N, C)


class PatientLoss:
    """The patients' cross-entropy from instances in the order of a batch."""

    def __init__(
        self, head: Head, bag: Bag, order: Tensor, labels: Tensor, device: torch.device
    ) -> None:
        """Take the batch's order: its i-th image is the bag's order[i]-th."""
        self._head = head
        self._bags = Bags.of(bag.sizes, device)
        self._place = to_device(order.argsort(), device)
        self._labels = to_device(labels, device)
        self.patient_logit = torch.empty(0)  # (B,) of the last call, without gradient

    def __call__(self, instances: Tensor) -> Tensor:
        """Return the loss of instances (n, U, C)."""
        kept = self._head.keep(instances).index_select(0, self._place)  # (n, U, D)
        patient = self._head.patient_logits(kept, self._bags)  # (B,)
        self.patient_logit = patient.detach()
        return binary_cross_entropy_with_logits(patient, self._labels)


class DistributionFineTuner(PatientFineTuner):
    """Trains as `PatientFineTuner`, on what the head's statistics learnt before the first epoch."""

    head: DistributionHead

    def prepare_head(self) -> None:
        """Solve the head as training starts, batch-norm in the mode of training."""
        self._solve(self.features_in_training(), None)

    def finish_head(self) -> None:
        """Solve the head on the features that predictions are made of.

        Its penalty and the weights of its blocks stay those of the first solution: the features
        have learnt the training patients' labels since, and left-out patients would no longer show
        how much to shrink.
        """
        encoder, most = self.encoder.in_float32(), self.settings.max_forward_size
        chosen = float(self.head.penalty), tuple(self.head.mixture.tolist())
        self._solve(encoder.score(self.head, self.roster.images(), most), chosen)

    def _solve(self, instances: Tensor, chosen: tuple[float, Mixture] | None) -> None:
        """Solve the head on instances (N, U, C) of unaltered images of the training patients."""
        solution = self._solution(instances, chosen) if processes.is_first() else {}
        # In place, so that the optimiser goes on with the same parameters.
        self.head.load_state_dict(processes.from_first(solution))

    def _solution(
        self, instances: Tensor, chosen: tuple[float, Mixture] | None
    ) -> dict[str, Tensor]:
        """Return the tensors of the head on these instances (N, U, C), on the CPU."""
        labels = to_device(self.roster.labels.long(), self.device)
        sizes = self.roster.sizes.numpy()
        solved = solve_head(self.settings.head, instances, sizes, labels, chosen)
        state: dict[str, Tensor] = DistributionHead(solved).cpu().state_dict()
        return state


# --- the ranking family --------------------------------------------------------------------------


class RankingFineTuner(FineTuner):
    """Ranks all instances, then trains on the ones selected (report §3.1)."""

    def run_epoch(self, progress: Progress = silent) -> EpochResult:
        """Rank with the backbone in eval mode, then learn from each patient's highest instances."""
        bag = self.draw(torch.arange(len(self.roster)))
        images = as_they_are(bag.rows)
        kept = self.encoder.score(self.head, images, self.settings.max_forward_size)  # (n, U, 1)
        bags = Bags.of(bag.sizes, self.device)
        probability = self.head.patient_probability(kept, bags)
        logits = kept[:, :, 0]
        selected = self._select(logits, bags)
        losses, seen = self._learn(selected, bag.rows, logits.shape[1], progress)
        return EpochResult(
            loss=float(torch.stack(losses).mean()),
            patients=np.arange(len(self.roster)),
            probability=probability.cpu().numpy(),
            images=len(images) + seen,
        )

    def _select(self, logits: Tensor, images: Bags) -> list[Tensor]:
        """Return each patient's k_train highest instances, numbered within the ranked ones."""
        head = self.settings.head
        bags = images.times(logits.shape[1])
        k = effective_k(bags.sizes, head.k_train, head.k_percent, head.k_min).tolist()
        top = Ranking.of(logits.reshape(-1, 1), bags).top(max(k))[:, 0].cpu()  # (P, k)
        return [instances[:count] for instances, count in zip(top, k, strict=True)]

    def _learn(
        self, selected: list[Tensor], rows: Tensor, per_image: int, progress: Progress
    ) -> tuple[list[Tensor], int]:
        """Take one step per mini-batch; return the losses and the number of images passed."""
        groups = _groups(selected, self.settings.head.loss)
        patients = torch.tensor([patient for patient, _ in groups])
        batches = list(full_batches(self.shuffled(len(groups)), self.settings.batch_size))
        losses, seen = [], 0
        for done, chosen in enumerate(batches):
            members = [groups[group][1] for group in chosen.tolist()]
            bag = Bag(rows=torch.cat(members), sizes=torch.tensor([len(m) for m in members]))
            order = self.shuffled(len(bag.rows))
            batch = ImageBatch(
                rows=rows[bag.rows[order] // per_image], views=self.views(len(order))
            )
            loss_of = SelectedLoss(
                self.head,
                bag,
                order,
                bag.rows[order] % per_image,
                self.roster.labels[patients[chosen]],
                self.device,
            )
            losses.append(self.step(batch, loss_of))
            seen += len(batch)
            progress(done + 1, len(batches))
        return losses, seen


def _groups(selected: list[Tensor], loss: str) -> list[tuple[int, Tensor]]:
    """List what gets its own loss, with its patient: each instance, or all of a patient's.

    A single instance's mean logit is its logit: the instance loss is the bag loss of bags of one.
    """
    if loss == "bag":
        return list(enumerate(selected))
    return [
        (patient, one) for patient, chosen in enumerate(selected) for one in torch.split(chosen, 1)
    ]


class SelectedLoss:
    """The cross-entropy of selected instances, individually or of a patient's mean."""

    def __init__(
        self,
        head: Head,
        bag: Bag,
        order: Tensor,
        pixels: Tensor,
        labels: Tensor,
        device: torch.device,
    ) -> None:
        """Take the batch's order as `PatientLoss`; pixels (n,): the index of each in its image."""
        self._head = head
        self._bags = Bags.of(bag.sizes, device)
        self._place = to_device(order.argsort(), device)
        self._pixels = to_device(pixels, device)
        self._labels = to_device(labels, device)

    def __call__(self, instances: Tensor) -> Tensor:
        """Return the loss of instances (n, U, C)."""
        logits = self._head.keep(instances)[:, :, 0]  # (n, U)
        chosen = logits.gather(1, self._pixels[:, None])  # (n, 1)
        mean = self._bags.mean(chosen.index_select(0, self._place))[:, 0]  # (B,)
        return binary_cross_entropy_with_logits(mean, self._labels)


FINE_TUNERS: dict[str, type[FineTuner]] = {
    "weighted": PatientFineTuner,
    "distribution": DistributionFineTuner,
    "network": NetworkFineTuner,
    "ranking": RankingFineTuner,
}


# --- without training ----------------------------------------------------------------------------


def evaluate(encoder: Encoder, head: Head, roster: Roster, chunk_size: int) -> NDArray[np.float32]:
    """Return the probabilities (P,) of patients, everything in eval mode."""
    kept = encoder.score(head, roster.images(), chunk_size)  # (N, U, D)
    bags = Bags.of(roster.sizes, kept.device)
    return head.patient_probability(kept, bags).cpu().numpy()
