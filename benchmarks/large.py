"""Whether large cohorts fit into little memory, and whether long runs grow.

    python benchmarks/large.py store --folder DIR             # 2,000 patients of 500 images
    python benchmarks/large.py store --folder DIR --memory 4
    python benchmarks/large.py extraction --folder DIR --images 1000 10000 30000
    python benchmarks/large.py soak --rounds 1000 --csv soak.csv

`store` and `extraction` print the peaks of what processes of the command line held: all memory
(VmHWM), that of which no file holds a copy, and that mapped from files. The store is sparse: 6 GB
of 18 are written. Needs Linux.
"""

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import lymphfeat as lf
from tests.long_runs import Held, settled, sizes_of, soak, watched, write_sparse_store
from tests.tiny import write_red_cohort

_KIB = 1024
_PICTURES, _PER_PATIENT = 500, 100
_PLAIN = ("--threads", "1", "--device", "cpu", "-q")


def run_store(asked: argparse.Namespace) -> None:
    """Fit heads on a store larger than the memory."""
    path = asked.folder / f"{asked.patients}.h5"
    if not path.exists():
        write_sparse_store(path, sizes_of(asked.patients))
    line = ["fit-head", "--store", str(path), "--protocol", "report", "--seeds", "1", *_PLAIN]
    line += ["--epochs", str(asked.epochs), "--precision", asked.precision]
    line += ["--memory", str(asked.memory)] if asked.memory else []
    line += [word for agg in asked.agg for word in ("--agg", agg)]
    _print_peaks(", ".join(asked.agg), [*line, "--out", str(asked.folder / "run"), "--force"])


def run_extraction(asked: argparse.Namespace) -> None:
    """Extract from more and more images, links to a few hundred."""
    asked.folder.mkdir(parents=True, exist_ok=True)
    os.environ["LYMPHFEAT_CACHE"] = str(asked.folder / "cache")
    for images in asked.images:
        cohort, out = _linked_cohort(asked.folder, images), asked.folder / f"{images}.h5"
        line = ["extract", "--cohort", str(cohort), "--out", str(out), "--force", *_PLAIN]
        line += ["--backbone", asked.backbone, "--crop", str(asked.crop), "--weights", "none"]
        _print_peaks(f"{images} images", [*line, "--precision", asked.precision])
        out.unlink()


def _linked_cohort(folder: Path, images: int) -> Path:
    root = folder / f"cohort-{images}"
    if root.exists():
        return root
    pictures = []
    for number in range(_PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        pictures.append(folder / "pictures" / f"{number}.jpg")
        pictures[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((128, 128)).save(pictures[-1])
    rows = ["id,label"]
    for image in range(images):
        patient, own = divmod(image, _PER_PATIENT)
        place = root / f"P{patient}" / f"{own:03d}.jpg"
        if not own:
            place.parent.mkdir(parents=True)
            rows.append(f"P{patient},{patient % 2}")
        place.hardlink_to(pictures[image % _PICTURES])
    (root / "cohort.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def _print_peaks(name: str, line: Sequence[str]) -> None:
    begin = time.perf_counter()
    peaks = watched(line)
    gigabytes = ", ".join(f"{key} {value / 1e9:.3f} GB" for key, value in peaks.items())
    print(f"{name}: {gigabytes}, {time.perf_counter() - begin:.0f} s", flush=True)


def run_soak(asked: argparse.Namespace) -> None:
    """Sample what the process holds while it goes round after round, and fit slopes."""
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        tempfile.tempdir = str(temporary)
        cohort = lf.Cohort.load(write_red_cohort(Path(folder) / "red"))
        begin = time.perf_counter()
        for number in soak(cohort, Path(folder), asked.rounds):
            if number % asked.every == 0 or number == asked.rounds - 1:
                row = {"round": number + 1, **asdict(settled())}
                samples.append({**row, "seconds": round(time.perf_counter() - begin)})
                print(samples[-1], flush=True)
                _write_csv(asked.csv, samples)
    _report(samples, asked.warm_up)


def _write_csv(path: Path | None, rows: Sequence[dict[str, float]]) -> None:
    if path is not None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _report(samples: Sequence[dict[str, float]], warm_up: int) -> None:
    kept = [row for row in samples if row["round"] > warm_up]
    rounds = np.array([row["round"] for row in kept])
    for name in Held.__dataclass_fields__:
        values = np.array([row[name] for row in kept])
        slope, error = slope_of(rounds, values)
        unit = _KIB if name in ("rss", "anonymous") else 1
        facts = (values[0], values[-1], values.min(), values.max(), slope, 2 * error)
        print(
            "{}: {:.0f} -> {:.0f}, from {:.0f} to {:.0f}; {:.3f} +- {:.3f} a round".format(
                name, *(fact / unit for fact in facts)
            )
        )


def slope_of(x: NDArray[np.int64], y: NDArray[np.int64]) -> tuple[float, float]:
    """Return the least-squares slope and its standard error."""
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (centred @ centred)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    store = commands.add_parser("store", help="fit heads on 2,000 patients of 500 images")
    store.add_argument("--folder", type=Path, required=True)
    store.add_argument("--patients", type=int, default=2000)
    store.add_argument("--agg", nargs="+", default=["mean+std", "topk", "bnsigmoid"])
    store.add_argument("--epochs", type=int, default=1)
    store.add_argument("--memory", type=float, help="as of fit-head")
    store.add_argument("--precision", default="float32")
    store.set_defaults(run=run_store)
    extraction = commands.add_parser("extraction", help="extract from more and more images")
    extraction.add_argument("--folder", type=Path, required=True)
    extraction.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 30_000])
    extraction.add_argument("--backbone", default="test_efficientnet")
    extraction.add_argument("--crop", type=int, default=64)
    extraction.add_argument("--precision", default="float32")
    extraction.set_defaults(run=run_extraction)
    long = commands.add_parser("soak", help="extract, fit, finish and predict in one process")
    long.add_argument("--rounds", type=int, default=1000)
    long.add_argument("--every", type=int, default=50, help="rounds between two samples")
    long.add_argument("--warm-up", type=int, default=200, help="rounds that do not count")
    long.add_argument("--csv", type=Path, help="table of the samples to write")
    long.set_defaults(run=run_soak)
    asked = parser.parse_args()
    if asked.run is run_soak and (asked.rounds - asked.warm_up) // asked.every < 3:
        long.error("--rounds must leave three samples after --warm-up")
    asked.run(asked)


if __name__ == "__main__":
    main()
