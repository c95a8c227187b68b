"""Every block of shell or Python in README and docs runs as shown, or says why it does not.

A block runs in a folder of its own that has a tiny cohort, under the names that the pages use, and
a `lymphfeat.toml` that makes trainings short. Where the text asks for more than a short training,
SHORTER says what runs in its place; RESULTS says which pages start from results of the main job.
"""

import re
import shlex
import shutil
from dataclasses import dataclass
from doctest import DocTestParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import lymphfeat as lf
from lymphfeat.runtime import devices
from lymphfeat_cli.main import cli
from tests.cohorts import write_bags, write_text

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:<!-- not run: ([^>]*) -->\n)?```(\w+)\n(.*?)```", re.S)

COHORTS = ("cohort", "DIR", "NEW_DIR", "my-cohort")
OTHER = "OTHER_DIR"  # patients of another laboratory
RESULTS = {
    "docs/exchange.md": ["cache/features.h5"],
    "docs/explain.md": ["models/endtoend", "models/final", "cache/features.h5"],
    "docs/final.md": ["cache/features.h5"],
    "docs/heads.md": ["cache/features.h5"],
    "docs/protocols.md": ["cache/features.h5"],
    "docs/reliability.md": ["cache/features.h5", "models/endtoend"],
    "docs/store.md": ["cache/features.h5"],
}
SHORTER = {
    "--minutes 120": "--epochs 1",
    "--finetune-epochs 20": "--finetune-epochs 1",
    "--seeds 10": "--seeds 2",
}
CONFIG = """
[extract]
backbone = "test_efficientnet"
precision = "float32"
device = "cpu"
[fit-head]
epochs = 2
seeds = 2
device = "cpu"
[endtoend]
backbone = "test_efficientnet"
precision = "float32"
epochs = 1
device = "cpu"
[pretrain]
backbone = "test_efficientnet"
precision = "float32"
batch-size = 8
field = 112
device = "cpu"
"""
ELSEWHERE = {("docs/heads.md", "python"): "test_docs.py"}  # its aggregator is checked there
NOT_RUN = {
    "README.md": ["sets up a virtual environment", "installs packages"],
    "docs/backbones.md": ["installs packages"],
    "docs/benchmarks.md": ["measures for an hour and more"],
    "docs/reliability.md": [
        "takes a quarter of an hour and more",
        "writes 6 GB and takes a quarter of an hour",
    ],
}


@dataclass(frozen=True)
class Block:
    """A block of a page; `reason` says why it is not run, empty for one that is."""

    page: str
    number: int
    reason: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.language}-{self.number}"


def blocks() -> list[Block]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        Block(page.relative_to(ROOT).as_posix(), number, *found)
        for page in pages
        for number, found in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    ]


def test_these_blocks_are_not_run() -> None:
    found: dict[str, list[str]] = {}
    for block in blocks():
        if block.reason:
            found.setdefault(block.page, []).append(block.reason)
    assert found == NOT_RUN
    assert {block.language for block in blocks()} == {"sh", "python"}


def write_place(place: Path) -> Path:
    """Write the cohorts, of twenty labelled patients and two others, and the configuration."""
    for name, first in (("cohort", 0), (OTHER, 100)):
        _write_cohort(place / name, first)
    for name in COHORTS[1:]:
        shutil.copytree(place / "cohort", place / name)
    for name, first in (("BAGS", 0), ("NEW_BAGS", 100)):
        _write_bags(place / name, first)
    header, *others = (place / "cohort" / "patients.csv").read_text().splitlines()
    lines = [f"{line},{'ABC'[number // 2 % 3]}" for number, line in enumerate(others)]
    write_text(place / "labels.csv", f"{header},laboratory", *lines)
    folds = [f"P{number},{number // 2 % 4}" for number in range(20)]
    write_text(place / "folds.csv", "id,fold", *folds)
    write_text(place / "lymphfeat.toml", CONFIG)
    return place


def _write_bags(folder: Path, first: int) -> None:
    """Write features of 22 patients, numbered from `first`."""
    folder.mkdir()
    for number in range(22):
        own = np.random.default_rng(first + number).normal(number % 2, 1, (1 + number % 4, 6))
        np.save(folder / f"P{first + number}.npy", own)


def _write_cohort(root: Path, first: int) -> None:
    """Write a cohort of 22 patients, numbered from `first`; no two cohorts share an image."""
    ids = [f"P{first + number}" for number in range(22)]
    lines = [
        f"{id},{number % 2 if number < 20 else ''},{50 + 7 * number % 30}"
        for number, id in enumerate(ids)
    ]
    write_text(root / "patients.csv", "id,label,age", *lines)
    bags = {id: 1 + number % 4 for number, id in enumerate(ids)}
    write_bags(root, bags, ".jpg", side=112, first=first)


def run_shell(text: str) -> None:
    """Run the lines of a block, each a command of lymphfeat."""
    for shown, shorter in SHORTER.items():
        text = text.replace(shown, shorter)
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "lymphfeat", line
            result = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of the main job."""
    place = write_place(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run_shell("lymphfeat extract --cohort DIR\nlymphfeat endtoend --cohort DIR")
        run_shell("lymphfeat fit-head --agg mean+std --fusion late --model-out models/final")
    return place


RUN = [
    block
    for block in blocks()
    if not block.reason and (block.page, block.language) not in ELSEWHERE
]


@pytest.mark.seconds
@pytest.mark.parametrize("block", RUN, ids=str)
def test_runs_as_shown(
    block: Block, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_place(tmp_path)
    for name in RESULTS.get(block.page, ()):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        (place / name).parent.mkdir(exist_ok=True)
        copy(finished / name, place / name)
    monkeypatch.chdir(place)
    monkeypatch.setenv("LYMPHFEAT_COHORT", "DIR")
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: False)
    if block.language == "python":
        exec(block.text, {})
    else:
        run_shell(block.text)


def examples() -> dict[str, str]:
    """Return the example in the docstring of each public function and of what opens a folder."""
    public = {name: getattr(lf, name) for name in lf.__all__ if name[0].islower()}
    public |= {"Cohort.load": lf.Cohort.load, "FeatureStore.open": lf.FeatureStore.open}
    found = {name: DocTestParser().get_examples(doc.__doc__ or "") for name, doc in public.items()}
    return {name: "".join(each.source for each in lines) for name, lines in found.items()}


@pytest.mark.seconds
@pytest.mark.parametrize("name", examples())
def test_examples_of_docstrings_run(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_place(tmp_path)
    shutil.copytree(finished / "models", place / "models")
    shutil.copytree(finished / "cache", place / "cache")
    monkeypatch.chdir(place)
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda device: False)
    example = examples()[name]
    assert f"lf.{name}(" in example
    exec(example, {"lf": lf})


def test_readme_python_is_ten_lines() -> None:
    (block,) = (b for b in blocks() if (b.page, b.language) == ("README.md", "python"))
    assert len([line for line in block.text.splitlines() if line]) <= 10
