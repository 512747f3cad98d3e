"""The parts of a recipe: every key with its type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy_prune.budget import MEASURED
from deploy_prune.delta.options import DiffOptions
from deploy_prune.dynamic.options import DynamicOptions
from deploy_prune.precision_options import Precision, PrecisionOptions
from deploy_prune.recovery.options import RecoverOptions

Share = Annotated[float, Field(gt=0, lt=1, strict=False, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=300)]


class Part(BaseModel):
    """Base of all parts of a recipe: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TaskPart(Part):
    """What "good" means, on which data."""

    name: Annotated[str, Field(min_length=1)]
    """the kind of task: image-classification, text-classification, causal-lm, ..."""
    calibration: Annotated[str, Field(min_length=1, description="data reference used for search and refit")]
    evaluation: Annotated[str | None, Field(description="data reference the reported quality is measured on")] = None
    options: dict[str, Any] = {}
    """of the task, as they are (for instance `columns`, `length`)"""


class SearchPart(Part):
    """How the order of leaving is found."""

    method: str = "spp"
    """the search; `deploy-prune search --help` lists them"""
    examples: Count | None = None
    """calibration examples; null: all"""
    batch_size: Count = 16
    """examples of one step"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of the computation; auto is bf16 where that is faster"""
    allocation: Literal["global", "separate", "uniform"] | None = None
    """how sites share the cut; null: the method's own"""
    basis: Literal["own", "principal"] | None = None
    """what a head's dimensions are; null: the method's own"""
    stages: list[Share] | None = None
    """sparsities at which what is left is judged again; null: the method's own"""
    options: dict[str, Any] = {}
    """of the method"""
    calibrate: bool | None = None
    """order the units of all kinds by losses that are measured for each kind after the search; null: as the method
    does, with one process for the whole model and `allocation: global`"""
    loss_examples: Count | None = None
    """calibration examples on which losses of plans are measured, for `calibrate` and budgets of latency; null: the
    task's own, 256, of language models 8 windows or 64 prompts; no more than the refit has"""

    @model_validator(mode="after")
    def _one_order(self) -> SearchPart:
        if self.calibrate and self.allocation not in (None, "global"):
            raise ValueError(f"expected `allocation: global` with `calibrate`, got {self.allocation}")
        return self


class ComputePart(Part):
    """How search and moments are computed, which changes results by rounding only, but that a sharded search's path is
    not calibrated unless that is asked for."""

    micro_batch: Count | None = None
    """examples at once; null: the whole batch"""
    activation_checkpointing: bool = False
    """compute activations again on the way back"""
    shard: bool = False
    """spread the weights over the processes (FSDP)"""
    memory_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """GiB of calibration batches, dense outputs and moments held at a time"""
    checkpoint_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """between saved states of a search or training"""


class LatencyPart(Part):
    """Where a latency budget is measured."""

    runtime: str = "ort-cpu"
    """where graphs are timed"""
    batch: Count = 1
    """examples per call"""
    seq: Count | None = None
    """tokens per example; null: 128 where the model takes a sequence, or one new token after a past"""
    past: Amount | None = None
    """of the decoders with a cache (`export.cache`): tokens that it holds when they are timed; null: the graphs without
    one are timed"""
    precision: Literal["fp32", Precision] = "fp32"
    """in which the models are timed, the dense one too; one of `precision.also`"""
    threads: Count | None = None
    """CPU threads; null: every core"""
    seconds: Positive = 1.0
    """about how long each graph is timed"""


class FamilyPart(Part):
    """Which members are cut: `sparsities: [0.1, 0.3]`, or `budget: macs` with `targets: [0.5, 4.0e8]`."""

    sparsities: list[Share] | None = None
    """shares of the prunable parameters to remove, one member each; or `budget` with `targets`"""
    budget: Literal["sparsity", "params", "macs", "bytes", "latency", "speedup"] = "sparsity"
    """what `targets` count; latency in milliseconds per call, speedup in times as fast as dense"""
    targets: list[Positive] | None = None
    """one member each: below 1 a share of the dense model, otherwise an absolute number"""
    kinds: list[Literal["head", "neuron", "qk", "vo"]] | None = None
    """kinds of units that are cut; null: all, or in the uniform layout those that the stock class can say"""
    align: Count | None = None
    """widths are multiples of this; null: 8 for budgets of latency and speedup, else 1"""
    layout: Literal["free", "uniform"] = "free"
    """uniform: equally many units in every layer, and every member also as an ordinary checkpoint, in `stock/NAME`"""
    latency: LatencyPart = LatencyPart()
    """where a budget of latency or speedup is measured"""

    @model_validator(mode="after")
    def _one_list_of_targets(self) -> FamilyPart:
        if (self.sparsities is None) == (self.targets is None):
            raise ValueError("expected either `sparsities` or `budget` with `targets`")
        if not self.values:
            raise ValueError("expected at least one member")
        if len(set(self.values)) != len(self.values):
            raise ValueError("expected every member once")
        if self.sparsities is not None and self.budget != "sparsity":
            raise ValueError(f"`sparsities` are given but `budget` is {self.budget}; use `targets`")
        if self.budget == "sparsity" and (bad := [value for value in self.values if not 0 < value < 1]):
            raise ValueError(f"expected sparsities between 0 and 1, both excluded, got {', '.join(map(str, bad))}")
        if self.budget == "speedup" and (bad := [value for value in self.values if value <= 1]):
            raise ValueError(
                f"expected speed-ups above 1, got {', '.join(map(str, bad))}; 2 is half the dense model's time"
            )
        if self.layout == "uniform" and self.budget in MEASURED:
            raise ValueError(
                f"`layout: uniform` goes with a budget of sparsity, params, macs or bytes, not {self.budget}"
            )
        names = self.member_names()
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two members would be called {', '.join(doubled)}; choose targets further apart")
        return self

    @property
    def values(self) -> list[float]:
        """The targets, largest model first."""
        given = self.sparsities if self.sparsities is not None else self.targets or []
        return sorted(given, reverse=self.budget not in ("sparsity", "speedup"))

    @property
    def alignment(self) -> int:
        return self.align or (8 if self.budget in MEASURED else 1)

    def member_names(self) -> list[str]:
        """`s30` for a sparsity of 0.3, `macs50` for half the MACs, `bytes8000000` for an absolute target, `2p5ms` for a
        latency, `2x` for a speed-up."""
        if self.budget in MEASURED:
            unit = "ms" if self.budget == "latency" else "x"
            return [f"{value:.6g}".replace(".", "p") + unit for value in self.values]
        letter = "s" if self.budget == "sparsity" else self.budget
        return [f"{letter}{_figure(value)}" for value in self.values]


