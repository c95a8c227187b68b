"""How fast the head engine is: the report's ablation on a random store of challenge size.

    python benchmarks/heads.py [--threads 2] [--epochs 40] [--precision float32 bfloat16]
    python benchmarks/heads.py --threads 1 --clock cpu    # on a machine that others use too

The ablation is 10 seeds × {top1, top5, top10, top&bottom 5 and 10, mean, max, bnsigmoid}, every
head evaluated after every epoch. Printed for each precision:

- its time, its peak memory beside the size of the store, and how soon one head has been trained;
- the ratio to the bare matrix products of the same steps, the two measured in turn, epoch by epoch;
- the ratio to a loop in plain PyTorch, a bag at a time, one head after another, which is run for
  one seed and one epoch of every head and multiplied;
- attention against torchmil's ABMIL in its plain loop (padded bags, the same batches), where
  torchmil is installed (`pip install 'lymphfeat[bench]'`).

The values are random: nothing here says anything about accuracy.
"""

import argparse
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line; before torch

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lymphfeat.cohort.cohort import Cohort
from lymphfeat.cohort.splits import Split, report_splits
from lymphfeat.evaluation.providers import SharedFeatures, load_features
from lymphfeat.features.store import FeatureSet, FeatureStore, MapShape
from lymphfeat.features.store_writer import StoreWriter
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, split_generator
from lymphfeat.heads.engine.sampling import Sampler, Sampling
from lymphfeat.heads.grid import expand, head_name
from lymphfeat.heads.registry import AGGREGATORS, RankingAggregator
from lymphfeat.settings import HeadGrid, HeadSettings

PATIENTS, IMAGES, SHAPE = 163, 13_453, MapShape(views=1, channels=512, height=4, width=4)
SEEDS, BATCH = 10, 16
ABLATION = ("top1", "topk", "topbottomk", "mean", "max", "bnsigmoid")
SAMPLING = Sampling(batch_size=BATCH)
CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- the store ------------------------------------------------------------------------------------


def write_random_store(path: Path) -> None:
    """Write a store of challenge size; its labels are random too."""
    rng = np.random.default_rng(0)
    sizes = np.clip(np.exp(rng.normal(4.2, 0.6, PATIENTS)), 16, 198)
    sizes = np.round(sizes * IMAGES / sizes.sum()).astype(np.int64)
    sizes[sizes.argmax()] += IMAGES - sizes.sum()
    ids = [f"P{i}" for i in range(PATIENTS)]
    table = pd.DataFrame(
        {"label": (rng.random(PATIENTS) < 0.69).astype(np.int64), "split": "train"},
        index=pd.Index(ids, name="id", dtype="str"),
    )
    images = tuple(
        tuple(Path(id) / f"{i:06d}.jpg" for i in range(n))
        for id, n in zip(ids, sizes.tolist(), strict=True)
    )
    cohort = Cohort(root=Path(), table=table, images=images, submission_ids=())
    frozen = FeatureSet(name="frozen", backbone="random", weights_sha256="0" * 64)
    with StoreWriter(
        path, recipe={"backbone": "random"}, cohort=cohort, shape=SHAPE, feature_sets=[frozen]
    ) as writer:
        for start in range(0, IMAGES, 512):
            n = min(512, IMAGES - start)
            maps = rng.standard_normal(SHAPE.rows(n), dtype=np.float32).clip(min=0)
            writer.write(start, {"frozen": maps}, np.zeros(n, np.uint32))
        writer.finish()


def make_fits(features: Features, aggs: Sequence[str]) -> list[Fit]:
    heads = [head for agg in aggs for head in expand(HeadGrid(agg=(agg,), k_agg=_ks(agg)))]
    splits = report_splits(list(features.row), features.labels.numpy(), seeds=SEEDS)
    return [Fit(head=head, split=split) for head in heads for split in splits]


def _ks(agg: str) -> tuple[int, ...]:
    return (5, 10) if agg in ("topk", "topbottomk") else ()


# --- what cannot be avoided -----------------------------------------------------------------------


