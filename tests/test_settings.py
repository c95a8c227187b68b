"""Settings: checked on creation, listed by help, and turned into options and back."""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from lymphfeat.errors import SettingsError
from lymphfeat.settings import (
    BackboneSettings,
    EndToEndSettings,
    ExplainSettings,
    ExtractSettings,
    FitSettings,
    HeadGrid,
    HeadSettings,
    PredictSettings,
    PretrainSettings,
    Settings,
    SyntheticSettings,
    choices,
    setting,
)
from lymphfeat_cli.main import cli
from lymphfeat_cli.settings_options import grid_options, settings_options

ALL = [
    *(BackboneSettings, HeadSettings, FitSettings, EndToEndSettings, PretrainSettings),
    *(ExtractSettings, PredictSettings, ExplainSettings, SyntheticSettings),
]


# --- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (BackboneSettings, {"crop": 7}, "crop (=7) must lie in [8, 4096]."),
        (
            BackboneSettings,
            {"normalization": "mine"},
            "must be one of imagenet, challenge, inception.",
        ),
        (BackboneSettings, {"output_stride": 4}, "output_stride (=4) must be one of 8, 16, 32."),
        (ExtractSettings, {"batch_size": 0}, "batch_size (=0) must be at least 1."),
        (ExtractSettings, {"batch_size": -3}, "batch_size (=-3) must be at least 1."),
        (ExtractSettings, {"threads": 0}, "threads (=0) must be at least 1."),
        (ExtractSettings, {"views": 5}, "views (=5) must lie in [1, 4]."),
        (HeadSettings, {"unit": "cell"}, 'unit (=cell) must be one of "", pixel, image.'),
        (HeadSettings, {"k_percent": 0}, "k_percent (=0) must lie in (0, 100]."),
        (HeadSettings, {"lr": 0.0}, "lr (=0.0) must be above 0."),
        (HeadSettings, {"lr": math.nan}, "lr (=nan) must be above 0."),
        (EndToEndSettings, {"affine": 1}, "affine (=1) must lie in [0, 1)."),
        (EndToEndSettings, {"layer_decay": 0}, "layer_decay (=0) must lie in (0, 1]."),
        (FitSettings, {"fusions": ("late", "early")}, "must be one of late, sum, experts, all."),
        (FitSettings, {"epochs": 1, "evaluate_every": 2}, "must be at most epochs (=1)."),
        (FitSettings, {"epoch": "nested", "protocol": "report"}, "must go with --protocol honest"),
        (PretrainSettings, {"zoom": (1.1, 0.9)}, "must be two factors above 0, low then high."),
        (PretrainSettings, {"zoom": (0.0, 0.9)}, "zoom (=(0.0, 0.9)) must be above 0."),
    ],
)
def test_a_value_that_is_not_allowed(
    kind: type[Settings], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        kind(**changes)


def test_all_wrong_values_are_named() -> None:
    with pytest.raises(
        SettingsError, match=r"^seeds \(=0\) must .*; device \(=tpu\) must [^;]*\.$"
    ):
        FitSettings(seeds=0, device="tpu")  # type: ignore[arg-type]


def test_the_ends_of_ranges() -> None:
    for value in (0.0, 1.0):
        assert PretrainSettings(patient_pairs=value).patient_pairs == value
    assert EndToEndSettings(affine=0, layer_decay=1).affine == 0
    assert HeadSettings(k_percent=100).k_percent == 100


@pytest.mark.parametrize("kind", ALL)
def test_help_lists_every_setting(kind: type[Settings]) -> None:
    for each in fields(kind):
        assert re.search(rf"\b{each.name}: \w", kind.__doc__ or ""), each.name
    nested = {name for name, value in vars(kind()).items() if isinstance(value, Settings)}
    assert set(kind.about()) == {each.name for each in fields(kind)} - nested - {"finetune"}


def test_a_grid_has_the_settings_of_a_head() -> None:
    assert [each.name for each in fields(HeadGrid)] == [each.name for each in fields(HeadSettings)]


# --- options -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner(Settings):
    """Nested settings that share an option with the outer ones."""

    seed_of_inner: int = setting(0, "Seed.", at_least=0, options=("--seed",))
    side: float = setting(1.0, "Side.", above=0, below=10)


@dataclass(frozen=True, kw_only=True)
class Outer(Settings):
    """A setting of each kind."""

    inner: Inner = Inner()
    name: str = setting("x", "A name.")
    count: int | None = setting(None, "A number.", at_least=2, unset="all of them")
    stride: Literal[8, 16] | None = setting(None, "A choice of numbers.")
    way: Literal["a", "b"] = setting("a", "A choice.")
    ways: tuple[Literal["a", "b"], ...] = setting((), "Choices.", options=("--way-too",))
    words: tuple[str, ...] = setting(("w",), "Words.")
    pair: tuple[float, float] = setting((0.0, 1.0), "A pair.", at_least=0, at_most=1)
    off: bool = setting(False, "A flag.")
    on: bool = setting(True, "A switch.")
    either: bool | None = setting(None, "A switch with a default elsewhere.", unset="the model's")
    seed: int = setting(0, "Seed of all.", at_least=0)
    hidden: int = setting(3, "For Python alone.", python_only=True)


def given(line: str, defaults: Settings, **which: Any) -> Any:
    """Return the settings that a command gets from its options."""
    found: list[Any] = []
    command = click.command()(
        settings_options(defaults, **which)(lambda settings: found.append(settings))
    )
    result = CliRunner().invoke(command, line.split(), standalone_mode=False)
    if result.exception:
        raise result.exception
    return found[0] if found else result.output


def test_no_options_give_the_defaults() -> None:
    changed = Outer(inner=Inner(side=2), way="b", count=4, hidden=5)
    for defaults in (Outer(), changed):
        assert given("", defaults) == defaults


def test_each_kind_of_option() -> None:
    line = (
        "--name n --count 2 --stride 16 --way b --way-too a --way-too b --words u,v --pair 0.1 0.2 "
        "--off --no-on --no-either --seed 7 --side 3"
    )
    assert given(line, Outer()) == Outer(
        inner=Inner(seed_of_inner=7, side=3.0),
        name="n",
        count=2,
        stride=16,
        way="b",
        ways=("a", "b"),
        words=("u", "v"),
        pair=(0.1, 0.2),
        off=True,
        on=False,
        either=False,
        seed=7,
    )


@pytest.mark.parametrize(
    "line",
    ["--count 1", "--stride 9", "--way c", "--way-too c", "--pair 0 2", "--side 10", "--hidden 1"],
)
def test_options_refuse_what_settings_refuse(line: str) -> None:
    with pytest.raises(click.UsageError):
        given(line, Outer())


def test_help_is_that_of_the_settings() -> None:
    text = " ".join(given("--help", Outer()).split())
    for line in ("A number. [default: all of them]", "Choices. Repeatable.", "Seed of all."):
        assert line in text
    assert "A switch with a default elsewhere. [default: the model's]" in text
    assert re.search(r"--side .*Side\. \[default: 1\.0; 0<x<10\]", text)


def test_some_options_with_a_prefix() -> None:
    which: dict[str, Any] = {"only": ("count", "way"), "prefix": "its-"}
    assert given("--its-count 3", Outer(), **which) == replace(Outer(), count=3)
    with pytest.raises(click.UsageError, match="No such option"):
        given("--its-name n", Outer(), **which)
    with pytest.raises(click.UsageError, match="No such option"):
        given("--name n", Outer(), omit=("name",))


def test_a_grid_of_heads() -> None:
    found: list[HeadGrid] = []
    command = click.command()(grid_options()(lambda grid: found.append(grid)))
    line = ["--agg", "topk", "--agg", "mean", "--k-agg", "1,5", "--unit", "pixel"]
    assert CliRunner().invoke(command, line, standalone_mode=False).exception is None
    assert found == [HeadGrid(agg=("topk", "mean"), k_agg=(1, 5), unit=("pixel",))]


def test_one_head_among_other_settings() -> None:
    """Unresolved, as a recipe of a store holds them; but values that no head reads are refused."""
    given_head = given("--k-train 3 --agg topk", EndToEndSettings()).head
    assert given_head == HeadSettings(agg="topk", k_train=3, lr=1e-4)
    with pytest.raises(click.UsageError, match="trains one head; got 2: top5, top10"):
        given("--agg topk --k-agg 5,10", EndToEndSettings())
    with pytest.raises(SettingsError, match=r"k_agg \(=5\) must be used by one of the heads"):
        given("--k-agg 5", EndToEndSettings())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fit-head", FitSettings),
        ("fit-head", HeadSettings),
        ("endtoend", EndToEndSettings),
        ("endtoend", BackboneSettings),
        ("extract", ExtractSettings),
        ("extract", BackboneSettings),
        ("pretrain", PretrainSettings),
        ("predict", PredictSettings),
        ("explain", ExplainSettings),
        ("synth", SyntheticSettings),
    ],
)
def test_a_command_has_an_option_for_every_setting(name: str, kind: type[Settings]) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    flags = {flag for parameter in command.params for flag in parameter.opts}
    wanted = {flag for about in kind.about().values() for flag in about.options}
    hidden = {
        flag for about in kind.about().values() for flag in about.options if about.python_only
    }
    assert wanted - hidden <= flags
    assert not (hidden & flags)


def test_choices() -> None:
    assert choices(Literal[8, 16] | None) == (8, 16)
    assert choices(tuple[Literal["a"], ...]) == ("a",)
    assert choices(tuple[float, float]) == choices(int | None) == choices(str) == ()
