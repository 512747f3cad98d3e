"""What the user sees: results on stdout, everything else on stderr, colours only where a person is looking.

Nothing here imports rich until there is something to draw on a terminal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploy_prune import interrupts
from deploy_prune.progress import SILENT, Progress

if TYPE_CHECKING:
    from deploy_prune.errors import UnavailableError

LINE_EVERY = 10.0  # seconds between progress lines where no bar can be drawn: enough for a CI log, not more
AT_ONCE = 0.05  # seconds; what is told of so soon after the start was done by an earlier run: no rate follows from it
_quiet = False
_for_good = False
_notes = logging.getLogger("deploy-prune")
_notes.propagate = False  # what it says is on stderr already
_notes.addHandler(logging.NullHandler())


def set_quiet(quiet: bool, *, for_good: bool = False) -> None:
    """Silence progress and notes (`-q`); results and errors are always printed. `for_good`: later calls do not undo
    it."""
    global _quiet, _for_good
    _for_good = _for_good or for_good
    _quiet = quiet or _for_good


def log(verbose: int, file: str | None) -> None:
    """Library logs to stderr with -v (-vv: debug logs too), and with `file`, next to our own notes, to its end.

    Raises UnavailableError when the file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()] if verbose else []
    if file:
        try:
            kept = _LogFile(file, encoding="utf-8")
        except OSError as error:
            raise _unwritten(file, error) from error
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(kept)
        _notes.addHandler(kept)
        _notes.setLevel(logging.INFO)
    logging.basicConfig(
        level=logging.DEBUG if verbose > 1 else logging.INFO, format="%(name)s: %(message)s", handlers=handlers
    )


class _LogFile(logging.FileHandler):
    """A log that was asked for is written or the command fails: logging itself would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        with contextlib.suppress(OSError):  # what it still holds fails again
            if self.stream is not None:
                self.stream.close()
        logging.getLogger().removeHandler(self)
        _notes.removeHandler(self)
        raise _unwritten(self.baseFilename, error) from error


def _unwritten(file: str, error: BaseException | None) -> UnavailableError:
    from deploy_prune.errors import UnavailableError

    return UnavailableError("the log cannot be written", where=file, got=getattr(error, "strerror", None) or str(error))


def note(text: str) -> None:
    """One line for the person at the terminal and for the log; not part of the result."""
    _notes.info("%s", text)
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def emit_json(data: Any) -> None:
    """The result of a `--json` command: one sorted JSON document on stdout."""
    print(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print `rows` under `columns` on stdout; aligned plain text when stdout is not a terminal."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title or None, box=SIMPLE_HEAD)
        for column, right in zip(columns, numeric, strict=True):
            drawn.add_column(column, justify="right" if right else "left")
        for row in cells:
            drawn.add_row(*map(Text, row))
        Console().print(drawn)
        return
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    if title:
        print(title)
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, numeric, strict=True)]
        print("  ".join(padded).rstrip())


def facts(pairs: Mapping[str, Any], *, title: str = "") -> None:
    """Print names and values, one per line, on stdout."""
    if title:
        print(title)
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        print(f"  {name.ljust(width)}  {value}")


def progress() -> Progress:
    """The listener for long work: a bar with ETA on a terminal, a line now and then elsewhere, silence under -q."""
    if _quiet:
        return SILENT
    return BarProgress() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else LineProgress()


class LineProgress:
    """Writes `label: 120/400 (30 %), 1m10s left, loss 0.71` to stderr every few seconds."""

    def __init__(self) -> None:
        self._label = ""
        self._total: int | None = None
        self._done = self._before = 0
        self._started = self._printed = 0.0

    def start(self, total: int | None, label: str) -> None:
        self._label, self._total, self._done, self._before = label, total, 0, 0
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        interrupts.check()
        now = time.monotonic()
        if self._done == 0 and now - self._started < AT_ONCE:
            self._before = steps
        self._done += steps
        if now - self._printed < LINE_EVERY:
            return
        self._printed = now
        line = f"{self._label}: {self._done}"
        if self._total:
            line += f"/{self._total} ({100 * self._done / self._total:.0f} %)"
            if self._done > self._before:
                left = (now - self._started) / (self._done - self._before) * (self._total - self._done)
                line += f", {duration(left)} left"
        print(line + (f", {note}" if note else ""), file=sys.stderr, flush=True)

    def finish(self) -> None:
        took = time.monotonic() - self._started
        if took >= 1:
            part = self._total is not None and self._done < self._total  # stopped, or enough was found
            how = f"ended at {self._done}/{self._total} after" if part else "done in"
            print(f"{self._label}: {how} {duration(took)}", file=sys.stderr, flush=True)


class BarProgress:
    """One rich bar on stderr with elapsed time, ETA and the latest note."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._begun = 0.0

    def start(self, total: int | None, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.finish()
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task, self._begun = self._bar.add_task(label, total=total, note=""), time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        interrupts.check()
        if self._bar is None:
            return
        if self._bar.tasks[0].completed == 0 and time.monotonic() - self._begun < AT_ONCE:
            self._bar.reset(self._task, completed=steps)  # the rate counts from here
            steps = 0
        self._bar.update(self._task, advance=steps, **({"note": note} if note else {}))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """`75` -> "1m15s", `0.4` -> "0.4s"."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _is_number(text: str) -> bool:
    return text == "" or text.strip("-+ %×x").replace(".", "").replace(",", "").replace("e", "").isdigit()
