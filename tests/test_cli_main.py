"""The command line's own behaviour: fast help, exit codes, words on stderr, one explanation per failure."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import deploy_prune
from deploy_prune import errors
from deploy_prune.cli import console
from deploy_prune.cli import main as cli_main

REPOSITORY = Path(deploy_prune.__file__).resolve().parents[1]


def command_line(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy_prune", *args], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | Callable[[], None]], int]:
    """Run `deploy-prune doctor` with a body that raises the given exception; return the exit code."""

    def run(failure: BaseException | Callable[[], None]) -> int:
        @click.command()
        def command() -> None:
            if isinstance(failure, BaseException):
                raise failure
            failure()

        monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda self, ctx, name: command)
        return cli_main.run_command(["doctor"])

    return run


def test_help_and_version_import_no_heavy_package() -> None:
    probe = (
        "import sys; from deploy_prune.cli.main import run_command; run_command(['--help']); import deploy_prune;"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'timm', 'rich', 'pydantic'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert command_line("--version").stdout.strip() == f"deploy-prune {deploy_prune.__version__}"


def test_help_takes_less_than_half_a_second_of_the_processor() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command_line("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_every_listed_command_has_a_module_with_that_command() -> None:
    for name in cli_main.COMMANDS:
        command = cli_main.cli.get_command(click.Context(cli_main.cli), name)
        assert isinstance(command, click.Command), name
        assert command.get_short_help_str(), name


def test_unknown_command_suggests_the_nearest_and_exits_2() -> None:
    done = command_line("serch")
    assert done.returncode == 2
    assert "Did you mean 'search'?" in done.stderr


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (errors.UsageError("no", where="x", expected="a", got="b", remedy="Do c."), 2, "expected: a"),
        (errors.ParityError("models differ"), 1, "ParityError: models differ"),
        (errors.ArtifactError("damaged", where="f"), 4, "ArtifactError: damaged in f"),
        (errors.UnavailableError("no GPU"), 3, "UnavailableError: no GPU"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 3, "no space left on the device in /x/y"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 3, "(Permission denied) in /x/y"),
        (MemoryError("Unable to allocate 9 GiB"), 3, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), 3, "CUDA out of memory."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ZeroDivisionError("division by zero"), 70, "This is a bug in deploy-prune"),
        (click.UsageError("bad option"), 2, "bad option"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_each_failure_has_its_exit_code_and_its_words_on_stderr(
    failing: Callable[[BaseException], int],
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    words: str,
) -> None:
    assert failing(failure) == code
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert ("Traceback" in printed.err) == (code == cli_main.EXIT_BUG)


def test_a_reader_that_stops_reading_is_not_a_failed_gate() -> None:
    script = (
        "import click, sys; from deploy_prune.cli import main as m\n"
        "command = click.Command('doctor', callback=lambda: [print('x' * 100) for _ in range(100000)])\n"
        "m.LazyGroup.get_command = lambda self, ctx, name: command\n"
        "m.main(['doctor'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == cli_main.EXIT_PIPE
    assert process.stderr.read() == ""


def test_a_foreign_bench_package_is_named(tmp_path: Path) -> None:
    foreign = tmp_path / "bench"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    script = "from deploy_prune.cli.main import main; main(['doctor'])"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert str(foreign) in done.stderr and "shadows" in done.stderr


def test_tables_are_plain_aligned_text_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(["name", "bytes"], [["dense", 1200], ["s50", 60]])
    assert capsys.readouterr().out == "name   bytes\n-----  -----\ndense   1200\ns50       60\n"


def test_progress_lines_carry_share_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    listener = console.LineProgress()
    listener.start(4, "search")
    monkeypatch.setattr(listener, "_started", listener._started - 9)
    listener.advance(1, note="loss 0.7")
    listener.finish()
    assert re.search(r"^search: 1/4 \(25 %\), 27\S* left, loss 0\.7$", capsys.readouterr().err, re.M)
    for steps, said in ((1, "ended at 1/4 after"), (4, "done in")):
        listener.start(4, "search")
        listener.advance(steps)
        monkeypatch.setattr(listener, "_started", listener._started - 9)
        listener.finish()
        assert f"search: {said} 9" in capsys.readouterr().err


def test_time_left_follows_from_the_steps_of_this_run_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    listener = console.LineProgress()
    listener.start(100, "search")
    listener.advance(90)  # resumed
    assert capsys.readouterr().err == "search: 90/100 (90 %)\n"
    monkeypatch.setattr(listener, "_started", listener._started - 10)
    listener.advance()
    assert "search: 91/100 (91 %), 1m30s left" in capsys.readouterr().err


def test_a_resumed_bar_counts_its_rate_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = console.BarProgress()
    bar.start(100, "search")
    try:
        bar.advance(90)
        (task,) = bar._bar.tasks
        assert (task.completed, task.time_remaining) == (90, None)
        bar.advance()
        assert task.completed == 91
    finally:
        bar.finish()


def test_quiet_silences_progress_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    try:
        console.note("hello")
        console.progress().start(3, "search")
        assert capsys.readouterr().err == ""
    finally:
        console.set_quiet(False)


def test_public_names_resolve_and_no_submodule_hides_one() -> None:
    submodules = {path.stem for path in Path(deploy_prune.__file__).parent.glob("*.py")}
    assert not submodules & set(deploy_prune.__all__)  # importing a submodule would bind it over the function
    for name in deploy_prune.__all__:
        assert getattr(deploy_prune, name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'serch'"):
        deploy_prune.serch  # noqa: B018
