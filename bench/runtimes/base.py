"""What every runtime can do: say whether it is here, load an ONNX file, run it, and say truthfully what ran."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploy_prune.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


def called(path: Path) -> str:
    """How errors call the model of a file: its name without suffix, that of a decoder `s30/model`."""
    return f"{path.parent.name}/{path.stem}" if path.stem == "model" else path.stem


class Bound(ABC):
    """A session with its inputs already where the runtime wants them: calling it is what gets timed.

    A call returns only when the outputs are complete on the device.
    """

    @abstractmethod
    def __call__(self) -> None: ...

    @abstractmethod
    def outputs(self) -> list[np.ndarray]:
        """Host copies of what the last call computed; proves that the timed call is the model."""


class Session(ABC):
    """One loaded model."""

    name: str
    """How errors call the model (`called`)."""

    @property
    @abstractmethod
    def input_names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in graph order. Raises UsageError when the inputs do not fit the model."""

    @abstractmethod
    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound:
        """Copy `inputs` to the device once. Raises as `run`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What really runs, as JSON: runtime, device, providers, placement of nodes, version, every option set."""

    def check_names(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Raises UsageError unless exactly the model's inputs are given."""
        if set(inputs) != set(self.input_names):
            raise UsageError(
                "the inputs are not those of the model",
                where=self.name,
                expected=", ".join(self.input_names),
                got=", ".join(inputs) or "none",
                remedy="All models of one comparison must take the same inputs.",
            )


class Runtime(ABC):
    """A way to run ONNX files on one kind of device. Instances hold no state and import nothing heavy."""

    name: ClassVar[str]
    remedy: ClassVar[str]
    """How to get the runtime where it is missing."""
    on_cpu: ClassVar[bool] = False
    """Whether it runs on the CPU, always."""
    one_shape: ClassVar[bool] = False
    """Whether a session is built for the shapes it is bound to, so that others belong into a session of their own."""

    @abstractmethod
    def available(self) -> str | None:
        """None when the runtime works here, else the reason why not."""

    @abstractmethod
    def load(self, onnx_path: Path | str, *, threads: int | None = None) -> Session:
        """A ready session. `threads` counts CPU threads within one operator; None means every physical core.

        Raises UnavailableError when the model would not run where it was asked to, ArtifactError when the file is
        not a model this runtime can load.
        """
