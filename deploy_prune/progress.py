"""How long work tells what it is doing: three calls that library code may make without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, TypeVar

from deploy_prune import interrupts

T = TypeVar("T")


class Progress(Protocol):
    """One task at a time per `start`; a listener may draw a bar, print lines or do nothing.

    progress.start(total=400, label="search")  # total None: length unknown
    progress.advance(1, note="loss 0.71")      # note: one short current value
    progress.finish()
    """

    def start(self, total: int | None, label: str) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self) -> None: ...


class NoProgress:
    """Listens to nothing; as every listener of the command line, it lets no interrupt pass."""

    def start(self, total: int | None, label: str) -> None:
        del total, label

    def advance(self, steps: int = 1, note: str = "") -> None:
        del steps, note
        interrupts.check()

    def finish(self) -> None:
        return


SILENT: Progress = NoProgress()


def track(items: Iterable[T], progress: Progress | None, label: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, advancing `progress` after each; `progress` None is silent."""
    listener = progress or SILENT
    if total is None and isinstance(items, Sized):
        total = len(items)
    listener.start(total, label)
    try:
        for item in items:
            yield item
            listener.advance()
    finally:
        listener.finish()
