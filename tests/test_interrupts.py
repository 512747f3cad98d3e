"""A Ctrl-C that Python drops ends the run all the same."""

from __future__ import annotations

import os
import signal
import threading
import weakref
from pathlib import Path

import pytest

from deploy_prune import interrupts
from deploy_prune.cli.console import BarProgress, LineProgress
from deploy_prune.pipeline.workspace import open_workspace
from deploy_prune.progress import NoProgress


class Thing:
    pass


@pytest.fixture(autouse=True)
def ctrl_c():
    """As a process has it that was started by hand: tests may run where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_where_python_drops_it(signum: signal.Signals) -> None:
    thing = Thing()
    seen = []

    def gone(_: object) -> None:
        seen.append(signum)
        os.kill(os.getpid(), signum)
        sum(range(1000))  # the handler runs here, and what it raises goes nowhere

    held = weakref.ref(thing, gone)
    del thing
    assert seen == [signum] and held() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_python_dropped_is_raised_by_the_next_check(signum):
    with interrupts.remembered():
        interrupts.check()
        interrupted_where_python_drops_it(signum)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    with interrupts.remembered():
        interrupts.check()  # forgotten


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("listener", [NoProgress, LineProgress, BarProgress])
def test_every_step_of_a_progress_checks(listener):
    progress = listener()
    with interrupts.remembered():
        progress.start(2, "work")
        progress.advance()
        interrupted_where_python_drops_it(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress.advance()
        progress.finish()
    progress.start(2, "other work of the process")
    progress.advance()  # what ended the command is none of its business
    progress.finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stage_whose_interrupt_was_dropped_is_the_last(tmp_path: Path):
    def work(directory: Path) -> None:
        interrupted_where_python_drops_it(signal.SIGINT)
        (directory / "file").write_text("whole")

    with (
        pytest.raises(KeyboardInterrupt),
        interrupts.remembered(),
        open_workspace(tmp_path / "out", "new", is_output=lambda path: False, note=lambda text: None) as workspace,
    ):
        workspace.stage("one", {}, work)
        pytest.fail("the run went on")
    assert (tmp_path / "out.work" / "one" / "file").read_text() == "whole"


def test_handlers_are_put_back_and_an_ignored_ctrl_c_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.remembered():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before
        os.kill(os.getpid(), signal.SIGINT)
        interrupts.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_changes_nothing():
    found = []

    def run() -> None:
        with interrupts.remembered():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
