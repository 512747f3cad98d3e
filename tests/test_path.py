"""Truth 5 and budgets: plans of one path are nested, meet their target, and the file is exact."""

from __future__ import annotations

import numpy as np
import pytest
from forms import FEW, random_path, signature_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.errors import ArtifactError, BudgetError, UsageError
from deploy_prune.path import ALLOCATIONS, SolutionPath
from deploy_prune.units import UnitKind

RELAXED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=FEW)
def path(request):
    return random_path(request.getfixturevalue(request.param), signature_of(request.param))


@RELAXED
@given(low=st.floats(0.01, 0.5), more=st.floats(0, 0.1), align=st.sampled_from((1, 4, 8)))
def test_plans_of_one_path_are_nested(path, low, more, align):
    larger, smaller = path.plan(low, align=align), path.plan(low + more, align=align)
    assert smaller.is_nested_in(larger)


@RELAXED
@given(sparsity=st.floats(0.01, 0.6))
def test_a_plan_removes_at_least_the_asked_share_and_no_unit_more_than_needed(path, sparsity):
    plan = path.plan(sparsity)
    assert plan.achieved.sparsity >= sparsity - 1e-12
    dearest = max(path.costs.unit_params(s, k) for s in path.sites for k in s.counts)
    assert plan.achieved.sparsity < sparsity + dearest / path.costs.prunable(path.sites) + 1e-9


@pytest.mark.parametrize("budget", ["params", "macs", "bytes"])
def test_an_absolute_budget_is_an_upper_limit_and_a_share_is_of_the_dense_model(path, budget):
    dense = {"params": path.costs.params, "macs": path.costs.macs, "bytes": 4 * path.costs.params}[budget]
    target = int(dense * 0.8)
    plan = path.plan(budget=budget, value=target)
    assert getattr(plan.achieved, budget) <= target
    share = path.plan(budget=budget, value=0.8)
    assert share.keep == path.plan(budget=budget, value=0.8 * dense).keep


def test_alignment_keeps_every_neuron_count_at_a_multiple(path):
    counts = path.plan(0.4, align=8).counts(path.sites)
    widths = [n for site in counts.values() for kind, n in site.items() if kind is UnitKind.NEURON]
    assert widths and all(width % 8 == 0 for width in widths)


def test_alignment_counts_the_features_of_a_head_not_its_rotary_pairs(tiny_llama):
    path = random_path(tiny_llama, signature_of("tiny_llama"))
    small = compact(tiny_llama, path.plan(0.5, align=4))
    for site in find_sites(small):
        if site.heads:
            assert site.qk_width % 4 == 0 and site.vo_width % 4 == 0


def test_only_the_asked_kinds_are_cut_and_the_sparsity_is_of_those(path):
    plan = path.plan(0.5, kinds=("neuron",))
    for site in path.sites:
        if UnitKind.HEAD in site.counts:
            assert len(plan.kept(site, UnitKind.HEAD)) == site.counts[UnitKind.HEAD]
    assert plan.achieved.units["neuron"] == path.plan(0.5, kinds=["neuron"]).achieved.units["neuron"]
    total = sum(s.counts.get(UnitKind.NEURON, 0) for s in path.sites)
    # where a site has a norm of its own, that counts as prunable too and a neuron more has to go
    own_norms = any(site.alone for site in path.sites)
    assert plan.achieved.units["neuron"] == total // 2 - own_norms


@RELAXED
@given(sparsity=st.floats(0.3, 0.99))
def test_a_site_vanishes_as_a_whole_or_keeps_some_of_every_kind(path, sparsity):
    plan = path.plan(sparsity)
    for site in path.sites:
        assert plan.vanishes(site) or all(plan.kept(site, kind) for kind in site.counts)
    plan.validate_for(path.sites)


def test_every_site_may_vanish(path):
    assert all(path.plan(0.9999).vanishes(site) for site in path.sites)