class BareProducts:
    """The matrix products of an epoch of the ablation, and nothing else.

    Every patient that any seed needs in a step is multiplied once by the scorers of those seeds,
    forward and backward; then all instances by all scorers, for the evaluation.
    """

    def __init__(self, features: Features, fits: Sequence[Fit]) -> None:
        self._features = features
        self._steps = self._plan(fits)

    def _plan(self, fits: Sequence[Fit]) -> list[Counter[int]]:
        """List for each step how many seeds want which patient."""
        splits = list({fit.split.id: fit.split for fit in fits}.values())
        instances = self._features.of_unit("pixel")
        plans = []
        for split in splits:
            train = self._features.rows_of(split.train)
            plans.append(Sampler(train, instances, SAMPLING, split_generator(split)).epoch())
        return [
            Counter(p for plan in plans for p in plan[step].patients.tolist())
            for step in range(len(plans[0]))
        ]

    def run_epoch(self) -> None:
        channels, dtype = self._features.channels, self._features.dtype
        pixels = self._features.of_unit("pixel")
        weights = torch.randn(2 * SEEDS, channels).to(dtype)  # of max and of bnsigmoid
        for wanted in self._steps:
            slopes = {}
            for patient, seeds in wanted.items():
                slopes[patient] = pixels.of_patient(patient) @ weights[: 2 * seeds].mT
            for patient in wanted:
                slopes[patient].mT @ pixels.of_patient(patient)
        for _, chunk, _ in pixels.chunks(2 * SEEDS):
            chunk @ weights.mT
        for _, chunk, _ in self._features.of_unit("image").chunks(SEEDS):  # the ranking family
            chunk @ weights[:SEEDS].mT


# --- a bag at a time ------------------------------------------------------------------------------


