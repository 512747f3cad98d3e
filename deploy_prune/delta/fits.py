"""What is trained: differences from a frozen base, dense while it is open which ones stay, sparse afterwards.

A fit gives the model's tensors (`tensors`), its own trainable ones in groups (`groups`) and what it adds to the loss
(`penalty`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deploy_prune.adapters import find_sites
from deploy_prune.delta.gated import gated, opened
from deploy_prune.hard_concrete import DIFF
from deploy_prune.layers import layer_at, width
from deploy_prune.units import Site

Tensors = dict[str, Tensor]


class Dense:
    """δ = w (l1), or δ = z ⊙ w with a gate z for every value (l0), and one more for its group (structured).

    `base` are the tensors that may change; `owners` by name, broadcastable to the tensor, the group of every value, of
    all tensors or of none.
    """

    def __init__(self, base: Tensors, *, gated: bool, alpha: float, strength: float, owners: Tensors | None = None):
        self.base, self.strength = base, strength
        self.w = {name: _filled(t, 0.0) for name, t in base.items()}
        self.alpha = {name: _filled(t, alpha) for name, t in base.items()} if gated else {}
        self.owners = owners or {}
        count = 1 + max((int(o.max()) for o in self.owners.values()), default=-1)
        some = next(iter(base.values()))
        self.group_alpha = torch.full((count,), alpha, dtype=some.dtype, device=some.device).requires_grad_()

    def groups(self, lr: float, gate_lr: float) -> list[dict[str, Any]]:
        gates = [*self.alpha.values(), *([self.group_alpha] if self.owners else [])]
        found = [{"params": list(self.w.values()), "lr": lr}]
        return [*found, {"params": gates, "lr": gate_lr}] if gates else found

    def tensors(self, *, training: bool) -> Tensors:
        δ = self._drawn() if training else self.differences()
        return {name: t + δ[name] for name, t in self.base.items()}

    def penalty(self) -> Tensor:
        """λ E‖δ‖₀ = λ Σ_i σ(α_i − c), in groups λ Σ_i σ(α_i − c) σ(α_g(i) − c), c = log(−l/r)."""
        if not self.alpha:
            return torch.zeros(())
        if not self.owners:
            return self.strength * torch.stack([opened(DIFF, alpha) for alpha in self.alpha.values()]).sum()
        open_g = DIFF.open_probability(self.group_alpha)
        parts = [(DIFF.open_probability(a) * open_g[self.owners[n]]).sum() for n, a in self.alpha.items()]
        return self.strength * torch.stack(parts).sum()

    @torch.no_grad()
    def shrink(self, lr: float) -> None:
        """The proximal step of λ‖δ‖₁ after a step of length lr: w ← sign(w) max(|w| − lr λ, 0), with exact zeros."""
        if self.alpha:
            return
        for w in self.w.values():
            w.copy_(w.sign() * (w.abs() - lr * self.strength).clamp(min=0))

    @torch.no_grad()
    def differences(self) -> Tensors:
        """δ without noise."""
        return self._grouped(
            {n: DIFF.without_noise(self.alpha[n]) * w if self.alpha else w for n, w in self.w.items()},
            DIFF.without_noise,
        )

    def _drawn(self) -> Tensors:
        """δ with fresh noise in its gates."""
        return self._grouped(
            {n: gated(DIFF, w, self.alpha[n]) if self.alpha else w for n, w in self.w.items()},
            lambda alpha: DIFF.sampled(alpha, torch.rand_like(alpha)),
        )

    def _grouped(self, differences: Tensors, gate: Callable[[Tensor], Tensor]) -> Tensors:
        """Times the gate of each value's group."""
        if not self.owners:
            return differences
        z_g = gate(self.group_alpha)
        return {name: z_g[self.owners[name]] * δ for name, δ in differences.items()}


def _filled(like: Tensor, value: float) -> Tensor:
    """To be trained; contiguous, whatever the strides of a weight in channels_last or transposed."""
    return torch.full_like(like, value, memory_format=torch.contiguous_format).requires_grad_()


