"""The documentation names what exists, and the command lines it shows can be typed."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import pytest
import torch

import lymphfeat as lf
from lymphfeat.cohort.splits import report_splits
from lymphfeat.heads.bags import Bags
from lymphfeat.heads.engine.engine import fit_stacked
from lymphfeat.heads.engine.instances import Features
from lymphfeat.heads.engine.results import Fit
from lymphfeat.heads.engine.sampling import Sampling
from lymphfeat.heads.grid import expand
from lymphfeat.heads.registry import AGGREGATORS
from lymphfeat.heads.stack import HeadStack
from lymphfeat.settings import HeadGrid
from lymphfeat_cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _command(name: str) -> click.Command:
    assert isinstance(cli, click.Group)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_names_every_command(name: str) -> None:
    assert f"| `{name}` |" in PAGES[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("agg", AGGREGATORS)
def test_docs_and_help_name_every_aggregator(agg: str) -> None:
    assert f"| `{agg}` |" in (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    help_of_agg = next(p for p in _command("fit-head").params if p.name == "agg")
    assert isinstance(help_of_agg, click.Option)
    assert agg in str(help_of_agg.help)


def _shown_lines() -> list[str]:
    """Collect the `lymphfeat …` lines of every page and of every command's examples."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [str(_command(name).epilog) for name in COMMANDS]
    shown = "\n".join(texts).replace("-m lymphfeat_cli ", "-m lymphfeat ")
    line = r"^\s*(?:torchrun .*-m )?(lymphfeat [a-z].*?)(?:\s+#.*)?$"
    return sorted(set(re.findall(line, shown, re.M)))


@pytest.mark.parametrize("line", _shown_lines())
def test_shown_lines_can_be_typed(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = _command(name)
    for parameter in command.params:  # paths in examples need not be there
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    given = command.make_context(name, arguments, resilient_parsing=False).params
    if "agg" in given:  # one that no head uses is refused only here
        grid = HeadGrid(**{each.name: given.get(each.name, ()) for each in fields(HeadGrid)})
        assert expand(grid, solver="exact" if name == "fit-head" else "adam")


def test_there_are_examples() -> None:
    assert len(_shown_lines()) >= 15


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_python_page_names_every_public_name() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `lf\.(\w+)` \|", page, re.M)) == sorted(lf.__all__)
    shown = "".join(_blocks(ROOT / "docs" / "python.md"))
    functions = [name for name in lf.__all__ if name[0].islower()]
    assert [name for name in functions if f"lf.{name}(" not in shown] == []


def test_an_aggregator_can_be_added_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len([line for line in block.splitlines() if line]) <= 10
    monkeypatch.setitem(AGGREGATORS, "median", AGGREGATORS["mean"])  # undoes what the block does
    exec(block, {})
    sizes = [3, 1, 4, 2, 5, 2]
    maps = np.random.default_rng(0).normal(size=(sum(sizes), 4, 1, 1)).astype(np.float16)
    ids, labels = [f"P{i}" for i in range(6)], np.array([0, 1] * 3, np.int64)
    features = Features(
        maps, maps[:, :, 0, 0].astype(np.float32), np.cumsum([0, *sizes]), ids, labels
    )
    split = report_splits(ids, labels, seeds=1)[0]
    (head,) = expand(HeadGrid(agg=("median",)))
    fitted = fit_stacked(
        features, [Fit(head=head, split=split)], epochs=2, sampling=Sampling(batch_size=2)
    )
    scores = fitted.image_logits(0, [features.images[:, None]])
    medians = [
        np.sort(part)[(len(part) - 1) // 2] for part in np.split(scores, np.cumsum(sizes)[:-1])
    ]
    np.testing.assert_allclose(
        fitted.curves[0, -1], 1 / (1 + np.exp(-np.array(medians))), rtol=1e-4
    )
    stack = HeadStack([head], torch.zeros(1, 4), torch.zeros(1))
    kept = torch.tensor([3.0, 1.0, 2.0, 5.0])[:, None, None]  # (N, U, 1)
    assert stack.read_out(kept, Bags.of([3, 1])).weight.tolist() == [0, 0, 1, 1]
