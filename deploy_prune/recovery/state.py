"""Where a recovery stands, as one safetensors file: weights, optimiser, means, best so far; figures in its header.

Data order, learning rate and random numbers follow from seed and step, so the step is all that is kept of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploy_prune.errors import ArtifactError, UsageError
from deploy_prune.files import atomic_file
from deploy_prune.weights import read_safetensors

TYPE, VERSION = "RecoveryState", 1


@dataclass(frozen=True)
class Mark:
    """How good the weights after `step` steps are on the held-out part; of equal values the lower loss is better."""

    step: int
    value: float
    loss: float

    def beats(self, other: Mark, higher_is_better: bool) -> bool:
        def key(mark: Mark) -> tuple[float, float]:
            value = mark.value if higher_is_better else -mark.value
            return (value if value == value else -float("inf"), -mark.loss)  # NaN: a constant output has no rank

        return key(self) > key(other)


@dataclass
class Standing:
    """What a resumed run must know besides tensors.

    `marks[0]` is the start, `best` the index of the best one, `since` counts the judgements after it.
    """

    step: int = 0
    marks: list[Mark] = field(default_factory=list)
    best: int = 0
    since: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Standing:
        return Standing(**{**data, "marks": [Mark(**mark) for mark in data["marks"]]})


def full(tensor: Tensor) -> Tensor:
    """A whole tensor of one that may be sharded over processes; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def restore(target: Any, value: Tensor) -> None:
    """Copy a whole `value` into a tensor that may be sharded."""
    with torch.no_grad():
        if hasattr(target, "placements"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def state_tensors(
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: Mapping[str, Tensor] | None,
    best: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Everything that must be equal for the next step to be equal, by a name of its own."""
    tensors = {f"weights/{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors |= {f"mean/{name}": value for name, value in (mean or {}).items()}
    tensors |= {f"best/{name}": value for name, value in (best or {}).items()}
    return {name: full(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}


def save_state(path: Path, tensors: Mapping[str, Tensor], standing: Standing, identity: Mapping[str, Any]) -> None:
    """Write a state, atomically. `identity` says of which recovery it is."""
    from safetensors.torch import save_file

    header = {"_type": TYPE, "_version": str(VERSION)}
    header |= {"standing": json.dumps(asdict(standing)), "identity": json.dumps(identity, sort_keys=True)}
    with atomic_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata=header)


def load_state(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], Standing]:
    """Read a state. Raises ArtifactError when it is damaged, UsageError when it is of another recovery."""
    from safetensors import safe_open

    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if header.get("_type") != TYPE or header.get("_version") != str(VERSION):
        raise ArtifactError(
            "not a recovery state this version reads",
            where=str(path),
            expected=f"{TYPE} version {VERSION}",
            got=f"{header.get('_type')!r} version {header.get('_version')!r}"[:80],
        )
    found = json.loads(header["identity"])
    problems = [
        f"{key}: {found.get(key)!r}, here {value!r}" for key, value in identity.items() if found.get(key) != value
    ]
    if problems:
        raise UsageError(
            "the saved state is of another recovery",
            where=str(path),
            problems=[problem[:300] for problem in problems],
            remedy="Delete it to start again, or give this recovery a place of its own.",
        )
    return tensors, Standing.from_json(json.loads(header["standing"]))


def load_tensors(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: Mapping[str, Tensor] | None,
) -> dict[str, Tensor] | None:
    """Put a state's tensors where they were; returns the best weights so far, None when the start is the best."""
    for name, p in parameters.items():
        restore(p, tensors[f"weights/{name}"])
        prefix = f"optimizer/{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for key, value in own.items():
            if value.shape != p.shape:  # the step count, which AdamW keeps as it is
                optimizer.state[p][key] = value.to(p.device)
                continue
            optimizer.state[p][key] = torch.zeros_like(p)
            restore(optimizer.state[p][key], value)
    for name, value in (mean or {}).items():
        restore(value, tensors[f"mean/{name}"])
    best = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}
    return best or None
