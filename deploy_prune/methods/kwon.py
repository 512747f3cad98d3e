"""Fisher information with mask search and rearrangement (Kwon et al., arXiv 2204.09656)."""

from __future__ import annotations

import torch
from torch import Tensor

from deploy_prune.gates import open_gates
from deploy_prune.methods.base import Context, Importance, NoOptions
from deploy_prune.tasks.base import Batch


def kwon(context: Context, _: NoOptions) -> Importance:
    """How many units leave a site follows the diagonal Fisher information of the gates, which ones its whole block.

    Search: Σ_u F_uu over the removed units is least at a given cost when units leave by F_uu per cost, which is the
    global allocation. Rearrangement: within a site and kind the removed units R of a given number shall make Σ_uv F_uv
    over u, v ∈ R small. The paper rearranges the mask of one budget by swaps; a path needs nested masks, so here units
    leave greedily, the least F_uu + 2 Σ_{v∈R} F_uv first. Its third step, tuning the masks that stay, is
    `compensate(..., "scale")`.
    """

    def products(batch: Batch) -> dict[str, Tensor]:
        gates = open_gates(context.sites, batch=len(batch), device=context.device)
        for gate in gates.values():
            gate.requires_grad_(True)
        found = context.gradients(gates, batch, lambda output: context.task.loss(output, batch))[0]
        return {key: (g.T.float() @ g.float()).double() for key, g in found.items()}

    blocks = context.accumulate("kwon", products)[0]
    return {key: rearranged(F.cpu()) for key, F in blocks.items()}


def rearranged(F: Tensor) -> Tensor:
    """Importance (units,): the sorted diagonal of F, handed out in the order in which units leave greedily."""
    rise = F.diagonal().clone()
    importance = torch.empty_like(rise)
    for value in rise.sort().values:
        u = int(rise.argmin())
        importance[u] = value
        rise += 2 * F[u]
        rise[u] = torch.inf
    return importance
