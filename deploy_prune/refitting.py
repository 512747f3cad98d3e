"""Refit: the closed-form correction of the weights that stay, from moments of the dense model's activations."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploy_prune import distributed
from deploy_prune.activations import Watch, watching, watching_gradients
from deploy_prune.adapters import find_sites
from deploy_prune.basis import Basis, in_basis, reading_matrix, require_basis
from deploy_prune.errors import ArtifactError, DataError, RefitError
from deploy_prune.files import atomic_file, existing
from deploy_prune.layers import bias_of, layer_at, matrix, width
from deploy_prune.plan import PrunePlan
from deploy_prune.progress import SILENT, Progress
from deploy_prune.tasks.base import Batch, IdleBatch
from deploy_prune.units import Site

if TYPE_CHECKING:
    from deploy_prune.signature import Signature
    from deploy_prune.tasks.base import Losses

# Relative to the mean diagonal. On held-out calibration images of ViT-Tiny 1e-4 and 1e-3 are equal within noise
# (bench/notes.md).
RIDGE = 1e-3
# Of what the loss feels, in the weight of a token; 0.15 to 0.5 are alike on ViT-Tiny (bench/notes.md).
EMPHASIS = 0.3


@dataclass(frozen=True)
class SiteMoments:
    """First and second moments of one output projection's input x over n tokens: Σx (d,) and Σxxᵀ (d, d), float64."""

    count: int
    mean: Tensor
    second: Tensor

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)

    def turned(self, E: Tensor) -> SiteMoments:
        """Moments of E x."""
        return SiteMoments(self.count, E @ self.mean, E @ self.second @ E.T)


Moments = Mapping[str, SiteMoments]


class _Accumulator:
    """Sums of w, w (x − s) and w (x − s)(x − s)ᵀ with s the first batch's mean: float32 products lose nothing."""

    def __init__(self) -> None:
        self.tokens = 0
        self.weight = self.shift = self.first = self.product = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take tokens x (n, d) with weights (n,), by default 1."""
        x = x.float()
        if not self.tokens:
            self.shift = x.mean(0)
        centred = x - self.shift
        heavy = centred if weights is None else centred * weights[:, None]
        self.tokens += len(x)
        self.weight = self.weight + (len(x) if weights is None else weights.sum(dtype=torch.float64).cpu())
        self.first = heavy.sum(0, dtype=torch.float64) + self.first.to(x.device)
        self.product = (heavy.T @ centred).double() + self.product.to(x.device)

    def result(self) -> SiteMoments:
        offset = self.first.cpu() / self.weight
        mean = self.shift.double().cpu() + offset
        covariance = self.product.cpu() / self.weight - torch.outer(offset, offset)
        return SiteMoments(self.tokens, mean, covariance + torch.outer(mean, mean))


def collect_moments(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    signature: Signature,
    *,
    losses: Losses | None = None,
    emphasis: float = EMPHASIS,
    progress: Progress = SILENT,
    together: bool = False,
) -> dict[str, SiteMoments]:
    """Stream calibration `batches` through the dense model; padding tokens are left out.

    With `losses`, tokens count by how much the loss feels an error there: with y the output of a site's projection and
    a = `emphasis`, token t has the weight
        w_t = (1 − a) + a ‖∂ℓ/∂y_t‖² / mean_t ‖∂ℓ/∂y_t‖²,
    which costs a pass backward. An error e_t changes the loss by ∂ℓ/∂y_t · e_t to first order, so that least squares
    under w lowers a bound of E(Δℓ)²; the plain part keeps the tokens that these losses happen not to feel.
    `together`: every process of the run streams its share, and all get the moments of the whole. Memory: one (d, d)
    float64 matrix per site, two with `losses`, a few more while they are made, never all activations. Raises DataError
    when there is no batch, RefitError when activations are not finite.
    """
    plain = {site.name: _Accumulator() for site in sites}
    felt = {site.name: _Accumulator() for site in sites}
    if losses is None or not emphasis:
        _stream(model, sites, batches, signature, plain, progress)
    else:
        _stream_felt(model, sites, batches, signature, losses, plain, felt, progress)
    found = _results(plain, together)
    if len(found) < len(sites):
        raise DataError("no calibration data for the refit", remedy="Give the task calibration data.")
    if losses is not None and emphasis:
        found = _mixed(found, _results(felt, together), emphasis)
    bad = [name for name, m in found.items() if not torch.isfinite(m.second).all()]
    if bad:
        raise RefitError("activations are not finite", problems=bad, remedy="Check the model and its inputs.")
    return found


@torch.no_grad()
def _stream(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    signature: Signature,
    sums: dict[str, _Accumulator],
    progress: Progress,
) -> None:
    with watching(model, sites, lambda name, x: sums[name].add(x)) as watch:
        for _, inputs in _attended(model, batches, signature, watch):
            signature.call(model, inputs)
            progress.advance(len(next(iter(inputs.values()))))


@torch.enable_grad()
def _stream_felt(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    signature: Signature,
    losses: Losses,
    plain: dict[str, _Accumulator],
    felt: dict[str, _Accumulator],
    progress: Progress,
) -> None:
    def see(name: str, x: Tensor, squares: Tensor) -> None:
        plain[name].add(x)
        felt[name].add(x, squares)

    with watching_gradients(model, sites, see) as watch:
        for batch, inputs in _attended(model, batches, signature, watch):
            output = signature.call(model, inputs).float()
            watch.backward(output.sum() if watch.idle else losses(output, batch).sum())
            progress.advance(len(batch))


def _attended(
    model: nn.Module, batches: Iterable[Batch], signature: Signature, watch: Watch
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Each batch on the model's device, with its inputs, the watch set to leave out what does not count."""
    device = next(model.parameters()).device
    for batch in batches:
        there = batch.to(device)
        watch.attend(signature, there.inputs)
        watch.idle = isinstance(batch, IdleBatch)
        yield there, there.inputs


