"""Whether `extract`, `fit-head` and `endtoend` give the same bytes with one CPU thread and two.

python benchmarks/repeatability.py

Every result is made three times by processes of their own: with one thread, with one again, and
with two, which also decode images on as many threads. Prints the files that differ.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

from lymphfeat.runtime.differences import compare_files, largest_difference
from lymphfeat.runtime.files import files_in
from lymphfeat.settings import SyntheticSettings
from lymphfeat.synthetic.cohort import write_synthetic_cohort

TIMES = {"one": 1, "again": 1, "two": 2}  # threads
NETWORK = ["--backbone", "resnet18", "--crop", "64", "--precision", "float32"]
_BESIDE = "config.json"  # names the threads
HEADS = ["all", "attention", "transformer", "lstm", "std", "kernel-mean", "prototypes"]


def commands(cohort: Path) -> dict[str, list[str]]:
    """Return what to run, by the name of the result."""
    aggregators = [word for name in HEADS for word in ("--agg", name)]
    brief = ["--epochs", "1", "--batch-size", "4", "--images-per-patient", "4"]
    train = ["endtoend", "--cohort", str(cohort), *NETWORK, *brief]
    return {
        "store.h5": ["extract", "--cohort", str(cohort), *NETWORK],
        "heads": [
            *("fit-head", "--store", str(cohort / "store.h5"), *aggregators, "--fusion", "late"),
            *("--seeds", "2", "--folds", "3", "--epochs", "3", "--save"),
        ],
        "bnsigmoid": [*train, "--agg", "bnsigmoid", "--validation", "0.3"],
        "topk": [*train, "--agg", "topk", "--folds", "2"],
        "mean+std": [*train, "--agg", "mean+std"],
    }


def run(line: list[str], out: Path, threads: int) -> None:
    """Run a command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    whole = [*line, "--threads", str(threads), "--device", "cpu", "--out", str(out), "-q"]
    subprocess.run(
        [sys.executable, "-m", "lymphfeat_cli", *whole],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


def differences(first: Path, second: Path) -> list[str]:
    """List the files of two results that differ, and by how much."""
    if first.is_file():
        if first.read_bytes() == second.read_bytes():
            return []
        with h5py.File(first) as one, h5py.File(second) as two:
            values = [
                {n: np.asarray(f[n]["frozen"]) for n in ("features", "pooled")} for f in (one, two)
            ]
            largest, where = largest_difference(*values)
            scale = np.abs(values[0]["pooled"]).max()
        return [f"{where} by {largest:.2g} (of at most {scale:.3g})"]
    names = {path.relative_to(folder) for folder in (first, second) for path in files_in(folder)}
    found = [
        compare_files(first / name, second / name, str(name))
        for name in sorted(names)
        if name.name != _BESIDE
    ]
    return [f"{e.name} by {e.largest} in {e.where}" for e in found if not e.same]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        settings = SyntheticSettings(patients=12, test_patients=2, images=4)
        cohort = write_synthetic_cohort(settings, root / "cohort", workers=1)
        for name, line in commands(cohort).items():
            for time, threads in TIMES.items():
                (root / time).mkdir(exist_ok=True)
                run(line, root / time / name, threads)
            if name == "store.h5":
                (root / "one" / name).rename(cohort / name)
                (root / "one" / name).symlink_to(cohort / name)
            for time in ("again", "two"):
                found = differences(root / "one" / name, root / time / name)
                what = f"{TIMES[time]} thread{'s' if TIMES[time] > 1 else ''}"
                print(f"{name}, {what}: {'; '.join(found) or 'the same bytes'}", flush=True)


if __name__ == "__main__":
    main()
