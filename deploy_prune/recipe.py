"""A recipe is a whole run as data: which model and task, how to search, what family to cut, how to prove and time it.

Recipes are YAML. `${NAME}` in any value is taken from the environment; `--set a.b=value` overrides a key. Every
mistake is reported at once, with its place, what was expected and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from deploy_prune.budget import MEASURED
from deploy_prune.delta.options import DiffOptions
from deploy_prune.dynamic.options import DynamicOptions
from deploy_prune.errors import RecipeError, UnavailableError, UsageError, did_you_mean
from deploy_prune.precision_options import PrecisionOptions
from deploy_prune.recipe_text import expand, explain, override, parse
from deploy_prune.recovery.options import RecoverOptions

Share = Annotated[float, Field(gt=0, lt=1, strict=False, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1, max_length=300)]


class Part(BaseModel):
    """Base of all parts of a recipe: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskPart(Part):
    """What "good" means, on which data. `options` go to the task as they are (for instance `columns`, `length`)."""

    name: Annotated[str, Field(min_length=1)]
    calibration: Annotated[str, Field(min_length=1, description="data reference used for search and refit")]
    evaluation: Annotated[str | None, Field(description="data reference the reported quality is measured on")] = None
    options: dict[str, Any] = {}


class SearchPart(Part):
    """How the order of leaving is found. `examples` null takes all calibration data; `precision` auto is bf16 where it
    is faster; `allocation`, `basis` and `stages` null are the method's own; `options` are those of the method."""

    method: str = "spp"
    examples: Count | None = None
    batch_size: Count = 16
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    allocation: Literal["global", "separate", "uniform"] | None = None
    basis: Literal["own", "principal"] | None = None
    stages: list[Share] | None = None
    options: dict[str, Any] = {}


class ComputePart(Part):
    """How search and moments are computed, which changes results by rounding only: `micro_batch` examples at once
    (null: the whole batch), activations computed again on the way back, weights spread over the processes (FSDP), GiB
    of calibration batches, dense outputs and moments held at a time, minutes between saved states of a search."""

    micro_batch: Count | None = None
    activation_checkpointing: bool = False
    shard: bool = False
    memory_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    checkpoint_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0


class LatencyPart(Part):
    """Where a latency budget is measured: runtime, examples per call, tokens per example (null: 128 where the model
    takes a sequence), CPU threads (null: every core), and about how long each graph is timed."""

    runtime: str = "ort-cpu"
    batch: Count = 1
    seq: Count | None = None
    threads: Count | None = None
    seconds: Positive = 1.0


class FamilyPart(Part):
    """Which members are cut: `sparsities: [0.1, 0.3]`, or `budget: macs` with `targets: [0.5, 4.0e8]`.

    A target below 1 is a share of the dense model, otherwise an absolute number. `budget: latency` takes milliseconds
    per call, `budget: speedup` times as fast as dense, both as measured under `latency`. `align` null is 8 for these
    two, else 1. `layout: uniform` keeps equally many units in every layer and also leaves every member as an ordinary
    checkpoint, in `stock/NAME`; `kinds` null are then those that the model's stock class can say.
    """

    sparsities: list[Share] | None = None
    budget: Literal["sparsity", "params", "macs", "bytes", "latency", "speedup"] = "sparsity"
    targets: list[Positive] | None = None
    kinds: list[Literal["head", "neuron", "qk", "vo"]] | None = None
    align: Count | None = None
    layout: Literal["free", "uniform"] = "free"
    latency: LatencyPart = LatencyPart()

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
    """The closed-form correction of the weights that stay. `examples` null takes all calibration data. `emphasis` is
    how far a token counts by what the loss feels of it (needs labels, and a pass backward); null: 0.3 where the
    calibration data has labels, else 0. (The refits between a search's stages take the default.)"""

    enabled: bool = True
    ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    emphasis: Annotated[float, Field(ge=0, le=1)] | None = None
    examples: Count | None = 1024
    batch_size: Count = 32


class DiffPart(DiffOptions):
    """Diff pruning before the search: the task is learned on a frozen model as a sparse difference, and the task's
    model is what is searched and cut; the bundle holds the delta. `head` names the modules that are the task's own
    (null: found)."""

    enabled: bool = False
    head: list[str] | None = None


class RecoverPart(RecoverOptions):
    """Training after the cut, taught by the dense model. `progressive`: a member starts from the recovered next larger
    one instead of from the dense model."""

    enabled: bool = False
    progressive: bool = False


class DynamicPart(DynamicOptions):
    """Training in which the structure changes too, in place of `recover`; the search's plan is where it begins.
    `apart`: leave the compact base and its cut adapters apart too (method lora), in `adapters/NAME` of the bundle."""

    enabled: bool = False
    apart: bool = False

    @model_validator(mode="after")
    def _apart_needs_adapters(self) -> DynamicPart:
        if self.apart and self.method != "lora":
            raise ValueError("`apart` needs `method: lora`")
        return self


MAX_OPSET = 23  # the newest one tried with the exporter


class ExportPart(Part):
    """The ONNX files. `variant`: `standard` operators alone, with those of ONNX Runtime (`ort`), `plain`, as traced
    with every weight under its own name, or whichever the dense model runs fastest with (`auto`). `checkpoints` also
    stores every member as safetensors with its plan; `cache` also exports decoders with their key/value cache, into
    `decoders/NAME` of the bundle."""

    opset: Annotated[int, Field(ge=18, le=MAX_OPSET)] = 20
    variant: Literal["auto", "standard", "ort", "plain"] = "standard"
    checkpoints: bool = True
    cache: bool = False


class PrecisionPart(PrecisionOptions):
    """Every model also in other precisions, as members `NAME.PRECISION` beside their fp32 twins."""


