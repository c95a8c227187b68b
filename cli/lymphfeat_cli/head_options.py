"""Options that choose heads: a grid for `fit-head`, one head for `endtoend`."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from lymphfeat_cli.options import F, stack

if TYPE_CHECKING:
    from lymphfeat.settings import HeadGrid, HeadSettings


class CommaList(click.ParamType["tuple[Any, ...]"]):
    """One value or several separated by commas; in lymphfeat.toml also a list."""

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


TEXTS = CommaList(str, "text")
INTEGERS = CommaList(int, "integer")
NUMBERS = CommaList(float, "float")


def head_options(*, agg: str, lr: float) -> Callable[[F], F]:
    """Return the head options, with a command's default aggregator and learning rate."""
    return stack(
        click.option(
            "--agg",
            multiple=True,
            default=(agg,),
            show_default=True,
            help="Aggregator: top1, topk, topbottomk, mean, max, lse, bnsigmoid, attention, "
            "gated-attention, transformer, lstm; a family (ranking, weighted, network); or all. "
            "Repeatable.",
        ),
        grid_option(
            "--unit", TEXTS, "Instance: pixel or image. [default: image for top…, else pixel]"
        ),
        grid_option("--k-train", INTEGERS, "Instances per patient used in training. [default: 1]"),
        grid_option(
            "--k-agg",
            INTEGERS,
            "Instances per patient used in prediction. [default: 10; with all: 5,10]",
        ),
        grid_option(
            "--k-percent",
            NUMBERS,
            "Use this percentage of a patient's instances, in training and in prediction.",
        ),
        grid_option("--k-min", INTEGERS, "Minimum k with --k-percent. [default: 1]"),
        grid_option(
            "--reduce",
            TEXTS,
            "How topk combines instance probabilities: mean or max. [default: mean]",
        ),
        grid_option(
            "--loss", TEXTS, "Loss of top-k heads: per instance or per bag. [default: instance]"
        ),
        grid_option("--temperature", NUMBERS, "Temperature of lse. [default: 1]"),
        grid_option(
            "--momentum", NUMBERS, "Momentum of bnsigmoid's running statistics. [default: 0.1]"
        ),
        grid_option(
            "--width", INTEGERS, "Hidden units of attention, transformer, lstm. [default: 128]"
        ),
        grid_option("--layers", INTEGERS, "Layers of transformer, lstm. [default: 1]"),
        grid_option("--lr", NUMBERS, f"Learning rate (Adam). [default: {lr:g}]", default=(lr,)),
        grid_option("--weight-decay", NUMBERS, "Weight decay (L2 penalty). [default: 0]"),
    )


def grid_option(
    name: str, type: CommaList, help: str, default: tuple[float, ...] = ()
) -> Callable[[F], F]:
    """Return an option that takes one value or several."""
    return click.option(name, type=type, default=default, help=help)


def pop_grid(options: dict[str, Any]) -> "HeadGrid":
    """Remove the head options from a command's options and return them."""
    from dataclasses import fields

    from lymphfeat.settings import HeadGrid

    names = [field.name for field in fields(HeadGrid)]
    return HeadGrid(**{name: options.pop(name) for name in names if name in options})


def only_head(grid: "HeadGrid") -> "HeadSettings":
    """Return the only head of a grid; raise UsageError if there are several."""
    from lymphfeat.heads.grid import expand, head_name

    heads = expand(grid)
    if len(heads) != 1:
        raise click.UsageError(
            f"this command trains one head; got {len(heads)}: "
            f"{', '.join(head_name(head) for head in heads)}."
        )
    return heads[0]
