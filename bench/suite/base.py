"""What the checks share: where they run, the models and files made so far, and how near answers must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.suite.files import Files
from bench.suite.jobs import Jobs
from bench.suite.models import Member, Subject, half_of, subjects
from converters.onnx_session import Device
from deploy_prune.errors import ParityError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

ERROR = {"fp32": 2e-4, "refit": 1e-2, "tf32": 5e-3, "fp16": 2e-2, "bf16": 1e-1}  # of the largest output


@dataclass
class Bench:
    """What the checks share: where they run, and the models and files made so far."""

    small: bool
    device: Device
    runtime: str
    directory: Path
    seconds: float
    jobs: Jobs
    members: dict[str, tuple[Subject, nn.Module, Member]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> dict[str, Any]:
        """A check's results, which are kept also when it fails later."""
        self.found = {}
        return self.found

    @property
    def align(self) -> int:
        return 8 if self.small else 64

    def subject(self, name: str) -> tuple[Subject, nn.Module, Member]:
        """A model and its half, made once."""
        if name not in self.members:
            subject = next(s for s in subjects(self.small) if s.name == name)
            dense = subject.build()
            self.members[name] = (subject, dense, half_of(dense, subject.signature, self.align))
        return self.members[name]

    def cells(self, subject: Subject) -> tuple[tuple[int, int | None], ...]:
        """Where a model is timed; small, in one cell alone."""
        return subject.cells[-1:] if self.small else subject.cells

    @property
    def graphs(self) -> str:
        """The runtime that replays CUDA graphs; without a GPU the plain one again."""
        return self.runtime if self.small else f"{self.runtime}-graph"

    @cached_property
    def files(self) -> Files:
        """Being made from the first time they are asked for."""
        return Files(self.jobs, self.small, self.align, self.directory)


def all_well(failed: list[str]) -> None:
    if failed:
        raise ParityError("some do not run as they should", problems=failed, remedy="The results say why.")


def close(own: np.ndarray, expected: np.ndarray, kind: str, where: str) -> float:
    import numpy as np

    off = float(np.abs(own.astype(np.float64) - expected).max() / max(1e-9, float(np.abs(expected).max())))
    if not off <= ERROR[kind]:
        raise ParityError("the answers differ", where=where, expected=f"within {ERROR[kind]:g}", got=f"{off:.2e}")
    return off
