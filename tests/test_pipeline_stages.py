"""Stages: whole or absent, reused only for the same inputs; nothing foreign is touched; a kill loses one stage."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy_prune.errors import UnavailableError, UsageError
from deploy_prune.pipeline.workspace import Mode, Workspace, discard, open_workspace, work_directory

# Three stages, each named in a log when it is really done; the last becomes the output. Killed by the test.
SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
from pathlib import Path
from deploy_prune.cli.main import cli, run_command
import click
from deploy_prune.pipeline.workspace import open_workspace

out, mode, pause, log = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])

def body():
    with open_workspace(out, mode, is_output=lambda path: (path / "whole").exists()) as workspace:
        previous = ""
        for name in ("one", "two", "three"):
            def work(directory):
                (directory / "data").write_text(previous + name)
                if name == pause:
                    print("ready", flush=True)
                    time.sleep(60)
                (directory / "whole").touch()
                log.open("a").write(name + chr(10))
            stage = workspace.stage(name, {"after": previous}, work)
            previous = stage.fingerprint
        workspace.finish(stage)

from deploy_prune.cli import main as m
m.LazyGroup.get_command = lambda self, ctx, name: click.Command("run", callback=body)
sys.exit(run_command(["run"]))
"""


def is_ours(path: Path) -> bool:
    return (path / "whole").exists()


def opened(out: Path, mode: Mode = "new") -> Any:
    return open_workspace(out, mode, is_output=is_ours)


def make(workspace: Workspace, name: str, inputs: dict[str, Any], text: str = "x") -> bool:
    """Make a stage holding one file; True when it was reused."""
    stage = workspace.stage(name, inputs, lambda directory: (directory / "whole").write_text(text) and None)
    return stage.reused


def test_a_stage_is_reused_for_equal_inputs_and_made_again_for_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out) as workspace:
        assert make(workspace, "path", {"seed": 0}) is False
    with opened(out, "resume") as workspace:
        assert make(workspace, "path", {"seed": 0}) is True
        assert make(workspace, "path", {"seed": 1}) is False
        assert make(workspace, "path", {"seed": 0}) is False  # one result per stage: the last


@pytest.mark.parametrize("damaged", ["half", "whole tex_"])
def test_a_stage_with_a_damaged_file_is_made_again(tmp_path: Path, damaged: str) -> None:
    out = tmp_path / "out"
    with opened(out) as workspace:
        make(workspace, "path", {}, text="whole text")
    (work_directory(out) / "path" / "whole").write_text(damaged)
    with opened(out, "resume") as workspace:
        assert make(workspace, "path", {}) is False


def test_a_failing_stage_leaves_nothing_of_itself_and_keeps_the_others(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), opened(out) as workspace:
        make(workspace, "path", {})
        workspace.stage("members", {}, fail)
    assert {p.name for p in work_directory(out).iterdir()} == {"path", "lock", "workspace.json"}
    assert not out.exists()


def test_the_output_appears_whole_and_the_workspace_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out) as workspace:
        stage = workspace.stage("bundle", {}, lambda directory: (directory / "whole").touch())
        workspace.finish(stage)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["whole"]


@pytest.mark.parametrize("mode", ["new", "resume", "fresh"])
def test_an_output_that_holds_something_else_is_never_touched(tmp_path: Path, mode: Mode) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="a directory with other files"), opened(out, mode):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.tex"]


@pytest.mark.parametrize("mode", ["new", "resume", "fresh"])
def test_a_workspace_that_holds_something_else_is_never_touched(tmp_path: Path, mode: Mode) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "notes").write_text("mine")
    with pytest.raises(UsageError, match="the workspace is taken"), opened(out, mode):
        pass
    assert (tmp_path / "out.work" / "notes").read_text() == "mine"
    discard(tmp_path / "out.work")
    assert (tmp_path / "out.work" / "notes").exists()


