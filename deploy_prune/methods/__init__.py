"""The registry of searches. To add one: a file beside this and a line in METHODS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from deploy_prune import distributed
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import Architecture, weights_sha256
from deploy_prune.basis import in_basis, principal_basis
from deploy_prune.blocks import activation_checkpointing, sharded
from deploy_prune.budget import CostModel
from deploy_prune.errors import UsageError, did_you_mean
from deploy_prune.methods.activation_scores import corp, flap, wanda
from deploy_prune.methods.base import BasisName, Context, Method, NoOptions
from deploy_prune.methods.baselines import fisher, magnitude, random, taylor
from deploy_prune.methods.compute import Compute, share
from deploy_prune.methods.fine_grained import FineGrainedOptions, fine_grained
from deploy_prune.methods.kwon import kwon
from deploy_prune.methods.layer_adaptive import LayerAdaptiveOptions, layer_adaptive
from deploy_prune.methods.obs import obs
from deploy_prune.methods.spp import SppOptions, spp
from deploy_prune.methods.staged import blank, joined
from deploy_prune.methods.structural_diff import StructuralDiffOptions, structural_diff
from deploy_prune.path import Allocation, SolutionPath
from deploy_prune.precision import Precision, chosen_precision
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe_text import checked_options
from deploy_prune.refitting import collect_moments, refit
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deploy_prune.refitting import Moments
    from deploy_prune.tasks.base import Task
    from deploy_prune.units import Site

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "spp",
            "solution path by differential inclusion on the gates",
            spp,
            SppOptions,
            basis="principal",
            stages=(0.15, 0.3, 0.45, 0.6),
            calibrated=True,
        ),
        Method(
            "layer-adaptive",
            "layers share the cut by gradient and activation importance, units leave by score within",
            layer_adaptive,
            LayerAdaptiveOptions,
            basis="principal",
        ),
        Method(
            "fine-grained",
            "heads by attention variance, neurons by activations, layers share the cut as in layer-adaptive",
            fine_grained,
            FineGrainedOptions,
            basis="principal",
        ),
        Method(
            "structural-diff",
            "hard-concrete gates on whole units, trained under a constraint on the size",
            structural_diff,
            StructuralDiffOptions,
            basis="principal",
        ),
        Method("kwon", "Fisher information with mask search and rearrangement", kwon),
        Method("obs", "optimal brain surgery on every site, the same share of each", obs, NoOptions, "uniform"),
        Method("flap", "fluctuation of the activations times squared weights, standardised", flap),
        Method(
            "wanda",
            "absolute weights times activation norms, the same share of every site",
            wanda,
            NoOptions,
            "uniform",
        ),
        Method(
            "corp",
            "squared weights times squared activations, the same share of every site",
            corp,
            NoOptions,
            "uniform",
        ),
        Method("fisher", "squared gradient of the gates, summed over examples", fisher),
        Method("taylor", "absolute summed gradient of the gates", taylor),
        Method("magnitude", "squared weights of the coupled rows and columns", magnitude),
        Method("random", "noise, the floor of every comparison", random),
    )
}


def get_method(name: str) -> Method:
    """The registry entry. Raises UsageError naming the closest known method."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", remedy=did_you_mean(name, list(METHODS)))
    return METHODS[name]


def check_options(method: Method, options: dict[str, Any]) -> Any:
    """`options` as the method's own type. Raises UsageError listing every unknown or impossible one."""
    return checked_options(method.options, options, f"method {method.name}")


