"""Searches of other papers, on cases whose answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from forms import output, random_path, relative_error, signature_of

from deploy_prune.compensation import compensate, mask_tuning
from deploy_prune.errors import UsageError
from deploy_prune.gates import masked
from deploy_prune.methods.kwon import rearranged
from deploy_prune.methods.obs import removal_costs
from deploy_prune.methods.token_statistics import TokenMoments, logit_moments
from deploy_prune.refitting import SiteMoments, collect_moments
from deploy_prune.tasks.base import Batch
from deploy_prune.units import UnitKind


def moments_of(x: torch.Tensor) -> SiteMoments:
    x = x.double()
    return SiteMoments(len(x), x.mean(0), x.T @ x / len(x))


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator).double()
    return torch.randn(rows, columns, generator=generator).double() @ mix


def test_obs_counts_the_error_that_least_squares_leaves():
    x, W = gaussian(400, 6), gaussian(3, 6, seed=1)
    H = x.T @ x / len(x)
    costs = removal_costs(W, H, torch.arange(6)[:, None], damping=1e-9)
    order = costs.argsort()
    left = order[3:]
    best = torch.linalg.lstsq(x[:, left], x @ W.T).solution
    error = (x[:, left] @ best - x @ W.T).square().sum() / len(x)
    torch.testing.assert_close(costs[order[:3]].sum(), error, rtol=1e-5, atol=0.0)


def test_obs_lets_a_duplicate_go_first_and_its_twin_last():
    x = gaussian(500, 5)
    x[:, 4] = x[:, 1]
    W = torch.ones(2, 5, dtype=torch.float64)
    costs = removal_costs(W, x.T @ x / len(x), torch.arange(5)[:, None])
    first = int(costs.argmin())
    assert first in (1, 4)
    twin = 5 - first
    assert costs[twin] > 10 * costs[first]


def test_obs_judges_units_of_several_columns_as_wholes():
    x, W = gaussian(400, 6), gaussian(3, 6, seed=1)
    H = x.T @ x / len(x)
    table = torch.tensor([[0, 3], [1, 4], [2, 5]])
    found = removal_costs(W, H, table, damping=1e-9)
    errors = []
    for unit in table:
        left = [j for j in range(6) if j not in unit.tolist()]
        best = torch.linalg.lstsq(x[:, left], x @ W.T).solution
        errors.append(float((x[:, left] @ best - x @ W.T).square().sum() / len(x)))
    assert int(found.argmin()) == errors.index(min(errors))
    torch.testing.assert_close(float(found.min()), min(errors), rtol=1e-5, atol=0.0)


def test_rearrangement_keeps_apart_units_that_harm_together():
    F = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.1, 0.0], [0.0, 0.0, 1.2]], dtype=torch.float64)
    importance = rearranged(F)
    assert importance.tolist() == [1.0, pytest.approx(1.2), pytest.approx(1.1)]  # 0, then 2 rather than 1


def test_mask_tuning_is_least_squares_over_unit_scales():
    x, W = gaussian(300, 4) + 1, gaussian(3, 4, seed=1)
    unit = torch.tensor([0, 0, 1, 1])
    kept = torch.tensor([True, False, True, True])
    scale = mask_tuning(moments_of(x), W, kept, unit)
    parts = torch.stack([(x[:, [0]] @ W[:, [0]].T).flatten(), (x[:, 2:] @ W[:, 2:].T).flatten()], 1)
    best = torch.linalg.lstsq(parts, (x @ W.T).flatten()).solution
    torch.testing.assert_close(
        scale, torch.stack([best[0], torch.ones_like(best[0]), best[1], best[1]]), rtol=1e-3, atol=0
    )


def test_logit_moments_are_those_of_the_products(tiny_vit):
    from deploy_prune.adapters import find_sites

    site = find_sites(tiny_vit)[0]
    heads, slots = site.heads, site.counts[UnitKind.QK]
    q, k = gaussian(60, heads * slots), gaussian(50, heads * slots, seed=1)
    found = logit_moments(site, TokenMoments({}, {site.name: moments_of(q)}, {site.name: moments_of(k)}))
    for head in range(heads):
        own = slice(head * slots, (head + 1) * slots)
        z = (q[:, None, own] * k[None, :, own]).reshape(-1, slots)
        torch.testing.assert_close(found[head], z.T @ z / len(z), rtol=1e-8, atol=1e-8)


def test_the_mean_correction_keeps_the_mean_of_every_sublayer(tiny_vit):
    """One site cut: the residual stream after it has the dense mean."""
    signature = signature_of("tiny_vit")
    batches = [Batch(signature.random_inputs({"batch": 8}, seed=i)) for i in range(3)]
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    plan = path.plan(0.5)
    moments = collect_moments(tiny_vit, path.sites, batches, signature)
    first = path.sites[0]
    other = {s.name: {k: list(range(s.units(k))) for k in s.counts} for s in path.sites[1:]}
    plan = plan.model_copy(update={"keep": {first.name: plan.keep[first.name], **other}})

    def mean(model, cut):
        seen = []
        handle = model.get_submodule(first.out).register_forward_hook(lambda _, __, y: seen.append(y.detach().double()))
        for batch in batches:
            with masked(model, path.sites, plan) if cut else torch.no_grad(), torch.no_grad():
                signature.call(model, batch.inputs)
        handle.remove()
        return torch.cat(seen).flatten(0, -2).mean(0)

    qk_whole = {**plan.keep[first.name], UnitKind.QK: None}
    if UnitKind.QK in first.counts:  # a cut of queries and keys changes the inputs themselves
        kept = plan.kept(first, UnitKind.HEAD)
        n = first.counts[UnitKind.QK]
        qk_whole[UnitKind.QK] = [h * n + s for h in kept for s in range(n)]
        plan = plan.model_copy(update={"keep": {**plan.keep, first.name: qk_whole}})
    dense = mean(tiny_vit, cut=False)
    fixed = mean(compensate(tiny_vit, plan, moments, "mean"), cut=True)
    bare = mean(compensate(tiny_vit, plan, moments, "none"), cut=True)
    assert relative_error(fixed, dense) < 1e-4 < relative_error(bare, dense)


@pytest.mark.parametrize("how", ["none", "mean", "scale", "ridge"])
@pytest.mark.parametrize("name", ["tiny_vit", "tiny_llama"])
def test_a_corrected_model_cuts_to_what_its_mask_says(name, how, request):
    from converters.surgery import compact

    model, signature = request.getfixturevalue(name), signature_of(name)
    batches = [Batch(signature.random_inputs({"batch": 8, "sequence": 9}, seed=i)) for i in range(3)]
    path = random_path(model, signature)
    plan = path.plan(0.4)
    fixed = compensate(model, plan, collect_moments(model, path.sites, batches, signature), how)
    with masked(fixed, path.sites, plan):
        expected = output(fixed, signature)
    small = compact(copy.deepcopy(fixed), plan, check_weights=False)
    assert relative_error(output(small, signature), expected) < 1e-5


def test_an_unknown_correction_is_named(tiny_vit):
    path = random_path(tiny_vit, signature_of("tiny_vit"))
    with pytest.raises(UsageError, match="Did you mean 'ridge'"):
        compensate(tiny_vit, path.plan(0.5), {}, "rigde")
