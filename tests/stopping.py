"""Interruptions at a step that a test chooses."""

from __future__ import annotations


class StopAt:
    """A listener that interrupts when it has been told of `count` steps of `label` (None: of anything)."""

    def __init__(self, label: str | None, count: int) -> None:
        self.label, self.count, self.seen = label, count, 0
        self.current = ""
        self.steps: dict[str, int] = {}

    def start(self, total: int | None, label: str) -> None:
        self.current = label

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps[self.current] = self.steps.get(self.current, 0) + steps
        if self.label in (None, self.current):
            self.seen += steps
            if self.seen >= self.count:
                raise KeyboardInterrupt

    def finish(self) -> None:
        return