class RefitPart(Part):
    """The closed-form correction of the weights that stay. (The refits between a search's stages take the default
    `emphasis`.)"""

    enabled: bool = True
    """correct the weights that stay"""
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    """added to the diagonal of the moments, as a share of its mean"""
    emphasis: Annotated[float, Field(ge=0, le=1)] | None = None
    """how far a token counts by what the loss feels of it, which wants labels; null: 0.3 with labels, else 0"""
    examples: Count | None = 1024
    """calibration examples of the moments; null: all"""
    batch_size: Count = 32
    """examples of one batch"""


class DiffPart(DiffOptions):
    """Diff pruning before the search: the task is learned on a frozen model as a sparse difference, and the task's
    model is what is searched and cut; the bundle holds the delta."""

    enabled: bool = Field(False, description="learn a delta before the search")
    head: list[str] | None = Field(None, description="modules that are the task's own; null: found")


class RecoverPart(RecoverOptions):
    """Training after the cut, taught by the dense model."""

    enabled: bool = Field(False, description="train every member after the cut")
    progressive: bool = Field(
        False, description="start from the recovered next larger member, not from the dense model's weights"
    )


class DynamicPart(DynamicOptions):
    """Training in which the structure changes too, in place of `recover`; the search's plan is where it begins."""

    enabled: bool = Field(False, description="train with changing structure")
    apart: bool = Field(
        False, description="method lora: leave the compact base and its cut adapters apart too, in `adapters/NAME`"
    )

    @model_validator(mode="after")
    def _apart_needs_adapters(self) -> DynamicPart:
        if self.apart and self.method != "lora":
            raise ValueError("`apart` needs `method: lora`")
        return self


MAX_OPSET = 23  # the newest one tried with the exporter


class ExportPart(Part):
    """The ONNX files, and what is left beside them."""

    opset: Annotated[int, Field(ge=18, le=MAX_OPSET)] = 20
    """of the ONNX files"""
    variant: Literal["auto", "standard", "ort", "plain"] = "standard"
    """standard operators alone, with those of ONNX Runtime (ort), as traced with every weight under its own name
    (plain), or whichever the dense model runs fastest with (auto)"""
    checkpoints: bool = True
    """also store every member as safetensors with its plan"""
    cache: bool = False
    """also export decoders with their key/value cache, into `decoders/NAME` of the bundle"""
    last_logits: bool = False
    """these give logits of the last new token alone"""


class PrecisionPart(PrecisionOptions):
    """Every model also in other precisions, as members `NAME.PRECISION` beside their fp32 twins."""


class ParityPart(Part):
    """How equal masked, compact and ONNX must be."""

    tolerance: Positive = 2e-4
    """largest error, relative to the largest output"""
    examples: Count = 4
    """real ones, beside the made-up inputs"""


class QualityPart(Part):
    """How the reported quality is measured."""

    limit: Count | None = None
    """evaluation examples; null: all"""
    batch_size: Count | None = None
    """null: the task's own"""


class BenchPart(Part):
    """What is timed: every runtime at every batch and sequence size."""

    enabled: bool = True
    """time the models"""
    runtimes: list[str] = ["ort-cpu"]
    """where; `deploy-prune doctor` says which work here"""
    batch: list[Count] = [1]
    """examples per call"""
    seq: list[Count] | None = None
    """tokens per example; null: 128, or as many as the model has positions for, where it takes a sequence"""
    past: list[Amount] | None = None
    """with `export.cache`: also time decoders, one new token on caches of so many; of 0, prompts of `seq` tokens"""
    seconds: Positive = 3.0
    """about how long each model is timed in each cell"""
    threads: Count | None = None
    """CPU threads; null: every core"""


class ProvenancePart(Part):
    """Licence and origin of the base weights and of the data, for manifest and model card. Null: what the model's own
    files, timm or the data's card say, else unknown."""

    model_license: Name | None = None
    """of the base weights, an identifier such as `apache-2.0`"""
    model_source: Name | None = None
    """of the base weights, an address or a sentence"""
    data_license: Name | None = None
    """of the data"""
    data_source: Name | None = None
    """of the data"""


def _figure(value: float) -> str:
    if value < 1:
        return f"{100 * value:.6g}".replace(".", "p")
    return f"{value:.0f}" if value == int(value) else f"{value:.6g}".replace(".", "p")
