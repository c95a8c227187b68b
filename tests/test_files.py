"""Results are there whole or not at all, wherever a process is killed; a user's files stay."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lymphfeat.errors import SettingsError
from lymphfeat.runtime.files import (
    check_file,
    files_in,
    recover,
    replace_files,
    result_files,
    result_folder,
    unfinished_folder,
)
from tests.folders import BESIDE, RESULTS, RUN, contents, names_in, rewrite, write


def make(
    out: Path,
    text: str,
    *names: str,
    force: bool = False,
    resumes: tuple[str, ...] = (),
    then: Callable[[], object] = lambda: None,
) -> None:
    with result_folder(out, RUN, force=force, resumes=resumes) as folder:
        write(folder, text, *(names or ("mark",)))
        then()


# --- what is written -----------------------------------------------------------------------------


def test_nothing_of_the_old_result_stays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    make(out, "old", "mark", "part-1/table", "extra")
    make(out, "new", "mark", "part-2/table", force=True)
    assert contents(tmp_path) == {"deep/run/mark": b"new", "deep/run/part-2/table": b"new"}
    assert files_in(out) == (out / "mark", out / "part-2" / "table")
    assert names_in(out.parent) == {"run"}


def fail(error: type[BaseException]) -> None:
    raise error("stop")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_result(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "run", "old")
    before = contents(tmp_path)
    with pytest.raises(error, match="stop"):
        make(tmp_path / "run", "new", force=True, then=lambda: fail(error))
    assert contents(tmp_path) == before
    assert names_in(tmp_path) == {"run"}


def test_checkpoints_outlive_an_error_and_go_with_success(tmp_path: Path) -> None:
    out, resumes = tmp_path / "run", ("checkpoint.pt",)

    def stop() -> None:
        (unfinished_folder(out) / "checkpoint.pt").write_text("state")
        fail(ValueError)

    kept = {"run.partial/checkpoint.pt": b"state"}
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"):
            make(out, "half", resumes=resumes, then=stop)
        assert contents(tmp_path) == kept
    message = r"checkpoint.pt belongs to an unfinished training of another kind"
    with pytest.raises(SettingsError, match=message):
        make(out, "other")
    assert contents(tmp_path) == kept
    make(out, "whole", resumes=resumes)
    assert contents(tmp_path) == {"run/mark": b"whole"}
    assert names_in(tmp_path) == {"run"}


def test_a_file_that_its_kind_does_not_name_is_a_bug(tmp_path: Path) -> None:
    make(tmp_path / "run", "old")
    with pytest.raises(AssertionError, match="table must be one of the files of a run"):
        make(tmp_path / "run", "new", "mark", "table", force=True)
    assert contents(tmp_path) == {"run/mark": b"old"}


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    with result_folder(tmp_path / "run", RUN, writes=False) as folder:
        assert not folder.exists()
    assert not names_in(tmp_path)


def test_files_and_what_belongs_to_them(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    rewrite(tmp_path, "page.html", "old")
    before = contents(tmp_path)
    assert set(before) == {"page.html", "page.csv", "page-plots/one.png"}
    with pytest.raises(SettingsError, match=r"page.html exists; choose another name"):
        result_files(page, BESIDE).__enter__()
    assert contents(tmp_path) == before
    rewrite(tmp_path, "page.html", "new")
    assert contents(tmp_path) == {"page.html": b"new", "page.csv": b"new"}
    assert names_in(tmp_path) == {"page.html", "page.csv"}


# --- what is in the way ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (("mark", "notes.txt"), r"run\) must be a new folder or a run; it holds notes.txt, which"),
        (("mark", "part-1/mine", "z"), "it holds part-1/mine and 1 more"),
        (("mark", "other/table"), "it holds other/table"),
        (("mark", "deep/part-1/table"), "it holds deep/part-1/table"),
        (("extra",), "it holds extra, which is not part of one"),
    ],
)
def test_what_is_not_ours_is_kept_even_by_force(
    tmp_path: Path, there: tuple[str, ...], message: str
) -> None:
    write(tmp_path / "run", "keep", *there)
    before = contents(tmp_path)
    with pytest.raises(SettingsError, match=message) as caught:
        make(tmp_path / "run", "new", force=True)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_an_empty_folder_and_litter_are_not_in_the_way(tmp_path: Path) -> None:
    write(tmp_path / "run", "", ".DS_Store")
    make(tmp_path / "run", "new")
    assert contents(tmp_path) == {"run/mark": b"new"}


def test_places_that_cannot_be_renamed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "real")
    for place in (tmp_path / "link", Path(), Path(".."), tmp_path / "real", Path("/")):
        with pytest.raises(SettingsError, match="must be a folder that can be renamed"):
            make(place, "new", force=True)
    with pytest.raises(SettingsError, match="must be a folder; got a file"):
        make(tmp_path / "file", "new", force=True)
    with pytest.raises(SettingsError, match="must be a file; got a folder"):
        check_file(tmp_path / "real", force=True)
    assert names_in(tmp_path) == {"real", "link", "file"}


def test_what_a_user_adds_meanwhile_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "run"
    make(out, "old")
    with pytest.raises(SettingsError, match=r"it holds notes.txt.*The new result is in .*new\."):
        make(out, "new", force=True, then=lambda: write(out, "keep", "notes.txt"))
    assert contents(tmp_path) == {
        "run/mark": b"old",
        "run/notes.txt": b"keep",
        "run.partial/new/run/mark": b"new",
    }
    (out / "notes.txt").unlink()
    make(out, "newer", force=True)
    assert contents(tmp_path) == {"run/mark": b"newer"}


def test_a_result_that_came_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(SettingsError, match="already holds a run"):
        make(out, "ours", then=lambda: write(out, "theirs", "mark"))
    assert contents(out) == {"mark": b"theirs"}


def test_another_process_at_the_same_result_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def second() -> None:
        before = contents(tmp_path)
        with pytest.raises(SettingsError, match="run: another process is writing it; wait"):
            make(out, "second", force=True)
        recover(out)
        assert contents(tmp_path) == before

    make(out, "first", then=second)
    assert contents(tmp_path) == {"run/mark": b"first"}
    assert names_in(tmp_path) == {"run"}


@pytest.mark.seconds
def test_a_reader_leaves_a_swap_to_the_process_that_is_about_it(tmp_path: Path) -> None:
    make(tmp_path / "run", "old")
    script = SCRIPT.replace("SIGKILL", "SIGSTOP")
    for number in range(1, 1000):
        line = [sys.executable, "-c", script, str(tmp_path), str(number), "run"]
        process = subprocess.Popen(
            line, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"change {number} was never made, nor any swap seen"
        waits = (tmp_path / "run.partial" / "swap.json").exists()
        if waits:
            before = contents(tmp_path)
            recover(tmp_path / "run")
            assert contents(tmp_path) == before
        process.send_signal(signal.SIGCONT)
        process.wait()
        if waits:
            break
    assert contents(tmp_path) == {"run/mark": b"new", "run/part-1/table": b"new"}


def test_a_lock_that_was_left_alone_is_removed(tmp_path: Path) -> None:
    make(tmp_path / "run", "old")
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "lock").touch()
    recover(tmp_path / "run")
    assert names_in(tmp_path) == {"run"}


def test_files_of_one_command_come_together_or_not_at_all(tmp_path: Path) -> None:
    def fail_late(path: Path) -> None:
        path.write_text("half")
        raise ValueError("stop")

    one, two = tmp_path / "one", tmp_path / "two"
    with pytest.raises(ValueError, match="stop"):
        replace_files({one: lambda path: path.write_text("1"), two: fail_late})
    assert not names_in(tmp_path)
    replace_files({one: lambda path: path.write_text("1"), two: lambda path: path.write_text("2")})
    assert contents(tmp_path) == {"one": b"1", "two": b"2"}


def test_strangers_among_the_unfinished_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "run.partial", "keep", "notes.txt")
    with pytest.raises(SettingsError, match=r"notes.txt is in the way"):
        make(tmp_path / "run", "new", force=True)
    assert contents(tmp_path) == {"run.partial/notes.txt": b"keep"}


# --- killed at every operation on the disk --------------------------------------------------------

SCRIPT = """
import signal, sys
from pathlib import Path
from tests.folders import rewrite
from tests.self_kill import kill_at

