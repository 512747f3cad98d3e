"""What a long computation has reached, kept in files, so that a killed one goes on where it was.

    state = saved.load("fisher")                     # None at first
    ...
    if saved.due():
        saved.save("fisher", tensors, {"done": 12})

One safetensors file per name, written whole; its metadata says what it was made from. In a run of several processes the
main one writes, and all read the same.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.errors import ArtifactError
from deploy_prune.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

MINUTES = 5.0  # between two savings, unless asked otherwise
_TYPE, _VERSION = "SavedState", "1"
_PROCESS = re.compile(r"(\d+)\|(.*)", re.DOTALL)


@dataclass(frozen=True)
class State:
    """What was saved: tensors on the CPU and JSON data."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class SavedState:
    """The states of one computation in `directory` (None: nothing is kept), saved at most every `minutes`.

    `identity` names all that the computation depends on; states of another identity are not taken up.
    """

    def __init__(self, directory: Path | None = None, identity: str = "", minutes: float = MINUTES) -> None:
        self.directory, self.identity, self.minutes = directory, identity, minutes
        self._last = time.monotonic()

    def part(self, name: str) -> SavedState:
        """The states of one part of the computation, in a directory of their own."""
        directory = None if self.directory is None else self.directory / re.sub(r"[^A-Za-z0-9]+", "-", name)
        return SavedState(directory, self.identity, self.minutes)

    def narrowed(self, identity: str) -> SavedState:
        """The same place, for a computation that depends on `identity` as well."""
        return SavedState(self.directory, f"{self.identity}|{identity}", self.minutes)

    def load(self, name: str) -> State | None:
        """The state last saved under `name`; None when there is none of this identity.

        Of one saved `per_process`, each process gets its own, also when there are fewer or more processes now: then the
        tensors of several are summed. Raises ArtifactError for a damaged file.
        """
        if self.directory is None:
            return None
        file = self._file(name)
        state = distributed.from_main(lambda: _read(file, self.identity))
        if state is None or not any(_PROCESS.match(key) for key in state.tensors):
            return state
        own: dict[str, Tensor] = {}
        for key, tensor in state.tensors.items():
            match = _PROCESS.match(key)
            assert match is not None
            if int(match[1]) % distributed.count() == distributed.index():
                own[match[2]] = own[match[2]] + tensor if match[2] in own else tensor
        return State(own, state.facts)

    def due(self) -> bool:
        """Whether it is time to save again; the same answer in every process, so all must ask."""
        if self.directory is None:
            return False
        return distributed.broadcast(time.monotonic() - self._last >= 60 * self.minutes)

    def save(
        self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, per_process: bool = False
    ) -> None:
        """Replace the state of `name`. `per_process`: each process holds sums of its own, and all are kept.

        Raises UnavailableError when the disk is full.
        """
        if self.directory is None:
            return
        tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
        if per_process:
            gathered = distributed.gather(tensors)
            tensors = {f"{i}|{key}": t for i, own in enumerate(gathered) for key, t in own.items()}
        distributed.from_main(lambda: self._write(self._file(name), tensors, facts))
        self._last = time.monotonic()

    def clear(self) -> None:
        """Forget every state: the computation is complete and its result is stored."""
        if self.directory is not None and distributed.is_main():
            shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / (re.sub(r"[^A-Za-z0-9]+", "-", name) + ".safetensors")

    def _write(self, file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        metadata = {"_type": _TYPE, "_version": _VERSION, "identity": self.identity, "facts": json.dumps(dict(facts))}
        with atomic_file(file) as temporary:
            save_file(dict(tensors), temporary, metadata)


def _read(file: Path, identity: str) -> State | None:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("_type") != _TYPE or metadata.get("_version") != _VERSION:
                raise ValueError(f"type {metadata.get('_type')} version {metadata.get('_version')}")
            if metadata["identity"] != identity:
                return None
            return State({key: stream.get_tensor(key) for key in stream.keys()}, json.loads(metadata["facts"]))  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(
            "not a whole saved state", where=str(file), got=str(error)[:200], remedy="Start again with --fresh."
        ) from error
