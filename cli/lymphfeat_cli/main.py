"""The command group: finds commands without importing them, turns library errors into one line."""

import gc
import importlib
import logging
import os
import sys
import tomllib
import traceback
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import click

from lymphfeat import __version__
from lymphfeat.errors import LymphfeatError
from lymphfeat.runtime.disks import disk_error

# Idle OpenMP threads sleep rather than spin (read when torch is imported). On a machine shared with
# other work, spinning made the head engine 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Imports make many objects and no garbage: with the default of 700, looking for it takes an eighth
# of their time.
gc.set_threshold(10_000)

# name -> one-line help. Each command is in the module of its name (`fit-head` in fit_head.py),
# imported only to run it or to show its help, so that `lymphfeat --help` is instant.
COMMANDS = {
    "audit": "Check a cohort: contents, oddities, leaks and shortcuts.",
    "extract": "Cohort -> feature store: one spatial feature map per image.",
    "import": "Bags of features of another tool -> feature store; no images needed.",
    "export": "Feature store -> bags of features for another tool.",
    "info": "Describe a store, run, model or weights file and check that it is complete.",
    "fit-head": "Feature store -> MIL heads fitted on every split, with a results table.",
    "endtoend": "Cohort -> final model trained through the backbone, predictions, submission.",
    "finalize": "A row of a fit-head run -> a model for new patients.",
    "rerun": "Repeat a run, a store or a model from what it records, and compare.",
    "compare": "Compare rows of runs, paired by split, with intervals and p-values.",
    "reproduce": "Cohort -> the report's results, next to honest and published ones.",
    "predict": "Model + cohort -> predictions (no labels needed).",
    "recalibrate": "Model + labelled cohort -> the model, fitted to another laboratory.",
    "explain": "Model + cohort -> HTML report of what the model looked at, with figures.",
    "pretrain": "Unlabelled cells -> backbone weights, self-supervised.",
    "synth": "Write a synthetic cohort in the layout of the real one.",
}

CONFIG_FILE = "lymphfeat.toml"
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


class LazyGroup(click.Group):
    """A group that lists its commands from a table and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lymphfeat_cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LymphfeatError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"{_error()}: {error}", err=True)
            ctx.exit(EXIT_BAD_INPUT)
        except BrokenPipeError:
            raise
        except OSError as error:
            refused = disk_error(error)  # a full disk, a folder without write permission
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"{_error()}: {refused or error}", err=True)
            ctx.exit(EXIT_BAD_INPUT if refused else EXIT_FAILED)
        except KeyboardInterrupt:
            click.echo("Interrupted. Finished work is kept; run the same command again.", err=True)
            ctx.exit(EXIT_FAILED)


def _error() -> str:
    """Return the start of an error line; with several processes (torchrun), name the process."""
    rank = os.environ.get("RANK", "0")
    return "Error" if rank == "0" else f"Error in process {rank}"


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read option defaults, one table per command, from `lymphfeat.toml`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is not valid TOML: {error}.") from None
    for name, table in tables.items():
        if name not in COMMANDS or not isinstance(table, dict):
            raise click.UsageError(
                f"{path}: [{name}] must be a table named after a command; "
                f"the commands are {', '.join(COMMANDS)}."
            )
    return {name: _option_defaults(path, name, table) for name, table in tables.items()}


def _option_defaults(path: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    module = importlib.import_module(f"lymphfeat_cli.{name.replace('-', '_')}")
    named = {
        option.lstrip("-").replace("-", "_"): parameter
        for parameter in module.command.params
        for option in parameter.opts
    }
    given = {key.replace("-", "_"): _plain(value) for key, value in table.items()}
    unknown = sorted(set(given) - set(named))
    if unknown:
        raise click.UsageError(
            f"{path}: [{name}] has no option {', '.join(unknown)}; see `lymphfeat {name} --help`."
        )
    for key, value in given.items():
        _check_kind(named[key], value, f"{path}: [{name}] {key}")
    return {named[key].name: value for key, value in given.items()}  # --json sets as_json


def _check_kind(parameter: click.Parameter, value: Any, where: str) -> None:
    """Refuse values that click cannot read; those that it refuses it names where they are used."""
    try:
        parameter.type_cast_value(click.Context(click.Command(None)), value)
    except click.UsageError:
        pass
    except Exception:  # click takes the kind of a default on trust
        raise click.UsageError(
            f"{where} must be what the command line takes; got {value!r:.60}."
        ) from None


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value  # as one types it


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"Options can also be set in {CONFIG_FILE}, one table per command: "
    "[fit-head] seeds = 5. "
    "Research software, not a medical device.",
)
@click.version_option(__version__, prog_name="lymphfeat")
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file of option defaults, one table per command. "
    f"[default: ./{CONFIG_FILE} if it exists]",
)
@click.pass_context
def cli(ctx: click.Context, debug: bool, config: Path | None) -> None:
    """Classify lymphocytosis as reactive or tumoral from bags of blood-cell images.

    \b
    The main workflow, by default on a built-in synthetic cohort:
      lymphfeat extract
      lymphfeat fit-head --agg topk
      lymphfeat endtoend
    With your own patients, check the cohort first:
      lymphfeat audit --cohort DIR
    """
    warnings.filterwarnings("ignore", module="PIL")  # what matters becomes an error or a finding
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    path = config or Path(CONFIG_FILE)
    if path.is_file():
        ctx.default_map = read_config(path)


def main() -> None:
    """Run the command line; a bug shows its traceback, a closed pipe ends quietly."""
    try:
        cli()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
