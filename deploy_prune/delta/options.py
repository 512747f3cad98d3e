"""Every choice of diff pruning as data, checked before a weight is touched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# l0, l1: diff pruning. The others, for comparison: which values may change is known beforehand.
Fit = Literal["l0", "l1", "random", "bitfit", "last-layer", "full", "lora"]
RATES: dict[str, float] = {"lora": 1e-3, "bitfit": 1e-3, "random": 1e-3, "last-layer": 1e-3}


class DiffOptions(BaseModel):
    """How a task's sparse difference from a frozen base is learned. The defaults of l0 are the paper's (arXiv
    2012.07463)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fit: Fit = Field("l0", description="l0, l1; to compare with: random, bitfit, last-layer, full, lora")
    groups: Literal["none", "tensor", "unit"] = Field(
        "none", description="l0: a gate of its own also for every tensor, or every head and neuron (structured)"
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(0.005, description="of the base's parameters that may change")
    penalty: NotNegative | None = Field(
        None, description="l0: λ per parameter, 1.25e-7; l1: shrinkage in steps of the rate, 0.1"
    )
    epochs: Positive = Field(3.0, description="passes in which the values that change are found")
    mask_epochs: NotNegative = Field(3.0, description="passes over the fixed choice; fits that know it train this long")
    examples: Count | None = Field(None, description="most calibration examples, held-out ones included; unset: all")
    batch_size: Count = Field(32, description="examples of one step")
    lr: Positive = Field(1e-5, description="peak rate of the differences, while they are found")
    gate_lr: Positive = Field(0.1, description="peak rate of the gates' logits")
    mask_lr: Positive | None = Field(None, description="peak rate over the fixed choice; unset: 5e-5, or the fit's own")
    head_lr: Positive | None = Field(None, description="peak rate of the task's head; unset: that of the differences")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="share of the steps in which the rate rises")
    clip: Positive = Field(1.0, description="largest norm of the gradient")
    alpha: float = Field(5.0, description="the gates' logits at the start")
    holdout: Positive = Field(0.1, description="calibration examples kept for judging: a share below 1, or a number")
    evaluations: Count = Field(6, description="how often the held-out part is judged in each phase")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where that is faster")

    @model_validator(mode="after")
    def _consistent(self) -> DiffOptions:
        if self.groups != "none" and self.fit != "l0":
            raise ValueError("`groups` belong to `fit: l0`")
        if self.mask_epochs == 0 and self.fit not in ("l0", "l1"):
            raise ValueError("`mask_epochs` is how long this fit trains; expected more than 0")
        return self

    @property
    def strength(self) -> float:
        """λ."""
        return self.penalty if self.penalty is not None else 1.25e-7 if self.fit == "l0" else 0.1

    @property
    def fixed_rate(self) -> float:
        """The peak rate where the choice is fixed."""
        return self.mask_lr if self.mask_lr is not None else RATES.get(self.fit, 5e-5)