class Whole:
    """All values of the given tensors, trained as they are."""

    def __init__(self, base: Tensors) -> None:
        self.values = {name: t.clone().requires_grad_() for name, t in base.items()}

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.values.values()), "lr": lr}]

    def tensors(self) -> Tensors:
        return dict(self.values)


class Sparse:
    """δ at chosen positions alone: `chosen` by name, flat indices (n,); `start` the values to begin with, else 0.

    While a step lasts there is one more copy of the tensors that change, and of the gradient of each."""

    def __init__(self, base: Tensors, chosen: Mapping[str, Tensor], start: Tensors | None = None) -> None:
        self.base = base
        self.chosen = {name: where.to(base[name].device) for name, where in chosen.items() if len(where)}
        self.values = {
            name: (
                torch.zeros(len(where), dtype=base[name].dtype, device=base[name].device)
                if start is None
                else start[name].detach().flatten()[where].clone()
            ).requires_grad_()
            for name, where in self.chosen.items()
        }

    def groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.values.values()), "lr": lr}]

    def tensors(self) -> Tensors:
        return {
            name: self.base[name].flatten().index_add(0, where, self.values[name]).view_as(self.base[name])
            for name, where in self.chosen.items()
        }


def largest(differences: Tensors, count: int) -> dict[str, Tensor]:
    """Flat indices, rising, of the `count` values of largest magnitude over all tensors; zeros are never chosen."""
    if not count:
        return {}
    sizes = {name: d.numel() for name, d in differences.items()}
    magnitudes = torch.cat([d.abs().flatten() for d in differences.values()])
    best = magnitudes.topk(min(count, len(magnitudes))).indices
    best = best[magnitudes[best] > 0].sort().values
    return _split(best, sizes)


def at_random(base: Tensors, count: int, seed: int) -> dict[str, Tensor]:
    """As `largest`, of `count` values drawn without regard to anything."""
    import numpy as np

    total = sum(t.numel() for t in base.values())
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    return _split(torch.from_numpy(chosen), {name: t.numel() for name, t in base.items()})


def owners_of(model: nn.Module, base: Tensors, groups: str) -> Tensors:
    """The group of every value: its tensor's, or, where a site's head or neuron owns its row or column of a linear
    layer, that unit's. By name, int64, broadcastable to the tensor."""
    if groups == "none":
        return {}
    found: Tensors = {name: torch.tensor(number) for number, name in enumerate(base)}
    device = next(iter(base.values())).device
    count = len(found)
    if groups == "unit":
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in base}
        for site in find_sites(model):
            count = _site_owners(model, site, names, found, count)
    return {name: owner.to(device) for name, owner in found.items()}


def _site_owners(model: nn.Module, site: Site, names: Mapping[int, str], found: Tensors, count: int) -> int:
    """Number the site's units from `count` on, and give them the rows or columns that are theirs; the next number."""
    kind = site.vanishing_kind
    for s in site.slices[kind]:
        layer = layer_at(model, s.layer)
        weight = getattr(layer, "weight", None)
        name = names.get(id(weight))
        if name is None or not isinstance(layer, nn.Linear):
            continue
        owner = torch.from_numpy(site.owner(s, kind, width(layer, s.axis)))
        shape = (-1, 1) if s.axis == "out" else (1, -1)
        own = owner.view(shape)
        found[name] = torch.where(own >= 0, count + own, found[name])
        bias = names.get(id(getattr(layer, "bias", None)))
        if s.axis == "out" and bias is not None:
            found[bias] = torch.where(owner >= 0, count + owner, found[bias])
    return count + site.units(kind)


def _split(indices: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Indices into all tensors laid end to end, as indices into each, on the CPU."""
    indices = indices.cpu()
    ends = torch.tensor(list(sizes.values())).cumsum(0)
    found, start = {}, 0
    for (name, size), end in zip(sizes.items(), ends.tolist(), strict=True):
        low, high = torch.searchsorted(indices, torch.tensor([start, end])).tolist()
        found[name] = indices[low:high] - start
        start = start + size
    return found
