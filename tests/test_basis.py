"""A basis changes no function, orders a head's dimensions, and is asked for wherever a plan was made in it."""

from __future__ import annotations

import pytest
import torch
from forms import output, random_path, relative_error, signature_of

from converters.surgery import compact
from deploy_prune.adapters import find_sites
from deploy_prune.basis import basis_digest, in_basis, principal_basis
from deploy_prune.errors import ArtifactError, DataError, PlanError
from deploy_prune.gates import masked
from deploy_prune.path import SolutionPath
from deploy_prune.refitting import collect_moments, refit
from deploy_prune.tasks.base import Batch
from deploy_prune.units import UnitKind, unit_key

FAMILIES = ("tiny_vit", "tiny_bert", "tiny_distilbert", "tiny_llama")


def batches(signature, count=4):
    sizes = {"batch": 8, "sequence": 9}
    return [Batch(signature.random_inputs(sizes, seed=i, padding=True), None) for i in range(count)]


@pytest.fixture(params=FAMILIES)
def case(request):
    """(signature, model, its principal basis)"""
    signature, model = signature_of(request.param), request.getfixturevalue(request.param)
    return signature, model, principal_basis(model, find_sites(model), batches(signature), signature)


def path_in(basis, model, signature, seed=0):
    return random_path(model, signature, seed, basis=basis)


def test_another_basis_is_the_same_function(case):
    signature, model, basis = case
    turned = in_basis(model, find_sites(model), basis)
    assert relative_error(output(turned, signature), output(model, signature)) < 1e-5
    changed = [n for (n, p), q in zip(model.named_parameters(), turned.parameters(), strict=True) if not p.equal(q)]
    assert changed and all("mlp" not in name and "norm" not in name for name in changed)


def test_rotary_pairs_keep_their_place(tiny_llama):
    signature = signature_of("tiny_llama")
    basis = principal_basis(tiny_llama, find_sites(tiny_llama), batches(signature), signature)
    assert {key.rpartition("/")[2] for key in basis} == {"vo"}


@pytest.mark.parametrize("kind", [UnitKind.VO, UnitKind.QK])
@pytest.mark.parametrize("family", ["tiny_vit", "tiny_distilbert"])
def test_the_first_dimensions_of_the_principal_basis_keep_more_of_the_output_than_the_model_s_own(
    family, kind, request
):
    """Half of every head's dimensions, the first ones, no refit."""
    model, signature = request.getfixturevalue(family), signature_of(family)
    sites = find_sites(model)
    basis = principal_basis(model, sites, batches(signature), signature)
    plain = output(model, signature)

    def error(own):
        gates = {}
        for site in sites:
            if kind in site.counts:
                gate = torch.zeros(site.kv_heads, site.counts[kind])
                gate[:, : site.counts[kind] // 2] = 1
                gates[unit_key(site.name, kind)] = gate.flatten()
        from deploy_prune.gates import gated

        with gated(own, sites, gates):
            return relative_error(output(own, signature), plain)

    assert error(in_basis(model, sites, basis)) < 0.8 * error(model)


def test_masked_equals_compact_after_a_refit_in_the_basis(case):
    signature, model, basis = case
    sites = find_sites(model)
    plan = path_in(basis, model, signature).plan(0.3)
    moments = collect_moments(model, sites, batches(signature), signature)
    fitted = refit(model, plan, moments, basis=basis)
    with masked(fitted, sites, plan):
        expected = output(fitted, signature)
    small = compact(fitted, plan, check_weights=False)
    assert relative_error(output(small, signature), expected) < 1e-5


def test_moments_of_the_model_serve_in_every_basis(tiny_vit):
    """Refit from turned moments equals refit of the turned model from its own moments."""
    signature, sites = signature_of("tiny_vit"), find_sites(tiny_vit)
    basis = principal_basis(tiny_vit, sites, batches(signature), signature)
    plan = path_in(basis, tiny_vit, signature).plan(0.4)
    fitted = refit(tiny_vit, plan, collect_moments(tiny_vit, sites, batches(signature), signature), basis=basis)
    turned = in_basis(tiny_vit, sites, basis)
    own = collect_moments(turned, sites, batches(signature), signature)
    again = refit(turned, plan.model_copy(update={"basis": None}), own)
    for (name, a), b in zip(fitted.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_a_plan_in_a_basis_is_refused_without_it(case):
    signature, model, basis = case
    plan = path_in(basis, model, signature).plan(0.3)
    assert plan.basis == basis_digest(basis)
    with pytest.raises(PlanError, match="another basis"):
        compact(model, plan)
    moments = collect_moments(model, find_sites(model), batches(signature), signature)
    with pytest.raises(PlanError, match="another basis"):
        refit(model, plan, moments)
    with pytest.raises(PlanError, match="another basis"):
        refit(model, path_in(None, model, signature).plan(0.3), moments, basis=basis)


def test_a_path_keeps_its_basis_in_its_file(case, tmp_path):
    signature, model, basis = case
    path = path_in(basis, model, signature)
    path.save(tmp_path / "path.safetensors")
    loaded = SolutionPath.load(tmp_path / "path.safetensors")
    assert loaded.basis.keys() == basis.keys() and all(torch.equal(loaded.basis[k], basis[k]) for k in basis)
    assert loaded.plan(0.3) == path.plan(0.3)
    assert loaded.content_sha256() == path.content_sha256() != path_in(None, model, signature).content_sha256()


def test_a_basis_of_another_model_is_refused(tiny_vit, tiny_bert):
    signature = signature_of("tiny_bert")
    basis = principal_basis(tiny_bert, find_sites(tiny_bert), batches(signature), signature)
    with pytest.raises(ArtifactError, match="of another model"):
        in_basis(tiny_vit, find_sites(tiny_vit), basis)


def test_a_basis_needs_calibration_data(tiny_vit):
    with pytest.raises(DataError, match="no calibration data"):
        principal_basis(tiny_vit, find_sites(tiny_vit), [], signature_of("tiny_vit"))
