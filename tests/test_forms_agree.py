"""Truths 1, 2, 3: gates at 1 change nothing; masked equals compact; removed weights have no say; costs are exact."""

from __future__ import annotations

import copy

import pytest
import torch
from forms import FAMILIES, SIZES, output, random_path, relative_error, signature_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.architecture import weights_sha256
from deploy_prune.budget import count_macs, count_params
from deploy_prune.gates import gated, masked, open_gates
from deploy_prune.layers import bias_of, layer_at, matrix, width
from deploy_prune.plan import dense_plan
from deploy_prune.units import groups, unit_key

SAME_FIXTURE = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
plans = given(seed=st.integers(0, 10_000), sparsity=st.floats(0.02, 0.6), align=st.sampled_from((1, 8)))


@pytest.fixture(params=FAMILIES)
def family(request):
    return signature_of(request.param), request.getfixturevalue(request.param)


def test_gates_at_one_leave_the_output_bit_identical(family):
    signature, model = family
    sites = find_sites(model)
    means = {s.name: torch.randn(width(layer_at(model, s.out), "in")) for s in sites}
    plain = output(model, signature)
    with gated(model, sites, open_gates(sites)):
        assert torch.equal(output(model, signature), plain)
    with gated(model, sites, open_gates(sites, batch=SIZES["batch"]), means):
        assert torch.equal(output(model, signature), plain)
    assert torch.equal(output(model, signature), plain), "the hooks are gone"


def test_a_closed_gate_changes_the_output(family):
    signature, model = family
    sites = find_sites(model)
    plain = output(model, signature)
    for site, kind in groups(sites):
        gates = open_gates(sites)
        gates[unit_key(site.name, kind)][0] = 0
        with gated(model, sites, gates):
            assert relative_error(output(model, signature), plain) > 1e-4, site.name


@SAME_FIXTURE
@plans
def test_masked_equals_compact_for_random_plans(family, seed, sparsity, align):
    signature, model = family
    plan = random_path(model, signature, seed).plan(sparsity, align=align)
    with masked(model, find_sites(model), plan):
        expected = output(model, signature)
    assert relative_error(output(compact(model, plan), signature), expected) < 1e-5


@SAME_FIXTURE
@plans
def test_announced_costs_are_those_of_the_compact_model(family, seed, sparsity, align):
    signature, model = family
    plan = random_path(model, signature, seed).plan(sparsity, align=align)
    small = compact(model, plan)
    assert count_params(small) == plan.achieved.params
    assert 4 * count_params(small) == plan.achieved.bytes
    inputs = signature.random_inputs({**SIZES, "batch": 1}, seed=0)
    assert count_macs(small, signature, inputs) == plan.achieved.macs


@SAME_FIXTURE
@given(seed=st.integers(0, 10_000))
def test_poison_in_removed_units_is_harmless(family, seed):
    signature, model = family
    plan = random_path(model, signature, seed).plan(0.5)
    clean = output(compact(model, plan), signature)
    poisoned = copy.deepcopy(model)
    for site, kind in groups(find_sites(model)):
        poison(poisoned, site, kind, sorted(set(range(site.units(kind))) - set(plan.kept(site, kind))))
    assert torch.equal(output(compact(poisoned, plan, check_weights=False), signature), clean)


def test_poison_in_a_kept_unit_shows(family):
    signature, model = family
    plan = random_path(model, signature).plan(0.3)
    for site, kind in groups(find_sites(model)):
        if kept := plan.kept(site, kind):
            poisoned = poison(copy.deepcopy(model), site, kind, kept[-1:])
            small = compact(poisoned, plan, inplace=True, check_weights=False)
            assert output(small, signature).isnan().any(), (site.name, kind)


def poison(model, site, kind, units):
    """Make the weights of the given units NaN everywhere they appear; returns the model."""
    with torch.no_grad():
        for s in site.slices[kind]:
            layer = layer_at(model, s.layer)
            features = torch.from_numpy(s.table(site.lanes(kind), site.counts[kind])[units].reshape(-1))
            if s.axis == "in":
                matrix(layer)[:, features] = torch.nan
                continue
            matrix(layer)[features] = torch.nan
            if bias_of(layer) is not None:
                bias_of(layer)[features] = torch.nan
    return model


def test_a_plan_that_keeps_everything_gives_the_same_weights(family):
    _, model = family
    plan = dense_plan("tiny", weights_sha256(model), find_sites(model))
    small = compact(model, plan)
    assert small is not model
    assert weights_sha256(small) == weights_sha256(model)


def test_surgery_leaves_the_given_model_alone_unless_in_place(family):
    signature, model = family
    before = weights_sha256(model)
    plan = random_path(model, signature).plan(0.5)
    compact(model, plan)
    assert weights_sha256(model) == before
    assert compact(model, plan, inplace=True) is model
    assert count_params(model) == plan.achieved.params


def test_sites_of_a_compact_model_are_found_again(family):
    signature, model = family
    plan = random_path(model, signature).plan(0.5, align=8)
    counts = {s.name: dict(s.counts) for s in find_sites(compact(model, plan))}
    planned = plan.counts(find_sites(model))
    assert counts == {name: own for name, own in planned.items() if any(own.values())}


def test_every_parameter_outside_the_sites_is_untouched(family):
    signature, model = family
    plan = random_path(model, signature).plan(0.7)
    small = dict(compact(model, plan).named_parameters())
    sites = find_sites(model)
    touched = {layer for site in sites for layer, _ in site.axes()}
    touched |= {module for site in sites if plan.vanishes(site) for module in site.alone}
    for name, parameter in model.named_parameters():
        if name not in touched and name.rpartition(".")[0] not in touched:
            assert torch.equal(parameter, small[name]), name
