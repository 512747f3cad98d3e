"""Ctrl-C and SIGTERM that are not lost.

Python drops the exception of a signal whose handler runs in a finaliser or in the callback of a weak reference, and a
trace by torch makes thousands of those. So the signal is remembered, and the next `check` raises it again: every stage
of a run and every step of a progress has one.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_came = False


@contextmanager
def remembered() -> Iterator[None]:
    """Both signals raise KeyboardInterrupt within the block and are remembered. A Ctrl-C that is ignored or handled
    otherwise stays so; outside the main thread, which alone may set handlers, nothing changes."""
    global _came
    wanted = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        wanted.append(signal.SIGINT)
    try:
        before = {signum: signal.signal(signum, _interrupt) for signum in wanted}
    except ValueError:
        before = {}
    _came = False
    try:
        yield
    finally:
        _came = False
        for signum, handler in before.items():
            signal.signal(signum, handler)


def check() -> None:
    """Raise KeyboardInterrupt if a signal came within the block of `remembered` that is open."""
    if _came:
        raise KeyboardInterrupt


def _interrupt(signum: int, frame: object) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt
