"""One phase of the training of a delta: step after step, judged and saved on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy_prune.delta.fits import Tensors
from deploy_prune.delta.options import DiffOptions
from deploy_prune.errors import RecoveryError
from deploy_prune.progress import Progress
from deploy_prune.recovery.feed import Feed
from deploy_prune.recovery.schedule import rate_at
from deploy_prune.recovery.state import Mark, restore_state, state_tensors
from deploy_prune.saved_state import SavedState


@dataclass
class Phase:
    """`groups` are the optimiser's, `loss` that of a batch with all penalties, `tensors` the model's as they stand and
    without noise, `mark` says how good those are. `after` is called with the share of the peak rate, after every step.

    After `run`, `marks` has every judgement, and `best` the tensors of the best one if `keeps_best`.
    """

    name: str
    feed: Feed
    groups: list[dict[str, Any]]
    options: DiffOptions
    seed: int
    loss: Callable[[Any], Tensor]
    tensors: Callable[[], Tensors]
    mark: Callable[[int, Tensors], Mark]
    higher_is_better: bool
    where: str
    keeps_best: bool = True
    after: Callable[[float], None] | None = None
    marks: list[Mark] = field(default_factory=list)
    best: Tensors = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        self.trained = [p for group in self.groups for p in group["params"]]
        self._peaks = [group["lr"] for group in self.groups]
        self._optimizer = torch.optim.Adam(self.groups, fused=True)

    def run(self, saved: SavedState, progress: Progress) -> None:
        """All steps that are left, from the saved state where there is one."""
        steps = self.feed.steps
        every = max(1, round(steps / self.options.evaluations))
        if not self._load(saved):
            self._judge()
        progress.start(steps, f"diff: {self.name}")
        try:
            progress.advance(self.step, "")
            for _, (batch,) in zip(range(self.step, steps), self.feed.batches(self.step), strict=False):
                loss = self._advance(batch, steps)
                progress.advance(1, f"loss {loss:.3g}")
                if self.step % every == 0 or self.step == steps:
                    self._judge()
                if saved.due() or (self.step == steps and saved.directory is not None):
                    self._save(saved)
        finally:
            progress.finish()

    def _advance(self, batch: Any, steps: int) -> float:
        """One step. All chance follows from seed and step."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0]))
        share = rate_at(self.step, steps, self.options.warmup)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise RecoveryError(
                f"the loss is not finite at step {self.step + 1} of {self.name}", where=self.where, remedy="Lower lr."
            )
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.options.clip)
        self._optimizer.step()
        if self.after is not None:
            self.after(share)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def _judge(self) -> None:
        now = self.tensors()
        self.marks.append(self.mark(self.step, now))
        if self.keeps_best and all(self.marks[-1].beats(m, self.higher_is_better) for m in self.marks[:-1]):
            self.best = {name: t.detach().clone() for name, t in now.items()}

    def _named(self) -> Tensors:
        return {str(number): p for number, p in enumerate(self.trained)}

    def _save(self, saved: SavedState) -> None:
        tensors = state_tensors(self._named(), self._optimizer, None, self.best)
        if self.step == self.feed.steps:  # nothing is left to be optimised
            tensors = {name: t for name, t in tensors.items() if not name.startswith("optimizer/")}
        saved.save(self.name, tensors, {"step": self.step, "marks": [vars(mark) for mark in self.marks]})

    def _load(self, saved: SavedState) -> bool:
        state = saved.load(self.name)
        if state is None:
            return False
        found = restore_state(state.tensors, self._named(), self._optimizer, None)
        device = self.trained[0].device
        self.best = {name: t.to(device) for name, t in (found or {}).items()}
        self.step = int(state.facts["step"])
        self.marks = [Mark(**mark) for mark in state.facts["marks"]]
        return True
