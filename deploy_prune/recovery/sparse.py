"""Recovery by a sparse delta: all weights move until it is known which must, then these alone; the rest is as given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deploy_prune.errors import UsageError
from deploy_prune.recovery.schedule import rate_at
from deploy_prune.recovery.training import Training

if TYPE_CHECKING:
    from deploy_prune.methods.compute import Compute
    from deploy_prune.progress import Progress
    from deploy_prune.recovery.options import RecoverOptions
    from deploy_prune.tasks.base import Batch, Task

# Measured on held-out calibration data (bench/notes.md).
SHRINKAGE = 0.6  # in steps of the rate: an AdamW step is about so long, and what has no steady direction stays at 0
FASTER = 30.0  # how much higher the rate is over the choice: few weights must now do the work of all


class SparseTraining(Training):
    """θ = θ₀ + m ⊙ δ, θ₀ the given weights, m in {0, 1}.

    In the first part of the steps m = 1, and every step η is followed by the proximal one of λ‖δ‖₁,
    δ ← sign(δ) max(|δ| − η λ, 0). Then m keeps the `share` of the weights with the largest |δ|, over all tensors (the
    projection of diff pruning, arXiv 2012.07463; lottery ticket sparse fine-tuning, arXiv 2110.07560), δ goes on from
    where it stands, and optimiser and rate start anew. Only models of the second part count as candidates.
    """

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
        if compute.shard:
            raise UsageError(
                "a sparse delta needs whole weights in every process",
                where="recover.method diff",
                remedy="Leave compute.shard out, or train all weights: method full.",
            )
        super().__init__(given, task, teacher, options, compute, seed, progress)
        steps = self.feed.steps
        if steps < 2:
            raise UsageError(
                "too few steps to find a sparse delta and to train it", expected="at least 2", got=str(steps)
            )
        self.projected_at = min(max(1, round(options.find * steps)), steps - 1)  # steps before the choice is made
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0  # it moves every weight, and the largest most
        self.masks: dict[str, Tensor] = {}
        self._start = {name: p.detach().clone() for name, p in self.parameters.items()}

    @property
    def count(self) -> int:
        """How many weights may change."""
        return max(1, round(self.options.share * sum(p.numel() for p in self.parameters.values())))

    def _step(self, step: int, parts: list[Batch]) -> float:
        if step == self.projected_at:
            self._project()
        loss = super()._step(step, parts)
        if self.masks:
            self._put_back(self.parameters)
        else:
            self._shrink(self._rate(step))
        return loss

    def _rate(self, step: int) -> float:
        rate, warmup, first = self.options.rate, self.options.warmup, self.projected_at
        if step < first:
            return rate * rate_at(step, first, warmup)
        return FASTER * rate * rate_at(step - first, self.feed.steps - first, warmup)

    @torch.no_grad()
    def _shrink(self, η: float) -> None:
        for name, p in self.parameters.items():
            δ = p - self._start[name]
            p.copy_(self._start[name] + δ.sign() * (δ.abs() - η * SHRINKAGE).clamp(min=0))

    def _judge(self) -> None:
        if self.standing.step > self.projected_at:
            super()._judge()
        else:
            self.standing.marks.append(self._mark())  # for the record: this one is not sparse

    @torch.no_grad()
    def _project(self) -> None:
        from deploy_prune.delta.fits import largest

        differences = {name: p.detach() - self._start[name] for name, p in self.parameters.items()}
        chosen = largest(differences, self.count)
        masks = {name: torch.zeros(p.shape, dtype=torch.bool, device=p.device) for name, p in self.parameters.items()}
        for name, where in chosen.items():
            masks[name].view(-1)[where] = True
        self.optimizer.state.clear()
        self._take(masks)

    def _take(self, masks: Mapping[str, Tensor]) -> None:
        """From now on only what the masks leave open moves."""
        self.masks = dict(masks)
        for name, p in self.parameters.items():
            mask = self.masks[name]
            p.register_hook(lambda gradient, mask=mask: gradient * mask)
        self._put_back(self.parameters)
        if self.ema is not None:
            self._put_back(self.ema.mean)

    @torch.no_grad()
    def _put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo, to the bit, what moved outside of the masks."""
        for name, tensor in tensors.items():
            tensor.copy_(torch.where(self.masks[name], tensor, self._start[name]))

    def _own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"mask/{name}": mask for name, mask in self.masks.items()}, {}

    def _take_own_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        saved = {
            name: tensors[f"mask/{name}"].to(p.device)
            for name, p in self.parameters.items()
            if f"mask/{name}" in tensors
        }
        if saved:
            self._take(saved)
