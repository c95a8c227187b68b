"""Options and output shared by the commands.

--cohort, --allow-missing, --reference-date   audit, extract, endtoend, predict, explain
--device, --threads                           extract, fit-head, endtoend, predict, explain
--precision                                   every command that computes on images or maps
--seed                                        extract, fit-head, endtoend, pretrain, synth, explain
--weights                                     extract, endtoend
--threshold                                   fit-head, endtoend
--json, --quiet                               every command
--force                                       every command that writes
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lymphfeat.runtime.progress import Progress as ProgressCall
from lymphfeat.runtime.progress import silent
from lymphfeat_cli.progress_lines import progress_lines

if TYPE_CHECKING:
    from lymphfeat.cohort.cohort import Cohort

F = TypeVar("F", bound=Callable[..., Any])

COHORT_VARIABLE = "LYMPHFEAT_COHORT"
CACHE_VARIABLE = "LYMPHFEAT_CACHE"


def stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Make one decorator of several options, listed in their order."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


cohort_options = stack(
    click.option(
        "--cohort",
        type=click.Path(path_type=Path),
        envvar=COHORT_VARIABLE,
        help="Cohort folder (challenge layout, or a CSV and one image folder per id). "
        f"[env: {COHORT_VARIABLE}; default: the built-in synthetic cohort]",
    ),
    click.option(
        "--table",
        type=click.Path(path_type=Path),
        help="The cohort's CSV file, if it is not in the cohort folder.",
    ),
    click.option(
        "--allow-missing",
        is_flag=True,
        help="Skip patients without images and images without a table row (each is reported).",
    ),
    click.option(
        "--reference-date",
        type=click.DateTime(["%Y-%m-%d"]),
        default="2021-01-01",
        show_default=True,
        help="Date for computing age from the date of birth.",
    ),
)

threshold_option = click.option(
    "--threshold",
    type=click.Choice(["prevalence", "best-ba", "0.5"]),
    default="prevalence",
    show_default=True,
    help="Decision threshold. prevalence: the mean calibrated probability of the training "
    "patients, which equals their share of tumoral patients. best-ba: the threshold with the best "
    "balanced accuracy on the training patients. Both use out-of-fold probabilities.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Compute device; auto uses a GPU if available.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]"
)


def precision_option(default: str) -> Callable[[F], F]:
    """Make --precision with this default."""
    return click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default=default,
        show_default=True,
        help="bfloat16 is less precise, and faster on hardware that supports it; auto is bfloat16 "
        "on such hardware and float32 elsewhere.",
    )


seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed."
)
weights_option = click.option(
    "--weights",
    default="auto",
    show_default=True,
    help="bloodcells (shipped with lymphfeat, resnet18), none (random), imagenet (downloaded by "
    "timm) or a .safetensors/.pth file; auto is bloodcells for resnet18, otherwise none.",
)
force_option = click.option("--force", is_flag=True, help="Overwrite existing results.")
output_options = stack(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Show no progress on stderr."),
)


def cache_path(name: str) -> Path:
    """Return the default path of `name`: under $LYMPHFEAT_CACHE, else ./cache."""
    return Path(os.environ.get(CACHE_VARIABLE, "cache")) / name


def note(text: str) -> None:
    """Print a note on stderr; of several processes only the first prints it."""
    if is_first():
        click.echo(text, err=True)


def load_cohort(
    cohort: Path | None,
    table: Path | None,
    allow_missing: bool,
    reference_date: datetime,
    quiet: bool,
) -> "Cohort":
    """Load the named cohort, or render (once) and load the built-in synthetic one, saying so."""
    from lymphfeat.cohort.cohort import Cohort

    if cohort is None:
        from lymphfeat.synthetic.cohort import SyntheticSettings, write_synthetic_cohort

        cohort = cache_path("synthetic")
        note(
            f"No cohort given (--cohort or {COHORT_VARIABLE}): "
            f"using the built-in synthetic cohort in {cohort}."
        )
        while not is_first() and not (cohort / "truth.csv").exists():
            time.sleep(0.1)  # the first process writes it, this file last
        if not (cohort / "truth.csv").exists():
            with progress_bar("rendering cells", quiet) as progress:
                write_synthetic_cohort(SyntheticSettings(), cohort, progress=progress)
    return Cohort.load(
        cohort,
        table=table,
        allow_missing=allow_missing,
        reference_date=_as_date(reference_date),
    )


def _as_date(moment: datetime) -> date:
    return moment.date()


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[ProgressCall]:
    """Show progress on stderr: a bar on a terminal, else a line about every 30 seconds.

    Nothing with -q. Of several processes (torchrun) only the first shows its progress.
    """
    if quiet or not is_first():
        yield silent
        return
    if not sys.stderr.isatty():
        with progress_lines(title) as line:
            yield line
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(title, total=None, text="")

        def call(done: int, total: int, text: str = "") -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield call


def is_first() -> bool:
    """Return whether this process, of those that torchrun started, shows the result."""
    return os.environ.get("RANK", "0") == "0"


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout, at full width if stdout is a file."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def number(value: float | None, form: str = ".3f") -> str:
    """Format a number; a dash if it is unknown (None or NaN)."""
    return "–" if value is None or value != value else format(value, form)


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """Format an interval; a dash if it is unknown."""
    return "–" if number(low) == "–" else f"{number(low, form)} to {number(high, form)}"


def with_interval(
    value: float | None, low: float | None, high: float | None, form: str = ".3f"
) -> str:
    """Format a number with its interval in brackets, omitted if it is unknown."""
    ends = interval(low, high, form)
    return number(value, form) + ("" if ends == "–" else f" ({ends})")


def show_json(result: Mapping[str, object]) -> None:
    """Print a result as JSON; docs/json describes each command's result."""
    from lymphfeat.runtime.strict_json import json_text

    click.echo(json_text(result, indent=2))
