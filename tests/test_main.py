"""The command group: light start, option defaults from a file, errors in one line."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import lymphfeat
from lymphfeat_cli.main import COMMANDS, cli
from tests.stores import made_up_cohort, write_store

ROOT = Path(__file__).parent.parent
BACKBONES = {"timm", "torchvision"}
HEAVY = {"torch", "numpy", "pandas", "h5py", "timm", "sklearn", "matplotlib", "PIL"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


# --- help ----------------------------------------------------------------------------------------


def imported_by(*lines: str) -> set[str]:
    """Return the modules that a fresh interpreter holds after running `lines`."""
    program = "\n".join(["import sys", *lines, "print('\\n' + ' '.join(sys.modules))"])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_is_light() -> None:
    modules = imported_by(
        "from click.testing import CliRunner",
        "from lymphfeat_cli.main import COMMANDS, cli",
        "for line in ([], *([name] for name in COMMANDS)):",
        "    assert CliRunner().invoke(cli, [*line, '--help']).exit_code == 0, line",
    )
    assert "lymphfeat_cli" in modules
    assert not modules & HEAVY


def test_a_store_is_described_without_torch(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5")
    modules = imported_by(
        "from click.testing import CliRunner",
        "from lymphfeat_cli.main import cli",
        f"for path in ({str(tmp_path / 's.h5')!r}, 'gone'):",
        "    CliRunner().invoke(cli, ['info', path])",
    )
    assert "h5py" in modules
    assert not modules & {"torch", "timm", "sklearn", "scipy", "matplotlib"}


@pytest.mark.seconds
@pytest.mark.parametrize("agg", ["topk", "attention"])
def test_heads_are_fitted_without_what_is_slow_to_import(tmp_path: Path, agg: str) -> None:
    write_store(tmp_path / "s.h5", made_up_cohort([1] * 12))
    modules = imported_by(
        "from click.testing import CliRunner",
        "from lymphfeat_cli.main import cli",
        "options = '--folds 3 --seeds 1 --epochs 1 --device cpu --threads 1 --precision float32'",
        f"line = ['fit-head', '--store', {str(tmp_path / 's.h5')!r}, '--agg', {agg!r}]",
        f"line += [*options.split(), '--out', {str(tmp_path / 'run')!r}]",
        "done = CliRunner().invoke(cli, line)",
        "assert done.exit_code == 0, done.output",
    )
    assert "torch" in modules
    assert not modules & {*BACKBONES, "sklearn", "scipy.stats", "scipy.optimize", "torch._dynamo"}


@pytest.mark.seconds
def test_training_does_not_wait_for_figures(tmp_path: Path) -> None:
    write_store(tmp_path / "s.h5", made_up_cohort([1] * 12))
    modules = imported_by(
        "import lymphfeat as lf",
        "settings = dict(folds=3, seeds=1, device='cpu', threads=1, precision='float32')",
        "def stop(done, total, text=''):",
        "    if done: raise KeyboardInterrupt",
        "try:",
        f"    lf.fit_heads({str(tmp_path / 's.h5')!r}, settings=lf.FitSettings(**settings),",
        f"        out={str(tmp_path / 'run')!r}, progress=stop)",
        "except KeyboardInterrupt:",
        "    pass",
        "else:",
        "    raise AssertionError('nothing was trained')",
    )
    assert "lymphfeat.heads.engine.ranking" in modules
    assert "matplotlib" not in modules


def test_help_lists_every_command() -> None:
    text = run("--help").stdout
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line[:30])}", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert f"lymphfeat {name}" in (command.epilog or ""), "an example"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            known = parameter.help or parameter.show_default or parameter.type.name == "choice"
            assert known, parameter.name
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"--json", "--quiet"} <= flags
    assert run(name, "--help").exit_code == 0


def test_version() -> None:
    assert run("--version").stdout == f"lymphfeat, version {lymphfeat.__version__}\n"


def test_unknown_command() -> None:
    result = run("extrac")
    assert result.exit_code == 2
    assert "No such command 'extrac'" in result.stderr


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lymphfeat_cli", "--version"],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert lymphfeat.__version__ in done.stdout


# --- lymphfeat.toml ------------------------------------------------------------------------------


def configure(text: str, name: str = "lymphfeat.toml") -> None:
    Path(name).write_text(text, encoding="utf-8")


def test_defaults_come_from_the_file(here: Path) -> None:
    write_store(here / "s.h5")
    assert not run("info", "s.h5").stdout.startswith("{")
    configure("[info]\njson = true\n")
    assert run("info", "s.h5").stdout.startswith("{")
    configure("[info]\njson = false\n", "other.toml")
    assert not run("--config", "other.toml", "info", "s.h5").stdout.startswith("{")


def test_the_command_line_wins() -> None:
    configure('[extract]\nbackbone = "resnet81"\ncohort = "nowhere"\noutput-stride = "8"\n')
    assert "cohort folder nowhere does not exist" in run("extract").stderr
    assert "cohort folder here does" in run("extract", "--cohort", "here").stderr


def test_values_are_checked_as_on_the_command_line() -> None:
    configure("[extract]\nviews = 7\n")
    result = run("extract")
    assert result.exit_code == 2
    assert "7 is not in the range 1<=x<=4" in result.stderr
    for day in ("2020-02-03", '"2020-02-03"'):
        configure(f'[extract]\nreference-date = {day}\ncohort = "nowhere"\n')
        assert "cohort folder nowhere does not exist" in run("extract").stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[extrat]\nviews = 2\n", "lymphfeat.toml: [extrat] must be a table named after a command"),
        ("views = 2\n", "lymphfeat.toml: [views] must be a table named after a command"),
        ("extract = 2\n", "lymphfeat.toml: [extract] must be a table named after a command"),
        ("[extract]\nveiws = 2\n", "[extract] has no option veiws; see `lymphfeat extract --help`"),
        ("[extract\n", "lymphfeat.toml is not valid TOML"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str) -> None:
    configure(text)
    result = run("info", "s.h5")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_file_that_is_not_utf_8() -> None:
    Path("lymphfeat.toml").write_bytes(b"# \xe4\n")
    assert "lymphfeat.toml is not valid TOML" in run("info", "s.h5").stderr


def test_named_file_must_be_there() -> None:
    result = run("--config", "gone.toml", "info", "s.h5")
    assert result.exit_code == 2
    assert "gone.toml" in result.stderr


# --- errors --------------------------------------------------------------------------------------


def test_a_mistake_is_one_line_and_2() -> None:
    result = run("info", "gone")
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: path (=gone) must be a feature store, a run or a model folder.\n"
    )
    assert result.stdout == ""


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "info", "gone")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("a run or a model folder.\n")


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    def fail(path: Path, verify: bool) -> None:
        raise error

    monkeypatch.setattr("lymphfeat.inspection.inspect", fail)
    return run("info", "x")


def test_a_full_disk_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(OSError(28, "No space left on device", "s.h5"), monkeypatch)
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: s.h5: cannot be written (No space left on device); make room, then run the same "
        "line again: finished work is kept.\n"
    )


def test_another_fault_of_the_system_is_one_line_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(OSError(24, "Too many open files", "s.h5"), monkeypatch)
    assert result.exit_code == 1
    assert result.stderr == "Error: [Errno 24] Too many open files: 's.h5'\n"


def test_interruption_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(KeyboardInterrupt(), monkeypatch)
    assert result.exit_code == 1
    assert "Interrupted. Finished work is kept; run the same command again." in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(ZeroDivisionError("bug"), monkeypatch)
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_closed_pipe_ends_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lymphfeat_cli", "--help"],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1