tree = sys.argv[1]

def counts(event, arguments):
    changes = event.startswith(("os.", "shutil.")) or (event == "open" and arguments[1] != "r")
    return changes and any(str(argument).startswith(tree) for argument in arguments)

kill_at(int(sys.argv[2]), counts, signal.SIGKILL)
rewrite(Path(tree), sys.argv[3], "new")
"""


@pytest.mark.seconds
@pytest.mark.parametrize("name", RESULTS)
def test_killed_anywhere_one_of_the_results_is_whole(name: str, tmp_path: Path) -> None:
    expected = {
        day: dict.fromkeys(names, day.encode()) for day, names in sorted(RESULTS[name].items())
    }
    found = []
    for number in range(1, 1000):
        root = tmp_path / str(number)
        root.mkdir()
        rewrite(root, name, "old")
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(root), str(number), name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        recover(root / name)  # as a reader does
        there = {path: text for path, text in contents(root).items() if ".partial/" not in path}
        assert there in expected.values(), f"killed before operation {number}: {there}"
        found.append(there == expected["new"])
        rewrite(root, name, "new")
        assert contents(root) == expected["new"]
        assert not unfinished_folder(root / name).exists()
    # The old result up to some operation, then the new one.
    assert found == sorted(found)
    assert {*found} == {False, True}
    assert len(found) > 20
