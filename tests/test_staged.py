"""A search in stages is one path: what has left stays gone, and only what is there is judged again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from forms import output, random_path, relative_error, signature_of

from deploy_prune.adapters import find_sites
from deploy_prune.demo import digits_vit_untrained
from deploy_prune.errors import UsageError
from deploy_prune.gates import masked
from deploy_prune.methods import search
from deploy_prune.methods.staged import blank, joined
from deploy_prune.tasks import load_task
from deploy_prune.units import groups, unit_key


@pytest.mark.parametrize("family", ["tiny_vit", "tiny_bert", "tiny_llama"])
def test_a_blanked_model_is_the_masked_one(family, request):
    signature, model = signature_of(family), request.getfixturevalue(family)
    sites = find_sites(model)
    plan = random_path(model, signature).plan(0.4)
    with masked(model, sites, plan):
        expected = output(model, signature)
    assert relative_error(output(blank(copy.deepcopy(model), sites, plan), signature), expected) < 1e-6


def test_what_left_before_leaves_first_and_in_the_same_order(tiny_vit):
    signature, sites = signature_of("tiny_vit"), find_sites(tiny_vit)
    before = random_path(tiny_vit, signature, seed=0)
    plan = before.plan(0.3)
    found = {
        unit_key(s.name, k): torch.rand(s.units(k), generator=torch.Generator().manual_seed(5)).double()
        for s, k in groups(sites)
    }
    importance = joined(found, before, plan, sites, before.costs)
    after = before.from_importance(
        {key: value.numpy() for key, value in importance.items()},
        model=before.model,
        weights_sha256=before.weights_sha256,
        sites=sites,
        costs=before.costs,
        method="test",
    )
    assert after.plan(0.3).is_nested_in(before.plan(0.25)) and after.plan(0.6).is_nested_in(plan)
    neurons = f"{sites[1].name}/neuron"
    gone = np.setdiff1d(np.arange(sites[1].counts["neuron"]), plan.keep[sites[1].name]["neuron"])
    order = [np.argsort(path.scores[neurons][gone]).tolist() for path in (before, after)]
    assert len(gone) > 1 and order[0] == order[1]


def test_a_staged_search_is_repeatable_and_looks_again_only_beyond_its_stages():
    torch.manual_seed(0)
    model = digits_vit_untrained()
    task = load_task(
        "image-classification",
        model=model,
        model_ref="python:deploy_prune.demo:digits_vit_untrained",
        calibration="digits:train",
        evaluation="digits:test",
    )

    def find(stages):
        return search(model, task, "fisher", examples=64, precision="fp32", basis="principal", stages=stages)

    once, twice, again = find([]), find([0.3]), find([0.3])
    assert all(np.array_equal(twice.scores[key], again.scores[key]) for key in twice.scores)
    assert once.plan(0.3).keep == twice.plan(0.3).keep
    assert once.plan(0.6).keep != twice.plan(0.6).keep
    assert twice.options["stages"] == [0.3]
    with pytest.raises(UsageError, match="sparsity out of range"):
        find([1.5])
