"""The steps of a run as plain functions: find a path, collect moments, cut a member, prove it, judge it, time it.

Each takes what it needs and returns what it made; `run.py` strings them together and decides where the results live.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.errors import DataError
from deploy_prune.files import read_json
from deploy_prune.pipeline.auditing import audit_of, check_bytes, stored_bytes
from deploy_prune.pipeline.decoders import make_decoder
from deploy_prune.pipeline.setup import Setup, tokenizer_of
from deploy_prune.pipeline.uniform import leave_stock, member_plan
from deploy_prune.pipeline.workspace import fingerprint

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from bench.report import LatencyReport
    from bench.timing import Cell
    from deploy_prune.basis import Basis
    from deploy_prune.methods.compute import Compute
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.recipe_parts import BenchPart
    from deploy_prune.refitting import Moments

DENSE = "dense"
# Files that a model's stage leaves for the bundle, beside NAME.onnx.
PLAN = "plan.json"
SAMPLES = "samples.safetensors"
SCORES = "scores.safetensors"
CHECKPOINT = "checkpoint"
DEFAULT_SEQUENCE = 128  # tokens per example where the recipe names none


@dataclass
class Clock:
    """Wall-clock seconds of named steps, in the order taken."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def find_path(setup: Setup, saved: Path | None = None) -> SolutionPath:
    """Search the model once; all processes of the run take part. The path remembers the task, so that members can be
    cut from the file alone (and from the task delta beside it, where one made the model). The search goes on from what
    an earlier one left in the directory `saved`."""
    from deploy_prune.methods import search
    from deploy_prune.saved_state import SavedState

    recipe, how = setup.recipe, setup.recipe.search
    compute = compute_of(setup)
    model = setup.model if compute.shard else setup.model.to(setup.device)
    try:
        path = search(
            model,
            setup.task,
            how.method,
            allocation=how.allocation,
            basis=how.basis,
            stages=how.stages,
            examples=how.examples,
            batch_size=how.batch_size,
            precision=how.precision,
            seed=recipe.seed,
            model_name=recipe.portable()["model"],
            progress=setup.progress,
            compute=compute,
            saved=SavedState(saved, search_fingerprint(setup), recipe.compute.checkpoint_minutes),
            **how.options,
        )
    finally:
        model.cpu()
    learned = {} if setup.delta is None else {"delta": setup.delta}
    return dataclasses.replace(path, options={**path.options, "task": recipe.portable()["task"], **learned})


def compute_of(setup: Setup) -> Compute:
    """How the work is cut up and shared out, by the recipe or by `accelerate launch --use_fsdp`."""
    from deploy_prune import distributed
    from deploy_prune.methods.compute import Compute

    how = setup.recipe.compute
    shard = how.shard or distributed.sharded_by_launcher()
    return Compute(how.micro_batch, how.activation_checkpointing, shard, how.memory_gb)


def search_fingerprint(setup: Setup) -> str:
    """What tells one search from any other: all that its path depends on, but for rounding."""
    return fingerprint({**setup.identity, "search": setup.recipe.search.model_dump(mode="json")})


def moments_of(setup: Setup) -> Moments:
    """First and second moments of what every output projection reads, over the refit's calibration examples."""
    from deploy_prune.refitting import collect_moments

    how = setup.recipe.refit
    limit = min(how.examples or setup.task.calibration_size, setup.task.calibration_size)
    model = setup.model.to(setup.device)
    setup.progress.start(limit, "moments")
    try:
        return collect_moments(
            model,
            setup.sites,
            setup.task.calibration(how.batch_size, limit, setup.recipe.seed),
            setup.task.signature,
            **emphasis_of(setup),
            progress=setup.progress,
        )
    finally:
        setup.progress.finish()
        model.cpu()


