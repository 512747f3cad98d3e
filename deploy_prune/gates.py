"""Gates on a live model: a multiplier per unit where the output projection reads the units' activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deploy_prune.units import Site, UnitKind, groups, unit_key

if TYPE_CHECKING:
    from deploy_prune.plan import PrunePlan

# One tensor per unit key: (units,) for a gate shared by the batch, (batch, units) for one gate per example.
GateValues = Mapping[str, Tensor]


def open_gates(
    sites: Sequence[Site],
    kinds: Sequence[UnitKind] | None = None,
    *,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Gates at 1 for every unit: float32, (units,) or (batch, units)."""
    return {
        unit_key(site.name, kind): torch.ones(
            (site.counts[kind],) if batch is None else (batch, site.counts[kind]), device=device
        )
        for site, kind in groups(sites, kinds)
    }


@contextmanager
def gated(
    model: nn.Module, sites: Sequence[Site], gates: GateValues, means: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the block the model runs with x ← m·x + (1 − m)·μ at the input of every gated output projection.

    `means` gives μ by site name, each (features of the output projection,); without it μ = 0. Gates at exactly 1
    leave the output bit-identical. Gradients flow into `gates`.
    """
    with ExitStack() as stack:
        for site, kind in groups(sites):
            gate = gates.get(unit_key(site.name, kind))
            if gate is None:
                continue
            hook = _GateHook(gate, site.reading_slice(kind).block, None if means is None else means[site.name])
            handle = model.get_submodule(site.out).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


@contextmanager
def masked(model: nn.Module, sites: Sequence[Site], plan: PrunePlan) -> Iterator[None]:
    """Within the block the units that `plan` removes contribute nothing: the reference form of the plan."""
    device = next(model.parameters()).device
    gates = {}
    for site, kind in groups(sites):
        gate = torch.zeros(site.counts[kind], device=device)
        gate[plan.kept(site, kind)] = 1.0
        gates[unit_key(site.name, kind)] = gate
    with gated(model, sites, gates):
        yield


class _GateHook:
    """Forward pre-hook on an output projection; (batch, tokens, features) in and out."""

    def __init__(self, gate: Tensor, block: int, mean: Tensor | None) -> None:
        self.gate, self.block, self.mean = gate, block, mean

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        gate = self.gate if self.block == 1 else self.gate.repeat_interleave(self.block, dim=-1)
        gate = gate.to(x.dtype)
        if gate.dim() == 2:
            gate = gate.view(gate.shape[0], *(1,) * (x.dim() - 2), gate.shape[1])
        y = x * gate
        if self.mean is not None:
            y = y + (1.0 - gate) * self.mean.to(x.dtype)
        return (y, *rest)