class PlainLoop:
    """One head on one split as one writes it first: a loop over bags, torch's own layers."""

    def __init__(self, features: Features, head: HeadSettings, split: Split) -> None:
        instances = features.of_unit(head.unit if head.agg != "mean" else "image")
        self.bags = [instances.of_patient(p).float() for p in range(PATIENTS)]
        self.labels = features.labels.float()
        self.train = features.rows_of(split.train)
        self.head, self.aggregator = head, AGGREGATORS[head.agg]
        self.scorer = nn.Linear(features.channels, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        parameters = [*self.scorer.parameters(), self.gamma, self.beta]
        self.optimizer = torch.optim.Adam(parameters, lr=head.lr)

    def run_epoch(self) -> None:
        if isinstance(self.aggregator, RankingAggregator):
            with torch.no_grad():
                tops = [self.bags[p][self.scorer(self.bags[p])[:, 0].argmax()] for p in self.train]
            for chosen in self._batches():
                logits = torch.cat([self.scorer(tops[i]) for i in chosen])
                self._step(logits, self.train[chosen])
        else:
            for chosen in self._batches():
                scores = [self.scorer(self.bags[p])[:, 0] for p in self.train[chosen]]
                every = torch.cat(scores).detach()
                moments = every.mean(), (every.var(correction=0) + 1e-5).sqrt()
                logits = torch.stack([self._patient_logit(score, *moments) for score in scores])
                self._step(logits, self.train[chosen])
        with torch.no_grad():
            for bag in self.bags:
                self._evaluate(self.scorer(bag)[:, 0])

    def _batches(self) -> list[NDArray[np.int64]]:
        order = torch.randperm(len(self.train)).numpy()
        steps = len(order) // BATCH
        return np.split(order[: steps * BATCH], steps)

    def _patient_logit(self, score: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self.head.agg == "mean":
            return score.mean()
        if self.head.agg == "max":
            return score.max()
        normalized = (score.detach() - mean) / std
        weights = torch.sigmoid(self.beta + self.gamma * normalized)
        return (weights * score).sum() / weights.sum()

    def _step(self, logits: Tensor, patients: NDArray[np.int64]) -> None:
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self.labels[patients])
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()

    def _evaluate(self, score: Tensor) -> float:
        if not isinstance(self.aggregator, RankingAggregator):
            return float(self._patient_logit(score, score.mean(), score.std()).sigmoid())
        k = min(self.head.k_agg, len(score))
        chosen = score.topk(k).values
        if self.aggregator.bottom:
            chosen = torch.cat([chosen, score.topk(k, largest=False).values])
        return float(chosen.sigmoid().mean())


def plain_loop_epoch(features: Features, fits: Sequence[Fit]) -> float:
    """Time an epoch of the ablation: that of one seed of every head, times the seeds."""
    loops = [PlainLoop(features, fit.head, fit.split) for fit in fits[::SEEDS]]
    return SEEDS * sum(timed(loop.run_epoch) for loop in loops)


# --- torchmil -------------------------------------------------------------------------------------


def abmil_epochs(features: Features, split: Split, epochs: int) -> tuple[float, float]:
    """Train torchmil's ABMIL in its plain loop on padded bags; return seconds and the last loss."""
    from torchmil.models import ABMIL

    images = features.of_unit("image")
    mean = features.images.float().mean(0)
    scale = 1 / features.images.float().std(0)
    bags = [(images.of_patient(p).float() - mean) * scale for p in range(PATIENTS)]
    train = features.rows_of(split.train)
    torch.manual_seed(0)
    model = ABMIL(in_shape=(features.channels,), att_dim=128)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    start = clock()
    for _ in range(epochs):
        order = torch.randperm(len(train)).numpy()
        losses = []
        for chosen in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
            batch = [bags[p] for p in train[chosen]]
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True)  # (b, n, C)
            mask = nn.utils.rnn.pad_sequence([torch.ones(len(b)) for b in batch], batch_first=True)
            labels = features.labels[train[chosen]].float()
            loss = nn.functional.binary_cross_entropy_with_logits(model(padded, mask), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return clock() - start, float(np.mean(losses))


def attention_epochs(features: Features, split: Split, epochs: int) -> tuple[float, float]:
    """Train our attention on the same; no evaluation before the end, as there."""
    head = HeadSettings(agg="attention", width=128, lr=0.003)
    fit = Fit(head=head, split=split, curve=False)
    start = clock()
    fitted = fit_stacked(features, [fit], epochs=epochs, sampling=SAMPLING)
    return clock() - start, float(fitted.losses[0, -1])


# --- measuring ------------------------------------------------------------------------------------


def timed(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def show(name: str, values: Sequence[float], unit: str = "s") -> None:
    values = sorted(values)
    spread = (
        f"({values[0]:.2f} to {values[-1]:.2f}, {len(values)} times)" if len(values) > 1 else ""
    )
    print(f"  {name:<62} {np.median(values):8.2f} {unit} {spread}", flush=True)


def peak_memory() -> float:
    """Return the most this process ever held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(store: FeatureStore, precision: str, epochs: int, repeats: int) -> None:
    name = next(name for name, value in CLOCKS.items() if value is clock)
    print(f"\n{precision}, {torch.get_num_threads()} threads, {name} time")
    start = clock()
    provider = load_features([store], DTYPES[precision], CPU)
    assert isinstance(provider, SharedFeatures)
    features = provider.features
    features.of_unit("pixel")
    show("reading the store", [clock() - start])
    one = make_fits(features, ["bnsigmoid"])[:1]
    show("one head: from the store read to its first epoch done", [_epoch(features, one)])
    fits = make_fits(features, ABLATION)
    names = dict.fromkeys(head_name(fit.head) for fit in fits)
    print(f"  {len(fits)} fits: {SEEDS} seeds × {', '.join(names)}")
    if epochs:
        whole = timed(lambda: fit_stacked(features, fits, epochs=epochs, sampling=SAMPLING))
        show(f"the ablation, {epochs} epochs", [whole])
        size = store.path.stat().st_size / 2**30
        show(f"peak memory; the store has {size:.2f} GB", [peak_memory()], "GB")
    bare = BareProducts(features, fits)
    ours, products, loops = [], [], []
    for _ in range(repeats):
        # The second epoch less the first: what every fit begins with counts once, not each time.
        two = timed(lambda: fit_stacked(features, fits, epochs=3, sampling=SAMPLING))
        ours.append((two - _epoch(features, fits)) / 2)
        products.append(timed(bare.run_epoch))
        loops.append(plain_loop_epoch(features, fits))
    show("an epoch of it", ours)
    show("an epoch of its bare matrix products", products)
    show("  times that", [a / b for a, b in zip(ours, products, strict=True)], "×")
    show("an epoch of the plain loop in float32", loops)
    show("  times ours", [b / a for a, b in zip(ours, loops, strict=True)], "×")
    compare_attention(features, fits[0].split, repeats)


def _epoch(features: Features, fits: Sequence[Fit]) -> float:
    return timed(lambda: fit_stacked(features, fits, epochs=1, sampling=SAMPLING))


def compare_attention(features: Features, split: Split, repeats: int) -> None:
    try:
        abmil_epochs(features, split, 1)
    except ImportError:
        print("  torchmil is not installed: no comparison with its ABMIL")
        return
    attention_epochs(features, split, 1)
    theirs, ours = [], []
    for _ in range(repeats):
        theirs.append(abmil_epochs(features, split, 40))
        ours.append(attention_epochs(features, split, 40))
    show("torchmil's ABMIL, plain loop, float32, 40 epochs", [seconds for seconds, _ in theirs])
    show("our attention, 40 epochs", [seconds for seconds, _ in ours])
    ratios = [b / a for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    show("  torchmil's time by ours", ratios, "×")
    show("last training loss, torchmil", [loss for _, loss in theirs], "")
    show("last training loss, ours", [loss for _, loss in ours], "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the head engine.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--epochs", type=int, default=40, help="of the whole ablation; 0: leave out"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: of one thread")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["float32"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    global clock
    clock = CLOCKS[arguments.clock]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5"
        write_random_store(path)
        for precision in arguments.precision:
            measure(FeatureStore.open(path), precision, arguments.epochs, arguments.repeats)


if __name__ == "__main__":
    main()
