"""A basis for the dimensions of every head: an equal model whose `qk` and `vo` units are worth ordering.

The scores qᵀk and the product W_O W_V do not change when a head's query/key space or its value space gets another
basis. In the principal one a few dimensions do nearly all of the work, and the others can leave; in the model's own,
which training had no reason to order, every dimension does a little of everything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deploy_prune import distributed
from deploy_prune.blocks import whole
from deploy_prune.errors import ArtifactError, DataError, PlanError
from deploy_prune.layers import bias_of, layer_at, matrix
from deploy_prune.progress import SILENT, Progress
from deploy_prune.tasks.base import IdleBatch
from deploy_prune.units import Site, Slice, UnitKind, unit_key

if TYPE_CHECKING:
    from deploy_prune.signature import Signature
    from deploy_prune.tasks.base import Batch

# By unit key of qk and vo: (heads, d, d) float32, one row per new unit: unit u of head h is the direction row u.
# Queries and values are multiplied by it, keys by its inverse transposed, output columns by its inverse.
Basis = Mapping[str, Tensor]

# Eigenvalues below this share of the largest are lifted to it, so that an idle direction does not become a huge weight.
FLOOR = 1e-6


@torch.no_grad()
def principal_basis(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    signature: Signature,
    *,
    progress: Progress = SILENT,
    together: bool = False,
) -> dict[str, Tensor]:
    """The basis in which the first dimensions of every head are the best low-rank form of it (A³, arXiv 2505.12942).

    With C the second moment of a head's values as the output projection reads them, W_O its columns there (under
    grouped queries summed over the group), C_q the second moment of queries and C_k the covariance of keys (what is the
    same for every key leaves the softmax as it is):
        vo:  C^½ W_Oᵀ W_O C^½ = U S Uᵀ,   rows of UᵀC^-½, scaled to length 1
        qk:  C_q^½ C_k^½ = U S Vᵀ,        rows of S^½ Uᵀ C_q^-½
    Largest first. Rotary embedding turns fixed pairs of dimensions, so those sites keep their own qk basis. Padding is
    left out. `together`: every process of the run streams its share, and all get the basis of the whole. Memory: one
    (d, d) float64 matrix per head and role. Raises DataError without calibration data.
    """
    seen = _watch(model, sites, batches, signature, progress)
    if together:
        _reduce(seen)
    if any(not moments.count for moments in seen.values()):
        raise DataError("no calibration data for the basis", remedy="Give the task calibration data.")
    basis: dict[str, Tensor] = {}
    for site in sites:
        if UnitKind.VO in site.counts:
            own = site.gate_slice(UnitKind.VO)
            W = whole(matrix(layer_at(model, site.out))).double()
            columns = W[:, _lanes(site, UnitKind.VO, own).to(W.device)]  # (out, heads, d, group)
            G = torch.einsum("ohdg,oheg->hde", columns, columns)
            root, inverse = _roots(seen[site.name, "vo"].second())
            directions = torch.linalg.eigh(root @ G @ root).eigenvectors.flip(-1)
            rows = directions.mT @ inverse
            basis[unit_key(site.name, UnitKind.VO)] = (rows / rows.norm(dim=-1, keepdim=True)).float().cpu()
        if _turnable(site):
            q_root, q_inverse = _roots(seen[site.name, "q"].second())
            k_root, _ = _roots(seen[site.name, "k"].covariance())
            U, S, _ = torch.linalg.svd(q_root @ k_root)
            S = S.clamp(min=FLOOR * S[:, :1])
            rows = S.sqrt()[:, :, None] * U.mT @ q_inverse
            basis[unit_key(site.name, UnitKind.QK)] = rows.float().cpu()
    return basis


@torch.no_grad()
def in_basis(model: nn.Module, sites: Sequence[Site], basis: Basis, *, inplace: bool = False) -> nn.Module:
    """The same function with the heads' dimensions in `basis`: a copy, unless `inplace`.

    Equal up to rounding: q' = R q, k' = R⁻ᵀ k, v' = R v, W_O' = W_O R⁻¹ for every head, in float64. Raises
    ArtifactError for a basis of another model.
    """
    result = model if inplace else copy.deepcopy(model)
    known = {unit_key(site.name, kind): (site, kind) for site in sites for kind in (UnitKind.QK, UnitKind.VO)}
    for key, rows in basis.items():
        site, kind = known.get(key, (None, None))
        if site is None or kind is None or rows.shape != (site.kv_heads, site.counts.get(kind), site.counts.get(kind)):
            raise ArtifactError(
                "the basis is of another model",
                where=key,
                got=f"shape {tuple(rows.shape)}",
                remedy="Search again, or pass the model that the path names.",
            )
        R = rows.double()
        inverse = torch.linalg.inv(R)
        *made, read = site.slices[kind]
        for s in made:
            _multiply(result, site, kind, s, R)
        _multiply(result, site, kind, read, inverse.mT)  # keys (rows) and output columns alike
    return result


def require_basis(basis: Basis | None, wanted: str | None) -> None:
    """Raise PlanError when a plan's units are directions of a basis, and that is not the one given."""
    got = None if basis is None else basis_digest(basis)
    if got != wanted:
        raise PlanError(
            "the plan's qk and vo units are those of another basis",
            expected=f"basis sha256 {wanted[:12]}…" if wanted else "none: the model's own dimensions",
            got=f"basis sha256 {got[:12]}…" if got else "none",
            remedy="Pass the path's own: refit(..., basis=path.basis), or in_basis(model, path.sites, path.basis).",
        )


