"""`make bench`: measure the rows of the table, and write docs/benchmarks.md.

    python -m benchmarks.bench                          # all rows: an hour or two
    python -m benchmarks.bench --rows extraction store  # these; the others stay as they were
    python -m benchmarks.bench --quick                  # tiny sizes, to try the scripts

Every row is kept in benchmarks/results/bench as soon as it is measured. A quick run writes neither
that nor the page: it prints its table.
"""

import os

# Before torch is imported, and for the processes of this one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.bench import (
    abmil,
    bare_commands,
    endtoend,
    explanation_page,
    extraction,
    fit_head,
    growth,
    startup,
    store,
)
from benchmarks.bench.measure import ROOT, Bench
from benchmarks.bench.report import PAGE, render, write_page
from benchmarks.bench.results import Line, Result, cores
from lymphfeat.runtime.devices import cpu_threads

ROWS: dict[str, Callable[[Bench], list[Line]]] = {  # in the order of the table
    "extraction": extraction.measure,
    "topk": fit_head.topk,
    "all-heads": fit_head.all_heads,
    "networks": fit_head.networks,
    "abmil": abmil.measure,
    "bare-commands": bare_commands.measure,
    "endtoend": endtoend.measure,
    "store": store.measure,
    "startup": startup.measure,
    "page": explanation_page.measure,
    "growth-extracted": growth.images_extracted,
    "growth-fitted": growth.images_fitted,
    "growth-heads": growth.heads,
    "growth-bags": growth.images_per_bag,
}
RESULTS = ROOT / "benchmarks" / "results" / "bench"


def main(arguments: Sequence[str] | None = None) -> None:
    asked = _parse(arguments)
    results = list(_measured(asked))
    if asked.quick:
        print(render(results))
    else:
        known = [asked.results / f"{row}.json" for row in ROWS]
        write_page(asked.page, [Result.read(path) for path in known if path.exists()])
    if len(results) < len(asked.rows):
        sys.exit("some rows could not be measured")


def _measured(asked: argparse.Namespace) -> Iterator[Result]:
    """Measure one row after another; keep each at once, unless the run is quick."""
    with tempfile.TemporaryDirectory() as folder, cpu_threads(asked.threads):
        bench = Bench(
            folder=Path(folder),
            threads=asked.threads,
            repeats=asked.repeats or (1 if asked.quick else 5),
            quick=asked.quick,
        )
        for row in asked.rows:
            begin = time.perf_counter()
            try:
                result = Result.now(row, ROWS[row](bench), asked.threads)
            except Exception:  # the others are measured all the same
                traceback.print_exc()
                continue
            print(f"{row}: {time.perf_counter() - begin:.0f} s", flush=True)
            if not asked.quick:
                result.write(asked.results)
            yield result


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--repeats", type=int, help="of every line; default: 5, or 1 if quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
