"""Baselines that multiply weights with activations, and need no gradient: Wanda-sp, FLAP and CORP's ranking.

All judge heads, value/output dimensions and neurons by the column of the output projection that reads them. The papers
of Wanda-sp and FLAP do not remove query/key dimensions; here those are judged by their part of the attention logit,
q_d · k_d, in the same spirit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deploy_prune.blocks import whole
from deploy_prune.layers import layer_at, matrix
from deploy_prune.methods.base import Context, Importance, NoOptions
from deploy_prune.methods.token_statistics import TokenMoments, logit_moments, token_moments
from deploy_prune.refitting import SiteMoments
from deploy_prune.units import Site, UnitKind, groups, unit_key


def wanda(context: Context, _: NoOptions) -> Importance:
    """Σ_i |W_ij| · ‖X_j‖, summed over a unit's columns j (Wanda, arXiv 2306.11695; Wanda-sp of arXiv 2312.11983).

    ‖X_j‖ is the root mean square of input j. Every site gives up the same share. For qk: √(E[q_d²] E[k_d²]).
    """

    def column(W: Tensor, x: SiteMoments) -> Tensor:
        return W.abs().sum(0) * x.second.diagonal().sqrt()

    return _scores(context, column, lambda site, moments: logit_energy(site, moments).sqrt())


def flap(context: Context, _: NoOptions) -> Importance:
    """Var(x_j) · Σ_i W_ij², standardised within each site, then ranked over all of them (FLAP, arXiv 2312.11983).

    A unit has the mean over its columns. Standardised scores z = (s − mean) / std are compared as they are, whatever
    a unit costs (the paper's AL-AM, its default), so that the importance per parameter is z. For qk:
    E[q_d²] E[k_d²] − (E[q_d] E[k_d])². FLAP makes up by the mean of what leaves: `compensate(..., "mean")`.
    """

    raw = column_fluctuation(context)
    importance = {}
    for site, kind in groups(context.sites):
        s = raw[unit_key(site.name, kind)]
        z = (s - s.mean()) / s.std(correction=0).clamp(min=1e-30)
        importance[unit_key(site.name, kind)] = z * context.costs.unit_params(site, kind) / site.lanes(kind)
    return importance


def corp(context: Context, _: NoOptions) -> Importance:
    """E[x_j²] · Σ_i W_ij², magnitude times activation, the ranking we use for CORP (arXiv 2602.05243).

    Every site gives up the same share; a head has the sum over its columns. For qk: E[q_d²] E[k_d²]. What CORP is about
    is the closed-form compensation afterwards, which is `refit`.
    """

    return column_energy(context)


def column_fluctuation(context: Context) -> dict[str, Tensor]:
    """Σ over a unit's columns of Var(x_j) · Σ_i W_ij²; for qk E[q_d²] E[k_d²] − (E[q_d] E[k_d])²."""

    def column(W: Tensor, x: SiteMoments) -> Tensor:
        return x.covariance.diagonal() * W.square().sum(0)

    return _scores(context, column, _logit_fluctuation)


def column_energy(context: Context) -> dict[str, Tensor]:
    """Σ over a unit's columns of E[x_j²] · Σ_i W_ij²; for qk E[q_d²] E[k_d²]."""

    def column(W: Tensor, x: SiteMoments) -> Tensor:
        return x.second.diagonal() * W.square().sum(0)

    return _scores(context, column, logit_energy)


def logit_energy(site: Site, moments: TokenMoments) -> Tensor:
    """E[z_d²] of every qk unit, (units,)."""
    return logit_moments(site, moments).diagonal(dim1=1, dim2=2).reshape(-1)


def _logit_fluctuation(site: Site, moments: TokenMoments) -> Tensor:
    own_q, own_k = (s.per_unit for s in site.slices[UnitKind.QK][:2])
    if own_k > 1:  # a rotated pair has no constant part
        return logit_energy(site, moments)
    q = moments.query[site.name].mean.view(-1, own_q)
    k = moments.key[site.name].mean.view(-1, 1)
    return logit_energy(site, moments) - (q * k).square().sum(1)


def _scores(
    context: Context,
    column: Callable[[Tensor, SiteMoments], Tensor],
    logits: Callable[[Site, TokenMoments], Tensor],
) -> dict[str, Tensor]:
    """A score per unit: the sum of its columns' scores at the output projection, for qk what `logits` says."""
    moments = token_moments(context)
    scores = {}
    for site, kind in groups(context.sites):
        if kind is UnitKind.QK:
            scores[unit_key(site.name, kind)] = logits(site, moments)
            continue
        W = whole(matrix(layer_at(context.model, site.out))).double().cpu()
        table = torch.from_numpy(site.gate_slice(kind).table(site.lanes(kind), site.counts[kind]))
        scores[unit_key(site.name, kind)] = column(W, moments.out[site.name])[table].sum(1)
    return scores
