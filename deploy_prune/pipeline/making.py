"""The steps that make one model of a family, as plain functions: refit, cut, export, prove, judge.

Each takes what it needs and returns what it made; `staged.py` keeps what they make, `run.py` strings them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.files import read_json
from deploy_prune.pipeline.auditing import audit_of, check_bytes, stored_bytes
from deploy_prune.pipeline.decoders import make_decoder
from deploy_prune.pipeline.setup import Setup, tokenizer_of
from deploy_prune.pipeline.uniform import leave_stock, member_plan

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from deploy_prune.basis import Basis
    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.refitting import Moments

DENSE = "dense"
# Files that a model's stage leaves for the bundle, beside NAME.onnx.
PLAN = "plan.json"
SAMPLES = "samples.safetensors"
SCORES = "scores.safetensors"
CHECKPOINT = "checkpoint"


@dataclass
class Clock:
    """Wall-clock seconds of named steps, in the order taken."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


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


def calibration_of(setup: Setup) -> list[dict[str, np.ndarray]]:
    """The real inputs that files in other precisions are made with and proved on."""
    how = setup.recipe.precision
    batches = setup.task.calibration(how.batch_size, limit=how.examples, seed=setup.recipe.seed)
    return [{key: value.numpy() for key, value in batch.inputs.items()} for batch in batches]


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
