"""Grids of head settings, defaults that a name implies, names of heads."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from itertools import product
from typing import Any

from lymphfeat.errors import SettingsError
from lymphfeat.heads.aggregators.distribution import QuantileRange
from lymphfeat.heads.registry import (
    AGGREGATORS,
    COUNTED_K,
    PERCENT_K,
    find_aggregator,
)
from lymphfeat.settings import HeadGrid, HeadSettings, Solver, require

DEFAULT_K = (5, 10)  # of `--agg all`
# Of lse by name: one of them chosen inside is better than any for all cohorts (docs/heads.md).
DEFAULT_TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
DEFAULT_QUANTILES = "90-50"
_NAMED_LAST = ("class_weights", "lr", "weight_decay")
_DEFAULTS = HeadSettings()


def resolve(settings: HeadSettings, *, solver: Solver = "adam") -> HeadSettings:
    """Fill in what the aggregator's name decides, and reset settings it does not use.

    `solver` is that of heads that name none and have a choice. Adam, which trains through a
    backbone, trains every head there, also those that the exact solver starts and finishes.

    Equivalent heads thus compare equal. Raises SettingsError for an unknown aggregator.
    """
    if (settings.agg, settings.k_train, settings.k_agg, settings.k_percent) == ("topk", 1, 1, None):
        settings = replace(settings, agg="top1")
    aggregator = find_aggregator(replace(settings, solver=settings.solver or solver))
    read = {"agg", *_read(settings), *aggregator.fitted_by}
    read |= {"lr", "weight_decay"} if solver == "adam" else set()
    unread = {
        field.name: getattr(_DEFAULTS, field.name)
        for field in fields(settings)
        if field.name not in read
    }
    resolved = replace(settings, **unread)
    if "solver" in read:
        resolved = replace(resolved, solver=resolved.solver or solver)
    if "quantiles" in read:
        resolved = replace(resolved, quantiles=resolved.quantiles or DEFAULT_QUANTILES)
        QuantileRange.parse(resolved.quantiles)  # raises SettingsError
    resolved = replace(resolved, unit=resolved.unit or aggregator.unit)
    return replace(resolved, k_agg=1) if settings.agg == "top1" else resolved


def require_trainable(settings: HeadSettings) -> None:
    """Raise SettingsError for what no training through a backbone supports.

    These are class weights and, as there is a single backbone, statistics of the N-th store.
    """
    require(
        "@" not in settings.agg,
        f"agg (={settings.agg}) must not name a store after @ here, where there is one backbone.",
    )
    if settings.class_weights != "none":
        raise SettingsError(
            f"class_weights (={settings.class_weights}) must be none here; only fit-head, which "
            "trains heads on cached maps, can weight classes."
        )


def _read(settings: HeadSettings) -> set[str]:
    """Name the settings that matter to a head: k in percent takes the place of k as a number."""
    unread = PERCENT_K[1:] if settings.k_percent is None else COUNTED_K
    return set(find_aggregator(settings).reads) - set(unread)


def expand(grid: HeadGrid, *, solver: Solver = "exact") -> list[HeadSettings]:
    """List the heads of a grid, each once; `solver` is that of heads which the grid gives none.

    "all" means every aggregator but the networks, and a family's name all of that family; both use
    topk… at 5 and 10. `lse` by name has five temperatures to choose among, unless the grid names
    some.

    Raises SettingsError for an unknown aggregator, and for a value that no head uses.
    """
    heads: list[HeadSettings] = []
    for agg in grid.agg:
        names = _names(agg)
        counted = grid.k_agg or grid.k_percent or names == (agg,)
        own = grid if counted else replace(grid, k_agg=DEFAULT_K)
        if agg == "lse" and not grid.temperature:
            own = replace(own, temperature=DEFAULT_TEMPERATURES)
        for name in names:
            settings = (HeadSettings(agg=name, **values) for values in _combinations(own))
            heads += [resolve(each, solver=solver) for each in settings]
    heads = list(dict.fromkeys(heads))
    _refuse_unread(grid, heads)
    return heads


def _names(agg: str) -> tuple[str, ...]:
    if agg == "all":
        return tuple(name for name, row in AGGREGATORS.items() if row.family != "network")
    return tuple(name for name, row in AGGREGATORS.items() if agg == row.family) or (agg,)


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
        readers = [
            name for name, row in AGGREGATORS.items() if field.name in (*row.reads, *row.fitted_by)
        ]
        if unread:
            raise SettingsError(
                f"{field.name} (={unread[0]}) must be used by one of the heads; got "
                f"{', '.join(dict.fromkeys(head.agg for head in heads))}. "
                f"It is used by {', '.join(readers)}"
                + (" with k_percent." if field.name == "k_min" else ".")
            )


@lru_cache(maxsize=4096)  # a run of thousands of fits asks for the names of its few heads
def head_name(settings: HeadSettings) -> str:
    """Name a head as tables and plots do: its aggregator, k, and non-default settings."""
    default = resolve(HeadSettings(agg=settings.agg, solver=settings.solver))
    name = settings.agg
    if name in ("topk", "topbottomk"):
        percent = settings.k_percent
        k = settings.k_agg if percent is None else f"{_shown(percent)}%"
        name = f"{name.removesuffix('k')}{k}"
    if settings.solver == "exact":
        name = f"{name} exact"
    if settings.quantiles != default.quantiles:
        name = f"{name} {settings.quantiles}"
    hidden = {"agg", "k_agg", "k_percent", "solver", "quantiles"}
    shown = sorted({field.name for field in fields(settings)} - hidden - set(_NAMED_LAST))
    parts = [
        f"{key}={_shown(getattr(settings, key))}"
        for key in (*shown, *_NAMED_LAST)
        if getattr(settings, key) != getattr(default, key)
    ]
    return " ".join([name, *parts])


def _shown(value: object) -> str:
    return str(value).removesuffix(".0")
