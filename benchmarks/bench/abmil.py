"""One attention head on one split, beside torchmil's ABMIL: its plain loop, and its Trainer."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.bench.inputs import challenge_features
from benchmarks.bench.measure import OURS, Bench, in_turn, seconds_of
from benchmarks.bench.plain_heads import BATCH, WIDTH, batches
from benchmarks.bench.results import Goal, Line
from lymphfeat.cohort.splits import Split
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.settings import FitSettings, HeadSettings

LOOP, TRAINER = "torchmil's ABMIL, plain loop", "torchmil's ABMIL, its Trainer"
LR = 0.003


def torchmil_is_there() -> bool:
    return find_spec("torchmil") is not None


def missing() -> str:
    """Say that torchmil is missing, if it is."""
    return "" if torchmil_is_there() else " (torchmil is not installed: not measured)"


def measure(bench: Bench) -> list[Line]:
    provider, epochs = challenge_features(bench), bench.size(40, 2)
    features = provider.features
    split = provider.plan(FitSettings(protocol="report", seeds=1)).outer[0]  # halves
    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: seconds_of(partial(_fit, features, split, epochs))
    }
    if torchmil_is_there():
        contestants[LOOP] = lambda: loop_seconds(features, split, epochs)
        contestants[TRAINER] = lambda: trainer_seconds(features, split, epochs)
    return [
        Line(
            name="one ABMIL head, one split",
            unit="s",
            samples=in_turn(bench, contestants),
            goals=tuple(
                Goal(text=f"no slower than {name}", at_least=1, against=name)
                for name in (LOOP, TRAINER)
            ),
            note=f"{len(split.train)} training patients, {epochs} epochs, batches of {BATCH}, "
            f"attention of width {WIDTH} on pooled maps, float32. lymphfeat and the plain loop "
            "do not evaluate; the Trainer evaluates the other patients after every epoch, which "
            f"it cannot do without{missing()}.",
        )
    ]


def _fit(features: Features, split: Split, epochs: int) -> None:
    head = HeadSettings(agg="attention", width=WIDTH, lr=LR)
    fit = Fit(head=head, split=split, curve="nobody")
    fit_stacked(features, [fit], epochs=epochs, sampling=Sampling(batch_size=BATCH))


class Bags:
    """The standardised images of every patient, as torchmil takes them."""

    def __init__(self, features: Features) -> None:
        images = features.images.float()
        standardised = (images - images.mean(0)) / images.std(0)
        self.bags = torch.tensor_split(standardised, features.offsets[1:-1].tolist())
        self.labels = features.labels

    def of(self, patients: list[int]) -> list[dict[str, Tensor]]:
        return [{"X": self.bags[patient], "Y": self.labels[patient]} for patient in patients]


def loop_seconds(features: Features, split: Split, epochs: int) -> float:
    """Return how long torchmil's ABMIL takes in a plain loop over padded batches."""
    from torchmil.data import collate_fn

    bags = Bags(features).of(features.rows_of(split.train).tolist())
    model, optimizer = _abmil(features)

    def train() -> None:
        for _ in range(epochs):
            for chosen in batches(len(bags)):
                batch = collate_fn([bags[i] for i in chosen])
                logits = model(batch["X"], batch["mask"])
                loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["Y"].float())
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()

    return seconds_of(train)


def trainer_seconds(features: Features, split: Split, epochs: int) -> float:
    """Return how long torchmil's Trainer takes with its ABMIL."""
    from torch.utils.data import DataLoader
    from torchmil.data import collate_fn
    from torchmil.utils import Trainer

    bags = Bags(features)

    def loader(patients: Sequence[str]) -> DataLoader[dict[str, Tensor]]:
        own = bags.of(features.rows_of(patients).tolist())
        return DataLoader(own, batch_size=BATCH, shuffle=True, collate_fn=collate_fn)  # type: ignore[arg-type]

    train, held_out = loader(split.train), loader(split.validation)
    model, optimizer = _abmil(features)
    trainer = Trainer(model, optimizer, device="cpu", disable_pbar=True, verbose=False)
    return seconds_of(lambda: trainer.train(epochs, train, held_out))


def _abmil(features: Features) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torchmil.models import ABMIL

    torch.manual_seed(0)
    model = ABMIL(in_shape=(features.channels,), att_dim=WIDTH)
    return model, torch.optim.Adam(model.parameters(), lr=LR)
