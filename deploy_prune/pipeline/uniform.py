"""Families of the uniform layout: which plans, and the ordinary checkpoint that every member also is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_prune.pipeline.setup import Setup, tokenizer_of
from deploy_prune.units import UnitKind

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.path import SolutionPath
    from deploy_prune.plan import PrunePlan

STOCK = "stock"  # what a member's stage leaves for the bundle


def check_uniform(setup: Setup) -> None:
    """Raise what `stock_kinds` raises, before any search, when the recipe asks for a layout that the model has not."""
    if setup.recipe.family.layout == "uniform":
        kinds_of(setup)


def kinds_of(setup: Setup) -> list[str]:
    """The unit kinds that uniform members give up."""
    from converters.stock import stock_kinds

    wanted = setup.recipe.family.kinds
    return [k.value for k in stock_kinds(setup.model, None if wanted is None else tuple(map(UnitKind, wanted)))]


def member_plan(setup: Setup, path: SolutionPath, value: float) -> PrunePlan:
    """The plan of the member of size `value`, in the recipe's layout; of a path that is one plan, that plan."""
    from deploy_prune.plan_path import GIVEN, given_plan
    from deploy_prune.uniform import uniform_plan

    if path.method == GIVEN:
        return given_plan(path)
    family = setup.recipe.family
    assert family.budget != "latency" and family.budget != "speedup"  # pipeline/choosing.py makes those
    how: dict[str, Any] = {"budget": family.budget, "value": value, "align": family.alignment}
    if family.layout == "uniform":
        return uniform_plan(path, kinds=kinds_of(setup), **how)
    return path.plan(kinds=family.kinds, **how)


def leave_stock(setup: Setup, small: nn.Module, directory: Path) -> None:
    """Write a uniform member as an ordinary checkpoint that equals it; nothing in the free layout.

    Raises ParityError when the library's own classes compute something else with its weights.
    """
    from converters.parity import check_parity
    from converters.stock import save_stock, stock_model
    from deploy_prune.pipeline.making import parity_options

    if setup.recipe.family.layout != "uniform":
        return
    stock = stock_model(small)
    check_parity({"compact": small, "stock": stock}, setup.task.signature, **parity_options(setup))
    save_stock(small, directory / STOCK, tokenizer=tokenizer_of(setup))
