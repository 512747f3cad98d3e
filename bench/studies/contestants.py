"""Who takes part in the race, and how each makes its smaller model.

Every search sees the same calibration examples and is asked for the same number of parameters. A contestant has up to
two forms: `own`, as its paper publishes it (its unit kinds, its own correction of the weights that stay), and `refit`,
its ranking over all unit kinds with this project's closed-form refit on top, so that the searches alone are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from deploy_prune.compensation import Compensation
    from deploy_prune.path import SolutionPath
    from deploy_prune.pipeline.setup import Setup
    from deploy_prune.refitting import Moments

Form = Literal["own", "refit"]


@dataclass(frozen=True)
class Contestant:
    """`method` is a search of this project's registry; a peer (bench/peers) has none. `kinds` are those its paper
    removes (None: all there are), `own` what its paper does to the weights that stay."""

    name: str
    source: str
    method: str | None = None
    own: Compensation = "none"
    kinds: tuple[str, ...] | None = None
    ours: bool = False
    our_refit: bool = False  # also as its own

    @property
    def forms(self) -> tuple[Form, ...]:
        """Only one where the two would be the same model."""
        return ("own",) if self.ours or (self.own == "ridge" and self.kinds is None) else ("own", "refit")


HEADS_AND_NEURONS = ("head", "neuron")
CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("spp", "this project's default: search, basis, calibration, refit", "spp", "ridge", ours=True),
        Contestant("obs", "ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983", "obs", "ridge", HEADS_AND_NEURONS),
        Contestant("kwon", "arXiv 2204.09656", "kwon", "scale", HEADS_AND_NEURONS),
        Contestant("flap", "arXiv 2312.11983", "flap", "mean", HEADS_AND_NEURONS),
        Contestant("wanda-sp", "arXiv 2306.11695, 2312.11983", "wanda", "none", HEADS_AND_NEURONS),
        Contestant("corp", "arXiv 2602.05243", "corp", "ridge"),
        Contestant(
            "fisher", "diagonal Fisher information of the gates", "fisher", "ridge", HEADS_AND_NEURONS, our_refit=True
        ),
        # Of this project too, on ideas of others; with its refit, since none of the three publishes a correction.
        Contestant(
            "layer-adaptive",
            "layer ratios by gradient importance, Fisher within",
            "layer-adaptive",
            "ridge",
            our_refit=True,
        ),
        Contestant(
            "fine-grained",
            "the same ratios; attention variance, activations within",
            "fine-grained",
            "ridge",
            our_refit=True,
        ),
        Contestant(
            "structural-diff",
            "gates and size control of CoFi, arXiv 2204.00408, weights frozen and without its distillation of layers",
            "structural-diff",
            "ridge",
            our_refit=True,
        ),
        Contestant("taylor", "first-order Taylor of the gates", "taylor"),
        Contestant("magnitude", "squared weights of coupled rows and columns", "magnitude"),
        Contestant("random", "the floor", "random"),
    )
}


def contestants() -> dict[str, Contestant]:
    """All of them, the peers last."""
    from bench.peers import PEERS

    return CONTESTANTS | {peer.name: Contestant(peer.name, peer.source) for peer in PEERS.values()}


def planned(
    setup: Setup, contestant: Contestant, path: SolutionPath, moments: Moments, form: Form, params: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The compact model of at most `params` parameters that a search leads to, and its figures.

    Raises BudgetError when its unit kinds cannot reach the budget.
    """
    from converters.surgery import compact
    from deploy_prune.compensation import compensate
    from deploy_prune.pipeline.making import planned_weights

    plan = path.plan(budget="params", value=params, kinds=contestant.kinds if form == "own" else None)
    if contestant.ours:
        weights = planned_weights(setup, plan, moments, path.basis)
    else:
        how = contestant.own if form == "own" else "ridge"
        weights = compensate(setup.model, plan, moments, how, ridge=setup.recipe.refit.ridge, basis=path.basis)
    assert plan.achieved is not None
    facts = {"macs": plan.achieved.macs, "units": plan.achieved.units}
    return compact(weights, plan, inplace=weights is not setup.model, check_weights=False), facts
