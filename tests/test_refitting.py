"""Refit: the closed form is least squares, moments are exact when streamed, and masked still equals compact."""

from __future__ import annotations

import pytest
import torch
from forms import FEW, output, random_path, relative_error, signature_of

from converters.surgery import compact
from deploy_prune.activations import watching
from deploy_prune.adapters import find_sites
from deploy_prune.errors import ArtifactError, DataError, PlanError, RefitError
from deploy_prune.gates import masked
from deploy_prune.refitting import (
    SiteMoments,
    collect_moments,
    kept_features,
    load_moments,
    refit,
    refit_output,
    save_moments,
)
from deploy_prune.tasks.base import Batch


def batches(signature, count=4, padding=False):
    sizes = {"batch": 8, "sequence": 9}
    return [Batch(signature.random_inputs(sizes, seed=i, padding=padding), None) for i in range(count)]


@pytest.fixture(params=FEW)
def family(request):
    return signature_of(request.param), request.getfixturevalue(request.param)


def moments_of(x: torch.Tensor) -> SiteMoments:
    x = x.double()
    return SiteMoments(len(x), x.mean(0), x.T @ x / len(x))


@pytest.mark.parametrize("centred", [True, False])
def test_the_closed_form_is_least_squares(centred):
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(500, 7, generator=generator, dtype=torch.float64) @ torch.randn(7, 7, generator=generator).double()
        + 2
    )
    weight = torch.randn(3, 7, generator=generator)
    kept = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    found, shift = refit_output(moments_of(x), weight, kept, ridge=1e-14, centred=centred)
    design = torch.cat([x[:, kept], torch.ones(500, 1)], 1) if centred else x[:, kept]
    best = torch.linalg.lstsq(design, x @ weight.double().T).solution
    torch.testing.assert_close(found, best[:5].T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(shift, best[5] if centred else torch.zeros(3).double(), rtol=1e-8, atol=1e-8)


def test_units_that_the_kept_ones_determine_are_replaced_without_loss(tiny_vit):
    """A duplicated neuron can leave without a trace, after refit only."""
    signature = signature_of("tiny_vit")
    fc1, fc2 = tiny_vit.blocks[0].mlp.fc1, tiny_vit.blocks[0].mlp.fc2
    with torch.no_grad():
        fc1.weight[1], fc1.bias[1] = fc1.weight[0], fc1.bias[0]
        fc2.weight[:, 1] *= 3
    path = random_path(tiny_vit, signature)
    for key, scores in path.scores.items():
        scores[:] = torch.linspace(0.5, 1, len(scores)).numpy()
        if key == "blocks.0.mlp/neuron":
            scores[1] = 1e-6
    plan = path.plan(1e-6)
    assert plan.achieved.units["neuron"] == 191
    moments = collect_moments(tiny_vit, path.sites, batches(signature), signature)
    plain = output(tiny_vit, signature)
    refitted = compact(refit(tiny_vit, plan, moments, ridge=1e-9), plan, check_weights=False)
    assert relative_error(output(refitted, signature), plain) < 1e-4
    assert relative_error(output(compact(tiny_vit, plan), signature), plain) > 1e-2


def test_streamed_moments_are_those_of_all_valid_tokens_at_once(family):
    signature, model = family
    sites = find_sites(model)
    data = batches(signature, padding=True)
    seen: dict[str, list[torch.Tensor]] = {s.name: [] for s in sites}
    with torch.no_grad(), watching(model, sites, lambda name, x: seen[name].append(x)) as watch:
        for batch in data:
            watch.attend(signature, batch.inputs)
            signature.call(model, batch.inputs)
    moments = collect_moments(model, sites, data, signature)
    if "attention_mask" in data[0].inputs:
        valid = sum(int(b.inputs["attention_mask"].sum()) for b in data)
        assert valid < 4 * 8 * 9 and all(m.count == valid for m in moments.values())
    for name, m in moments.items():
        x = torch.cat(seen[name]).double()
        assert m.count == len(x) and m.second.dtype == torch.float64
        torch.testing.assert_close(m.mean, x.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(m.covariance, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-7)


def test_moments_with_a_large_offset_keep_their_small_variance():
    """The shift by the first batch's mean: float32 products of raw values would lose a variance of 1e-4 at mean 100."""
    from deploy_prune.refitting import _Accumulator

    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * 1e-2 + 100
    sums = _Accumulator()
    for chunk in x.split(500):
        sums.add(chunk)
    torch.testing.assert_close(sums.result().covariance, torch.cov(x.double().T, correction=0), rtol=1e-3, atol=1e-9)


def test_refitted_masked_equals_refitted_compact(family):
    signature, model = family
    sites = find_sites(model)
    plan = random_path(model, signature).plan(0.4)
    refitted = refit(model, plan, collect_moments(model, sites, batches(signature), signature))
    with masked(refitted, sites, plan):
        expected = output(refitted, signature)
    small = compact(refitted, plan, check_weights=False)
    assert relative_error(output(small, signature), expected) < 1e-5
    assert sum(p.numel() for p in small.parameters()) == plan.achieved.params, "no bias appears where there was none"


def test_refit_brings_every_output_projection_nearer_to_the_dense_one(family):
    signature, model = family
    sites = find_sites(model)
    plan = random_path(model, signature).plan(0.4)
    data = batches(signature, count=12)
    refitted = refit(model, plan, collect_moments(model, sites, data, signature))
    inputs: dict[str, torch.Tensor] = {}
    with torch.no_grad(), watching(model, sites, inputs.__setitem__):
        signature.call(model, data[0].inputs)
    better = 0
    for site in sites:
        dense, new = model.get_submodule(site.out), refitted.get_submodule(site.out)
        kept = kept_features(site, plan, dense.in_features)
        if kept.all():
            continue
        x = inputs[site.name]
        error = {name: (layer(x * kept) - dense(x)).square().sum() for name, layer in (("cut", dense), ("refit", new))}
        assert error["refit"] < error["cut"], site.name
        better += 1
    assert better


def test_refit_leaves_the_model_and_the_removed_columns_alone(tiny_bert):
    signature = signature_of("tiny_bert")
    before = {n: p.clone() for n, p in tiny_bert.named_parameters()}
    path = random_path(tiny_bert, signature)
    plan = path.plan(0.4)
    refit(tiny_bert, plan, collect_moments(tiny_bert, path.sites, batches(signature), signature))
    assert all(torch.equal(p, before[n]) for n, p in tiny_bert.named_parameters())


def test_moments_survive_a_round_trip(tmp_path, tiny_bert):
    signature = signature_of("tiny_bert")
    moments = collect_moments(tiny_bert, find_sites(tiny_bert), batches(signature), signature)
    save_moments(moments, tmp_path / "m.safetensors")
    again = load_moments(tmp_path / "m.safetensors")
    assert moments.keys() == again.keys()
    for name, m in moments.items():
        assert m.count == again[name].count and torch.equal(m.mean, again[name].mean)
        assert torch.equal(m.second, again[name].second)


def test_damaged_moments_are_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{broken")
    with pytest.raises(ArtifactError, match="moments"):
        load_moments(tmp_path / "m.safetensors")


def test_bad_refit_requests_are_refused(tiny_vit, tiny_bert):
    signature = signature_of("tiny_vit")
    path = random_path(tiny_vit, signature)
    moments = collect_moments(tiny_vit, path.sites, batches(signature), signature)
    with pytest.raises(DataError, match="no calibration data"):
        collect_moments(tiny_vit, path.sites, [], signature)
    with pytest.raises(PlanError):
        refit(tiny_bert, path.plan(0.3), moments)
    with pytest.raises(ArtifactError, match="another model"):
        refit(tiny_vit, path.plan(0.3), {})
    singular = moments_of(torch.ones(10, 4))
    with pytest.raises(RefitError, match="positive definite"):
        refit_output(singular, torch.ones(2, 4), torch.tensor([True, True, True, False]), ridge=0.0)
    bad = batches(signature)
    bad[1].inputs["pixel_values"][:] = torch.nan
    with pytest.raises(RefitError, match="not finite"):
        collect_moments(tiny_vit, path.sites, bad, signature)


def test_tokens_count_by_what_the_loss_feels_of_them(family):
    """The weights' definition, on the model itself: w_t = (1 − a) + a ‖∂ℓ/∂y_t‖² / mean, over the valid tokens."""
    signature, model = family
    sites = find_sites(model)
    data = batches(signature, count=2)
    emphasis = 0.4

    def losses(out: torch.Tensor, batch) -> torch.Tensor:
        return out.float().flatten(1).square().mean(1)

    found = collect_moments(model, sites, data, signature, losses=losses, emphasis=emphasis)
    site = sites[0]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module, args, out):
        out = out + torch.zeros((), requires_grad=True)
        out.retain_grad()
        seen.append((args[0].detach(), out))
        return out

    handle = model.get_submodule(site.out).register_forward_hook(keep)
    xs, squares = [], []
    mask = next((spec.name for spec in signature.inputs if spec.role == "mask"), None)
    for batch in data:
        seen.clear()
        losses(signature.call(model, batch.inputs), batch).sum().backward()
        for x, y in seen:
            valid = ... if mask is None else batch.inputs[mask].bool()
            xs.append(x[valid].reshape(-1, x.shape[-1]).double())
            squares.append(y.grad[valid].reshape(-1, y.shape[-1]).double().square().sum(1))
    handle.remove()
    model.zero_grad()
    x, g = torch.cat(xs), torch.cat(squares)
    w = (1 - emphasis) + emphasis * g / g.mean()
    mean = (w[:, None] * x).mean(0)
    torch.testing.assert_close(found[site.name].mean, mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[site.name].second, (w[:, None] * x).T @ x / len(x), rtol=1e-3, atol=1e-5)
    assert not any(p.grad is not None and p.grad.abs().sum() for p in model.parameters())