def search(
    model: nn.Module,
    task: Task,
    method: str = "spp",
    *,
    allocation: Allocation | None = None,
    basis: BasisName | None = None,
    stages: Sequence[float] | None = None,
    examples: int | None = None,
    batch_size: int = 16,
    precision: Precision = "auto",
    seed: int = 0,
    model_name: str | None = None,
    progress: Progress | None = None,
    compute: Compute | None = None,
    saved: SavedState | None = None,
    **options: Any,
) -> SolutionPath:
    """Judge every unit of `model` on the task's calibration data and return the path on which they leave.

    The weights are frozen and unchanged afterwards. `examples` bounds the calibration subset (default: all).
    `allocation` says how units of different sites are ordered (see path.py); `basis` whether the qk and vo units are
    the model's own dimensions or principal ones (see basis.py); `stages` at which sparsities what is still there is
    judged again (see staged.py). Same seed, data and versions: same path.
    `compute` says in which pieces the work is done, `saved` where an interrupted search goes on (the same search: what
    another method or other options left there is not taken up). In a run of several processes every one calls this,
    and all get the same path.
    Raises UsageError (unknown method or option), UnsupportedModelError, DataError.
    """
    import torch

    compute = compute or Compute()

    entry = get_method(method)
    parsed = check_options(entry, options)
    sites = find_sites(model)
    hash_before, name = weights_sha256(model), model_name or _name(model)
    distributed.require_same("the model's weights", hash_before, "A function that builds the model must be seeded.")
    example = next(iter(task.calibration(1, limit=1, seed=seed)), None)
    if example is None:
        raise UsageError("no calibration data", where=task.name, remedy="Give the task calibration data.")
    device = next(model.parameters()).device
    precision = chosen_precision(precision, device)
    at = tuple(sorted(entry.stages if stages is None else stages))
    asked = (hash_before, method, parsed, basis or entry.basis, at, examples, batch_size, precision, seed)
    saved = (saved or SavedState()).narrowed(repr(asked))
    original, training = model, model.training
    required = [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        costs = CostModel.measure(model, sites, task.signature, example.to(device).inputs)
        rows = None
        limit = min(examples or task.calibration_size, task.calibration_size)
        order = task.calibration_order(task.calibration_items(limit), batch_size, seed)
        if (basis or entry.basis) == "principal":
            with placed(model, sites, compute) as ready:
                rows = _principal(ready, sites, task, order, compute, saved, progress or SILENT)
            model = in_basis(model, sites, rows)
        moments = _moments(original, sites, task, order, compute, progress) if at else None
        path = None
        for number, share in enumerate((0.0, *at)):
            plan = None if path is None else path.plan(share)
            if plan is not None:
                assert moments is not None
                model = blank(refit(original, plan, moments, basis=rows), sites, plan)
            torch.manual_seed(seed)
            own = saved.part(f"stage {number}")
            with placed(model, sites, compute) as ready:
                context = Context(
                    ready,
                    sites,
                    costs,
                    task,
                    examples or task.calibration_size,
                    batch_size,
                    precision,
                    seed,
                    progress or SILENT,
                    compute,
                    own,
                )
                if (state := own.load("importance")) is None:
                    importance = {k: v.detach().cpu().double() for k, v in entry.run(context, parsed).items()}
                    own.save("importance", importance, context.facts)
                else:
                    importance = state.tensors
                    context.facts.update(state.facts)
            distributed.require_same(
                f"what {method} found",
                {key: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:8] for key, value in importance.items()},
                "A method must reduce its sums over the processes (Context.accumulate does); run it in one process.",
            )
            if path is not None and plan is not None:
                importance = joined(importance, path, plan, sites, costs)
            path = SolutionPath.from_importance(
                {key: value.numpy() for key, value in importance.items()},
                allocation=allocation or entry.allocation,
                model=name,
                weights_sha256=hash_before,
                sites=sites,
                costs=costs,
                method=method,
                basis=rows,
                options={
                    "basis": basis or entry.basis,
                    "stages": list(at),
                    "examples": context.examples,
                    "batch_size": batch_size,
                    "precision": precision,
                    "seed": seed,
                    **parsed.model_dump(),
                    **({"found": context.facts} if context.facts else {}),
                },
            )
    finally:
        original.train(training)
        for parameter, flag in zip(original.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
    assert path is not None
    return path


@contextmanager
def placed(model: nn.Module, sites: Sequence[Site], compute: Compute) -> Iterator[nn.Module]:
    """`model` as the search runs it: with sharded weights or activation checkpointing if `compute` asks for them."""
    with ExitStack() as stack:
        if compute.shard:
            device = distributed.device() or next(model.parameters()).device
            model = stack.enter_context(sharded(model, sites, device))
        if compute.activation_checkpointing:
            stack.enter_context(activation_checkpointing(model, sites))
        yield model


def _principal(
    model: nn.Module,
    sites: tuple[Site, ...],
    task: Task,
    order: list[list[int]],
    compute: Compute,
    saved: SavedState,
    progress: Progress,
) -> dict[str, Tensor]:
    """The principal basis over all processes, or as an earlier search saved it."""
    label = "principal basis"
    if (state := saved.load(label)) is not None:
        return state.tensors
    progress.start(len(order), label)
    try:
        batches = share(task, order, compute, progress)
        rows = principal_basis(model, sites, batches, task.signature, together=distributed.count() > 1)
    finally:
        progress.finish()
    rows = distributed.broadcast(rows)
    saved.save(label, rows, {})
    return rows


def _moments(
    model: nn.Module,
    sites: tuple[Site, ...],
    task: Task,
    order: list[list[int]],
    compute: Compute,
    progress: Progress | None,
) -> Moments:
    """What the refits between stages need, over all processes."""
    progress = progress or SILENT
    label = "moments for the stages"
    progress.start(len(order), label)
    try:
        with placed(model, sites, compute) as ready:
            batches = share(task, order, compute, progress)
            return collect_moments(
                ready,
                sites,
                batches,
                task.signature,
                losses=task.calibration_losses(),
                together=distributed.count() > 1,
            )
    finally:
        progress.finish()


def _name(model: nn.Module) -> str:
    try:
        known = Architecture.of(model)
    except UsageError:
        return type(model).__name__
    return f"{known.library}:{known.name}"