def test_a_target_out_of_reach_names_the_best(path):
    with pytest.raises(BudgetError, match="best reachable"):
        path.plan(0.99, kinds=["qk"])  # every head that stays keeps one


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_sparsity_outside_zero_and_one_is_refused(path, sparsity):
    with pytest.raises(UsageError, match="sparsity out of range"):
        path.plan(sparsity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no target"),
        ({"budget": "mac", "value": 1}, "Did you mean 'macs'"),
        ({"sparsity": 0.3, "value": 0.4}, "two targets"),
        ({"sparsity": 0.3, "kinds": ["neurons"]}, "Did you mean 'neuron'"),
        ({"sparsity": 0.3, "kinds": []}, "no units"),
        ({"sparsity": 0.3, "align": 0}, "alignment"),
        ({"budget": "params", "value": -3}, "params out of range"),
        ({"budget": "params", "value": 10}, "best reachable"),
        ({"budget": "params", "value": 1e12}, "at most the dense model's"),
    ],
)
def test_an_impossible_request_says_what_is_possible(path, arguments, message):
    with pytest.raises(UsageError, match=message):
        path.plan(**arguments)


def test_scores_are_shares_of_the_way(path):
    scores = np.concatenate(list(path.scores.values()))
    assert scores.min() > 0 and scores.max() == pytest.approx(1)
    slots = sum(site.counts[kind] for site in path.sites for kind in site.counts)
    assert len(np.unique(scores)) == slots, "the units of a qk or vo slot leave together, everything else alone"


def test_every_head_gives_up_its_least_important_dimensions(tiny_vit):
    """Two heads; slot 0 takes the weakest dimension of each, wherever it lies."""
    sites = find_sites(tiny_vit)
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    key = f"{sites[0].name}/vo"
    lanes = path.scores[key].reshape(sites[0].kv_heads, -1)
    assert len({tuple(np.argsort(lane)) for lane in lanes}) > 1, "heads order their own dimensions"
    assert all(np.array_equal(np.sort(lane), np.sort(lanes[0])) for lane in lanes)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_an_allocation_gives_every_pool_the_same_share(tiny_bert, allocation):
    path = random_path(tiny_bert, signature_of("tiny_bert"), allocation=allocation)
    counts = path.plan(0.5).counts(path.sites)
    shares = {s.name: {k: n / s.counts[k] for k, n in counts[s.name].items()} for s in path.sites}
    if allocation == "uniform":
        assert all(abs(share - 0.5) <= 0.26 for site in shares.values() for share in site.values())
    if allocation == "separate":
        for kind in UnitKind.HEAD, UnitKind.NEURON:
            kept = sum(counts[s.name][kind] for s in path.sites if kind in s.counts)
            total = sum(s.counts[kind] for s in path.sites if kind in s.counts)
            assert abs(kept / total - 0.5) <= 0.2


def test_an_unknown_allocation_is_named(tiny_bert):
    with pytest.raises(UsageError, match="Did you mean 'uniform'"):
        random_path(tiny_bert, signature_of("tiny_bert"), allocation="uniformly")


def test_importance_that_is_not_finite_is_refused(path):
    importance = {key: np.full(len(v), np.nan) for key, v in path.scores.items()}
    with pytest.raises(UsageError, match="not finite"):
        SolutionPath.from_importance(
            importance, model="x", weights_sha256="0" * 64, sites=path.sites, costs=path.costs, method="broken"
        )


def test_a_path_survives_a_round_trip_byte_for_byte(tmp_path, path):
    path.save(tmp_path / "a.safetensors")
    again = SolutionPath.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert again.sites == path.sites and again.costs == path.costs
    assert again.plan(0.4).model_dump() == path.plan(0.4).model_dump()


def test_a_directory_is_not_a_path_file(tmp_path):
    with pytest.raises(UsageError, match="in the place of a file"):
        SolutionPath.load(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip header", "flip a score", "edit the method", "other file"])
def test_a_damaged_path_file_is_refused(tmp_path, path, damage):
    file = tmp_path / "p.safetensors"
    path.save(file)
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip header":
        data[12] ^= 0xFF
    elif damage == "flip a score":
        data[-20] ^= 0x01
    elif damage == "edit the method":
        assert b"random" in data
        data = data.replace(b"random", b"fisher")
    else:
        from safetensors.numpy import save

        data = save({"w": np.zeros(3)})
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a whole solution path"):
        SolutionPath.load(file)
