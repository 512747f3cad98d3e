"""Release rules: what a bundle's members must keep to be shipped, as data."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploy_prune.errors import RecipeError, UsageError, did_you_mean
from deploy_prune.files import existing_file
from deploy_prune.recipe_text import explain, parse
from deploy_prune.release.limits import Amount

RuleName = Literal[
    "max_drop",
    "max_p50_ms",
    "max_p90_ms",
    "max_p99_ms",
    "min_speedup",
    "max_bytes",
    "max_macs",
    "max_params",
    "max_parity",
    "audit",
    "require_runtime",
    "license",
    "signature",
    "verify",
]
LATENCY_RULES = ("max_p50_ms", "max_p90_ms", "max_p99_ms", "min_speedup")
SIZE_RULES = ("max_bytes", "max_macs", "max_params")
Positive = Annotated[float, Field(gt=0)]


class RuleSet(BaseModel):
    """Rules with the members and latency cells they hold for.

    `members` are names or patterns (`s*`), by default all but the dense model; `runtime`, `batch` and `sequence` select
    latency cells, by default all that were measured. Limits in per cent are relative to the dense model's figure:
    `max_drop: 1%` lets an accuracy of 0.80 fall to 0.792, `max_drop: 0.01` to 0.79.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    members: list[str] = Field([], description="names or patterns; default: every member but dense")
    runtime: str | None = Field(None, description="hold the latency rules in this runtime's cells only")
    batch: int | None = Field(None, ge=1, description="... at this batch size only")
    sequence: int | None = Field(
        None, ge=1, description="... at this sequence length only; without `past`, of graphs without a cache"
    )
    past: int | None = Field(
        None, ge=0, description="... of decoding on a cache of so many tokens only; 0: of prompts to a decoder"
    )
    bound: Literal["point", "interval"] = Field(
        "point", description="judge quality and speed-up by the figure itself, or by the worse end of its interval"
    )
    max_drop: Amount | None = Field(None, description="how much worse than dense the task's metric may be")
    max_p50_ms: Positive | None = Field(None, description="median latency, milliseconds")
    max_p90_ms: Positive | None = Field(None, description="90th percentile of latency, milliseconds")
    max_p99_ms: Positive | None = Field(None, description="99th percentile of latency, milliseconds")
    min_speedup: Positive | None = Field(None, description="dense's median latency over the member's, same run")
    max_bytes: Amount | None = Field(None, description="bytes of the ONNX file with its external data")
    max_macs: Amount | None = Field(None, description="multiply-accumulates of one example")
    max_params: Amount | None = Field(None, description="parameters")
    max_parity: Positive | None = Field(None, description="difference from torch, relative to the largest output")
    audit: bool = Field(False, description="the audit of the graph must have been made and have passed")
    require_runtime: list[str] = Field([], description="runtimes in which each member must have been timed")
    license: bool = Field(False, description="the licences of base weights and data must be known")
    signature: str | None = Field(None, description="public key (PEM) the bundle must be signed with")
    verify: bool = Field(True, description="hashes, graphs and stored answers are checked first")
    allow_unmeasured: list[RuleName] = Field([], description="rules that a figure nobody measured does not break")

    @model_validator(mode="after")
    def _asks(self) -> RuleSet:
        if not self.asked():
            raise ValueError("asks for nothing; give at least one of " + ", ".join(RuleSet.limits()))
        cells = any(getattr(self, name) is not None for name in LATENCY_RULES)
        if not cells and {self.batch, self.sequence, self.past, self.runtime} != {None}:
            raise ValueError(f"selects latency cells but has none of {', '.join(LATENCY_RULES)}")
        return self

    @staticmethod
    def limits() -> tuple[str, ...]:
        return (
            "max_drop",
            *LATENCY_RULES,
            *SIZE_RULES,
            "max_parity",
            "audit",
            "require_runtime",
            "license",
            "signature",
        )

    def asked(self) -> list[str]:
        """Names of the rules that are set."""
        return [name for name in RuleSet.limits() if getattr(self, name)]

    def select(self, names: Sequence[str]) -> list[str]:
        """The members the rules hold for; `names[0]` is dense. Raises UsageError when a pattern finds none."""
        if not self.members:
            return list(names[1:]) or list(names)
        for pattern in self.members:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"no member is called {pattern!r}", where="members", remedy=did_you_mean(pattern, list(names))
                )
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.members)]


class Rules(BaseModel):
    """A rules file: `rules:` is a list of rule sets, each with its own members, cells and limits; all must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: Annotated[list[RuleSet], Field(min_length=1, max_length=100)]


def load_rules(path: Path | str) -> Rules:
    """Read a rules file. Raises UnavailableError (no file) or RecipeError with every mistake."""
    path = existing_file(path, "rules file")
    return rules_from(parse(path), where=str(path))


def rules_from(data: dict[str, Any], *, where: str) -> Rules:
    """Rules from data in memory. Raises RecipeError with every mistake."""
    try:
        return Rules.model_validate(data)
    except ValidationError as error:
        raise RecipeError(
            "not valid release rules",
            where=where,
            problems=explain(error, Rules),
            remedy="`deploy-prune gate --schema` prints every key with its meaning.",
        ) from error


def schema() -> dict[str, Any]:
    """The JSON schema of a rules file."""
    return Rules.model_json_schema()
