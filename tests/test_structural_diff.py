"""Structural diff: hard-concrete gates are what their equations say, and the constraint holds the size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digits import digits_task
from forms import FEW, random_path, signature_of

from deploy_prune.demo import digits_vit_untrained
from deploy_prune.hard_concrete import COFI
from deploy_prune.methods import search
from deploy_prune.methods.base import Context
from deploy_prune.methods.compute import Compute
from deploy_prune.methods.structural_diff import StructuralDiff, StructuralDiffOptions, expected_params
from deploy_prune.saved_state import SavedState
from deploy_prune.units import groups, unit_key


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return digits_vit_untrained()


@pytest.fixture(scope="module")
def task(model):
    return digits_task(model)


def context_of(model, task, saved=None, **compute):
    path = random_path(model, task.signature)
    model.eval().requires_grad_(False)
    more = {} if saved is None else {"saved": saved}
    return Context(model, path.sites, path.costs, task, 64, 16, "fp32", 0, compute=Compute(**compute), **more)


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 2.5])
def test_a_gate_is_open_as_often_as_its_probability_says(log_alpha):
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    z = COFI.sampled(torch.full_like(u, log_alpha), u)
    expected = float(COFI.open_probability(torch.tensor(log_alpha)))
    assert float((z > 0).float().mean()) == pytest.approx(expected, abs=0.005)
    assert float(z.min()) >= 0 and float(z.max()) <= 1
    assert (z == 0).any() and (z == 1).any()


@pytest.mark.parametrize("name", FEW)
def test_the_expected_size_of_a_certain_choice_is_its_exact_size(name, request):
    model = request.getfixturevalue(name)
    path = random_path(model, signature_of(name))
    plan = path.plan(0.3)
    certain = {}
    for site, kind in groups(path.sites):
        own = torch.zeros(site.units(kind), dtype=torch.float64)
        own[plan.kept(site, kind)] = 1
        certain[unit_key(site.name, kind)] = own
    alone = sum(path.costs.alone[s.name] for s in path.sites)
    exact = path.costs.prunable(path.sites) - alone - (path.costs.params - plan.achieved.params)
    assert not any(plan.vanishes(site) for site in path.sites)
    assert float(expected_params(path.sites, path.costs, certain)) == exact


def test_the_constraint_brings_the_expected_sparsity_to_its_target(model, task):
    search_ = StructuralDiff(context_of(model, task), StructuralDiffOptions(steps=150, target=0.5, ramp=0.5))
    search_.run()
    assert float(search_.sparsity().detach()) == pytest.approx(0.5, abs=0.12)
    assert search_.context.facts["expected_sparsity"] == pytest.approx(float(search_.sparsity().detach()), abs=1e-4)


def test_the_target_rises_linearly_and_then_stays(model, task):
    search_ = StructuralDiff(context_of(model, task), StructuralDiffOptions(steps=10, target=0.6, ramp=0.5))
    targets = []
    for search_.steps in range(10):
        targets.append(search_.target)
    assert targets == pytest.approx([0.12, 0.24, 0.36, 0.48, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])


def test_pieces_of_a_batch_give_the_step_of_the_whole(model, task):
    options = StructuralDiffOptions(steps=3, deviation=False)
    found = []
    for compute in ({}, {"micro_batch": 5}):
        search_ = StructuralDiff(context_of(model, task, **compute), options)
        search_.run()
        found.append({key: value.detach() for key, value in search_.logits.items()})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=0, atol=1e-3)


def test_a_stopped_search_goes_on_to_the_same_bits(model, task, tmp_path):
    options = StructuralDiffOptions(steps=8)
    whole = StructuralDiff(context_of(model, task), options)
    whole.run()
    first = StructuralDiff(context_of(model, task, SavedState(tmp_path, "x", 0.0)), options)
    batches = first.context.order()
    from deploy_prune.methods.compute import repeated

    for index in repeated(len(batches), 8, 0)[:3]:
        first.step(batches[index])
    first._save()
    second = StructuralDiff(context_of(model, task, SavedState(tmp_path, "x", 0.0)), options)
    second.run()
    for key, value in whole.logits.items():
        assert torch.equal(value, second.logits[key]), key
    assert torch.equal(whole.multipliers, second.multipliers)


def test_units_leave_in_the_order_of_their_logits(model, task):
    path = search(model, task, "structural-diff", examples=64, precision="fp32", basis="own", steps=20)
    context = context_of(model, task)
    search_ = StructuralDiff(context, StructuralDiffOptions(steps=20))
    search_.run()
    for site, kind in groups(path.sites):
        if site.lanes(kind) == 1:
            key = unit_key(site.name, kind)
            assert np.array_equal(
                np.argsort(path.scores[key], kind="stable"),
                np.argsort(search_.logits[key].detach().numpy(), kind="stable"),
            )


def test_a_useless_neuron_leaves_early(task):
    torch.manual_seed(0)
    model = digits_vit_untrained()
    site = next(s for s in random_path(model, task.signature).sites if not s.heads)
    with torch.no_grad():
        model.get_submodule(site.out).weight[:, :8] = 0
    path = search(model, task, "structural-diff", examples=64, precision="fp32", steps=150, objective="task")
    scores = path.scores[unit_key(site.name, next(iter(site.counts)))]
    assert scores[:8].max() < np.median(scores)