class ParityPart(Part):
    """How equal masked, compact and ONNX must be, relative to the largest output. `examples` real ones are added to the
    made-up inputs."""

    tolerance: Positive = 2e-4
    examples: Count = 4


class QualityPart(Part):
    """How the reported quality is measured. `limit` null takes all evaluation data, `batch_size` null
    the task's own."""

    limit: Count | None = None
    batch_size: Count | None = None


class BenchPart(Part):
    """What is timed: every runtime at every batch and sequence size, about `seconds` for each model in each cell. `seq`
    null is 128 tokens, or as many as the model has positions for, where it takes a sequence; `past`, with
    `export.cache`, also times one new token on caches of so many; `threads` null is every core."""

    enabled: bool = True
    runtimes: list[str] = ["ort-cpu"]
    batch: list[Count] = [1]
    seq: list[Count] | None = None
    past: list[Count] | None = None
    seconds: Positive = 3.0
    threads: Count | None = None


class ProvenancePart(Part):
    """Licence (an identifier such as `apache-2.0`) and origin (an address or a sentence) of the base weights and of the
    data, for manifest and model card. Null: what the model's own files, timm or the data's card say, else unknown."""

    model_license: Name | None = None
    model_source: Name | None = None
    data_license: Name | None = None
    data_source: Name | None = None


class Recipe(Part):
    """One run. `deploy-prune run --schema` prints the JSON schema of this class."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    model: Annotated[str, Field(min_length=1, description="model reference")]
    task: TaskPart
    diff: DiffPart = DiffPart()
    search: SearchPart = SearchPart()
    family: FamilyPart
    refit: RefitPart = RefitPart()
    recover: RecoverPart = RecoverPart()
    dynamic: DynamicPart = DynamicPart()
    export: ExportPart = ExportPart()
    precision: PrecisionPart = PrecisionPart()
    parity: ParityPart = ParityPart()
    quality: QualityPart = QualityPart()
    bench: BenchPart = BenchPart()
    provenance: ProvenancePart = ProvenancePart()
    compute: ComputePart = ComputePart()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    _portable: dict[str, Any] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _parts_go_together(self) -> Recipe:
        if self.dynamic.enabled and self.family.layout == "uniform":
            raise ValueError("expected `family.layout: free` with `dynamic.enabled`, which changes layers one by one")
        if self.precision.keep_decoder and not self.export.cache:
            raise ValueError("expected `export.cache: true` with `precision.keep_decoder`")
        if self.bench.past and not self.export.cache:
            raise ValueError("expected `export.cache: true` with `bench.past`, which times decoders with a cache")
        if self.dynamic.enabled and self.recover.enabled:
            raise ValueError("expected either `dynamic.enabled` or `recover.enabled`: both train the members")
        return self

    def portable(self) -> dict[str, Any]:
        """As `resolved`, with `${NAME}` left as it was written: what a bundle may say without naming this machine."""
        return self.resolved() if self._portable is None else self._portable

    def resolved(self) -> dict[str, Any]:
        """Everything the run depends on as plain JSON data, defaults spelled out."""
        return self.model_dump(mode="json")

    def canonical(self) -> str:
        """`resolved()` as one canonical line, for fingerprints: equal recipes, equal text."""
        return json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a built-in recipe by name ("digits").

    Raises UnavailableError when the file or an environment variable it names is missing, RecipeError with every
    mistake otherwise.
    """
    path = find_recipe(source)
    data = parse(path)
    data.setdefault("name", path.stem)
    return recipe_from(data, overrides, where=str(path), typed=True)


def recipe_from(
    data: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "recipe", typed: bool = False
) -> Recipe:
    """A recipe from data in memory; overrides, environment and errors as in `load_recipe`. `typed`: errors name the
    overrides they are about, as somebody typed them."""
    problems = override(data, overrides)
    unset: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(expand(data, unset))
        recipe._portable = _portable(data)
    except ValidationError as error:
        problems += explain(error, Recipe)
    if problems:
        blamed = [s for s in overrides if typed and any(p.startswith(s.partition("=")[0].strip()) for p in problems)]
        noun = "problem" if len(problems + unset) == 1 else "problems"
        raise RecipeError(
            f"{len(problems + unset)} {noun}",
            where=" with ".join([where, *(f"--set {setting}" for setting in blamed)]),
            problems=[*problems, *unset],
            remedy="`deploy-prune run --schema` prints every key with its meaning.",
        )
    if unset or recipe is None:
        raise UnavailableError(
            "environment variables are not set",
            where=where,
            problems=unset,
            remedy="Set them, or give the values that use them with --set KEY=VALUE.",
        )
    return recipe


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return Recipe.model_json_schema()


def recipes_dir() -> Path:
    """Where the built-in recipes lie: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file `source` names: a path, or a built-in name. Raises UsageError or UnavailableError."""
    path = Path(source)
    if path.is_file():
        return path
    known = builtin_recipes()
    if str(source) in known:
        return known[str(source)]
    if path.is_dir():
        raise UsageError(
            "a directory is not a recipe",
            where=str(path),
            expected="a YAML file or a built-in name",
            remedy=did_you_mean(str(source), list(known)),
        )
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UnavailableError(
            "no such recipe file", where=str(path), remedy=f"Built-in recipes go by name: {', '.join(known)}."
        )
    raise UsageError(f"no built-in recipe {str(source)!r}", remedy=did_you_mean(str(source), list(known)))


def _portable(data: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return Recipe.model_validate(data).resolved()
    except ValidationError:  # a variable stands where a number belongs; only the expanded form is a recipe
        return None


def _figure(value: float) -> str:
    if value < 1:
        return f"{100 * value:.6g}".replace(".", "p")
    return f"{value:.0f}" if value == int(value) else f"{value:.6g}".replace(".", "p")
