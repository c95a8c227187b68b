"""How fast the head engine is: the report's ablation on a random store of challenge size.

    python benchmarks/heads.py [--threads 2] [--epochs 40] [--precision float32 bfloat16]
    python benchmarks/heads.py --threads 1 --clock cpu    # on a machine that others use too

The ablation is 10 seeds × {top1, top5, top10, top&bottom 5 and 10, mean, max, bnsigmoid}, every
head evaluated after every epoch. Printed for each precision:

- its time, its peak memory beside the size of the store, and how soon one head has been trained;
- the ratio to the bare matrix products of the same steps, the two measured in turn, epoch by epoch;
- the ratio to a loop in plain PyTorch, a bag at a time, one head after another, which is run for
  one seed and one epoch of every head and multiplied.

`make bench` measures the honest protocol, and attention beside torchmil. The values are random:
nothing here says anything about accuracy.
"""

import argparse
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line; before torch

import numpy as np
import torch

from benchmarks.bench.inputs import (
    LABELLED,
    LABELLED_IMAGES,
    MAPS,
    bag_sizes,
    write_random_store,
)
from benchmarks.bench.plain_heads import BATCH, PlainLoop
from lymphfeat.cohort.splits import report_splits
from lymphfeat.evaluation.providers import SharedFeatures, load_features
from lymphfeat.features.store import FeatureStore
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit, split_generator
from lymphfeat.heads.engine.sampling import Sampler, Sampling
from lymphfeat.heads.grid import expand, head_name
from lymphfeat.settings import HeadGrid

SEEDS = 10
ABLATION = ("top1", "topk", "topbottomk", "mean", "max", "bnsigmoid")
SAMPLING = Sampling(batch_size=BATCH)
CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


def plain_loop_epoch(features: Features, fits: Sequence[Fit]) -> float:
    """Time an epoch of the ablation: that of one seed of every head, times the seeds."""
    loops = [PlainLoop(features, fit.head, fit.split) for fit in fits[::SEEDS]]

    def run_epoch(loop: PlainLoop) -> None:
        loop.train_epoch()
        loop.evaluate(range(LABELLED))

    return SEEDS * sum(timed(partial(run_epoch, loop)) for loop in loops)


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


def _epoch(features: Features, fits: Sequence[Fit]) -> float:
    return timed(lambda: fit_stacked(features, fits, epochs=1, sampling=SAMPLING))


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
        write_random_store(path, bag_sizes(LABELLED, LABELLED_IMAGES), MAPS)
        for precision in arguments.precision:
            measure(FeatureStore.open(path), precision, arguments.epochs, arguments.repeats)


if __name__ == "__main__":
    main()
