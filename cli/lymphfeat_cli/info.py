"""`lymphfeat info`: describe a store, run, model or weights and check that it is complete."""

from pathlib import Path

import click

from lymphfeat_cli.options import PATH, Output, note, output_options


@click.command(
    "info",
    epilog="""\b
Examples:
  lymphfeat info cache/features.h5
  lymphfeat info cache/features.h5 --verify
  lymphfeat info runs/topk-honest
  lymphfeat info models/endtoend --json
  lymphfeat info bloodcells""",
)
@click.argument("path", type=PATH)
@click.option("--verify", is_flag=True, help="Read every feature map of a store and check it.")
@output_options
def command(path: Path, verify: bool, output: Output) -> None:
    """Describe a feature store, run, model or weights file and check that it is complete.

    PATH is a file or a folder, or `bloodcells` for the weights shipped with lymphfeat. Of a store,
    by default the mark of completeness, recipe, sizes and the first and last map are checked.
    """
    from lymphfeat.inspection import inspect

    facts = inspect(path, verify=verify)
    if facts.get("verified") is False and not output.quiet:
        note("Complete by its mark, recipe and sizes; --verify also reads every feature map.")
    output.show(lambda: facts, lambda: click.echo("\n".join(_lines(facts))))


def _lines(facts: dict[str, object], indent: str = "") -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value}")
    return lines
