"""The training of a task delta: find the values that change, fix the choice, train them alone (arXiv 2012.07463)."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deploy_prune.architecture import weights_sha256
from deploy_prune.delta import fits
from deploy_prune.delta.fits import Tensors
from deploy_prune.delta.gated import NOISE
from deploy_prune.delta.lora import adapters_of
from deploy_prune.delta.options import DiffOptions
from deploy_prune.delta.phase import Phase
from deploy_prune.delta.task_delta import TaskDelta
from deploy_prune.errors import DataError, UnsupportedModelError, UsageError
from deploy_prune.precision import chosen_precision
from deploy_prune.progress import SILENT, Progress
from deploy_prune.recipe_text import checked_options
from deploy_prune.recovery.feed import Feed, split
from deploy_prune.recovery.judging import Judge
from deploy_prune.recovery.options import RecoverOptions
from deploy_prune.recovery.pair import Called
from deploy_prune.recovery.state import Mark
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task


@dataclass(frozen=True)
class Diffed:
    """A delta and how it was found. `before` and `after` are the metric on the held-out calibration part, which no step
    saw; `trainable` counts the numbers trained in each phase, the head's among them, and `state_bytes` what they, their
    gradients and Adam's two means take, beside the frozen base; `full_state_bytes` is that of training everything,
    `lora_state_bytes` that of adapters of about as many numbers, None where the model's layers are not known."""

    delta: TaskDelta
    model: nn.Module
    metric: str
    before: float
    after: float
    share: float
    trainable: dict[str, int]
    state_bytes: dict[str, int]
    full_state_bytes: int
    lora_state_bytes: int | None
    seconds: float
    marks: dict[str, list[Mark]]

    def to_json(self) -> dict[str, Any]:
        """Everything but tensors, as plain JSON data."""
        sizes = ("trainable", "state_bytes", "full_state_bytes", "lora_state_bytes")
        names = ("metric", "before", "after", "share", *sizes, "seconds")
        marks = {phase: [asdict(mark) for mark in marks] for phase, marks in self.marks.items()}
        return {**{name: getattr(self, name) for name in names}, "marks": marks}


def diff(
    model: nn.Module,
    task: Task,
    *,
    head: tuple[str, ...] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    saved: SavedState | None = None,
    **options: Any,
) -> Diffed:
    """Learn what the task changes of the frozen base `model`, on the task's calibration data.

    First every value may change, under a penalty on how many do (l0, l1); then the largest `share` of the changes is
    kept and trained alone, from where it stands. The task's head, modules or tensors that start with one of the names
    `head` (by default those that `head_of` finds), is trained whole and does not count. The best weights on the
    held-out part are kept. `options` are those of DiffOptions; `saved` is where an interrupted training goes on, to the
    same delta. The given model is not changed. Same seed, data and versions: same delta. Raises UsageError (options),
    DataError (no labels), RecoveryError (the loss is not finite).
    """
    parsed = checked_options(DiffOptions, options, "diff pruning")
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        training = _Training(model, task, head_of(model) if head is None else head, parsed, seed, progress or SILENT)
        return training.run(saved or SavedState())


