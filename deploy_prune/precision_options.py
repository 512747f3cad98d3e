"""In which further precisions every model of a family is left, and how they are made and judged, as data."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What each is: converters/precision/formats.py
Precision = Literal["fp16", "bf16", "int8-dynamic", "int8-static", "int8-weight-only", "int4-weight-only"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class PrecisionOptions(BaseModel):
    """Every model of the family, dense too, is also left in each precision of `also`, as a member NAME.PRECISION that
    is proved against its fp32 twin, judged, and timed where a runtime computes in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    also: list[Precision] = Field([], description=", ".join(get_args(Precision)))
    examples: Annotated[int, Field(ge=1)] = Field(
        128, description="calibration examples: for ranges, overflow and the agreement of predictions"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(16, description="examples of one batch of them")
    calibrate: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax", description="int8-static: how the ranges of activations follow from the calibration examples"
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(99.999, description="int8-static, calibrate percentile")
    reduce_range: bool = Field(
        False,
        description="int8-dynamic, int8-static: weights in 7 bits, for x86 CPUs without VNNI, whose sums saturate",
    )
    rounding: Literal["compensated", "nearest"] = Field(
        "compensated",
        description="int4-weight-only: weights make up for each other's rounding on the calibration examples, or each "
        "is rounded to the nearest",
    )
    block: Literal[32, 64, 128] = Field(
        32,
        description="weight-only: weights that share a scale; fewer are more exact, more are faster on some CPUs",
    )
    keep: list[str] = Field([], description="names or patterns of nodes (of the fp32 file) that stay in fp32")
    keep_decoder: list[str] = Field(
        [], description="the same of the decoders with a cache, whose nodes have names of their own"
    )
    overflow: Literal["refuse", "keep"] = Field(
        "refuse",
        description="half precisions: refuse values too large for the format, or keep what is around them in fp32",
    )
    tolerance: dict[Precision, Positive] = Field(
        {}, description="largest error of outputs, relative to the largest one"
    )
    agreement: dict[Precision, Share] = Field({}, description="least share of equal predictions, or mean cosine")

    @model_validator(mode="after")
    def _once(self) -> PrecisionOptions:
        if len(set(self.also)) != len(self.also):
            raise ValueError("expected every precision once")
        for key in ("keep", "keep_decoder"):
            if getattr(self, key) and not self.also:
                raise ValueError(f"`{key}` without `also`: nothing is converted, so nothing can be kept in fp32")
        return self
