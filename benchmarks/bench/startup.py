"""What one waits for before anything happens: `--help`, `info`, the first step of `fit-head`."""

import sys

import lymphfeat as lf
from benchmarks.bench.abmil import missing, torchmil_is_there
from benchmarks.bench.inputs import challenge_store
from benchmarks.bench.measure import LIMIT, LYMPHFEAT, OURS, Bench, in_turn, seconds_to_run
from benchmarks.bench.results import Goal, Line

BARE = "python -c pass"
TORCHMIL = "torchmil: import, read, first step"
FIRST_STEP = (sys.executable, "-m", "benchmarks.bench.first_step")


def measure(bench: Bench) -> list[Line]:
    store = challenge_store(bench)
    return [
        _command(bench, "--help", Goal(text="≤ .15 s", at_most=0.15)),
        _command(bench, "info", Goal(text="≤ .5 s", at_most=0.5), store),
        _first_step(bench),
    ]


def _command(bench: Bench, name: str, goal: Goal, *arguments: object) -> Line:
    samples = in_turn(
        bench,
        {
            OURS: lambda: seconds_to_run(bench, [*LYMPHFEAT, name, *arguments]),
            LIMIT: lambda: seconds_to_run(bench, [sys.executable, "-c", "pass"]),
        },
    )
    megabytes = challenge_store(bench).stat().st_size / 1e6
    what = f"a store of {megabytes:.0f} MB; " if arguments else ""
    return Line(
        name=f"lymphfeat {name}",
        unit="s",
        samples=samples,
        goals=(goal,),
        note=f"{what}the limit is {BARE}; files are in the page cache.",
        drawn=False,
    )


def _first_step(bench: Bench) -> Line:
    store = challenge_store(bench)
    contestants = {OURS: lambda: seconds_to_run(bench, [*FIRST_STEP, "lymphfeat", store])}
    if torchmil_is_there():
        bags = bench.new("bags")
        lf.export_bags(store, bags, "torchmil")
        contestants[TORCHMIL] = lambda: seconds_to_run(bench, [*FIRST_STEP, "torchmil", bags])
    contestants[LIMIT] = lambda: seconds_to_run(bench, [sys.executable, "-c", "pass"])
    return Line(
        name="first step of fit-head",
        unit="s",
        samples=in_turn(bench, contestants),
        goals=(Goal(text="≤ half of torchmil's", at_least=2, against=TORCHMIL),),
        note="an attention head; from the start of a process, with its imports and the reading of "
        "its files, to its first progress: lymphfeat's first epoch (5 steps) on a store, "
        f"torchmil's first batch of 16 patients on .npy files of the same features{missing()}.",
        drawn=False,
    )
