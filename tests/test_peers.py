"""Peers: Torch-Pruning meets a budget, and its decisions read as a plan are the same model."""

from __future__ import annotations

import pytest
import torch
from forms import FEW, output, relative_error, signature_of

from bench.peers import PEERS
from bench.peers.decisions import kept_rows, plan_of
from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.budget import CostModel, count_params
from deploy_prune.tasks.base import Batch


class _Task:
    """Random inputs and labels under a signature; the loss of the last output."""

    def __init__(self, signature):
        self.signature = signature

    def calibration(self, batch_size, limit=None, seed=0):
        for i in range(2):
            yield Batch(self.signature.random_inputs({"batch": 4, "sequence": 9}, seed=i), torch.arange(4) % 2)

    def loss(self, output, batch):
        logits = output[:, -1] if output.dim() == 3 else output
        return torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")


@pytest.mark.parametrize(("name", "peer"), zip(FEW, PEERS, strict=True))
def test_torch_pruning_meets_the_budget_and_its_decisions_are_a_plan(peer, name, request):
    pytest.importorskip("torch_pruning")
    model, signature = request.getfixturevalue(name), signature_of(name)
    sites = find_sites(model)
    costs = CostModel.measure(model, sites, signature, signature.random_inputs({"batch": 1, "sequence": 9}, seed=0))
    budget = int(costs.params - 0.4 * costs.prunable(sites))
    made = PEERS[peer].load()(model, _Task(signature), 8, 4, budget, 0)
    assert 0.95 * budget <= count_params(made.model) <= budget
    plan = plan_of(model, made.model, sites, "peer", weights_sha256(model))
    small = compact(model, plan, check_weights=False)
    assert count_params(small) == count_params(made.model) == costs.params_of(sites, plan.counts(sites))
    assert relative_error(output(made.model, signature), output(small, signature)) < 1e-5


def test_rows_of_another_model_are_not_found():
    with pytest.raises(ValueError, match="none of the dense one's"):
        kept_rows(torch.eye(3), torch.zeros(1, 3), "fc1")
