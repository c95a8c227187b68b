"""The options that say which heads are meant: of `fit-head` a grid, of `endtoend` one head."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import F, stack

if TYPE_CHECKING:
    from lymphfeat.settings import HeadGrid, HeadSettings


class CommaList(click.ParamType["tuple[Any, ...]"]):
    """One value or several between commas; in lymphfeat.toml also a list."""

    def __init__(self, convert: Callable[[str], Any], name: str) -> None:
        self._convert = convert
        self.name = f"{name}[,…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        parts = value if isinstance(value, Iterable) else [value]
        try:
            return tuple(self._convert(str(part)) for part in parts)
        except ValueError:
            self.fail(f"{value!r} must be numbers, separated by commas.", param, ctx)


_TEXTS = CommaList(str, "text")
_INTEGERS = CommaList(int, "integer")
_NUMBERS = CommaList(float, "float")


def head_options(*, agg: str, lr: float) -> Callable[[F], F]:
    """Return the options of heads, with the default aggregator and learning rate of a command."""
    return stack(
        click.option(
            "--agg",
            multiple=True,
            default=(agg,),
            show_default=True,
            help="Aggregator: top1, topk, topbottomk, mean, max, lse, bnsigmoid; or all. "
            "Repeatable.",
        ),
        _grid_option("--unit", _TEXTS, "pixel or image. [default: image for top…, else pixel]"),
        _grid_option("--k-train", _INTEGERS, "Instances learnt from, of a patient. [default: 1]"),
        _grid_option("--k-agg", _INTEGERS, "Instances read out. [default: 10; with all: 5,10]"),
        _grid_option("--k-percent", _NUMBERS, "Both as a percentage of a patient's instances."),
        _grid_option("--k-min", _INTEGERS, "Least k then. [default: 1]"),
        _grid_option("--reduce", _TEXTS, "mean or max, of topk's probabilities. [default: mean]"),
        _grid_option(
            "--loss", _TEXTS, "instance or bag: what topk… learns from. [default: instance]"
        ),
        _grid_option("--temperature", _NUMBERS, "Of lse. [default: 1]"),
        _grid_option("--momentum", _NUMBERS, "Of bnsigmoid's statistics. [default: 0.1]"),
        _grid_option("--lr", _NUMBERS, f"Adam's step size. [default: {lr:g}]", default=(lr,)),
        _grid_option("--weight-decay", _NUMBERS, "L2 penalty. [default: 0]"),
    )


def _grid_option(
    name: str, type: CommaList, help: str, default: tuple[float, ...] = ()
) -> Callable[[F], F]:
    return click.option(name, type=type, default=default, help=help)


def pop_grid(options: dict[str, Any]) -> "HeadGrid":
    """Take the options of heads out of a command's options."""
    from dataclasses import fields

    from lymphfeat.settings import HeadGrid

    return HeadGrid(**{field.name: options.pop(field.name) for field in fields(HeadGrid)})


def only_head(grid: "HeadGrid") -> "HeadSettings":
    """Return the head of a grid that must have one."""
    from lymphfeat.heads import expand, head_name

    heads = expand(grid)
    if len(heads) != 1:
        raise click.UsageError(
            f"this command trains one head; got {len(heads)}: "
            f"{', '.join(head_name(head) for head in heads)}."
        )
    return heads[0]