def test_an_earlier_output_of_ours_is_replaced_only_with_fresh(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "whole").write_text("old")
    with pytest.raises(UsageError, match="--fresh"), opened(out):
        pass
    with opened(out, "fresh") as workspace:
        stage = workspace.stage("bundle", {}, lambda directory: (directory / "whole").write_text("new") and None)
        assert (out / "whole").read_text() == "old"  # until the new one is whole
        workspace.finish(stage)
    assert (out / "whole").read_text() == "new"


@pytest.mark.parametrize("out", [".", "", "/", "runs/.."])
def test_an_output_without_a_name_is_refused(out: str) -> None:
    with pytest.raises(UsageError, match="a name of its own"):
        work_directory(Path(out))


def test_an_empty_output_directory_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with opened(out) as workspace:
        workspace.finish(workspace.stage("bundle", {}, lambda directory: (directory / "whole").touch()))
    assert is_ours(out)


def test_an_unfinished_run_is_named_and_fresh_starts_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out) as workspace:
        make(workspace, "path", {})
    with pytest.raises(UsageError, match="whole stages: path"), opened(out):
        pass
    with opened(out, "fresh") as workspace:
        assert make(workspace, "path", {}) is False


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out), pytest.raises(UnavailableError, match="another run"), opened(out, "resume"):
        pass


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "rename", "fsync"])
def test_a_full_disk_says_so_exits_3_and_leaves_no_half_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "out"
    with opened(out) as workspace:
        make(workspace, "path", {})
        with monkeypatch.context() as patch, pytest.raises(UnavailableError, match="no space left") as caught:
            patch.setattr(os, call, full_disk)
            make(workspace, "members", {})
        assert caught.value.exit_code == 3 and "--resume" in str(caught.value)
    assert {p.name for p in work_directory(out).iterdir()} == {"path", "lock", "workspace.json"}
    with opened(out, "resume") as workspace:
        assert make(workspace, "path", {}) is True


def test_a_full_disk_is_recognised_in_the_words_of_a_rust_library(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UnavailableError, match="no space left"), opened(tmp_path / "out") as workspace:
        workspace.stage("path", {}, write)


def test_a_stage_that_cannot_read_its_input_does_not_complain_of_writing(tmp_path: Path) -> None:
    def read(directory: Path) -> None:
        (tmp_path / "elsewhere" / "data.csv").read_text()

    with pytest.raises(FileNotFoundError), opened(tmp_path / "runs" / "out") as workspace:
        workspace.stage("path", {}, read)


Starter = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Starter:
    def run(mode: str, pause: str = "") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), mode, pause, str(tmp_path / "log")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def at_pause(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.mark.parametrize("pause", ["one", "two", "three"])
def test_a_run_killed_in_any_stage_leaves_no_output_and_goes_on_from_the_last_whole_stage(
    tmp_path: Path, start: Starter, pause: str
) -> None:
    process = start("new", pause)
    at_pause(process)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert start("resume").wait(timeout=60) == 0
    assert (tmp_path / "log").read_text().split() == ["one", "two", "three"]  # each was done once
    assert [p.name for p in tmp_path.iterdir() if p.name != "log"] == ["out"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_leaves_no_temporary_file_and_can_be_resumed(
    tmp_path: Path, start: Starter, signum: signal.Signals
) -> None:
    process = start("new", "two")
    at_pause(process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in err and "Traceback" not in err
    assert {p.name for p in (tmp_path / "out.work").iterdir()} == {"one", "lock", "workspace.json"}
    assert start("resume").wait(timeout=60) == 0


def test_a_run_killed_at_random_moments_ends_with_the_whole_output(tmp_path: Path, start: Starter) -> None:
    for delay in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        process = start("resume")
        time.sleep(delay)
        process.kill()
        process.wait()
        out = tmp_path / "out"
        assert not out.exists() or {p.name for p in out.iterdir()} == {"data", "whole"}
    if not (tmp_path / "out").exists():
        assert start("resume").wait(timeout=60) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"data", "whole"}
