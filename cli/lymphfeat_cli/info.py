"""`lymphfeat info`: describe a store, run, model or weights and check that it is complete."""

from pathlib import Path

import click

from lymphfeat_cli.options import PATH, Output, output_options


@click.command(
    "info",
    epilog="""\b
Examples:
  lymphfeat info cache/features.h5
  lymphfeat info runs/topk-honest
  lymphfeat info models/endtoend --json
  lymphfeat info bloodcells""",
)
@click.argument("path", type=PATH)
@output_options
def command(path: Path, output: Output) -> None:
    """Describe a feature store, run, model or weights file and check that it is complete.

    PATH is a file or a folder, or `bloodcells` for the weights shipped with lymphfeat.
    """
    from lymphfeat.inspection import inspect

    facts = inspect(path)
    output.show(lambda: facts, lambda: click.echo("\n".join(_lines(facts))))


def _lines(facts: dict[str, object], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return lines
