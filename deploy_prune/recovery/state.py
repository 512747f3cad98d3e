"""Where a recovery stands: what a saved state of it holds.

Data order, learning rate and random numbers follow from seed and step, so the step is all that is kept of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from deploy_prune.blocks import whole


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

    `marks[0]` is the start, `best` the index of the best one, `since` counts the judgements after it; `losses` are the
    last few.
    """

    step: int = 0
    marks: list[Mark] = field(default_factory=list)
    best: int = 0
    since: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Standing:
        return Standing(**{**data, "marks": [Mark(**mark) for mark in data["marks"]]})


def state_tensors(
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: Mapping[str, Tensor] | None,
    best: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Everything that must be equal for the next step to be equal, by a name of its own, whole."""
    tensors = {f"weights/{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors |= {f"mean/{name}": value for name, value in (mean or {}).items()}
    tensors |= {f"best/{name}": value for name, value in (best or {}).items()}
    return {name: whole(tensor).detach() for name, tensor in tensors.items()}


def restore_state(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    mean: Mapping[str, Tensor] | None,
) -> dict[str, Tensor] | None:
    """Put a state's tensors where they were; returns the best weights so far, None when the start is the best."""
    for name, p in parameters.items():
        put(p, tensors[f"weights/{name}"])
        prefix = f"optimizer/{name}/"
        for key, value in tensors.items():
            if not key.startswith(prefix):
                continue
            slot = key.removeprefix(prefix)
            if value.shape != p.shape or slot == "step":  # AdamW counts steps in a number beside its means
                optimizer.state[p][slot] = value.clone().to(p.device)
            else:
                optimizer.state[p][slot] = torch.zeros_like(p)
                put(optimizer.state[p][slot], value)
    for name, value in (mean or {}).items():
        put(value, tensors[f"mean/{name}"])
    best = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}
    return best or None


@torch.no_grad()
def put(target: Any, value: Tensor) -> None:
    """Copy a whole `value` into a tensor that may be spread over the processes."""
    if hasattr(target, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