def _results(sums: Mapping[str, _Accumulator], together: bool) -> dict[str, SiteMoments]:
    """Moments of the sites whose tokens had any weight, of all processes if `together`, one site at a time."""
    if not together:
        return {name: s.result() for name, s in sums.items() if s.weight}
    total: dict[str, SiteMoments] = {}
    for name, s in sums.items():
        weight, tokens = (sum(part) for part in zip(*distributed.all_gather((float(s.weight), s.tokens)), strict=True))
        if weight:
            own = s.result() if s.weight else None
            reduced = distributed.reduce(
                {} if own is None else {"mean": s.weight * own.mean, "second": s.weight * own.second}
            )
            total[name] = SiteMoments(tokens, reduced["mean"] / weight, reduced["second"] / weight)
    return total


def _mixed(plain: Moments, felt: Moments, share: float) -> dict[str, SiteMoments]:
    """Moments under w = (1 − share) + share · (felt weights, of mean 1); plain ones where the loss felt no token."""
    mixed = dict(plain)
    for name, f in felt.items():
        p = plain[name]
        mixed[name] = SiteMoments(p.count, p.mean.lerp(f.mean, share), p.second.lerp(f.second, share))
    return mixed


def refit_output(
    moments: SiteMoments, weight: Tensor, kept: Tensor, ridge: float, *, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Weights and bias shift that best replace the removed inputs of an output projection.

    Least squares over the calibration tokens (CORP, arXiv 2602.05243):
        B = Σ_PS (Σ_SS + λI)⁻¹,   W̃ = W_S + W_P B,   Δb = W_P (μ_P − B μ_S)
    with λ = `ridge` · mean diag Σ_SS. `weight` is (out, in), `kept` boolean (in,); the results, (out, kept) and (out,),
    are float64, computed where `weight` is. For a layer without bias pass `centred=False`: second moments about zero
    take the place of Σ and Δb = 0. Raises RefitError when Σ_SS + λI is not positive definite.
    """
    W = weight.double()
    S = kept.to(W.device)
    P, μ = ~S, moments.mean.to(W.device)
    none = torch.zeros(len(W), dtype=W.dtype, device=W.device)
    if not S.any():  # nothing is left to make up with but the mean
        return W[:, S], W @ μ if centred else none
    Σ = (moments.covariance if centred else moments.second).to(W.device)
    Σ_SS, Σ_PS = Σ[S][:, S], Σ[P][:, S]
    λ = ridge * Σ_SS.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(Σ_SS + λ * torch.eye(len(Σ_SS)).to(Σ))
    if failed:
        raise RefitError(
            "the kept activations' moment matrix is not positive definite",
            got=f"ridge {ridge:g}",
            remedy="Use more calibration examples or a larger ridge (refit.ridge).",
        )
    B = torch.cholesky_solve(Σ_PS.T, factor).T
    W_S, W_P = W[:, S], W[:, P]
    shift = W_P @ (μ[P] - B @ μ[S]) if centred else none
    return W_S + W_P @ B, shift


@torch.no_grad()
def refit(
    model: nn.Module, plan: PrunePlan, moments: Moments, *, ridge: float = RIDGE, basis: Basis | None = None
) -> nn.Module:
    """A dense-shaped copy of `model` whose output projections make up for the units that `plan` removes.

    Its masked form and `compact(copy, plan, check_weights=False)` are the plan's refitted model. `basis` is that of the
    plan's path, `moments` those of `model` itself. Raises PlanError, RefitError; ArtifactError when the moments are of
    another model.
    """
    sites = find_sites(model)
    plan.validate_for(sites)
    require_basis(basis, plan.basis)
    result = copy.deepcopy(model) if basis is None else in_basis(model, sites, basis)
    for site in sites:
        layer = layer_at(result, site.out)
        features = width(layer, "in")
        kept = kept_features(site, plan, features)
        if kept.all():
            continue
        own = moments.get(site.name)
        if own is None or len(own.mean) != features:
            raise ArtifactError(
                "the moments are of another model",
                where=site.name,
                expected=f"{features} features",
                got="none" if own is None else f"{len(own.mean)}",
                remedy="Collect them again.",
            )
        if (E := None if basis is None else reading_matrix(site, basis, features)) is not None:
            own = own.turned(E)
        W, bias = matrix(layer), bias_of(layer)
        weight, shift = refit_output(own, W, kept, ridge, centred=bias is not None)
        W[:, kept.to(W.device)] = weight.to(W)
        if bias is not None:
            bias.add_(shift.to(bias))
    return result


def kept_features(site: Site, plan: PrunePlan, width: int) -> Tensor:
    """Which input features of the site's output projection stay: boolean (width,)."""
    kept = {kind: plan.kept(site, kind) for kind in site.counts}
    return torch.from_numpy(site.kept_features(site.out, "in", width, kept))


def save_moments(moments: Moments, path: Path | str) -> None:
    """Write moments as safetensors, atomically."""
    from safetensors.torch import save_file

    tensors = {}
    for name, m in moments.items():
        tensors[f"{name}/mean"], tensors[f"{name}/second"] = m.mean, m.second
        tensors[f"{name}/count"] = torch.tensor([m.count])
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"_type": "Moments", "_version": "1"})


def load_moments(path: Path | str) -> Moments:
    """Moments in a file, or in the files of a directory; each site's are read when they are asked for, and not kept.

    Raises UnavailableError, ArtifactError.
    """
    path = existing(path, "moments file")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return _StoredMoments({name: file for file in files for name in _sites_in(file)})


class _StoredMoments(Mapping[str, SiteMoments]):
    """Site name -> the file that holds its moments."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> SiteMoments:
        with _moments_file(self._files[name]) as stream:
            count, mean, second = (stream.get_tensor(f"{name}/{part}") for part in ("count", "mean", "second"))
        return SiteMoments(int(count), mean, second)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _sites_in(file: Path) -> list[str]:
    with _moments_file(file) as stream:
        return sorted(key.removesuffix("/count") for key in stream.keys() if key.endswith("/count"))  # noqa: SIM118


@contextmanager
def _moments_file(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as stream:
            yield stream
    except SafetensorError as error:
        raise ArtifactError(
            "not a whole moments file",
            where=str(path),
            got=str(error)[:200],
            remedy="Collect the moments again (`--fresh`).",
        ) from error
