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
from deploy_prune.activations import watching
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

# Relative to the mean diagonal. On held-out calibration images of ViT-Tiny 1e-4 and 1e-3 are equal within noise
# (bench/notes.md).
RIDGE = 1e-3


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
    """Sums of x − s and (x − s)(x − s)ᵀ with s the first batch's mean, so that float32 products lose nothing."""

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.first = self.product = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Take tokens x (n, d)."""
        x = x.float()
        if not self.count:
            self.shift = x.mean(0)
            self.first = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.product = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        centred = x - self.shift
        self.count += len(x)
        self.first += centred.sum(0, dtype=torch.float64)
        self.product += (centred.T @ centred).double()

    def result(self) -> SiteMoments:
        shift = self.shift.double()
        offset = self.first / self.count
        mean = shift + offset
        covariance = self.product / self.count - torch.outer(offset, offset)
        return SiteMoments(self.count, mean.cpu(), (covariance + torch.outer(mean, mean)).cpu())


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    signature: Signature,
    *,
    progress: Progress = SILENT,
    together: bool = False,
) -> dict[str, SiteMoments]:
    """Stream calibration `batches` through the dense model; padding tokens are left out.

    `together`: every process of the run streams its share, and all get the moments of the whole. Memory: one (d, d)
    float64 matrix per site, a few more while they are made, never the activations. Raises DataError when there is no
    batch, RefitError when activations are not finite.
    """
    sums = {site.name: _Accumulator() for site in sites}
    device = next(model.parameters()).device
    with watching(model, sites, lambda name, x: sums[name].add(x)) as watch:
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            watch.attend(signature, inputs)
            watch.idle = isinstance(batch, IdleBatch)
            signature.call(model, inputs)
            progress.advance(len(next(iter(inputs.values()))))
    moments = {name: s.result() for name, s in sums.items() if s.count}
    if together:
        moments = _of_all_processes(moments)
    if len(moments) < len(sums):
        raise DataError("no calibration data for the refit", remedy="Give the task calibration data.")
    bad = [name for name, m in moments.items() if not torch.isfinite(m.second).all()]
    if bad:
        raise RefitError("activations are not finite", problems=bad, remedy="Check the model and its inputs.")
    return moments


def _of_all_processes(moments: Moments) -> dict[str, SiteMoments]:
    """Σ n x̄ / Σ n over the processes, one site at a time."""
    total: dict[str, SiteMoments] = {}
    for name in sorted(set().union(*distributed.all_gather(set(moments)))):
        own = moments.get(name)
        sums = {} if own is None else {"mean": own.count * own.mean, "second": own.count * own.second}
        count = sum(distributed.all_gather(own.count if own else 0))
        reduced = distributed.reduce(sums)
        total[name] = SiteMoments(count, reduced["mean"] / count, reduced["second"] / count)
    return total


def refit_output(
    moments: SiteMoments, weight: Tensor, kept: Tensor, ridge: float, *, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Weights and bias shift that best replace the removed inputs of an output projection.

    Least squares over the calibration tokens (CORP, arXiv 2602.05243):
        B = Σ_PS (Σ_SS + λI)⁻¹,   W̃ = W_S + W_P B,   Δb = W_P (μ_P − B μ_S)
    with λ = `ridge` · mean diag Σ_SS. `weight` is (out, in), `kept` boolean (in,); the results, (out, kept) and (out,),
    are float64. For a layer without bias pass `centred=False`: second moments about zero take the place of Σ and
    Δb = 0. Raises RefitError when Σ_SS + λI is not positive definite.
    """
    S, P = kept, ~kept
    Σ = moments.covariance if centred else moments.second
    if not S.any():  # nothing is left to make up with but the mean
        W = weight.double().cpu()
        return W[:, S], W @ moments.mean if centred else torch.zeros(len(W), dtype=torch.float64)
    Σ_SS, Σ_PS = Σ[S][:, S], Σ[P][:, S]
    λ = ridge * Σ_SS.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(Σ_SS + λ * torch.eye(len(Σ_SS), dtype=Σ.dtype))
    if failed:
        raise RefitError(
            "the kept activations' moment matrix is not positive definite",
            got=f"ridge {ridge:g}",
            remedy="Use more calibration examples or a larger ridge (refit.ridge).",
        )
    B = torch.cholesky_solve(Σ_PS.T, factor).T
    W = weight.double().cpu()
    W_S, W_P = W[:, S], W[:, P]
    μ_S, μ_P = moments.mean[S], moments.mean[P]
    shift = W_P @ (μ_P - B @ μ_S) if centred else torch.zeros(len(W), dtype=torch.float64)
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
