"""The three bare commands of the README, one after the other, in an empty folder."""

from pathlib import Path

from benchmarks.bench.measure import LYMPHFEAT, OURS, Bench, Ran, in_turn, run
from benchmarks.bench.results import Goal, Line

COMMANDS = (("extract",), ("fit-head", "--agg", "topk"), ("endtoend",))
# To try the script: the same on almost nothing.
TINY = {
    "extract": ("--crop", "32"),
    "fit-head": ("--epochs", "1", "--seeds", "1"),
    "endtoend": ("--crop", "32", "--epochs", "1", "--images-per-patient", "1"),
}
AT_ONCE = 10.0  # seconds
SHORT = 30.0  # seconds; a command that is done by then need not say how long it takes


def measure(bench: Bench) -> list[Line]:
    rounds: list[list[Ran]] = []

    def ours() -> float:
        rounds.append(_run_all(bench, bench.new("bare")))
        return sum(ran.seconds for ran in rounds[-1])

    total = Line(
        name="the three bare commands",
        unit="s",
        samples=in_turn(bench, {OURS: ours}, warm_up=False),
        goals=(Goal(text="≤ 4 min", at_most=240),),
        note="in an empty folder; the first one also renders the built-in cohort. "
        f"No repeat begins after {bench.patience / 60:.0f} min.",
        stopped=any(ran.stopped for each in rounds for ran in each),
    )
    waits = [
        Line(
            name=f"lymphfeat {' '.join(words)}: until it says how long it will take",
            unit="s",
            samples={OURS: [_wait(each[number]) for each in rounds]},
            goals=(Goal(text=f"≤ {AT_ONCE:.0f} s, or done in {SHORT:.0f} s", at_most=AT_ONCE),),
            note=_describe([each[number] for each in rounds]),
        )
        for number, words in enumerate(COMMANDS)
    ]
    return [total, *waits]


def _run_all(bench: Bench, folder: Path) -> list[Ran]:
    folder.mkdir()
    lines = [[*words, *(TINY[words[0]] if bench.quick else ())] for words in COMMANDS]
    return [run(bench, [*LYMPHFEAT, *line], folder=folder) for line in lines]


def _wait(ran: Ran) -> float:
    """Return how long a user does not know how long it will take; 0 of what is soon done."""
    if ran.seconds <= SHORT:
        return 0.0
    return ran.seconds if ran.estimated is None else ran.estimated


def _describe(each: list[Ran]) -> str:
    times = ", ".join(f"{ran.seconds:.0f} s" for ran in each)
    said = sum(ran.estimated is not None for ran in each)
    return f"it took {times}, and said how long in {said} of {len(each)} repeats."
