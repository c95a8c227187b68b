"""`fit-head` under the honest protocol, ten seeds, on a store of the challenge's size."""

from collections.abc import Callable

from benchmarks.bench import abmil
from benchmarks.bench.inputs import challenge_features, challenge_store
from benchmarks.bench.measure import LIMIT, LYMPHFEAT, OURS, Bench, in_turn, run, seconds_of
from benchmarks.bench.plain_heads import PlainLoop, bare_networks, bare_ranking
from benchmarks.bench.results import Goal, Line
from lymphfeat.cohort.splits import Plan
from lymphfeat.evaluation.providers import SharedFeatures
from lymphfeat.heads.grid import expand
from lymphfeat.settings import FitSettings, HeadGrid

PLAIN = "a plain PyTorch loop"
SEEDS, EPOCHS = 10, 40


class Command:
    """`fit-head` of some aggregator, from its start to its end."""

    def __init__(self, bench: Bench, agg: str, seeds: int = SEEDS) -> None:
        self._bench, self._agg, self._seeds, self.stopped = bench, agg, seeds, False

    def __call__(self) -> float:
        bench = self._bench
        words: list[object] = [*LYMPHFEAT, "fit-head", "--store", challenge_store(bench)]
        words += ["--agg", self._agg, "--seeds", bench.size(self._seeds, 1)]
        words += ["--epochs", bench.size(EPOCHS, 2), "--threads", bench.threads]
        words += ["--precision", "float32", "--device", "cpu", "--out", bench.new("run")]
        ran = run(bench, words)
        self.stopped |= ran.stopped
        return ran.seconds


def plan(bench: Bench, provider: SharedFeatures) -> Plan:
    return provider.plan(FitSettings(seeds=bench.size(SEEDS, 1), threads=bench.threads))


def topk(bench: Bench) -> list[Line]:
    provider = challenge_features(bench)
    splits, epochs = plan(bench, provider), bench.size(EPOCHS, 2)
    ours = Command(bench, "topk")

    def limit() -> float:
        return seconds_of(lambda: bare_ranking(provider.features, splits, epochs))

    samples = in_turn(
        bench, {OURS: ours, PLAIN: lambda: _plain_seconds(provider, splits, epochs), LIMIT: limit}
    )
    line = Line(
        name="fit-head --agg topk, honest, 10 seeds",
        unit="s",
        samples=samples,
        goals=(
            Goal(text="≤ 8 s", at_most=8),
            Goal(text=f"≥ 20 × {PLAIN}", at_least=20, against=PLAIN),
        ),
        note=f"{_counted(provider, splits, epochs)}. lymphfeat: the whole command, from its start "
        "to its files, on a store that has unlabelled patients, too. The plain loop: training and "
        "learning curves alone, an epoch of one outer and of one inner fit, multiplied. torchmil "
        "has no top-k head; its ABMIL has a line of its own.",
        stopped=ours.stopped,
    )
    return [line]


def _plain_seconds(provider: SharedFeatures, splits: Plan, epochs: int) -> float:
    """Return how long the plain loop would take: what an epoch takes, times fits and epochs.

    The held-out patients of outer splits are evaluated after every epoch, for the curves that
    lymphfeat writes, too; those of inner splits in the end.
    """
    (head,) = expand(HeadGrid(agg=("topk",)))
    total = 0.0
    for own in (splits.outer, splits.inner_once):
        loop = PlainLoop(provider.features, head, own[0])
        held_out = provider.features.rows_of(own[0].validation).tolist()
        training = seconds_of(loop.train_epoch)
        evaluating = seconds_of(lambda loop=loop, held_out=held_out: loop.evaluate(held_out))  # type: ignore[misc]
        evaluations = epochs if own is splits.outer else 1
        total += len(own) * (epochs * training + evaluations * evaluating)
    return total


def all_heads(bench: Bench) -> list[Line]:
    ours = Command(bench, "all")
    line = Line(
        name="fit-head --agg all (no networks), honest, 10 seeds",
        unit="s",
        samples=in_turn(bench, {OURS: ours}, warm_up=False),
        goals=(Goal(text="≤ 60 s", at_most=60),),
        note=f"the whole command. {_bounded(bench)}.",
        stopped=ours.stopped,
    )
    return [line]


def networks(bench: Bench) -> list[Line]:
    ours = Command(bench, "network", seeds=1)
    times = bench.size(SEEDS, 1)
    provider, epochs = challenge_features(bench), bench.size(EPOCHS, 2)
    splits = plan(bench, provider)

    def torchmil() -> float:
        """Return what one outer and one inner fit take, times how many there are."""
        return sum(
            len(own) * abmil.loop_seconds(provider.features, own[0], epochs)
            for own in (splits.outer, splits.inner_once)
        )

    contestants: dict[str, Callable[[], float]] = {
        OURS: lambda: times * ours(),
        LIMIT: lambda: bare_networks(provider.features, splits, epochs),
    }
    if abmil.torchmil_is_there():
        contestants["one of the four: " + abmil.LOOP] = torchmil
    line = Line(
        name="fit-head --agg network, honest, 10 seeds",
        unit="s",
        samples=in_turn(bench, contestants, warm_up=False),
        goals=(Goal(text="≤ 10 min", at_most=600),),
        note=f"the whole command with one seed, times {times}; four kinds of networks: attention, "
        "gated attention, transformer, LSTM. torchmil's loop is for one kind, its ABMIL: one outer "
        f"and one inner fit, multiplied{abmil.missing()}. The limit is the products of the layers "
        f"of all four, an epoch of one outer and of one inner fit, multiplied. {_bounded(bench)}.",
        stopped=ours.stopped,
    )
    return [line]


def _counted(provider: SharedFeatures, splits: Plan, epochs: int) -> str:
    fits = len(splits.outer) + len(splits.inner_once)
    return (
        f"{fits} fits × {epochs} epochs on {len(provider.ids)} patients, "
        f"{len(provider.features.images):,} images, 512×4×4 maps, float32"
    )


def _bounded(bench: Bench) -> str:
    return (
        f"No repeat begins after {bench.patience / 60:.0f} min, and a command is stopped after "
        f"{bench.stop / 60:.0f} min"
    )