def moments_to(setup: Setup, directory: Path) -> None:
    """As `moments_of`, but written to `directory`, a few sites at a time if all do not fit into memory, and by all
    processes of the run. Sites that an earlier call left there whole are not done again."""
    from deploy_prune.methods import placed
    from deploy_prune.methods.compute import GIB
    from deploy_prune.moment_groups import collect_to

    how, task, compute = setup.recipe.refit, setup.task, compute_of(setup)
    limit = min(how.examples or task.calibration_size, task.calibration_size)
    order = task.calibration_order(task.calibration_items(limit), how.batch_size, setup.recipe.seed)
    model = setup.model if compute.shard else setup.model.to(setup.device)
    try:
        with placed(model, setup.sites, compute) as ready:
            collect_to(
                directory,
                ready,
                setup.sites,
                task,
                order,
                limit=setup.recipe.compute.memory_gb * GIB,
                **emphasis_of(setup),
                compute=compute,
                progress=setup.progress,
            )
    finally:
        model.cpu()


def emphasis_of(setup: Setup) -> dict[str, Any]:
    """The losses that weight the refit's tokens, and how far, by the recipe. Raises DataError when it asks for an
    emphasis on data without labels."""
    from deploy_prune.refitting import EMPHASIS

    asked = setup.recipe.refit.emphasis
    losses = setup.task.calibration_losses()
    if asked and losses is None:
        raise DataError(
            "refit.emphasis needs labeled calibration data",
            where=setup.task.name,
            remedy="Give labels, or leave refit.emphasis out.",
        )
    return {"losses": losses, "emphasis": EMPHASIS if asked is None else asked}


def plans_of(setup: Setup, path: SolutionPath) -> dict[str, PrunePlan]:
    """Name -> plan of every member, largest first. Raises BudgetError for a target no plan of the path reaches."""
    family = setup.recipe.family
    named = zip(family.member_names(), family.values, strict=True)
    return {name: member_plan(setup, path, value) for name, value in named}


def export_dense(setup: Setup, directory: Path) -> dict[str, Any]:
    """Write the dense model's ONNX into `directory` and prove it; returns the facts for the manifest."""
    from converters.parity import check_parity
    from deploy_prune.release.samples import record_samples

    clock = Clock()
    onnx = directory / f"{DENSE}.onnx"
    with clock.step("export"):
        exported = export(setup, setup.model, onnx, DENSE)
    with clock.step("parity"):
        parity = check_parity({"dense": setup.model, "onnx": onnx}, setup.task.signature, **parity_options(setup))
    with clock.step("quality"):
        quality = judge(setup, onnx, directory)
    with clock.step("audit"):
        audit = audit_of(setup, onnx)
    record_samples(directory / SAMPLES, setup.model, setup.task.signature, seed=setup.recipe.seed)
    with clock.step("decoder"):
        decoder = make_decoder(setup, setup.model, DENSE, directory)
    facts = {"export": exported, "parity": parity.to_json(), "quality": quality, "audit": audit, "decoder": decoder}
    return {**facts, "seconds": clock.seconds}


