"""Every choice of a dynamic training as data. Imports nothing heavy: recipes hold it."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from deploy_prune.recovery.options import Count, RecoverOptions

UPDATES = 20  # changes of structure in a run that names no interval


class DynamicOptions(RecoverOptions):
    """How weights and structure are trained together. What RecoverOptions says of the weights holds here too."""

    every: Count | None = Field(None, description="steps between two changes of structure; unset: 20 in the whole run")
    drop: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="share of the active parameters that is up for exchange at first (RigL's α)"
    )
    until: Annotated[float, Field(gt=0, le=1)] = Field(
        0.75, description="share of the steps after which the structure stays"
    )

    @model_validator(mode="after")
    def _structure(self) -> DynamicOptions:
        if self.recipe is not None:
            raise ValueError("`recipe` belongs to `recover`")
        if self.method == "diff":
            raise ValueError("`method: diff` belongs to `recover`: units that come back change all of their weights")
        return self

    def interval(self, steps: int) -> int:
        """ΔT of a run of so many steps."""
        return self.every if self.every is not None else max(1, steps // UPDATES)

    def exchanged(self, step: int, steps: int) -> float:
        """f(t) = (α/2)(1 + cos(π t / T_end)) when the structure changes after `step` of `steps`, else 0 (RigL, arXiv
        1911.11134): every ΔT steps until T_end."""
        end = self.until * steps
        if step >= end or step % self.interval(steps):
            return 0.0
        return self.drop / 2 * (1 + math.cos(math.pi * step / end))
