"""Options and output shared by the commands; settings_options makes those of settings."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lymphfeat.runtime.files import claimed
from lymphfeat_cli.progress_lines import Display, Nothing, progress_lines

if TYPE_CHECKING:
    from lymphfeat.cohort.cohort import Cohort

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

COHORT_VARIABLE = "LYMPHFEAT_COHORT"
CACHE_VARIABLE = "LYMPHFEAT_CACHE"
LISTED = 50  # images left out that are named one by one

PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def gather(
    name: str,
    options: Mapping[str, Decorator],
    make: Callable[[dict[str, Any]], object],
) -> Decorator:
    """Make one decorator of options, given by parameter, whose values `make` turns into one.

    The command gets the result as the argument `name`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def command(**values: Any) -> Any:
            own = {parameter: values.pop(parameter) for parameter in options}
            return function(**values, **{name: make(own)})

        return stack(options.values())(command)

    return decorate


def stack(decorators: Iterable[Decorator]) -> Decorator:
    """Make one decorator of several options, listed in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(list(decorators)):
            function = decorator(function)
        return function

    return decorate


@dataclass(frozen=True, kw_only=True)
class CohortChoice:
    """The cohort that the options name."""

    cohort: Path | None
    table: Path | None
    allow_missing: bool
    reference_date: datetime
    on_error: str = "stop"

    @property
    def built_in(self) -> bool:
        """Whether it is the built-in synthetic cohort."""
        return self.cohort is None

    def load(self, output: "Output") -> "Cohort":
        """Load the cohort; without one render (once) and load the built-in synthetic one."""
        from lymphfeat.cohort.cohort import Cohort

        return Cohort.load(
            self.cohort or _synthetic_cohort(output),
            table=self.table,
            allow_missing=self.allow_missing,
            reference_date=self.reference_date.date(),
        )

    def usable(self, patients: "Cohort", crop: int, output: "Output") -> "Cohort":
        """Leave out, and name, the images that cannot be used, if the user wants to."""
        if self.on_error == "stop":
            return patients
        from lymphfeat.cohort.image_checks import leave_out_unusable

        with output.progress("checking images") as progress:
            kept = leave_out_unusable(patients, crop, progress=progress)
        lines = kept.notes[len(patients.notes) :]
        for line in (*lines[:LISTED], *lines[LISTED:][-2:]):  # the last two count them
            note(f"Warning: {line}")
        return kept


def _synthetic_cohort(output: "Output") -> Path:
    from lymphfeat.synthetic.cohort import SyntheticSettings, write_synthetic_cohort

    cohort = built_in_truth().parent
    note(
        f"No cohort given (--cohort or {COHORT_VARIABLE}): "
        f"using the built-in synthetic cohort in {cohort}."
    )
    while not is_first() and not built_in_truth().exists():
        time.sleep(0.1)  # the first process writes it, this file last
    if not built_in_truth().exists():
        with output.progress("rendering cells") as progress:
            write_synthetic_cohort(SyntheticSettings(), cohort, progress=progress)
    return cohort


def built_in_truth() -> Path:
    """Return the path of the built-in cohort's truth."""
    return cache_path("synthetic") / "truth.csv"


reference_date_option = click.option(
    "--reference-date",
    type=click.DateTime(["%Y-%m-%d"]),
    default="2021-01-01",
    show_default=True,
    help="Date for computing age from the date of birth.",
)
run_stores_option = click.option(
    "--store",
    "stores",
    type=PATH,
    multiple=True,
    help="Where the run's feature store is now; once per store of the run. [default: where it was]",
)
_COHORT = {
    "cohort": click.option(
        "--cohort",
        type=PATH,
        envvar=COHORT_VARIABLE,
        help="Cohort folder (challenge layout, or a CSV and one image folder per id). "
        f"[env: {COHORT_VARIABLE}; default: the built-in synthetic cohort]",
    ),
    "table": click.option(
        "--table", type=PATH, help="The cohort's CSV file, if it is not in the cohort folder."
    ),
    "allow_missing": click.option(
        "--allow-missing",
        is_flag=True,
        help="Skip patients without images and images without a table row (each is reported).",
    ),
    "reference_date": reference_date_option,
}
_ON_ERROR = {
    "on_error": click.option(
        "--on-error",
        type=click.Choice(["stop", "skip"]),
        default="stop",
        show_default=True,
        help="What to do when images cannot be read, or are smaller than the crop. stop: name "
        "them and end before the work begins. skip: leave them out; each is reported and recorded.",
    )
}
cohort_options = gather("cohort", _COHORT, lambda values: CohortChoice(**values))
# Of commands that can do without some of the images.
images_options = gather("cohort", _COHORT | _ON_ERROR, lambda values: CohortChoice(**values))


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command shows its result, and whether it overwrites an earlier one."""

    as_json: bool
    quiet: bool
    force: bool = False

    def progress(self, title: str) -> AbstractContextManager[Display]:
        """Show the progress of work on stderr."""
        return progress_bar(title, self.quiet)

    def show(self, result: Callable[[], Mapping[str, object]], text: Callable[[], None]) -> None:
        """Print the result as JSON or as text; of several processes only the first prints it."""
        if not is_first():
            return
        if self.as_json:
            show_json(result())
        else:
            text()

    def claim(self, *paths: Path) -> None:
        """Refuse files that may not be written, and keep them from other processes until the end.

        Refused are one that exists, unless it may be overwritten, one whose folder does not exist,
        and one that another process is writing.
        """
        for path in paths:
            if path.parent.exists() and not path.parent.is_dir():
                raise click.UsageError(f"{path.parent} must be a folder; got a file.")
            if not path.parent.exists():
                raise click.UsageError(f"folder {path.parent} does not exist; create it first.")
        click.get_current_context().with_resource(claimed(paths, force=self.force))


_SHOWING = {
    "as_json": click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="Show no progress on stderr."),
}
_FORCE = {"force": click.option("--force", is_flag=True, help="Overwrite existing results.")}
# Of commands that only show something, and of those that write results.
output_options = gather("output", _SHOWING, lambda values: Output(**values))
writing_options = gather("output", _FORCE | _SHOWING, lambda values: Output(**values))


def cache_path(name: str) -> Path:
    """Return the default path of `name`: under $LYMPHFEAT_CACHE, else ./cache."""
    return Path(os.environ.get(CACHE_VARIABLE, "cache")) / name


def note(text: str) -> None:
    """Print a note on stderr; of several processes only the first prints it."""
    if is_first():
        click.echo(text, err=True)


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Display]:
    """Show progress on stderr: a bar on a terminal, else a line about every 30 seconds.

    What it is told to say stays: above the bar, or as a line. Nothing with -q. Of several processes
    (torchrun) only the first shows its progress.
    """
    if quiet or not is_first():
        yield Nothing()
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
        yield _Bar(bar, bar.add_task(title, total=None, text=""))


@dataclass(frozen=True)
class _Bar:
    """A bar on a terminal."""

    bar: Progress
    task: TaskID

    def __call__(self, done: int, total: int, text: str = "") -> None:
        self.bar.update(self.task, completed=done, total=total, text=text)

    def say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


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
