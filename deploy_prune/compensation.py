"""What may follow a cut: the closed-form corrections of several papers, under one name each.

`ridge` is this project's refit. The others are what competing methods do, kept for comparison.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from deploy_prune.adapters import find_sites
from deploy_prune.basis import Basis, in_basis, reading_matrix, require_basis
from deploy_prune.errors import UsageError, did_you_mean
from deploy_prune.layers import bias_of, layer_at, matrix, width
from deploy_prune.plan import PrunePlan
from deploy_prune.refitting import RIDGE, Moments, SiteMoments, kept_features, refit
from deploy_prune.units import Site, UnitKind

Compensation = Literal["none", "mean", "scale", "ridge"]
COMPENSATIONS: tuple[str, ...] = get_args(Compensation)
BOUND = 10.0  # tuned masks are kept within ±10, as in the paper


@torch.no_grad()
def compensate(
    model: nn.Module,
    plan: PrunePlan,
    moments: Moments,
    how: Compensation,
    *,
    ridge: float = RIDGE,
    basis: Basis | None = None,
) -> nn.Module:
    """A dense-shaped copy of `model` corrected for the units that `plan` removes; `basis` is that of its path.

    none: unchanged. mean: the bias takes the removed inputs' mean, Δb = W_P μ_P (FLAP, arXiv 2312.11983); a layer
    without bias gets one, as there. scale: every unit that stays is scaled (see `mask_tuning`). ridge: `refit`.
    Raises UsageError for another name, and what `refit` raises.
    """
    if how not in COMPENSATIONS:
        raise UsageError(f"unknown compensation {how!r}", remedy=did_you_mean(how, COMPENSATIONS))
    if how == "ridge":
        return refit(model, plan, moments, ridge=ridge, basis=basis)
    require_basis(basis, plan.basis)
    sites = find_sites(model)
    result = copy.deepcopy(model) if basis is None else in_basis(model, sites, basis)
    if how == "none":
        return result
    for site in sites:
        layer = layer_at(result, site.out)
        assert isinstance(layer, nn.Module)
        kept = kept_features(site, plan, width(layer, "in"))
        if kept.all():
            continue
        own = moments[site.name]
        if (E := None if basis is None else reading_matrix(site, basis, len(kept))) is not None:
            own = own.turned(E)
        W = matrix(layer)
        if how == "mean":
            shift = W[:, ~kept].double() @ own.mean[~kept].to(W.device)
            bias = bias_of(layer)
            if bias is None:
                layer.bias = nn.Parameter(shift.to(W))
            else:
                bias.add_(shift.to(bias))
        elif kept.any():
            scale = mask_tuning(own, W.double().cpu(), kept, feature_units(site, len(kept)))
            W.mul_(scale.to(W))
    return result


def feature_units(site: Site, features: int) -> Tensor:
    """Which unit scales each input of the output projection: its head in attention, else the neuron itself."""
    kind = UnitKind.HEAD if UnitKind.HEAD in site.counts else site.vanishing_kind
    return torch.from_numpy(site.owner(site.gate_slice(kind), kind, features))


def mask_tuning(moments: SiteMoments, weight: Tensor, kept: Tensor, unit: Tensor) -> Tensor:
    """The factor of every input (in,) that makes the layer's output most like the dense one (Kwon, arXiv 2204.09656).

    With the kept part of unit u writing y_u = W_u x_u and y = W x:
        min_m E‖Σ_u m_u y_u − y‖²  ⇒  G m = r,   G_uv = E[y_u · y_v],   r_u = E[y_u · y]
    from the dense model's second moments (the paper takes the pruned prefix's). Clamped to ±BOUND; inputs that leave
    keep factor 1.
    """
    A = (weight.T @ weight) * moments.second  # A_ij = E[(W_:i x_i) · (W_:j x_j)]
    units, index = torch.unique(unit[kept], return_inverse=True)
    member = torch.nn.functional.one_hot(index, len(units)).to(A)
    G = member.T @ A[kept][:, kept] @ member
    r = member.T @ A[kept].sum(1)
    λ = 1e-6 * G.diagonal().mean().clamp(min=1e-30)
    m = torch.linalg.solve(G + λ * torch.eye(len(G), dtype=G.dtype), r + λ)
    scale = torch.ones_like(unit, dtype=torch.float64)
    scale[kept] = m.clamp(-BOUND, BOUND)[index]
    return scale