def make_member(
    setup: Setup,
    name: str,
    plan: PrunePlan,
    moments: Moments | None,
    directory: Path,
    *,
    unread_bytes: int,
    reference: np.ndarray | None,
    basis: Basis | None = None,
    recovered: Path | None = None,
    dense_audit: Any = None,
) -> dict[str, Any]:
    """Refit, cut, export, prove and judge one member; its files go to `directory`, its facts are returned.

    With `recovered`, the directory of its recovery, refit and cut are done, and the masked form was proved there.
    `basis` is that of the plan's path. `unread_bytes` are parameters that the task's function never reads (see
    `unread_bytes`); `reference` holds the dense model's answers when the metric is agreement, `dense_audit` the audit
    of its graph. Raises ParityError when any two of the masked, compact and ONNX forms differ, or the file holds other
    weights than the plan announced.
    """
    from converters.checkpoint import save_pruned
    from converters.parity import check_parity
    from converters.surgery import compact
    from deploy_prune.release.samples import record_samples

    clock = Clock()
    signature = setup.task.signature
    plan.save(directory / PLAN)
    earlier: dict[str, Any] = {}
    forms: dict[str, Any] = {}
    if recovered is not None:
        from deploy_prune.pipeline.recovering import FACTS, WEIGHTS, recovered_model

        earlier = read_json(recovered / FACTS)
        small = recovered_model(setup, plan, recovered / WEIGHTS)
    else:
        with clock.step("refit"):
            source = planned_weights(setup, plan, moments, basis)
        with clock.step("surgery"):
            small = compact(source, plan, check_weights=False)  # the run checked the plan against the base weights
        forms["masked"] = masked_form(setup, source, plan)
    onnx = directory / f"{name}.onnx"
    with clock.step("export"):
        exported = export(setup, small, onnx, name)
    check_bytes(name, plan, exported, unread_bytes)
    with clock.step("parity"):
        parity = check_parity({**forms, "compact": small, "onnx": onnx}, signature, **parity_options(setup)).to_json()
    if earlier:
        first = earlier["parity"]
        parity |= {"pairs": first["pairs"] + parity["pairs"], "error": max(first["error"], parity["error"])}
    with clock.step("quality"):
        quality = judge(setup, onnx, directory, reference)
    with clock.step("audit"):
        audit = audit_of(setup, onnx, plan, dense_audit)
    record_samples(directory / SAMPLES, small, signature, seed=setup.recipe.seed)
    with clock.step("decoder"):
        decoder = make_decoder(setup, small, name, directory)
    with clock.step("stock"):
        leave_stock(setup, small, directory)
    if setup.recipe.export.checkpoints:
        with clock.step("checkpoint"):
            save_pruned(small, plan, directory / CHECKPOINT, base_model=plan.model, tokenizer=tokenizer_of(setup))
    return {
        "export": exported,
        "parity": parity,
        "quality": quality,
        "audit": audit,
        "decoder": decoder,
        "recovery": earlier.get("recovery"),
        "seconds": {**earlier.get("seconds", {}), **clock.seconds},
    }


def masked_form(setup: Setup, source: nn.Module, plan: PrunePlan) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The output of dense-shaped weights whose removed units are gated off."""
    from deploy_prune.gates import masked

    def form(inputs: Mapping[str, Tensor]) -> Tensor:
        with masked(source, setup.sites, plan):
            return setup.task.signature.call(source, inputs)

    return form


def planned_weights(setup: Setup, plan: PrunePlan, moments: Moments | None, basis: Basis | None) -> nn.Module:
    """The dense-shaped weights that a plan cuts: refitted with the help of moments, otherwise the model's own, in the
    basis of the plan's path."""
    from deploy_prune.basis import in_basis, require_basis
    from deploy_prune.refitting import refit

    if moments is not None:
        return refit(setup.model, plan, moments, ridge=setup.recipe.refit.ridge, basis=basis)
    require_basis(basis, plan.basis)
    return setup.model if basis is None else in_basis(setup.model, setup.sites, basis)


def export(setup: Setup, model: nn.Module, onnx: Path, name: str, *, variant: str | None = None) -> dict[str, Any]:
    """Write one ONNX file, in the form of the recipe's variant or of another, and return the export's report."""
    from converters.onnx_export import export_onnx

    how = setup.recipe.export
    form: Any = variant or how.variant
    about = {"deploy_prune.member": name}
    return export_onnx(model, onnx, setup.task.signature, opset=how.opset, variant=form, metadata=about).to_json()


def judge(
    setup: Setup, onnx: Path, directory: Path, reference: np.ndarray | None = None, predict: Any = None
) -> dict[str, Any] | None:
    """The task's metric of an ONNX file as onnxruntime computes it, or `predict`, its scores per example left in
    `directory`; None without evaluation data."""
    from deploy_prune.release.scores import save_scores
    from deploy_prune.tasks.base import AGREEMENT

    if setup.task.evaluation_size == 0:
        return None
    how = setup.recipe.quality
    predict = predict or onnx_predictor(onnx)
    if setup.task.metric == AGREEMENT and reference is None:
        reference = setup.task.reference_answers(predict, how.batch_size, how.limit, setup.progress)
        _save_reference(reference, directory)
    quality = setup.task.evaluate(predict, how.batch_size, how.limit, setup.progress, reference)
    save_scores(directory / SCORES, quality.per_example)
    return quality.to_json()


