"""Grids of head settings, defaults that a name implies, names of heads."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

from lymphfeat.errors import SettingsError
from lymphfeat.heads.registry import (
    AGGREGATORS,
    COUNTED_K,
    PERCENT_K,
    LinearAggregator,
    aggregator_of,
)
from lymphfeat.settings import HeadGrid, HeadSettings

DEFAULT_K = (5, 10)  # of `--agg all`
_OPTIMISER = ("class_weights", "lr", "weight_decay")  # used by every head
_DEFAULTS = HeadSettings()


def resolve(settings: HeadSettings) -> HeadSettings:
    """Fill in what the aggregator's name decides, and reset settings it does not use.

    Equivalent heads thus compare equal. Raises SettingsError for an unknown aggregator.
    """
    if settings.agg not in AGGREGATORS:
        raise SettingsError(
            f"agg (={settings.agg}) must be one of {', '.join(AGGREGATORS)}, or all, ranking, "
            "weighted or network."
        )
    if (settings.agg, settings.k_train, settings.k_agg, settings.k_percent) == ("topk", 1, 1, None):
        settings = replace(settings, agg="top1")
    read = {"agg", *_read(settings), *_OPTIMISER}
    unread = {
        field.name: getattr(_DEFAULTS, field.name)
        for field in fields(settings)
        if field.name not in read
    }
    resolved = replace(settings, **unread)
    resolved = replace(resolved, unit=resolved.unit or AGGREGATORS[settings.agg].unit)
    return replace(resolved, k_agg=1) if settings.agg == "top1" else resolved


def require_linear(settings: HeadSettings) -> None:
    """Raise SettingsError for what only heads on cached maps support: networks, class weights."""
    aggregator_of(settings, LinearAggregator)
    if settings.class_weights != "none":
        raise SettingsError(
            f"class_weights (={settings.class_weights}) must be none here; only fit-head, which "
            "trains heads on cached maps, can weight classes."
        )


def _read(settings: HeadSettings) -> set[str]:
    """Name the settings that matter to a head: k in percent takes the place of k as a number."""
    unread = PERCENT_K[1:] if settings.k_percent is None else COUNTED_K
    return set(AGGREGATORS[settings.agg].reads) - set(unread)


def expand(grid: HeadGrid) -> list[HeadSettings]:
    """List the heads of a grid, each once.

    "all" means every aggregator and a family's name all of that family; both use topk… at 5 and 10.

    Raises SettingsError for an unknown aggregator, and for a value that no head uses.
    """
    heads: list[HeadSettings] = []
    for agg in grid.agg:
        names = _names(agg)
        counted = grid.k_agg or grid.k_percent or names == (agg,)
        own = grid if counted else replace(grid, k_agg=DEFAULT_K)
        for name in names:
            heads += [resolve(HeadSettings(agg=name, **values)) for values in _combinations(own)]
    heads = list(dict.fromkeys(heads))
    _refuse_unread(grid, heads)
    return heads


def _names(agg: str) -> tuple[str, ...]:
    of_family = [name for name, row in AGGREGATORS.items() if agg in ("all", row.family)]
    return tuple(of_family) or (agg,)


def _combinations(grid: HeadGrid) -> Iterator[dict[str, Any]]:
    """Yield every combination of a grid's values, once with k as a number, once in percent."""
    values: dict[str, tuple[Any, ...]] = {
        field.name: getattr(grid, field.name)
        for field in fields(grid)
        if field.name != "agg" and getattr(grid, field.name)
    }
    in_percent = {name: values.pop(name) for name in PERCENT_K if name in values}
    counted = {name: values.pop(name) for name in COUNTED_K if name in values}
    by_k = [counted] if grid.k_agg or not grid.k_percent else []
    for ks in [*by_k, in_percent] if grid.k_percent else by_k:
        axes = ks | values
        for combination in product(*axes.values()):
            yield dict(zip(axes, combination, strict=True))


def _refuse_unread(grid: HeadGrid, heads: Sequence[HeadSettings]) -> None:
    for field in fields(grid)[1:]:  # all but agg
        known = {getattr(head, field.name) for head in heads}
        unread = [value for value in getattr(grid, field.name) if value not in known]
        readers = [name for name, row in AGGREGATORS.items() if field.name in row.reads]
        if unread:
            raise SettingsError(
                f"{field.name} (={unread[0]}) must be used by one of the heads; got "
                f"{', '.join(dict.fromkeys(head.agg for head in heads))}. "
                f"It is used by {', '.join(readers)}"
                + (" with k_percent." if field.name == "k_min" else ".")
            )


def head_name(settings: HeadSettings) -> str:
    """Name a head as tables and plots do: its aggregator, k, and non-default settings."""
    default = resolve(HeadSettings(agg=settings.agg))
    name = settings.agg
    if name in ("topk", "topbottomk"):
        percent = settings.k_percent
        k = settings.k_agg if percent is None else f"{_shown(percent)}%"
        name = f"{name.removesuffix('k')}{k}"
    hidden = {"agg", "k_agg", "k_percent"}
    shown = sorted({field.name for field in fields(settings)} - hidden - set(_OPTIMISER))
    parts = [
        f"{key}={_shown(getattr(settings, key))}"
        for key in (*shown, *_OPTIMISER)
        if getattr(settings, key) != getattr(default, key)
    ]
    return " ".join([name, *parts])


def _shown(value: object) -> str:
    return str(value).removesuffix(".0")
