"""A recipe is a whole run as data: which model and task, how to search, what family to cut, how to prove and time it.

Recipes are YAML. `${NAME}` in any value is taken from the environment; `--set a.b=value` overrides a key. Every
mistake is reported at once, with its place, what was expected and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from deploy_prune.budget import MEASURED
from deploy_prune.errors import RecipeError, UnavailableError, UsageError, did_you_mean
from deploy_prune.recipe_parts import (
    BenchPart,
    ComputePart,
    DiffPart,
    DynamicPart,
    ExportPart,
    FamilyPart,
    ParityPart,
    Part,
    PrecisionPart,
    ProvenancePart,
    QualityPart,
    RecoverPart,
    RefitPart,
    SearchPart,
    TaskPart,
)
from deploy_prune.recipe_text import expand, explain, override, parse


class Recipe(Part):
    """One run. `deploy-prune run --schema` prints the JSON schema of this class."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """of the run and its bundle"""
    description: str = ""
    """for people"""
    model: Annotated[str, Field(min_length=1, description="model reference")]
    task: TaskPart
    """what "good" means, on which data"""
    diff: DiffPart = DiffPart()
    """sparse task delta learned before the search"""
    search: SearchPart = SearchPart()
    """how units are scored"""
    family: FamilyPart
    """which members are cut"""
    refit: RefitPart = RefitPart()
    """closed-form correction"""
    recover: RecoverPart = RecoverPart()
    """training after the cut"""
    dynamic: DynamicPart = DynamicPart()
    """training with changing structure"""
    export: ExportPart = ExportPart()
    """the ONNX files"""
    precision: PrecisionPart = PrecisionPart()
    """further precisions"""
    parity: ParityPart = ParityPart()
    """how equal all forms must be"""
    quality: QualityPart = QualityPart()
    """how quality is measured"""
    bench: BenchPart = BenchPart()
    """what is timed"""
    provenance: ProvenancePart = ProvenancePart()
    """licence and origin of weights and data"""
    compute: ComputePart = ComputePart()
    """memory and processes of search and moments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is a GPU where there is one"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of everything that is drawn"""

    _portable: dict[str, Any] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _parts_go_together(self) -> Recipe:
        if self.dynamic.enabled and self.family.layout == "uniform":
            raise ValueError("expected `family.layout: free` with `dynamic.enabled`, which changes layers one by one")
        if self.precision.keep_decoder and not self.export.cache:
            raise ValueError("expected `export.cache: true` with `precision.keep_decoder`")
        if self.bench.past and not self.export.cache:
            raise ValueError("expected `export.cache: true` with `bench.past`, which times decoders with a cache")
        if self.family.budget in MEASURED:
            self._timed_ships()
        if self.export.last_logits and not self.export.cache:
            raise ValueError("expected `export.cache: true` with `export.last_logits`, which is for decoders")
        if self.dynamic.enabled and self.recover.enabled:
            raise ValueError("expected either `dynamic.enabled` or `recover.enabled`: both train the members")
        return self

    def _timed_ships(self) -> None:
        """What a latency budget times is among what the bundle holds."""
        timed = self.family.latency
        if timed.past is not None and not self.export.cache:
            raise ValueError("expected `export.cache: true` with `family.latency.past`, which times decoders")
        if timed.precision not in ("fp32", *self.precision.also):
            raise ValueError(f"expected `family.latency.precision: {timed.precision}` among `precision.also`")

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
