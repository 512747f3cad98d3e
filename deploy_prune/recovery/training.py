"""The loop of one recovery: step after step, judged and saved on the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy_prune import distributed
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.blocks import shard, whole
from deploy_prune.errors import RecoveryError
from deploy_prune.methods.compute import Compute
from deploy_prune.precision import chosen_precision
from deploy_prune.progress import Progress
from deploy_prune.recovery.ema import Ema
from deploy_prune.recovery.feed import Feed, split
from deploy_prune.recovery.hidden import layers_of
from deploy_prune.recovery.judging import Judge
from deploy_prune.recovery.lora import add_adapters, merge_adapters
from deploy_prune.recovery.objective import Objective
from deploy_prune.recovery.options import RecoverOptions
from deploy_prune.recovery.pair import Called, Pair
from deploy_prune.recovery.regularise import soften
from deploy_prune.recovery.schedule import decay_groups, rate_at
from deploy_prune.recovery.state import Mark, Standing, restore_state, state_tensors
from deploy_prune.saved_state import SavedState
from deploy_prune.tasks.base import AGREEMENT

if TYPE_CHECKING:
    from deploy_prune.tasks.base import Batch, Task

_NAME = "recovery"  # of the saved state
_SHOWN = 20  # last losses whose mean is shown


class Training:
    """One recovery: made, run once, asked for its best model. `given` is never changed."""

    def __init__(
        self,
        given: nn.Module,
        task: Task,
        teacher: nn.Module | None,
        options: RecoverOptions,
        compute: Compute,
        seed: int,
        progress: Progress,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        unread = DistributedDataParallelKwargs(find_unused_parameters=True)  # a pooler that no output reads
        self.accelerator = Accelerator(
            cpu=next(given.parameters()).device.type == "cpu", kwargs_handlers=[unread], device_placement=False
        )
        self.device = distributed.device() or next(given.parameters()).device
        self.given, self.task, self.options, self.seed, self.progress = given, task, options, seed, progress
        train, self.held_out = split(task, options)
        self.feed = Feed(task, train, options, seed, compute.micro_batch)
        labeled = next(iter(task.calibration_batches([self.held_out[:1]]))).target is not None
        self.objective = Objective(task, options, labeled=labeled, taught=teacher is not None)
        taught = teacher if self.objective.needs_teacher or task.metric == AGREEMENT else None
        sites = find_sites(given)
        dense_sites = sites if teacher is None else find_sites(teacher)
        self.layers = layers_of(given, dense_sites)

        torch.manual_seed(seed)  # adapters start from random numbers
        student = self._learner().to(self.device)
        called: nn.Module = Called(student, task.signature)
        if compute.shard:
            shard(student, sites, self.device)
        elif distributed.count() > 1:
            called = self.accelerator.prepare_model(called)
        self.called, self.student = called, student
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        groups = decay_groups(student, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate, fused=True)
        self.ema = None if options.ema is None else Ema(self.parameters, options.ema)
        self.pair = Pair(
            student,
            called,
            taught,
            task.signature,
            sites=sites,
            dense_sites=dense_sites,
            layers=self.layers,
            device=self.device,
            bf16=chosen_precision(options.precision, self.device) == "bf16",
            hidden=bool(self.objective.w_hidden),
            drop_path=options.drop_path,
            compute=compute,
        )
        self.judge = Judge(task, self.held_out, None if taught is None else lambda inputs: self.pair.dense(inputs)[0])
        self.standing = Standing()
        self.best_weights: dict[str, Tensor] | None = None  # None: the start is the best
        self.identity = {
            "weights": weights_sha256(given),
            "teacher": None if teacher is None else weights_sha256(teacher),
            "options": options.model_dump(mode="json", exclude={"workers"}),
            "task": task.describe(),
            "items": len(train),
            "seed": seed,
            "processes": distributed.count(),
            "torch": torch.__version__,
        }

    def run(self, saved: SavedState) -> None:
        """All steps that are left, from the saved state where there is one."""
        with self.pair:
            if not self._load(saved):
                self.standing.marks.append(self._mark())
            steps, standing = self.feed.steps, self.standing
            every = max(1, round(steps / self.options.evaluations))
            self.progress.start(steps, "recover")
            try:
                self.progress.advance(standing.step, self._note())
                begun = time.monotonic()
                earlier = standing.seconds
                for step, parts in zip(range(standing.step, steps), self.feed.batches(standing.step), strict=False):
                    if self._patience_is_out():
                        break
                    standing.losses = [*standing.losses, self._step(step, parts)][-_SHOWN:]
                    standing.step = step + 1
                    if standing.step % every == 0 or standing.step == steps:
                        self._judge()
                    standing.seconds = earlier + time.monotonic() - begun
                    self.progress.advance(1, self._note())
                    if saved.due():
                        self._save(saved)
            finally:
                self.progress.finish()

    def best(self) -> nn.Module:
        """The best candidate, in the shape and place of the given model."""
        model = copy.deepcopy(self.given)
        if self.best_weights is not None:
            if self.options.method == "lora":
                self._adapt(model)
            self._put_best(model)
            if self.options.method == "lora":
                merge_adapters(model)
        for parameter, like in zip(model.parameters(), self.given.parameters(), strict=True):
            parameter.requires_grad_(like.requires_grad)
        return model.train(self.given.training)

    def _put_best(self, model: nn.Module) -> None:
        """Write the best weights into a model that has them by the same names."""
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in (self.best_weights or {}).items():
                own[name].copy_(value)

    def _step(self, step: int, parts: list[Batch]) -> float:
        """One optimiser step; returns the mean loss of its parts. All chance follows from seed, step and process."""
        options, rank = self.options, distributed.index()
        torch.manual_seed(int(np.random.SeedSequence([self.seed, step, rank]).generate_state(1)[0]))
        total, rows = 0.0, sum(map(len, parts))
        for number, part in enumerate(parts):
            random = np.random.default_rng([self.seed, step, rank, number])
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.called):
                loss = self._loss(part.to(self.device), random) * (len(part) / rows)
                self.accelerator.backward(loss)
            total += float(loss.detach())
        if not np.isfinite(total):
            raise RecoveryError(
                f"the loss is not finite at step {step + 1}",
                where=self.task.name,
                got=str(total),
                remedy="Lower recover.lr, or use recover.precision fp32.",
            )
        nn.utils.clip_grad_norm_(self.parameters.values(), options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.parameters, step + 1)
        return total

    def _rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.options.rate * rate_at(step, self.feed.steps, self.options.warmup)

    def _loss(self, batch: Batch, random: np.random.Generator) -> Tensor:
        if self.options.softens_labels:
            batch = soften(batch, self.options, int(self.task.signature.output.shape[-1]), random)
        dense, dense_states = self.pair.dense(batch.inputs) if self.objective.needs_teacher else (None, [])
        output, states = self.pair.own(batch.inputs, training=True)
        mask = next((batch.inputs[s.name] for s in self.task.signature.inputs if s.role == "mask"), None)
        return self.objective(output, batch, dense, states, dense_states, mask)

    def _judge(self) -> None:
        """Judge the present weights (their mean, when there is one) and keep them when no earlier ones are as good."""
        standing = self.standing
        with nullcontext() if self.ema is None else self.ema.in_place_of(self.parameters):
            standing.marks.append(self._mark())
            standing.since += 1
            if standing.marks[-1].beats(standing.marks[standing.best], self.task.higher_is_better):
                standing.best, standing.since = len(standing.marks) - 1, 0
                self._keep_best()

    def _keep_best(self) -> None:
        self.best_weights = {n: whole(p).detach().cpu().clone() for n, p in self.parameters.items()}

    def _mark(self) -> Mark:
        """The main process's mark of the present weights; every process takes part."""
        return distributed.broadcast(self.judge.mark(self.standing.step, lambda inputs: self.pair.own(inputs)[0]))

    def _learner(self) -> nn.Module:
        """What is trained: in eval mode, so that no dropout of the library's disturbs the distillation."""
        student = copy.deepcopy(self.given).eval()
        if self.options.method == "lora":
            self._adapt(student)
        else:
            student.requires_grad_(True)
        return student

    def _adapt(self, model: nn.Module) -> None:
        alpha = self.options.alpha if self.options.alpha is not None else 2.0 * self.options.rank
        add_adapters(model, self.layers, self.options.rank, alpha)

    def _patience_is_out(self) -> bool:
        return self.options.patience is not None and self.standing.since >= self.options.patience

    def _note(self) -> str:
        best = self.standing.marks[self.standing.best]
        mean = f"loss {np.mean(self.standing.losses):.3g}, " if self.standing.losses else ""
        return f"{mean}best {self.task.metric} {best.value:.4g} at step {best.step}"

    def _load(self, saved: SavedState) -> bool:
        state = saved.load(_NAME)
        if state is None:
            return False
        mean = None if self.ema is None else self.ema.mean
        self.best_weights = restore_state(state.tensors, self.parameters, self.optimizer, mean)
        self.standing = Standing.from_json(state.facts["standing"])
        self._take_own_state(state.tensors, state.facts["own"])
        return True

    def _save(self, saved: SavedState) -> None:
        mean = None if self.ema is None else self.ema.mean
        tensors = state_tensors(self.parameters, self.optimizer, mean, self.best_weights)
        own, facts = self._own_state()
        saved.save(_NAME, tensors | own, {"standing": self.standing.to_json(), "own": facts})

    def _own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a training of another kind must find again besides weights and standing: tensors and JSON data."""
        return {}, {}

    def _take_own_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take up what `_own_state` gave."""