def head_of(model: nn.Module) -> tuple[str, ...]:
    """The names that a task's head starts with: what a transformers model has beside its base model, or timm's
    classifier. Raises UsageError where neither says."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):
        own = [name for name, _ in model.named_children() if name != prefix]
        names = [name for name, _ in model.named_parameters()]  # a tied output layer is of the base
        return tuple(head for head in own if any(name.startswith(f"{head}.") for name in names))
    if hasattr(model, "get_classifier"):
        timm_model: Any = model
        classifier = timm_model.get_classifier()
        return tuple(name for name, module in model.named_modules() if module is classifier)
    if prefix:
        return ()  # a transformers model without a head
    raise UsageError(
        "cannot tell the task's head from the base",
        got=type(model).__name__,
        remedy='Name it, as in head=("classifier",); head=() for none.',
    )


class _Training:
    def __init__(
        self, model: nn.Module, task: Task, head: tuple[str, ...], options: DiffOptions, seed: int, progress: Progress
    ) -> None:
        self.task, self.options, self.seed, self.progress = task, options, seed, progress
        self.device = next(model.parameters()).device
        self.frozen = copy.deepcopy(model).requires_grad_(False)
        named = {n: p.detach() for n, p in self.frozen.named_parameters()}
        self.head = {n: p.clone().requires_grad_() for n, p in named.items() if n.startswith(_prefixes(head, named))}
        self.base = {n: p for n, p in named.items() if n not in self.head and p.is_floating_point()}
        self.train_items, held_out = split(task, self._feeding(1.0))
        if next(iter(task.calibration_batches([held_out[:1]]))).target is None:
            raise DataError("a task delta needs labeled calibration data", where=task.name, remedy="Give labels.")
        self.judge = Judge(task, held_out, None)
        self.called: nn.Module = Called(self.frozen, task.signature).eval()
        self.bf16 = chosen_precision(options.precision, self.device) == "bf16"
        self.trainable: dict[str, int] = {}
        self.marks: dict[str, list[Mark]] = {}
        self.saved = SavedState()

    def run(self, saved: SavedState) -> Diffed:
        options, begun = self.options, time.monotonic()
        self.saved = saved.narrowed(self._identity())
        count = round(options.share * sum(t.numel() for t in self.base.values()))
        if not count and options.fit in ("l0", "l1", "random"):
            raise UsageError(
                "the share leaves no value to change",
                got=f"{options.share:g} of {sum(t.numel() for t in self.base.values())}",
                remedy="Raise share, or train the head alone: fit=last-layer.",
            )
        if options.fit == "lora":
            return self._lora(count, begun)
        fit: fits.Sparse | fits.Whole
        if options.fit in ("l0", "l1"):
            differences = self._find()
            fit = fits.Sparse(self.base, fits.largest(differences, count), differences)
        elif options.fit == "random":
            fit = fits.Sparse(self.base, fits.at_random(self.base, count, self.seed))
        elif options.fit == "bitfit":
            fit = fits.Whole({n: t for n, t in self.base.items() if n.endswith("bias")})
        else:
            fit = fits.Whole({} if options.fit == "last-layer" else self.base)
        if options.mask_epochs:
            groups = fit.groups(options.fixed_rate)
            tensors = self._train("mask", options.mask_epochs, groups, options.fixed_rate, lambda _: fit.tensors())
        else:
            tensors = fit.tensors()
            self.marks["mask"] = [self._mark(0, tensors)]
        return self._done(tensors, begun)

    def _lora(self, count: int, begun: float) -> Diffed:
        """Adapters in place of differences, merged at the end."""
        from deploy_prune.recovery.lora import merge_adapters

        adapted = adapters_of(self.frozen, count).beside(self.frozen)
        self.called = Called(adapted, self.task.signature).eval()
        own = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        rate = self.options.fixed_rate
        groups = [{"params": list(own.values()), "lr": rate}]
        best = self._train("mask", self.options.mask_epochs, groups, rate, lambda _: dict(own))
        with torch.no_grad():
            for name, t in best.items():
                own[name].copy_(t)
            merge_adapters(adapted)
            named = dict(adapted.named_parameters())
            for name, p in self.head.items():
                named[name].copy_(p)
        return self._result(adapted, begun)

    def _find(self) -> Tensors:
        """δ where every value may change."""
        options = self.options
        dense = fits.Dense(
            self.base,
            gated=options.fit == "l0",
            alpha=options.alpha,
            strength=options.strength,
            owners=fits.owners_of(self.frozen, self.base, options.groups),
        )
        self._train(
            "find",
            options.epochs,
            dense.groups(options.lr, options.gate_lr),
            options.lr,
            lambda training: dense.tensors(training=training),
            penalty=dense.penalty,
            after=dense.shrink,
            keeps_best=False,
        )
        return {name: δ.clone() for name, δ in dense.differences().items()}

    def _train(
        self,
        name: str,
        epochs: float,
        groups: list[dict[str, Any]],
        rate: float,
        tensors: Callable[[bool], Tensors],
        *,
        penalty: Callable[[], Tensor] | None = None,
        after: Callable[[float], None] | None = None,
        keeps_best: bool = True,
    ) -> Tensors:
        """One phase, and the head with it; the best tensors of the model on the held-out part. Without `keeps_best` the
        end counts, and nothing is returned: what is found is what the penalty has left at the end."""
        options = self.options
        groups = [*groups, {"params": list(self.head.values()), "lr": options.head_lr or rate}]
        groups = [g for g in groups if g["params"]]
        if not groups:
            raise UsageError("nothing to train", where=f"fit {options.fit}", remedy="Name a head, or another fit.")

        def loss(batch: Batch) -> Tensor:
            own = self._loss({**tensors(True), **self.head}, batch)
            return own if penalty is None else own + penalty().to(own)

        phase = Phase(
            name,
            Feed(self.task, self.train_items, self._feeding(epochs), self.seed),
            groups,
            options,
            self.seed,
            loss=loss,
            tensors=lambda: {**tensors(False), **self.head},
            mark=self._mark,
            higher_is_better=self.task.higher_is_better,
            where=self.task.name,
            keeps_best=keeps_best,
            after=None if after is None else lambda share: after(rate * share),
        )
        self.trainable[name] = sum(p.numel() for p in phase.trained)
        phase.run(self.saved, self.progress)
        self.marks[name] = phase.marks
        if keeps_best:
            with torch.no_grad():
                for own, p in self.head.items():
                    p.copy_(phase.best[own])
        return {own: t for own, t in phase.best.items() if own not in self.head}

    def _identity(self) -> str:
        """All that the delta depends on."""
        how = self.options.model_dump(mode="json")
        parts = [
            weights_sha256(self.frozen),
            sorted(self.head),
            how,
            self.task.describe(),
            self.seed,
            torch.__version__,
            NOISE,
        ]
        return json.dumps(parts, sort_keys=True)

    @torch.no_grad()
    def _mark(self, step: int, tensors: Tensors) -> Mark:
        """The mark of these tensors, with the head as it is, on the held-out part."""
        now = {**tensors, **self.head}
        return self.judge.mark(step, lambda inputs: self._output(now, inputs, training=False))

    def _loss(self, tensors: Tensors, batch: Batch) -> Tensor:
        here = batch.to(self.device)
        return self.task.loss(self._output(tensors, here.inputs, training=True), here).mean()

    def _output(self, tensors: Tensors, inputs: Mapping[str, Tensor], *, training: bool) -> Tensor:
        _train_mode(self.called, training)
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            own = {f"model.{name}": t for name, t in tensors.items()}
            there = {name: t.to(self.device) for name, t in inputs.items()}
            output: Tensor = functional_call(self.called, own, (there,)).float()
        return output

    def _done(self, tensors: Tensors, begun: float) -> Diffed:
        result = copy.deepcopy(self.frozen)
        own = dict(result.named_parameters())
        with torch.no_grad():
            for name, t in {**tensors, **self.head}.items():
                own[name].copy_(t)
        return self._result(result, begun)

    def _result(self, result: nn.Module, begun: float) -> Diffed:
        phases = [phase for phase in ("find", "mask") if phase in self.marks]
        last = self.marks[phases[-1]]
        higher = self.task.higher_is_better
        best = last[0]
        for mark in last[1:]:
            best = mark if mark.beats(best, higher) else best
        before = self.marks[phases[0]][0]
        options = self.options.model_dump(mode="json", exclude_none=True)
        delta = TaskDelta.between(
            self.frozen, result, self.head, {"task": self.task.describe(), "options": options, "seed": self.seed}
        )
        total = sum(t.numel() for t in (*self.base.values(), *self.head.values()))
        return Diffed(
            delta,
            result.requires_grad_(True).eval(),
            self.task.metric,
            before=before.value,
            after=best.value,
            share=delta.count / sum(t.numel() for t in self.base.values()),
            trainable=self.trainable,
            state_bytes={phase: _state_bytes(count) for phase, count in self.trainable.items()},
            full_state_bytes=_state_bytes(total),
            lora_state_bytes=self._lora_state_bytes(),
            seconds=time.monotonic() - begun,
            marks=self.marks,
        )

    def _lora_state_bytes(self) -> int | None:
        count = round(self.options.share * sum(t.numel() for t in self.base.values()))
        try:
            adapters = adapters_of(self.frozen, count)
        except UnsupportedModelError:
            return None
        return _state_bytes(adapters.numbers + sum(p.numel() for p in self.head.values()))

    def _feeding(self, epochs: float) -> RecoverOptions:
        own = self.options
        return RecoverOptions(
            epochs=max(epochs, 1e-9), batch_size=own.batch_size, holdout=own.holdout, examples=own.examples
        )


def _state_bytes(numbers: int) -> int:
    """float32 numbers with their gradients and Adam's two means."""
    return 4 * 4 * numbers


def _prefixes(head: tuple[str, ...], named: Mapping[str, Tensor]) -> tuple[str, ...]:
    """As prefixes of parameter names. Raises UsageError for a name that nothing starts with."""
    found = tuple(name if name in named else f"{name}." for name in head)
    unknown = [own for own in found if not any(name.startswith(own) for name in named)]
    if unknown:
        got = ", ".join(own.rstrip(".") for own in unknown)
        raise UsageError("the model has no such head", got=got, remedy="Name modules or tensors of it.")
    return found or ("\0",)


def _train_mode(called: nn.Module, training: bool) -> None:
    """Dropout works in training; norms with running statistics never do: the base is frozen."""
    if called.training == training:
        return
    called.train(training)
    for module in called.modules():
        if hasattr(module, "running_mean"):
            module.eval()
