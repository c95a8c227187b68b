"""End-to-end training: steps, beside a plain loop and the bare backbone, forward and backward."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.bench.extraction import CROP, Photographs, precisions, resnet18
from benchmarks.bench.inputs import dealt_out
from benchmarks.bench.measure import LIMIT, OURS, Bench, in_turn, seconds_of
from benchmarks.bench.results import Goal, Line
from lymphfeat.cohort.cohort import Cohort
from lymphfeat.finetuning.fine_tuners import FineTuner
from lymphfeat.finetuning.job import hold_out, prepare
from lymphfeat.finetuning.loop import decode, make_fine_tuner
from lymphfeat.finetuning.pixels import as_they_are
from lymphfeat.runtime.devices import autocast, choose_precision
from lymphfeat.settings import BackboneSettings, EndToEndSettings, Precision

PLAIN = "timm + DataLoader, plain PyTorch"
PATIENTS, IMAGES, STEPS = 4, 32, 8  # patients of a step, their images, steps of an epoch
EPOCHS = 40  # the default; decoding is done once for them
GOALS = (
    Goal(text="≥ .9 × the limit", at_least=0.9),
    Goal(text=f"≥ 1.3 × {PLAIN}", at_least=1.3, against=PLAIN),
)


def measure(bench: Bench) -> list[Line]:
    return [_line(bench, precision) for precision in precisions()]


def _line(bench: Bench, precision: Precision) -> Line:
    patients, each = PATIENTS * bench.size(STEPS, 2), bench.size(IMAGES, 4)
    n = patients * each
    cohort = Cohort.load(dealt_out(bench, np.full(patients, each)))
    settings = EndToEndSettings(
        backbone=BackboneSettings(backbone="resnet18", weights="none", crop=CROP),
        batch_size=PATIENTS,
        max_backward_size=PATIENTS * each,
        precision=precision,
        device="cpu",
    )
    decoding = seconds_of(lambda: decode(cohort, settings))
    tuner = make_fine_tuner(
        prepare(cohort, hold_out(cohort, settings), settings), decode(cohort, settings)
    )
    plain = PlainTraining(bench, cohort, choose_precision(precision, torch.device("cpu")))
    bare = BareBackbone(tuner, PATIENTS * each, choose_precision(precision, torch.device("cpu")))
    samples = in_turn(
        bench,
        {
            OURS: lambda: n / (seconds_of(tuner.run_epoch) + decoding / EPOCHS),
            PLAIN: lambda: n / seconds_of(plain.run_epoch),
            LIMIT: lambda: PATIENTS * each / seconds_of(bare.step),
        },
    )
    return Line(
        name=f"end-to-end step, {precision}",
        unit="images/s",
        samples=samples,
        goals=GOALS,
        note=f"steps of {PATIENTS} patients × {each} images, bnsigmoid on pixels, ResNet-18, crop "
        f"{CROP}; all images get gradients. lymphfeat decodes once, and a share of 1/{EPOCHS} of "
        "that counts for each epoch; the plain loop decodes in its workers in every epoch.",
    )


class BareBackbone:
    """Forward and backward passes of the backbone alone, on a batch that is ready."""

    def __init__(self, tuner: FineTuner, n: int, dtype: torch.dtype) -> None:
        self._backbone, self._dtype = tuner.backbone, dtype
        self._images = tuner.encoder.pixels.load(as_they_are(torch.arange(n)))
        with torch.no_grad():
            shape = self._backbone(self._images[:2]).shape[1:]
        self._gradient = torch.randn(n, *shape)

    def step(self) -> None:
        self._backbone.train()
        self._backbone.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), self._dtype):
            maps: Tensor = self._backbone(self._images)
        torch.autograd.backward(maps.float(), self._gradient)


# --- what one would write -------------------------------------------------------------------------


class Patients(Dataset[tuple[Tensor, float]]):
    """Every patient's images (n, 3, 112, 112), flipped at random, and label."""

    def __init__(self, bags: Sequence[Sequence[Path]], labels: Sequence[int]) -> None:
        self._bags, self._labels = [Photographs(bag) for bag in bags], labels

    def __len__(self) -> int:
        return len(self._bags)

    def __getitem__(self, number: int) -> tuple[Tensor, float]:
        bag = self._bags[number]
        images = torch.stack([_flipped(bag[i]) for i in range(len(bag))])
        return images, float(self._labels[number])


def _flipped(image: Tensor) -> Tensor:
    """Flip an image (3, H, W) left-right and upside-down, each with probability one half."""
    return image.flip([axis for axis in (1, 2) if torch.rand(()) < 0.5])


def _as_lists(patients: list[tuple[Tensor, float]]) -> tuple[list[Tensor], Tensor]:
    return [images for images, _ in patients], torch.tensor([label for _, label in patients])


class PlainTraining:
    """Backbone, scorer and batch-normalised weights, trained by a loop over a DataLoader."""

    def __init__(self, bench: Bench, cohort: Cohort, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._loader = DataLoader(
            Patients(cohort.images, cohort.labels.tolist()),
            batch_size=PATIENTS,
            shuffle=True,
            num_workers=bench.threads,
            collate_fn=_as_lists,
            persistent_workers=True,
        )
        self._model = resnet18().train()
        self._scorer, self._norm = nn.Linear(512, 1), nn.BatchNorm1d(1)
        parts = (self._model, self._scorer, self._norm)
        self._optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], 1e-4)

    def run_epoch(self) -> None:
        for bags, labels in self._loader:
            with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
                maps = self._model.forward_features(torch.cat(bags))  # (n, 512, 4, 4)
            score = self._scorer(maps.float().flatten(2).mT)  # (n, 16, 1)
            weight = self._norm(score.detach().flatten()[:, None]).sigmoid().view_as(score)
            sizes = [len(bag) for bag in bags]
            pairs = zip((weight * score).split(sizes), weight.split(sizes), strict=True)
            logits = torch.stack([total.sum() / weights.sum() for total, weights in pairs])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
