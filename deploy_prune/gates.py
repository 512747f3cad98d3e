"""Gates on a live model: a multiplier per unit, where the output projection reads it or the query layer makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deploy_prune.layers import layer_at, width
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
            (site.units(kind),) if batch is None else (batch, site.units(kind)), device=device
        )
        for site, kind in groups(sites, kinds)
    }


@contextmanager
def gated(
    model: nn.Module, sites: Sequence[Site], gates: GateValues, means: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the block the model runs with x ← m·x + (1 − m)·μ where the gated units appear.

    `means` gives μ at the input of the output projections by site name, each (features,); without it, and always for
    qk, μ = 0. Gates at exactly 1 leave the output bit-identical. Gradients flow into `gates`.
    """
    with ExitStack() as stack:
        for site, kind in groups(sites):
            gate = gates.get(unit_key(site.name, kind))
            if gate is None:
                continue
            own = site.gate_slice(kind)
            layer = layer_at(model, own.layer)
            assert isinstance(layer, nn.Module)
            owner = torch.from_numpy(site.owner(own, kind, width(layer, own.axis)))
            mean = None if means is None or own.axis == "out" else means[site.name]
            hook = _GateHook(gate, owner, mean)
            handle = (
                layer.register_forward_hook(hook.after)
                if own.axis == "out"
                else layer.register_forward_pre_hook(hook.before)
            )
            stack.callback(handle.remove)
        yield


@contextmanager
def masked(model: nn.Module, sites: Sequence[Site], plan: PrunePlan) -> Iterator[None]:
    """Within the block the units that `plan` removes contribute nothing: the reference form of the plan."""
    device = next(model.parameters()).device
    gates = {}
    for site, kind in groups(sites):
        gate = torch.zeros(site.units(kind), device=device)
        gate[plan.kept(site, kind)] = 1.0
        gates[unit_key(site.name, kind)] = gate
    with gated(model, sites, gates):
        yield


class _GateHook:
    """Scales features of a layer's input or output, (batch, ..., features), by the gates of the units that own them.

    `owner` (features,) names each feature's unit, -1 where there is none.
    """

    def __init__(self, gate: Tensor, owner: Tensor, mean: Tensor | None) -> None:
        self.gate, self.mean = gate, mean
        self.owner = owner.to(gate.device)
        self.free = self.owner < 0 if bool((self.owner < 0).any()) else None

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.scaled(args[0]), *args[1:])

    def after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.scaled(output)

    def scaled(self, x: Tensor) -> Tensor:
        gate = self.gate.index_select(-1, self.owner.clamp(min=0))
        if self.free is not None:
            gate = torch.where(self.free, torch.ones((), dtype=gate.dtype, device=gate.device), gate)
        gate = gate.to(x.dtype)
        if gate.dim() == 2:
            rows = gate.shape[0]
            if x.shape[0] != rows:  # windows of attention: several rows of x belong to one example
                gate = gate.repeat_interleave(x.shape[0] // rows, dim=0)
            gate = gate.view(gate.shape[0], *(1,) * (x.dim() - 2), gate.shape[1])
        y = x * gate
        if self.mean is not None:
            y = y + (1.0 - gate) * self.mean.to(x.dtype)
        return y
