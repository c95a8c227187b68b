"""Every command that writes, as a process: killed, beside another one, on a full or closed disk."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from signal import SIGSTOP

import click
import numpy as np
import pytest

from lymphfeat_cli.main import COMMANDS, cli
from tests.commands import RESUMING, WRITING, write_inputs
from tests.folders import contents
from tests.forks import CANNOT_MOUNT, Forked, Forks, forking
from tests.killing import Kill, Undisturbed, final, kill_and_finish, undisturbed

pytestmark = pytest.mark.seconds
pytest.importorskip("resource", reason="Windows has neither fork nor SIGKILL")

OVER_OLD = ("extract", "fit-head", "endtoend", "finalize")  # overwrite another result
# The others write in the same ways, and take longer.
QUICK = ("extract", "fit-head, model", "endtoend", "finalize", "audit", "predict", "synth")


def of_each(names: Iterable[str], *quick: str) -> pytest.MarkDecorator:
    """Run a test for every command; those that are not `quick` are slow."""
    slow = {name: () if name in quick else (pytest.mark.slow,) for name in names}
    each = [pytest.param(name, marks=marks) for name, marks in slow.items()]
    return pytest.mark.parametrize("name", each)


EACH = of_each(WRITING, *QUICK)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def forks(root: Path) -> Iterator[Forks]:
    with forking(root / "logs") as started:
        write_inputs(root, started)
        yield started


@pytest.fixture(scope="module")
def known() -> dict[str, Undisturbed]:
    return {}


@pytest.fixture
def place(root: Path, name: str, request: pytest.FixtureRequest) -> Path:
    """Return a new folder beside the inputs."""
    folder = root / f"{request.node.originalname} {name}".replace(",", "")
    (folder / "out").mkdir(parents=True)
    return folder


@pytest.fixture
def of(root: Path, forks: Forks, known: dict[str, Undisturbed], name: str) -> Undisturbed:
    """Return what the command writes when nothing happens."""
    if name not in known:
        known[name] = undisturbed(forks, root, WRITING[name], with_old=name in OVER_OLD)
    return known[name]


def check_refused(process: Forked, *said: str) -> None:
    """Check that a process ended with one line that says something, and with exit code 2."""
    assert process.wait() == 2, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("Error")]
    assert process.stderr.splitlines()[-1:] == errors, process.stderr
    for words in said:
        assert words in errors[0]


def test_every_command_that_writes_is_among_them() -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in COMMANDS}
    writing = {
        name
        for name, command in commands.items()
        if command and any("--force" in option.opts for option in command.params)
    }
    assert {command.words[0] for command in WRITING.values()} == writing


# --- killed ---------------------------------------------------------------------------------------


@of_each(RESUMING, *QUICK, "pretrain")
def test_killed_it_ends_with_the_same_bytes(
    name: str, root: Path, forks: Forks, of: Undisturbed
) -> None:
    rng = np.random.default_rng(sorted(RESUMING).index(name))
    early, late = rng.integers(1, of.changes), of.changes - rng.integers(0, of.changes // 10 + 1)
    kills = [Kill(change=int(early), seconds=0.005), Kill(change=int(late))]
    trial = kill_and_finish(
        forks, root / name, RESUMING[name], of, kills, over_old=name in OVER_OLD
    )
    assert trial.moments
    assert not trial.unfinished
    assert trial.same, trial


def test_a_run_whose_model_is_missing_only_gets_its_model(root: Path, forks: Forks) -> None:
    command, folder = RESUMING["fit-head, model"], root / "model missing"
    (folder / "out").mkdir(parents=True)
    killed = forks.start(folder, command.arguments, tree="out/model", change=3)
    assert killed.wait() == -9
    before = final(folder)
    assert before
    other = forks.start(folder, (*command.arguments, "--seed", "1"))
    check_refused(other, "out/result already holds a run")
    again = forks.start(folder, (*command.arguments, "--json"))
    assert again.wait() == 0, again.stderr
    assert "out/result holds this run already; only its model was missing." in again.stderr
    told = json.loads((again.log / "stdout").read_text())
    assert {f"out/{path}" for path in before} == set(told["files"])
    assert before.items() <= contents(folder / "out").items()
    assert "model/final.json" in contents(folder / "out")


def test_a_model_that_was_about_to_be_put_in_its_place_is_put_there(
    root: Path, forks: Forks
) -> None:
    command, folder = RESUMING["fit-head, model"], root / "model swapped"
    (folder / "out").mkdir(parents=True)
    killed = forks.start(folder, command.arguments, tree="out/model.partial/old", change=2)
    assert killed.wait() == -9
    assert (folder / "out" / "model.partial" / "swap.json").exists()
    check_refused(forks.start(folder, command.arguments), "out/model already holds a final model")
    assert {path.split("/")[0] for path in contents(folder / "out")} == {"model", "result"}


# --- two at once ----------------------------------------------------------------------------------


@EACH
def test_a_second_process_says_so_and_the_first_goes_on(
    name: str, place: Path, forks: Forks, of: Undisturbed
) -> None:
    command = WRITING[name]
    # Stopped at its first change on the disk after it has opened its lock.
    first = forks.start(place, command.arguments, sends=SIGSTOP, after="lock", change=1)
    assert first.wait(stopped=True) is None, "it has no lock"
    for force in ((), ("--force",)):
        second = forks.start(place, (*command.arguments, *force))
        check_refused(second, "another process is writing", "wait for it or choose another")
    first.go_on()
    assert first.wait() == 0, first.stderr
    assert contents(place / "out") == of.whole


# --- full and closed disks ------------------------------------------------------------------------


@EACH
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    name: str, place: Path, forks: Forks, of: Undisturbed
) -> None:
    command, sizes = WRITING[name], [len(text) for text in of.whole.values()]
    for share in (0.9, 0.3):
        limit = int(share * max(sizes))
        process = forks.start(place, command.arguments, file_size=limit)
        check_refused(process, "cannot be written (File too large); make room", "run the same line")
        assert re.search("Error: (out|cache)/", process.stderr)
        assert final(place).items() <= of.whole.items()
    again = forks.start(place, command.arguments)
    assert again.wait() == 0, again.stderr
    assert contents(place / "out") == of.whole


@EACH
def test_a_disk_without_a_free_byte_kills_nothing(name: str, place: Path, forks: Forks) -> None:
    process = forks.start(place, WRITING[name].arguments, mount="full")
    if process.wait() == CANNOT_MOUNT:
        pytest.skip("no mounts here")
    check_refused(process, "cannot be written (No space left on device", "make room")


@EACH
def test_a_closed_folder_is_one_line(name: str, place: Path, forks: Forks) -> None:
    process = forks.start(place, WRITING[name].arguments, mount="read-only")
    if process.wait() == CANNOT_MOUNT:
        pytest.skip("no mounts here")
    said = "cannot be written (Read-only file system); choose another --out"
    check_refused(process, "out/", said)


@EACH
def test_a_file_in_place_of_a_folder_is_one_line(name: str, place: Path, forks: Forks) -> None:
    command = WRITING[name]
    (place / "out").rmdir()
    (place / "out").write_text("mine")
    check_refused(forks.start(place, command.arguments), "Error: out")
    assert (place / "out").read_text() == "mine"
