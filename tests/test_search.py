"""Every search gives a whole, repeatable path, leaves the model alone, and sees what is plainly useless."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from digits import digits_task

from deploy_prune.architecture import weights_sha256
from deploy_prune.demo import digits_vit, digits_vit_untrained
from deploy_prune.errors import UnresolvedError, UsageError
from deploy_prune.methods import METHODS, search
from deploy_prune.units import UnitKind, groups, unit_key

FAST = {"spp": {"steps": 40, "objective": "distill", "basis": "own", "stages": []}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return digits_vit_untrained()


@pytest.fixture(scope="module")
def trained():
    return digits_vit(epochs=3)


@pytest.fixture(scope="module")
def task(model):
    return digits_task(model)


def test_the_help_of_search_names_every_search():
    from deploy_prune.cli.search import SEARCHES

    assert set(SEARCHES) == set(METHODS)


def find(model, task, method, **more):
    options = {"examples": 96, "batch_size": 16, "precision": "fp32", **FAST.get(method, {}), **more}
    return search(model, task, method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_repeatable_whole_and_leaves_the_model_alone(model, task, method):
    before, flags = weights_sha256(model), [p.requires_grad for p in model.parameters()]
    path = find(model, task, method)
    assert weights_sha256(model) == before == path.weights_sha256
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    assert {unit_key(s.name, k): (s.units(k),) for s, k in groups(path.sites)} == {
        k: v.shape for k, v in path.scores.items()
    }
    again = find(model, task, method)
    for key, scores in path.scores.items():
        assert np.array_equal(scores, again.scores[key]), key
    assert path.method == method and path.options["seed"] == 0


@pytest.mark.parametrize("method", ["spp", "fisher", "taylor", "magnitude"])
def test_units_that_do_nothing_leave_first(trained, task, method):
    """Exactly so for the scores. SPP may let a unit that harms go before one that does nothing, but few."""
    model = copy.deepcopy(trained)
    dead = {}
    for index, block in enumerate(model.blocks):
        units = list(range(index, block.mlp.fc1.out_features, 4))
        with torch.no_grad():
            block.mlp.fc1.weight[units], block.mlp.fc1.bias[units] = 0, 0
            block.mlp.fc2.weight[:, units] = 0
        dead[f"blocks.{index}.mlp"] = set(units)
    path = find(model, task, method)
    removed = sum(map(len, dead.values()))
    total = sum(s.counts.get(UnitKind.NEURON, 0) for s in path.sites)
    plan = path.plan((removed - 0.5) / total, kinds=["neuron"])
    kept = {s.name: set(plan.kept(s, UnitKind.NEURON)) for s in path.sites if UnitKind.NEURON in s.counts}
    wrong = sum(len(units & kept[name]) for name, units in dead.items())
    assert wrong <= (0.1 * removed if method == "spp" else 0)


def test_methods_disagree_about_the_order(model, task):
    orders = [np.argsort(np.concatenate(list(find(model, task, m).scores.values()))).tobytes() for m in METHODS]
    assert len(set(orders)) == len(METHODS)


def test_the_seed_matters_to_random(model, task):
    first, second = find(model, task, "random"), find(model, task, "random", seed=1)
    assert any(not np.array_equal(v, second.scores[k]) for k, v in first.scores.items())


@pytest.mark.parametrize("objective", ["distill", "task"])
def test_both_objectives_of_spp_enter_every_unit(model, task, objective):
    path = find(model, task, "spp", objective=objective)
    assert path.options["objective"] == objective
    assert path.plan(0.5).achieved.sparsity >= 0.5


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ssp", {}, "Did you mean 'spp'"),
        ("spp", {"step": 3}, "Did you mean 'steps'"),
        ("spp", {"steps": 1, "pressure": -1.0}, "2 bad option"),
        ("fisher", {"steps": 3}, "steps: unknown key"),
    ],
)
def test_an_unknown_method_or_option_is_named(model, task, method, options, message):
    with pytest.raises(UsageError, match=message):
        search(model, task, method, **options)


def test_an_unresolved_search_says_so_and_goes_on_when_asked(model, task):
    few = {"steps": 10, "travel": 0.5, "entry_share": 0.99, "curvature": 0, "resolved": 0.5}
    with pytest.warns(UserWarning, match="of the units after 10 steps have entered"):
        path = find(model, task, "spp", **few)
    assert path.options["found"]["entered"] < 1 and path.options["found"]["steps"] == 10
    with pytest.raises(UnresolvedError, match="has not separated enough units"):
        find(model, task, "spp", **few, until_resolved=True, patience=1)
    longer = find(model, task, "spp", **few, until_resolved=True, patience=50)
    assert longer.options["found"]["entered"] >= 0.5 and longer.options["found"]["steps"] > 10


def test_the_same_dimensions_leave_every_head_when_asked(model, task):
    path = find(model, task, "spp", steps=10, same_in_heads=True)
    site = next(s for s in path.sites if s.heads)
    order = path.scores[f"{site.name}/vo"].reshape(site.kv_heads, -1)
    assert all(np.array_equal(order[0], lane) for lane in order)


def test_the_variant_for_language_models_multiplies_the_path_by_weights_and_activations(model, task):
    """Slots are sums over heads, so the order is compared on neurons, which are alone."""
    quadratic = {"objective": "quadratic"}
    plain, weighted = (find(model, task, "spp", **quadratic, weighted=w) for w in (False, True))
    wanda = find(model, task, "wanda")
    key = next(key for key in plain.scores if key.endswith("neuron"))
    ranks = [np.argsort(np.argsort(path.scores[key])) for path in (plain, weighted, wanda)]
    correlation = np.corrcoef(ranks)
    assert correlation[1, 2] > correlation[0, 2], "the weighted order is nearer to Wanda's"
    assert not np.array_equal(ranks[0], ranks[1])