def onnx_predictor(onnx: Path) -> Any:
    """A function of the named input tensors that runs `onnx` on the CPU provider."""
    from converters.onnx_session import OnnxSession

    session = OnnxSession(onnx)

    def predict(inputs: Mapping[str, Tensor]) -> np.ndarray:
        return session.run({name: tensor.numpy() for name, tensor in inputs.items()})

    return predict


def time_family(
    setup: Setup,
    files: Mapping[str, Path],
    precisions: Mapping[str, str] | None = None,
    decoders: Mapping[str, Path] | None = None,
) -> list[LatencyReport]:
    """Every cell of the recipe's latency table, those of `decoders` with a cache too; the first of `files` is the
    baseline. Of those in another precision (`precisions`: name -> which) a runtime only gets what it computes in."""
    from bench.inputs import graph_inputs, has_sequence
    from bench.runtimes import get_runtime
    from bench.timing import Cell, measure_cells
    from converters.decoder_export import longest_of
    from converters.precision.formats import runs, steps_run

    how, seed = setup.recipe.bench, setup.recipe.seed
    specs = graph_inputs(next(iter(files.values())))
    usual = min(DEFAULT_SEQUENCE, longest_of(setup.model) or DEFAULT_SEQUENCE)
    lengths: Sequence[int | None] = how.seq or ([usual] if has_sequence(specs) else [None])
    cells = [Cell.made(specs, batch, length, seed) for batch in how.batch for length in lengths]
    reports = []
    for name in how.runtimes:
        runtime = get_runtime(name, trust_code=setup.recipe.model.startswith("python:"))
        timed = {member: file for member, file in files.items() if runs(name, (precisions or {}).get(member, "fp32"))}
        asked = [(timed, cells)]
        if how.past and decoders:
            timed = {m: file for m, file in decoders.items() if steps_run(name, (precisions or {}).get(m, "fp32"))}
            own = {member: graph_inputs(file) for member, file in timed.items()}
            asked.append((timed, list(_steps(own, how, usual, seed))))
        for timed, those in asked:
            reports += measure_cells(
                timed,
                those,
                runtime=runtime,
                seconds=how.seconds,
                threads=how.threads,
                seed=seed,
                progress=setup.progress,
            )
    return reports


def _steps(specs: Mapping[str, Any], how: BenchPart, usual: int, seed: int) -> Iterator[Cell]:
    """One new token on every cache asked for; a prompt, of every length or the `usual` one, where it is empty."""
    from bench.timing import Cell

    for batch in how.batch:
        for past in how.past or ():
            for length in (1,) if past else how.seq or (usual,):
                yield Cell.step(specs, batch, past, seed, sequence=length)


def parity_options(setup: Setup) -> dict[str, Any]:
    how = setup.recipe.parity
    real = [batch.inputs for batch in setup.task.calibration(how.examples, limit=how.examples, seed=setup.recipe.seed)]
    return {"examples": real, "seed": setup.recipe.seed, "tolerance": how.tolerance}


def unread_bytes(setup: Setup, dense: Mapping[str, Any]) -> int:
    """Bytes of parameters that the dense ONNX file does not hold, as the task's output does not depend on them (the
    pooler of a BERT that embeds by the mean)."""
    from deploy_prune.budget import BYTES_PER_PARAMETER, count_params

    return BYTES_PER_PARAMETER * count_params(setup.model) - stored_bytes(dense)


def _save_reference(reference: np.ndarray, directory: Path) -> None:
    import numpy as np

    np.save(directory / "answers.npy", reference, allow_pickle=False)