def basis_digest(basis: Basis) -> str:
    """Hex SHA-256 over the names and bytes of a basis."""
    import hashlib

    digest = hashlib.sha256()
    for key, rows in sorted(basis.items()):
        digest.update(f"{key}|{tuple(rows.shape)}|".encode())
        digest.update(rows.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def reading_matrix(site: Site, basis: Basis, features: int) -> Tensor | None:
    """What a basis makes of the inputs of the site's output projection: x' = E x, (features, features) float64, or
    None where they stay."""
    rows = basis.get(unit_key(site.name, UnitKind.VO))
    if rows is None:
        return None
    E = torch.zeros(features, features, dtype=torch.float64)
    for lane, R in zip(_lanes(site, UnitKind.VO, site.gate_slice(UnitKind.VO)), rows.double(), strict=True):
        for member in lane.T:  # the query heads of a group share the values' basis
            E[member[:, None], member[None, :]] = R
    return E


def _turnable(site: Site) -> bool:
    """Whether qk units are single dimensions, free to be mixed."""
    return UnitKind.QK in site.counts and site.counts[UnitKind.QK] == site.qk_width


def _lanes(site: Site, kind: UnitKind, s: Slice) -> Tensor:
    """Feature indices by head, dimension and member of the group: (heads, d, group)."""
    table = torch.from_numpy(s.table(site.lanes(kind), site.counts[kind]))
    return table.view(site.lanes(kind), site.counts[kind], -1)


def _multiply(model: nn.Module, site: Site, kind: UnitKind, s: Slice, R: Tensor) -> None:
    """Rows (axis "out") or columns (axis "in") of every head, times R (heads, d, d)."""
    layer = layer_at(model, s.layer)
    W, bias = matrix(layer), bias_of(layer)
    for lane, own in zip(_lanes(site, kind, s), R.to(W.device), strict=True):
        for member in lane.T:
            if s.axis == "out":
                W[member] = (own @ W[member].double()).to(W)
                if bias is not None:
                    bias[member] = (own @ bias[member].double()).to(bias)
            else:
                W[:, member] = (W[:, member].double() @ own.mT).to(W)


def _roots(C: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^-½ of symmetric positive semidefinite C (heads, d, d), small eigenvalues lifted to FLOOR."""
    values, vectors = torch.linalg.eigh((C + C.mT) / 2)
    values = values.clamp(min=FLOOR * values[:, -1:].clamp(min=1e-30))
    root = values.sqrt()[:, None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


class _HeadMoments:
    """Σx and Σxxᵀ per head over tokens and members of its group, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.outer = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Take x (tokens, heads, d, group)."""
        x = x.float()
        if not self.count:
            heads, d = x.shape[1:3]
            self.first = torch.zeros(heads, d, dtype=torch.float64, device=x.device)
            self.outer = torch.zeros(heads, d, d, dtype=torch.float64, device=x.device)
        self.count += x.shape[0] * x.shape[3]
        self.first += x.sum((0, 3), dtype=torch.float64)
        flat = x.permute(1, 2, 0, 3).flatten(2)
        self.outer += (flat @ flat.mT).double()

    def second(self) -> Tensor:
        return self.outer / self.count

    def covariance(self) -> Tensor:
        mean = self.first / self.count
        return self.second() - mean[:, :, None] * mean[:, None, :]


def _watch(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], signature: Signature, progress: Progress
) -> dict[tuple[str, str], _HeadMoments]:
    """Moments of queries, keys and what the output projections read, by site and role "q", "k" or "vo"."""
    from deploy_prune.activations import Watch

    watch = Watch()
    seen: dict[tuple[str, str], _HeadMoments] = {}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for site in sites:
            wanted = [("vo", UnitKind.VO, -1)] if UnitKind.VO in site.counts else []
            wanted += [("q", UnitKind.QK, 0), ("k", UnitKind.QK, 1)] if _turnable(site) else []
            for role, kind, which in wanted:
                s = site.slices[kind][which]
                moments = seen[site.name, role] = _HeadMoments()
                lanes = _lanes(site, kind, s).to(device)

                def see(x: Tensor, moments: _HeadMoments = moments, lanes: Tensor = lanes) -> None:
                    if watch.idle:
                        return
                    moments.add(watch.tokens(x.detach())[:, lanes])

                layer = layer_at(model, s.layer)
                assert isinstance(layer, nn.Module)
                if s.axis == "in":
                    hook = layer.register_forward_pre_hook(lambda _, args, see=see: see(args[0]))
                else:
                    hook = layer.register_forward_hook(lambda _, args, output, see=see: see(output))
                stack.callback(hook.remove)
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            watch.attend(signature, inputs)
            watch.idle = isinstance(batch, IdleBatch)
            signature.call(model, inputs)
            progress.advance(len(batch))
    return seen


def _reduce(seen: dict[tuple[str, str], _HeadMoments]) -> None:
    """Sums over all processes."""
    for _, moments in sorted(seen.items()):
        sums = {"first": moments.first, "outer": moments.outer} if moments.count else {}
        moments.count = sum(distributed.all_gather(moments.count))
        total = distributed.reduce(sums)
        moments.first, moments.outer = total["first"], total["outer"]
