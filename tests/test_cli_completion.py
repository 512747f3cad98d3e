"""Shells complete what the command line knows; logs keep what was said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = "import sys; from deploy_prune.cli.main import main; sys.argv[0] = 'deploy-prune'; main()"


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *args], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_asks_deploy_prune(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0 and f"_DEPLOY_PRUNE_COMPLETE={shell}_complete" in done.stdout


def test_commands_are_completed() -> None:
    done = run(_DEPLOY_PRUNE_COMPLETE="bash_complete", COMP_WORDS="deploy-prune ver", COMP_CWORD="1")
    assert done.stdout.split() == ["plain,verify"]


def test_errors_are_kept_in_the_log_file(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = run("--log-file", str(log), "-q", "verify", str(tmp_path / "nowhere"))
    assert done.returncode == 3
    assert "nowhere" in log.read_text() and "ERROR" in log.read_text()


def test_a_log_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = run("--log-file", str(tmp_path / "none" / "run.log"), "doctor")
    assert done.returncode == 3 and "log cannot be written" in done.stderr


def test_a_log_that_no_longer_takes_a_line_ends_the_command(tmp_path: Path) -> None:
    done = run("--log-file", "/dev/full", "verify", str(tmp_path / "nowhere"), "--json")
    assert done.returncode == 3 and "Traceback" not in done.stderr and "no such" in done.stderr
    script = (
        "from deploy_prune.cli import console\nfrom deploy_prune.cli.main import run_command\n"
        "import click, deploy_prune.cli.main as m\n"
        "command = click.Command('doctor', callback=lambda: console.note('a line'))\n"
        "m.LazyGroup.get_command = lambda self, ctx, name: command\n"
        "raise SystemExit(run_command(['--log-file', '/dev/full', 'doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "the log cannot be written in /dev/full" in done.stderr
