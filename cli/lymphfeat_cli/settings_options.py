"""Options made of settings: names, help, defaults, ranges and choices are those of the fields."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin

import click
from click.core import ParameterSource

from lymphfeat.settings import About, HeadGrid, HeadSettings, Settings
from lymphfeat_cli.options import Decorator, gather

T = TypeVar("T", bound=Settings)


def settings_options(
    defaults: Settings,
    name: str = "settings",
    *,
    only: Collection[str] = (),
    omit: Collection[str] = (),
    prefix: str = "",
) -> Decorator:
    """Make options of settings; the command gets the settings they give as the argument `name`.

    `only` (all if empty) and `omit` name options, with underscores; `prefix` goes before each.
    Nested settings have options too; those of a head take several values but must give one head.
    """
    start = prefix.replace("-", "_")  # of the parameters
    options = {
        start + parameter: option
        for parameter, option in _options(defaults, prefix).items()
        if parameter not in omit and (not only or parameter in only)
    }

    def make(values: dict[str, Any]) -> Settings:
        return _filled(defaults, {each.removeprefix(start): values[each] for each in values})

    return gather(name, options, make)


def grid_options(name: str = "grid") -> Decorator:
    """Make options of head settings, several values each; the command gets a HeadGrid."""
    options = _options(HeadSettings())
    options["agg"] = click.option(
        "--agg",
        multiple=True,
        default=HeadGrid().agg,
        show_default=True,
        help=f"{HeadSettings.about()['agg'].help} Also a family (ranking, weighted, "
        "distribution, network), or all, which is all but the networks. Repeatable.",
    )
    return gather(name, options, lambda values: HeadGrid(**values))


def option_of(settings: Settings, parameter: str) -> Decorator:
    """Make the option of one setting; the command gets its value."""
    return _options(settings)[parameter]


def unless_given(settings: T, values: Mapping[str, Any]) -> T:
    """Return settings changed to values, by parameter, that neither user nor lymphfeat.toml set."""
    source = click.get_current_context().get_parameter_source
    free = {name: values[name] for name in values if source(name) is ParameterSource.DEFAULT}
    return cast(T, _filled(settings, free))


def _one_head(settings: HeadSettings, values: Mapping[str, Any]) -> HeadSettings:
    """Return a head's settings changed to the values given; UsageError if they give several."""
    from lymphfeat.heads.grid import expand, head_name

    if "lse" in values.get("agg", ()) and not values.get("temperature"):
        values = {**values, "temperature": (settings.temperature,)}  # of five, `fit-head` chooses
    heads = expand(HeadGrid(**values), solver="adam")
    if len(heads) != 1:
        raise click.UsageError(
            f"this command trains one head; got {len(heads)}: "
            f"{', '.join(head_name(head) for head in heads)}."
        )
    return replace(settings, **{name: given[0] for name, given in values.items() if given})


def _filled(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return settings changed to the values of their options, by parameter."""
    parameters = {name: _parameter(about) for name, about in settings.about().items()}
    own = {name: values[each] for name, each in parameters.items() if each in values}
    if isinstance(settings, HeadSettings):
        return _one_head(settings, own)
    nested = {name: _filled(value, values) for name, value in _nested(settings).items()}
    return replace(settings, **own, **nested)


def _nested(settings: Settings) -> dict[str, Settings]:
    return {name: value for name, value in vars(settings).items() if isinstance(value, Settings)}


def _options(settings: Settings, prefix: str = "") -> dict[str, Decorator]:
    """Make the options of settings, nested ones first, by parameter (without prefix)."""
    options: dict[str, Decorator] = {}
    for nested in _nested(settings).values():
        options |= _options(nested, prefix)
    make = _grid_option if isinstance(settings, HeadSettings) else _option
    kinds = {each.name: each.type for each in fields(settings)}
    for name, about in settings.about().items():
        if not about.python_only:
            flags = [f"--{prefix}{flag.removeprefix('--')}" for flag in about.options]
            options[_parameter(about)] = make(flags, kinds[name], getattr(settings, name), about)
    return options


def _parameter(about: About) -> str:
    return about.options[0].removeprefix("--").replace("-", "_")  # as click names it


def _option(flags: list[str], kind: Any, default: Any, about: About) -> Decorator:
    help, unset = about.help, default in (None, "", ())
    if unset and about.unset:
        help += f" [default: {about.unset}]"
    if get_origin(kind) is tuple and about.choices:
        help += " Repeatable."
    if bool in (kind, *get_args(kind)) and default is not False:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    shown = not unset and default is not False
    return click.option(
        *flags, default=default, show_default=shown, help=help, **_facts(kind, about)
    )


def _facts(kind: Any, about: About) -> dict[str, Any]:
    """Return the arguments of an option that follow from the type of its setting."""
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if bool in (kind, *get_args(kind)):
        return {"is_flag": True}
    if get_origin(kind) is not tuple:
        return {"type": _type(kind, about)}
    if about.choices:
        return {"multiple": True, "type": _type(kind, about)}
    if ... in get_args(kind):
        return {"type": CommaList(_base(kind))}
    return {"type": (_type(kind, about),) * len(get_args(kind)), "metavar": "LOW HIGH"}


def _grid_option(flags: list[str], kind: Any, default: Any, about: About) -> Decorator:
    """Make an option of several values: names one by one, others separated by commas."""
    if kind is str and default:
        facts: dict[str, Any] = {"multiple": True, "default": (default,), "show_default": True}
        return click.option(*flags, help=about.help, **facts)
    shown = f"{default:g}" if isinstance(default, (int, float)) else default or about.unset
    help = f"{about.help} [default: {shown}]" if shown else about.help
    return click.option(*flags, type=CommaList(_base(kind)), default=(), help=help)


def _type(kind: Any, about: About) -> Any:
    base = _base(kind)
    if about.choices:
        return click.Choice(about.choices)
    if base is str or not about.rule:
        return base
    number: Any = click.IntRange if base is int else click.FloatRange
    open_ends = {"min_open": about.above is not None, "max_open": about.below is not None}
    return number(about.low, about.high, **open_ends)


def _base(kind: Any) -> type:
    return next((each for each in (int, float) if each in (kind, *get_args(kind))), str)


class CommaList(click.ParamType["tuple[Any, ...]"]):
    """One value or several separated by commas; in lymphfeat.toml also a list."""

    def __init__(self, convert: type) -> None:
        self._convert = convert
        names = {str: "text", int: "integer", float: "float"}
        self.name = f"{names[convert]}[,…]"

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
