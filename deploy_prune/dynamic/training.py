"""The loop of a dynamic training: recovery's, under gates that open and close on the way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy_prune import distributed
from deploy_prune.dynamic.history import Change, History
from deploy_prune.dynamic.optimiser_state import renew
from deploy_prune.dynamic.options import DynamicOptions
from deploy_prune.dynamic.structure import Structure, exchanged_units
from deploy_prune.gates import gated
from deploy_prune.plan import PrunePlan
from deploy_prune.recovery.training import Training
from deploy_prune.saved_state import SavedState

if TYPE_CHECKING:
    from deploy_prune.methods.compute import Compute
    from deploy_prune.progress import Progress
    from deploy_prune.tasks.base import Batch, Task


class DynamicTraining(Training):
    """Trains dense-shaped weights under the gates of a `Structure`. Gates are 0 or 1 and never trained; their gradient
    g is kept over the steps between two changes.

    Importance of an active unit is Σ g², its Fisher information over the batches; growth of an inactive one |Σ g|, the
    first-order fall or rise of the loss were it there.
    """

    options: DynamicOptions

    def __init__(
        self,
        given: nn.Module,
        task: Task,
        structure: Structure,
        teacher: nn.Module | None,
        options: DynamicOptions,
        compute: Compute,
        seed: int,
        progress: Progress,
    ) -> None:
        super().__init__(given, task, teacher, options, compute, seed, progress)
        self.structure = structure
        self.history = History(structure.gone())
        self.best_plan = structure.plan
        self.gates = {
            key: torch.from_numpy(flags).float().to(self.device).requires_grad_(True)
            for key, flags in structure.open.items()
        }
        self._square, self._slope = self._nothing(), self._nothing()
        self.identity |= {"plan": structure.plan.to_json(), "kind": "dynamic"}

    def run(self, saved: SavedState) -> None:
        with gated(self.student, self.structure.sites, self.gates):
            super().run(saved)

    def adapted(self) -> nn.Module | None:
        """The best candidate, dense-shaped, with its adapters beside the frozen weights; None when all were trained."""
        if self.options.method != "lora":
            return None
        model = copy.deepcopy(self.given)
        torch.manual_seed(self.seed)  # the untrained adapters are those that training began with
        self._adapt(model)
        self._put_best(model)
        return model.eval()

    def _step(self, step: int, parts: list[Batch]) -> float:
        loss = super()._step(step, parts)
        for key, gate in self.gates.items():
            if gate.grad is not None:  # none at a site that no output reads
                self._square[key] += gate.grad.double().square()
                self._slope[key] += gate.grad.double()
                gate.grad = None
        fraction = self.options.exchanged(step + 1, self.feed.steps)
        if fraction:
            self._exchange(step + 1, fraction)
        return loss

    def _exchange(self, step: int, fraction: float) -> None:
        """Change the structure, the gates and the optimiser's state, and write it down."""
        structure = self.structure
        square, slope = distributed.reduce(self._square), distributed.reduce(self._slope)
        before = structure.exchange(
            fraction,
            {key: value.cpu().numpy() for key, value in square.items()},
            {key: value.abs().cpu().numpy() for key, value in slope.items()},
        )
        left, came = exchanged_units(structure.sites, before, structure.plan)
        renew(self.student, self.optimizer, structure.sites, left, came)
        self.history.changes.append(Change(step, fraction, left, came, structure.gone()))
        self._close_and_open()
        self._square, self._slope = self._nothing(), self._nothing()

    @torch.no_grad()
    def _close_and_open(self) -> None:
        for key, flags in self.structure.open.items():
            self.gates[key].copy_(torch.from_numpy(flags))

    def _keep_best(self) -> None:
        super()._keep_best()
        self.best_plan = self.structure.plan
        self.history.best_step = self.standing.step

    def _nothing(self) -> dict[str, Tensor]:
        return {
            key: torch.zeros(len(gate), dtype=torch.float64, device=self.device) for key, gate in self.gates.items()
        }

    def _own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            f"open/{key}": torch.from_numpy(flags.astype(np.uint8)) for key, flags in self.structure.open.items()
        }
        tensors |= {f"square/{key}": value for key, value in self._square.items()}
        tensors |= {f"slope/{key}": value for key, value in self._slope.items()}
        plans = {"plan": self.structure.plan.to_json(), "best_plan": self.best_plan.to_json()}
        return tensors, {**plans, "history": self.history.to_json()}

    def _take_own_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.structure.restore(
            PrunePlan.from_json(facts["plan"]), {key: tensors[f"open/{key}"].bool().numpy() for key in self.gates}
        )
        self.best_plan = PrunePlan.from_json(facts["best_plan"])
        self.history = History.from_json(facts["history"])
        for key in self.gates:
            self._square[key] = tensors[f"square/{key}"].to(self.device)
            self._slope[key] = tensors[f"slope/{key}"].to(self.device)
        self._close_and_open()
