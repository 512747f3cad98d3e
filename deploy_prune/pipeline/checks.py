"""What can be known to go wrong before hours of work: runtimes, paths, lengths and plans of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deploy_prune.budget import MEASURED
from deploy_prune.errors import UsageError
from deploy_prune.pipeline import choosing, making
from deploy_prune.pipeline.setup import Setup, check_names
from deploy_prune.plan import dense_plan
from deploy_prune.tasks.tokens import longest_text

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan
    from deploy_prune.recipe import Recipe


def check_runtimes(recipe: Recipe) -> None:
    """Raise UnavailableError when a runtime to be timed is not here, UsageError when it does not run what it is to
    time: that must not show after hours of search."""
    from bench.runtimes import get_runtime
    from converters.precision.formats import check_steps, check_timed

    check_names(recipe)
    if recipe.bench.enabled:
        for name in recipe.bench.runtimes:
            get_runtime(name)
        if recipe.bench.past:
            check_steps(recipe.bench.runtimes)
    if recipe.family.budget in MEASURED:
        timed = recipe.family.latency
        get_runtime(timed.runtime)
        check_timed(timed.runtime, timed.precision, timed.past is not None)


def check_path(recipe: Recipe, path: SolutionPath | None) -> None:
    """Raise UsageError where a path is missing or cannot be the recipe's."""
    from deploy_prune.kind_losses import CALIBRATED
    from deploy_prune.plan_path import GIVEN

    if path is None and recipe.search.method == GIVEN:
        raise UsageError(
            "a plan is given, not searched, and none is here",
            where="recipe key search.method",
            got=GIVEN,
            remedy="`deploy-prune plan build PLAN.json -o BUNDLE` makes a bundle of a plan; or name a search.",
        )
    if path is not None and recipe.search.calibrate and CALIBRATED not in path.options:
        raise UsageError(
            "a given path is cut as it is, and this one is not calibrated",
            where="recipe key search.calibrate",
            expected="false",
            got="true",
            remedy="Search with --calibrate, or calibrate the path in Python: dp.calibrate_path.",
        )
    if path is not None and recipe.diff.enabled:
        raise UsageError(
            "a path of before cannot be of the model that is yet to be learned",
            where="recipe key diff",
            remedy="Name the delta in the model, `?delta=FILE`, and leave diff out.",
        )


def check_lengths(setup: Setup) -> None:
    """Raise UsageError when the recipe asks for sequence lengths of a model that has no sequence, or for more tokens
    than the model has positions for."""
    check_model(setup.recipe, setup.model)
    family = setup.recipe.family
    timed = family.latency.seq if family.budget in MEASURED else None
    for key, lengths in (("bench.seq", setup.recipe.bench.seq), ("family.latency.seq", timed)):
        if lengths and "sequence" not in setup.task.signature.dynamic:
            raise UsageError(
                "the model has no sequence to vary",
                where=f"recipe key {key}",
                expected=f"no {key} for {setup.task.name}",
                got=str(lengths),
                remedy=f"Leave {key} out.",
            )


def check_model(recipe: Recipe, model: nn.Module) -> None:
    """Raise UsageError when the recipe times more tokens than the model has positions for, UnsupportedModelError when
    the model cannot leave logits out and the recipe wants it to."""
    from converters.cache import check_keeps

    if recipe.export.last_logits:
        check_keeps(model)
    longest = longest_text(getattr(model, "config", None))
    if longest is None:
        return
    for key, tokens, new in _lengths(recipe):
        if tokens and max(tokens) + new > longest:
            raise UsageError(
                "more tokens than the model has positions for",
                where=f"recipe key {key}",
                expected=f"at most {longest - new}{f' and {new} new' if new else ''}",
                got=str(max(tokens)),
                remedy="Name fewer.",
            )


def _lengths(recipe: Recipe) -> Iterator[tuple[str, list[int], int]]:
    """Every key of the recipe that names lengths to be timed, these, and how many new tokens come to them."""
    asked, timed = recipe.bench, recipe.family.latency
    if asked.enabled:
        yield "bench.past", asked.past or [], 1
        yield "bench.seq", asked.seq or [], 0
    if recipe.family.budget in MEASURED:
        yield "family.latency.seq", [timed.seq] if timed.seq else [], 0
        yield "family.latency.past", [timed.past] if timed.past else [], timed.seq or 1


def checked_plans(setup: Setup, path: SolutionPath) -> dict[str, PrunePlan]:
    """The plan of every member. Raises PlanError when the path is of other weights, BudgetError out of reach. Of a
    latency budget there are none yet; the path is checked all the same."""
    if choosing.is_measured(setup):
        dense_plan(path.model, path.weights_sha256, path.sites).validate_for(setup.sites, setup.weights_sha256)
        return {}
    plans = making.plans_of(setup, path)
    for name, plan in plans.items():
        plan.validate_for(setup.sites, setup.weights_sha256, where=f"plan {name}")
    return plans
