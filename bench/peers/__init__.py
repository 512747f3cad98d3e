"""Other tools on the same model, calibration data and budget: each prunes with its own code and leaves a smaller model.

To add one: a file beside this that fills `Peer`, and a line in PEERS. A peer that cannot do a model says why
(`NotSupported`), and the report prints that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.tasks import Task


class NotSupported(Exception):
    """The peer cannot prune this model right; the message gives version and reason."""


class OutOfReach(Exception):
    """The peer makes no working model of so few parameters."""


@dataclass(frozen=True)
class Pruned:
    """What a peer made: a smaller model, and how it was asked for it (for the record)."""

    model: nn.Module
    settings: Mapping[str, Any]


# (dense model, task, calibration examples, batch size, parameters that may remain, seed) -> the smaller model
Prune = Callable[["nn.Module", "Task", int, int, int, int], Pruned]


@dataclass(frozen=True)
class Peer:
    """`module:function(criterion)` gives the `Prune`; `package` is what pip installs it as."""

    name: str
    package: str
    entry: str
    criterion: str
    source: str

    def version(self) -> str | None:
        """The installed version; None when the package is absent."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def load(self) -> Prune:
        module, _, function = self.entry.partition(":")
        made: Prune = getattr(import_module(module), function)(self.criterion)
        return made


_TP = "bench.peers.torch_pruning:pruner"
_DEPGRAPH = "Torch-Pruning, arXiv 2301.12900"
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("tp-magnitude", "torch-pruning", _TP, "magnitude", _DEPGRAPH),
        Peer("tp-taylor", "torch-pruning", _TP, "taylor", _DEPGRAPH),
        Peer("tp-hessian", "torch-pruning", _TP, "hessian", _DEPGRAPH),
        Peer("tp-obdc", "torch-pruning", _TP, "obdc", _DEPGRAPH),
    )
}
