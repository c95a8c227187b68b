"""Whether a command that is killed at any moment ends with the same bytes when it is run again.

    python benchmarks/kills.py
    python benchmarks/kills.py --trials 50 --seed 1 --csv benchmarks/results/kills.csv
    python benchmarks/kills.py --commands endtoend pretrain

Each command runs once undisturbed on a tiny cohort. In every trial it is started in a process of
its own and killed by SIGKILL, once, twice or three times in a row, and then left to finish. Half of
the kills come at a random time, half at a random change on the disk or up to 20 ms after it, every
second of these in the last tenth of all changes, where files are flushed and renamed. In a third of
the trials another result is there and is overwritten (--force).

After each kill every file under its final name must be the old or the new one to the last byte;
after the last run all files must be the undisturbed ones, and nothing else may be left. Processes
are forked from one that has imported everything (tests/forks.py), for starting takes seconds and
nothing of interest happens then.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.commands import RESUMING, write_inputs
from tests.forks import Forks, forking
from tests.killing import Kill, Trial, Undisturbed, kill_and_finish, undisturbed

COLUMNS = (
    *("command", "trials", "kills", "before", "during", "end", "half written"),
    *("byte-identical", "stale locks"),
)


def draw_kill(of: Undisturbed, rng: np.random.Generator) -> Kill:
    """Draw when a process is killed."""
    if rng.random() < 0.5:
        return Kill(seconds=float(rng.uniform(0, of.seconds)))
    first = 0.9 * of.changes if rng.random() < 0.5 else 0
    change = int(rng.integers(int(first) + 1, of.changes + 1))
    return Kill(change=change, seconds=float(rng.choice([0, rng.uniform(0, 0.02)])))


def run_trials(
    forks: Forks, folder: Path, name: str, trials: int, rng: np.random.Generator
) -> list[Trial]:
    command = RESUMING[name]
    of = undisturbed(forks, folder, command)
    found = []
    for number in range(trials):
        kills = [draw_kill(of, rng) for _ in range(rng.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))]
        over_old = bool(rng.random() < 1 / 3)
        trial = kill_and_finish(forks, folder / str(number), command, of, kills, over_old=over_old)
        if trial.unfinished or not trial.same:
            print(f"{name}, {kills}, over_old={over_old}: {trial}", file=sys.stderr)
        found.append(trial)
    return found


def count(name: str, trials: Sequence[Trial]) -> list[object]:
    moments = Counter(moment for trial in trials for moment in trial.moments)
    return [
        *(name, len(trials), moments.total(), moments["before"], moments["during"], moments["end"]),
        sum(len(trial.unfinished) for trial in trials),
        sum(trial.same for trial in trials),
        sum(trial.refused for trial in trials),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="per command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=list(RESUMING), default=list(RESUMING))
    parser.add_argument("--csv", type=Path, help="table to write")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root, forking(Path(root) / "logs") as forks:
        write_inputs(Path(root), forks, for_all=False)
        for number, name in enumerate(RESUMING):
            if name in asked.commands:
                rng = np.random.default_rng([asked.seed, number])
                rows.append(count(name, run_trials(forks, Path(root), name, asked.trials, rng)))
                print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    print("\n" + "\n".join(f"| {' | '.join(map(str, row))} |" for row in (COLUMNS, *rows)))
    if asked.csv:
        with asked.csv.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
