"""The command group: finds commands without importing them, turns library errors into one line."""

import importlib
import logging
import os
import sys
import tomllib
import traceback
from datetime import date
from pathlib import Path
from typing import Any

import click

from lymphfeat import __version__
from lymphfeat.errors import LymphfeatError

# Idle OpenMP threads sleep rather than spin (read when torch is imported). On a machine shared with
# other work, spinning made the head engine 50 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# name -> one-line help. Each command lives in the module of its name (`fit-head` in fit_head.py),
# imported only when it runs or is asked for its own help, so that `lymphfeat --help` is instant.
COMMANDS = {
    "audit": "Read a cohort and say what is in it, what is odd, and what leaks.",
    "extract": "Cohort -> feature store: one spatial feature map per image.",
    "info": "Say what a store, a run, a model or weights are, and whether they are whole.",
    "fit-head": "Feature store -> every MIL head over every split, and a table.",
    "endtoend": "Cohort -> final model, trained through the backbone; predictions; submission.",
    "compare": "Runs -> their rows side by side, paired by split, with intervals and p.",
    "reproduce": "Cohort -> the report's figures, beside honest ones and the published.",
    "predict": "Model + cohort -> predictions (labels not needed).",
    "explain": "Model + cohort -> one HTML page of what the model saw, and figures.",
    "pretrain": "Unlabelled cells -> backbone weights, self-supervised.",
    "synth": "Write a synthetic cohort that looks like the real thing.",
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
        except OSError as error:  # a full disk, a folder one may not write in
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"{_error()}: {error}", err=True)
            ctx.exit(EXIT_FAILED)
        except KeyboardInterrupt:
            click.echo("Interrupted: what was finished is kept; run the same line again.", err=True)
            ctx.exit(EXIT_FAILED)


def _error() -> str:
    """Return how an error begins; of several processes (torchrun), whose it is."""
    rank = os.environ.get("RANK", "0")
    return "Error" if rank == "0" else f"Error in process {rank}"


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read option defaults, one table a command, from `lymphfeat.toml`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    names = {
        option.lstrip("-").replace("-", "_"): parameter.name  # --json sets as_json
        for parameter in module.command.params
        for option in parameter.opts
    }
    given = {key.replace("-", "_"): _plain(value) for key, value in table.items()}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise click.UsageError(
            f"{path}: [{name}] has no option {', '.join(unknown)}; see `lymphfeat {name} --help`."
        )
    return {names[key]: value for key, value in given.items()}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value  # as one types it


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"Options may also stand in {CONFIG_FILE}, one table a command: [fit-head] seeds = 5. "
    "Research software, not a medical device.",
)
@click.version_option(__version__, prog_name="lymphfeat")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"Option defaults, one table a command. [default: ./{CONFIG_FILE} if there]",
)
@click.pass_context
def cli(ctx: click.Context, debug: bool, config: Path | None) -> None:
    """Reactive or tumoral lymphocytosis, from bags of blood-cell images.

    \b
    The main job, without arguments on a built-in synthetic cohort:
      lymphfeat extract
      lymphfeat fit-head --agg topk
      lymphfeat endtoend
    On your own patients, first look at them:
      lymphfeat audit --cohort DIR
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    path = config or Path(CONFIG_FILE)
    if path.is_file():
        ctx.default_map = _read_config(path)


def main() -> None:
    """Run the command line; a bug keeps its traceback, a closed pipe ends quietly."""
    try:
        cli()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
